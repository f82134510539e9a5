// A flow block's network over a few tokens, with a KV cache: see network.py, which holds the same structures.

#include <algorithm>
#include <cstdlib>
#include <memory>

#include "products.h"
#include "thread_pool.h"
#include "weights.h"

namespace starflow {

enum NormKind { NONE = 0, LAYER_NORM = 1, RMS_NORM = 2 };

struct Norm {
    int32_t kind;
    float epsilon;
    const float *weight, *bias;  // of an RMS norm: an offset from 1, and none
};

struct Layer {
    Norm attention_norm, query_norm, key_norm, attention_post, mlp_norm, mlp_post;
    Linear qkv, proj, gate, up, down;  // without a gate, exact GELU follows `up`
    float *keys, *values;              // [batch, num_kv_heads, capacity, head_dim]
};

struct Block {
    int32_t count, channels, num_heads, num_kv_heads, head_dim, half_split, batch, capacity;
    const Layer* layers;
    Linear input;  // dense, its weight transposed, [inputs, outputs]: tokens are short
    Norm norm;
    Linear output;
};

struct Tokens {
    int32_t length, offset;  // how many are new in each sequence, and how many the cache holds
    const float* rope_frequencies;  // cosine and sine of each new position's pairs, or nothing
    const float* scales;     // [batch], of attention's scores
    const float* inputs;     // [batch, length, inputs]; nothing: they are embedded already
    const float* added;      // [batch, ...] to what they are embedded as, or nothing; `added_step` from one to the next
    int64_t added_step;
    float* hidden;   // [batch, length, channels], embedded inputs, replaced by what the layers make of them
    float* outputs;  // [batch, length, outputs], or nothing
};

namespace {

ThreadPool& thread_pool = *new ThreadPool;  // outlives everything: its threads do not end

// Numbers: so many of weights, or of rows to normalize, are worth handing to a worker.
constexpr int PIECE = 1 << 14;
constexpr int QUERIES = 16;  // of a piece of attention

// Numbers that begin on a line of the cache, kept for the next time they are needed.
class Buffer {
  public:
    float* of(size_t numbers) {
        if (numbers > size) {
            size = (numbers + 1023) / 1024 * 1024;
            memory.reset(static_cast<float*>(std::aligned_alloc(64, 4 * size)));
            std::fill(memory.get(), memory.get() + size, 0.0f);
        }
        return memory.get();
    }

