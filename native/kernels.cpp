// Picks the instruction set and spreads rows over threads. Called from Python through ctypes: plain C
// functions over addresses, so that one build serves every Python and needs no headers of it.
//
// Threads are those of the OpenMP that torch has loaded, by the addresses of its functions: a pool of our
// own would fight with torch's waiting threads for the same cores.

#include <algorithm>
#include <vector>

#ifdef LEXMILL_ATTENTION
#include <cpuid.h>
#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

#include "training.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace lexmill {
namespace {

typedef void (*Parallel)(void (*)(void*), void*, unsigned, unsigned);  // GOMP_parallel
typedef int (*Number)();                                               // omp_get_thread_num, …_num_threads
Parallel parallel = nullptr;
Number thread_number = nullptr, thread_count = nullptr;

struct Steps {
    void (*add_norm)(const AddNorm&, long, long);
    void (*add_norm_back)(const AddNormBack&, long, long, float*, float*);
    void (*gated)(const Gated&, long, long);
    void (*gated_back)(const GatedBack&, long, long);
    void (*rotate)(const Rotate&, long, long);
    void (*softmax)(const Softmax&, long, long);
    void (*softmax_back)(const SoftmaxBack&, long, long);
    void (*cross_entropy)(const CrossEntropy&, long, long);
    void (*attention)(const Attention&, long, long);  // null where there is none
    void (*attention_back)(const AttentionBack&, long, long, float*);
    void (*weight_gradient)(const WeightGradient&, long, long);
};

#define LEXMILL_STEPS(isa)                                                                      \
    Steps {                                                                                     \
        isa::add_norm, isa::add_norm_back, isa::gated, isa::gated_back, isa::rotate, isa::softmax, \
            isa::softmax_back, isa::cross_entropy, nullptr, nullptr, nullptr                    \
    }

Steps steps = LEXMILL_STEPS(portable);

// Stretches of [0, count), cut at multiples of `grain`, one for each thread: the cuts depend on `threads`
// only, also where the system gives fewer.
template <class Work>
void spread(long count, long grain, int threads, Work work) {
    struct Shared {
        Work* work;
        long count, each, parts;
    };
    long parts = std::max<long>(1, std::min<long>(threads, (count + grain - 1) / grain));
    long each = ((count + parts - 1) / parts + grain - 1) / grain * grain;
    Shared shared{&work, count, each, parts};
    if (parts == 1 || !parallel) {
        for (long number = 0; number < parts; ++number)
            if (number * each < count) work(number, number * each, std::min(count, (number + 1) * each));
        return;
    }
    parallel(
        [](void* data) {
            Shared& s = *static_cast<Shared*>(data);
            for (long number = thread_number(); number < s.parts; number += thread_count()) {
                long first = number * s.each;
                if (first < s.count) (*s.work)(number, first, std::min(s.count, first + s.each));
            }
        },
        &shared, unsigned(parts), 0);
}

// Linux gives a process the room of AMX's tiles when it asks (Linux, Documentation/arch/x86/xstate.rst).
bool may_use_tiles() {
#if defined(LEXMILL_ATTENTION) && defined(__linux__)
    constexpr long kAskForPermission = 0x1023, kTileData = 18;
    unsigned a, b, c, d = 0;
    __get_cpuid_count(7, 0, &a, &b, &c, &d);
    bool there = (d >> 22 & 1) && (d >> 24 & 1);  // AMX-BF16, AMX-TILE
    return there && syscall(SYS_arch_prctl, kAskForPermission, kTileData) == 0;
#else
    return false;
#endif
}

// The sum of what the threads have put into their own arrays of `count` numbers.
void add_up(const std::vector<float>& sums, long space, int threads, long count, float* to) {
    for (long i = 0; i < count; ++i) {
        float sum = 0;
        for (long number = 0; number < std::max(1, threads); ++number) sum += sums[number * space + i];
        to[i] = sum;
    }
}

long rows_grain(long width) { return std::max<long>(1, 4096 / std::max<long>(1, width)); }

}  // namespace
}  // namespace lexmill

using namespace lexmill;

