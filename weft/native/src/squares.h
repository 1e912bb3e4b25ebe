// A chunk of keys and values in matrix registers (AMX), in bfloat16 both ways: queries, and the weights of values, are rounded to it.
// Keys lie as registers want their rows, sixteen entries each where those lie behind each other; scores come out with a pair in each
// column, so that maxima and sums go over whole vectors.  Included by the files of the instruction sets.
//
// Legend.  M: (row, head) pairs of an item.  D: head_dim, in whole lines.  C: CHUNK.
#pragma once

#include "chunk.h"
#include "matrix.h"

namespace weft::WEFT_ISA {

#if defined(WEFT_MATRIX)
inline constexpr int LINE_VALUES = LINE_BYTES / 2;
static_assert(KEY_PART == 2 * MATRIX_ROWS);

struct HalfSquares : HalfRows {
    static constexpr bool MATRIX = true;
    static bool fit(int dim) { return dim % LINE_VALUES == 0; }
};

// Registers for pairs of which a kv head has `each`.  Scores: sums in 0 and 1, keys in 2, queries in 3, with as many columns as there are
// pairs.  Values: sums in 4 and 5, weights in 6, with as many rows, and values in 7.
inline Registers square_registers(int each) {
    const int64_t some = std::min(each, MATRIX_ROWS);
    Registers::Sizes sizes;
    for (const int i : {0, 1, 3}) sizes.set(i, MATRIX_ROWS, some * 4);
    sizes.set(2, MATRIX_ROWS), sizes.set(7, MATRIX_ROWS);
    for (const int i : {4, 5, 6}) sizes.set(i, some);
    return Registers(sizes);
}

// Queries [pairs, D] as words [D / 2] of bfloat16, QUERY_ROWS apart from each other.
inline void square_queries(const float* q, int pairs, int dim, uint32_t* words) {
    alignas(LINE_BYTES) uint16_t halves[QUERY_ROWS * MAX_DIM];
    for (int m = 0; m < pairs; m++) HalfPairs::round(q + m * dim, dim, halves + m * dim);
    for (int m = 0; m < pairs; m += LANES) {
        const char* rows[LANES];
        for (int i = 0; i < LANES; i++) rows[i] = reinterpret_cast<const char*>(halves + std::min(m + i, pairs - 1) * dim);
        for (int line = 0; line < dim / LINE_VALUES; line++) {
            vu turned[LANES];
            load_turned(rows, line * LINE_BYTES, turned);
            for (int i = 0; i < LANES; i++) *reinterpret_cast<vu_any*>(words + (line * LANES + i) * QUERY_ROWS + m) = turned[i];
        }
    }
}

// Lines of sixteen entries with one kv head, `apart` bytes from each other.
struct KeyRows {
    const char* at;
    int64_t apart;
};
// Whether entries [e, e + 16) lie behind each other.
WEFT_INLINE bool beside_each_other(const Entries& from, int e, int64_t apart) {
    bool found = true;
    for (int i = 1; i < MATRIX_ROWS; i++) found &= from.rows[e + i] - from.rows[e] == i * apart;
    return found;
}

// Scores of KEY_PART entries with a register's pairs, words [D / 2] that are QUERY_ROWS apart: [entries, pairs], rows `stride` apart.
WEFT_INLINE void square_scores(const KeyRows* keys, const uint32_t* queries, int dim, float* out, int64_t stride) {
    clear_register<0>(), clear_register<1>();
    for (int line = 0; line < dim / LINE_VALUES; line++) {
        load_register<3>(queries + line * MATRIX_ROWS * QUERY_ROWS, QUERY_ROWS * 4);
        load_register<2>(keys[0].at + line * LINE_BYTES, keys[0].apart), multiply_registers<Halves, 0, 2, 3>();
        load_register<2>(keys[1].at + line * LINE_BYTES, keys[1].apart), multiply_registers<Halves, 1, 2, 3>();
    }
    store_register<0>(out, stride * 4), store_register<1>(out + MATRIX_ROWS * stride, stride * 4);
}

// Makes scores of what pairs [m, m + LANES) see of entries [first, stop): soft caps, biases, and what is hidden is -inf.  Their maxima.
WEFT_INLINE vf seen_scores(const Attend& a, const Place& place, const Queries& queries, const Item& item, const Entries& from, bool clear,
                           int m, int first, int stop, float* found, int64_t stride, Asking& asking) {
    const int each = a.heads / a.kv_heads, pairs = item.kv_heads * item.rows * each;
    const bool simple = queries.tree_first < 0 && !queries.visible;
    vi last{}, gone{};
    for (int i = 0; i < LANES && !clear && simple; i++) {
        const int64_t position = queries.positions[(m + i < pairs ? m + i : 0) / each % item.rows];
        last[i] = static_cast<int32_t>(position < INT32_MAX ? position : INT32_MAX - 1);
        gone[i] = static_cast<int32_t>(place.window && position >= place.window ? position - place.window : -1);
    }
    vf high = all(NEVER);
    for (int e = first; e < stop; e++) {
        if (e % 8 == 0) asking.turn();
        float* mine = found + e * stride + m;
        vf score = load(mine);
        if (a.softcap > 0) score = a.softcap * hyperbolic_tangent(score / a.softcap);
        if (place.bias) score += from.bias[e];
        if (!clear && simple) {
            const vi position = vi{} + from.positions[e];
            score = select((position <= last) & (position > gone), score, all(NEVER));
        } else if (!clear) {
            for (int i = 0; i < LANES && m + i < pairs; i++)
                if (hidden(queries, (m + i) / each % item.rows, from, place.window, e)) score[i] = NEVER;
        }
        if (!clear || a.softcap > 0 || place.bias) store(mine, score);
        high = larger(high, score);
    }
    return high;
}

// Weights of LANES pairs with entries [first, stop), as words of two entries each: [LANES, C / 2].  Their sums.
WEFT_INLINE vf square_weights(const float* found, int64_t stride, vf high, int first, int stop, uint32_t* words, Asking& asking) {
    alignas(LINE_BYTES) vu pairs[CHUNK / 2];
    vf even = vf{}, odd = vf{};
    for (int e = first; e < stop; e += 2) {
        if (e % 8 == 0) asking.turn();
        const vf one = HalfPairs::weight(exponential(load(found + e * stride) - high));
        const vf other = HalfPairs::weight(exponential(load(found + (e + 1) * stride) - high));
        even += one, odd += other;
        pairs[e / 2] = reinterpret_cast<vu>(other) | reinterpret_cast<vu>(one) >> 16;
    }
    for (int e = first; e < stop; e += 2 * LANES) {
        const char* rows[LANES];
        vu turned[LANES];
        for (int i = 0; i < LANES; i++) rows[i] = reinterpret_cast<const char*>(pairs + e / 2 + i);
        load_turned(rows, 0, turned);
        for (int i = 0; i < LANES; i++) *reinterpret_cast<vu_any*>(words + i * (CHUNK / 2) + e / 2) = turned[i];
    }
    return even + odd;
}

// weights [pairs, C / 2] times values, words [C / 2, D] of two entries each, of which those of [first, stop) count: [pairs, D].
WEFT_INLINE void square_mix(const uint32_t* weights, const uint32_t* values, int first, int stop, int dim, float* out) {
    for (int d = 0; d < dim; d += 2 * LANES) {
        clear_register<4>(), clear_register<5>();
        for (int pair = first / 2; pair < stop / 2; pair += LANES) {
            load_register<6>(weights + pair, CHUNK / 2 * 4);
            load_register<7>(values + pair * dim + d, dim * 4), multiply_registers<Halves, 4, 6, 7>();
            load_register<7>(values + pair * dim + d + LANES, dim * 4), multiply_registers<Halves, 5, 6, 7>();
        }
        store_register<4>(out + d, dim * 4), store_register<5>(out + d + LANES, dim * 4);
    }
}

// Mixed values [D] in their own order.
WEFT_INLINE void in_order(const float* mixed, int dim, float* out) {
    alignas(LINE_BYTES) int32_t places[2 * LANES];
    for (int i = 0; i < 2 * LANES; i++) places[i] = paired_at(i);
    const auto low = _mm512_load_si512(places), high = _mm512_load_si512(places + LANES);
    for (int d = 0; d < dim; d += 2 * LANES) {
        const auto one = _mm512_loadu_ps(mixed + d), other = _mm512_loadu_ps(mixed + d + LANES);
        _mm512_storeu_ps(out + d, _mm512_permutex2var_ps(one, low, other));
        _mm512_storeu_ps(out + d + LANES, _mm512_permutex2var_ps(one, high, other));
    }
}

// As `one_chunk`, with `square_registers`.  What it writes is to stay in the first cache beside lines of keys and values: scores have no
// more room than they need, and values that of one kv head.
template <class T>
void square_chunk(const Attend& a, const Place& place, const Queries& queries, const Item& item, const Entries& from, const Entries* next,
                  int next_head, bool begins, State& state) {
    const int each = item.rows * (a.heads / a.kv_heads), pairs = item.kv_heads * each;
    const int64_t one = T::bytes(a.dim), keys = keys_at<T>(a, place) + item.kv_head * one, values = keys + layer_bytes<T>(a, place);
    const int64_t apart = a.kv_heads * one, further = (next_head - item.kv_head) * one, stride = pairs > LANES ? QUERY_ROWS : LANES;
    Asking asking(item.kv_heads * one, apart, false);
    if (begins) asking.add(from, values);
    if (next) asking.add(*next, keys + further), asking.add(*next, values + further);
    asking.spread(item.kv_heads * (CHUNK / MATRIX_ROWS + CHUNK / 16) + (pairs + LANES - 1) / LANES * (CHUNK / 4));
    int first, stop;
    seen_parts(queries, from, first, stop);
    alignas(LINE_BYTES) float found[CHUNK * QUERY_ROWS];
    alignas(LINE_BYTES) uint32_t words[MAX_DIM * CHUNK / 2];  // keys that were copied, or values
    bool near[CHUNK / MATRIX_ROWS];
    for (int e = first; e < stop; e += MATRIX_ROWS) near[e / MATRIX_ROWS] = beside_each_other(from, e, apart);
    // Of more pairs than a register holds, the last ones are those that it holds, some of them once more.
    const auto begin_of = [&](int m) { return each < MATRIX_ROWS ? 0 : std::min(m, each - MATRIX_ROWS); };
    for (int h = 0; h < item.kv_heads; h++) {
        const int64_t bytes = a.dim * 2, offset = keys + h * one;
        KeyRows rows[CHUNK / MATRIX_ROWS];
        for (int e = first, t = first / MATRIX_ROWS; e < stop; e += MATRIX_ROWS, t++) {
            asking.turn();
            char* room = reinterpret_cast<char*>(words) + e * bytes;
            rows[t] = near[t] ? KeyRows{from.rows[e] + offset, apart} : KeyRows{room, bytes};
            for (int i = 0; i < MATRIX_ROWS && !near[t]; i++) std::memcpy(room + i * bytes, from.rows[e + i] + offset, static_cast<size_t>(bytes));
        }
        for (int m = 0; m < each; m += MATRIX_ROWS)
            for (int e = first, at = h * each + begin_of(m); e < stop; e += KEY_PART)
                square_scores(rows + e / MATRIX_ROWS, queries.words + at, a.dim, found + e * stride + at, stride);
    }
    float most[QUERY_ROWS], total[QUERY_ROWS], before[QUERY_ROWS], now[QUERY_ROWS];
    alignas(LINE_BYTES) uint32_t weights[QUERY_ROWS * CHUNK / 2];
    const bool clear = all_seen(queries, from, place.window);
    for (int m = 0; m < pairs; m += LANES) {
        const vf high = seen_scores(a, place, queries, item, from, clear, m, first, stop, found, stride, asking);
        store(most + m, high), store(total + m, square_weights(found + m, stride, high, first, stop, weights + m * (CHUNK / 2), asking));
        for (int i = pairs; i < m + LANES; i++) most[i] = NEVER, total[i] = 0.0f;
        shares(state, most, total, m, before, now);
    }
    alignas(LINE_BYTES) float sums[MATRIX_ROWS * MAX_DIM];
    for (int h = 0; h < item.kv_heads; h++) {
        const int64_t offset = values + h * one;
        for (int e = first; e < stop; e += 2) {
            if (e % 16 == 0) asking.turn();
            for (int d = 0; d < a.dim; d += 2 * LANES) {
                vu value[2];
                HalfPairs::values(from.rows[e] + offset, from.rows[e + 1] + offset, d, value);
                for (int v = 0; v < 2; v++) *reinterpret_cast<vu_any*>(words + e / 2 * a.dim + d + v * LANES) = value[v];
            }
        }
        for (int m = 0; m < each; m += MATRIX_ROWS) {
            const int at = begin_of(m);
            square_mix(weights + (h * each + at) * (CHUNK / 2), words, first, stop, a.dim, sums);
            for (int r = m; r < std::min(each, at + MATRIX_ROWS); r++)
                for (int d = 0, pair = h * each + r; d < a.dim; d += LANES) {
                    float* mine = state.mixed + pair * a.dim + d;
                    store(mine, joined(load(mine), before[pair], load(sums + (r - at) * a.dim + d), now[pair]));
                }
        }
    }
}
#endif

// Calls `run` with the kind of rows that are `stored`, as their products are computed here.
template <class Run>
WEFT_INLINE void with_rows(Format stored, [[maybe_unused]] int dim, const Run& run) {
    if (stored == Format::F32) return run(WideRows{});
#if defined(WEFT_MATRIX)
    if (stored == Format::BF16 && HalfSquares::fit(dim)) return run(HalfSquares{});
#elif defined(__AVX512BF16__)
    if (stored == Format::BF16 && HalfPairs::fit(dim)) return run(HalfPairs{});
#endif
#if defined(__AVX512VNNI__)
    if (stored != Format::BF16 && BytePairs::fit(dim)) return run(BytePairs{});
#endif
    stored == Format::BF16 ? run(HalfRows{}) : run(ByteRows{});
}

}  // namespace weft::WEFT_ISA
