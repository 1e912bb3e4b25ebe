// Attention over paged keys and values.  Included by the files of the instruction sets.
//
// An item is some rows of one sequence with one kv head: the query heads that share it read each key once.  Its entries are
// taken in tiles of KEY_TILE, which begin at absolute multiples, by an online softmax (Milakov and Gimelshein,
// arXiv:1805.02867); CHUNK_TILES tiles are one unfinished result, and those are merged in ascending order, by the item itself
// or, where they were computed apart, by `merge`.  A tile of which a row sees nothing leaves its state as it was.  So a row's
// bits depend on the entries that it sees, and on nothing else.
//
// Legend.  M: (row, head) pairs of an item.  D: head_dim.  E: KEY_TILE.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace weft::WEFT_ISA {

inline constexpr float NEVER = -std::numeric_limits<float>::infinity();
inline constexpr int TILE_PARTS = KEY_TILE / LANES;

// Where one tile's entries lie; what a row may not see of them has the greatest position there is.
struct Tile_ {
    const char* rows[KEY_TILE];  // of the block of each entry, at its offset; entries that do not exist stand for one that does
    int32_t positions[KEY_TILE];
    int32_t lowest, highest;
};

// Entries [start, start + E), counted from the sequence's entry 0.  row_bytes: of all kv heads' keys of one entry.
inline bool locate(const Place& place, int64_t sequence, int64_t start, int64_t row_bytes, Tile_& tile) {
    const int64_t first = place.first[sequence], length = place.lengths[sequence];
    const int64_t* table = place.tables + sequence * place.table_width;
    const char* some = nullptr;
    tile.lowest = INT32_MAX;
    tile.highest = -1;
    for (int e = 0; e < KEY_TILE; e++) {
        const int64_t entry = start + e - first;
        tile.rows[e] = nullptr;
        tile.positions[e] = INT32_MAX;
        if (entry < 0 || entry >= length) continue;
        const int64_t block = table[entry / place.block_tokens], offset = entry % place.block_tokens;
        tile.rows[e] = some = place.arena + block * place.block_bytes + offset * row_bytes;
        const int32_t position = place.positions[block * place.positions_stride + offset];
        tile.positions[e] = position;
        if (position < tile.lowest) tile.lowest = position;
        if (position > tile.highest) tile.highest = position;
    }
    if (!some) return false;
    for (int e = 0; e < KEY_TILE; e++)
        if (!tile.rows[e]) tile.rows[e] = some;
    return true;
}

// A kv head's part of an entry: values [d, d + LANES), or one of them.
struct WideRows {
    static WEFT_INLINE int64_t bytes(int dim) { return static_cast<int64_t>(dim) * 4; }
    static WEFT_INLINE vf values(const char* row, int d, int) { return load(reinterpret_cast<const float*>(row) + d); }
    static WEFT_INLINE float value(const char* row, int d, int) { return reinterpret_cast<const float*>(row)[d]; }
};
struct HalfRows {  // bfloat16
    static WEFT_INLINE int64_t bytes(int dim) { return static_cast<int64_t>(dim) * 2; }
    static WEFT_INLINE vf values(const char* row, int d, int) { return widen(reinterpret_cast<const uint16_t*>(row) + d); }
    static WEFT_INLINE float value(const char* row, int d, int) { return widen_one(reinterpret_cast<const uint16_t*>(row)[d]); }
};
struct ByteRows {  // int8, and a float32 behind them that multiplies all
    static WEFT_INLINE int64_t bytes(int dim) { return dim + 4; }
    static WEFT_INLINE float scale(const char* row, int dim) {
        float found;
        std::memcpy(&found, row + dim, 4);
        return found;
    }
    static WEFT_INLINE vf values(const char* row, int d, int dim) { return bytes_at(row + d) * scale(row, dim); }
    static WEFT_INLINE float value(const char* row, int d, int dim) {
        return static_cast<float>(static_cast<int8_t>(row[d])) * scale(row, dim);
    }
};

