// Sixteen numbers at a time, on every processor: sums are added up in the same order everywhere.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace starflow {

constexpr int LANES = 16;

typedef float Vector __attribute__((vector_size(4 * LANES)));
typedef int32_t Integers __attribute__((vector_size(4 * LANES)));
typedef float Unaligned __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

inline Vector load(const float* from) { return *(const Unaligned*)from; }
inline void store(float* to, Vector v) { *(Unaligned*)to = v; }

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

inline Vector all(float value) { return value - Vector{}; }

inline Vector larger(Vector a, Vector b) { return a > b ? a : b; }

// The first `count` numbers, and `rest` for the others.
inline Vector load_some(const float* from, int count, float rest = 0) {
    Vector v = all(rest);
    for (int i = 0; i < count; i++) v[i] = from[i];
    return v;
}

inline void store_some(float* to, Vector v, int count) {
    for (int i = 0; i < count; i++) to[i] = v[i];
}

// Sums of neighbours: first those of a, then those of b.
inline Vector neighbours(Vector a, Vector b) {
    Integers even, odd;
    for (int i = 0; i < LANES; i++) even[i] = 2 * i, odd[i] = 2 * i + 1;
    return __builtin_shuffle(a, b, even) + __builtin_shuffle(a, b, odd);
}

// The sum of each of up to sixteen vectors.
template <int COUNT>
inline Vector sums(const Vector* of) {
    Vector v[LANES];
    for (int i = 0; i < LANES; i++) v[i] = i < COUNT ? of[i] : Vector{};
    for (int half = LANES / 2; half; half /= 2)
        for (int i = 0; i < half; i++) v[i] = neighbours(v[2 * i], v[2 * i + 1]);
    return v[0];
}

inline float sum(Vector v) { return sums<1>(&v)[0]; }

inline float largest(Vector v) {
    float most = v[0];
    for (int i = 1; i < LANES; i++) most = v[i] > most ? v[i] : most;
    return most;
}

// e^x within 2 units in the last place; e^-87 for less than that.
inline Vector exponential(Vector x) {
    constexpr float LN2_HIGH = 0.693359375f, LN2_LOW = -2.12194440e-4f, ROUND = 12582912.0f;
    x = larger(x, all(-87.0f));
    x = x < 88.0f ? x : all(88.0f);
    const Vector shifted = x * 1.44269504f + ROUND;
    const Vector power = shifted - ROUND;
    const Vector r = (x - power * LN2_HIGH) - power * LN2_LOW;
    Vector p = all(1.0f / 5040);
    for (float factor : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) p = p * r + factor;
    const Integers exponent = __builtin_convertvector(power, Integers) + 127;
    return p * (Vector)(exponent << 23);
}

// x * Phi(x) within 1e-6: erf by Abramowitz and Stegun, 7.1.28.
inline Vector gelu(Vector x) {
    constexpr float ERF[] = {1.0f, 4.986734697e-02f, 2.114100615e-02f, 3.277626324e-03f,
                             3.800357500e-05f, 4.889063564e-05f, 5.382975000e-06f};  // of |x| rather than |x| / sqrt(2)
    const Vector size = x < 0.0f ? -x : x;
    Vector power = all(ERF[6]);
    for (int i = 5; i >= 0; i--) power = power * size + ERF[i];
    for (int i = 0; i < 4; i++) power = power * power;
    // Far from 0 the power is infinite, and its reciprocal 0.
    const Vector half = 0.5f * size;
    return 0.5f * x + half - half / power;
}

// GELU in the approximation by tanh.
inline Vector gelu_tanh(Vector x) {
    const Vector twice = x * (1.5957691216f + 0.0713548162726f * x * x);
    return x / (1.0f + exponential(-twice));
}

}  // namespace starflow
