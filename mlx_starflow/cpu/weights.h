// Weights of a projection, dense or in MLX's affine quantization, row by row.
#pragma once

#include "vectors.h"

namespace starflow {

struct Linear {
    int32_t inputs, outputs;
    int32_t bits, group;         // 0 bits: float32; else 4, 6 or 8, and weights that share a scale, a multiple of LANES
    const void* weight;          // [outputs, inputs]
    const float *scales, *zeros;  // [outputs, inputs / group]: a weight is scale * number + zero
    const float* bias;           // may be missing
};

// Sixteen numbers of BITS bits each, the first in the lowest.
template <int BITS>
inline void unpack(const uint8_t* from, uint8_t* to) {
    if constexpr (BITS == 8) std::memcpy(to, from, LANES);
    if constexpr (BITS == 4)
        for (int i = 0; i < LANES / 2; i++) to[2 * i] = from[i] & 15, to[2 * i + 1] = from[i] >> 4;
    if constexpr (BITS == 6)
        for (int i = 0; i < LANES / 4; i++) {
            const uint32_t four = from[3 * i] | from[3 * i + 1] << 8 | from[3 * i + 2] << 16;
            for (int j = 0; j < 4; j++) to[4 * i + j] = four >> 6 * j & 63;
        }
}

template <int BITS>
void unpack_row(const Linear& linear, int row, float* to) {
    const int groups = linear.inputs / linear.group;
    const uint8_t* from = static_cast<const uint8_t*>(linear.weight) + size_t(row) * linear.inputs * BITS / 8;
    for (int g = 0; g < groups; g++) {
        const float scale = linear.scales[size_t(row) * groups + g], zero = linear.zeros[size_t(row) * groups + g];
        for (int i = 0; i < linear.group; i += LANES, from += LANES * BITS / 8, to += LANES) {
            uint8_t numbers[LANES];
            unpack<BITS>(from, numbers);
            for (int j = 0; j < LANES; j++) to[j] = numbers[j] * scale + zero;
        }
    }
}

inline void unpack_row(const Linear& linear, int row, float* to) {
    if (linear.bits == 8) unpack_row<8>(linear, row, to);
    if (linear.bits == 6) unpack_row<6>(linear, row, to);
    if (linear.bits == 4) unpack_row<4>(linear, row, to);
}

}  // namespace starflow