// Bytes of a layer's keys in a block, and where they begin.
template <class T>
WEFT_INLINE int64_t layer_bytes(const Attend& a, const Place& place) {
    return place.block_tokens * a.kv_heads * T::bytes(a.dim);
}
template <class T>
WEFT_INLINE int64_t keys_at(const Attend& a, const Place& place) {
    return 2 * a.layer * layer_bytes<T>(a, place);
}

// Keys of a tile as [D][E].
template <class T>
void transposed(const Tile_& tile, int64_t offset, int dim, float* out) {
    for (int d = 0; d < dim; d += LANES) {
        const int wide = dim - d < LANES ? dim - d : LANES;
        for (int e = 0; e < KEY_TILE; e++) {
            const char* row = tile.rows[e] + offset;
            if (wide == LANES) {
                float some[LANES];
                store(some, T::values(row, d, dim));
                for (int i = 0; i < LANES; i++) out[(d + i) * KEY_TILE + e] = some[i];
            } else {
                for (int i = 0; i < wide; i++) out[(d + i) * KEY_TILE + e] = T::value(row, d + i, dim);
            }
        }
    }
}

// Scores of R rows of q [R, D] with keys [D][E].
template <int R>
void scores(const float* q, const float* keys, int dim, float* out) {
    vf total[R][TILE_PARTS];
    for (int r = 0; r < R; r++)
        for (int v = 0; v < TILE_PARTS; v++) total[r][v] = vf{};
    for (int d = 0; d < dim; d++)
        for (int v = 0; v < TILE_PARTS; v++) {
            const vf key = load(keys + d * KEY_TILE + v * LANES);
            for (int r = 0; r < R; r++) total[r][v] += key * q[r * dim + d];
        }
    for (int r = 0; r < R; r++)
        for (int v = 0; v < TILE_PARTS; v++) store(out + r * KEY_TILE + v * LANES, total[r][v]);
}

// mixed [R, D] += weights [R, E] times values of a tile, LANES dimensions at a time.
template <class T, int R>
void mix(const Tile_& tile, int64_t offset, const float* weights, int dim, float* mixed) {
    int d = 0;
    for (; d + LANES <= dim; d += LANES) {
        vf total[R];
        for (int r = 0; r < R; r++) total[r] = load(mixed + r * dim + d);
        for (int e = 0; e < KEY_TILE; e++) {
            const vf v = T::values(tile.rows[e] + offset, d, dim);
            for (int r = 0; r < R; r++) total[r] += v * weights[r * KEY_TILE + e];
        }
        for (int r = 0; r < R; r++) store(mixed + r * dim + d, total[r]);
    }
    for (; d < dim; d++)
        for (int r = 0; r < R; r++)
            for (int e = 0; e < KEY_TILE; e++)
                mixed[r * dim + d] += T::value(tile.rows[e] + offset, d, dim) * weights[r * KEY_TILE + e];
}

// The unfinished softmax of M pairs.
struct State {
    float most[QUERY_ROWS], total[QUERY_ROWS];
    float mixed[QUERY_ROWS * MAX_DIM];

    void clear(int pairs, int dim) {
        for (int m = 0; m < pairs; m++) most[m] = NEVER, total[m] = 0.0f;
        std::memset(mixed, 0, static_cast<size_t>(pairs) * dim * 4);
    }
};

// One pair's earlier state with the next chunk's.
inline void join(float& most, float& total, float* mixed, float next_most, float next_total, const float* next, int dim) {
    if (next_most == NEVER) return;
    if (most == NEVER) {
        most = next_most, total = next_total;
        std::memcpy(mixed, next, static_cast<size_t>(dim) * 4);
        return;
    }
    const float high = most > next_most ? most : next_most;
    float shares[LANES] = {};
    shares[0] = most - high, shares[1] = next_most - high;
    store(shares, exponential(load(shares)));
    for (int d = 0; d < dim; d++) mixed[d] = mixed[d] * shares[0] + next[d] * shares[1];
    total = total * shares[0] + next_total * shares[1];
    most = high;
}

// What the rows of an item see, and their scaled queries [M, D].
struct Queries {
    int64_t positions[QUERY_ROWS];  // of each row
    uint64_t tree[QUERY_ROWS];
    int64_t tree_first;             // entry of the sequence's first guess, -1 where it has none
    int64_t lowest, highest;
    const uint8_t* visible;         // [blocks] of the item's unit and kv head, null for all
    int64_t block;
    float q[QUERY_ROWS * MAX_DIM];
};

