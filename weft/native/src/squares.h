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

// Where a register's pairs begin, from `pair` on: of more pairs than it holds, the last ones are those that it holds, some of them once more.
WEFT_INLINE int begins_at(int pair, int each) { return each < MATRIX_ROWS ? 0 : std::min(pair, each - MATRIX_ROWS); }

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
            for (int i = 0; i < LANES; i++) store_bits(words + (line * LANES + i) * QUERY_ROWS + m, turned[i]);
        }
    }
}

// Whether entries [e, e + 16) lie behind each other.
WEFT_INLINE bool beside_each_other(const Entries& from, int e, int64_t apart) {
    const auto ways = _mm512_mullo_epi64(_mm512_set1_epi64(apart), _mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7));
    const auto begin = _mm512_add_epi64(_mm512_set1_epi64(reinterpret_cast<int64_t>(from.rows[e])), ways);
    const auto low = _mm512_cmpneq_epi64_mask(_mm512_loadu_si512(from.rows + e), begin);
    const auto high = _mm512_cmpneq_epi64_mask(_mm512_loadu_si512(from.rows + e + 8), _mm512_add_epi64(begin, _mm512_set1_epi64(8 * apart)));
    return !(low | high);
}

// Scores of a chunk's entries with an item's pairs, in steps that are taken between other work: what waits for registers leaves most of a
// core idle.  A step multiplies a line of KEY_PART entries with a register's pairs.
class Scores {
  public:
    alignas(LINE_BYTES) float found[CHUNK * QUERY_ROWS];  // [entries, pairs], rows `stride` apart
    int first = 0, stop = 0;                              // entries that have any
    int64_t stride = 0;
    bool near[CHUNK / MATRIX_ROWS];  // whether sixteen entries lie behind each other

    // each: pairs of a kv head.  offset: of the first one's keys.  apart: between entries that lie behind each other.
    void begin(const Queries& queries, const Entries& from, int kv_heads, int each, int dim, int64_t offset, int64_t apart) {
        seen_parts(queries, from, first, stop);
        this->queries = queries.words, entries = &from, heads = kv_heads;
        this->each = each, this->dim = dim, this->offset = offset, this->apart = apart;
        stride = kv_heads * each > LANES ? QUERY_ROWS : LANES;
        head = 0, entry = first, pair = 0, line = 0;
        for (int e = first; e < stop; e += MATRIX_ROWS) near[e / MATRIX_ROWS] = beside_each_other(from, e, apart);
    }
    WEFT_INLINE void step() {
        if (head == heads) return;
        if (line == 0) {
            if (pair == 0) place();
            clear_register<0>(), clear_register<1>();
        }
        const int at = head * each + begins_at(pair, each);
        load_register<3>(queries + line * MATRIX_ROWS * QUERY_ROWS + at, QUERY_ROWS * 4);
        load_register<2>(keys[0] + line * LINE_BYTES, wide[0]), multiply_registers<Halves, 0, 2, 3>();
        load_register<2>(keys[1] + line * LINE_BYTES, wide[1]), multiply_registers<Halves, 1, 2, 3>();
        if (++line < dim / LINE_VALUES) return;
        float* out = found + entry * stride + at;
        store_register<0>(out, stride * 4), store_register<1>(out + MATRIX_ROWS * stride, stride * 4);
        line = 0, pair += MATRIX_ROWS;
        if (pair < each) return;
        pair = 0, entry += KEY_PART;
        if (entry == stop) entry = first, head++;
    }
    void finish() {
        while (head < heads) step();
    }
    int steps() const { return (heads - head) * ((stop - first) / KEY_PART) * ((each + MATRIX_ROWS - 1) / MATRIX_ROWS) * (dim / LINE_VALUES); }

  private:
    void place() {
        const int64_t bytes = dim * 2, from = offset + head * bytes;
        for (int i = 0; i < 2; i++) {
            const int e = entry + i * MATRIX_ROWS;
            keys[i] = entries->rows[e] + from, wide[i] = apart;
            if (near[e / MATRIX_ROWS]) continue;
            char* room = copied + i * MATRIX_ROWS * bytes;
            for (int r = 0; r < MATRIX_ROWS; r++) std::memcpy(room + r * bytes, entries->rows[e + r] + from, static_cast<size_t>(bytes));
            keys[i] = room, wide[i] = bytes;
        }
    }

