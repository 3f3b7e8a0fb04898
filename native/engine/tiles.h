// Products of prompts with AMX (Intel, "Advanced Matrix Extensions"): sixteen tokens times sixteen rows times
// thirty-two columns at once, in bfloat16 with sums in float32. Weights of fewer bits become bfloat16 strip by strip,
// once for all tokens. Included by kernels.cpp.

// GCC's functions for tiles do not say what memory they read and write.
#define SETTLE __asm__ volatile("" ::: "memory")

struct alignas(64) TileShapes {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

constexpr int kFew = 8;  // tokens of written text that are multiplied at once

// What is multiplied: prompts, and of written text bytes or bfloat16.
const TileShapes kPrompt;
const TileShapes kBytesOfFew = {1, 0, {}, {64, 64, 64, 64, 32, 32, 64, 64}, {kFew, kFew, kFew, kFew, kFew, kFew, 8, 8}};
const TileShapes kPairsOfFew = {
    1, 0, {}, {64, 64, 64, 64, 64, 64, 64, 64}, {kFew, kFew, kFew, kFew, kFew, kFew, 16, 16}};
thread_local const TileShapes* shapes;

void use(const TileShapes& wanted) {
    if (shapes == &wanted) return;
    SETTLE;
    _tile_loadconfig(&wanted);
    shapes = &wanted;
}

void begin_tiles(bool prompt) {  // somebody else may have shaped this thread's tiles
    shapes = nullptr;
    use(prompt ? kPrompt : kBytesOfFew);
}

// Sixteen numbers each of two columns, rounded to bfloat16 (halves upwards), side by side.
INLINE __m512i two_columns(Floats even, Floats odd) {
    const __m512i half = _mm512_set1_epi32(0x8000);
    alignas(64) static const uint16_t kUpper[32] = {1,  33, 3,  35, 5,  37, 7,  39, 9,  41, 11, 43, 13, 45, 15, 47,
                                                    17, 49, 19, 51, 21, 53, 23, 55, 25, 57, 27, 59, 29, 61, 31, 63};
    return _mm512_permutex2var_epi16(_mm512_add_epi32((__m512i)even, half), _mm512_load_si512(kUpper),
                                     _mm512_add_epi32((__m512i)odd, half));
}

// A byte or half of one, moved into a float's last bits, is the number kOffset + q: no conversion is needed.
template <int kShift, uint32_t kMask, uint32_t kExponent>
INLINE Floats number_of(Ints x) {
    __m512i moved = kShift > 0   ? _mm512_slli_epi32((__m512i)x, kShift > 0 ? kShift : 0)
                    : kShift < 0 ? _mm512_srli_epi32((__m512i)x, kShift < 0 ? -kShift : 0)
                                 : (__m512i)x;
    return (Floats)_mm512_ternarylogic_epi32(moved, _mm512_set1_epi32(int(kMask)), _mm512_set1_epi32(int(kExponent)),
                                             0xEA);  // (moved & mask) | exponent
}

// A panel (sixteen rows) of a matrix as bfloat16 tiles: for each block of columns 16 pairs × 16 rows × 2.
INLINE void panel_to_tiles(const Matrix& m, long panel, __m512i* out) {
    const long blocks = m.blocks();
    const uint16_t* scales = m.scales + panel * blocks * kLanes;
    const uint16_t* minima = m.minima ? m.minima + panel * blocks * kLanes : nullptr;
    if (m.type == kFourBits) {  // 16 + q
        const uint8_t* values = m.values + panel * blocks * 256;
        for (long b = 0; b < blocks; ++b, values += 256, out += 16) {
            Floats s = load_halves(scales + b * kLanes);
            Floats o = minima ? fma(s, all(-16.0f), load_halves(minima + b * kLanes)) : s * all(-24.0f);
            for (int j = 0; j < 4; ++j) {
                Ints x = load_ints(values + 64 * j);
#define QUARTER(shift) fma(s, number_of<19 - (shift), 0xFu << 19, 0x41800000u>(x), o)
                out[2 * j] = two_columns(QUARTER(0), QUARTER(8));
                out[2 * j + 1] = two_columns(QUARTER(16), QUARTER(24));
                out[2 * j + 8] = two_columns(QUARTER(4), QUARTER(12));
                out[2 * j + 9] = two_columns(QUARTER(20), QUARTER(28));
#undef QUARTER
            }
        }
    } else {  // 256 + q
        const uint8_t* values = m.values + panel * blocks * 512;
        for (long b = 0; b < blocks; ++b, values += 512, out += 16) {
            Floats s = load_halves(scales + b * kLanes);
            Floats o = minima ? fma(s, all(-256.0f), load_halves(minima + b * kLanes)) : s * all(-384.0f);
            for (int j = 0; j < 8; ++j) {
                Ints x = load_ints(values + 64 * j);
#define QUARTER(shift) fma(s, number_of<15 - (shift), 0xFFu << 15, 0x43800000u>(x), o)
                out[2 * j] = two_columns(QUARTER(0), QUARTER(8));
                out[2 * j + 1] = two_columns(QUARTER(16), QUARTER(24));
#undef QUARTER
            }
        }
    }
}

// Up to kFew tokens times the bytes of a panel: the same whole numbers as `dot`, and the same sums of them.
template <bool kSmall, bool kLeast>
void bytes_tiles(const Matrix& m, long panel, const Inputs& in, long first, long tokens, float* out) {
    constexpr long kBytes = kSmall ? 256 : 512, kAtOnce = 4;
    constexpr uint32_t kZero = kLeast ? 0 : kSmall ? 8 : 128;
    const long blocks = m.blocks();
    const uint8_t* values = m.values + panel * blocks * kBytes;
    const uint16_t* scales = m.scales + panel * blocks * kLanes;
    const uint16_t* minima = kLeast ? m.minima + panel * blocks * kLanes : nullptr;
    alignas(64) Block unpacked[kAtOnce];
    alignas(64) int32_t found[kAtOnce][kFew][kLanes];
    Floats totals[kFew];
    for (int t = 0; t < kFew; ++t) totals[t] = all(0.0f);
    for (long b = 0; b < blocks; b += kAtOnce) {
        const long some = blocks - b < kAtOnce ? blocks - b : kAtOnce;
        const void* weights[kAtOnce];
        for (long i = 0; i < some; ++i) {
            weights[i] = values + (b + i) * kBytes;
            prefetch(weights[i], kBytes);
            if (kSmall) read_nibbles(values + (b + i) * kBytes, unpacked[i]), weights[i] = &unpacked[i];
        }
        const int8_t* x = in.bytes + first * in.columns + b * kBlock;
        SETTLE;
#define PRODUCT(i, a, w)                               \
    if (i < some) {                                    \
        _tile_zero(i);                                 \
        _tile_loadd(a, x + i * kBlock, in.columns);    \
        _tile_loadd(w, weights[i], 64);                \
        _tile_dpbsud(i, a, w);                         \
        _tile_stored(i, found[i], 4 * kLanes);         \
    }
        PRODUCT(0, 4, 6)
        PRODUCT(1, 5, 7)
        PRODUCT(2, 4, 6)
        PRODUCT(3, 5, 7)
#undef PRODUCT
        SETTLE;
        for (long i = 0; i < some; ++i) {
            const Floats scale = load_halves(scales + (b + i) * kLanes);
            Floats least;
            if (kLeast) least = load_halves(minima + (b + i) * kLanes);
            for (int t = 0; t < kFew; ++t) {
                const long at = (first + t) * blocks + b + i;
                // behind the last token stands anything: unsigned, so that it may overflow
                const Floats whole = floats(load_ints(found[i][t]) - all(int32_t(kZero * uint32_t(in.sums[at]))));
                totals[t] = fma(whole, scale * all(in.scales[at]), totals[t]);
                if (kLeast) totals[t] = fma(least, all(in.scales[at] * float(in.sums[at])), totals[t]);
            }
        }
    }
    for (long t = 0; t < tokens; ++t) save(out + t * kStrip, totals[t]);
}

void bytes_strip(const Matrix& m, long strip, const Inputs& in, long first, long tokens, float* out) {
    use(kBytesOfFew);
    for (long p = 0; p < 2; ++p) {
        const long panel = 2 * strip + p;
        float* to = out + p * kLanes;
        if (m.type == kEightBits)
            m.minima ? bytes_tiles<false, true>(m, panel, in, first, tokens, to)
                     : bytes_tiles<false, false>(m, panel, in, first, tokens, to);
        else
            m.minima ? bytes_tiles<true, true>(m, panel, in, first, tokens, to)
                     : bytes_tiles<true, false>(m, panel, in, first, tokens, to);
    }
}

// Up to kFew tokens times a strip in bfloat16: the same sums as `pairs_strip` finds.
void pairs_of_few(const Matrix& m, long strip, const Inputs& in, long first, long tokens, float* out) {
    const long blocks = m.blocks(), panel = blocks * 512;  // numbers in a panel
    const uint16_t* weights = reinterpret_cast<const uint16_t*>(m.values) + 2 * strip * panel;
    const uint16_t* x = in.pairs + first * in.columns;
    alignas(64) float found[kFew][kStrip];
    use(kPairsOfFew);
    SETTLE;
    _tile_zero(0);
    _tile_zero(1);
    for (long b = 0; b < blocks; ++b) {
        prefetch(weights + b * 512, 1024), prefetch(weights + panel + b * 512, 1024);
        _tile_loadd(4, x + b * kBlock, 2 * in.columns);
        _tile_loadd(6, weights + b * 512, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, weights + panel + b * 512, 64);
        _tile_dpbf16ps(1, 4, 7);
    }
    _tile_stored(0, found[0], 4 * kStrip);
    _tile_stored(1, found[0] + kLanes, 4 * kStrip);
    SETTLE;
    std::memcpy(out, found, sizeof(float) * kStrip * size_t(tokens));
}

// Tokens are taken thirty-two at a time; `first` is a multiple of them, and rows behind the last may hold anything.
void tiles_strip(const Matrix& m, long strip, const Inputs& in, long first, long tokens, float* out, uint8_t* scratch) {
    const long blocks = m.blocks(), panel = blocks * 512;  // numbers in a panel
    const uint16_t* weights = reinterpret_cast<const uint16_t*>(m.values) + 2 * strip * panel;
    if (m.type != kBfloat16) {
        __m512i* tiles = reinterpret_cast<__m512i*>(scratch);
        panel_to_tiles(m, 2 * strip, tiles);
        panel_to_tiles(m, 2 * strip + 1, tiles + panel / 32);
        weights = reinterpret_cast<const uint16_t*>(scratch);
    }
    SETTLE;
    for (long t = 0; t < tokens; t += 32) {
        const uint16_t* x = in.tiles + (first + t) * in.columns;
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        for (long b = 0; b < blocks; ++b) {
            _tile_loadd(4, x + b * 512, 64);
            _tile_loadd(6, weights + b * 512, 64);
            _tile_dpbf16ps(0, 4, 6);
            _tile_loadd(7, weights + panel + b * 512, 64);
            _tile_dpbf16ps(1, 4, 7);
            _tile_loadd(5, x + panel + b * 512, 64);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
        float* to = out + t * kStrip;
        _tile_stored(0, to, 4 * kStrip);
        _tile_stored(1, to + kLanes, 4 * kStrip);
        _tile_stored(2, to + 16 * kStrip, 4 * kStrip);
        _tile_stored(3, to + 16 * kStrip + kLanes, 4 * kStrip);
    }
    SETTLE;
}

// What bfloat16 can say of numbers by leaving their last bits away; `x - upper(x)` is what is left.
INLINE Floats upper(Floats x) {
    return (Floats)_mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512((__m512)x), _mm512_set1_epi32(int(0xffff0000))));
}