// Whether some of a tile's entries are visible, and whether not all are.
inline bool in_sight(const Queries& queries, int64_t start, int64_t stop, bool& partly) {
    partly = false;
    if (!queries.visible) return true;
    bool some = false;
    const int64_t last = (stop - 1) / queries.block;
    for (int64_t b = start / queries.block; b <= last; b++) (queries.visible[b] ? some : partly) = true;
    return some;
}

inline void hide(const Queries& queries, int row, const Tile_& tile, int64_t start, int64_t window, float* scores) {
    for (int e = 0; e < KEY_TILE; e++) {
        const int64_t gap = queries.positions[row] - tile.positions[e];
        bool hidden = gap < 0 || (window && gap >= window);
        const int64_t guess = start + e - queries.tree_first;
        if (queries.tree_first >= 0 && guess >= 0 && queries.tree[row] != ~uint64_t{0})
            hidden = hidden || guess >= 64 || !(queries.tree[row] >> guess & 1);
        if (queries.visible && tile.positions[e] != INT32_MAX) hidden = hidden || !queries.visible[(start + e) / queries.block];
        if (hidden) scores[e] = NEVER;
    }
}

// Scores of an item's pairs with a tile, [M, E], -inf where a row does not see an entry.
template <class T>
void score(const Attend& a, const Place& place, const Queries& queries, int rows, const Tile_& tile, int64_t start,
           int64_t head_bytes, bool partly, float* found) {
    const int each = a.heads / a.kv_heads, pairs = rows * each;
    alignas(64) float keys[MAX_DIM * KEY_TILE];
    transposed<T>(tile, keys_at<T>(a, place) + head_bytes, a.dim, keys);
    int m = 0;
    for (; m + 6 <= pairs; m += 6) scores<6>(queries.q + m * a.dim, keys, a.dim, found + m * KEY_TILE);
    for (; m < pairs; m++) scores<1>(queries.q + m * a.dim, keys, a.dim, found + m * KEY_TILE);
    const bool clear = !partly && tile.highest <= queries.lowest && (!place.window || queries.highest - tile.lowest < place.window) &&
                       queries.tree_first < 0 && tile.positions[KEY_TILE - 1] != INT32_MAX && tile.positions[0] != INT32_MAX;
    for (m = 0; m < pairs; m++) {
        float* mine = found + m * KEY_TILE;
        if (a.softcap > 0)
            for (int v = 0; v < KEY_TILE; v += LANES)
                store(mine + v, a.softcap * hyperbolic_tangent(load(mine + v) / a.softcap));
        if (!clear) hide(queries, m / each, tile, start, place.window, mine);
    }
}

template <class T>
void one_tile(const Attend& a, const Place& place, const Queries& queries, int rows, const Tile_& tile, int64_t start,
              int64_t head_bytes, bool partly, State& state) {
    const int pairs = rows * (a.heads / a.kv_heads);
    alignas(64) float found[QUERY_ROWS * KEY_TILE];
    score<T>(a, place, queries, rows, tile, start, head_bytes, partly, found);
    int m;
    for (m = 0; m < pairs; m++) {
        float* mine = found + m * KEY_TILE;
        vf high = load(mine);
        for (int v = LANES; v < KEY_TILE; v += LANES) high = larger(high, load(mine + v));
        const float before = state.most[m], now = top(high);
        const float most = now > before ? now : before;
        if (most == NEVER) {
            std::memset(mine, 0, KEY_TILE * 4);
            continue;
        }
        vf added = vf{};
        for (int v = 0; v < KEY_TILE; v += LANES) {
            const vf weight = exponential(load(mine + v) - most);
            store(mine + v, weight);
            added += weight;
        }
        if (most != before) {
            float share[LANES] = {};
            share[0] = before - most;
            store(share, exponential(load(share)));
            state.total[m] *= share[0];
            float* mixed = state.mixed + m * a.dim;
            for (int d = 0; d < a.dim; d++) mixed[d] *= share[0];
            state.most[m] = most;
        }
        state.total[m] += sum(added);
    }
    const int64_t values_at = keys_at<T>(a, place) + layer_bytes<T>(a, place);
    m = 0;
    for (; m + 6 <= pairs; m += 6)
        mix<T, 6>(tile, values_at + head_bytes, found + m * KEY_TILE, a.dim, state.mixed + m * a.dim);
    for (; m < pairs; m++)
        mix<T, 1>(tile, values_at + head_bytes, found + m * KEY_TILE, a.dim, state.mixed + m * a.dim);
}

