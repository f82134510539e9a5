// Sixteen numbers at a time, in as many registers as that takes: sums are added up in the same order on every
// processor.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <initializer_list>

namespace starflow {

constexpr int LANES = 16;

#if defined(__AVX512F__)
constexpr int WIDTH = 16;  // numbers in a register
#elif defined(__AVX__)
constexpr int WIDTH = 8;
#else
constexpr int WIDTH = 4;
#endif
constexpr int PARTS = LANES / WIDTH;

// A few numbers side by side.
template <int COUNT>
struct Few {
    typedef float Type __attribute__((vector_size(4 * COUNT)));

    static Type load(const float* from) {
        Type v;
        std::memcpy(&v, from, sizeof v);
        return v;
    }
    static void store(float* to, Type v) { std::memcpy(to, &v, sizeof v); }
};

using Register = Few<WIDTH>::Type;
typedef int32_t Integers __attribute__((vector_size(4 * WIDTH)));

struct Vector {
    Register part[PARTS] = {};
};

// One operation on the registers of some vectors.
template <typename Operation, typename... Vectors>
[[gnu::always_inline]] inline Vector each(Operation operation, const Vectors&... of) {
    Vector result;
    for (int p = 0; p < PARTS; p++) result.part[p] = operation(of.part[p]...);
    return result;
}

inline Vector load(const float* from) {
    Vector v;
    for (int p = 0; p < PARTS; p++) v.part[p] = Few<WIDTH>::load(from + p * WIDTH);
    return v;
}

inline void store(float* to, const Vector& v) {
    for (int p = 0; p < PARTS; p++) Few<WIDTH>::store(to + p * WIDTH, v.part[p]);
}

inline Vector all(float value) {
    return each([=](Register zero) { return value - zero; }, Vector{});
}

inline Vector operator+(const Vector& a, const Vector& b) {
    return each([](Register x, Register y) { return x + y; }, a, b);
}
inline Vector operator-(const Vector& a, const Vector& b) {
    return each([](Register x, Register y) { return x - y; }, a, b);
}
inline Vector operator*(const Vector& a, const Vector& b) {
    return each([](Register x, Register y) { return x * y; }, a, b);
}
inline Vector operator/(const Vector& a, const Vector& b) {
    return each([](Register x, Register y) { return x / y; }, a, b);
}
inline Vector larger(const Vector& a, const Vector& b) {
    return each([](Register x, Register y) { return x > y ? x : y; }, a, b);
}

// sum += a * b
inline void accumulate(Vector& sum, const Vector& a, const Vector& b) {
    for (int p = 0; p < PARTS; p++) sum.part[p] += a.part[p] * b.part[p];
}

// The first `count` numbers, and `rest` for the others.
inline Vector load_some(const float* from, int count, float rest = 0) {
    if (!count) return all(rest);
    float numbers[LANES];
    for (int i = 0; i < LANES; i++) numbers[i] = i < count ? from[i] : rest;
    return load(numbers);
}

inline void store_some(float* to, const Vector& v, int count) {
    float numbers[LANES];
    store(numbers, v);
    std::memcpy(to, numbers, 4 * count);
}

// Sums of neighbours: first those of a, then those of b.
inline Register neighbours(Register a, Register b) {
    Integers even, odd;
    for (int i = 0; i < WIDTH; i++) even[i] = 2 * i, odd[i] = 2 * i + 1;
    return __builtin_shuffle(a, b, even) + __builtin_shuffle(a, b, odd);
}

inline Vector neighbours(const Vector& a, const Vector& b) {
    Register both[2 * PARTS];
    for (int p = 0; p < PARTS; p++) both[p] = a.part[p], both[PARTS + p] = b.part[p];
    Vector result;
    for (int p = 0; p < PARTS; p++) result.part[p] = neighbours(both[2 * p], both[2 * p + 1]);
    return result;
}

// The sum of each of COUNT vectors, a power of 2 of them, over and over. Each level halves the summands.
template <int COUNT, int SUMMANDS = LANES>
inline Vector sums(const Vector* of) {
    if constexpr (SUMMANDS == 1) {
        return of[0];
    } else {
        constexpr int PAIRS = COUNT > 1 ? COUNT / 2 : 1;
        Vector v[PAIRS];
        for (int i = 0; i < PAIRS; i++) v[i] = neighbours(of[2 * i % COUNT], of[(2 * i + 1) % COUNT]);
        return sums<PAIRS, SUMMANDS / 2>(v);
    }
}

inline float sum(const Vector& v) { return sums<1>(&v).part[0][0]; }

inline float largest(const Vector& v) {
    float most = v.part[0][0];
    for (int i = 1; i < LANES; i++) most = std::fmax(most, v.part[i / WIDTH][i % WIDTH]);
    return most;
}

// e^x within 2 units in the last place; outside of -87 to 88 as at the nearer of these.
inline Vector exponential(const Vector& of) {
    return each(
        [](Register x) {
            constexpr float LN2_HIGH = 0.693359375f, LN2_LOW = -2.12194440e-4f, ROUND = 12582912.0f;
            x = x > -87.0f ? x : -87.0f - Register{};
            x = x < 88.0f ? x : 88.0f - Register{};
            const Register power = (x * 1.44269504f + ROUND) - ROUND;
            const Register r = (x - power * LN2_HIGH) - power * LN2_LOW;
            Register p = 1.0f / 5040 - Register{};
            for (float factor : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) p = p * r + factor;
            const Integers exponent = __builtin_convertvector(power, Integers) + 127;
            return p * (Register)(exponent << 23);
        },
        of);
}

// x * Phi(x) within 1e-6: erf by Abramowitz and Stegun, 7.1.28.
inline Vector gelu(const Vector& of) {
    return each(
        [](Register x) {
            // Of |x| rather than |x| / sqrt(2).
            constexpr float ERF[] = {1.0f,           4.986734697e-02f, 2.114100615e-02f, 3.277626324e-03f,
                                     3.800357500e-05f, 4.889063564e-05f, 5.382975000e-06f};
            const Register size = x < 0.0f ? -x : x;
            Register power = ERF[6] - Register{};
            for (int i = 5; i >= 0; i--) power = power * size + ERF[i];
            for (int i = 0; i < 4; i++) power = power * power;
            // Far from 0 the power is infinite, and its reciprocal 0.
            const Register half = 0.5f * size;
            return 0.5f * x + half - half / power;
        },
        of);
}

// GELU in the approximation by tanh.
inline Vector gelu_tanh(const Vector& x) {
    const Vector twice = x * (all(1.5957691216f) + all(0.0713548162726f) * x * x);
    return x / (all(1) + exponential(all(0) - twice));
}

}  // namespace starflow
