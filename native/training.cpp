// The steps of training between the matrix products, on CPUs: each reads its inputs once and writes its
// results once, where a chain of torch's operations passes through memory again and again. Compiled once
// per instruction set (`LEXMILL_ISA` names it); `kernels.cpp` picks one. Plain loops that compilers vectorise.
//
// All arrays are dense unless strides are given. bfloat16 is a uint16_t. Sums are float, in an order that
// depends on the number of threads only, so that a run with as many threads gives the same bits.

#include "training.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

namespace lexmill {
namespace LEXMILL_ISA {
namespace {

struct bf16 {
    uint16_t bits;
};

inline float load(const float* p, long i) { return p[i]; }
inline float load(const bf16* p, long i) {
    uint32_t bits = uint32_t(p[i].bits) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}
inline void store(float* p, long i, float value) { p[i] = value; }
inline void store(bf16* p, long i, float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;  // to the nearest, ties to even
    bool nan = (bits & 0x7fffffff) > 0x7f800000;
    p[i].bits = uint16_t(nan ? 0x7fc0 : rounded);
}

// e^x within 2 units in the last place (Cephes' polynomial); not-a-number stays so.
inline float exp_of(float x) {
    float bounded = x < -87.33654f ? -87.33654f : x;
    bounded = bounded > 88.37626f ? 88.37626f : bounded;
    float n = std::floor(bounded * 1.44269504f + 0.5f);
    float r = (bounded - n * 0.693359375f) + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    int32_t exponent = (int32_t(n) + 127) << 23;
    float scale;
    std::memcpy(&scale, &exponent, 4);
    return p * scale;
}

template <class Value>
inline float largest(long count, Value value) {
    float top = -INFINITY;
#pragma omp simd reduction(max : top)
    for (long i = 0; i < count; ++i) {
        float x = value(i);
        top = x > top ? x : top;
    }
    return top;
}

// A thread's own room for one row, so that each exponential is computed once.
inline float* row_of(long count) {
    static thread_local std::vector<float> room;
    if (long(room.size()) < count) room.resize(size_t(count));
    return room.data();
}

inline float sigmoid(float x) { return 1.0f / (1.0f + exp_of(-x)); }

// tanh form of GELU (Hendrycks & Gimpel 2016); tanh(z) = 2 sigmoid(2 z) - 1.
constexpr float kRoot = 0.7978845608f, kCube = 0.044715f;

struct Silu {
    static float value(float x) { return x * sigmoid(x); }
    static float slope(float x) {
        float s = sigmoid(x);
        return s * (1.0f + x * (1.0f - s));
    }
};
struct GeluTanh {
    static float value(float x) { return x * sigmoid(2.0f * kRoot * (x + kCube * x * x * x)); }
    static float slope(float x) {
        float s = sigmoid(2.0f * kRoot * (x + kCube * x * x * x));
        return s + x * s * (1.0f - s) * 2.0f * kRoot * (1.0f + 3.0f * kCube * x * x);
    }
};

// GELU by the normal distribution; its tail within 1e-7 (Abramowitz & Stegun 1964, 7.1.26).
struct Gelu {
    static float tail(float x, float& density) {
        float z = std::fabs(x) * 0.70710678f, t = 1.0f / (1.0f + 0.3275911f * z);
        density = exp_of(-z * z);
        float p = ((((1.061405429f * t - 1.453152027f) * t + 1.421413741f) * t - 0.284496736f) * t + 0.254829592f) * t;
        float beyond = 0.5f * p * density;
        return x < 0.0f ? beyond : 1.0f - beyond;
    }
    static float value(float x) {
        float density;
        return x * tail(x, density);
    }
    static float slope(float x) {
        float density, below = tail(x, density);
        return below + x * density * 0.3989422804f;
    }
};

template <class T>
const float* sum_of(const float* one, const T* other, long width, float* room) {
    for (long i = 0; i < width; ++i) room[i] = one ? one[i] + load(other, i) : load(other, i);
    return room;
}

// A row of `one`, plus that of `other`; either may be null. Where it lies, or in `room`.
const float* row_sum(const float* one, const void* other, bool is_bf16, long start, long width, float* room) {
    if (one) one += start;
    if (!other) return one;
    const float* floats = static_cast<const float*>(other) + start;
    if (is_bf16) return sum_of(one, static_cast<const bf16*>(other) + start, width, room);
    return one ? sum_of(one, floats, width, room) : floats;
}

void round_row(const float* from, long width, bf16* to) {
    for (long i = 0; i < width; ++i) store(to, i, from[i]);
}

template <class T, class Activation>
void gated_range(const Gated& a, long first, long end) {
    const T *gate = static_cast<const T*>(a.gate), *up = static_cast<const T*>(a.up);
    T* out = static_cast<T*>(a.out);
    if (up)
        for (long i = first; i < end; ++i) store(out, i, Activation::value(load(gate, i)) * load(up, i));
    else
        for (long i = first; i < end; ++i) store(out, i, Activation::value(load(gate, i)));
}

template <class T, class Activation>
void gated_range_back(const GatedBack& a, long first, long end) {
    const T *gate = static_cast<const T*>(a.gate), *up = static_cast<const T*>(a.up);
    const T* down = static_cast<const T*>(a.gradient);
    T *to_gate = static_cast<T*>(a.to_gate), *to_up = static_cast<T*>(a.to_up);
    if (!up) {
        for (long i = first; i < end; ++i) store(to_gate, i, load(down, i) * Activation::slope(load(gate, i)));
        return;
    }
    for (long i = first; i < end; ++i) {
        float g = load(down, i), x = load(gate, i), u = load(up, i);
        store(to_up, i, g * Activation::value(x));
        store(to_gate, i, g * u * Activation::slope(x));
    }
}

template <class Activation>
void gated_by(const Gated& a, long first, long end) {
    a.is_bf16 ? gated_range<bf16, Activation>(a, first, end) : gated_range<float, Activation>(a, first, end);
}

template <class Activation>
void gated_back_by(const GatedBack& a, long first, long end) {
    a.is_bf16 ? gated_range_back<bf16, Activation>(a, first, end)
              : gated_range_back<float, Activation>(a, first, end);
}

template <class T>
void rotate_rows(const Rotate& a, long first, long end) {
    const T* x = static_cast<const T*>(a.x);
    T* y = static_cast<T*>(a.y);
    long half = a.width / 2;
    for (long row = first; row < end; ++row) {  // a row is one position of one text, all its heads
        long batch = row / a.time, time = row % a.time;
        const float* cos = a.cos + ((a.tables > 1 ? batch : 0) * a.time + time) * half;
        const float* sin = a.sin + ((a.tables > 1 ? batch : 0) * a.time + time) * half;
        for (long head = 0; head < a.heads; ++head) {
            const T* from = x + batch * a.x_batch + time * a.x_time + head * a.x_head;
            T* to = y + batch * a.y_batch + time * a.y_time + head * a.y_head;
#pragma omp simd  // also where x and y are the same
            for (long i = 0; i < half; ++i) {
                float p = load(from, i), q = load(from, i + half), c = cos[i], s = sin[i] * a.sign;
                store(to, i, p * c - q * s);
                store(to, i + half, q * c + p * s);
            }
        }
    }
}

template <class T>
void softmax_rows(const Softmax& a, long first, long end) {
    T* scores = static_cast<T*>(a.scores);
    float* room = row_of(a.keys);
    for (long row = first; row < end; ++row) {
        T* s = scores + row * a.keys;
        // with a causal mask the last query of a block sees all keys, each one before it one less
        long seen = a.causal ? a.keys - (a.queries - 1 - row % a.queries) : a.keys;
        float top = largest(seen, [s](long i) { return load(s, i); }), sum = 0;
        for (long i = 0; i < seen; ++i) {
            float e = exp_of((load(s, i) - top) * a.scale);
            room[i] = e;
            sum += e;
        }
        float inverse = 1.0f / sum;
        for (long i = 0; i < seen; ++i) store(s, i, room[i] * inverse);
        for (long i = seen; i < a.keys; ++i) store(s, i, 0.0f);
    }
}

template <class T>
void softmax_rows_back(const SoftmaxBack& a, long first, long end) {
    const T* share = static_cast<const T*>(a.share);
    T* gradient = static_cast<T*>(a.gradient);
    for (long row = first; row < end; ++row) {
        const T* p = share + row * a.keys;
        T* g = gradient + row * a.keys;
        float sum = 0;
        for (long i = 0; i < a.keys; ++i) sum += load(p, i) * load(g, i);
        for (long i = 0; i < a.keys; ++i) store(g, i, load(p, i) * (load(g, i) - sum) * a.scale);
    }
}

template <class T, bool kBiased>
void cross_entropy_rows(const CrossEntropy& a, long first, long end) {
    T* logits = static_cast<T*>(a.logits);
    float* room = row_of(a.vocabulary);
    for (long row = first; row < end; ++row) {
        T* l = logits + row * a.vocabulary;
        if (a.targets[row] < 0) {  // nothing is learned here
            a.lost[row] = 0;
            for (long i = 0; i < a.vocabulary; ++i) store(l, i, 0.0f);
            continue;
        }
        auto logit = [&](long i) { return kBiased ? load(l, i) + a.bias[i] : load(l, i); };
        float top = largest(a.vocabulary, logit), sum = 0;
        for (long i = 0; i < a.vocabulary; ++i) {
            float e = exp_of(logit(i) - top);
            room[i] = e;
            sum += e;
        }
        long target = a.targets[row];
        float picked = logit(target), inverse = 1.0f / sum;
        a.lost[row] = std::log(sum) + top - picked;
        for (long i = 0; i < a.vocabulary; ++i) store(l, i, room[i] * inverse);
        store(l, target, room[target] * inverse - 1.0f);
    }
}

}  // namespace

void add_norm(const AddNorm& a, long first, long end) {
    long width = a.width;
    float *room = row_of(2 * width), *out = room + width;
    for (long row = first; row < end; ++row) {
        long start = row * width;
        const float* x = a.x_bf16 ? row_sum(nullptr, a.x, true, start, width, room)
                                  : row_sum(static_cast<const float*>(a.x), a.branch, a.branch_bf16, start, width,
                                            a.branch ? a.sum + start : nullptr);
        float mean = 0, squares = 0;
        if (a.centred) {
            for (long i = 0; i < width; ++i) mean += x[i];
            mean /= float(width);
        }
        for (long i = 0; i < width; ++i) squares += (x[i] - mean) * (x[i] - mean);
        float inverse = 1.0f / std::sqrt(squares / float(width) + a.eps);
        a.mean[row] = mean;
        a.inverse[row] = inverse;
        if (a.stream) out = a.stream + start;
        if (!a.normed_bf16) out = static_cast<float*>(a.normed) + start;
        const float *weight = a.weight, *bias = a.bias;
        for (long i = 0; i < width; ++i) {
            float unit = (x[i] - mean) * inverse * weight[i];
            out[i] = bias ? unit + bias[i] : unit;
        }
        if (a.normed_bf16) round_row(out, width, static_cast<bf16*>(a.normed) + start);
    }
}

void add_norm_back(const AddNormBack& a, long first, long end, float* to_weight, float* to_bias) {
    long width = a.width;
    float* room = row_of(3 * width);
    const float* weight = a.weight;
    for (long row = first; row < end; ++row) {
        long start = row * width;
        const float* x = row_sum(nullptr, a.x, a.x_bf16, start, width, room);
        const float* g = row_sum(a.from_stream, a.from_normed, a.normed_bf16, start, width, room + width);
        float mean = a.mean[row], inverse = a.inverse[row], along = 0, level = 0;
        for (long i = 0; i < width; ++i) {
            float product = g[i] * (x[i] - mean) * inverse;
            to_weight[i] += product;
            along += product * weight[i];
        }
        if (a.to_bias)
            for (long i = 0; i < width; ++i) to_bias[i] += g[i];
        if (a.centred)
            for (long i = 0; i < width; ++i) level += g[i] * weight[i];
        along *= inverse / float(width);  // what would only make the row longer, or shift it, has no effect
        level /= float(width);
        const float* more = a.from_sum ? a.from_sum + start : nullptr;
        float* to = a.x_bf16 ? room + 2 * width : static_cast<float*>(a.to_x) + start;
        for (long i = 0; i < width; ++i) {
            float found = inverse * (g[i] * weight[i] - level - (x[i] - mean) * along);
            to[i] = more ? found + more[i] : found;
        }
        if (a.x_bf16) round_row(to, width, static_cast<bf16*>(a.to_x) + start);
        if (a.to_branch) round_row(to, width, static_cast<bf16*>(a.to_branch) + start);
    }
}

void gated(const Gated& a, long first, long end) {
    if (a.activation == kSilu)
        gated_by<Silu>(a, first, end);
    else if (a.activation == kGeluTanh)
        gated_by<GeluTanh>(a, first, end);
    else
        gated_by<Gelu>(a, first, end);
}

void gated_back(const GatedBack& a, long first, long end) {
    if (a.activation == kSilu)
        gated_back_by<Silu>(a, first, end);
    else if (a.activation == kGeluTanh)
        gated_back_by<GeluTanh>(a, first, end);
    else
        gated_back_by<Gelu>(a, first, end);
}

void rotate(const Rotate& a, long first, long end) {
    a.is_bf16 ? rotate_rows<bf16>(a, first, end) : rotate_rows<float>(a, first, end);
}

void softmax(const Softmax& a, long first, long end) {
    a.is_bf16 ? softmax_rows<bf16>(a, first, end) : softmax_rows<float>(a, first, end);
}

void softmax_back(const SoftmaxBack& a, long first, long end) {
    a.is_bf16 ? softmax_rows_back<bf16>(a, first, end) : softmax_rows_back<float>(a, first, end);
}

void cross_entropy(const CrossEntropy& a, long first, long end) {
    if (a.bias)
        a.is_bf16 ? cross_entropy_rows<bf16, true>(a, first, end) : cross_entropy_rows<float, true>(a, first, end);
    else
        a.is_bf16 ? cross_entropy_rows<bf16, false>(a, first, end)
                  : cross_entropy_rows<float, false>(a, first, end);
}

}  // namespace LEXMILL_ISA
}  // namespace lexmill