inline void write(const Attend& a, int kv_head, int64_t row, int head, float total, const float* mixed) {
    float* out = a.out + row * a.out_stride + (kv_head * (a.heads / a.kv_heads) + head) * a.dim;
    const float share = total > 0 ? 1.0f / total : 0.0f;
    for (int d = 0; d < a.dim; d++) out[d] = mixed[d] * share;
}

inline void ask(const Attend& a, const Place& place, const Seen& seen, const Item& item, const int32_t* rows, Queries& queries) {
    const int each = a.heads / a.kv_heads;
    const int64_t s = item.sequence, guesses = seen.tree_rows ? seen.tree_rows[s] : 0;
    queries.tree_first = guesses ? place.first[s] + place.lengths[s] - guesses : -1;
    queries.lowest = INT64_MAX, queries.highest = -1;
    queries.visible = item.unit < 0 ? nullptr : seen.visible + (item.unit * a.kv_heads + item.kv_head) * seen.blocks;
    queries.block = seen.block;
    for (int r = 0; r < item.rows; r++) {
        const int64_t row = rows[item.first + r], position = seen.row_positions[row];
        queries.positions[r] = position;
        queries.tree[r] = seen.tree_bits ? seen.tree_bits[row] : ~uint64_t{0};
        if (position < queries.lowest) queries.lowest = position;
        if (position > queries.highest) queries.highest = position;
        const float* q = a.q + row * a.q_stride + item.kv_head * each * a.dim;
        for (int i = 0; i < each * a.dim; i++) queries.q[r * each * a.dim + i] = q[i] * a.scale;
    }
}

template <class T>
void attend_in(const Attend& a, const Place& place, const Seen& seen, const Item& item, const int32_t* rows, float* partials) {
    const int each = a.heads / a.kv_heads, pairs = item.rows * each;
    const int64_t s = item.sequence, head_bytes = item.kv_head * T::bytes(a.dim), row_bytes = a.kv_heads * T::bytes(a.dim);
    Queries queries;
    ask(a, place, seen, item, rows, queries);
    State whole, part;
    whole.clear(pairs, a.dim);
    for (int64_t chunk = item.chunk; chunk < item.chunk_stop; chunk++) {
        part.clear(pairs, a.dim);
        for (int t = 0; t < CHUNK_TILES; t++) {
            const int64_t start = (chunk * CHUNK_TILES + t) * KEY_TILE;
            const int64_t end = place.first[s] + place.lengths[s];
            Tile_ tile;
            bool partly;
            if (start >= end) break;
            if (!in_sight(queries, start, start + KEY_TILE < end ? start + KEY_TILE : end, partly)) continue;
            if (!locate(place, s, start, row_bytes, tile) || tile.lowest > queries.highest) continue;
            if (place.window && queries.lowest - tile.highest >= place.window && queries.tree_first < 0) continue;
            one_tile<T>(a, place, queries, item.rows, tile, start, head_bytes, partly, part);
        }
        for (int m = 0; m < pairs; m++)
            join(whole.most[m], whole.total[m], whole.mixed + m * a.dim, part.most[m], part.total[m], part.mixed + m * a.dim,
                 a.dim);
    }
    for (int m = 0; m < pairs; m++) {
        if (item.partial < 0) {
            write(a, item.kv_head, rows[item.first + m / each], m % each, whole.total[m], whole.mixed + m * a.dim);
        } else {
            float* to = partials + item.partial + m * (2 + static_cast<int64_t>(a.dim));
            to[0] = whole.most[m], to[1] = whole.total[m];
            std::memcpy(to + 2, whole.mixed + m * a.dim, static_cast<size_t>(a.dim) * 4);
        }
    }
}

