// Attention over paged keys and values.  Included by the files of the instruction sets.
//
// An item is some rows of one sequence with one kv head, or with a few: query heads that share one read each key once.  Its entries are
// taken in tiles of KEY_TILE, which begin at absolute multiples, by an online softmax (Milakov and Gimelshein,
// arXiv:1805.02867); CHUNK_TILES tiles are one unfinished result, and those are merged in ascending order, by the item itself
// or, where they were computed apart, by `merge`.  A tile of which a row sees nothing leaves its state as it was.  So a row's
// bits depend on the entries that it sees, and on nothing else.
//
// Legend.  M: (row, head) pairs of an item.  D: head_dim.  E: KEY_TILE.
#pragma once

#include "kernels.h"
#include "simd.h"
#include "tiles.h"

namespace weft::WEFT_ISA {

inline constexpr float NEVER = -std::numeric_limits<float>::infinity();

static_assert(QUERY_ROWS % LANES == 0);

// The unfinished softmax of M pairs.
struct State {
    float most[QUERY_ROWS], total[QUERY_ROWS];
    float mixed[QUERY_ROWS * MAX_DIM];

    void clear(int pairs, int dim) {
        for (int m = 0; m < QUERY_ROWS; m++) most[m] = NEVER, total[m] = 0.0f;
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

// What the rows of an item see, and their scaled queries [kv_heads, M, D].
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

inline void hide(const Queries& queries, int row, const Tile_& tile, int64_t window, float* scores) {
    for (int e = 0; e < KEY_TILE; e++) {
        const int64_t gap = queries.positions[row] - tile.positions[e];
        bool hidden = gap < 0 || (window && gap >= window);
        const int64_t guess = tile.start + e - queries.tree_first;
        if (queries.tree_first >= 0 && guess >= 0 && queries.tree[row] != ~uint64_t{0})
            hidden = hidden || guess >= 64 || !(queries.tree[row] >> guess & 1);
        if (queries.visible && tile.positions[e] != INT32_MAX) hidden = hidden || !queries.visible[(tile.start + e) / queries.block];
        if (hidden) scores[e] = NEVER;
    }
}

// Scores of an item's pairs with one kv head, whose queries are `q`, with a tile: [M, E], -inf where a row does not see an entry.
template <class T>
void score(const Attend& a, const Place& place, const Queries& queries, int rows, const Tile_& tile, int64_t head_bytes, const float* q,
           float* found) {
    const int each = a.heads / a.kv_heads, pairs = rows * each;
    alignas(64) float keys[MAX_DIM * KEY_TILE];
    transposed<T>(tile, keys_at<T>(a, place) + head_bytes, a.dim, keys);
    each_part<SCORE_ROWS>(pairs, [&](auto count, int m) {
        scores<count.value>(q + m * a.dim, keys, a.dim, found + m * KEY_TILE);
    });
    const bool clear = !tile.partly && tile.highest <= queries.lowest && (!place.window || queries.highest - tile.lowest < place.window) &&
                       queries.tree_first < 0 && tile.positions[KEY_TILE - 1] != INT32_MAX && tile.positions[0] != INT32_MAX;
    for (int m = 0; m < pairs; m++) {
        float* mine = found + m * KEY_TILE;
        if (a.softcap > 0)
            for (int v = 0; v < KEY_TILE; v += LANES)
                store(mine + v, a.softcap * hyperbolic_tangent(load(mine + v) / a.softcap));
        if (!clear) hide(queries, m / each, tile, place.window, mine);
    }
}

// next: the tile after it, or null.
template <class T>
void one_tile(const Attend& a, const Place& place, const Queries& queries, const Item& item, const Tile_& tile,
              const Tile_* next, State& state) {
    const int each = item.rows * (a.heads / a.kv_heads), pairs = item.kv_heads * each;  // pairs of a kv head, and of all
    const int64_t one = T::bytes(a.dim), keys = keys_at<T>(a, place) + item.kv_head * one, values = keys + layer_bytes<T>(a, place);
    alignas(64) float found[QUERY_ROWS * KEY_TILE];
    want(tile, values, item.kv_heads * one);
    for (int h = 0; h < item.kv_heads; h++)
        score<T>(a, place, queries, item.rows, tile, (item.kv_head + h) * one, queries.q + h * each * a.dim,
                 found + h * each * KEY_TILE);
    if (next) want(*next, keys, item.kv_heads * one);
    // Maxima of all pairs, and what becomes of their earlier sums, before any weight: pairs do not wait for each other so.
    float most[QUERY_ROWS], share[QUERY_ROWS];
    for (int m = 0; m < pairs; m++) {
        vf high = load(found + m * KEY_TILE);
        for (int v = LANES; v < KEY_TILE; v += LANES) high = larger(high, load(found + m * KEY_TILE + v));
        most[m] = top(high);
    }
    for (int m = pairs; m % LANES; m++) most[m] = NEVER;
    for (int m = 0; m < pairs; m += LANES) {
        const vf before = load(state.most + m), now = larger(load(most + m), before);
        store(most + m, now);
        store(share + m, exponential(before - now));  // exactly 1 where nothing changed
        store(state.most + m, now);
    }
    for (int m = 0; m < pairs; m++) {
        float* mine = found + m * KEY_TILE;
        if (most[m] == NEVER) {
            std::memset(mine, 0, KEY_TILE * 4);
            continue;
        }
        vf added = vf{};
        for (int v = 0; v < KEY_TILE; v += LANES) {
            const vf weight = exponential(load(mine + v) - most[m]);
            store(mine + v, weight);
            added += weight;
        }
        state.total[m] = state.total[m] * share[m] + sum(added);
    }
    for (int m = 0; m < pairs; m++) {
        if (most[m] == NEVER || share[m] == 1.0f) continue;
        float* mixed = state.mixed + m * a.dim;
        for (int d = 0; d < a.dim; d++) mixed[d] *= share[m];
    }
    for (int h = 0; h < item.kv_heads; h++)
        each_part<MIX_ROWS>(each, [&](auto count, int m) {
            m += h * each;
            mix<T, count.value>(tile, values + h * one, found + m * KEY_TILE, a.dim, state.mixed + m * a.dim);
        });
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
        for (int h = 0; h < item.kv_heads; h++) {
            const float* q = a.q + row * a.q_stride + (item.kv_head + h) * each * a.dim;
            float* mine = queries.q + (h * item.rows + r) * each * a.dim;
            for (int i = 0; i < each * a.dim; i++) mine[i] = q[i] * a.scale;
        }
    }
}

// The tiles of an item of which some row sees something, one after the other.
template <class T>
struct Walk {
    const Place& place;
    const Queries& queries;
    const Item& item;
    int64_t start, stop, row_bytes;

