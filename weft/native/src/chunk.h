// A chunk of paged keys and values with an item's queries: scores, weights, mixed values, beside what earlier chunks gave.
// Included by the files of the instruction sets.
//
// Legend.  M: (row, head) pairs of an item.  D: head_dim.  C: CHUNK.  E: KEY_PART.
#pragma once

#include "kernels.h"
#include "pairs.h"
#include "simd.h"
#include "tiles.h"

namespace weft::WEFT_ISA {

inline constexpr float NEVER = -std::numeric_limits<float>::infinity();

static_assert(QUERY_ROWS % LANES == 0);
static_assert(CHUNK % KEY_PART == 0);

// The unfinished softmax of M pairs.
struct State {
    float most[QUERY_ROWS], total[QUERY_ROWS];
    float mixed[QUERY_ROWS * MAX_DIM];

    void clear(int pairs, int dim) {
        for (int m = 0; m < QUERY_ROWS; m++) most[m] = NEVER, total[m] = 0.0f;
        std::memset(mixed, 0, static_cast<size_t>(pairs) * dim * 4);
    }
};

// Of pairs [m, m + LANES): the shares of what they have and of what comes next, whose maxima are `next`.  Two that saw nothing have none.
WEFT_INLINE void shares(State& state, const float* next, const float* next_total, int m, float* before, float* now) {
    const vf mine = load(state.most + m), other = load(next + m), high = larger(other, mine);
    const vf old = exponential(mine - high), fresh = exponential(other - high);
    store(before + m, old), store(now + m, fresh);
    store(state.total + m, load(state.total + m) * old + load(next_total + m) * fresh);
    store(state.most + m, high);
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
    uint32_t words[QUERY_ROWS * MAX_DIM / 2];  // the same as pairs [D / 2, QUERY_ROWS], where products are of those
    float units[QUERY_ROWS];
};

// Whether some of these entries are visible, and whether not all are.
inline bool in_sight(const Queries& queries, int64_t start, int64_t stop, bool& partly) {
    partly = false;
    if (!queries.visible) return true;
    bool some = false;
    const int64_t last = (stop - 1) / queries.block;
    for (int64_t b = start / queries.block; b <= last; b++) (queries.visible[b] ? some : partly) = true;
    return some;
}

// Whether a row does not see entry e of a chunk, which has ones that some row sees.
inline bool hidden(const Queries& queries, int row, const Entries& from, int64_t window, int e) {
    const int64_t gap = queries.positions[row] - from.positions[e], guess = from.start + e - queries.tree_first;
    if (gap < 0 || (window && gap >= window)) return true;
    if (queries.tree_first >= 0 && guess >= 0 && queries.tree[row] != ~uint64_t{0} && (guess >= 64 || !(queries.tree[row] >> guess & 1)))
        return true;
    return queries.visible && !queries.visible[(from.start + e) / queries.block];
}
// Whether every row sees every entry.
inline bool all_seen(const Queries& queries, const Entries& from, int64_t window) {
    return !from.partly && from.highest <= queries.lowest && (!window || queries.highest - from.lowest < window) && queries.tree_first < 0 &&
           from.low == 0 && from.high == CHUNK;
}

inline void hide(const Queries& queries, int row, const Entries& from, int64_t window, float* scores) {
    const int64_t position = queries.positions[row];
    if (queries.tree_first < 0 && !queries.visible) {
        const auto last = static_cast<int32_t>(position < INT32_MAX ? position : INT32_MAX - 1);
        const auto gone = static_cast<int32_t>(window && position >= window ? position - window : -1);
        for (int e = 0; e < CHUNK; e += LANES) {
            const vi mine = reinterpret_cast<vi>(load_bits(from.positions + e));
            store(scores + e, select((mine <= last) & (mine > gone), load(scores + e), all(NEVER)));
        }
        return;
    }
    for (int e = 0; e < CHUNK; e++)
        if (hidden(queries, row, from, window, e)) scores[e] = NEVER;
}

// Entries [first, stop) of a chunk, in whole parts, beyond which there are none.
WEFT_INLINE void whole_parts(const Entries& from, int& first, int& stop) {
    first = from.low / KEY_PART * KEY_PART, stop = (from.high + KEY_PART - 1) / KEY_PART * KEY_PART;
}
// The same, beyond which no row of the item sees any.
WEFT_INLINE void seen_parts(const Queries& queries, const Entries& from, int& first, int& stop) {
    whole_parts(from, first, stop);
    if (!from.partly) return;
    const auto sees = [&](int part) {
        const int low = part > from.low ? part : from.low, high = part + KEY_PART < from.high ? part + KEY_PART : from.high;
        bool partly;
        return in_sight(queries, from.start + low, from.start + high, partly);
    };
    while (stop - first > KEY_PART && !sees(stop - KEY_PART)) stop -= KEY_PART;
    while (stop - first > KEY_PART && !sees(first)) first += KEY_PART;
}

// Scores of an item's pairs with one kv head, the first of which is `top`, with a chunk: [M, C], -inf where a row does not see an entry.
template <class T>
void score(const Attend& a, const Place& place, const Queries& queries, int rows, const Entries& from, int64_t head_bytes, int top,
           float* found, Asking& asking) {
    const int each = a.heads / a.kv_heads, pairs = rows * each;
    alignas(64) std::conditional_t<T::PAIRS, uint32_t, float> keys[MAX_DIM * KEY_PART / (T::PAIRS ? 2 : 1)];
    const int64_t offset = keys_at<T>(a, place) + head_bytes;
    int first, stop;
    seen_parts(queries, from, first, stop);
    for (int e = 0; e < CHUNK; e += KEY_PART) {
        if (e < first || e >= stop) {
            for (int m = 0; m < pairs; m++)
                for (int v = 0; v < KEY_PART; v += LANES) store(found + m * CHUNK + e + v, all(NEVER));
            continue;
        }
        if constexpr (T::PAIRS) paired_keys<T>(from.rows + e, offset, a.dim, keys, asking);
        else transposed<T>(from.rows + e, offset, a.dim, keys, asking);
        each_part<SCORE_ROWS>(pairs, [&](auto count, int m) {
            float* out = found + m * CHUNK + e;
            if constexpr (T::PAIRS)
                paired_scores<T, count.value>(queries.words + top + m, queries.units + top + m, keys, a.dim, out, asking);
            else scores<T, count.value>(queries.q + (top + m) * a.dim, keys, a.dim, out, asking);
        });
    }
    const bool clear = all_seen(queries, from, place.window);
    if (T::SCALED) {
        alignas(64) float scales[CHUNK];
        for (int e = 0; e < CHUNK; e++) scales[e] = T::scale(from.rows[e] + offset, a.dim);
        for (int m = 0; m < pairs; m++)
            for (int v = first; v < stop; v += LANES) store(found + m * CHUNK + v, load(found + m * CHUNK + v) * load(scales + v));
    }
    for (int m = 0; m < pairs; m++) {
        float* mine = found + m * CHUNK;
        if (a.softcap > 0)
            for (int v = first; v < stop; v += LANES)
                store(mine + v, a.softcap * hyperbolic_tangent(load(mine + v) / a.softcap));
        if (place.bias)
            for (int v = first; v < stop; v += LANES) store(mine + v, load(mine + v) + load(from.bias + v));
        if (!clear) hide(queries, m / each, from, place.window, mine);
    }
}

// Scores [M, C] become weights; each pair's maximum and sum.  A pair that sees nothing has weights of 0.
template <class T>
void weights_of(float* found, int pairs, float* most, float* total, Asking& asking) {
    for (int m = 0; m < pairs; m++) {
        vf high = load(found + m * CHUNK);
        for (int v = LANES; v < CHUNK; v += LANES) high = larger(high, load(found + m * CHUNK + v));
        most[m] = top(high);
    }
    for (int m = 0; m < pairs; m++) {
        float* mine = found + m * CHUNK;
        vf added = vf{};
        asking.turn();
        for (int v = 0; v < CHUNK; v += LANES) {  // of two that are -inf the difference is no number, whose exponential is 0 here
            vf weight = exponential(load(mine + v) - most[m]);
            if constexpr (T::PAIRS) weight = T::weight(weight);
            store(mine + v, weight);
            added += weight;
        }
        total[m] = sum(added);
    }
    for (int m = pairs; m % LANES; m++) most[m] = NEVER, total[m] = 0.0f;
}

// Turns of an item's work with a chunk: until its scores are weights, and after that.
struct Turns {
    int64_t before, after;
};
template <class T>
Turns turns_of(int dim, int kv_heads, int pairs) {
    const auto parts = [&](int most) { return static_cast<int64_t>(kv_heads) * ((pairs / kv_heads + most - 1) / most); };
    const auto steps = [&](int each) { return (dim + each - 1) / each; };
    const int64_t squares = static_cast<int64_t>(kv_heads) * (CHUNK / LANES) * (dim / (LANES * T::PER));
    return {squares + parts(SCORE_ROWS) * (CHUNK / KEY_PART) * steps(ASKED) + pairs,
            parts(MIX_ROWS) * steps(MIX_VECTORS * LANES) * (CHUNK / ASKED)};
}

// With so few pairs memory's speed binds, and lines of all of the next chunk are asked for, into the second cache; with more, those of
// what is read next, into the first.
inline constexpr int FEW_PAIRS = 16;

// next: the chunk after it, of the same item or of the one that comes after, or null.  next_head: the first kv head of that item.
// begins: whether no chunk was before it.
template <class T>
void one_chunk(const Attend& a, const Place& place, const Queries& queries, const Item& item, const Entries& from, const Entries* next,
               int next_head, bool begins, Turns turns, State& state) {
    const int each = item.rows * (a.heads / a.kv_heads), pairs = item.kv_heads * each;  // pairs of a kv head, and of all
    const int64_t one = T::bytes(a.dim), keys = keys_at<T>(a, place) + item.kv_head * one, values = keys + layer_bytes<T>(a, place);
    const int64_t further = (next_head - item.kv_head) * one;
    alignas(64) float found[QUERY_ROWS * CHUNK], most[QUERY_ROWS], total[QUERY_ROWS], before[QUERY_ROWS], now[QUERY_ROWS];
    const bool few = pairs <= FEW_PAIRS;
    Asking asking(item.kv_heads * one, a.kv_heads * one, !few);
    if (begins || !few) asking.add(from, values);
    if (next && few) asking.add(*next, keys + further), asking.add(*next, values + further);
    asking.spread(few ? turns.before + turns.after : turns.before);
    for (int h = 0; h < item.kv_heads; h++)
        score<T>(a, place, queries, item.rows, from, (item.kv_head + h) * one, h * each, found + h * each * CHUNK, asking);
    weights_of<T>(found, pairs, most, total, asking);
    for (int m = 0; m < pairs; m += LANES) shares(state, most, total, m, before, now);
    if (!few) {
        asking = Asking(item.kv_heads * one, a.kv_heads * one, true);
        if (next) asking.add(*next, keys + further);
        asking.spread(turns.after);
    }
    int first, stop;
    seen_parts(queries, from, first, stop);
    for (int h = 0; h < item.kv_heads; h++) {
        if (T::SCALED) {
            alignas(64) float scales[CHUNK];
            for (int e = 0; e < CHUNK; e++) scales[e] = T::scale(from.rows[e] + values + h * one, a.dim);
            for (int m = h * each; m < (h + 1) * each; m++)
                for (int v = first; v < stop; v += LANES) store(found + m * CHUNK + v, load(found + m * CHUNK + v) * load(scales + v));
        }
        alignas(64) uint32_t words[T::PAIRS ? QUERY_ROWS * CHUNK / 2 : 1];
        float units[QUERY_ROWS];
        if constexpr (T::PAIRS)
            for (int m = h * each; m < (h + 1) * each; m++)
                units[m] = T::round(found + m * CHUNK, CHUNK, reinterpret_cast<uint16_t*>(words + m * (CHUNK / 2)));
        each_part<MIX_ROWS>(each, [&](auto count, int m) {
            m += h * each;
            float* mixed = state.mixed + m * a.dim;
            if constexpr (T::PAIRS)
                paired_mix<T, count.value>(from, values + h * one, words + m * (CHUNK / 2), units + m, first, stop, before + m, now + m,
                                           a.dim, mixed, asking);
            else
                mix<T, count.value>(from, values + h * one, found + m * CHUNK, first, stop, before + m, now + m, a.dim, mixed, asking);
        });
    }
}

}  // namespace weft::WEFT_ISA