// Keys and values of a page as tiles: keys for each part, half page and 32 coordinates, 16 pairs of coordinates × 16 keys
// × 2; then values for each 16 coordinates, 16 pairs of keys × 16 coordinates × 2. Coordinates are padded to whole tiles.
void page_to_tiles(const Attention& a, long page, long kv_head, uint16_t* out) {
    const long width = a.shape->head_width, padded = a.shape->padded_width();
    const long start = (page * a.shape->kv_heads + kv_head) * width * kPage;
    const uint16_t *keys = static_cast<const uint16_t*>(a.pages.keys) + start,
                   *values = static_cast<const uint16_t*>(a.pages.values) + start;
    for (long half = 0; half < 2; ++half)
        for (long d = 0; d < padded; d += 2, out += 32) {
            Floats even = d < width ? load_halves(keys + d * kPage + half * kLanes) : all(0.0f);
            Floats odd = d + 1 < width ? load_halves(keys + (d + 1) * kPage + half * kLanes) : all(0.0f);
            if (a.shape->parts == 2) {
                _mm512_storeu_si512(out + padded * kPage, two_columns(even - upper(even), odd - upper(odd)));
                even = upper(even), odd = upper(odd);
            }
            _mm512_storeu_si512(out, two_columns(even, odd));
        }
    out += (a.shape->parts - 1) * padded * kPage;
    for (long d = 0; d < padded; d += kLanes)
        for (long key = 0; key < kPage; key += 2, out += 32) {
            Floats two[2];
            for (int i = 0; i < 2; ++i) {
                const uint16_t* at = values + (key + i) * width + d;
                if (d + kLanes <= width) {
                    two[i] = load_halves(at);
                } else {
                    uint16_t rest[kLanes] = {};
                    for (long c = d; c < width; ++c) rest[c - d] = at[c - d];
                    two[i] = load_halves(rest);
                }
            }
            _mm512_storeu_si512(out, two_columns(two[0], two[1]));
        }
}