    Walk(const Attend& a, const Place& place, const Queries& queries, const Item& item)
        : place(place), queries(queries), item(item), start(item.chunk * CHUNK_TILES * KEY_TILE),
          stop(item.chunk_stop * CHUNK_TILES * KEY_TILE), row_bytes(a.kv_heads * T::bytes(a.dim)) {
        const int64_t end = place.first[item.sequence] + place.lengths[item.sequence];
        if (stop > end) stop = end;
    }
    bool next(Tile_& tile) {
        for (; start < stop; start += KEY_TILE) {
            if (!in_sight(queries, start, start + KEY_TILE < stop ? start + KEY_TILE : stop, tile.partly)) continue;
            if (!locate(place, item.sequence, start, row_bytes, tile) || tile.lowest > queries.highest) continue;
            if (place.window && queries.lowest - tile.highest >= place.window && queries.tree_first < 0) continue;
            start += KEY_TILE;
            return true;
        }
        return false;
    }
};

template <class T>
void attend_in(const Attend& a, const Place& place, const Seen& seen, const Item& item, const int32_t* rows, float* partials) {
    const int each = a.heads / a.kv_heads, pairs = item.kv_heads * item.rows * each;
    Queries queries;
    ask(a, place, seen, item, rows, queries);
    State whole, part;
    whole.clear(pairs, a.dim);
    const auto close = [&] {
        for (int m = 0; m < pairs; m++)
            join(whole.most[m], whole.total[m], whole.mixed + m * a.dim, part.most[m], part.total[m], part.mixed + m * a.dim,
                 a.dim);
    };
    Walk<T> walk(a, place, queries, item);
    Tile_ tiles[2];
    int64_t chunk = -1;
    bool more = walk.next(tiles[0]);
    for (int turn = 0; more; turn ^= 1) {
        const Tile_& tile = tiles[turn];
        more = walk.next(tiles[turn ^ 1]);
        if (const int64_t mine = tile.start / (CHUNK_TILES * KEY_TILE); mine != chunk) {
            if (chunk >= 0) close();
            part.clear(pairs, a.dim);
            chunk = mine;
        }
        one_tile<T>(a, place, queries, item, tile, more ? &tiles[turn ^ 1] : nullptr, part);
    }
    if (chunk >= 0) close();
    for (int m = 0; m < pairs; m++) {
        if (item.partial < 0) {
            const int h = m / (item.rows * each), r = m / each % item.rows;
            write(a, item.kv_head + h, rows[item.first + r], m % each, whole.total[m], whole.mixed + m * a.dim);
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
