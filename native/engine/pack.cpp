// Weights as files hold them, laid out as the engine reads them (engine.h, Matrix).

#include <algorithm>
#include <cmath>
#include <cstring>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "engine.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace lexmill::engine {
namespace {

#include "lanes.h"

// Numbers of ggml's types (ggml.h, enum ggml_type).
enum Source : int { kF32 = 0, kF16 = 1, kQ4_0 = 2, kQ4_1 = 3, kQ5_0 = 6, kQ5_1 = 7, kQ8_0 = 8, kQ4_K = 12, kQ5_K = 13, kBF16 = 30 };

uint16_t half_at(const uint8_t* p) {
    uint16_t half;
    std::memcpy(&half, p, 2);
    return half;
}

// A block of thirty-two weights: scale q + least, or scale (q − middle) where there is no least.
struct Taken {
    uint8_t q[32];
    uint16_t scale = 0, least = 0;
};

void nibbles(const uint8_t* from, uint8_t* q) {
    for (int i = 0; i < 16; ++i) q[i] = from[i] & 15, q[i + 16] = from[i] >> 4;
}

void fifth_bits(const uint8_t* from, uint8_t* q) {
    for (int i = 0; i < 32; ++i) q[i] = uint8_t(q[i] | (from[i / 8] >> (i % 8) & 1) << 4);
}

// Scale and least of sub-block j of a super-block of 256 (ggml-quants.c, get_scale_min_k4).
void six_bits(int j, const uint8_t* packed, int& scale, int& least) {
    if (j < 4) {
        scale = packed[j] & 63, least = packed[j + 4] & 63;
    } else {
        scale = (packed[j + 4] & 15) | packed[j - 4] >> 6 << 4;
        least = packed[j + 4] >> 4 | packed[j] >> 6 << 4;
    }
}

Taken take_block(int source, const uint8_t* row, long block) {
    Taken out;
    switch (source) {
        case kQ4_0: {
            const uint8_t* at = row + block * 18;
            out.scale = half_at(at);
            nibbles(at + 2, out.q);
            break;
        }
        case kQ4_1: {
            const uint8_t* at = row + block * 20;
            out.scale = half_at(at), out.least = half_at(at + 2);
            nibbles(at + 4, out.q);
            break;
        }
        case kQ5_0: {
            const uint8_t* at = row + block * 22;
            out.scale = half_at(at);
            nibbles(at + 6, out.q);
            fifth_bits(at + 2, out.q);
            for (uint8_t& q : out.q) q = uint8_t(q + 112);  // q − 16 as (q + 112) − 128
            break;
        }
        case kQ5_1: {
            const uint8_t* at = row + block * 24;
            out.scale = half_at(at), out.least = half_at(at + 2);
            nibbles(at + 8, out.q);
            fifth_bits(at + 4, out.q);
            break;
        }
        case kQ8_0: {
            const uint8_t* at = row + block * 34;
            out.scale = half_at(at);
            for (int i = 0; i < 32; ++i) out.q[i] = uint8_t(at[2 + i] ^ 0x80);
            break;
        }
        case kQ4_K:
        case kQ5_K: {
            const bool five = source == kQ5_K;
            const uint8_t* at = row + block / 8 * (five ? 176 : 144);
            const int j = int(block % 8);
            int scale, least;
            six_bits(j, at + 4, scale, least);
            out.scale = to_half(from_half(half_at(at)) * float(scale));
            out.least = to_half(-from_half(half_at(at + 2)) * float(least));
            const uint8_t *high = at + 16, *low = at + (five ? 48 : 16) + j / 2 * 32;
            for (int i = 0; i < 32; ++i) {
                out.q[i] = j % 2 ? low[i] >> 4 : low[i] & 15;
                if (five) out.q[i] = uint8_t(out.q[i] | (high[i] >> j & 1) << 4);
            }
            break;
        }
    }
    return out;
}

// Eight bits from real numbers; the scale is rounded first, so that the weights fit what is kept of it.
Taken round_block(const float* x) {
    Taken out;
    float most = 0;
    for (int i = 0; i < 32; ++i) most = std::max(most, std::fabs(x[i]));
    out.scale = to_half(most / 127.0f);
    const float scale = from_half(out.scale), inverse = scale > 0 ? 1.0f / scale : 0.0f;
    for (int i = 0; i < 32; ++i)
        out.q[i] = uint8_t(int(std::max(-127.0f, std::min(127.0f, std::nearbyint(x[i] * inverse)))) + 128);
    return out;
}

long row_bytes(int source, long columns) {
    switch (source) {
        case kF32: return columns * 4;
        case kF16: case kBF16: return columns * 2;
        case kQ4_0: return columns / 32 * 18;
        case kQ4_1: return columns / 32 * 20;
        case kQ5_0: return columns / 32 * 22;
        case kQ5_1: return columns / 32 * 24;
        case kQ8_0: return columns / 32 * 34;
        case kQ4_K: return columns / 256 * 144;
        case kQ5_K: return columns / 256 * 176;
    }
    return 0;
}

struct Target {
    uint8_t* values;
    uint16_t *scales, *minima;
};

void put_block(const Matrix& m, const Target& to, long panel, long lane, long block, const Taken& from) {
    const long at = panel * m.blocks() + block;
    to.scales[at * kLanes + lane] = from.scale;
    if (to.minima) to.minima[at * kLanes + lane] = from.least;
    for (int i = 0; i < 32; ++i) {
        if (m.type == kEightBits) {
            to.values[at * 512 + i / 4 * 64 + lane * 4 + i % 4] = from.q[i];
        } else {
            uint8_t& both = to.values[at * 256 + i % 16 / 4 * 64 + lane * 4 + i % 4];
            both = i < 16 ? uint8_t((both & 0xf0) | from.q[i]) : uint8_t((both & 0x0f) | from.q[i] << 4);
        }
    }
}

void pack_panel(const Matrix& m, int source, const uint8_t* data, const int32_t* order, const Target& to, long panel) {
    const long columns = m.blocks() * kBlock, bytes = row_bytes(source, m.columns);
    for (long lane = 0; lane < kLanes; ++lane) {
        const long row = panel * kLanes + lane;
        const uint8_t* from = row < m.rows ? data + (order ? order[row] : row) * bytes : nullptr;
        if (m.type == kEightBits || m.type == kFourBits) {
            const int middle = to.minima ? 0 : m.type == kEightBits ? 128 : 8;
            for (long b = 0; b < m.blocks(); ++b) {
                Taken block;
                if (!from) {
                    std::memset(block.q, middle, 32);
                } else if (source == kF32) {
                    float x[32] = {};
                    std::memcpy(x, from + b * 128, size_t(std::min(32l, long(m.columns) - b * 32)) * 4);
                    block = round_block(x);
                } else {
                    block = take_block(source, from, b);
                }
                put_block(m, to, panel, lane, b, block);
            }
            continue;
        }
        for (long c = 0; c < columns; ++c) {
            const bool there = from && c < m.columns;
            const long plain = (panel * columns + c) * kLanes + lane;
            if (m.type == kFloat32) {
                float x = 0;
                if (there) std::memcpy(&x, from + 4 * c, 4);
                reinterpret_cast<float*>(to.values)[plain] = x;
            } else {
                const long pair = (panel * columns + (c & ~1l)) * kLanes + 2 * lane + (c & 1);
                reinterpret_cast<uint16_t*>(to.values)[m.type == kFloat16 ? plain : pair] = there ? half_at(from + 2 * c) : 0;
            }
        }
    }
}

}  // namespace
}  // namespace lexmill::engine

using namespace lexmill::engine;

// Lays out a matrix. `source`: one of ggml's types (F32 may become 8 bits, the others what they are); `order`: which
// row of the file each row is, or null. `m` says type, rows and columns; the other three are where it goes.
EXPORT void lexmill_engine_pack(const Matrix* m, int source, const uint8_t* data, const int32_t* order, uint8_t* values,
                                uint16_t* scales, uint16_t* minima, int threads) {
    const Target to{values, scales, minima};
    const long panels = 2 * m->strips();
    auto some = [&](long first) {
        for (long panel = first; panel < panels; panel += threads) pack_panel(*m, source, data, order, to, panel);
    };
    std::vector<std::thread> helpers;
    for (int i = 1; i < threads; ++i) helpers.emplace_back(some, i);
    some(0);
    for (std::thread& helper : helpers) helper.join();
}