INLINE __m512i side_by_side(Floats low, Floats high) { return (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low); }

INLINE __mmask16 lanes(long count) { return __mmask16(count >= 16 ? 0xffff : count <= 0 ? 0 : (1 << count) - 1); }

// Scores of one query to shares in bfloat16, not yet divided by their sum, which is returned.
INLINE float shares_to_tiles(float* x, const Reach& reach, long padded, float scale, const float* bias,
                             const Attention& a, long position, uint16_t* out) {
    if (bias)
        for (long key = reach.first; key < reach.end; ++key) {
            long apart = key - position;
            x[key] = x[key] * scale + bias[apart < -a.reach ? -a.reach : apart > a.reach ? a.reach : apart];
        }
    const float step = bias ? 1.0f : scale;
    for (long key = 0; key < reach.first; ++key) x[key] = -INFINITY;
    for (long key = reach.end; key < padded; ++key) x[key] = -INFINITY;
    Floats most = all(-INFINITY);
    for (long key = 0; key < padded; key += kLanes) most = larger(most, load(x + key));
    const Floats top = all(peak(most) * step);
    Floats sums = all(0.0f);
    for (long key = 0; key < padded; key += kPage) {
        Floats one = exponential(load(x + key) * all(step) - top);
        Floats two = exponential(load(x + key + kLanes) * all(step) - top);
        sums = sums + one + two;
        _mm512_storeu_si512(out + key * 16, side_by_side(one, two));
    }
    return total(sums);
}

