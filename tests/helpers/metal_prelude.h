// The part of Metal that kernels use, for g++: see metal_shim.py. A kernel's source follows, then `run`.
// C headers and g++'s builtins only: the C++ library would take most of the time of compiling a kernel.
#include <stdint.h>
#include <ucontext.h>

#define device
#define constant volatile  // so that a pointer to constant memory does not become one to device memory
#define thread
#define threadgroup static  // one threadgroup runs at a time

typedef unsigned int uint;
struct uint3 {
    uint x, y, z;
};

template <typename To, typename From>
To as_type(From value) {
    static_assert(sizeof(To) == sizeof(From));
    To result;
    __builtin_memcpy(&result, &value, sizeof(To));
    return result;
}

// Round to nearest, ties to even. Conversions are explicit, so that a kernel says where it rounds.
struct float16_t {
    uint16_t bits;
    float16_t() = default;
    float16_t(const float16_t&) = default;
    float16_t(const volatile float16_t& other) : bits(other.bits) {}
    float16_t& operator=(const float16_t&) = default;
    float16_t& operator=(const volatile float16_t& other) { return *this = float16_t(other); }
    explicit float16_t(float value) {
        uint32_t magnitude = as_type<uint32_t>(value) & 0x7fffffff;
        if (magnitude > 0x7f800000) {
            magnitude = 0x7e00;
        } else if (magnitude >= 0x477ff000) {  // 65520
            magnitude = 0x7c00;
        } else if (magnitude < 0x38800000) {  // 2^-14: subnormal
            magnitude = static_cast<uint32_t>(__builtin_nearbyintf(__builtin_fabsf(value) * 0x1p24f));
        } else {
            magnitude = (magnitude + 0xfff + (magnitude >> 13 & 1) - 0x38000000) >> 13;
        }
        bits = (as_type<uint32_t>(value) >> 16 & 0x8000) | magnitude;
    }
    explicit operator float() const volatile {
        const uint32_t exponent = bits >> 10 & 31, mantissa = bits & 1023;
        float value = exponent ? __builtin_ldexpf(1024 + mantissa, static_cast<int>(exponent) - 25)
                               : static_cast<float>(mantissa) * 0x1p-24f;
        if (exponent == 31) {
            value = mantissa ? __builtin_nanf("") : __builtin_inff();
        }
        return bits & 0x8000 ? -value : value;
    }
};

struct bfloat16_t {
    uint16_t bits;
    bfloat16_t() = default;
    bfloat16_t(const bfloat16_t&) = default;
    bfloat16_t(const volatile bfloat16_t& other) : bits(other.bits) {}
    bfloat16_t& operator=(const bfloat16_t&) = default;
    bfloat16_t& operator=(const volatile bfloat16_t& other) { return *this = bfloat16_t(other); }
    explicit bfloat16_t(float value) {
        const uint32_t all = as_type<uint32_t>(value);
        bits = __builtin_isnan(value) ? 0x7fc0 : (all + 0x7fff + (all >> 16 & 1)) >> 16;
    }
    explicit operator float() const volatile { return as_type<float>(static_cast<uint32_t>(bits) << 16); }
};

typedef float16_t half;
typedef bfloat16_t bfloat;

namespace metal {
namespace precise {
inline float exp(float x) { return __builtin_expf(x); }
inline float log(float x) { return __builtin_logf(x); }
inline float tanh(float x) { return __builtin_tanhf(x); }
inline float sqrt(float x) { return __builtin_sqrtf(x); }
inline float rsqrt(float x) { return 1.0f / __builtin_sqrtf(x); }
}  // namespace precise
inline float abs(float x) { return __builtin_fabsf(x); }
inline float max(float a, float b) { return __builtin_fmaxf(a, b); }
inline float min(float a, float b) { return __builtin_fminf(a, b); }
inline float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
enum class mem_flags { mem_none, mem_device, mem_threadgroup };
}  // namespace metal
using namespace metal;

// A group of threads that wait for each other.
struct Meeting {
    int members = 0, arrived = 0;
    uint round = 0;
    float values[32];
};