  private:
    std::unique_ptr<float, void (*)(void*)> memory{nullptr, std::free};
    size_t size = 0;
};

void normalize(const Norm& norm, const float* x, float* y, int width) {
    if (norm.kind == NONE) {
        if (x != y) std::copy(x, x + width, y);
        return;
    }
    const int whole = width / LANES * LANES, left = width - whole;
    float mean = 0;
    if (norm.kind == LAYER_NORM) {
        Vector total = load_some(x + whole, left);
        for (int i = 0; i < whole; i += LANES) total = total + load(x + i);
        mean = sum(total) / width;
    }
    const Vector middle = all(mean), last = load_some(x + whole, left, mean) - middle;
    Vector square = last * last;
    for (int i = 0; i < whole; i += LANES) {
        const Vector d = load(x + i) - middle;
        accumulate(square, d, d);
    }
    const Vector scale = all(1 / std::sqrt(sum(square) / width + norm.epsilon)), offset = all(norm.kind == RMS_NORM);
    auto some = [&](int i, auto take, auto put) {
        Vector v = (take(x + i) - middle) * scale;
        if (norm.weight) v = v * (take(norm.weight + i) + offset);
        if (norm.bias) v = v + take(norm.bias + i);
        put(y + i, v);
    };
    for (int i = 0; i < whole; i += LANES) some(i, load, store);
    if (left)
        some(
            whole, [=](const float* from) { return load_some(from, left); },
            [=](float* to, const Vector& v) { store_some(to, v, left); });
}

int whole_vectors(int numbers) { return (numbers + LANES - 1) / LANES * LANES; }

// Rotate the pairs of one head by its position's rope frequencies.
void rotate(float* x, const float* rope_frequencies, int dim, bool half_split) {
    for (int i = 0; i < dim / 2; i++) {
        float &a = half_split ? x[i] : x[2 * i], &b = half_split ? x[i + dim / 2] : x[2 * i + 1];
        const float cosine = rope_frequencies[2 * i], sine = rope_frequencies[2 * i + 1], first = a, second = b;
        a = first * cosine - second * sine;
        b = first * sine + second * cosine;
    }
}

// scores[0..count) -> e^(score - largest), and zeros up to `stop`; returns the reciprocal of their sum. There is room
// for a whole vector.
float exponentials(float* scores, int count, int stop) {
    const int padded = whole_vectors(count);
    std::fill(scores + count, scores + padded, -INFINITY);
    Vector most = all(-INFINITY), total;
    for (int i = 0; i < padded; i += LANES) most = larger(most, load(scores + i));
    const Vector top = all(largest(most));
    for (int i = 0; i < padded; i += LANES) {
        const Vector e = exponential(load(scores + i) - top);
        store(scores + i, e);
        total = total + e;
    }
    std::fill(scores + count, scores + std::max(stop, padded), 0.0f);
    return 1 / sum(total);
}

// For R rows of weights: factor times the weighted sum of `count` rows of values.
template <int R>
void mix(const float* weights, int next, const float* values, int dim, int count, const float* factors, float* to,
         ptrdiff_t row) {
    constexpr int WIDE = 4 / PARTS;
    auto some = [&]<int W>(int from) {
        Vector s[R * W];
        for (int j = 0; j < count; j++) {
            Vector v[W];
            for (int w = 0; w < W; w++) v[w] = load(values + j * dim + from + w * LANES);
            for (int r = 0; r < R; r++)
                for (int w = 0; w < W; w++) accumulate(s[r * W + w], all(weights[r * next + j]), v[w]);
        }
        for (int r = 0; r < R; r++)
            for (int w = 0; w < W; w++) store(to + r * row + from + w * LANES, s[r * W + w] * all(factors[r]));
    };
    int i = 0;
    for (; i + WIDE * LANES <= dim; i += WIDE * LANES) some.template operator()<WIDE>(i);
    for (; i < dim; i += LANES) some.template operator()<1>(i);
}

class Evaluation {
  public:
    Evaluation(const Block& block, const Tokens& tokens)
        : block(block), tokens(tokens), claim(thread_pool), rows(block.batch * tokens.length) {}

    void run() {
        allocate();
        if (tokens.inputs) embed();
        for (int i = 0; i < block.count; i++) {
            const Layer& layer = block.layers[i];
            norm_rows(layer.attention_norm);
            product(layer.qkv, a, qkv);
            attention(layer);
            add(layer.proj, attended, layer.attention_post);
            norm_rows(layer.mlp_norm);
            mlp(layer);
            add(layer.down, inner, layer.mlp_post);
        }
        if (tokens.outputs) {
            norm_rows(block.norm);
            product(block.output, a, tokens.outputs);
        }
    }

    void multiply() {
        allocate();
        for (int i = 0; i < block.count; i++) {
            const Layer& layer = block.layers[i];
            product(layer.qkv, a, qkv);
            product(layer.proj, attended, branch);
            if (layer.gate.weight) product(layer.gate, a, inner);
            product(layer.up, a, inner);
            product(layer.down, inner, branch);
        }
    }

  private:
    void allocate() {
        static thread_local Buffer memory[5];
        const Layer& first = block.layers[0];
        a = memory[0].of(size_t(rows) * block.channels);
        qkv = memory[1].of(size_t(rows) * first.qkv.outputs);
        attended = memory[2].of(size_t(rows) * first.proj.inputs);
        inner = memory[3].of(size_t(rows) * first.up.outputs);
        branch = memory[4].of(size_t(rows) * block.channels);
    }

    void embed() {
        const int width = block.channels, inputs = block.input.inputs;
        const float *weights = static_cast<const float*>(block.input.weight), *bias = block.input.bias;
        each_row([&](int row) {
            const int sample = row / tokens.length, n = row % tokens.length;
            const float* x = tokens.inputs + size_t(row) * inputs;
            const float* added = tokens.added ? tokens.added + sample * tokens.added_step + size_t(n) * width : nullptr;
            float* h = tokens.hidden + size_t(row) * width;
            for (int c = 0; c < width; c++) h[c] = (bias ? bias[c] : 0) + (added ? added[c] : 0);
            for (int i = 0; i < inputs; i++) {
                const float* weight = weights + size_t(i) * width;
                for (int c = 0; c < width; c++) h[c] += x[i] * weight[c];
            }
        });
    }

