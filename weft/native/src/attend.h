// Attention over paged keys and values.  Included by the files of the instruction sets.
//
// An item is some rows of one sequence with one kv head, or with a few: query heads that share one read each key once.  Its entries are
// taken in chunks, which begin at absolute multiples of CHUNK; each is an unfinished softmax of its own, and those are merged in
// ascending order (Milakov and Gimelshein, arXiv:1805.02867), by the item itself or, where they were computed apart, by `merge`.
// A chunk of which a row sees nothing leaves its result as it was.  So a row's bits depend on the entries that it sees, and on
// nothing else.
//
// Legend.  M: (row, head) pairs of an item.  D: head_dim.
#pragma once

#include "chunk.h"
#include "squares.h"

namespace weft::WEFT_ISA {

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
#if defined(WEFT_MATRIX)
    if constexpr (T::MATRIX) square_queries(queries.q, item.kv_heads * item.rows * each, a.dim, queries.words);
#endif
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

// A chunk, counted from its first one, of the item after `item`, which asks for its lines: else each item waits for its own.  Whether it is
// worth that.
template <class T>
bool later_chunk(const Attend& a, const Place& place, const Item& item, const Item* after, int64_t chunk, Entries& found) {
    if (!after || after->unit >= 0 || after->kv_heads != item.kv_heads || after->chunk + chunk >= after->chunk_stop) return false;
    if (place.window && place.lengths[after->sequence] > place.window) return false;  // the first ones may be out of sight
    found.partly = false;
    return locate(place, after->sequence, (after->chunk + chunk) * CHUNK, a.kv_heads * T::bytes(a.dim), found);
}

#if defined(WEFT_MATRIX)
// The chunks of an item in matrix registers: scores of one are computed while those of the chunk before become weights.  begins: is called
// with each chunk before it is taken, ends: after it.
template <class T, class Begins, class Ends>
void square_walk(const Attend& a, const Place& place, const Queries& queries, const Item& item, const Item* after, State& state,
                 const Begins& begins, const Ends& ends) {
    const int each = item.rows * (a.heads / a.kv_heads);
    const Registers registers = square_registers(each);
    const int64_t one = T::bytes(a.dim), apart = a.kv_heads * one, keys = keys_at<T>(a, place);
    Walk<T> walk(a, place, queries, item);
    Entries chunks[3];  // this one, the next, and the one behind it, in turn, which may be of the next item
    Scores scores[2];
    const auto score = [&](Scores& to, const Entries& from) {
        to.begin(queries, from, item.kv_heads, each, a.dim, keys + item.kv_head * one, apart);
    };
    int known = 0;
    while (known < 2 && walk.next(chunks[known])) known++;
    if (known == 0) return;
    score(scores[0], chunks[0]);
    scores[0].finish();
    int64_t others = 0;  // chunks of the next item that were asked for
    for (int at = 0, turn = 0; known > 0; at = (at + 1) % 3, turn++) {
        Entries& behind = chunks[(at + 2) % 3];
        Scores &mine = scores[turn % 2], &next = scores[(turn + 1) % 2];
        const bool more = known == 2 && walk.next(behind);
        const bool found = more || later_chunk<T>(a, place, item, after, others++, behind);
        const int head = more || !found ? item.kv_head : after->kv_head;
        if (known == 2) score(next, chunks[(at + 1) % 3]);
        begins(chunks[at]);
        const Ahead ahead(found ? &behind : nullptr, KEY_PART, keys + head * one, item.kv_heads, a.dim / LINE_VALUES, apart);
        square_chunk<T>(a, place, queries, item, chunks[at], ahead, mine, next, state);
        ends();
        known += more - 1;
    }
}
#endif

template <class T>
void attend_in(const Attend& a, const Place& place, const Seen& seen, const Item& item, const Item* after, const int32_t* rows,
               float* partials) {
    const int each = a.heads / a.kv_heads, pairs = item.kv_heads * item.rows * each;
    Queries queries;
    ask<T>(a, place, seen, item, rows, queries);
    State state;
    state.clear(pairs, a.dim);
    const auto mixed_of = [&](int m, float* out) {
#if defined(WEFT_MATRIX)
        if constexpr (T::MATRIX) return in_order(state.mixed + m * a.dim, a.dim, out);
#endif
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
    int64_t due = item.chunk;
    const auto begins = [&](const Entries& from) {
        for (; item.partial >= 0 && due < from.start / CHUNK; due++) put_apart();  // nothing was seen of these
    };
    const auto ends = [&] {
        if (item.partial >= 0) put_apart(), due++;
    };
#if defined(WEFT_MATRIX)
    if constexpr (T::MATRIX) square_walk<T>(a, place, queries, item, after, state, begins, ends);
    else
#endif
    {
        Walk<T> walk(a, place, queries, item);
        Entries chunks[2];
        const Turns turns = turns_of<T>(a.dim, item.kv_heads, pairs);
        bool more = walk.next(chunks[0]);
        for (int turn = 0, count = 0; more; turn ^= 1, count++) {
            const Entries& from = chunks[turn];
            more = walk.next(chunks[turn ^ 1]);
            const bool another = more || later_chunk<T>(a, place, item, after, 0, chunks[turn ^ 1]);
            const int next_head = more || !after ? item.kv_head : after->kv_head;
            begins(from);
            one_chunk<T>(a, place, queries, item, from, another ? &chunks[turn ^ 1] : nullptr, next_head, count == 0, turns, state);
            ends();
        }
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

// after: the item that the thread comes to next, or null.
inline void attend(const Attend& a, const Place& place, const Seen& seen, const Item& item, const Item* after, const int32_t* rows,
                   float* partials) {
    if (with_rows(place.stored, a.dim, [&](auto kind) { attend_in<decltype(kind)>(a, place, seen, item, after, rows, partials); })) return;
#if defined(WEFT_BELOW)
    below().attend(a, place, seen, item, after, rows, partials);
#endif
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