    const uint32_t* queries = nullptr;
    const Entries* entries = nullptr;
    int heads = 0, each = 0, dim = 0, head = 0, entry = 0, pair = 0, line = 0;
    int64_t offset = 0, apart = 0;
    const char* keys[2] = {};
    int64_t wide[2] = {};
    alignas(LINE_BYTES) char copied[KEY_PART * MAX_DIM * 2];
};

// Asks memory for keys or values of a chunk, into the second cache, a few lines at a time between other work, in the order in which they
// are read: sixteen entries' first lines with a head, and so on.  What is asked for in bursts holds the places of a core in which lines of
// the second cache arrive, and all of them wait.
class Ahead {
  public:
    // from: the chunk, or null for none.  part: entries of which a line is read before the next one.  offset: of the first of `heads`.
    // lines: of an entry with one of them.
    Ahead(const Entries* from, int part, int64_t offset, int heads, int lines, int64_t apart)
        : from(from), part(part), heads(heads), lines(lines), offset(offset), apart(apart) {
        if (!from) return;
        whole_parts(*from, first, stop);
        this->part = std::min(part, stop - first), entry = first, until = first + this->part;
    }

    // Goes to the next sixteen lines.
    WEFT_INLINE void next() {
        at = reinterpret_cast<const char*>(this), step = 0;  // what is near costs nothing
        if (!from || head == heads) return;
        const int64_t mine = offset + (head * lines + line) * LINE_BYTES;
        at = from->rows[entry] + mine;
        if (from->rows[entry + MATRIX_ROWS - 1] - from->rows[entry] == (MATRIX_ROWS - 1) * apart) step = apart;
        else  // entries far from each other at once
            for (int i = 0; i < MATRIX_ROWS; i++) __builtin_prefetch(from->rows[entry + i] + mine, 0, 2);
        if ((entry += MATRIX_ROWS) < until) return;
        if (++line < lines) {
            entry = until - part;
            return;
        }
        line = 0;
        if (until < stop) until += part;
        else head++, entry = first, until = first + part;
    }
    template <int N>
    WEFT_INLINE void ask() {
#pragma GCC unroll 16
        for (int i = 0; i < N; i++, at += step) __builtin_prefetch(at, 0, 2);
    }

  private:
    const Entries* from;
    int part, heads, lines, first = 0, stop = 0, until = 0;  // of entries: all that are read, and the part that is
    int head = 0, line = 0, entry = 0;
    int64_t offset, apart, step = 0;
    const char* at = reinterpret_cast<const char*>(this);
};

// Makes scores of what pairs [m, m + LANES) see of entries [first, stop): soft caps, biases, and what is hidden is -inf.  Their maxima.
WEFT_INLINE vf seen_scores(const Attend& a, const Place& place, const Queries& queries, const Item& item, const Entries& from, bool clear,
                           int m, int first, int stop, float* found, int64_t stride) {
    const int each = a.heads / a.kv_heads, pairs = item.kv_heads * item.rows * each;
    const bool simple = queries.tree_first < 0 && !queries.visible;
    vi last{}, gone{};
    for (int i = 0; i < LANES && !clear && simple; i++) {
        const int64_t position = queries.positions[(m + i < pairs ? m + i : 0) / each % item.rows];
        last[i] = static_cast<int32_t>(position < INT32_MAX ? position : INT32_MAX - 1);
        gone[i] = static_cast<int32_t>(place.window && position >= place.window ? position - place.window : -1);
    }
    if (clear && !(a.softcap > 0) && !place.bias) {
        vf most[4] = {all(NEVER), all(NEVER), all(NEVER), all(NEVER)};
        for (int e = first; e < stop; e += 4)
            for (int i = 0; i < 4; i++) most[i] = larger(load(found + (e + i) * stride + m), most[i]);
        return larger(larger(most[0], most[1]), larger(most[2], most[3]));
    }
    vf high = all(NEVER);
    for (int e = first; e < stop; e++) {
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
        high = larger(score, high);  // in this order what is no number is passed over
    }
    return high;
}

// e^x of what is not above 0, in bfloat16 as bits of a float, within about half a unit of that; 0 below -87, for -inf and what is no number.
// As `exponential`, with no more steps than this needs.
WEFT_INLINE vu rounded_weight(vf x) {
    const vi alive = x > -87.0f;
    const auto [whole, power] = sixteenths(x);
    const vf rest = x - whole * 0.043321698784996581f;
    const vf found = power * (rest * (0.5f * rest + 1.0f)) + power;
    const vu bits = (reinterpret_cast<vu>(found) + 0x8000u) & 0xffff0000u;
    return alive ? bits : vu{};
}