    // work(from, stop) for parts of a projection's outputs.
    template <typename Work>
    void outputs(const Linear& linear, Work work) {
        const int width = std::max(1, PIECE / GROUP / linear.inputs) * GROUP;
        claim.parallel_for((linear.outputs + width - 1) / width,
                 [&](int i) { work(i * width, std::min((i + 1) * width, linear.outputs)); });
    }

    template <typename To>
    void project(const Linear& linear, const float* x, int from, int stop, To to) {
        static thread_local Buffer memory;
        const int width = linear.inputs;
        const float* bias = linear.bias;
        auto put = [&]<int C>(int row, int column, typename Few<C>::Type sums) {
            to.template operator()<C>(row, column, bias ? sums + Few<C>::load(bias + column) : sums);
        };
        auto dense = [&](int row, int) { return static_cast<const float*>(linear.weight) + size_t(row) * width; };
        auto unpacked = [&](int row, int count) {
            float* some = memory.of(size_t(GROUP) * width);
            for (int i = 0; i < count; i++) unpack_row(linear, row + i, some + i * width);
            return some;
        };
        if (linear.bits)
            products(x, width, rows, unpacked, width, from, stop, width, put);
        else
            products(x, width, rows, dense, width, from, stop, width, put);
    }

    void product(const Linear& linear, const float* x, float* y) {
        outputs(linear, [&](int from, int stop) {
            project(linear, x, from, stop, [&]<int C>(int row, int column, typename Few<C>::Type sums) {
                Few<C>::store(y + size_t(row) * linear.outputs + column, sums);
            });
        });
    }

    // What a branch gives, normalized where the layer wants that, is added to what it began with.
    void add(const Linear& linear, const float* x, const Norm& norm) {
        if (norm.kind == NONE) {
            outputs(linear, [&](int from, int stop) {
                project(linear, x, from, stop, [&]<int C>(int row, int column, typename Few<C>::Type sums) {
                    float* h = tokens.hidden + size_t(row) * linear.outputs + column;
                    Few<C>::store(h, Few<C>::load(h) + sums);
                });
            });
            return;
        }
        product(linear, x, branch);
        each_row([&](int row) {
            float *y = branch + size_t(row) * block.channels, *h = tokens.hidden + size_t(row) * block.channels;
            normalize(norm, y, y, block.channels);
            for (int i = 0; i < block.channels; i++) h[i] += y[i];
        });
    }

    void mlp(const Layer& layer) {
        const int width = layer.up.outputs;
        outputs(layer.up, [&](int from, int stop) {
            auto put = [&]<int C>(int row, int column, typename Few<C>::Type sums) {
                Few<C>::store(inner + size_t(row) * width + column, sums);
            };
            if (layer.gate.weight) {
                project(layer.gate, a, from, stop, put);
                activate(from, stop, width, gelu_tanh);
                project(layer.up, a, from, stop, [&]<int C>(int row, int column, typename Few<C>::Type sums) {
                    float* y = inner + size_t(row) * width + column;
                    Few<C>::store(y, Few<C>::load(y) * sums);
                });
            } else {
                project(layer.up, a, from, stop, put);
                activate(from, stop, width, gelu);
            }
        });
    }

    template <typename Function>
    void activate(int from, int stop, int width, Function function) {
        for (int row = 0; row < rows; row++) {
            float* y = inner + size_t(row) * width;
            int i = from;
            for (; i + LANES <= stop; i += LANES) store(y + i, function(load(y + i)));
            if (i < stop) store_some(y + i, function(load_some(y + i, stop - i)), stop - i);
        }
    }

    void norm_rows(const Norm& norm) {
        each_row([&](int row) {
            const size_t from = size_t(row) * block.channels;
            normalize(norm, tokens.hidden + from, a + from, block.channels);
        });
    }

    template <typename Work>
    void each_row(Work work) {
        const int some = std::max(1, PIECE / 2 / block.channels);
        claim.parallel_for((rows + some - 1) / some, [&](int i) {
            for (int row = i * some; row < std::min((i + 1) * some, rows); row++) work(row);
        });
    }