struct Fiber {
    ucontext_t context;
    uint3 grid, local, group;
    uint index;
    bool done;
};

constexpr int STACK = 1 << 16;
static Fiber fibers[1024];
static char stacks[1024][STACK];
static ucontext_t scheduler;
static Fiber* current;
static bool progress;
static Meeting all, simdgroups[32];
static uint3 grid_size, group_size;
static void** buffers;

template <typename T>
static T smaller(T a, T b) {
    return b < a ? b : a;
}

static void meet(Meeting& meeting) {
    const uint round = meeting.round;
    if (++meeting.arrived == meeting.members) {
        meeting.arrived = 0;
        ++meeting.round;
        progress = true;
    }
    while (meeting.round == round) {
        swapcontext(&current->context, &scheduler);
    }
}

template <typename Combine>
static float reduce(float value, Combine combine) {
    Meeting& group = simdgroups[current->index / 32];
    group.values[current->index % 32] = value;
    meet(group);
    float values[32];
    __builtin_memcpy(values, group.values, sizeof(values));
    meet(group);
    for (int count = group.members; count > 1; count = (count + 1) / 2) {
        for (int i = 0; i < count / 2; ++i) {
            values[i] = combine(values[i], values[i + (count + 1) / 2]);
        }
    }
    return values[0];
}

inline float simd_sum(float value) {
    return reduce(value, [](float a, float b) { return a + b; });
}
inline float simd_max(float value) {
    return reduce(value, [](float a, float b) { return __builtin_fmaxf(a, b); });
}
inline void simdgroup_barrier(mem_flags) { meet(simdgroups[current->index / 32]); }
inline void threadgroup_barrier(mem_flags) { meet(all); }

static void body();  // calls the kernel for the current thread

static void enter() {
    body();
    current->done = progress = true;
    swapcontext(&current->context, &scheduler);
}

static bool run_threadgroup(uint3 group, bool backwards) {
    const uint3 start = {group.x * group_size.x, group.y * group_size.y, group.z * group_size.z};
    // Threadgroups at the grid's edges are smaller.
    const uint3 size = {smaller(group_size.x, grid_size.x - start.x), smaller(group_size.y, grid_size.y - start.y),
                        smaller(group_size.z, grid_size.z - start.z)};
    const int count = size.x * size.y * size.z;
    all = Meeting{};
    all.members = count;
    for (int i = 0; i * 32 < count; ++i) {
        simdgroups[i] = Meeting{};
        simdgroups[i].members = smaller(32, count - i * 32);
    }
    for (uint i = 0; i < static_cast<uint>(count); ++i) {
        Fiber& fiber = fibers[i];
        fiber.index = i;
        fiber.local = {i % size.x, i / size.x % size.y, i / size.x / size.y};
        fiber.grid = {start.x + fiber.local.x, start.y + fiber.local.y, start.z + fiber.local.z};
        fiber.group = group;
        fiber.done = false;
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = stacks[i];
        fiber.context.uc_stack.ss_size = STACK;
        makecontext(&fiber.context, enter, 0);
    }
    for (int left = count; left;) {
        progress = false;
        for (int i = 0; i < count; ++i) {
            current = &fibers[backwards ? count - 1 - i : i];
            if (!current->done) {
                swapcontext(&scheduler, &current->context);
                left -= current->done;
            }
        }
        if (!progress) {
            return false;
        }
    }
    return true;
}

// Returns 0, or 1 if threads wait for threads that never come.
extern "C" int run(void** memory, const uint* grid, const uint* group, int backwards) {
    buffers = memory;
    grid_size = {grid[0], grid[1], grid[2]};
    group_size = {group[0], group[1], group[2]};
    const uint x = (grid[0] + group[0] - 1) / group[0], y = (grid[1] + group[1] - 1) / group[1];
    const uint count = x * y * ((grid[2] + group[2] - 1) / group[2]);
    for (uint i = 0; i < count; ++i) {
        const uint place = backwards ? count - 1 - i : i;
        if (!run_threadgroup({place % x, place / x % y, place / x / y}, backwards)) {
            return 1;
        }
    }
    return 0;
}