// Weights of LANES pairs with entries [first, stop), as words of two entries each: [LANES, C / 2].  Their sums.  turn: is called once for
// eight entries, lines: for two.
template <class Turn, class Lines>
WEFT_INLINE vf square_weights(const float* found, int64_t stride, vf high, int first, int stop, uint32_t* words, const Turn& turn, const Lines& lines) {
    alignas(LINE_BYTES) vu pairs[CHUNK / 2];
    vf even = vf{}, odd = vf{};
    for (int e = first; e < stop; e += 8) {
        turn();
        const float* mine = found + e * stride;
#pragma GCC unroll 4
        for (int i = 0; i < 8; i += 2, mine += 2 * stride) {
            const vu one = rounded_weight(load(mine) - high), other = rounded_weight(load(mine + stride) - high);
            even += reinterpret_cast<vf>(one), odd += reinterpret_cast<vf>(other);
            pairs[(e + i) / 2] = other | one >> 16;
            lines(i);
        }
    }
    for (int e = first; e < stop; e += 2 * LANES) {
        const char* rows[LANES];
        vu turned[LANES];
        for (int i = 0; i < LANES; i++) rows[i] = reinterpret_cast<const char*>(pairs + e / 2 + i);
        load_turned(rows, 0, turned);
        for (int i = 0; i < LANES; i++) store_bits(words + i * (CHUNK / 2) + e / 2, turned[i]);
    }
    return even + odd;
}

// weights [pairs, C / 2] of a register times values, words [C / 2, 2 * LANES] of two entries each, of which those of [first, stop) count:
// [pairs, 2 * LANES], in steps as those of scores.
class Mixing {
  public:
    alignas(LINE_BYTES) float sums[2 * MATRIX_ROWS][2 * LANES];  // of a kv head's pairs

    void begin(const uint32_t* weights, const uint32_t* values, int each, int first, int stop) {
        this->weights = weights, this->values = values, this->each = each, this->first = first / 2, this->stop = stop / 2;
        pair = 0, at = this->first;
    }
    WEFT_INLINE void step() {
        if (pair >= each) return;
        const int begin = begins_at(pair, each);
        if (at == first) clear_register<4>(), clear_register<5>();
        load_register<6>(weights + begin * (CHUNK / 2) + at, CHUNK / 2 * 4);
        load_register<7>(values + at * 2 * LANES, 2 * LINE_BYTES), multiply_registers<Halves, 4, 6, 7>();
        load_register<7>(values + at * 2 * LANES + LANES, 2 * LINE_BYTES), multiply_registers<Halves, 5, 6, 7>();
        at += LANES;
        if (at < stop) return;
        store_register<4>(sums[begin], 2 * LINE_BYTES), store_register<5>(sums[begin] + LANES, 2 * LINE_BYTES);
        at = first, pair += MATRIX_ROWS;
    }
    void finish() {
        while (pair < each) step();
    }

  private:
    const uint32_t *weights = nullptr, *values = nullptr;
    int each = 0, first = 0, stop = 0, pair = 0, at = 0;
};

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

