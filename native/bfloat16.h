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
