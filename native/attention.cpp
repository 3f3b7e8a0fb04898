// Attention in training, on CPUs with products of bfloat16: softmax(Q Kᵀ + bias) V and its gradients for one
// head after the other, so that scores never leave a core's cache (Dao et al. 2022, "FlashAttention"); the
// way back computes them again from each query's logarithm of the sum.
//
// Everything is laid out keys × queries: the softmax then runs along columns, without sums across a vector,
// and the shares are at once what the products of the way back take from the left. Products take bfloat16
// and add in float32. The left matrix lies in rows; of the right one, two rows lie interleaved, as the
// instructions take them: pairs[k / 2][n] holds (k, n) and (k + 1, n).
//
// Compiled twice (`LEXMILL_ISA`): with AMX tiles, and with AVX-512's products of pairs.

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "bfloat16.h"
#include "training.h"

namespace lexmill {
namespace LEXMILL_ISA {
namespace {

constexpr long kStep = 32;  // keys, queries and head widths are filled up with zeros to multiples of it
inline long filled(long count) { return (count + kStep - 1) / kStep * kStep; }

#ifdef LEXMILL_AMX
// c (rows × columns) = or += a (rows × depth) b; rows and depth are multiples of 32, columns of 32.
void product(float* c, long c_row, const bf16* a, long a_row, const uint32_t* b, long b_row, long rows, long columns,
             long depth, bool add) {
    for (long i = 0; i < rows; i += 32)
        for (long j = 0; j < columns; j += 32) {
            begin_sums(c + i * c_row + j, c_row, add);
            for (long k = 0; k < depth; k += 32) {
                _tile_loadd(4, a + i * a_row + k, a_row * 2);
                _tile_loadd(5, a + (i + 16) * a_row + k, a_row * 2);
                _tile_loadd(6, b + k / 2 * b_row + j, b_row * 4);
                _tile_loadd(7, b + k / 2 * b_row + j + 16, b_row * 4);
                _tile_dpbf16ps(0, 4, 6);
                _tile_dpbf16ps(1, 4, 7);
                _tile_dpbf16ps(2, 5, 6);
                _tile_dpbf16ps(3, 5, 7);
            }
            store_sums(c + i * c_row + j, c_row);
        }
}
#else
void product(float* c, long c_row, const bf16* a, long a_row, const uint32_t* b, long b_row, long rows, long columns,
             long depth, bool add) {
    constexpr int kRows = 8;
    for (long i = 0; i < rows; i += kRows)
        for (long j = 0; j < columns; j += 32) {
            __m512 sum[kRows][2];
            for (int r = 0; r < kRows; ++r)
                for (int s = 0; s < 2; ++s)
                    sum[r][s] = add ? _mm512_loadu_ps(c + (i + r) * c_row + j + 16 * s) : _mm512_setzero_ps();
            for (long k = 0; k < depth; k += 2) {
                __m512bh right[2];
                for (int s = 0; s < 2; ++s)
                    right[s] = (__m512bh)_mm512_loadu_si512(b + k / 2 * b_row + j + 16 * s);
                for (int r = 0; r < kRows; ++r) {
                    int pair;
                    std::memcpy(&pair, a + (i + r) * a_row + k, 4);
                    __m512bh left = (__m512bh)_mm512_set1_epi32(pair);
                    for (int s = 0; s < 2; ++s) sum[r][s] = _mm512_dpbf16_ps(sum[r][s], left, right[s]);
                }
            }
            for (int r = 0; r < kRows; ++r)
                for (int s = 0; s < 2; ++s) _mm512_storeu_ps(c + (i + r) * c_row + j + 16 * s, sum[r][s]);
        }
}
#endif

// One head's rows of a tensor, `row` numbers apart.
struct Head {
    const bf16* at;
    long row;
};

Head head_of(const void* tensor, const Strides& s, long batch, long head) {
    return {static_cast<const bf16*>(tensor) + batch * s.batch + head * s.head, s.time};
}

// What a thread works in; kept from call to call.
struct Room {
    std::vector<bf16> k_rows, v_rows, q_rows, turned, shares;
    std::vector<uint32_t> q_laid, score_pairs;
    std::vector<float> scores, to_q, to_k, to_v;
};

// The same rows, filled up with zeros to whole steps; where they are whole already, those themselves.
Head filled_rows(const Head& from, long count, long width, std::vector<bf16>& space) {
    long whole = filled(width), rows = filled(count);
    if (whole == width && rows == count) return from;
    space.assign(size_t(rows * whole), 0);
    for (long i = 0; i < count; ++i) std::memcpy(space.data() + i * whole, from.at + i * from.row, size_t(width) * 2);
    return {space.data(), whole};
}

// 16 pairs of neighbours, each from a row of its own.
inline __m512i pairs_down(const bf16* at, long row) {
    __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    return _mm512_i32gather_epi32(_mm512_mullo_epi32(lane, _mm512_set1_epi32(int(row * 2))), at, 1);
}

// For the right side, summed over rows: pairs[row / 2][width].
void lay_pairs(const Head& from, long count, long width, uint32_t* to) {
    for (long i = 0; i < count; i += 2) {
        const bf16 *even = from.at + i * from.row, *odd = even + from.row;
        uint32_t* out = to + i / 2 * width;
        for (long d = 0; d < width; ++d) out[d] = even[d] | uint32_t(odd[d]) << 16;
    }
}

// For the right side, summed over the width: pairs[width / 2][row].
void lay_turned_pairs(const Head& from, long count, long width, uint32_t* to) {
    for (long i = 0; i < count; i += 16)
        for (long d = 0; d < width / 2; ++d)
            _mm512_storeu_si512(to + d * count + i, pairs_down(from.at + i * from.row + 2 * d, from.row));
}

// For the left side, summed over the rows: (width, count).
void lay_turned(const Head& from, long count, long width, bf16* to) {
    __m512i low = _mm512_set1_epi32(0xffff);
    for (long i = 0; i < count; i += 32)
        for (long d = 0; d < width; d += 2) {
            const bf16* at = from.at + i * from.row + d;
            __m512i even = pairs_down(at, 2 * from.row), odd = pairs_down(at + from.row, 2 * from.row);
            _mm512_storeu_si512(to + d * count + i,
                                _mm512_or_si512(_mm512_and_si512(even, low), _mm512_slli_epi32(odd, 16)));
            _mm512_storeu_si512(to + (d + 1) * count + i,
                                _mm512_or_si512(_mm512_srli_epi32(even, 16), _mm512_andnot_si512(low, odd)));
        }
}

inline __m256i rounded(__m512 numbers) { return (__m256i)_mm512_cvtneps_pbh(numbers); }

// Two rows of 16 numbers as pairs of bfloat16.
inline __m512i paired(__m256i even, __m256i odd) {
    return _mm512_or_si512(_mm512_cvtepu16_epi32(even), _mm512_slli_epi32(_mm512_cvtepu16_epi32(odd), 16));
}

// Columns of `from`, (width, queries), become rows of bfloat16, each times its factor.
void turn_back(const float* from, long from_row, long count, long width, const float* factor, bf16* to, long to_row) {
    __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    __m512i down = _mm512_mullo_epi32(lane, _mm512_set1_epi32(int(from_row)));
    for (long q = 0; q < count; ++q) {
        __m512 times = _mm512_set1_ps(factor ? factor[q] : 1.0f);
        for (long d = 0; d < width; d += 16) {
            __m512 column = _mm512_i32gather_ps(down, from + d * from_row + q, 4);
            _mm256_mask_storeu_epi16(to + q * to_row + d, lanes(width - d), rounded(_mm512_mul_ps(column, times)));
        }
    }
}

void write_rows(const float* from, long from_row, long count, long width, void* tensor, const Strides& s, long batch,
                long head) {
    bf16* to = static_cast<bf16*>(tensor) + batch * s.batch + head * s.head;
    for (long i = 0; i < count; ++i)
        for (long d = 0; d < width; d += 16)
            _mm256_mask_storeu_epi16(to + i * s.time + d, lanes(width - d),
                                     rounded(_mm512_loadu_ps(from + i * from_row + d)));
}

// e^x within 2 units in the last place (Cephes' polynomial); what is below e^-60 counts as nothing.
inline __m512 exp_of(__m512 x) {
    __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 0);
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
    r = _mm512_fmadd_ps(n, _mm512_set1_ps(2.12194440e-4f), r);
    __m512 p = _mm512_set1_ps(1.9875691500e-4f);
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.3981999507e-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(8.3334519073e-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(4.1665795894e-2f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.6666665459e-1f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.0000001201e-1f));
    p = _mm512_fmadd_ps(_mm512_mul_ps(p, r), r, _mm512_add_ps(r, _mm512_set1_ps(1.0f)));
    __mmask16 small = _mm512_cmp_ps_mask(x, _mm512_set1_ps(-60.0f), _CMP_LT_OQ);  // not of not-a-number
    return _mm512_mask_blend_ps(small, _mm512_scalef_ps(p, n), _mm512_setzero_ps());
}

// Which keys a query sees, and what is added to their scores.
struct Look {
    const Attention& a;
    const uint8_t* mask;  // (keys, queries) of this text, or null
    const float* bias;    // (keys, queries) of this head, or null
    long ahead;           // keys - queries

