// The steps of the engine, compiled once for each instruction set into a namespace of its own (LEXMILL_ISA).
// Products of 8- and 4-bit weights: what comes in is rounded to 8 bits with a scale for 32 columns, sums of 32
// products are exact whole numbers, and their scaled sums run over the blocks in order; so every instruction set
// that has a fused multiply-add gives the same bits.

#include <cmath>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "engine.h"

namespace lexmill::engine {
namespace LEXMILL_ISA {
namespace {

#include "lanes.h"

// ---- products of bytes

// The unsigned bytes of a block for sixteen rows: vector j holds columns 4 j … 4 j + 3 of each row.
struct Block {
    Ints columns[8];
};

INLINE void read_bytes(const uint8_t* values, Block& block) {
    for (int j = 0; j < 8; ++j) block.columns[j] = load_ints(values + 64 * j);
}

INLINE void read_nibbles(const uint8_t* values, Block& block) {
    const Ints low = all(int32_t(0x0f0f0f0f));
    for (int j = 0; j < 4; ++j) {
        Ints both = load_ints(values + 64 * j);
        block.columns[j] = both & low;
        block.columns[j + 4] = (both >> 4) & low;
    }
}

INLINE int32_t four_bytes(const int8_t* x) {
    int32_t four;
    std::memcpy(&four, x, 4);
    return four;
}

#if defined(__AVX2__) && !defined(__AVX512F__)
template <bool kSmall>
INLINE Wholes dot_half(const Block& block, Wholes Ints::*half, const int8_t* x, int32_t zero) {
    const __m256i ones = _mm256_set1_epi16(1);
    __m256i total = _mm256_setzero_si256();
    for (int j = 0; j < 8; ++j) {
        const __m256i weights = (__m256i)(block.columns[j].*half), four = _mm256_set1_epi32(four_bytes(x + 4 * j));
        if (kSmall) {  // eight steps of 2 · 15 · 127 fit in 16 bits
            total = _mm256_add_epi16(total, _mm256_maddubs_epi16(weights, four));
        } else {  // signed weights by their size, their sign moved to the other side: no step leaves 16 bits
            const __m256i apart = zero ? _mm256_xor_si256(weights, _mm256_set1_epi8(char(0x80))) : weights;
            const __m256i products = _mm256_maddubs_epi16(_mm256_abs_epi8(apart), _mm256_sign_epi8(four, apart));
            total = _mm256_add_epi32(total, _mm256_madd_epi16(products, ones));
        }
    }
    return (Wholes)(kSmall ? _mm256_madd_epi16(total, ones) : total);
}
#endif

// Σ (weight − zero) x over the block, for each row; `sum` is Σ x. kSmall: weights below 16.
template <bool kSmall>
INLINE Ints dot(const Block& block, const int8_t* x, int32_t zero, int32_t sum) {
#if defined(__AVX512VNNI__)
    __m512i total = _mm512_set1_epi32(-zero * sum);
    for (int j = 0; j < 8; ++j)
        total = _mm512_dpbusd_epi32(total, (__m512i)block.columns[j], _mm512_set1_epi32(four_bytes(x + 4 * j)));
    return (Ints)total;
#elif defined(__AVX2__)
    Ints totals = {dot_half<kSmall>(block, &Ints::low, x, zero), dot_half<kSmall>(block, &Ints::high, x, zero)};
    return kSmall && zero ? totals - all(int32_t(zero * sum)) : totals;
#elif defined(__ARM_FEATURE_DOTPROD)
    const int8x16_t flip = vdupq_n_s8(kSmall || !zero ? 0 : -128);
    Ints totals = all(int32_t(0));
    for (int j = 0; j < 8; ++j) {
        const int8x16_t four = vreinterpretq_s8_s32(vdupq_n_s32(four_bytes(x + 4 * j)));
        auto add = [&](Wholes& total, Wholes weights) INLINE_LAMBDA {
            total = (Wholes)vdotq_s32((int32x4_t)total, veorq_s8((int8x16_t)weights, flip), four);
        };
        add(totals.low.low, block.columns[j].low.low), add(totals.low.high, block.columns[j].low.high);
        add(totals.high.low, block.columns[j].high.low), add(totals.high.high, block.columns[j].high.high);
    }
    return kSmall && zero ? totals - all(int32_t(zero * sum)) : totals;
#else
    const uint8_t* weights = reinterpret_cast<const uint8_t*>(block.columns);
    int32_t totals[16];
    for (int lane = 0; lane < 16; ++lane) {
        int32_t total = -zero * sum;
        for (int j = 0; j < 8; ++j)
            for (int i = 0; i < 4; ++i) total += int32_t(weights[64 * j + 4 * lane + i]) * x[4 * j + i];
        totals[lane] = total;
    }
    return load_ints(totals);
#endif
}

// Alone, a token waits for memory: what comes next is asked for earlier than the processor would by itself.
INLINE void prefetch(const void* p, long bytes) {
    constexpr long kAhead = 4096;
    for (long line = 0; line < bytes; line += 64) __builtin_prefetch(static_cast<const char*>(p) + kAhead + line);
}

template <int kTokens, bool kSmall, bool kLeast>
INLINE void bytes_panel(const Matrix& m, long panel, const Inputs& in, long first, float* out) {
    constexpr long kBytes = kSmall ? 256 : 512;
    const long blocks = m.blocks();
    const uint8_t* values = m.values + panel * blocks * kBytes;
    const uint16_t* scales = m.scales + panel * blocks * kLanes;
    const uint16_t* minima = kLeast ? m.minima + panel * blocks * kLanes : nullptr;
    constexpr int32_t kZero = kLeast ? 0 : kSmall ? 8 : 128;
    Floats totals[kTokens];
    for (int t = 0; t < kTokens; ++t) totals[t] = all(0.0f);
    for (long b = 0; b < blocks; ++b, values += kBytes, scales += kLanes) {
        if (kTokens == 1) prefetch(values, kBytes);
        Block block;
        kSmall ? read_nibbles(values, block) : read_bytes(values, block);
        Floats scale = load_halves(scales), least;
        if (kLeast) least = load_halves(minima + b * kLanes);
        for (int t = 0; t < kTokens; ++t) {
            long token = first + t;
            int32_t sum = in.sums[token * blocks + b];
            Floats found = floats(dot<kSmall>(block, in.bytes + token * in.columns + b * kBlock, kZero, sum));
            float step = in.scales[token * blocks + b];
            totals[t] = fma(found, scale * all(step), totals[t]);
            if (kLeast) totals[t] = fma(least, all(step * float(sum)), totals[t]);
        }
    }
    for (int t = 0; t < kTokens; ++t) save(out + t * kStrip, totals[t]);
}

// ---- products of real numbers

template <int kTokens, class Column, class Ahead>
INLINE void floats_strip(long columns, Column column, Ahead ahead, const Inputs& in, long first, float* out) {
    Floats totals[kTokens][2];
    for (int t = 0; t < kTokens; ++t) totals[t][0] = totals[t][1] = all(0.0f);
    const float* x = in.floats + first * in.columns;
    for (long c = 0; c < columns; ++c) {
        if (kTokens == 1) ahead(c);
        Floats weights[2] = {column(0, c), column(1, c)};
        for (int t = 0; t < kTokens; ++t) {
            Floats one = all(x[t * in.columns + c]);
            totals[t][0] = fma(weights[0], one, totals[t][0]);
            totals[t][1] = fma(weights[1], one, totals[t][1]);
        }
    }
    for (int t = 0; t < kTokens; ++t)
        for (int p = 0; p < 2; ++p) save(out + t * kStrip + p * kLanes, totals[t][p]);
}

template <int kTokens>
INLINE void floats_of(const Matrix& m, long strip, const Inputs& in, long first, float* out) {
    const long columns = in.columns, panel = columns * kLanes;
    const uint8_t* values = m.values + 2 * strip * panel * (m.type == kFloat32 ? 4 : 2);
    auto ahead = [=](long c) INLINE_LAMBDA {  // a line of the caches of each panel
        const long line = m.type == kFloat32 ? c * 64 : c % 2 ? -1 : c * 32;
        if (line < 0) return;
        prefetch(values + line, 64), prefetch(values + panel * (m.type == kFloat32 ? 4 : 2) + line, 64);
    };
    if (m.type == kFloat32) {
        const float* w = reinterpret_cast<const float*>(values);
        floats_strip<kTokens>(
            columns, [=](int p, long c) INLINE_LAMBDA { return load(w + p * panel + c * kLanes); }, ahead, in, first,
            out);
    } else if (m.type == kFloat16) {
        const uint16_t* w = reinterpret_cast<const uint16_t*>(values);
        floats_strip<kTokens>(
            columns, [=](int p, long c) INLINE_LAMBDA { return load_halves(w + p * panel + c * kLanes); }, ahead, in,
            first, out);
    } else {  // bfloat16, two columns in a word
        const uint16_t* w = reinterpret_cast<const uint16_t*>(values);
        floats_strip<kTokens>(
            columns,
            [=](int p, long c) INLINE_LAMBDA {
                Ints both = load_ints(w + p * panel + (c & ~1l) * kLanes);
                return as_floats(c & 1 ? both & all(int32_t(0xffff0000)) : both << 16);
            },
            ahead, in, first, out);
    }
}

#if defined(LEXMILL_AMX)
// As tiles of bfloat16 are multiplied: of 32 columns the even and the odd ones, each sum by itself, and both together are
// added to the columns before. So a token's numbers are the same alone and among others.
template <int kTokens>
INLINE void pairs_strip(const Matrix& m, long strip, const Inputs& in, long first, float* out) {
    const long columns = in.columns, panel = columns * kLanes;
    const uint16_t* w = reinterpret_cast<const uint16_t*>(m.values) + 2 * strip * panel;
    const uint16_t* x = in.pairs + first * columns;
    const Ints upper = all(int32_t(0xffff0000));
    Floats totals[kTokens][2];
    for (int t = 0; t < kTokens; ++t) totals[t][0] = totals[t][1] = all(0.0f);
    for (long b = 0; b < columns; b += kBlock) {
        Floats even[kTokens][2], odd[kTokens][2];
        for (int t = 0; t < kTokens; ++t)
            for (int p = 0; p < 2; ++p) even[t][p] = odd[t][p] = all(0.0f);
        for (long c = b; c < b + kBlock; c += 2) {
            if (kTokens == 1) prefetch(w + c * kLanes, 64), prefetch(w + panel + c * kLanes, 64);
            const Ints weights[2] = {load_ints(w + c * kLanes), load_ints(w + panel + c * kLanes)};
            for (int t = 0; t < kTokens; ++t) {
                int32_t two;
                std::memcpy(&two, x + t * columns + c, 4);
                const Floats low = as_floats(all(two) << 16), high = as_floats(all(two) & upper);
                for (int p = 0; p < 2; ++p) {
                    even[t][p] = fma(as_floats(weights[p] << 16), low, even[t][p]);
                    odd[t][p] = fma(as_floats(weights[p] & upper), high, odd[t][p]);
                }
            }
        }
        for (int t = 0; t < kTokens; ++t)
            for (int p = 0; p < 2; ++p) totals[t][p] = totals[t][p] + (even[t][p] + odd[t][p]);
    }
    for (int t = 0; t < kTokens; ++t)
        for (int p = 0; p < 2; ++p) save(out + t * kStrip + p * kLanes, totals[t][p]);
}
#elif defined(__AVX512BF16__)
template <int kTokens>
INLINE void pairs_strip(const Matrix& m, long strip, const Inputs& in, long first, float* out) {
    const long columns = in.columns, panel = columns * kLanes;
    const uint16_t* w = reinterpret_cast<const uint16_t*>(m.values) + 2 * strip * panel;
    const uint16_t* x = in.pairs + first * columns;
    __m512 totals[kTokens][2][2];
    for (int t = 0; t < kTokens; ++t)
        for (int p = 0; p < 4; ++p) totals[t][p / 2][p % 2] = _mm512_setzero_ps();
    for (long c = 0; c < columns; c += 4) {
        if (kTokens == 1) prefetch(w + c * kLanes, 128), prefetch(w + panel + c * kLanes, 128);
        for (int half = 0; half < 2; ++half)
            for (int p = 0; p < 2; ++p) {
                __m512bh weights = (__m512bh)load_ints(w + p * panel + (c + 2 * half) * kLanes);
                for (int t = 0; t < kTokens; ++t) {
                    int32_t two;
                    std::memcpy(&two, x + t * columns + c + 2 * half, 4);
                    totals[t][p][half] =
                        _mm512_dpbf16_ps(totals[t][p][half], weights, (__m512bh)_mm512_set1_epi32(two));
                }
            }
    }
    for (int t = 0; t < kTokens; ++t)
        for (int p = 0; p < 2; ++p)
            save(out + t * kStrip + p * kLanes, (Floats)totals[t][p][0] + (Floats)totals[t][p][1]);
}
#endif

template <int kTokens>
INLINE void some_tokens(const Matrix& m, long strip, const Inputs& in, long first, float* out) {
    if (m.type == kEightBits || m.type == kFourBits) {
        for (int p = 0; p < 2; ++p) {
            long panel = 2 * strip + p;
            float* to = out + p * kLanes;
            if (m.type == kEightBits)
                m.minima ? bytes_panel<kTokens, false, true>(m, panel, in, first, to)
                         : bytes_panel<kTokens, false, false>(m, panel, in, first, to);
            else
                m.minima ? bytes_panel<kTokens, true, true>(m, panel, in, first, to)
                         : bytes_panel<kTokens, true, false>(m, panel, in, first, to);
        }
        return;
    }
#if defined(__AVX512BF16__)
    if (m.type == kBfloat16) return pairs_strip<kTokens>(m, strip, in, first, out);
#endif
    floats_of<kTokens>(m, strip, in, first, out);
}

struct Reach {
    long first, end;  // keys that a token may look at
    const int32_t* table;
};

INLINE Reach reach_of(const Attention& a, long token) {
    const Batch& b = *a.batch;
    const Operation& o = *a.operation;
    const long row = b.row[token], position = b.positions[token];
    if (o.memory) return {0, b.memory_lengths[row], b.memory_tables + row * b.memory_pages};
    long end = o.causal ? position + 1 : b.lengths[row], first = 0;
    if (o.window) {
        first = position - o.window / 2 > 0 ? position - o.window / 2 : 0;
        end = position + o.window / 2 + 1 < end ? position + o.window / 2 + 1 : end;
    }
    return {first, end, b.tables + row * b.pages};
}

#if defined(LEXMILL_AMX)
#include "tiles.h"
#endif

int form(int64_t type, bool prompt) {
#if defined(LEXMILL_AMX)
    if (prompt && type != kFloat32 && type != kFloat16) return kTiles;
#endif
    (void)prompt;
    if (type == kEightBits || type == kFourBits) return kBytes;
#if defined(__AVX512BF16__)
    if (type == kBfloat16) return kPairs;
#endif
    return kFloats;
}

void strip(const Matrix& m, long number, const Inputs& in, long first, long tokens, bool prompt, float* out,
           uint8_t* scratch) {
#if defined(LEXMILL_AMX)
    if (form(m.type, prompt) == kTiles) return tiles_strip(m, number, in, first, tokens, out, scratch);
#endif
    (void)prompt, (void)scratch;
#if defined(__AVX512F__)
    constexpr int kMany = 8;
#else
    constexpr int kMany = 4;
#endif
    long t = 0;
#if defined(LEXMILL_AMX)
    constexpr long kWorth = 4;  // tokens from which tiles are faster
    if (!prompt && m.type != kFloat32 && m.type != kFloat16)
        for (; tokens - t >= kWorth; t += kFew)
            (m.type == kBfloat16 ? pairs_of_few : bytes_strip)(m, number, in, first + t,
                                                               tokens - t < kFew ? tokens - t : kFew, out + t * kStrip);
#endif
    for (; t + kMany <= tokens; t += kMany) some_tokens<kMany>(m, number, in, first + t, out + t * kStrip);
    for (; t + 2 <= tokens; t += 2) some_tokens<2>(m, number, in, first + t, out + t * kStrip);
    if (t < tokens) some_tokens<1>(m, number, in, first + t, out + t * kStrip);
}

// ---- what happens to rows

void norm(const float* x, const float* weight, const float* bias, bool centred, float epsilon, long width, float* out) {
    const long whole = width / kLanes * kLanes;
    Floats sums = all(0.0f), squares = all(0.0f);
    for (long i = 0; i < whole; i += kLanes) sums = sums + load(x + i);
    float sum = total(sums), square = 0, mean = 0;
    for (long i = whole; i < width; ++i) sum += x[i];
    if (centred) mean = sum / float(width);
    for (long i = 0; i < whole; i += kLanes) {
        Floats apart = load(x + i) - all(mean);
        squares = fma(apart, apart, squares);
    }
    square = total(squares);
    for (long i = whole; i < width; ++i) square += (x[i] - mean) * (x[i] - mean);
    const float inverse = 1.0f / std::sqrt(square / float(width) + epsilon);
    for (long i = 0; i < whole; i += kLanes) {
        Floats normed = (load(x + i) - all(mean)) * all(inverse) * load(weight + i);
        save(out + i, bias ? normed + load(bias + i) : normed);
    }
    for (long i = whole; i < width; ++i)
        out[i] = (x[i] - mean) * inverse * weight[i] + (bias ? bias[i] : 0.0f);
}

INLINE void to_bytes(const float* x, const Inputs& in, long row) {
    const long blocks = in.columns / kBlock;
    for (long b = 0; b < blocks; ++b, x += kBlock) {
        Floats one = load(x), two = load(x + kLanes);
        const Ints size = all(int32_t(0x7fffffff));
        float most = peak(larger(as_floats(bits(one) & size), as_floats(bits(two) & size)));
        float inverse = most > 0 ? 127.0f / most : 0.0f;
        if (!(inverse < 3e38f)) inverse = 0.0f;  // numbers so small that they count as zero
        const Ints first = whole(nearest(one * all(inverse))), second = whole(nearest(two * all(inverse)));
        int8_t* bytes = in.bytes + row * in.columns + b * kBlock;
        int32_t sum = 0;
#if defined(__AVX512F__)
        _mm_storeu_si128(reinterpret_cast<__m128i*>(bytes), _mm512_cvtepi32_epi8((__m512i)first));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(bytes + kLanes), _mm512_cvtepi32_epi8((__m512i)second));
        sum = _mm512_reduce_add_epi32((__m512i)(first + second));
#else
        int32_t numbers[kBlock];
        give(numbers, first), give(numbers + kLanes, second);
        for (long i = 0; i < kBlock; ++i) bytes[i] = int8_t(numbers[i]), sum += numbers[i];
#endif
        in.scales[row * blocks + b] = most / 127.0f;
        in.sums[row * blocks + b] = sum;
    }
}

INLINE void to_bfloat16s(const float* x, uint16_t* out) {  // thirty-two numbers
#if defined(__AVX512BF16__)
    _mm512_storeu_si512(out, (__m512i)_mm512_cvtne2ps_pbh((__m512)load(x + kLanes), (__m512)load(x)));
#else
    for (long i = 0; i < kBlock; ++i) out[i] = to_bfloat16(x[i]);
#endif
}

// `x` is padded with zeros to whole blocks.
void prepare(const float* x, long, int forms, long row, const Inputs& in) {
    const long blocks = in.columns / kBlock;
    if (forms & kBytes) to_bytes(x, in, row);
    if (forms & kPairs)
        for (long b = 0; b < blocks; ++b) to_bfloat16s(x + b * kBlock, in.pairs + row * in.columns + b * kBlock);
    if (forms & kTiles)
        for (long b = 0; b < blocks; ++b)
            to_bfloat16s(x + b * kBlock, in.tiles + ((row / 16 * blocks + b) * 16 + row % 16) * kBlock);
    if (forms & kFloats) std::memcpy(in.floats + row * in.columns, x, sizeof(float) * in.columns);
}

// erf, Abramowitz and Stegun 7.1.26: off by 1.5e-7 at most.
INLINE Floats error_function(Floats x) {
    Floats size = as_floats(bits(x) & all(int32_t(0x7fffffff)));
    Floats t = all(1.0f) / fma(size, all(0.3275911f), all(1.0f));
    Floats p = fma(t, all(1.061405429f), all(-1.453152027f));
    p = fma(p, t, all(1.421413741f));
    p = fma(p, t, all(-0.284496736f));
    p = fma(p, t, all(0.254829592f));
    Floats found = all(1.0f) - p * t * exponential(all(0.0f) - size * size);
    return as_floats(bits(found) | (bits(x) & all(int32_t(0x80000000))));
}

INLINE Floats logistic(Floats x) { return all(1.0f) / (all(1.0f) + exponential(all(0.0f) - x)); }

INLINE Floats activated(int64_t activation, Floats x) {
    switch (activation) {
        case kSilu: return x * logistic(x);
        case kGelu: return x * all(0.5f) * (all(1.0f) + error_function(x * all(0.70710678f)));
        case kGeluTanh: return x * logistic(all(1.59576912f) * fma(x * x * x, all(0.044715f), x));
        case kRelu: return larger(x, all(0.0f));
        default: return x;
    }
}

// `count` is a multiple of the lanes.
void activate(int64_t activation, float* x, const float* times, long count) {
    for (long i = 0; i < count; i += kLanes) {
        Floats found = activated(activation, load(x + i));
        save(x + i, times ? found * load(times + i) : found);
    }
}

void add_bias(float* sums, long rows, const float* bias, long outputs) {
    float padded[kStrip] = {};
    std::memcpy(padded, bias, sizeof(float) * size_t(outputs));
    const Floats first = load(padded), second = load(padded + kLanes);
    for (long r = 0; r < rows; ++r, sums += kStrip) {
        save(sums, load(sums) + first);
        save(sums + kLanes, load(sums + kLanes) + second);
    }
}

void put(const float* sums, long rows, long outputs, bool add, float* to, long width) {
    for (long r = 0; r < rows; ++r, sums += kStrip, to += width) {
        if (outputs == kStrip) {
            const Floats first = load(sums), second = load(sums + kLanes);
            save(to, add ? load(to) + first : first);
            save(to + kLanes, add ? load(to + kLanes) + second : second);
        } else {
            for (long i = 0; i < outputs; ++i) to[i] = add ? to[i] + sums[i] : sums[i];
        }
    }
}

float weight_at(const Matrix& m, long panel, long lane, long column) {
    const long blocks = m.blocks(), columns = blocks * kBlock, block = panel * blocks + column / kBlock;
    const long plain = (panel * columns + column) * kLanes + lane;
    if (m.type == kFloat32) return reinterpret_cast<const float*>(m.values)[plain];
    if (m.type == kFloat16) return from_half(reinterpret_cast<const uint16_t*>(m.values)[plain]);
    if (m.type == kBfloat16) {
        const long pair = (panel * columns + (column & ~1l)) * kLanes + 2 * lane + (column & 1);
        uint32_t number = uint32_t(reinterpret_cast<const uint16_t*>(m.values)[pair]) << 16;
        float x;
        std::memcpy(&x, &number, 4);
        return x;
    }
    const long inside = column % kBlock;
    const float scale = from_half(m.scales[block * kLanes + lane]);
    const float least = m.minima ? from_half(m.minima[block * kLanes + lane]) : 0.0f;
    if (m.type == kEightBits) {
        uint8_t q = m.values[block * 512 + inside / 4 * 64 + lane * 4 + inside % 4];
        return m.minima ? scale * float(q) + least : scale * float(int(q) - 128);
    }
    uint8_t both = m.values[block * 256 + inside % 16 / 4 * 64 + lane * 4 + inside % 4];
    int q = inside < 16 ? both & 15 : both >> 4;
    return m.minima ? scale * float(q) + least : scale * float(q - 8);
}

void row(const Matrix& m, long number, float* out, bool add) {
    for (long c = 0; c < m.columns; ++c) {
        float weight = weight_at(m, number / kLanes, number % kLanes, c);
        out[c] = add ? out[c] + weight : weight;
    }
}

// ---- keys, values, attention

INLINE void turn(float* x, const float* cosines, const float* sines, long half) {
    long i = 0;
    for (; i + kLanes <= half; i += kLanes) {
        const Floats first = load(x + i), second = load(x + i + half), c = load(cosines + i), s = load(sines + i);
        save(x + i, first * c - second * s);
        save(x + i + half, second * c + first * s);
    }
    for (; i < half; ++i) {
        const float first = x[i], second = x[i + half];
        x[i] = first * cosines[i] - second * sines[i];
        x[i + half] = second * cosines[i] + first * sines[i];
    }
}

INLINE void to_halves(const float* x, long count, uint16_t* out) {
#if defined(__AVX512F__)
    if (count == kLanes)
        return _mm256_store_si256(reinterpret_cast<__m256i*>(out), _mm512_cvtps_ph((__m512)load(x), 0));
#elif defined(__F16C__)
    if (count == kLanes) {
        const Floats both = load(x);
        _mm_store_si128(reinterpret_cast<__m128i*>(out), _mm256_cvtps_ph((__m256)both.low, 0));
        return _mm_store_si128(reinterpret_cast<__m128i*>(out + 8), _mm256_cvtps_ph((__m256)both.high, 0));
    }
#endif
    for (long i = 0; i < count; ++i) out[i] = to_half(x[i]);
}

// Keys and values of a token into its page; queries turned where they stand.
void store(const Store& s, long token) {
    const Shape& shape = *s.shape;
    const long width = shape.head_width, queries = s.operation->queries ? shape.heads : 0;
    float* at = s.from + token * s.width;
    const int32_t position = s.batch->positions[token];
    const long page = (s.operation->memory ? s.batch->memory_tables + s.batch->row[token] * s.batch->memory_pages
                                           : s.batch->tables + s.batch->row[token] * s.batch->pages)[position / kPage];
    const long place = position % kPage;
    for (long head = 0; head < queries + shape.kv_heads; ++head) {
        float* x = at + head * width;
        const float* weight = head < queries ? s.query_norm : s.key_norm;
        if (weight) norm(x, weight, nullptr, false, float(s.operation->epsilon), width, x);
        if (s.cosines) turn(x, s.cosines + position * (width / 2), s.sines + position * (width / 2), width / 2);
    }
    for (long head = 0; head < shape.kv_heads; ++head) {
        const float* key = at + (queries + head) * width;
        const float* value = key + shape.kv_heads * width;
        const long start = (page * shape.kv_heads + head) * width * kPage;
        if (shape.exact_pages) {
            float *keys = static_cast<float*>(s.pages.keys) + start, *values = static_cast<float*>(s.pages.values) + start;
            for (long d = 0; d < width; ++d) keys[d * kPage + place] = key[d];
            std::memcpy(values + place * width, value, sizeof(float) * width);
        } else {
            uint16_t *keys = static_cast<uint16_t*>(s.pages.keys) + start,
                     *values = static_cast<uint16_t*>(s.pages.values) + start;
            alignas(64) uint16_t halves[kLanes];
            for (long d = 0; d < width; d += kLanes) {
                const long some = width - d < kLanes ? width - d : kLanes;
                to_halves(key + d, some, halves);
                for (long i = 0; i < some; ++i) keys[(d + i) * kPage + place] = halves[i];
                to_halves(value + d, some, halves);
                std::memcpy(values + place * width + d, halves, 2 * size_t(some));
            }
        }
    }
}

INLINE Floats load_number(const float* p) { return load(p); }
INLINE Floats load_number(const uint16_t* p) { return load_halves(p); }
INLINE float one_number(float x) { return x; }
INLINE float one_number(uint16_t x) { return from_half(x); }

// A query: what a token asks in one head, and the keys it may look at.
struct Query {
    const float* x;
    float* out;
    long head, position;
    Reach reach;
};

INLINE Query query_of(const Attention& a, long first, long kv_head, long number) {
    const long group = a.shape->heads / a.shape->kv_heads, width = a.shape->head_width;
    const long token = first + number / group, head = kv_head * group + number % group;
    return {a.queries + token * a.queries_width + head * width, a.out + token * a.out_width + head * width, head,
            a.batch->positions[token], reach_of(a, token)};
}

// Scores of queries that share keys, kQueries rows of `stride`, from the key `begin` (a whole page) on.
template <int kQueries, class Number>
INLINE void scores(const Attention& a, const Query* queries, long kv_head, long begin, long end, float* out,
                   long stride) {
    const long width = a.shape->head_width;
    const Floats scale = all(float(a.operation->scale));
    for (long p = begin / kPage; p * kPage < end; ++p) {
        const Number* keys = static_cast<const Number*>(a.pages.keys) +
                             (queries[0].reach.table[p] * a.shape->kv_heads + kv_head) * width * kPage;
        for (long half = 0; half < kPage; half += kLanes) {
            Floats found[kQueries];
            for (int q = 0; q < kQueries; ++q) found[q] = all(0.0f);
            for (long d = 0; d < width; ++d) {
                Floats key = load_number(keys + d * kPage + half);
                for (int q = 0; q < kQueries; ++q) found[q] = fma(key, all(queries[q].x[d]), found[q]);
            }
            for (int q = 0; q < kQueries; ++q) save(out + q * stride + p * kPage + half - begin, found[q] * scale);
        }
    }
}

// Scores of one query, from the key `begin` on, to shares of one; those outside its reach become 0.
INLINE void shares(const Attention& a, const Query& query, long begin, float* x, long padded) {
    const Reach& reach = query.reach;
    if (a.bias) {
        const float* middle = a.bias + query.head * (2 * a.reach + 1) + a.reach;
        for (long key = reach.first; key < reach.end; ++key) {
            long apart = key - query.position;
            x[key - begin] += middle[apart < -a.reach ? -a.reach : apart > a.reach ? a.reach : apart];
        }
    }
    for (long i = 0; i < reach.first - begin; ++i) x[i] = -INFINITY;
    for (long i = reach.end - begin; i < padded; ++i) x[i] = -INFINITY;
    Floats most = all(-INFINITY);
    for (long i = 0; i < padded; i += kLanes) most = larger(most, load(x + i));
    const Floats top = all(peak(most));
    Floats sums = all(0.0f);
    for (long i = 0; i < padded; i += kLanes) {
        Floats one = exponential(load(x + i) - top);
        save(x + i, one);
        sums = sums + one;
    }
    const Floats inverse = all(1.0f / total(sums));
    for (long i = 0; i < padded; i += kLanes) save(x + i, load(x + i) * inverse);
}

// Σ share × value: sixteen coordinates at a time.
template <int kQueries, class Number>
INLINE void gather(const Attention& a, const Query* queries, long kv_head, long begin, long end, const float* share,
                   long stride) {
    const long width = a.shape->head_width, whole = width / kLanes * kLanes;
    auto page_of = [&](long p) INLINE_LAMBDA {
        return static_cast<const Number*>(a.pages.values) +
               (queries[0].reach.table[p] * a.shape->kv_heads + kv_head) * kPage * width;
    };
    for (long d = 0; d < whole; d += kLanes) {
        Floats found[kQueries];
        for (int q = 0; q < kQueries; ++q) found[q] = all(0.0f);
        for (long p = begin / kPage; p * kPage < end; ++p) {
            const Number* values = page_of(p) + d;
            const float* of_page = share + p * kPage - begin;
            const long keys = end - p * kPage < kPage ? end - p * kPage : kPage;
            for (long key = 0; key < keys; ++key) {
                Floats value = load_number(values + key * width);
                for (int q = 0; q < kQueries; ++q) found[q] = fma(value, all(of_page[q * stride + key]), found[q]);
            }
        }
        for (int q = 0; q < kQueries; ++q) save(queries[q].out + d, found[q]);
    }
    for (long d = whole; d < width; ++d)
        for (int q = 0; q < kQueries; ++q) {
            float found = 0;
            for (long key = begin; key < end; ++key)
                found += one_number(page_of(key / kPage)[key % kPage * width + d]) * share[q * stride + key - begin];
            queries[q].out[d] = found;
        }
}

template <int kQueries, class Number>
INLINE void attend_some(const Attention& a, const Query* queries, long kv_head, float* scratch) {
    long begin = queries[0].reach.first, end = 0;
    for (int q = 0; q < kQueries; ++q) {
        begin = queries[q].reach.first < begin ? queries[q].reach.first : begin;
        end = queries[q].reach.end > end ? queries[q].reach.end : end;
    }
    begin = begin / kPage * kPage;
    const long padded = (end + kPage - 1) / kPage * kPage - begin;
    scores<kQueries, Number>(a, queries, kv_head, begin, end, scratch, padded);
    for (int q = 0; q < kQueries; ++q) shares(a, queries[q], begin, scratch + q * padded, padded);
    gather<kQueries, Number>(a, queries, kv_head, begin, end, scratch, padded);
}

template <class Number>
void attend_all(const Attention& a, long first, long count, long kv_head, long begin, float* scratch) {
#if defined(__AVX512F__)
    constexpr int kMany = 8;
#else
    constexpr int kMany = 4;
#endif
    Query queries[kTogether];
    for (long q = 0; q < count; ++q) queries[q] = query_of(a, first, kv_head, begin + q);
    long q = 0;
    for (; q + kMany <= count; q += kMany) attend_some<kMany, Number>(a, queries + q, kv_head, scratch);
    for (; q + 3 <= count; q += 3) attend_some<3, Number>(a, queries + q, kv_head, scratch);
    for (; q < count; ++q) attend_some<1, Number>(a, queries + q, kv_head, scratch);
}

void attend(const Attention& a, long first, long count, long kv_head, long begin, const uint16_t* tiles,
            float* scratch) {
#if defined(LEXMILL_AMX)
    if (tiles) return attend_tiles(a, first, count, kv_head, begin, tiles, scratch);
#endif
    (void)tiles;
    a.shape->exact_pages ? attend_all<float>(a, first, count, kv_head, begin, scratch)
                         : attend_all<uint16_t>(a, first, count, kv_head, begin, scratch);
}

void begin(bool prompt) {
#if defined(LEXMILL_AMX)
    begin_tiles(prompt);
#endif
    (void)prompt;
}

}  // namespace

#define NAME_(x) #x
#define NAME(x) NAME_(x)
extern const Kernels kernels;
const Kernels kernels = {NAME(LEXMILL_ISA), form, begin, norm, prepare, strip, add_bias, put, activate, row, store, attend,
#if defined(LEXMILL_AMX)
                         page_to_tiles
#else
                         nullptr
#endif
};

}  // namespace LEXMILL_ISA
}  // namespace lexmill::engine