    // Pieces are groups of heads that share keys and values, of many tokens further divided.
    void attention(const Layer& layer) {
        const int groups = block.batch * block.num_kv_heads, parts = (tokens.length + QUERIES - 1) / QUERIES;
        auto attend = [&](int i) { this->attend(layer, i % groups, i / groups * QUERIES); };
        if (parts == 1) {
            claim.parallel_for(groups, [&](int i) {
                rotate_heads(layer, i);
                attend(i);
            });
        } else {
            claim.parallel_for(groups, [&](int i) { rotate_heads(layer, i); });
            claim.parallel_for(groups * parts, attend);
        }
    }

    size_t cached(int group) const { return size_t(group) * block.capacity * block.head_dim; }

    float* packed(const Layer& layer, int group) const {
        return qkv + size_t(group / block.num_kv_heads) * tokens.length * layer.qkv.outputs;
    }

    // Norms and rotation of a group's queries and keys, which the cache gets, and values as well.
    void rotate_heads(const Layer& layer, int group) {
        const int dim = block.head_dim, kv_heads = block.num_kv_heads, ratio = block.num_heads / kv_heads;
        const int number = group % kv_heads;
        for (int n = 0; n < tokens.length; n++) {
            const float* frequencies = tokens.rope_frequencies ? tokens.rope_frequencies + size_t(n) * dim : nullptr;
            float* token = packed(layer, group) + size_t(n) * layer.qkv.outputs;
            auto rotated = [&](const Norm& norm, int head) {
                float* x = token + head * dim;
                normalize(norm, x, x, dim);
                if (frequencies) rotate(x, frequencies, dim, block.half_split);
                return x;
            };
            for (int head = number * ratio; head < (number + 1) * ratio; head++) rotated(layer.query_norm, head);
            const float *key = rotated(layer.key_norm, block.num_heads + number), *value = key + kv_heads * dim;
            const size_t to = cached(group) + size_t(tokens.offset + n) * dim;
            std::copy(key, key + dim, layer.keys + to);
            std::copy(value, value + dim, layer.values + to);
        }
    }

    // Up to QUERIES tokens from number `from` on.
    void attend(const Layer& layer, int group, int from) {
        static thread_local Buffer memory;
        const int dim = block.head_dim, kv_heads = block.num_kv_heads, ratio = block.num_heads / kv_heads;
        const int number = group % kv_heads, sample = group / kv_heads, stop = std::min(from + QUERIES, tokens.length);
        const int stride = whole_vectors(tokens.offset + stop);
        const ptrdiff_t row = layer.qkv.outputs, width = layer.proj.inputs;
        float* scores = memory.of(size_t(TILE) * stride);
        const float *keys = layer.keys + cached(group), *values = layer.values + cached(group);
        auto queries = [&]<int R>(int head, int n) {
            const int seen = tokens.offset + n + R;
            float factors[R];
            const float* q = packed(layer, group) + n * row + head * dim;
            auto at = [&](int j, int) { return keys + size_t(j) * dim; };
            products(q, row, R, at, dim, 0, seen, dim, [&]<int C>(int r, int j, typename Few<C>::Type sums) {
                Few<C>::store(scores + r * stride + j, sums * tokens.scales[sample]);
            });
            for (int r = 0; r < R; r++) factors[r] = exponentials(scores + r * stride, seen - R + r + 1, seen);
            float* to = attended + (size_t(sample) * tokens.length + n) * width + head * dim;
            mix<R>(scores, stride, values, dim, seen, factors, to, width);
        };
        for (int head = number * ratio; head < (number + 1) * ratio; head++) {
            int n = from;
            for (; n + TILE <= stop; n += TILE) queries.template operator()<TILE>(head, n);
            for (; n < stop; n++) queries.template operator()<1>(head, n);
        }
    }

    const Block& block;
    const Tokens& tokens;
    ThreadPool::Claim claim;
    const int rows;
    float *a, *qkv, *attended, *inner, *branch;
};

}  // namespace
}  // namespace starflow

extern "C" void starflow_threads(int threads) { starflow::thread_pool.grow(threads); }

extern "C" void starflow_network(const starflow::Block* block, const starflow::Tokens* tokens) {
    starflow::Evaluation(*block, *tokens).run();
}

// The products of one evaluation with weights, and nothing else: what it would take if nothing else did.
extern "C" void starflow_products(const starflow::Block* block, const starflow::Tokens* tokens) {
    starflow::Evaluation(*block, *tokens).multiply();
}
