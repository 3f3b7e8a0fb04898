// A small random decoder through the engine's plain C functions: alone and in company, in pieces and whole, in several
// threads and by every instruction set. Built with sanitizers and for other processors by tests/unit/test_engine_native.py.

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "../../native/engine/engine.h"

using namespace lexmill::engine;

namespace lexmill::engine {
struct Plan {  // as in engine.cpp
    int64_t matrices, vectors, buffers, operations[2], slots, pages, most_tokens, most_keys;
    Shape shape;
    const Matrix* matrix;
    const float* const* vector;
    const int64_t* vector_size;
    const int64_t* buffer_width;
    const Operation* operation[2];
};
}  // namespace lexmill::engine

extern "C" {
void* lexmill_engine_open(const Plan*, int threads, int at_most);
int lexmill_engine_run(void*, int program, const Batch*, float* out);
void lexmill_engine_close(void*);
void lexmill_engine_copy_page(void*, int64_t from, int64_t to);
const char* lexmill_engine_instruction_set(int at_most);
void lexmill_engine_pack(const Matrix*, int source, const uint8_t*, const int32_t*, uint8_t*, uint16_t*, uint16_t*, int);
}

namespace {

constexpr long kWidth = 72, kHeads = 3, kHeadWidth = 24, kInner = 80, kVocabulary = 50, kLayers = 2, kContext = 96;
constexpr int kF32 = 0;
std::mt19937 generator(7);

float random_number() { return std::normal_distribution<float>(0, 0.2f)(generator); }

struct Model {
    std::vector<Matrix> matrices;
    std::vector<std::vector<uint8_t>> space;
    std::vector<std::vector<float>> vectors;
    std::vector<Operation> operations;
    std::vector<int64_t> buffers{kWidth, 3 * kHeads * kHeadWidth, kHeads * kHeadWidth, kInner};

    int64_t matrix(long rows, long columns, int64_t type) {
        std::vector<float> numbers(size_t(rows * columns));
        for (float& x : numbers) x = random_number();
        Matrix m{type, rows, columns, nullptr, nullptr, nullptr};
        const long blocks = 2 * m.strips() * m.blocks();
        const long bytes = blocks * (type == kFloat32 ? 2048 : type == kEightBits ? 512 : 1024);
        space.emplace_back(size_t(bytes) + size_t(blocks * 32));
        uint8_t* values = space.back().data();
        auto* scales = reinterpret_cast<uint16_t*>(values + bytes);
        const auto* data = reinterpret_cast<const uint8_t*>(numbers.data());
        std::vector<uint16_t> halves;
        int source = kF32;
        if (type == kBfloat16) {
            for (float x : numbers) {
                uint32_t word;
                std::memcpy(&word, &x, 4);
                halves.push_back(uint16_t(word >> 16));
            }
            data = reinterpret_cast<const uint8_t*>(halves.data()), source = 30;
        }
        lexmill_engine_pack(&m, source, data, nullptr, values, type == kEightBits ? scales : nullptr, nullptr, 2);
        m.values = values;
        if (type == kEightBits) m.scales = scales;
        matrices.push_back(m);
        return int64_t(matrices.size()) - 1;
    }

    int64_t vector(long count, float mean, float spread) {
        vectors.emplace_back();
        for (long i = 0; i < count; ++i) vectors.back().push_back(mean + spread * random_number());
        return int64_t(vectors.size()) - 1;
    }

    static Operation operation(OperationKind kind) {
        Operation o;
        std::memset(&o, 0, sizeof o);
        o.kind = kind, o.norm = o.norm_bias = o.rotary = o.query_norm = o.key_norm = o.bias = o.from = o.to = -1;
        for (int i = 0; i < 3; ++i) o.matrices[i] = o.biases[i] = -1;
        o.epsilon = 1e-5, o.scale = 1;
        return o;
    }

    explicit Model(int64_t type) {
        const int64_t embed = matrix(kVocabulary, kWidth, type);
        vector(kContext * kHeadWidth / 2, 0, 1), vector(kContext * kHeadWidth / 2, 0, 1);
        Operation o = operation(kEmbed);
        o.to = 0, o.matrices[0] = embed;
        operations.push_back(o);
        for (long layer = 0; layer < kLayers; ++layer) {
            o = operation(kLinear);
            o.from = 0, o.to = 1, o.norm = vector(kWidth, 1, 0.1f);
            for (int64_t& each : o.matrices) each = matrix(kHeads * kHeadWidth, kWidth, type);
            o.biases[1] = vector(kHeads * kHeadWidth, 0, 1);
            operations.push_back(o);
            o = operation(kStore);
            o.from = 1, o.slot = layer, o.queries = 1, o.rotary = 0;
            operations.push_back(o);
            o = operation(kAttend);
            o.from = 1, o.to = 2, o.slot = layer, o.causal = 1, o.scale = 0.2;
            operations.push_back(o);
            o = operation(kLinear);
            o.from = 2, o.to = 0, o.add = 1, o.matrices[0] = matrix(kWidth, kHeads * kHeadWidth, type);
            operations.push_back(o);
            o = operation(kLinear);
            o.from = 0, o.to = 3, o.norm = vector(kWidth, 1, 0.1f), o.gated = 1, o.activation = kSilu;
            o.matrices[0] = matrix(kInner, kWidth, type), o.matrices[1] = matrix(kInner, kWidth, type);
            operations.push_back(o);
            o = operation(kLinear);
            o.from = 3, o.to = 0, o.add = 1, o.matrices[0] = matrix(kWidth, kInner, type);
            operations.push_back(o);
        }
        o = operation(kLinear);
        o.from = 0, o.norm = vector(kWidth, 1, 0.1f), o.wanted = 1, o.matrices[0] = embed;
        operations.push_back(o);
    }

