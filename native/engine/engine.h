// What the parts of the inference engine share: packed matrices, the plan, a batch, and the steps that are
// compiled once for each instruction set.
//
// A plan is a list of operations over numbered buffers, each (tokens, width) in float32. All threads walk through
// it side by side and meet behind each operation. Numbers that a token gives do not depend on what else is in the
// batch: every sum runs over columns or keys in an order of its own row.

#pragma once

#include <cstddef>
#include <cstdint>

namespace lexmill::engine {

constexpr long kLanes = 16;  // rows of a matrix that a vector holds
constexpr long kStrip = 32;  // rows that one piece of work computes
constexpr long kBlock = 32;  // columns that share a scale
constexpr long kPage = 32;   // tokens whose keys and values lie together
constexpr long kTogether = 16;  // queries that one piece of work computes

// Columns with those that fill the last block.
static inline long padded(long columns) { return (columns + kBlock - 1) / kBlock * kBlock; }

enum WeightType : int64_t { kFloat32, kFloat16, kBfloat16, kEightBits, kFourBits };

// Sixteen rows lie side by side, column behind column, padded with zeros to whole strips and blocks:
//   kFloat32, kFloat16   a column of sixteen rows after the other
//   kBfloat16            two columns of a row side by side, so that one instruction takes both
//   kEightBits           four columns of a row side by side; byte q is scale (q − 128), with minima scale q + least
//   kFourBits            the same in halves of bytes, columns 0–15 of a block low, 16–31 high; 8 in place of 128
// Scales and minima are float16, sixteen for each block of columns.
struct Matrix {
    int64_t type, rows, columns;
    const uint8_t* values;
    const uint16_t* scales;
    const uint16_t* minima;

    long strips() const { return (rows + kStrip - 1) / kStrip; }
    long blocks() const { return (columns + kBlock - 1) / kBlock; }
};

enum OperationKind : int64_t { kEmbed, kNorm, kLinear, kStore, kAttend };
enum Activation : int64_t { kNone, kSilu, kGelu, kGeluTanh, kRelu };

struct Operation {
    int64_t kind, from, to;       // buffers
    int64_t matrices[3];          // kLinear: results side by side; kEmbed: tokens, positions, segments; −1: none
    int64_t biases[3];            // vectors
    int64_t norm, norm_bias;      // kLinear: of what comes in; kNorm: of the buffer, in place
    int64_t centred;              // layer norm, else RMS norm
    int64_t activation, gated;    // gated: activation(first matrix) × second
    int64_t add;                  // to what the buffer holds
    int64_t wanted;               // only the wanted tokens: row i of what comes out is wanted token i
    int64_t slot;                 // kStore, kAttend: whose keys and values
    int64_t memory;               // … of the other text
    int64_t queries;              // kStore: whether `from` begins with queries, which are turned in place
    int64_t rotary;               // table of cosines and sines, −1: none
    int64_t query_norm, key_norm; // vectors, or −1
    int64_t causal, window, bias; // window: half of it to each side; bias: table by head and distance, or −1
    double epsilon, scale;        // scale: of scores, or of what goes into a linear layer
};

struct Batch {
    int64_t tokens, wanted, rows, pages, memory_pages, prompt;
    const int32_t *ids, *positions, *segments, *row, *tables, *wanted_tokens;
    const int32_t* lengths;  // (rows): keys that may be looked at where order does not matter
    const int32_t *memory_tables, *memory_lengths;
};

struct Shape {
    int64_t heads, kv_heads, head_width;
    int64_t exact_pages;  // keys and values in float32, else float16
    int64_t parts;        // attention of prompts: a query and a key as the sum of so many bfloat16; 0: as they are

    long padded_width() const { return padded(head_width); }
    long page_tiles() const { return (parts + 1) * padded_width() * kPage; }  // numbers in a page of `page_to_tiles`
};

// What products read: the same rows in the forms that a matrix's type asks for.
enum Form : int { kNoForm = 0, kBytes = 1, kPairs = 2, kTiles = 4, kFloats = 8 };

struct Inputs {
    long columns;     // padded to whole blocks
    int8_t* bytes;    // (rows, columns), with a scale and a sum for each block
    float* scales;    // (rows, blocks)
    int32_t* sums;    // (rows, blocks)
    uint16_t* pairs;  // (rows, columns) bfloat16
    uint16_t* tiles;  // (rows / 16, blocks, 16, 32) bfloat16
    float* floats;    // (rows, columns)
};

struct Pages {
    void *keys, *values;  // (pages, kv_heads, head_width, kPage) and (pages, kv_heads, kPage, head_width)
};

struct Attention {
    const Shape* shape;
    const Operation* operation;
    const Batch* batch;
    Pages pages;
    const float* queries;  // (tokens, queries_width)
    long queries_width;
    float* out;            // (tokens, heads × head_width)
    long out_width;
    const float* bias;     // (heads, 2 reach + 1), by key minus query, cut off at the reach
    long reach;
};

struct Store {
    const Shape* shape;
    const Operation* operation;
    const Batch* batch;
    Pages pages;
    float* from;  // (tokens, width): queries if there are any, keys, values
    long width;
    const float *cosines, *sines;  // (context, head_width / 2)
    const float *query_norm, *key_norm;
};

// One table for each instruction set; rows and items are pieces of work for one thread.
struct Kernels {
    const char* name;
    int (*form)(int64_t type, bool prompt);
    void (*begin)(bool prompt);  // in each thread, before a run
    void (*norm)(const float* x, const float* weight, const float* bias, bool centred, float epsilon, long width,
                 float* out);
    void (*prepare)(const float* x, long width, int forms, long row, const Inputs& inputs);
    // (tokens, kStrip) products of rows [first, first + tokens) with a strip of a matrix
    void (*strip)(const Matrix& matrix, long strip, const Inputs& inputs, long first, long tokens, bool prompt,
                  float* out, uint8_t* scratch);
    // Rows of kStrip sums, of which `outputs` count: a bias added; put where they belong, or added to what is there.
    void (*add_bias)(float* sums, long rows, const float* bias, long outputs);
    void (*put)(const float* sums, long rows, long outputs, bool add, float* to, long width);
    void (*activate)(int64_t activation, float* x, const float* times, long count);
    void (*row)(const Matrix& matrix, long row, float* out, bool add);  // a row in float32
    void (*store)(const Store& store, long token);
    // Queries [begin, begin + count) of one sequence and one head of keys: number q is what its token first + q / group
    // asks in the q % group th of the heads that share these keys. `tiles`: its pages from `page_to_tiles`, or null.
    void (*attend)(const Attention& attention, long first, long count, long kv_head, long begin, const uint16_t* tiles,
                   float* scratch);
    // For prompts, where there is it: keys and values of a page as products of matrices read them.
    void (*page_to_tiles)(const Attention& attention, long page, long kv_head, uint16_t* out);
};

}  // namespace lexmill::engine
