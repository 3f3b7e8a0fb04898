// The gradient of a linear layer's weight, Gᵀ X, from bfloat16 to float32, and of its bias, with AMX.
//
// The rows of both sides run along the sum. A product takes pairs of rows interleaved on its right, and the
// numbers of a column side by side on its left: so one side must be turned. It is the narrower one; where
// that is X, the result is turned back when it is written. Both sides are laid down for a stretch of rows,
// the left one in squares of 32 × 32, the right one in columns of 32, and what a stretch gives is added to
// the sums of those before it.

#include <immintrin.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "bfloat16.h"
#include "training.h"

namespace lexmill {
namespace LEXMILL_ISA {
namespace {

constexpr long kSide = 32;  // of a square of the result
// Rows that are laid down at once. 32 columns of them take 16 KiB: one of the left side, used again and
// again, and one of the right side, which only passes, fit into the first cache.
constexpr long kStretch = 256;
constexpr long kStrip = 8;  // rows of the right side that are read beside each other

// One side: a matrix of `rows` rows, `row` numbers apart, `width` numbers wide.
struct Side {
    const bf16* at;
    long rows, row, width;
    long columns() const { return (width + kSide - 1) / kSide; }
};

// 32 columns of two rows as pairs; what lies outside is 0. Instructions interleave within 128 bits: the pair of
// column c stands at place_of(c), and column_of is the way back.
struct Pairs {
    __m512i half[2];
};
inline long place_of(long column) { return column / 4 % 2 * 16 + column / 8 * 4 + column % 4; }
inline long column_of(long half, long lane) { return lane / 4 * 8 + half * 4 + lane % 4; }

inline Pairs pairs_at(const Side& of, long t, long column) {
    long left = of.width - column;
    __mmask32 there = left >= 32 ? ~0u : (1u << left) - 1;
    const bf16* at = of.at + t * of.row + column;
    __m512i even = _mm512_maskz_loadu_epi16(t < of.rows ? there : 0, at);
    __m512i odd = _mm512_maskz_loadu_epi16(t + 1 < of.rows ? there : 0, at + of.row);
    return {{_mm512_unpacklo_epi16(even, odd), _mm512_unpackhi_epi16(even, odd)}};
}

// Adds both rows to `sums`, (32), in the order of places.
inline void add_rows(float* sums, const Pairs& pairs) {
    for (int half = 0; half < 2; ++half) {
        __m512i both = pairs.half[half];
        __m512 odd = _mm512_castsi512_ps(_mm512_and_si512(both, _mm512_set1_epi32(int(0xffff0000))));
        __m512 even = _mm512_castsi512_ps(_mm512_slli_epi32(both, 16));
        float* to = sums + 16 * half;
        _mm512_store_ps(to, _mm512_add_ps(_mm512_load_ps(to), _mm512_add_ps(even, odd)));
    }
}

// Rows [first, first + rows) in columns: to[column / 32][row / 2][32 pairs]. They are added to `sums`, if any.
void lay_columns(const Side& of, long first, long rows, uint32_t* to, float* sums) {
    for (long strip = 0; strip < rows; strip += kStrip)
        for (long column = 0; column < of.width; column += kSide)
            for (long t = strip; t < strip + kStrip; t += 2) {
                Pairs pairs = pairs_at(of, first + t, column);
                uint32_t* own = to + column * rows / 2 + t / 2 * kSide;
                _mm512_store_si512(own, pairs.half[0]);
                _mm512_store_si512(own + 16, pairs.half[1]);
                if (sums) add_rows(sums + column, pairs);
            }
}

// Turns a square of 16 × 16 numbers of 32 bits.
inline void turn(__m512i x[16]) {
    __m512i y[16];
    for (int i = 0; i < 16; i += 2) {
        y[i] = _mm512_unpacklo_epi32(x[i], x[i + 1]);
        y[i + 1] = _mm512_unpackhi_epi32(x[i], x[i + 1]);
    }
    for (int i = 0; i < 16; i += 4)
        for (int j = 0; j < 2; ++j) {
            x[i + 2 * j] = _mm512_unpacklo_epi64(y[i + j], y[i + j + 2]);
            x[i + 2 * j + 1] = _mm512_unpackhi_epi64(y[i + j], y[i + j + 2]);
        }
    // now x[4 a + b] holds columns b, 4 + b, 8 + b, 12 + b of rows 4 a to 4 a + 3
    for (int b = 0; b < 4; ++b) {
        __m512i upper = _mm512_shuffle_i32x4(x[b], x[4 + b], 0x88), lower = _mm512_shuffle_i32x4(x[8 + b], x[12 + b], 0x88);
        y[b] = _mm512_shuffle_i32x4(upper, lower, 0x88);
        y[8 + b] = _mm512_shuffle_i32x4(upper, lower, 0xdd);
        upper = _mm512_shuffle_i32x4(x[b], x[4 + b], 0xdd), lower = _mm512_shuffle_i32x4(x[8 + b], x[12 + b], 0xdd);
        y[4 + b] = _mm512_shuffle_i32x4(upper, lower, 0x88);
        y[12 + b] = _mm512_shuffle_i32x4(upper, lower, 0xdd);
    }
    for (int i = 0; i < 16; ++i) x[i] = y[i];
}

// The same rows in squares: to[column / 32][row / 32][column % 32][32 rows].
void lay_squares(const Side& of, long first, long rows, bf16* to, float* sums) {
    for (long t = 0; t < rows; t += kSide)
        for (long column = 0; column < of.width; column += kSide) {
            __m512i x[2][16];
            for (int pair = 0; pair < 16; ++pair) {
                Pairs pairs = pairs_at(of, first + t + 2 * pair, column);
                if (sums) add_rows(sums + column, pairs);
                for (int half = 0; half < 2; ++half) x[half][pair] = pairs.half[half];
            }
            bf16* own = to + column * rows + t * kSide;
            for (int half = 0; half < 2; ++half) {
                turn(x[half]);
                for (int i = 0; i < 16; ++i) _mm512_store_si512(own + column_of(half, i) * kSide, x[half][i]);
            }
        }
}

// sums (32 × 32) = or += left (32 × rows) right (rows × 32), of one column of each side.
void square(float* sums, const bf16* left, const uint32_t* right, long rows, bool add) {
    begin_sums(sums, kSide, add);
    for (long t = 0; t < rows; t += 32, left += 32 * kSide, right += 16 * kSide) {
        _tile_loadd(4, left, 64);
        _tile_loadd(6, right, kSide * 4);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, right + 16, kSide * 4);
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(5, left + 16 * kSide, 64);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    store_sums(sums, kSide);
}

// A square of sums to where it belongs, (rows, columns) of which are there; its columns stand in the order of places.
void write(const float* sums, float* to, long to_row, long rows, long columns) {
    __m512i place = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    __m512i later = _mm512_add_epi32(place, _mm512_set1_epi32(8));
    for (long i = 0; i < std::min(rows, kSide); ++i, sums += kSide, to += to_row) {
        __m512 half = _mm512_load_ps(sums), other = _mm512_load_ps(sums + 16);
        _mm512_mask_storeu_ps(to, lanes(columns), _mm512_permutex2var_ps(half, place, other));
        _mm512_mask_storeu_ps(to + 16, lanes(columns - 16), _mm512_permutex2var_ps(half, later, other));
    }
}

// The same, its rows becoming columns.
void write_turned(const float* sums, float* to, long to_row, long rows, long columns) {
    for (long i = 0; i < kSide; i += 16)
        for (int half = 0; half < 2; ++half) {
            __m512i x[16];
            for (int k = 0; k < 16; ++k) x[k] = _mm512_load_si512(sums + (i + k) * kSide + 16 * half);
            turn(x);
            for (int k = 0; k < 16; ++k)
                if (column_of(half, k) < rows)
                    _mm512_mask_storeu_epi32(to + column_of(half, k) * to_row + i, lanes(columns - i), x[k]);
        }
}

// What a thread works in; kept from call to call.
struct Room {
    std::vector<bf16> squares;
    std::vector<uint32_t> columns;
    std::vector<float> sums, bias;
};

}  // namespace

// Columns [first, end) of the wider side, in multiples of 32.
void weight_gradient(const WeightGradient& a, long first, long end) {
    static thread_local Room own;
    Tiles tiles;
    bool turned = a.outputs >= a.inputs;
    Side gradient{static_cast<const bf16*>(a.gradient), a.rows, a.gradient_row, a.outputs};
    Side x{static_cast<const bf16*>(a.x), a.rows, a.x_row, a.inputs};
    Side left = turned ? x : gradient, right = turned ? gradient : x;
    right.at += first, right.width = end - first;
    long whole = (a.rows + 31) / 32 * 32, stretch = std::min(whole, kStretch);
    bool several = whole > stretch;
    bf16* squares = room(own.squares, left.columns() * kSide * stretch);
    uint32_t* columns = room(own.columns, right.columns() * kSide * stretch / 2);
    float* sums = room(own.sums, (several ? left.columns() * right.columns() : 1) * kSide * kSide);
    const Side& down = turned ? right : left;  // the gradient, as far as this thread lays it down
    float* bias = nullptr;
    if (a.to_bias && (turned || first == 0)) {  // what all threads lay down, the first one adds up
        bias = room(own.bias, down.columns() * kSide);
        std::memset(bias, 0, size_t(down.columns() * kSide) * 4);
    }
    for (long t = 0; t < whole; t += stretch) {
        long rows = std::min(stretch, whole - t);
        lay_squares(left, t, rows, squares, turned ? nullptr : bias);
        lay_columns(right, t, rows, columns, turned ? bias : nullptr);
        for (long i = 0; i < left.columns(); ++i)
            for (long j = 0; j < right.columns(); ++j) {
                float* sum = several ? sums + (i * right.columns() + j) * kSide * kSide : sums;
                square(sum, squares + i * kSide * rows, columns + j * kSide * rows / 2, rows, t > 0);
                if (t + rows < whole) continue;
                long output = turned ? first + j * kSide : i * kSide, input = turned ? i * kSide : first + j * kSide;
                float* to = a.to_weight + output * a.inputs + input;
                if (turned)
                    write_turned(sum, to, a.inputs, end - output, a.inputs - input);
                else
                    write(sum, to, a.inputs, a.outputs - output, end - input);
            }
    }
    for (long n = 0; bias && n < down.width; ++n)
        a.to_bias[(turned ? first : 0) + n] = bias[n / kSide * kSide + place_of(n % kSide)];
}

}  // namespace LEXMILL_ISA
}  // namespace lexmill
