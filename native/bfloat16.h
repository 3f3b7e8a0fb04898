// What the steps in bfloat16 share. Compiled anew for each instruction set.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <vector>

namespace lexmill {
namespace LEXMILL_ISA {

typedef uint16_t bf16;

#ifdef LEXMILL_AMX
// GCC's functions for tiles do not tell it what they read: what is stored before must be in memory.
inline void finish_stores() { __asm__ volatile("" ::: "memory"); }

struct Tiles {  // of 16 rows of 64 bytes; other libraries set their own before they compute
    Tiles() {
        struct alignas(64) {
            uint8_t palette = 1, start = 0, reserved[14] = {};
            uint16_t bytes[16] = {};
            uint8_t rows[16] = {};
        } shape;
        for (int i = 0; i < 8; ++i) shape.bytes[i] = 64, shape.rows[i] = 16;
        __asm__ volatile("" ::"r"(&shape) : "memory");
        _tile_loadconfig(&shape);
    }
    ~Tiles() { _tile_release(); }
};

// Tiles 0 to 3 are the quarters of 32 × 32 sums, `row` numbers from one row to the next: taken up, or begun at 0.
inline void begin_sums(const float* sums, long row, bool add) {
    finish_stores();
    if (!add) {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        return;
    }
    const float* lower = sums + 16 * row;
    _tile_loadd(0, sums, row * 4);
    _tile_loadd(1, sums + 16, row * 4);
    _tile_loadd(2, lower, row * 4);
    _tile_loadd(3, lower + 16, row * 4);
}

inline void store_sums(float* sums, long row) {
    float* lower = sums + 16 * row;
    _tile_stored(0, sums, row * 4);
    _tile_stored(1, sums + 16, row * 4);
    _tile_stored(2, lower, row * 4);
    _tile_stored(3, lower + 16, row * 4);
}
#else
struct Tiles {};
#endif

// At least so many numbers of a space that is kept from call to call, from the beginning of a line of the
// caches on: what is loaded into tiles would else lie across two.
template <class T>
T* room(std::vector<T>& space, long count) {
    constexpr long kLine = 64;
    if (long(space.size()) < count + kLine) space.resize(size_t(count + kLine));
    return reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(space.data()) + kLine - 1) / kLine * kLine);
}

inline __mmask16 lanes(long count) { return __mmask16(count >= 16 ? 0xffff : count <= 0 ? 0 : (1 << count) - 1); }

}  // namespace LEXMILL_ISA
}  // namespace lexmill
