// What this machine can do at best: bytes read from memory, and products in loops that touch registers only.
// A rate of the engine is judged by its share of these. The best of some short runs counts, since other work
// on the machine only ever takes away.

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <exception>
#include <thread>
#include <vector>

#ifdef __linux__
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif
#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#endif

#define EXPORT extern "C" __attribute__((visibility("default")))
#define HELD(isa) __attribute__((target(isa), noinline))

namespace lexmill::engine {
namespace {

constexpr int kRuns = 5;
constexpr double kSeconds = 0.03;  // of one run: long beside the threads' start, short beside a test's patience

// The kinds, in the order of `_KINDS` in inference/native/limits.py.
enum Kind { kRead, kFloat32, kInt8, kInt8Short, kInt8Vnni, kBfloat16, kInt8Amx, kBfloat16Amx };

// A loop's result goes here, or a compiler would leave the loop out.
volatile float kept;

// A register whose value the compiler cannot know: products of it are not taken once for all turns, and sums that
// begin with it are not found to be one and the same.
#if defined(__aarch64__)
#define UNKNOWN(x) __asm__ volatile("" : "+w"(x))
#elif defined(__x86_64__)
#define UNKNOWN(x) __asm__ volatile("" : "+v"(x))
#else
#define UNKNOWN(x) __asm__ volatile("" : "+m"(x))
#endif

// The sums of a turn, one instruction behind the other: they stay in registers only when the loop is unrolled.
#define EACH(sum, sums) _Pragma("GCC unroll 32") for (auto& sum : sums)

// Each loop gives the operations of one turn; a multiplication and an addition are two.

double float32_plain(long turns) {
    typedef float Lanes __attribute__((vector_size(16)));
    Lanes sums[8], a = {1e-3f, 1e-3f, 1e-3f, 1e-3f}, b = a;
    EACH(sum, sums) {
        sum = a;
        UNKNOWN(sum);
    }
    for (long turn = 0; turn < turns; ++turn) {
        UNKNOWN(a);
        EACH(sum, sums) sum = a * b + sum;
    }
    EACH(sum, sums) kept = sum[0];
    return 8 * 4 * 2;
}

#if defined(__x86_64__)

HELD("avx2,fma") double float32_avx2(long turns) {
    __m256 sums[12], a = _mm256_set1_ps(1e-3f), b = a;
    EACH(sum, sums) {
        sum = a;
        UNKNOWN(sum);
    }
    for (long turn = 0; turn < turns; ++turn) {
        UNKNOWN(a);
        EACH(sum, sums) sum = _mm256_fmadd_ps(a, b, sum);
    }
    EACH(sum, sums) kept = _mm256_cvtss_f32(sum);
    return 12 * 8 * 2;
}

HELD("avx512f") double float32_avx512(long turns) {
    __m512 sums[24], a = _mm512_set1_ps(1e-3f), b = a;
    EACH(sum, sums) {
        sum = a;
        UNKNOWN(sum);
    }
    for (long turn = 0; turn < turns; ++turn) {
        UNKNOWN(a);
        EACH(sum, sums) sum = _mm512_fmadd_ps(a, b, sum);
    }
    EACH(sum, sums) kept = _mm512_cvtss_f32(sum);
    return 24 * 16 * 2;
}

// Without instructions for it, a dot product of bytes takes three: products in pairs, pairs of pairs, the sum.
HELD("avx2") double int8_avx2(long turns) {
    __m256i sums[8], a = _mm256_set1_epi8(1), b = a, ones = _mm256_set1_epi16(1);
    EACH(sum, sums) {
        sum = a;
        UNKNOWN(sum);
    }
    for (long turn = 0; turn < turns; ++turn)
        EACH(sum, sums) {
            UNKNOWN(a);
            sum = _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(a, b), ones));
        }
    EACH(sum, sums) kept = float(_mm256_extract_epi32(sum, 0));
    return 8 * 32 * 2;
}

// Summed in 16 bits, as far as that goes without overflow, it takes two.
HELD("avx2") double int8_short_avx2(long turns) {
    __m256i sums[8], a = _mm256_set1_epi8(1), b = a;
    EACH(sum, sums) {
        sum = a;
        UNKNOWN(sum);
    }
    for (long turn = 0; turn < turns; ++turn)
        EACH(sum, sums) {
            UNKNOWN(a);
            sum = _mm256_add_epi16(sum, _mm256_maddubs_epi16(a, b));
        }
    EACH(sum, sums) kept = float(_mm256_extract_epi32(sum, 0));
    return 8 * 32 * 2;
}