    Look(const Attention& a, long batch, long head)
        : a(a),
          mask(a.mask ? static_cast<const uint8_t*>(a.mask) + (a.masks > 1 ? batch : 0) * a.keys * a.queries : nullptr),
          bias(a.bias ? a.bias + head * a.keys * a.queries : nullptr),
          ahead(a.keys - a.queries) {}

    // Whether any of a step of queries sees any of a step of keys.
    bool sees_any(long key, long query) const {
        if (!mask) return !a.causal || key <= query + kStep - 1 + ahead;
        __m128i any = _mm_setzero_si128();
        for (long t = key; t < std::min(key + kStep, long(a.keys)); ++t)
            for (long q = query; q < query + kStep; q += 16)
                any = _mm_or_si128(any, _mm_maskz_loadu_epi8(lanes(a.queries - q), mask + t * a.queries + q));
        return _mm_test_epi8_mask(any, any) != 0;
    }

    // A key's scores for 16 queries, from their products: -infinity where it is not seen.
    inline __m512 finish(__m512 products, long key, long query) const {
        __m512 nothing = _mm512_set1_ps(-INFINITY), scores = _mm512_mul_ps(products, _mm512_set1_ps(a.scale));
        if (key >= a.keys) return nothing;
        __mmask16 there = lanes(a.queries - query), seen = 0xffff;
        if (bias) scores = _mm512_add_ps(scores, _mm512_maskz_loadu_ps(there, bias + key * a.queries + query));
        if (mask) {
            __m128i marks = _mm_maskz_loadu_epi8(there, mask + key * a.queries + query);
            seen = __mmask16(_mm_test_epi8_mask(marks, marks) | ~there);
        } else if (a.causal) {
            seen = __mmask16(~lanes(key - ahead - query));
        }
        return _mm512_mask_blend_ps(seen, nothing, scores);
    }
};

// softmax along the columns of 32 queries' scores, as pairs of e^(score - largest); what they add up to.
void share_out(const Look& look, float* scores, long from, long end, long first, uint32_t* shares, float* factor,
               float* log_sum) {
    for (long lane = 0; lane < kStep; lane += 16) {
        __m512 top = _mm512_set1_ps(-INFINITY), sum = _mm512_setzero_ps();
        for (long t = from; t < end; ++t) {
            float* at = scores + (t - from) * kStep + lane;
            __m512 score = look.finish(_mm512_loadu_ps(at), t, first + lane);
            _mm512_storeu_ps(at, score);
            top = _mm512_max_ps(score, top);
        }
        for (long t = 0; t < end - from; t += 2) {
            __m512 even = exp_of(_mm512_sub_ps(_mm512_loadu_ps(scores + t * kStep + lane), top));
            __m512 odd = exp_of(_mm512_sub_ps(_mm512_loadu_ps(scores + (t + 1) * kStep + lane), top));
            sum = _mm512_add_ps(sum, _mm512_add_ps(even, odd));
            _mm512_storeu_si512(shares + t / 2 * kStep + lane, paired(rounded(even), rounded(odd)));
        }
        _mm512_storeu_ps(factor + lane, _mm512_div_ps(_mm512_set1_ps(1.0f), sum));
        _mm512_storeu_ps(log_sum + lane, top);
        for (long i = lane; i < lane + 16; ++i) log_sum[i] -= std::log(factor[i]);
    }
}

void forward_head(const Attention& a, long batch, long kv_head, Room& own) {
    long width = filled(a.width), keys = filled(a.keys), group = a.heads / a.kv_heads;
    Head k = filled_rows(head_of(a.k, a.k_strides, batch, kv_head), a.keys, a.width, own.k_rows);
    Head v = filled_rows(head_of(a.v, a.v_strides, batch, kv_head), a.keys, a.width, own.v_rows);
    bf16* v_turned = room(own.turned, keys * width);
    uint32_t* q = room(own.q_laid, kStep * width / 2);
    uint32_t* shares = room(own.score_pairs, keys / 2 * kStep);
    float* scores = room(own.scores, keys * kStep);
    float* gathered = room(own.to_q, width * kStep);
    float factor[kStep], log_sum[kStep];
    lay_turned(v, keys, width, v_turned);
    for (long head = kv_head * group; head < (kv_head + 1) * group; ++head) {
        Look look(a, batch, head);
        Head all = head_of(a.q, a.q_strides, batch, head);
        bf16* out = static_cast<bf16*>(a.out) + batch * a.out_strides.batch + head * a.out_strides.head;
        float* sums = a.log_sums + (batch * a.heads + head) * a.queries;
        for (long first = 0; first < a.queries; first += kStep) {
            long count = std::min(kStep, long(a.queries) - first);
            Head some = filled_rows({all.at + first * all.row, all.row}, count, a.width, own.q_rows);
            lay_turned_pairs(some, kStep, width, q);
            long from = keys, end = 0;  // the stretch of keys that these queries see
            for (long key = 0; key < keys; key += kStep)
                if (look.sees_any(key, first)) from = std::min(from, key), end = key + kStep;
            if (from >= end) from = 0, end = kStep;  // nothing at all: not-a-number, as in torch
            product(scores, kStep, k.at + from * k.row, k.row, q, kStep, end - from, kStep, width, false);
            share_out(look, scores, from, end, first, shares, factor, log_sum);
            product(gathered, kStep, v_turned + from, keys, shares, kStep, width, kStep, end - from, false);
            std::memcpy(sums + first, log_sum, size_t(count) * 4);
            turn_back(gathered, kStep, count, a.width, factor, out + first * a.out_strides.time, a.out_strides.time);
        }
    }
}

// One head's queries and the gradient of its result, laid down for the way back.
struct Laid {
    uint32_t *pairs, *turned, *down_pairs, *down_turned;
    float *log_sums, *along;  // along: gradient times result, summed over the width
};

Laid lay_head(const AttentionBack& g, long batch, long head, Room& own) {
    const Attention& a = g.forward;
    long width = filled(a.width), queries = filled(a.queries), half = queries * width / 2;
    uint32_t* laid = room(own.q_laid, 4 * half);
    float* numbers = room(own.scores, 2 * queries);
    Laid to{laid, laid + half, laid + 2 * half, laid + 3 * half, numbers, numbers + queries};
    Head q = filled_rows(head_of(a.q, a.q_strides, batch, head), a.queries, a.width, own.q_rows);
    lay_pairs(q, queries, width, to.pairs);
    lay_turned_pairs(q, queries, width, to.turned);
    Head out = head_of(a.out, a.out_strides, batch, head);
    Head gradient = head_of(g.gradient, g.gradient_strides, batch, head);
    Head down = filled_rows(gradient, a.queries, a.width, own.q_rows);
    lay_pairs(down, queries, width, to.down_pairs);
    lay_turned_pairs(down, queries, width, to.down_turned);
    std::memset(numbers, 0, size_t(2 * queries) * 4);
    std::memcpy(to.log_sums, a.log_sums + (batch * a.heads + head) * a.queries, size_t(a.queries) * 4);
    for (long i = 0; i < a.queries; ++i) {
        __m512 sum = _mm512_setzero_ps();
        for (long d = 0; d < a.width; d += 32) {
            __mmask32 there = a.width - d >= 32 ? ~0u : (1u << (a.width - d)) - 1;
            __m512i one = _mm512_maskz_loadu_epi16(there, gradient.at + i * gradient.row + d);
            __m512i other = _mm512_maskz_loadu_epi16(there, out.at + i * out.row + d);
            sum = _mm512_dpbf16_ps(sum, (__m512bh)one, (__m512bh)other);
        }
        to.along[i] = _mm512_reduce_add_ps(sum);
    }
    return to;
}

// Shares, and gradients of scores, of 32 keys and 32 queries, from the products Kᵀ Q and Vᵀ gradient.
void slope_block(const Look& look, const Laid& of, const float* scores, const float* falls, long key, long first,
                 bf16* shares, bf16* slopes, long row, uint32_t* pairs, float* to_bias) {
    const Attention& a = look.a;
    __m512 scale = _mm512_set1_ps(a.scale);
    for (long lane = 0; lane < kStep; lane += 16) {
        __m512 log_sum = _mm512_loadu_ps(of.log_sums + first + lane);
        __m512 along = _mm512_loadu_ps(of.along + first + lane);
        __mmask16 there = lanes(a.queries - first - lane);
        for (long t = 0; t < kStep; t += 2) {
            __m256i kept[2];
            for (long i = t; i < t + 2; ++i) {
                __m512 score = look.finish(_mm512_loadu_ps(scores + i * kStep + lane), key + i, first + lane);
                __m512 share = exp_of(_mm512_sub_ps(score, log_sum));
                __m512 fall = _mm512_sub_ps(_mm512_loadu_ps(falls + i * kStep + lane), along);
                __m512 slope = _mm512_mul_ps(share, fall);
                if (to_bias && key + i < a.keys) {
                    float* to = to_bias + (key + i) * a.queries + first + lane;
                    _mm512_mask_storeu_ps(to, there, _mm512_add_ps(_mm512_maskz_loadu_ps(there, to), slope));
                }
                kept[i - t] = rounded(_mm512_mul_ps(slope, scale));
                long at = i * row + first + lane;
                _mm256_storeu_si256((__m256i*)(shares + at), rounded(share));
                _mm256_storeu_si256((__m256i*)(slopes + at), kept[i - t]);
            }
            _mm512_storeu_si512(pairs + t / 2 * row + lane, paired(kept[0], kept[1]));
        }
    }
}

void back_head(const AttentionBack& g, long batch, long kv_head, Room& own, float* to_bias) {
    const Attention& a = g.forward;
    long width = filled(a.width), keys = filled(a.keys), queries = filled(a.queries), group = a.heads / a.kv_heads;
    Head k = filled_rows(head_of(a.k, a.k_strides, batch, kv_head), a.keys, a.width, own.k_rows);
    Head v = filled_rows(head_of(a.v, a.v_strides, batch, kv_head), a.keys, a.width, own.v_rows);
    bf16* k_turned = room(own.turned, keys * width);
    bf16* shares = room(own.shares, 2 * kStep * queries);  // of a step of keys
    bf16* slopes = shares + kStep * queries;               // the gradients of their scores
    uint32_t* score_pairs = room(own.score_pairs, keys / 2 * queries);  // those of all keys
    float* to_k = room(own.to_k, keys * width);
    float* to_v = room(own.to_v, keys * width);
    float* to_q = room(own.to_q, queries * width);
    alignas(64) float scores[kStep * kStep], falls[kStep * kStep];
    lay_turned(k, keys, width, k_turned);
    for (long head = kv_head * group; head < (kv_head + 1) * group; ++head) {
        bool more = head > kv_head * group;
        Look look(a, batch, head);
        Laid of = lay_head(g, batch, head, own);
        for (long key = 0; key < keys; key += kStep) {
            long from = queries, end = 0;  // the stretch of queries that see these keys
            for (long first = 0; first < queries; first += kStep) {
                uint32_t* pairs = score_pairs + key / 2 * queries + first;
                if (!look.sees_any(key, first)) {
                    for (long t = 0; t < kStep; ++t) {
                        std::memset(shares + t * queries + first, 0, kStep * 2);
                        std::memset(slopes + t * queries + first, 0, kStep * 2);
                        if (t % 2 == 0) std::memset(pairs + t / 2 * queries, 0, kStep * 4);
                    }
                    continue;
                }
                from = std::min(from, first), end = first + kStep;
                product(scores, kStep, k.at + key * k.row, k.row, of.turned + first, queries, kStep, kStep, width,
                        false);
                product(falls, kStep, v.at + key * v.row, v.row, of.down_turned + first, queries, kStep, kStep, width,
                        false);
                slope_block(look, of, scores, falls, key, first, shares, slopes, queries, pairs,
                            to_bias ? to_bias + head * a.keys * a.queries : nullptr);
            }
            if (from >= end) from = 0, end = kStep;
            product(to_v + key * width, width, shares + from, queries, of.down_pairs + from / 2 * width, width, kStep,
                    width, end - from, more);
            product(to_k + key * width, width, slopes + from, queries, of.pairs + from / 2 * width, width, kStep, width,
                    end - from, more);
        }
        product(to_q, queries, k_turned, keys, score_pairs, queries, width, queries, keys, false);
        bf16* to = static_cast<bf16*>(g.to_q) + batch * g.to_q_strides.batch + head * g.to_q_strides.head;
        turn_back(to_q, queries, a.queries, a.width, nullptr, to, g.to_q_strides.time);
    }
    write_rows(to_k, width, a.keys, a.width, g.to_k, g.to_k_strides, batch, kv_head);
    write_rows(to_v, width, a.keys, a.width, g.to_v, g.to_v_strides, batch, kv_head);
}

Room& own_room() {
    static thread_local Room mine;
    return mine;
}

}  // namespace

void attention(const Attention& a, long first, long end) {
    Tiles tiles;
    for (long i = first; i < end; ++i) forward_head(a, i / a.kv_heads, i % a.kv_heads, own_room());
}

void attention_back(const AttentionBack& a, long first, long end, float* to_bias) {
    Tiles tiles;
    long heads = a.forward.kv_heads;
    for (long i = first; i < end; ++i) back_head(a, i / heads, i % heads, own_room(), to_bias);
}

}  // namespace LEXMILL_ISA
}  // namespace lexmill