inline void attend(const Attend& a, const Place& place, const Seen& seen, const Item& item, const int32_t* rows,
                   float* partials) {
    if (place.stored == Format::F32) attend_in<WideRows>(a, place, seen, item, rows, partials);
    else if (place.stored == Format::BF16) attend_in<HalfRows>(a, place, seen, item, rows, partials);
    else attend_in<ByteRows>(a, place, seen, item, rows, partials);
}

inline void merge(const Attend& a, const Joined* joined, int64_t count, const int64_t* places, const float* partials, Share share) {
    const int each = a.heads / a.kv_heads;
    for (int64_t i = share.index; i < count; i += share.count) {
        const Joined& one = joined[i];
        for (int head = 0; head < each; head++) {
            float most = NEVER, total = 0.0f, mixed[MAX_DIM] = {};
            for (int64_t p = one.first; p < one.first + one.parts; p++) {
                const float* from = partials + places[p] + head * (2 + static_cast<int64_t>(a.dim));
                join(most, total, mixed, from[0], from[1], from + 2, a.dim);
            }
            write(a, one.kv_head, one.row, head, total, mixed);
        }
    }
}

// One head's values as bytes and the scale behind them.  Of values that are not finite the scale is not finite either, and makes
// not-a-number of all when they are read.
inline void write_bytes(const float* x, int dim, char* to) {
    float most = 0.0f, strange = 0.0f;
    for (int i = 0; i < dim; i++) {
        most = std::fabs(x[i]) > most ? std::fabs(x[i]) : most;
        strange += x[i] * 0.0f;
    }
    const float scale = most / 127.0f + strange;
    for (int i = 0; i < dim; i++) {
        const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number
        float whole = scale > 0.0f ? (x[i] / scale + magic) - magic : 0.0f;
        whole = whole < 127.0f ? whole : 127.0f;
        to[i] = static_cast<char>(static_cast<int8_t>(whole > -127.0f ? whole : -127.0f));
    }
    std::memcpy(to + dim, &scale, 4);
}

WEFT_INLINE void write_row(const float* x, int dim, char* to, WideRows) { std::memcpy(to, x, static_cast<size_t>(dim) * 4); }
WEFT_INLINE void write_row(const float* x, int dim, char* to, HalfRows) {
    for (int i = 0; i < dim; i++) reinterpret_cast<uint16_t*>(to)[i] = narrow_one(x[i]);
}
WEFT_INLINE void write_row(const float* x, int dim, char* to, ByteRows) { write_bytes(x, dim, to); }

template <class T>
void store_in(const Attend& a, const Place& place, const float* k, const float* v, int64_t stride, int64_t rows, Share share) {
    int64_t from, to;
    share.range(rows, 1, from, to);
    const int64_t one = T::bytes(a.dim), keys = keys_at<T>(a, place), values = keys + layer_bytes<T>(a, place);
    for (int64_t row = from; row < to; row++) {
        const int64_t slot = place.slots[row];
        if (slot < 0) continue;  // a row that is not kept
        char* mine = place.arena + slot / place.block_tokens * place.block_bytes + slot % place.block_tokens * a.kv_heads * one;
        for (int head = 0; head < a.kv_heads; head++) {
            write_row(k + row * stride + head * a.dim, a.dim, mine + keys + head * one, T{});
            write_row(v + row * stride + head * a.dim, a.dim, mine + values + head * one, T{});
        }
    }
}

// Keys and values [T, kv_heads, D], rows `stride` apart, to their slots.
inline void store_rows(const Attend& a, const Place& place, const float* k, const float* v, int64_t stride, int64_t rows,
                       Share share) {
    if (place.stored == Format::F32) store_in<WideRows>(a, place, k, v, stride, rows, share);
    else if (place.stored == Format::BF16) store_in<HalfRows>(a, place, k, v, stride, rows, share);
    else store_in<ByteRows>(a, place, k, v, stride, rows, share);
}

}  // namespace weft::WEFT_ISA
