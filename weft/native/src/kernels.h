// What the kernels of one instruction set offer: plain functions over raw memory, each called by every thread of the pool
// with its share's number.  No function allocates, throws or keeps state.
//
// Legend.  T: rows of a batch.  K: input width of a product.  N: its output width.  D: head_dim.
// A *panel* is PANEL outputs of a weight, all of K, stored so that one 64-byte line holds the same few inputs of all of them:
//     F32   [N / 16][K][16]             BF16  [N / 16][K / 2][16][2]
//     I8    [N / 16][K / 4][16][4]      I4    [N / 16][K / 8][16][8]
// Whole numbers are unsigned; behind the lines of a panel stand its scales, and its offsets where it has them: weight =
// scale * value + offset, without offsets scale * (value - half).  A group of inputs has them as float16 ([groups][16], both
// side by side), a whole row as float32.  Nested scales are whole multiples of one for the row: float32 [16], then signed bytes
// [groups][16], at most 15, so that 4 bits times such a multiple are 8.  In a word of I4, nibble 2 i is input i and nibble 2 i + 1 is input 4 + i.
// An output is one chain of additions over K in ascending order, so its bits do not depend on the rows beside it.
#pragma once

#include <cstddef>
#include <cstdint>

// Code that files of several instruction sets share must not exist out of line: the linker would keep one of the copies, and it
// could hold instructions that this processor lacks.
#define WEFT_SHARED inline __attribute__((always_inline))

namespace weft {

inline constexpr int PANEL = 16;
inline constexpr int LINE_BYTES = 64;
// Floats: inputs of a block of rows, and a vector beyond them; sums of groups.
inline constexpr int64_t INPUTS_SCRATCH = 192 * 2048 + 16, SUMS_SCRATCH = 192 * 512;
inline constexpr int64_t OPENED_SCRATCH = 256 * 32;  // floats: a stretch of weights
inline constexpr int64_t SHARED = 1 << 21;  // words that all threads have together: rows that are rounded
inline constexpr int64_t MOST_INPUTS = 1 << 16;  // of a weight
inline constexpr int64_t MOST_GROUP = 128;  // inputs that share a scale, where not all of them do
inline constexpr int64_t BETWEEN_SCRATCH = 512 * 32;  // floats: sums of a block of rows and of the panels of a tile
inline constexpr int64_t SCRATCH = INPUTS_SCRATCH + SUMS_SCRATCH + (OPENED_SCRATCH > BETWEEN_SCRATCH ? OPENED_SCRATCH : BETWEEN_SCRATCH);

enum class Format : int { F32 = 0, BF16 = 1, I8 = 2, I4 = 3 };
// What inputs of a product may be rounded to: nothing, bfloat16 (where the instruction set multiplies them), 8 bits (where the weights
// are whole numbers, else as bfloat16).
enum class Inputs : int { FLOAT32 = 0, BFLOAT16 = 1, INT8 = 2 };
enum class Activation : int { SILU = 0, GELU_TANH = 1 };

WEFT_SHARED int values_of_line(Format format) { return 1 << static_cast<int>(format); }  // inputs of each output in one line

// A weight [N, K] in panels.  group: inputs that share a scale, K where all do, 0 for floats.
struct Weight {
    const void* panels;
    int64_t n, k;
    Format format;
    int64_t group = 0;
    bool offsets = false;
    bool nested = false;  // of I4 in groups, without offsets

    WEFT_SHARED int64_t groups() const { return group ? k / group : 0; }
    WEFT_SHARED bool grouped() const { return group && group < k; }
    WEFT_SHARED int64_t line_bytes() const { return k / values_of_line(format) * LINE_BYTES; }
    WEFT_SHARED int64_t scale_stride() const { return nested ? PANEL : (grouped() ? 32 : 64) * (offsets ? 2 : 1); }
    WEFT_SHARED int64_t panel_bytes() const {
        return scales_at() + (groups() * scale_stride() + LINE_BYTES - 1) / LINE_BYTES * LINE_BYTES;
    }
    WEFT_SHARED int64_t scales_at() const { return line_bytes() + (nested ? LINE_BYTES : 0); }  // of the groups, in a panel
    WEFT_SHARED const char* panel(int64_t index) const { return static_cast<const char*>(panels) + index * panel_bytes(); }
};

// One thread's part of a parallel call: thread `index` of `count`, its SCRATCH floats, and SHARED words that are all theirs.
struct Share {
    int index, count;
    float* scratch = nullptr;
    int32_t* shared = nullptr;
    void* pool = nullptr;
    void (*meeting)(void* pool) = nullptr;
    bool (*taking)(void* pool, int64_t units, int64_t& first, int64_t& stop) = nullptr;

