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

template <class In, class Out>
void rms_norm_rows(const RmsNorm& a, long first, long end) {
    const In* x = static_cast<const In*>(a.x);
    Out* y = static_cast<Out*>(a.y);
    for (long row = first; row < end; ++row) {
        const In* from = x + row * a.width;
        Out* to = y + row * a.width;
        float sum = 0;
        for (long i = 0; i < a.width; ++i) sum += load(from, i) * load(from, i);
        float inverse = 1.0f / std::sqrt(sum / float(a.width) + a.eps);
        a.inverse[row] = inverse;
        for (long i = 0; i < a.width; ++i) store(to, i, load(from, i) * inverse * a.weight[i]);
    }
}

template <class In, class Down>
void rms_norm_rows_back(const RmsNormBack& a, long first, long end, float* to_weight) {
    const In* x = static_cast<const In*>(a.x);
    const Down* down = static_cast<const Down*>(a.gradient);
    In* to = static_cast<In*>(a.to_x);
    for (long row = first; row < end; ++row) {
        const In* from = x + row * a.width;
        const Down* g = down + row * a.width;
        In* out = to + row * a.width;
        float inverse = a.inverse[row], along = 0;
        for (long i = 0; i < a.width; ++i) {
            float product = load(g, i) * load(from, i) * inverse;
            to_weight[i] += product;
            along += product * a.weight[i];
        }
        along /= float(a.width);  // what would only make the row longer has no effect
        for (long i = 0; i < a.width; ++i)
            store(out, i, inverse * (load(g, i) * a.weight[i] - load(from, i) * inverse * along));
    }
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

void rms_norm(const RmsNorm& a, long first, long end) {
    if (a.in_bf16)
        a.out_bf16 ? rms_norm_rows<bf16, bf16>(a, first, end) : rms_norm_rows<bf16, float>(a, first, end);
    else
        a.out_bf16 ? rms_norm_rows<float, bf16>(a, first, end) : rms_norm_rows<float, float>(a, first, end);
}

void rms_norm_back(const RmsNormBack& a, long first, long end, float* to_weight) {
    if (a.in_bf16)
        a.gradient_bf16 ? rms_norm_rows_back<bf16, bf16>(a, first, end, to_weight)
                        : rms_norm_rows_back<bf16, float>(a, first, end, to_weight);
    else
        a.gradient_bf16 ? rms_norm_rows_back<float, bf16>(a, first, end, to_weight)
                        : rms_norm_rows_back<float, float>(a, first, end, to_weight);
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
