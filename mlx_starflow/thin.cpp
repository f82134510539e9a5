// Matrix products of a few rows. A BLAS packs the matrix on the right before it multiplies, which for a few rows costs
// more than the product itself; this reads it once and where it lies. See thin.py.

#include <atomic>
#include <cstddef>
#include <mutex>
#include <thread>

namespace {

// As many on every x86-64, so that their sums are rounded alike.
constexpr int LANES = 8;
#if defined(__AVX__) && !defined(__AVX512VL__)
constexpr int ROWS = 2;  // 16 registers
#else
constexpr int ROWS = 4;
#endif
constexpr int COLUMNS = 4;
constexpr int LINE = 16;  // numbers in a line of the cache
constexpr int AHEAD = 4;  // columns: rows of w are too short for the processor to see by itself that it reads on and on

typedef float Vector __attribute__((vector_size(4 * LANES)));
typedef float Unaligned __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int Index __attribute__((vector_size(4 * LANES)));

// y = alpha * x w^T + beta * y, row-major: m rows of x, n rows of w, k columns of both.
struct Product {
    int m, n, k;
    float alpha, beta;
    const float *x, *w;
    ptrdiff_t ldx, ldw;
    float* y;
    ptrdiff_t ldy;
};

// Sums of neighbours: first those of a, then those of b.
inline Vector neighbours(Vector a, Vector b) {
    Index even, odd;
    for (int i = 0; i < LANES; i++) even[i] = 2 * i, odd[i] = 2 * i + 1;
    return __builtin_shuffle(a, b, even) + __builtin_shuffle(a, b, odd);
}

// R rows of x with C rows of w.
template <int R, int C>
inline void tile(const Product& p, int row, int column) {
    const float *x = p.x + row * p.ldx, *w = p.w + column * p.ldw;
    Vector s[R * C] = {};
    int i = 0;
    for (; i + LANES <= p.k; i += LANES) {
        if (i % LINE == 0)
            for (int c = 0; c < C; c++) __builtin_prefetch(w + (c + AHEAD) * p.ldw + i);
        Vector b[C];
        for (int c = 0; c < C; c++) b[c] = *(const Unaligned*)(w + c * p.ldw + i);
        for (int r = 0; r < R; r++) {
            Vector a = *(const Unaligned*)(x + r * p.ldx + i);
            for (int c = 0; c < C; c++) s[r * C + c] += a * b[c];
        }
    }
    float sums[(R * C + LANES - 1) / LANES * LANES];
    for (int first = 0; first < R * C; first += LANES) {
        Vector v[LANES];
        for (int j = 0; j < LANES; j++) v[j] = first + j < R * C ? s[first + j] : Vector{};
        for (int half = LANES / 2; half; half /= 2)
            for (int j = 0; j < half; j++) v[j] = neighbours(v[2 * j], v[2 * j + 1]);
        *(Unaligned*)(sums + first) = v[0];
    }
    for (int r = 0; r < R; r++)
        for (int c = 0; c < C; c++) {
            float sum = sums[r * C + c];
            for (int j = i; j < p.k; j++) sum += x[r * p.ldx + j] * w[c * p.ldw + j];
            float* to = p.y + (row + r) * p.ldy + column + c;
            *to = p.beta ? p.alpha * sum + p.beta * *to : p.alpha * sum;
        }
}

template <int C>
inline void rows(const Product& p, int column) {
    int row = 0;
    for (; row + ROWS <= p.m; row += ROWS) tile<ROWS, C>(p, row, column);
    for (; row + 2 <= p.m; row += 2) tile<2, C>(p, row, column);
    for (; row < p.m; row++) tile<1, C>(p, row, column);
}

void columns(const Product& p, int from, int to) {
    int column = from;
    for (; column + COLUMNS <= to; column += COLUMNS) rows<COLUMNS>(p, column);
    for (; column < to; column++) rows<1>(p, column);
}

// Several threads take pieces of a product in turn. None waits for one that has not begun: where there is no CPU for a
// helper, the caller does everything itself.
constexpr int CLOSED = 1 << 30;
constexpr int PIECE = 1 << 14;   // numbers of w
constexpr int LARGE = 1 << 16;
constexpr int PATIENCE = 300;    // looks for more work before a helper sleeps: some 20 microseconds

Product shared;
int width;
std::atomic<int> pieces{0}, next{CLOSED}, busy{0}, generation{0};
std::mutex owner;
int helpers = 0;

void take_pieces() {
    for (int i; (i = next.fetch_add(1)) < pieces.load();) {
        int from = i * width;
        columns(shared, from, from + width < shared.n ? from + width : shared.n);
    }
}

inline void rest() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}

void help() {
    for (int seen = 0;;) {
        for (int looks = 0; generation.load() == seen && looks < PATIENCE; looks++) rest();
        generation.wait(seen);
        seen = generation.load();
        busy++;
        take_pieces();
        if (--busy == 0) busy.notify_one();
    }
}

void together(const Product& p) {
    shared = p;
    width = (PIECE / p.k / COLUMNS + 1) * COLUMNS;
    pieces = (p.n + width - 1) / width;
    next = 0;
    generation++;
    generation.notify_all();
    take_pieces();
    next = CLOSED;  // a helper that comes now finds nothing, one that came before is waited for
    for (int looks = 0; busy.load() && looks < PATIENCE; looks++) rest();
    for (int working; (working = busy.load());) busy.wait(working);
}

using Gemm = void (*)(int, int, int, int, int, int, float, const float*, int, const float*, int, float, float*, int);
Gemm blas;
int limit;

}  // namespace

extern "C" void starflow_thin_setup(Gemm others, int most_rows, int threads) {
    blas = others;
    limit = most_rows;
    for (; helpers < threads - 1; helpers++) std::thread(help).detach();
}

extern "C" void starflow_thin_sgemm(int order, int transpose_x, int transpose_w, int m, int n, int k, float alpha,
                                    const float* x, int ldx, const float* w, int ldw, float beta, float* y, int ldy) {
    constexpr int ROW_MAJOR = 101, AS_IT_IS = 111, TRANSPOSED = 112;
    if (order != ROW_MAJOR || transpose_x != AS_IT_IS || transpose_w != TRANSPOSED || m > limit)
        return blas(order, transpose_x, transpose_w, m, n, k, alpha, x, ldx, w, ldw, beta, y, ldy);
    const Product p{m, n, k, alpha, beta, x, w, ldx, ldw, y, ldy};
    if (helpers && (ptrdiff_t)n * k >= LARGE && owner.try_lock()) {
        together(p);
        owner.unlock();
    } else {
        columns(p, 0, n);
    }
}