    // Nobody goes on before everybody has come.
    WEFT_SHARED void meet() const {
        if (count > 1) meeting(pool);
    }

    // The half-open range of `total` things that is this thread's, in multiples of `unit`.
    WEFT_SHARED void range(int64_t total, int64_t unit, int64_t& first, int64_t& stop) const {
        const int64_t units = (total + unit - 1) / unit;
        first = units * index / count * unit;
        stop = units * (index + 1) / count * unit;
        if (first > total) first = total;
        if (stop > total) stop = total;
    }

    // `run` (first, stop) over parts of `total` things, in multiples of `unit`, which threads take as they come: who is held up by
    // neighbours of this machine takes fewer.  Parts get smaller towards the end, where threads wait for each other.  Once between
    // two meetings.
    template <class Run>
    WEFT_SHARED void take(int64_t total, int64_t unit, const Run& run) const {
        const int64_t units = (total + unit - 1) / unit;
        if (count == 1) return run(int64_t{0}, total);
        for (int64_t first = 0, stop = 0; taking(pool, units, first, stop);) run(first * unit, stop * unit < total ? stop * unit : total);
    }
};

// out[T, I] = activation(gate) * up of x [T, 2 I].
struct Gated {
    const float* x;
    float* out;
    int64_t inner, x_stride, out_stride;
    Activation activation;
};

// out[T, N] = x[T, K] w^T + bias.  Strides in values.  inputs: what each row of x may be rounded to first.
// gate: what becomes of `out`, where its own `out` is not null; then `out` may hold anything.
struct Linear {
    const float* x;
    Weight weight;
    const float* bias;  // or null
    float* out;
    int64_t x_stride, out_stride;
    Inputs inputs = Inputs::FLOAT32;
    Gated gate{};
    bool taken = false;  // whether threads take outputs as they come (`Share::take`)
    const int64_t* picks = nullptr;  // which rows of x are its rows, or null for all from the first on

