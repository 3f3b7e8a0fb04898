// Walks through a plan. Called from Python through ctypes: plain C functions over addresses, so that one build
// serves every Python. Python has checked all that comes in here.

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

#include <sys/mman.h>

#include "engine.h"
#include "pool.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace lexmill::engine {

namespace portable { extern const Kernels kernels; }
namespace avx2 { extern const Kernels kernels; }
namespace avx512_vnni { extern const Kernels kernels; }
namespace avx512_bf16 { extern const Kernels kernels; }
namespace amx { extern const Kernels kernels; }
namespace neon { extern const Kernels kernels; }

namespace {

// Linux gives a process the room of AMX's tiles when it asks (Documentation/arch/x86/xstate.rst).
#if defined(LEXMILL_ENGINE_AMX)
bool may_use_tiles() {
#if defined(__linux__)
    constexpr long kAskForPermission = 0x1023, kTileData = 18;
    unsigned a, b, c, d = 0;
    __get_cpuid_count(7, 0, &a, &b, &c, &d);
    bool there = (d >> 22 & 1) && (d >> 24 & 1) && (d >> 25 & 1);  // AMX-BF16, AMX-TILE, AMX-INT8
    return there && syscall(SYS_arch_prctl, kAskForPermission, kTileData) == 0;
#else
    return false;
#endif
}
#endif

// 0 portable, 1 AVX2 (or NEON's dot products), 2 AVX-512 VNNI, 3 with bfloat16, 4 with AMX.
const Kernels& find_kernels(int at_most) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    bool vnni = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("f16c");
    bool bf16 = vnni && __builtin_cpu_supports("avx512bf16");
#if defined(LEXMILL_ENGINE_AMX)
    if (at_most >= 4 && bf16 && may_use_tiles()) return amx::kernels;
#endif
    if (at_most >= 3 && bf16) return avx512_bf16::kernels;
    if (at_most >= 2 && vnni) return avx512_vnni::kernels;
    if (at_most >= 1 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
        __builtin_cpu_supports("f16c"))
        return avx2::kernels;
#elif defined(__aarch64__) && defined(__linux__)
    if (at_most >= 1 && (getauxval(AT_HWCAP) >> 20 & 1)) return neon::kernels;  // HWCAP_ASIMDDP
#endif
    return portable::kernels;
}

// Memory that begins on a page, all zeros.
struct Space {
    void* data = nullptr;
    size_t size;
    explicit Space(size_t bytes) : size((std::max<size_t>(bytes, 1) + 4095) / 4096 * 4096) {
        // zeros that take memory only where they are touched
        data = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANON, -1, 0);
        if (data == MAP_FAILED) throw std::bad_alloc();
#if defined(MADV_HUGEPAGE)
        if (size >= size_t(4) << 20) madvise(data, size, MADV_HUGEPAGE);
#endif
    }
    ~Space() { munmap(data, size); }
    Space(const Space&) = delete;
    Space& operator=(const Space&) = delete;
    template <class T>
    T* as() const { return static_cast<T*>(data); }
};

}  // namespace

struct Plan {  // as Python lays it out
    int64_t matrices, vectors, buffers, operations[2], slots, pages, most_tokens, most_keys;
    Shape shape;
    const Matrix* matrix;
    const float* const* vector;
    const int64_t* vector_size;
    const int64_t* buffer_width;
    const Operation* operation[2];  // reading a text (encoders), and writing one
};

