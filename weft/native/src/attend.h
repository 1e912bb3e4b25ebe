// Attention over paged keys and values.  Included by the files of the instruction sets.
//
// An item is some rows of one sequence with one kv head, or with a few: query heads that share one read each key once.  Its entries are
// taken in chunks, which begin at absolute multiples of CHUNK; each is an unfinished softmax of its own, and those are merged in
// ascending order (Milakov and Gimelshein, arXiv:1805.02867), by the item itself or, where they were computed apart, by `merge`.
// A chunk of which a row sees nothing leaves its result as it was.  So a row's bits depend on the entries that it sees, and on
// nothing else.
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
    for (int e = 0; e < CHUNK; e++) {
        const int64_t gap = position - from.positions[e];
        bool hidden = gap < 0 || (window && gap >= window);
        const int64_t guess = from.start + e - queries.tree_first;
        if (queries.tree_first >= 0 && guess >= 0 && queries.tree[row] != ~uint64_t{0})
            hidden = hidden || guess >= 64 || !(queries.tree[row] >> guess & 1);
        if (queries.visible && from.positions[e] != INT32_MAX) hidden = hidden || !queries.visible[(from.start + e) / queries.block];
        if (hidden) scores[e] = NEVER;
    }
}

// Entries [first, stop) of a chunk, in whole parts, beyond which no row of the item sees any.
WEFT_INLINE void seen_parts(const Queries& queries, const Entries& from, int& first, int& stop) {
    first = from.low / KEY_PART * KEY_PART, stop = (from.high + KEY_PART - 1) / KEY_PART * KEY_PART;
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
    const bool clear = !from.partly && from.highest <= queries.lowest && (!place.window || queries.highest - from.lowest < place.window) &&
                       queries.tree_first < 0 && from.low == 0 && from.high == CHUNK;
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

// next: the chunk after it, or null.  begins: whether no chunk was before it.
template <class T>
void one_chunk(const Attend& a, const Place& place, const Queries& queries, const Item& item, const Entries& from, const Entries* next,
               bool begins, Turns turns, State& state) {
    const int each = item.rows * (a.heads / a.kv_heads), pairs = item.kv_heads * each;  // pairs of a kv head, and of all
    const int64_t one = T::bytes(a.dim), keys = keys_at<T>(a, place) + item.kv_head * one, values = keys + layer_bytes<T>(a, place);
    alignas(64) float found[QUERY_ROWS * CHUNK], most[QUERY_ROWS], total[QUERY_ROWS], before[QUERY_ROWS], now[QUERY_ROWS];
    const bool few = pairs <= FEW_PAIRS;
    Asking asking(item.kv_heads * one, a.kv_heads * one, !few);
    if (begins || !few) asking.add(from, values);
    if (next && few) asking.add(*next, keys), asking.add(*next, values);
    asking.spread(few ? turns.before + turns.after : turns.before);
    for (int h = 0; h < item.kv_heads; h++)
        score<T>(a, place, queries, item.rows, from, (item.kv_head + h) * one, h * each, found + h * each * CHUNK, asking);
    weights_of<T>(found, pairs, most, total, asking);
    for (int m = 0; m < pairs; m += LANES) shares(state, most, total, m, before, now);
    if (!few) {
        asking = Asking(item.kv_heads * one, a.kv_heads * one, true);
        if (next) asking.add(*next, keys);
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

inline void write(const Attend& a, int kv_head, int64_t row, int head, float most, float total, const float* mixed) {
    head += kv_head * (a.heads / a.kv_heads);
    float* out = a.out + row * a.out_stride + head * a.dim;
    if (a.lse) a.lse[row * a.heads + head] = total == 0 ? NEVER : most + std::log(total);
    const float share = total > 0 ? 1.0f / total : 0.0f;
    for (int d = 0; d < a.dim; d++) out[d] = mixed[d] * share;
}

template <class T>
void ask(const Attend& a, const Place& place, const Seen& seen, const Item& item, const int32_t* rows, Queries& queries) {
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
            if constexpr (T::PAIRS)
                for (int m = (h * item.rows + r) * each, i = 0; i < each; i++, m++)
                    queries.units[m] = paired_query<T>(queries.q + m * a.dim, a.dim, queries.words + m);
        }
    }
}

// The chunks of an item of which some row sees something, one after the other.
template <class T>
struct Walk {
    const Place& place;
    const Queries& queries;
    const Item& item;
    int64_t start, stop, row_bytes;

    Walk(const Attend& a, const Place& place, const Queries& queries, const Item& item)
        : place(place), queries(queries), item(item), start(item.chunk * CHUNK), stop(item.chunk_stop * CHUNK), row_bytes(a.kv_heads * T::bytes(a.dim)) {
        const int64_t end = place.first[item.sequence] + place.lengths[item.sequence];
        if (stop > end) stop = end;
    }
    bool next(Entries& found) {
        for (; start < stop; start += CHUNK) {
            if (!in_sight(queries, start, start + CHUNK < stop ? start + CHUNK : stop, found.partly)) continue;
            if (!locate(place, item.sequence, start, row_bytes, found) || found.lowest > queries.highest) continue;
            if (place.window && queries.lowest - found.highest >= place.window && queries.tree_first < 0) continue;
            start += CHUNK;
            return true;
        }
        return false;
    }
};

template <class T>
void attend_in(const Attend& a, const Place& place, const Seen& seen, const Item& item, const int32_t* rows, float* partials) {
    const int each = a.heads / a.kv_heads, pairs = item.kv_heads * item.rows * each;
    Queries queries;
    ask<T>(a, place, seen, item, rows, queries);
    State state;
    state.clear(pairs, a.dim);
    const auto mixed_of = [&](int m, float* out) {
        for (int d = 0; d < a.dim; d++) out[d] = state.mixed[m * a.dim + mixed_at<T>(d, a.dim)];
    };
    float* to = item.partial < 0 ? nullptr : partials + item.partial;
    const auto put_apart = [&] {  // and begin anew
        for (int m = 0; m < pairs; m++, to += 2 + static_cast<int64_t>(a.dim)) {
            to[0] = state.most[m], to[1] = state.total[m];
            mixed_of(m, to + 2);
        }
        state.clear(pairs, a.dim);
    };
    Walk<T> walk(a, place, queries, item);
    Entries chunks[2];
    const Turns turns = turns_of<T>(a.dim, item.kv_heads, pairs);
    int64_t due = item.chunk;
    bool more = walk.next(chunks[0]), begins = true;
    for (int turn = 0; more; turn ^= 1, begins = false) {
        const Entries& from = chunks[turn];
        more = walk.next(chunks[turn ^ 1]);
        if (item.partial >= 0)
            for (; due < from.start / CHUNK; due++) put_apart();  // nothing was seen of these
        one_chunk<T>(a, place, queries, item, from, more ? &chunks[turn ^ 1] : nullptr, begins, turns, state);
        if (item.partial >= 0) put_apart(), due++;
    }
    if (item.partial >= 0) {
        for (; due < item.chunk_stop; due++) put_apart();
        return;
    }
    for (int m = 0; m < pairs; m++) {
        float mixed[MAX_DIM];
        mixed_of(m, mixed);
        const int h = m / (item.rows * each), r = m / each % item.rows;
        write(a, item.kv_head + h, rows[item.first + r], m % each, state.most[m], state.total[m], mixed);
    }
}

inline void attend(const Attend& a, const Place& place, const Seen& seen, const Item& item, const int32_t* rows,
                   float* partials) {
    with_rows(place.stored, a.dim, [&](auto kind) { attend_in<decltype(kind)>(a, place, seen, item, rows, partials); });
}

inline void merge(const Attend& a, const Joined* list, int64_t count, const int64_t* places, const float* partials, Share share) {
    const int each = a.heads / a.kv_heads;
    State state;
    float before[QUERY_ROWS], now[QUERY_ROWS], most[QUERY_ROWS], total[QUERY_ROWS];
    for (int64_t i = share.index; i < count; i += share.count) {
        const Joined& one = list[i];
        state.clear(each, a.dim);
        for (int64_t p = one.first; p < one.first + one.parts; p++) {
            const float* from = partials + places[p];
            const int64_t apart = 2 + static_cast<int64_t>(a.dim);
            for (int h = 0; h < QUERY_ROWS; h++) {
                most[h] = h < each ? from[h * apart] : NEVER;
                total[h] = h < each ? from[h * apart + 1] : 0.0f;
            }
            for (int h = 0; h < each; h += LANES) shares(state, most, total, h, before, now);
            for (int h = 0; h < each; h++) {
                float* mixed = state.mixed + h * a.dim;
                const float* next = from + h * apart + 2;
                int d = 0;
                for (; d + LANES <= a.dim; d += LANES) store(mixed + d, joined(load(mixed + d), before[h], load(next + d), now[h]));
                for (; d < a.dim; d++) mixed[d] = joined(all(mixed[d]), before[h], all(next[d]), now[h])[0];
            }
        }
        for (int head = 0; head < each; head++) write(a, one.kv_head, one.row, head, state.most[head], state.total[head], state.mixed + head * a.dim);
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