// A query as a row of tiles of bfloat16, or of two parts of it one behind the other: a tile for each 32 coordinates.
INLINE void query_to_tiles(const float* x, long width, long padded, long parts, uint16_t* out) {
    for (long d = 0; d < width; d += 32) {
        Floats low = (Floats)_mm512_maskz_loadu_ps(lanes(width - d), x + d);
        Floats high = (Floats)_mm512_maskz_loadu_ps(lanes(width - d - 16), x + d + 16);
        if (parts == 2) {
            _mm512_storeu_si512(out + 16 * padded + d * 16, side_by_side(low - upper(low), high - upper(high)));
            low = upper(low), high = upper(high);
        }
        _mm512_storeu_si512(out + d * 16, side_by_side(low, high));
    }
}

// Products of sixteen queries with the keys of a page, (16, 32) of (16, stride). In two parts (a + b)(c + d) is ac + bc + ad:
// bd lies below the last bit.
template <int kParts>
INLINE void scores_of_page(const uint16_t* queries, const uint16_t* keys, long padded, float* out, long stride) {
    _tile_zero(0);
    _tile_zero(1);
    for (long d = 0; d < padded / 32; ++d) {
        const uint16_t *at = keys + d * 512, *second = at + padded * 16;
        _tile_loadd(4, queries + d * 512, 64);
        _tile_loadd(6, at, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, second, 64);
        _tile_dpbf16ps(1, 4, 7);
        if (kParts == 2) {
            _tile_loadd(5, queries + padded * 16 + d * 512, 64);
            _tile_dpbf16ps(0, 5, 6);
            _tile_dpbf16ps(1, 5, 7);
            _tile_loadd(6, at + padded * kPage, 64);
            _tile_dpbf16ps(0, 4, 6);
            _tile_loadd(7, second + padded * kPage, 64);
            _tile_dpbf16ps(1, 4, 7);
        }
    }
    _tile_stored(0, out, 4 * stride);
    _tile_stored(1, out + kLanes, 4 * stride);
}