namespace {

struct Counter {
    alignas(64) std::atomic<long> next{0};
};

struct Run {  // tokens [first, end) of one sequence
    long first, end, pages, tiles;  // `tiles`: where its pages begin in the tiles of the batch
};

struct Own {  // what a thread has for itself
    std::unique_ptr<Space> row, scratch, sums, inputs;
};

class Engine {
  public:
    Engine(const Plan& plan, int threads, int at_most)
        : kernels_(find_kernels(at_most)), pool_(threads), shape_(plan.shape), most_tokens_(plan.most_tokens) {
        matrices_.assign(plan.matrix, plan.matrix + plan.matrices);
        vectors_.assign(plan.vector, plan.vector + plan.vectors);
        sizes_.assign(plan.vector_size, plan.vector_size + plan.vectors);
        for (int i = 0; i < 2; ++i) programs_[i].assign(plan.operation[i], plan.operation[i] + plan.operations[i]);
        for (int64_t i = 0; i < plan.buffers; ++i) {
            widths_.push_back(padded(plan.buffer_width[i]));
            // whole tiles of tokens are read
            buffers_.emplace_back(new Space(sizeof(float) * size_t(widths_.back() * (most_tokens_ + 32))));
        }
        long columns = kBlock;
        for (const Matrix& m : matrices_) columns = std::max(columns, padded(m.columns));
        shared_space_.reset(new Space(inputs_size(columns, most_tokens_ + 32)));
        const long keys = (plan.most_keys + kPage) / kPage * kPage + kLanes, wide = shape_.padded_width();
        for (int i = 0; i < pool_.threads(); ++i) {
            Own own;
            own.row.reset(new Space(sizeof(float) * size_t(columns)));
            // scores and shares of 16 queries; the queries in two parts, and what they find
            const size_t attention = size_t(16 * keys) * (4 + 2) + size_t(16 * wide) * (2 * 2 + 4);
            own.scratch.reset(new Space(std::max(size_t(columns) * 64 + 4096, attention)));
            own.sums.reset(new Space(sizeof(float) * size_t(2 * kStrip * (most_tokens_ + 32))));
            own.inputs.reset(new Space(inputs_size(columns, 32)));
            threads_.push_back(std::move(own));
        }
        const long number = shape_.exact_pages ? 4 : 2;
        page_bytes_ = size_t(shape_.kv_heads * shape_.head_width * kPage * number);
        for (int64_t i = 0; i < 2 * plan.slots; ++i) pages_.emplace_back(new Space(page_bytes_ * size_t(plan.pages)));
        counters_.reset(new Counter[4 * std::max(programs_[0].size(), programs_[1].size()) + 4]);
    }

    void run(int program, const Batch& batch, float* out) {
        batch_ = &batch, out_ = out;
        const std::vector<Operation>& operations = programs_[program];
        for (size_t i = 0; i < 4 * operations.size(); ++i) counters_[i].next.store(0, std::memory_order_relaxed);
        find_runs();
        auto work = [&](int number) {
            kernels_.begin(batch.prompt);
            for (size_t i = 0; i < operations.size(); ++i) {
                step(operations[i], number, &counters_[4 * i]);
                pool_.meet();
            }
        };
        pool_.run(work);
    }

    void read(int buffer, long rows, long width, float* out) const {
        for (long r = 0; r < rows; ++r)
            std::memcpy(out + r * width, buffers_[size_t(buffer)]->as<float>() + r * widths_[size_t(buffer)],
                        sizeof(float) * size_t(width));
    }

    void copy_page(long from, long to) {
        for (auto& space : pages_)
            std::memcpy(space->as<char>() + page_bytes_ * size_t(to), space->as<char>() + page_bytes_ * size_t(from),
                        page_bytes_);
    }

  private:
    static size_t inputs_size(long columns, long rows) { return size_t(rows) * size_t(columns) * 10 + 4096 * 8; }

    // The forms of `rows` rows laid out in a space; only those asked for are written.
    static Inputs lay_out(const Space& space, long columns, long rows) {
        Inputs in;
        char* at = space.as<char>();
        auto take = [&](long bytes) {
            char* here = at;
            at += (bytes + 63) / 64 * 64;
            return here;
        };
        in.columns = columns;
        in.scales = reinterpret_cast<float*>(take(rows * columns / kBlock * 4));
        in.sums = reinterpret_cast<int32_t*>(take(rows * columns / kBlock * 4));
        in.bytes = reinterpret_cast<int8_t*>(take(rows * columns));
        in.pairs = reinterpret_cast<uint16_t*>(take(rows * columns * 2));
        in.tiles = reinterpret_cast<uint16_t*>(take(rows * columns * 2));
        in.floats = reinterpret_cast<float*>(take(rows * columns * 4));
        return in;
    }

    // Pieces of [0, count), handed out as threads come.
    template <class Work>
    void share(Counter& counter, long count, long grain, Work work) {
        for (;;) {
            long first = counter.next.fetch_add(grain, std::memory_order_relaxed);
            if (first >= count) return;
            work(first, std::min(count, first + grain));
        }
    }

    float* buffer(int64_t number, long row) const {
        return buffers_[size_t(number)]->as<float>() + row * widths_[size_t(number)];
    }
    const float* vector(int64_t number) const { return number < 0 ? nullptr : vectors_[size_t(number)]; }