// Which instruction set is used: 0 portable, 1 AVX2, 2 AVX-512, 3 with its products of bfloat16, 4 AMX; from
// 3 on there is attention, with 4 the gradient of weights. `at_most` holds it down, for tests.
EXPORT int lexmill_begin(void* run, void* number, void* count, int at_most) {
    parallel = reinterpret_cast<Parallel>(run);
    thread_number = reinterpret_cast<Number>(number);
    thread_count = reinterpret_cast<Number>(count);
    steps = LEXMILL_STEPS(portable);
#ifdef LEXMILL_X86
    __builtin_cpu_init();
    bool avx2_there = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    bool avx512_there = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (at_most >= 2 && avx512_there) {
        steps = LEXMILL_STEPS(avx512);
#ifdef LEXMILL_ATTENTION
        if (at_most >= 4 && may_use_tiles()) {
            steps.attention = amx::attention, steps.attention_back = amx::attention_back;
            steps.weight_gradient = amx::weight_gradient;
            return 4;
        }
        if (at_most >= 3 && __builtin_cpu_supports("avx512bf16")) {
            steps.attention = avx512_bf16::attention, steps.attention_back = avx512_bf16::attention_back;
            return 3;
        }
#endif
        return 2;
    }
    if (at_most >= 1 && avx2_there) {
        steps = LEXMILL_STEPS(avx2);
        return 1;
    }
#endif
    return 0;
}

EXPORT void lexmill_add_norm(const AddNorm* a, int threads) {
    spread(a->rows, rows_grain(a->width), threads,
           [a](long, long first, long end) { steps.add_norm(*a, first, end); });
}

EXPORT void lexmill_add_norm_back(const AddNormBack* a, int threads) {
    long space = (a->width + 15) / 16 * 16 + 16;  // threads' sums lie on cache lines of their own
    std::vector<float> weights(size_t(space) * std::max(1, threads), 0.0f), biases(weights.size(), 0.0f);
    spread(a->rows, rows_grain(a->width), threads, [&](long number, long first, long end) {
        steps.add_norm_back(*a, first, end, weights.data() + number * space, biases.data() + number * space);
    });
    add_up(weights, space, threads, a->width, a->to_weight);
    if (a->to_bias) add_up(biases, space, threads, a->width, a->to_bias);
}

EXPORT void lexmill_gated(const Gated* a, int threads) {
    spread(a->count, 4096, threads, [a](long, long first, long end) { steps.gated(*a, first, end); });
}

EXPORT void lexmill_gated_back(const GatedBack* a, int threads) {
    spread(a->count, 4096, threads, [a](long, long first, long end) { steps.gated_back(*a, first, end); });
}

EXPORT void lexmill_rotate(const Rotate* a, int threads) {
    spread(a->batch * a->time, rows_grain(a->heads * a->width), threads,
           [a](long, long first, long end) { steps.rotate(*a, first, end); });
}

EXPORT void lexmill_softmax(const Softmax* a, int threads) {
    spread(a->rows, rows_grain(a->keys), threads,
           [a](long, long first, long end) { steps.softmax(*a, first, end); });
}

EXPORT void lexmill_softmax_back(const SoftmaxBack* a, int threads) {
    spread(a->rows, rows_grain(a->keys), threads,
           [a](long, long first, long end) { steps.softmax_back(*a, first, end); });
}

EXPORT void lexmill_cross_entropy(const CrossEntropy* a, int threads) {
    spread(a->rows, rows_grain(a->vocabulary), threads,
           [a](long, long first, long end) { steps.cross_entropy(*a, first, end); });
}

EXPORT void lexmill_attention(const Attention* a, int threads) {
    spread(a->batch * a->kv_heads, 1, threads,
           [a](long, long first, long end) { steps.attention(*a, first, end); });
}

EXPORT void lexmill_attention_back(const AttentionBack* a, int threads) {
    const Attention& forward = a->forward;
    long count = a->to_bias ? forward.heads * forward.keys * forward.queries : 0;
    std::vector<float> sums(size_t(count) * std::max(1, threads), 0.0f);
    spread(forward.batch * forward.kv_heads, 1, threads, [&](long number, long first, long end) {
        steps.attention_back(*a, first, end, count ? sums.data() + number * count : nullptr);
    });
    if (count) add_up(sums, count, threads, count, a->to_bias);
}

EXPORT void lexmill_weight_gradient(const WeightGradient* a, int threads) {
    spread(std::max(a->outputs, a->inputs), 32, threads,
           [a](long, long first, long end) { steps.weight_gradient(*a, first, end); });
}