    WEFT_SHARED const float* row(int64_t i) const { return x + (picks ? picks[i] : i) * x_stride; }
};

// out = x / sqrt(mean(x^2) + eps) * weight over the last `width` values of rows that hold `heads` such vectors.
struct Norm {
    const float* x;
    const float* weight;  // the offset is in it
    float* out;
    int64_t x_stride, out_stride;
    int heads, width;
    float eps;
};

// Rotates the first 2 F values of each of `heads` heads of D values, in place.
struct Rope {
    float* x;
    int64_t stride;
    int heads, dim, pairs;
};

// Where the batch's rows and sequences lie in one KV group; of a step, for all of its layers.
struct Place {
    char* arena = nullptr;
    const int32_t* positions = nullptr;  // [blocks, positions_stride], the logical position of each entry
    int64_t block_bytes = 0, positions_stride = 0;
    int block_tokens = 0;
    Format stored = Format::F32;  // of keys and values; I8 for bytes with a float32 scale behind each kv head's
    const int64_t* tables = nullptr;  // [S, table_width]
    const int64_t* first = nullptr;   // [S], entries dropped at the table's head
    const int64_t* lengths = nullptr; // [S], entries in the table, this step's rows included
    const int64_t* slots = nullptr;   // [T]
    int64_t table_width = 0;
    int64_t window = 0;  // 0 for all
    const float* bias = nullptr;  // [blocks, positions_stride], what is added to the scores of an entry behind the soft cap; null for none
};

// Some rows of the batch with a kv head, or a few that follow each other, over chunks [chunk, chunk_stop) as `sequence` has them: rows
// of that sequence, or of several whose tables hold the same blocks there.
struct Item {
    int32_t sequence, kv_head;
    int32_t first, rows;  // in the step's list of rows
    int64_t chunk, chunk_stop;
    int64_t partial;      // where its unfinished results go, chunk by chunk and row by row; -1 where they are put together at once
    int32_t unit = -1;    // whose visible blocks they see (`Seen`); -1 for all
    int32_t kv_heads = 1; // one where the item has a unit; with all rows they are at most QUERY_ROWS pairs
};

// A row with one kv head whose unfinished results, one for each chunk in ascending order, become its result.
struct Joined {
    int32_t row, kv_head;
    int64_t first, parts;  // in the step's list of places
};

struct Attend {
    const float* q;
    float* out;
    int64_t q_stride, out_stride;
    int heads, kv_heads, dim;
    float scale, softcap;  // softcap 0 for none
    int layer;             // among those of its KV group, in whose blocks all keys of a layer come first, then its values
    float* lse = nullptr;  // [T, heads], log-sum-exp of each row's scores, -inf where it sees nothing; or null
};

struct Seen {
    const int64_t* row_positions;  // [T]
    const int64_t* bounds;         // [S + 1]
    const uint64_t* tree_bits;     // [T]: the guesses that a row sees, bit i for the i-th, or null where no sequence has a tree
    const int32_t* tree_rows;      // [S]: guesses at a sequence's end
    const uint8_t* visible = nullptr;  // [units, kv_heads, blocks]: whether the items of a unit see entries [b, b + 1) * block
    int64_t blocks = 0, block = 1;
};

inline constexpr int CHUNK = 64;         // entries of an unfinished softmax; chunks begin at absolute multiples
inline constexpr int KEY_PART = 32;      // of them, those whose scores are computed together
inline constexpr int QUERY_ROWS = 32;    // most (row, head) pairs of an item
inline constexpr int MAX_DIM = 256;

// Whole numbers [n, K], each plus `shift`, with scales and offsets [n, groups]; the weight's groups divide theirs.
struct Values {
    const uint8_t* values;
    const float *scales, *offsets;  // offsets or null
    int64_t groups;
    int shift;
};

// Floats of inputs to be rounded, row-major [n, K]; kind: 0 float32, 1 bfloat16.
struct Source {
    const void* values;
    int kind;
};

// Where attention that entries get is added up, in parts of 2^-30: out [sums, kv_heads, entries], and each row's sum [T], -1 for none.
struct Weigh {
    const int64_t* sums;
    int64_t* out;
    int64_t entries;
};

// A row of logits and the law that a token of it is drawn from.  temperature 0: the likeliest; top_k 0 and top_p 1: no truncation.
struct Draw {
    const float* logits;
    int64_t vocab;
    double temperature, top_p, min_p;
    int64_t top_k;
    uint64_t key;  // of the noise
};

struct Kernels {
    const char* name;
    void (*linear)(const Linear&, int64_t rows, Share);
    void (*mlp)(const Linear& up, const Linear& down, int64_t rows, Share);
    void (*norm)(const Norm&, int64_t rows, Share);
    void (*rope)(const Rope&, const float* cos, const float* sin, int64_t rows, Share);
    void (*gated)(const Gated&, int64_t rows, Share);
    void (*add)(float* into, const float* x, int64_t stride, int64_t width, int64_t rows, Share);
    void (*softcap)(float* x, int64_t count, float cap, Share);
    void (*blend)(const float* const* rows, const float* shares, int count, int64_t width, float* out);  // sum of shares times rows
    void (*embed)(const Weight&, const int64_t* tokens, float scale, float* out, int64_t stride, int64_t rows, Share);
    void (*store)(const Attend&, const Place&, const float* k, const float* v, int64_t stride, int64_t rows, Share);
    void (*attend)(const Attend&, const Place&, const Seen&, const Item&, const Item* after, const int32_t* rows, float* partials);
    void (*merge)(const Attend&, const Joined*, int64_t count, const int64_t* places, const float* partials, Share);
    void (*weigh)(const Attend&, const Place&, const Seen&, const Weigh&, const Item&, const int32_t* rows);
    void (*pack)(const Weight&, const void* source, int source_kind, int64_t n, int64_t first, Share);
    void (*draw)(const Draw*, int64_t count, int64_t* ids, Share);
    uint32_t (*read)(const char* from, int64_t bytes, Share);
    double (*arithmetic)(int64_t turns, int kind);
    void (*pack_values)(const Weight&, const Values&, int64_t n, int64_t first, Share);
    void (*spans)(const Source&, int64_t n, int64_t k, int64_t group, float* low, float* high, Share);
    void (*pack_rounded)(const Weight&, const Source&, const float* scales, const float* offsets, int64_t n, int64_t first, Share);
};

// Floats of an unfinished result of a row with a kv head: for each query head its maximum, its sum, and D mixed values.
WEFT_SHARED int64_t partial_floats(int heads, int kv_heads, int dim) { return heads / kv_heads * (2 + static_cast<int64_t>(dim)); }

const Kernels* kernels_amx();  // null where it was not compiled or the processor lacks it
const Kernels* kernels_avx512_bf16();
const Kernels* kernels_avx512_vnni();
const Kernels* kernels_avx512();
const Kernels* kernels_avx2();
const Kernels* kernels_portable();

}  // namespace weft