    void find_runs() {
        runs_.clear();
        long pages = 0;
        for (long t = 0; t < batch_->tokens;) {
            long end = t + 1;
            while (end < batch_->tokens && batch_->row[end] == batch_->row[t]) ++end;
            const long row = batch_->row[t];
            const long keys = std::max<long>(batch_->positions[end - 1] + 1, batch_->lengths ? batch_->lengths[row] : 0);
            const long memory = batch_->memory_lengths ? batch_->memory_lengths[row] : 0;
            const long count = (std::max(keys, memory) + kPage - 1) / kPage;
            runs_.push_back({t, end, count, pages});
            pages += count;
            t = end;
        }
        if (!tiled()) return;
        const size_t bytes = size_t(pages * shape_.kv_heads * shape_.page_tiles()) * sizeof(uint16_t);
        if (!tiles_ || tiles_size_ < bytes) tiles_.reset(new Space(bytes)), tiles_size_ = bytes;
    }

    void step(const Operation& o, int number, Counter* counters) {
        const Batch& batch = *batch_;
        const long rows = o.wanted ? batch.wanted : batch.tokens;
        if (!rows) return;  // a chunk of a prompt that nobody asks anything of
        switch (o.kind) {
            case kEmbed:
                return share(counters[0], rows, 8, [&](long first, long end) {
                    for (long t = first; t < end; ++t) embed(o, t);
                });
            case kNorm:
                return share(counters[0], rows, 8, [&](long first, long end) {
                    for (long t = first; t < end; ++t) {
                        float* x = buffer(o.to, t);
                        kernels_.norm(x, vector(o.norm), vector(o.norm_bias), o.centred, float(o.epsilon),
                                      sizes_[size_t(o.norm)], x);
                    }
                });
            case kLinear: return linear(o, rows, number, counters);
            case kStore: return store(o, counters[0]);
            case kAttend: return attend(o, number, counters);
        }
    }

    void embed(const Operation& o, long t) {
        float* x = buffer(o.to, t);
        const int32_t at[3] = {batch_->ids[t], batch_->positions[t], batch_->segments ? batch_->segments[t] : 0};
        for (int i = 0; i < 3; ++i)
            if (o.matrices[i] >= 0) kernels_.row(matrices_[size_t(o.matrices[i])], at[i], x, i > 0);
    }

    // What products read of one row: normed, scaled, padded with zeros.
    void prepare(const Operation& o, long row, long columns, int forms, int number, const Inputs& inputs) {
        const long from = o.wanted ? batch_->wanted_tokens[row] : row;
        const float* x = buffer(o.from, from);
        float* own = threads_[size_t(number)].row->as<float>();
        const long whole = padded(columns);
        if (o.norm >= 0 || o.scale != 1.0 || whole != columns) {
            if (o.norm >= 0)
                kernels_.norm(x, vector(o.norm), vector(o.norm_bias), o.centred, float(o.epsilon), columns, own);
            else
                std::memcpy(own, x, sizeof(float) * size_t(columns));
            if (o.scale != 1.0)
                for (long i = 0; i < columns; ++i) own[i] *= float(o.scale);
            for (long i = columns; i < whole; ++i) own[i] = 0.0f;
            x = own;
        }
        kernels_.prepare(x, columns, forms, row, inputs);
    }

    void linear(const Operation& o, long rows, int number, Counter* counters) {
        Own& own = threads_[size_t(number)];
        const bool prompt = batch_->prompt != 0;
        const Matrix* parts[3];
        long count = 0, strips = 0, starts[3];
        int forms = 0;
        for (int64_t index : o.matrices) {
            if (index < 0) continue;
            const Matrix& m = matrices_[size_t(index)];
            forms |= kernels_.form(m.type, prompt);
            starts[count] = strips;
            if (!o.gated || count == 0) strips += m.strips();
            parts[count++] = &m;
        }
        const long columns = parts[0]->columns;
        Inputs inputs;
        if (rows == 1 && !(forms & kTiles)) {  // faster alone than to wait for another
            inputs = lay_out(*own.inputs, padded(columns), 1);
            prepare(o, 0, columns, forms, number, inputs);
        } else {
            inputs = lay_out(*shared_space_, padded(columns), (rows + 31) / 32 * 32);
            share(counters[0], rows, 4, [&](long first, long end) {
                for (long r = first; r < end; ++r) prepare(o, r, columns, forms, number, inputs);
            });
            pool_.meet();
        }
        const long threads = pool_.threads();
        long chunk = rows;  // tokens of a piece: all, unless strips are too few to go round
        if (strips < 4 * threads && rows > 64) chunk = std::max<long>(32, (rows / 4 + 31) / 32 * 32);
        const long chunks = (rows + chunk - 1) / chunk;
        const long grain = rows > 8 ? 1 : std::max<long>(1, strips / (8 * threads));
        share(counters[1], strips * chunks, grain, [&](long first, long end) {
            for (long piece = first; piece < end; ++piece) {
                const long strip = piece / chunks, row = piece % chunks * chunk, some = std::min(chunk, rows - row);
                strip_of(o, parts, starts, count, strip, row, some, inputs, own);
            }
        });
    }