// As `one_chunk`, with `square_registers`.  mine: the chunk's scores; next: those of the item's next chunk, which are computed meanwhile.
// keys: those that are asked for, of the chunk behind that one, which may be another item's.
template <class T>
void square_chunk(const Attend& a, const Place& place, const Queries& queries, const Item& item, const Entries& from, Ahead keys, Scores& mine,
                  Scores& next, State& state) {
    const int each = item.rows * (a.heads / a.kv_heads), pairs = item.kv_heads * each, parts = a.dim / (2 * LANES);
    const int first = mine.first, stop = mine.stop;
    const int64_t one = T::bytes(a.dim), apart = a.kv_heads * one, stride = mine.stride;
    const int64_t offset = keys_at<T>(a, place) + layer_bytes<T>(a, place) + item.kv_head * one;
    float most[QUERY_ROWS], total[QUERY_ROWS], before[QUERY_ROWS], now[QUERY_ROWS];
    alignas(LINE_BYTES) uint32_t weights[QUERY_ROWS * CHUNK / 2];
    const bool clear = all_seen(queries, from, place.window);
    Ahead values(&from, CHUNK, offset, item.kv_heads, parts, apart);
    // Steps of the next scores while weights with eight entries are made; sixteen lines of values while those with four or with two are.
    const int eights = (pairs + LANES - 1) / LANES * ((stop - first) / 8), steps = (next.steps() + eights - 1) / eights;
    const int sixteens = item.kv_heads * parts * ((stop - first) / MATRIX_ROWS);
    const int times = sixteens <= 2 * eights ? 0 : (sixteens + 4 * eights - 1) / (4 * eights);
    const auto turn = [&] {
        for (int i = 0; i < steps; i++) next.step();
    };
    const auto lines = [&](int i) {
        if (!times && i % 4 == 0) values.next();
        if (!times) return values.ask<MATRIX_ROWS / 2>();
        for (int t = 0; t < times; t++) values.next(), values.ask<MATRIX_ROWS>();
    };
    for (int m = 0; m < pairs; m += LANES) {
        const vf high = seen_scores(a, place, queries, item, from, clear, m, first, stop, mine.found, stride);
        store(most + m, high);
        store(total + m, square_weights(mine.found + m, stride, high, first, stop, weights + m * (CHUNK / 2), turn, lines));
        for (int i = pairs; i < m + LANES; i++) most[i] = NEVER, total[i] = 0.0f;
        shares(state, most, total, m, before, now);
    }
    next.finish();
    alignas(LINE_BYTES) uint32_t words[2][CHUNK * LANES];
    Mixing mixing;
    float* behind = nullptr;  // where what `mixing` gives goes, of pairs [top, top + each)
    int top = 0, which = 0;
    const auto joins = [&] {
        mixing.finish();
        for (int r = 0; r < each; r++)
            for (int d = 0; d < 2 * LANES; d += LANES) {
                float* to = behind + r * a.dim + d;
                store(to, joined(load(to), before[top + r], load(mixing.sums[r] + d), now[top + r]));
            }
    };
    for (int h = 0; h < item.kv_heads; h++)
        for (int part = 0; part < parts; part++, which ^= 1) {
            const int64_t at = offset + h * one + part * LINE_BYTES;
            uint32_t* to = words[which] + first * LANES;
            const auto lay = [&](const char* row, const char* other) {
                vu value[2];
                HalfPairs::values(row, other, 0, value);
                store_bits(to, value[0]), store_bits(to + LANES, value[1]);
                to += 2 * LANES;
                keys.ask<2>();
            };
            for (int e = first; e < stop; e += MATRIX_ROWS) {
                keys.next();
                if (behind && e % KEY_PART)
                    for (int m = 0; m < each; m += MATRIX_ROWS) mixing.step();
                if (mine.near[e / MATRIX_ROWS]) {
                    const char* row = from.rows[e] + at;
#pragma GCC unroll 8
                    for (int i = 0; i < MATRIX_ROWS; i += 2, row += 2 * apart) lay(row, row + apart);
                } else
                    for (int i = e; i < e + MATRIX_ROWS; i += 2) lay(from.rows[i] + at, from.rows[i + 1] + at);
            }
            if (behind) joins();
            mixing.begin(weights + h * each * (CHUNK / 2), words[which], each, first, stop);
            behind = state.mixed + h * each * a.dim + part * 2 * LANES, top = h * each;
        }
    joins();
}
#endif

// Calls `run` with the kind of rows that are `stored`, as their products are computed here; false where that is left to the instruction
// set below.
template <class Run>
WEFT_INLINE bool with_rows(Format stored, [[maybe_unused]] int dim, const Run& run) {
#if defined(WEFT_MATRIX)
    if (stored == Format::BF16 && HalfSquares::fit(dim)) return run(HalfSquares{}), true;
#elif defined(__AVX512BF16__)
    if (stored == Format::BF16 && HalfPairs::fit(dim)) return run(HalfPairs{}), true;
#elif defined(__AVX512VNNI__)
    if (stored == Format::I8 && BytePairs::fit(dim)) return run(BytePairs{}), true;
#endif
#if defined(WEFT_BELOW)
    return false;
#else
    if (stored == Format::F32) run(WideRows{});
    else if (stored == Format::BF16) run(HalfRows{});
    else run(ByteRows{});
    return true;
#endif
}

}  // namespace weft::WEFT_ISA
