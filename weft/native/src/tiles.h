// Tiles of paged keys and values: where they lie, and products with them.  Included by the files of the instruction sets.
//
// Legend.  D: head_dim.  E: KEY_TILE.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace weft::WEFT_ISA {

inline constexpr int TILE_PARTS = KEY_TILE / LANES;
// Most (row, head) pairs whose scores, and whose mixed values, are added up in registers, and vectors of values beside each other.
inline constexpr int SCORE_ROWS = LANES == 16 ? 8 : LANES == 8 ? 3 : 1;
inline constexpr int MIX_ROWS = LANES == 16 ? 8 : 5, MIX_PARTS = 2;

// Where one tile's entries lie; what a row may not see of them has the greatest position there is.
struct Tile_ {
    const char* rows[KEY_TILE];  // of the block of each entry, at its offset; entries that do not exist stand for one that does
    int32_t positions[KEY_TILE];
    int32_t lowest, highest;
    int64_t start;  // its first entry, counted from the sequence's entry 0
    bool partly;    // whether some of it is out of sight
};

// Entries [start, start + E).  row_bytes: of all kv heads' keys of one entry.  Whether there are any.
inline bool locate(const Place& place, int64_t sequence, int64_t start, int64_t row_bytes, Tile_& tile) {
    const int64_t first = place.first[sequence], end = first + place.lengths[sequence];
    const int64_t begin = start > first ? start : first, stop = start + KEY_TILE < end ? start + KEY_TILE : end;
    tile.start = start;
    if (begin >= stop) return false;
    const int low = static_cast<int>(begin - start), high = static_cast<int>(stop - start);
    const int64_t* table = place.tables + sequence * place.table_width + (begin - first) / place.block_tokens;
    int64_t offset = (begin - first) % place.block_tokens;
    tile.lowest = INT32_MAX;
    tile.highest = -1;
    for (int e = low; e < high; table++, offset = 0) {
        const char* row = place.arena + *table * place.block_bytes + offset * row_bytes;
        const int32_t* position = place.positions + *table * place.positions_stride + offset;
        for (; e < high && offset < place.block_tokens; e++, offset++, row += row_bytes, position++) {
            tile.rows[e] = row;
            tile.positions[e] = *position;
            if (*position < tile.lowest) tile.lowest = *position;
            if (*position > tile.highest) tile.highest = *position;
        }
    }
    for (int e = 0; e < KEY_TILE; e++)
        if (e < low || e >= high) {
            tile.rows[e] = tile.rows[low];
            tile.positions[e] = INT32_MAX;
        }
    return true;
}