    void strip_of(const Operation& o, const Matrix* const* parts, const long* starts, long count, long strip, long row,
                  long rows, const Inputs& inputs, Own& own) {
        const bool prompt = batch_->prompt != 0;
        float *sums = own.sums->as<float>(), *times = nullptr;
        long part = 0, offset = 0;
        if (!o.gated)
            while (part + 1 < count && strip >= starts[part + 1]) offset += parts[part++]->rows;
        const Matrix& m = *parts[part];
        const long inside = strip - (o.gated ? 0 : starts[part]), at = inside * kStrip;
        const long outputs = std::min(kStrip, long(m.rows) - at);
        uint8_t* scratch = own.scratch->as<uint8_t>();
        kernels_.strip(m, inside, inputs, row, rows, prompt, sums, scratch);
        if (o.biases[part] >= 0) kernels_.add_bias(sums, rows, vector(o.biases[part]) + at, outputs);
        if (o.gated) {
            times = sums + (rows + 31) / 32 * 32 * kStrip;
            kernels_.strip(*parts[1], inside, inputs, row, rows, prompt, times, scratch);
            if (o.biases[1] >= 0) kernels_.add_bias(times, rows, vector(o.biases[1]) + at, outputs);
        }
        if (o.activation != kNone) kernels_.activate(o.activation, sums, times, rows * kStrip);
        const long width = o.to < 0 ? m.rows : widths_[size_t(o.to)];
        float* to = (o.to < 0 ? out_ : buffer(o.to, 0)) + offset + at + row * width;
        kernels_.put(sums, rows, outputs, o.add, to, width);
    }

    Pages pages_of(int64_t slot) const {
        return {pages_[2 * size_t(slot)]->data, pages_[2 * size_t(slot) + 1]->data};
    }

    void store(const Operation& o, Counter& counter) {
        Store s{};
        s.shape = &shape_, s.operation = &o, s.batch = batch_, s.pages = pages_of(o.slot);
        s.from = buffer(o.from, 0), s.width = widths_[size_t(o.from)];
        if (o.rotary >= 0) s.cosines = vector(o.rotary), s.sines = vector(o.rotary + 1);
        s.query_norm = vector(o.query_norm), s.key_norm = vector(o.key_norm);
        // tokens of a page by one thread: numbers of a key lie beside those of its neighbours, in one line of a cache
        share(counter, batch_->tokens, batch_->prompt ? kPage : 4, [&](long first, long end) {
            for (long t = first; t < end; ++t) kernels_.store(s, t);
        });
    }