    void* open(int threads, int at_most) const {
        std::vector<const float*> addresses;
        std::vector<int64_t> sizes;
        for (const auto& each : vectors) addresses.push_back(each.data()), sizes.push_back(int64_t(each.size()));
        Plan plan{};
        plan.matrices = int64_t(matrices.size()), plan.vectors = int64_t(vectors.size());
        plan.buffers = int64_t(buffers.size()), plan.operations[1] = int64_t(operations.size());
        plan.slots = kLayers, plan.pages = 12, plan.most_tokens = 128, plan.most_keys = kContext;
        const bool exact = matrices[0].type == kFloat32;
        plan.shape = {kHeads, kHeads, kHeadWidth, exact, exact ? 0 : matrices[0].type == kBfloat16 ? 2 : 1};
        plan.matrix = matrices.data(), plan.vector = addresses.data(), plan.vector_size = sizes.data();
        plan.buffer_width = buffers.data(), plan.operation[1] = operations.data();
        return lexmill_engine_open(&plan, threads, at_most);
    }
};

using Logits = std::vector<float>;

// Two texts of 70 and 20 tokens, read in pieces that end at `cuts`, side by side or one after the other.
Logits read(void* engine, bool prompt, const std::vector<int>& cuts, bool together) {
    const int lengths[2] = {70, 20};
    Logits out(90 * kVocabulary);
    int32_t tables[6] = {5, 1, 7, 2, 9, 3};
    int start = 0;
    for (int end : cuts) {
        std::vector<int32_t> ids, positions, row, wanted;
        std::vector<int> place;
        for (int text = 0; text < 2; ++text) {
            for (int t = start; t < std::min(end, lengths[text]); ++t) {
                ids.push_back((13 * t + 5 * text + 1) % kVocabulary), positions.push_back(t), row.push_back(text);
                place.push_back(text * 70 + t), wanted.push_back(int32_t(wanted.size()));
            }
            if (ids.empty() || (together && text == 0)) continue;
            Logits found(ids.size() * kVocabulary);
            Batch b{};
            b.tokens = b.wanted = int64_t(ids.size()), b.rows = 2, b.pages = 3, b.prompt = prompt;
            b.ids = ids.data(), b.positions = positions.data(), b.row = row.data(), b.tables = tables;
            b.wanted_tokens = wanted.data();
            if (lexmill_engine_run(engine, 1, &b, found.data())) std::exit(2);
            for (size_t i = 0; i < place.size(); ++i)
                std::memcpy(&out[size_t(place[i]) * kVocabulary], &found[i * kVocabulary], kVocabulary * sizeof(float));
            ids.clear(), positions.clear(), row.clear(), wanted.clear(), place.clear();
        }
        start = end;
    }
    return out;
}

float furthest(const Logits& one, const Logits& other) {
    float most = 0;
    for (size_t i = 0; i < one.size(); ++i) {
        if (!std::isfinite(one[i])) return INFINITY;
        most = std::max(most, std::fabs(one[i] - other[i]));
    }
    return most;
}

}  // namespace

int main() {
    int failed = 0;
    for (int64_t type : {kFloat32, kBfloat16, kEightBits}) {
        const Model model(type);
        // what is multiplied is rounded: to bfloat16, or to 8 bits on one side and to bfloat16 on the other
        const float bound = type == kFloat32 ? 1e-4f : type == kBfloat16 ? 0.15f : 0.5f;
        void* plain = model.open(1, 0);
        const Logits expected = read(plain, false, {70}, false);
        lexmill_engine_close(plain);
        for (int at_most = 0; at_most <= 4; ++at_most)
            for (bool prompt : {false, true}) {
                Logits first;
                for (int threads : {1, 3}) {
                    void* engine = model.open(threads, at_most);
                    for (bool together : {false, true})
                        for (const auto& cuts : {std::vector<int>{70}, {1, 2, 33, 70}, {32, 64, 70}}) {
                            const Logits found = read(engine, prompt, cuts, together);
                            if (first.empty()) first = found;
                            if (std::memcmp(found.data(), first.data(), found.size() * sizeof(float)) ||
                                furthest(found, expected) > bound) {
                                ++failed;
                                std::printf("type %d, %s, prompt %d, threads %d, together %d, %zu pieces: off by %g\n",
                                            int(type), lexmill_engine_instruction_set(at_most), prompt, threads,
                                            together, cuts.size(), double(furthest(found, first)));
                            }
                        }
                    lexmill_engine_copy_page(engine, 1, 4);
                    lexmill_engine_close(engine);
                }
                std::printf("type %d, %s, prompt %d: off by %g\n", int(type), lexmill_engine_instruction_set(at_most),
                            prompt, double(furthest(first, expected)));
            }
    }
    std::printf(failed ? "%d failed\n" : "passed\n", failed);
    return failed != 0;
}