// See `attend`. `tiles`: the pages of the sequence in order, from `page_to_tiles`.
void attend_tiles(const Attention& a, long first, long rows, long kv_head, long begin, const uint16_t* tiles,
                  float* scratch) {
    const Shape& shape = *a.shape;
    const long width = shape.head_width, padded = shape.padded_width(), group = shape.heads / shape.kv_heads;
    const long parts = shape.parts, page_size = shape.page_tiles();
    Reach reach[16];
    long last = 0;
    for (long r = 0; r < rows; ++r) {
        reach[r] = reach_of(a, first + (begin + r) / group);
        last = reach[r].end > last ? reach[r].end : last;
    }
    const long pages = (last + kPage - 1) / kPage, keys = pages * kPage, stride = keys + kLanes;
    float* scores = scratch;                                                       // (16, stride)
    uint16_t* shares = reinterpret_cast<uint16_t*>(scores + 16 * stride);          // (pages, 16, 32)
    uint16_t* queries = shares + pages * 16 * kPage;                               // (parts, padded / 32, 16, 32)
    float* found = reinterpret_cast<float*>(queries + parts * 16 * padded);        // (16, padded)
    std::memset(queries, 0, sizeof(uint16_t) * size_t(parts * 16 * padded));
    for (long r = 0; r < rows; ++r) {
        const long head = kv_head * group + (begin + r) % group;
        query_to_tiles(a.queries + (first + (begin + r) / group) * a.queries_width + head * width, width, padded, parts,
                       queries + r * 32);
    }
    SETTLE;
    for (long p = 0; p < pages; ++p)
        parts == 2 ? scores_of_page<2>(queries, tiles + p * page_size, padded, scores + p * kPage, stride)
                   : scores_of_page<1>(queries, tiles + p * page_size, padded, scores + p * kPage, stride);
    SETTLE;
    float sums[16];
    for (long r = 0; r < rows; ++r) {
        const long head = kv_head * group + (begin + r) % group, token = first + (begin + r) / group;
        const float* bias = a.bias ? a.bias + head * (2 * a.reach + 1) + a.reach : nullptr;
        sums[r] = shares_to_tiles(scores + r * stride, reach[r], keys, float(a.operation->scale), bias, a,
                                  a.batch->positions[token], shares + r * kPage);
    }
    SETTLE;
    for (long d = 0; d < padded; d += 32) {
        _tile_zero(0);
        _tile_zero(1);
        for (long p = 0; p < pages; ++p) {
            const uint16_t* values = tiles + p * page_size + (parts * padded + d) * kPage;
            _tile_loadd(4, shares + p * 512, 64);
            _tile_loadd(6, values, 64);
            _tile_dpbf16ps(0, 4, 6);
            _tile_loadd(7, values + 512, 64);
            _tile_dpbf16ps(1, 4, 7);
        }
        _tile_stored(0, found + d, 4 * padded);
        _tile_stored(1, found + d + kLanes, 4 * padded);
    }
    SETTLE;
    for (long r = 0; r < rows; ++r) {
        float* to = a.out + (first + (begin + r) / group) * a.out_width + (kv_head * group + (begin + r) % group) * width;
        const __m512 inverse = _mm512_set1_ps(1.0f / sums[r]);
        for (long d = 0; d < width; d += 16) {
            _mm512_mask_storeu_ps(to + d, lanes(width - d), _mm512_mul_ps(_mm512_loadu_ps(found + r * padded + d), inverse));
        }
    }
}