    void attend(const Operation& o, int number, Counter* counters) {
        Attention a{};
        a.shape = &shape_, a.operation = &o, a.batch = batch_, a.pages = pages_of(o.slot);
        a.queries = buffer(o.from, 0), a.queries_width = widths_[size_t(o.from)];
        a.out = buffer(o.to, 0), a.out_width = widths_[size_t(o.to)];
        a.bias = vector(o.bias);
        if (a.bias) a.reach = (sizes_[size_t(o.bias)] / shape_.heads - 1) / 2;
        float* scratch = threads_[size_t(number)].scratch->as<float>();
        const long heads = shape_.kv_heads;
        const long page = shape_.page_tiles();
        uint16_t* tiles = tiled() ? tiles_->as<uint16_t>() : nullptr;
        if (tiles) {
            const int32_t* tables = o.memory ? batch_->memory_tables : batch_->tables;
            const long table = o.memory ? batch_->memory_pages : batch_->pages;
            auto pages_of_run = [&](const Run& run) { return pages_seen(o, run) * heads; };
            share(counters[0], count_of(pages_of_run), 4, [&](long first, long end) {
                for (long item = first; item < end; ++item) {
                    long rest = item;
                    const Run& run = find(rest, pages_of_run);
                    const long head = rest % heads, p = rest / heads, row = batch_->row[run.first];
                    kernels_.page_to_tiles(a, tables[row * table + p], head,
                                           tiles + (run.tiles * heads + head * run.pages + p) * page);
                }
            });
            pool_.meet();
        }
        const long group = shape_.heads / heads;
        auto pieces_of = [&](const Run& run) { return ((run.end - run.first) * group + kTogether - 1) / kTogether; };
        share(counters[1], count_of([&](const Run& run) { return pieces_of(run) * heads; }), 1, [&](long item, long) {
            const Run& run = find(item, [&](const Run& run) { return pieces_of(run) * heads; });
            // the last queries of a text look at most keys: they come first
            const long head = item % heads, begin = (pieces_of(run) - 1 - item / heads) * kTogether;
            const long count = std::min(kTogether, (run.end - run.first) * group - begin);
            kernels_.attend(a, run.first, count, head, begin,
                            tiles ? tiles + (run.tiles * heads + head * run.pages) * page : nullptr, scratch);
        });
    }

    // Whether attention is computed by products of matrices.
    bool tiled() const { return kernels_.page_to_tiles && batch_->prompt && shape_.parts; }

    template <class Count>
    long count_of(Count count) const {
        long all = 0;
        for (const Run& run : runs_) all += count(run);
        return all;
    }

    // The run that piece `item` of all belongs to; `item` becomes its number there.
    template <class Count>
    const Run& find(long& item, Count count) const {
        size_t i = 0;
        for (; item >= count(runs_[i]); ++i) item -= count(runs_[i]);
        return runs_[i];
    }

    long pages_seen(const Operation& o, const Run& run) const {
        const long row = batch_->row[run.first];
        const long keys = o.memory ? batch_->memory_lengths[row]
                          : o.causal ? batch_->positions[run.end - 1] + 1 : batch_->lengths[row];
        return (keys + kPage - 1) / kPage;
    }

    const Kernels& kernels_;
    Pool pool_;
    Shape shape_;
    long most_tokens_;
    std::vector<Matrix> matrices_;
    std::vector<const float*> vectors_;
    std::vector<int64_t> sizes_;
    std::vector<long> widths_;
    std::vector<std::unique_ptr<Space>> buffers_, pages_;
    std::vector<Operation> programs_[2];
    std::unique_ptr<Space> shared_space_, tiles_;
    size_t tiles_size_ = 0, page_bytes_ = 0;
    std::vector<Own> threads_;
    std::unique_ptr<Counter[]> counters_;
    std::vector<Run> runs_;
    const Batch* batch_ = nullptr;
    float* out_ = nullptr;
};

}  // namespace
}  // namespace lexmill::engine

using namespace lexmill::engine;

// The engine, or null where there is not enough memory. `at_most`: the instruction set, held down for tests.
EXPORT void* lexmill_engine_open(const Plan* plan, int threads, int at_most) {
    try {
        return new Engine(*plan, threads, at_most);
    } catch (const std::bad_alloc&) {
        return nullptr;
    }
}

// Program 0 reads texts, 1 writes them; `out`: (wanted, rows of the last matrix) where the last operation writes there.
EXPORT int lexmill_engine_run(void* engine, int program, const Batch* batch, float* out) {
    try {
        static_cast<Engine*>(engine)->run(program, *batch, out);
        return 0;
    } catch (const std::bad_alloc&) {
        return 1;
    }
}

EXPORT void lexmill_engine_read(void* engine, int buffer, int64_t rows, int64_t width, float* out) {
    static_cast<Engine*>(engine)->read(buffer, rows, width, out);
}

EXPORT void lexmill_engine_copy_page(void* engine, int64_t from, int64_t to) {
    static_cast<Engine*>(engine)->copy_page(from, to);
}

EXPORT void lexmill_engine_close(void* engine) { delete static_cast<Engine*>(engine); }

EXPORT const char* lexmill_engine_instruction_set(int at_most) { return find_kernels(at_most).name; }