HELD("avx512f,avx512vnni") double int8_vnni(long turns) {
    __m512i sums[24], a = _mm512_set1_epi8(1), b = a;
    EACH(sum, sums) {
        sum = a;
        UNKNOWN(sum);
    }
    for (long turn = 0; turn < turns; ++turn) {
        UNKNOWN(a);
        EACH(sum, sums) sum = _mm512_dpbusd_epi32(sum, a, b);
    }
    EACH(sum, sums) kept = float(_mm512_cvtsi512_si32(sum));
    return 24 * 64 * 2;
}

HELD("avx512f,avx512bf16") double bfloat16_avx512(long turns) {
    __m512 sums[24];
    __m512bh a = _mm512_cvtne2ps_pbh(_mm512_set1_ps(1e-3f), _mm512_set1_ps(1e-3f)), b = a;
    EACH(sum, sums) {
        sum = _mm512_set1_ps(1.0f);
        UNKNOWN(sum);
    }
    for (long turn = 0; turn < turns; ++turn) {
        UNKNOWN(a);
        EACH(sum, sums) sum = _mm512_dpbf16_ps(sum, a, b);
    }
    EACH(sum, sums) kept = _mm512_cvtss_f32(sum);
    return 24 * 32 * 2;
}

#ifdef LEXMILL_ENGINE_AMX
// Eight tiles of 16 rows of 64 bytes: four sums, two and two factors (Intel's manual, vol. 1, chapter 18).
struct alignas(64) Tiles {
    uint8_t palette = 1, first_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

#define FOUR_PRODUCTS(product) \
    product(0, 4, 6);          \
    product(1, 4, 7);          \
    product(2, 5, 6);          \
    product(3, 5, 7)

HELD("amx-tile") void begin_tiles() {
    static const Tiles tiles;
    _tile_loadconfig(&tiles);
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    _tile_zero(4);
    _tile_zero(5);
    _tile_zero(6);
    _tile_zero(7);
}

HELD("amx-tile,amx-int8") double int8_amx(long turns) {
    begin_tiles();
    for (long turn = 0; turn < turns; ++turn) {
        FOUR_PRODUCTS(_tile_dpbssd);
    }
    _tile_release();
    return 4 * 16 * 16 * 64 * 2;
}

HELD("amx-tile,amx-bf16") double bfloat16_amx(long turns) {
    begin_tiles();
    for (long turn = 0; turn < turns; ++turn) {
        FOUR_PRODUCTS(_tile_dpbf16ps);
    }
    _tile_release();
    return 4 * 16 * 16 * 32 * 2;
}
#endif

HELD("avx512f") void read_avx512(const uint8_t* from, size_t bytes) {
    __m512i sums[4] = {};
    for (size_t i = 0; i < bytes; i += 256)
        for (int k = 0; k < 4; ++k) sums[k] = _mm512_xor_si512(sums[k], _mm512_load_si512(from + i + 64 * k));
    EACH(sum, sums) kept = float(_mm512_cvtsi512_si32(sum));
}

HELD("avx2") void read_avx2(const uint8_t* from, size_t bytes) {
    __m256i sums[8] = {};
    for (size_t i = 0; i < bytes; i += 256)
        for (int k = 0; k < 8; ++k)
            sums[k] = _mm256_xor_si256(sums[k], _mm256_load_si256((const __m256i*)(from + i + 32 * k)));
    EACH(sum, sums) kept = float(_mm256_extract_epi32(sum, 0));
}
#endif

void read_plain(const uint8_t* from, size_t bytes) {
    typedef uint64_t Lanes __attribute__((vector_size(16)));
    Lanes sums[8] = {};
    for (size_t i = 0; i < bytes; i += 128)
        for (int k = 0; k < 8; ++k) sums[k] ^= *reinterpret_cast<const Lanes*>(from + i + 16 * k);
    EACH(sum, sums) kept = float(sum[0]);
}

typedef double (*Loop)(long turns);
typedef void (*Reader)(const uint8_t*, size_t);

#if defined(__x86_64__)
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

#ifdef LEXMILL_ENGINE_AMX
// Linux gives a process the room of the tiles when it asks (Documentation/arch/x86/xstate.rst).
bool has_tiles(int feature) {
    constexpr long kAskForPermission = 0x1023, kTileData = 18;
    unsigned a, b, c, d = 0;
    __get_cpuid_count(7, 0, &a, &b, &c, &d);
#ifdef __linux__
    return (d >> 24 & 1) && (d >> feature & 1) && syscall(SYS_arch_prctl, kAskForPermission, kTileData) == 0;
#else
    return false;
#endif
}
#endif

// The loop of a kind on this processor; null where it lacks the instructions.
Loop find_loop(int kind) {
    __builtin_cpu_init();
    switch (kind) {
        case kFloat32:
            return __builtin_cpu_supports("avx512f") ? float32_avx512 : has_avx2() ? float32_avx2 : float32_plain;
        case kInt8: return has_avx2() ? int8_avx2 : nullptr;
        case kInt8Short: return has_avx2() ? int8_short_avx2 : nullptr;
        case kInt8Vnni: return __builtin_cpu_supports("avx512vnni") ? int8_vnni : nullptr;
        case kBfloat16: return __builtin_cpu_supports("avx512bf16") ? bfloat16_avx512 : nullptr;
#ifdef LEXMILL_ENGINE_AMX
        case kInt8Amx: return has_tiles(25) ? int8_amx : nullptr;
        case kBfloat16Amx: return has_tiles(22) ? bfloat16_amx : nullptr;
#endif
    }
    return nullptr;
}

Reader find_reader() {
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx512f") ? read_avx512 : has_avx2() ? read_avx2 : read_plain;
}
#else
Loop find_loop(int kind) { return kind == kFloat32 ? float32_plain : nullptr; }
Reader find_reader() { return read_plain; }
#endif

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

// Seconds in which `threads` do `work(number)` side by side, from when all are there until the last is done.
template <class Work>
double time_together(int threads, Work work) {
    std::atomic<int> there{0};
    std::vector<double> begun(threads), ended(threads);
    std::vector<std::thread> others;
    auto each = [&](int number) {
        there.fetch_add(1);
        while (there.load() < threads) std::this_thread::yield();
        begun[number] = now();
        work(number);
        ended[number] = now();
    };
    for (int number = 1; number < threads; ++number) others.emplace_back(each, number);
    each(0);
    for (std::thread& other : others) other.join();
    return *std::max_element(ended.begin(), ended.end()) - *std::min_element(begun.begin(), begun.end());
}

double best_products(Loop loop, int threads) {
    long turns = 1000;
    for (double found; (found = time_together(1, [&](int) { loop(turns); })) < kSeconds;)
        turns = long(turns * std::min(10.0, 1.2 * kSeconds / std::max(found, 1e-6)) + 1);
    double best = 0;
    for (int run = 0; run < kRuns; ++run) {
        const double found = time_together(threads, [&](int) { loop(turns); });
        best = std::max(best, threads * double(turns) * loop(0) / found);
    }
    return best;
}

double best_read(size_t bytes, int threads) {
    constexpr size_t kStep = 4096, kHuge = size_t(1) << 21;
    const size_t part = std::max(kStep, bytes / threads / kStep * kStep), all = part * threads;
    auto* data = static_cast<uint8_t*>(std::aligned_alloc(kHuge, (all + kHuge - 1) / kHuge * kHuge));
    if (!data) return 0;
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    madvise(data, all, MADV_HUGEPAGE);
#endif
    time_together(threads, [&](int number) { std::fill_n(data + number * part, part, uint8_t(number)); });
    const Reader read = find_reader();
    const long times = std::max<long>(1, long((size_t(1) << 28) / all));  // at least 256 MiB a run
    double best = 0;
    for (int run = 0; run < kRuns; ++run) {
        const double found = time_together(threads, [&](int number) {
            for (long time = 0; time < times; ++time) read(data + number * part, part);
        });
        best = std::max(best, double(all) * times / found);
    }
    std::free(data);
    return best;
}

}  // namespace
}  // namespace lexmill::engine

// The best rate of a kind with so many threads: bytes a second where `kind` is 0 (`bytes` are read again and
// again), else operations a second. 0 where this processor has no such instructions, or the memory is missing.
EXPORT double lexmill_limit(int kind, int threads, int64_t bytes) {
    using namespace lexmill::engine;
    if (threads < 1 || bytes < 0) return 0;
    try {
        if (kind == kRead) return best_read(size_t(bytes), threads);
        const Loop loop = find_loop(kind);
        return loop ? best_products(loop, threads) : 0;
    } catch (const std::exception&) {  // no memory, no threads
        return 0;
    }
}
