// What each step of training takes; one struct a step, laid out as `lexmill.model.kernels` fills it.
#pragma once

#include <cstdint>

namespace lexmill {

enum Activation : int64_t { kSilu = 0, kGeluTanh = 1, kGelu = 2 };

// Adds a branch to the stream and norms the sum: RMS norm, or with `centred` layer norm.
struct AddNorm {
    int64_t rows, width, centred, x_bf16, branch_bf16, normed_bf16;
    const void *x, *branch;      // (rows, width); `branch` may be null; with one, x is float32
    const float *weight, *bias;  // (width); `bias` may be null
    float* sum;                  // (rows, width), x + branch; null without a branch
    void* normed;                // (rows, width)
    float* stream;               // (rows, width), `normed` before its rounding to bfloat16; may be null
    float *mean, *inverse;       // (rows), for the way back: 0 if not centred; 1 / sqrt(variance + eps)
    float eps;
};

struct AddNormBack {
    int64_t rows, width, centred, x_bf16, normed_bf16;
    const void* x;  // (rows, width): the sum
    const float *weight, *mean, *inverse;
    const float* from_sum;       // gradient of `sum`; may be null
    const void* from_normed;     // of `normed`; it or the next one may be null
    const float* from_stream;    // of `stream`
    void* to_x;                  // of x's type
    void* to_branch;             // the same in bfloat16; may be null
    float *to_weight, *to_bias;  // (width); `to_bias` may be null
};

struct Gated {
    int64_t count, is_bf16, activation;
    const void *gate, *up;  // (count); `up` may be null: 1
    void* out;
};

struct GatedBack {
    int64_t count, is_bf16, activation;
    const void *gate, *up, *gradient;
    void *to_gate, *to_up;
};

struct Rotate {
    int64_t batch, time, heads, width, tables, is_bf16;  // tables: 1, or one for each text
    int64_t x_batch, x_time, x_head, y_batch, y_time, y_head;  // strides in numbers
    const void* x;
    void* y;
    const float *cos, *sin;  // (tables, time, width / 2)
    float sign;              // -1 turns the other way
};

struct Softmax {
    int64_t rows, keys, queries, causal, is_bf16;  // queries: rows of one block, for the causal mask
    void* scores;                                  // (rows, keys), in place
    float scale;
};

struct SoftmaxBack {
    int64_t rows, keys, is_bf16;
    const void* share;  // (rows, keys)
    void* gradient;     // (rows, keys), in place
    float scale;
};

struct CrossEntropy {
    int64_t rows, vocabulary, is_bf16;
    void* logits;            // (rows, vocabulary), become their gradient
    const int64_t* targets;  // (rows); negative where nothing is learned
    const float* bias;       // (vocabulary), added to each row; may be null
    float* lost;             // (rows), in nats
};

struct Strides {
    int64_t batch, head, time;  // in numbers; the last axis is dense
};

// softmax(scale Q Kᵀ + bias) V, all in bfloat16. Heads that share keys follow each other.
struct Attention {
    int64_t batch, heads, kv_heads, queries, keys, width, causal, masks;  // masks: 1, or one for each text
    Strides q_strides, k_strides, v_strides, out_strides;
    const void *q, *k, *v;
    void* out;
    float* log_sums;    // (batch, heads, queries): the logarithm of the sum of e^score, for the way back
    const void* mask;   // (masks, keys, queries) bytes, not 0 where a query sees a key; or null
    const float* bias;  // (heads, keys, queries), or null
    float scale;
};

struct AttentionBack {
    Attention forward;
    Strides gradient_strides, to_q_strides, to_k_strides, to_v_strides;
    const void* gradient;  // as `out`
    void *to_q, *to_k, *to_v;
    float* to_bias;  // as `bias`, or null
};

// Gᵀ X in float32 from G, (rows, outputs), and X, (rows, inputs), in bfloat16.
struct WeightGradient {
    int64_t rows, outputs, inputs, gradient_row, x_row;  // *_row: from one row to the next, in numbers
    const void *gradient, *x;
    float *to_weight, *to_bias;  // (outputs, inputs), (outputs); `to_bias` may be null
};

// One set of steps for each instruction set that they are compiled for.
#define LEXMILL_DECLARE(isa)                                                                        \
    namespace isa {                                                                                 \
    void add_norm(const AddNorm&, long first, long end);                                            \
    void add_norm_back(const AddNormBack&, long first, long end, float* to_weight, float* to_bias); \
    void gated(const Gated&, long first, long end);                                                 \
    void gated_back(const GatedBack&, long first, long end);                                        \
    void rotate(const Rotate&, long first, long end);                                               \
    void softmax(const Softmax&, long first, long end);                                             \
    void softmax_back(const SoftmaxBack&, long first, long end);                                    \
    void cross_entropy(const CrossEntropy&, long first, long end);                                  \
    }

LEXMILL_DECLARE(portable)
LEXMILL_DECLARE(avx2)
LEXMILL_DECLARE(avx512)

// Attention is compiled for products of bfloat16 alone.
#define LEXMILL_DECLARE_ATTENTION(isa)                                                \
    namespace isa {                                                                   \
    void attention(const Attention&, long first, long end);                           \
    void attention_back(const AttentionBack&, long first, long end, float* to_bias); \
    }

LEXMILL_DECLARE_ATTENTION(avx512_bf16)
LEXMILL_DECLARE_ATTENTION(amx)

namespace amx {
void weight_gradient(const WeightGradient&, long first, long end);
}

}  // namespace lexmill
