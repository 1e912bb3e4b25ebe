// Which entries get the attention: probabilities of chosen rows, summed by entry.  Included by the files of the instruction sets.
//
// Each probability is counted as a whole number of 2^-30: such sums are exact, so they are the same in any order.
#pragma once

#include "attend.h"

namespace weft::WEFT_ISA {

// Probabilities of one chunk as whole parts; to the nearest, ties to even.
WEFT_INLINE vi parts_of(vf probability) {
    const vf x = probability * 1073741824.0f, half = all(8388608.0f);  // 2^30; floats of 2^23 and more are whole
    return __builtin_convertvector(select(x < half, (x + half) - half, x), vi);
}

// What `count` rows of one sequence, which count and see what dense attention sees, give to its entries with one kv head.
template <class T>
void weigh_in(const Attend& a, const Place& place, const Seen& seen, const Weigh& to, const Item& item, const int32_t* rows) {
    const int64_t s = item.sequence, first = place.first[s], end = first + place.lengths[s];
    const int64_t head_bytes = item.kv_head * T::bytes(a.dim), row_bytes = a.kv_heads * T::bytes(a.dim);
    const int each = a.heads / a.kv_heads, pairs = item.rows * each;
    Queries queries;
    ask<T>(a, place, seen, item, rows, queries);
    float most[QUERY_ROWS], total[QUERY_ROWS];
    for (int m = 0; m < pairs; m++) most[m] = NEVER, total[m] = 0.0f;
    for (int turn = 0; turn < 2; turn++) {
        for (int64_t start = first / CHUNK * CHUNK; start < end; start += CHUNK) {
            Entries from;
            from.partly = false;
            if (!locate(place, s, start, row_bytes, from) || from.lowest > queries.highest) continue;
            Asking asking;
            alignas(64) float found[QUERY_ROWS * CHUNK];
            score<T>(a, place, queries, item.rows, from, head_bytes, 0, found, asking);
            for (int m = 0; m < pairs && turn == 0; m++) {
                const float* mine = found + m * CHUNK;
                vf high = load(mine), added = vf{};
                for (int v = LANES; v < CHUNK; v += LANES) high = larger(high, load(mine + v));
                const float now = top(high), next = now > most[m] ? now : most[m];
                if (next == NEVER) continue;
                for (int v = 0; v < CHUNK; v += LANES) added += exponential(load(mine + v) - next);
                float share[LANES] = {};
                share[0] = most[m] - next;
                store(share, exponential(load(share)));
                total[m] = total[m] * share[0] + sum(added);
                most[m] = next;
            }
            for (int r = 0; r < item.rows && turn == 1; r++) {
                int64_t parts[CHUNK] = {};
                for (int m = r * each; m < (r + 1) * each; m++) {
                    if (most[m] == NEVER) continue;
                    const float norm = most[m] + std::log(total[m]);
                    for (int v = 0; v < CHUNK; v += LANES) {
                        int32_t some[LANES];
                        const vi whole = parts_of(exponential(load(found + m * CHUNK + v) - norm));
                        std::memcpy(some, &whole, sizeof some);
                        for (int i = 0; i < LANES; i++) parts[v + i] += some[i];
                    }
                }
                int64_t* out = to.out + (to.sums[rows[item.first + r]] * a.kv_heads + item.kv_head) * to.entries;
                for (int e = 0; e < CHUNK; e++)
                    if (from.positions[e] != INT32_MAX) out[start + e - first] += parts[e];
            }
        }
    }
}

inline void weigh(const Attend& a, const Place& place, const Seen& seen, const Weigh& to, const Item& item, const int32_t* rows) {
#if !defined(WEFT_MATRIX)  // of bfloat16 queries are rounded there as they are below
    if (with_rows(place.stored, a.dim, [&](auto kind) { weigh_in<decltype(kind)>(a, place, seen, to, item, rows); })) return;
#endif
#if defined(WEFT_BELOW)
    below().weigh(a, place, seen, to, item, rows);
#endif
}

}  // namespace weft::WEFT_ISA
