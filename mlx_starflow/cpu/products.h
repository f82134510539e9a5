// Products of activations with weights that are read once and where they lie. A BLAS packs the weights first, which for
// a few rows costs more than the product.
#pragma once

#include <cstddef>

#include "vectors.h"

namespace starflow {

#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int TILE = 4;  // rows of x; there are 32 registers
#else
constexpr int TILE = 2;
#endif
constexpr int GROUP = 4;  // rows of w
constexpr int AHEAD = 4;  // rows of w: they are too short for the processor to see by itself that it reads on and on

// Sums over i of x[r][i] * w[c][i] for R rows of x and C of w, in the order r, c; `out` has room for LANES. Each is
// rounded alike whatever R and C.
template <int R, int C>
inline void tile(const float* x, ptrdiff_t ldx, const float* w, ptrdiff_t ldw, int k, float* out, bool prefetch) {
    const int whole = k / LANES * LANES;
    Vector s[R * C];
    for (int p = 0; p < PARTS; p++) {  // one register of each vector at a time, so that all sums find room in registers
        Register part[R * C] = {};
        for (int i = p * WIDTH; i < whole; i += LANES) {
            if (prefetch && p == 0)
                for (int c = 0; c < C; c++) __builtin_prefetch(w + (c + AHEAD) * ldw + i);
            Register b[C];
            for (int c = 0; c < C; c++) b[c] = Few<WIDTH>::load(w + c * ldw + i);
            for (int r = 0; r < R; r++) {
                const Register a = Few<WIDTH>::load(x + r * ldx + i);
                for (int c = 0; c < C; c++) part[r * C + c] += a * b[c];
            }
        }
        for (int n = 0; n < R * C; n++) s[n].part[p] = part[n];
    }
    if (whole < k)
        for (int r = 0; r < R; r++)
            for (int c = 0; c < C; c++)
                accumulate(s[r * C + c], load_some(x + r * ldx + whole, k - whole),
                           load_some(w + c * ldw + whole, k - whole));
    store(out, sums<R * C>(s));
}

// to.operator()<C>(row, column, sums of C columns) for m rows of x and rows [from, stop) of w; `rows(column, count)`
// says where some rows of w lie, `ldw` numbers apart.
template <typename Rows, typename To>
inline void products(const float* x, ptrdiff_t ldx, int m, Rows rows, ptrdiff_t ldw, int from, int stop, int k, To to) {
    alignas(64) float out[LANES];
    auto some = [&]<int R, int C>(const float* w, int row, int column) {
        tile<R, C>(x + row * ldx, ldx, w, ldw, k, out, row == 0);
        for (int r = 0; r < R; r++) to.template operator()<C>(row + r, column, Few<C>::load(out + r * C));
    };
    int column = from;
    for (; column + GROUP <= stop; column += GROUP) {
        const float* w = rows(column, GROUP);
        int row = 0;
        if constexpr (TILE == 4)
            for (; row + 4 <= m; row += 4) some.template operator()<4, GROUP>(w, row, column);
        for (; row + 2 <= m; row += 2) some.template operator()<2, GROUP>(w, row, column);
        for (; row < m; row++) some.template operator()<1, GROUP>(w, row, column);
    }
    for (; column < stop; column++) {
        const float* w = rows(column, 1);
        for (int row = 0; row < m; row++) some.template operator()<1, 1>(w, row, column);
    }
}

}  // namespace starflow