// A kv head's part of an entry: values [d, d + LANES), or one of them; `open` gives value i of words of several entries.
struct WideRows {
    static constexpr int PER = 1;  // values in a word of four bytes
    static WEFT_INLINE int64_t bytes(int dim) { return static_cast<int64_t>(dim) * 4; }
    static WEFT_INLINE vf open(vu words, int, vf) { return reinterpret_cast<vf>(words); }
    static WEFT_INLINE float scale(const char*, int) { return 1.0f; }
    static WEFT_INLINE vf values(const char* row, int d, int) { return load(reinterpret_cast<const float*>(row) + d); }
    static WEFT_INLINE float value(const char* row, int d, int) { return reinterpret_cast<const float*>(row)[d]; }
};
struct HalfRows {  // bfloat16
    static constexpr int PER = 2;
    static WEFT_INLINE int64_t bytes(int dim) { return static_cast<int64_t>(dim) * 2; }
    static WEFT_INLINE vf open(vu words, int i, vf) { return reinterpret_cast<vf>(i ? words & 0xffff0000u : words << 16); }
    static WEFT_INLINE float scale(const char*, int) { return 1.0f; }
    static WEFT_INLINE vf values(const char* row, int d, int) { return widen(reinterpret_cast<const uint16_t*>(row) + d); }
    static WEFT_INLINE float value(const char* row, int d, int) { return widen_one(reinterpret_cast<const uint16_t*>(row)[d]); }
};
struct ByteRows {  // int8, and a float32 behind them that multiplies all
    static constexpr int PER = 4;
    static WEFT_INLINE int64_t bytes(int dim) { return dim + 4; }
    static WEFT_INLINE vf open(vu words, int i, vf scales) {
        return __builtin_convertvector(reinterpret_cast<vi>(words << (24 - 8 * i)) >> 24, vf) * scales;
    }
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

// Asks memory for some kv heads' part of all entries of a tile.
WEFT_INLINE void want(const Tile_& tile, int64_t offset, int64_t bytes) {
    for (int e = 0; e < KEY_TILE; e++)
        for (int64_t at = 0; at < bytes; at += LINE_BYTES) __builtin_prefetch(tile.rows[e] + offset + at);
}

// Keys of a tile as [D][E].
template <class T>
void transposed(const Tile_& tile, int64_t offset, int dim, float* out) {
    for (int part = 0; part < TILE_PARTS; part++, out += LANES) {
        const char* const* rows = tile.rows + part * LANES;
        float each[LANES];
        for (int e = 0; e < LANES; e++) each[e] = T::scale(rows[e] + offset, dim);
        const vf scales = load(each);
        int d = 0;
        for (; d + LANES * T::PER <= dim; d += LANES * T::PER) {
            vu words[LANES];
            for (int e = 0; e < LANES; e++) words[e] = load_bits(rows[e] + offset + d / T::PER * 4);
            turn<LANES / 2>(words);
            for (int w = 0; w < LANES; w++)
                for (int i = 0; i < T::PER; i++) store(out + (d + w * T::PER + i) * KEY_TILE, T::open(words[w], i, scales));
        }
        for (; d < dim; d++)
            for (int e = 0; e < LANES; e++) out[d * KEY_TILE + e] = T::value(rows[e] + offset, d, dim);
    }
}

// Scores of R rows of q [R, D] with keys [D][E].
template <int R>
void scores(const float* q, const float* keys, int dim, float* out) {
    vf total[R][TILE_PARTS];
    for (int r = 0; r < R; r++)
        for (int v = 0; v < TILE_PARTS; v++) total[r][v] = vf{};
    for (int d = 0; d < dim; d++) {
        vf key[TILE_PARTS];
        for (int v = 0; v < TILE_PARTS; v++) key[v] = load(keys + d * KEY_TILE + v * LANES);
        for (int r = 0; r < R; r++) {
            const vf input = all(q[r * dim + d]);
            for (int v = 0; v < TILE_PARTS; v++) total[r][v] += key[v] * input;
        }
    }
    for (int r = 0; r < R; r++)
        for (int v = 0; v < TILE_PARTS; v++) store(out + r * KEY_TILE + v * LANES, total[r][v]);
}

// mixed [R, D] += weights [R, E] times values of a tile, of dimensions [d, d + V * LANES).
template <class T, int R, int V>
WEFT_INLINE void mix_some(const Tile_& tile, int64_t offset, const float* weights, int dim, int d, float* mixed) {
    vf total[R][V];
    for (int r = 0; r < R; r++)
        for (int v = 0; v < V; v++) total[r][v] = load(mixed + r * dim + d + v * LANES);
    for (int e = 0; e < KEY_TILE; e++) {
        vf value[V];
        for (int v = 0; v < V; v++) value[v] = T::values(tile.rows[e] + offset, d + v * LANES, dim);
        for (int r = 0; r < R; r++) {
            const vf weight = all(weights[r * KEY_TILE + e]);
            for (int v = 0; v < V; v++) total[r][v] += value[v] * weight;
        }
    }
    for (int r = 0; r < R; r++)
        for (int v = 0; v < V; v++) store(mixed + r * dim + d + v * LANES, total[r][v]);
}
template <class T, int R>
void mix(const Tile_& tile, int64_t offset, const float* weights, int dim, float* mixed) {
    int d = 0;
    for (; d + MIX_PARTS * LANES <= dim; d += MIX_PARTS * LANES)
        mix_some<T, R, MIX_PARTS>(tile, offset, weights, dim, d, mixed);
    for (; d + LANES <= dim; d += LANES) mix_some<T, R, 1>(tile, offset, weights, dim, d, mixed);
    for (; d < dim; d++)
        for (int r = 0; r < R; r++)
            for (int e = 0; e < KEY_TILE; e++)
                mixed[r * dim + d] += T::value(tile.rows[e] + offset, d, dim) * weights[r * KEY_TILE + e];
}

// Calls `run` (a constant of how many pairs, the first of them) for pairs [0, pairs), in parts of nearly equal size.
template <int MOST, class Run>
WEFT_INLINE void each_part(int pairs, const Run& run) {
    const int parts = (pairs + MOST - 1) / MOST;
    for (int i = 0; i < parts; i++) {
        const int first = pairs * i / parts, count = pairs * (i + 1) / parts - first;
        [&]<int... R>(std::integer_sequence<int, R...>) {
            (void)((count == R + 1 && (run(std::integral_constant<int, R + 1>{}, first), true)) || ...);
        }(std::make_integer_sequence<int, MOST>{});
    }
}

}  // namespace weft::WEFT_ISA
