// Chunks of paged keys and values: where they lie, and products with them.  Included by the files of the instruction sets.
//
// Legend.  D: head_dim.  C: CHUNK.  E: KEY_PART.
#pragma once

#include <algorithm>

#include "kernels.h"
#include "simd.h"

namespace weft::WEFT_ISA {

inline constexpr int PART_VECTORS = KEY_PART / LANES;
// Most (row, head) pairs whose scores, and whose mixed values, are added up in registers, and vectors of values beside each other.
inline constexpr int SCORE_ROWS = LANES == 16 ? 8 : LANES == 8 ? 3 : 1;
inline constexpr int MIX_ROWS = LANES == 16 ? 8 : 5, MIX_VECTORS = 2;

// Where the entries of a chunk lie; what a row may not see of them has the greatest position there is.
struct Entries {
    const char* rows[CHUNK];  // of the block of each entry, at its offset; entries that do not exist stand for one that does
    int32_t positions[CHUNK];
    alignas(64) float bias[CHUNK];  // of entries that exist, where the place has biases
    int32_t lowest, highest;
    int64_t start;     // its first entry, counted from the sequence's entry 0
    int low, high;     // of those that exist
    bool partly;       // whether some of it is out of sight
};

// Entries [start, start + C).  row_bytes: of all kv heads' keys of one entry.  Whether there are any.
inline bool locate(const Place& place, int64_t sequence, int64_t start, int64_t row_bytes, Entries& found) {
    const int64_t first = place.first[sequence], end = first + place.lengths[sequence];
    const int64_t begin = start > first ? start : first, stop = start + CHUNK < end ? start + CHUNK : end;
    found.start = start;
    if (begin >= stop) return false;
    found.low = static_cast<int>(begin - start), found.high = static_cast<int>(stop - start);
    const int64_t* table = place.tables + sequence * place.table_width + (begin - first) / place.block_tokens;
    int64_t offset = (begin - first) % place.block_tokens;
    found.lowest = INT32_MAX;
    found.highest = -1;
    for (int e = found.low; e < found.high; table++, offset = 0) {
        const char* row = place.arena + *table * place.block_bytes + offset * row_bytes;
        const int64_t at = *table * place.positions_stride + offset;
        const int32_t* position = place.positions + at;
        // Three plain loops, which compilers turn into vectors.
        const int some = static_cast<int>(std::min<int64_t>(place.block_tokens - offset, found.high - e));
        int32_t lowest = INT32_MAX, highest = -1;
        for (int i = 0; i < some; i++) found.rows[e + i] = row + i * row_bytes;
        for (int i = 0; i < some; i++) {
            found.positions[e + i] = position[i];
            lowest = std::min(lowest, position[i]), highest = std::max(highest, position[i]);
        }
        for (int i = 0; i < some && place.bias; i++) found.bias[e + i] = place.bias[at + i];
        found.lowest = std::min(found.lowest, lowest), found.highest = std::max(found.highest, highest);
        e += some;
    }
    const auto fill = [&](int from, int to) {
        for (int e = from; e < to; e++) {
            found.rows[e] = found.rows[found.low];
            found.positions[e] = INT32_MAX;
            found.bias[e] = 0.0f;
        }
    };
    fill(0, found.low);
    fill(found.high, CHUNK);
    return true;
}

// A kv head's part of an entry.  `open` gives value i of words of several entries; `values` vectors of an entry's values from the
// d-th on, the first LANES * V of them in an order of their own, which `place_of` tells.  What has a scale has its values without.
struct WideRows {
    static constexpr bool PAIRS = false, MATRIX = false;  // see pairs.h and squares.h
    static constexpr int PER = 1;  // values in a word of four bytes
    static constexpr bool SCALED = false;
    static WEFT_INLINE int64_t bytes(int dim) { return static_cast<int64_t>(dim) * 4; }
    static WEFT_INLINE vf open(vu words, int) { return reinterpret_cast<vf>(words); }
    static WEFT_INLINE float scale(const char*, int) { return 1.0f; }
    template <int V>
    static WEFT_INLINE void values(const char* row, int d, vf (&out)[V]) {
        for (int v = 0; v < V; v++) out[v] = load(reinterpret_cast<const float*>(row) + d + v * LANES);
    }
    template <int V>
    static int place_of(int i) { return i; }
    static WEFT_INLINE float value(const char* row, int d) { return reinterpret_cast<const float*>(row)[d]; }
};
struct HalfRows {  // bfloat16
    static constexpr bool PAIRS = false, MATRIX = false;
    static constexpr int PER = 2;
    static constexpr bool SCALED = false;
    static WEFT_INLINE int64_t bytes(int dim) { return static_cast<int64_t>(dim) * 2; }
    static WEFT_INLINE vf open(vu words, int i) { return reinterpret_cast<vf>(i ? words & 0xffff0000u : words << 16); }
    static WEFT_INLINE float scale(const char*, int) { return 1.0f; }
    template <int V>
    static WEFT_INLINE void values(const char* row, int d, vf (&out)[V]) {
        const auto* from = reinterpret_cast<const uint16_t*>(row) + d;
        if constexpr (V % 2) {
            for (int v = 0; v < V; v++) out[v] = widen(from + v * LANES);
        } else {  // the even values, then the odd ones
            for (int v = 0; v < V; v += 2) {
                const vu words = load_bits(from + v * LANES);
                out[v] = open(words, 0), out[v + 1] = open(words, 1);
            }
        }
    }
    template <int V>
    static int place_of(int i) {  // where value i of LANES * V stands
        return V % 2 ? i : i / (2 * LANES) * 2 * LANES + i % 2 * LANES + i % (2 * LANES) / 2;
    }
    static WEFT_INLINE float value(const char* row, int d) { return widen_one(reinterpret_cast<const uint16_t*>(row)[d]); }
};
struct ByteRows {  // int8, and a float32 behind them that multiplies all
    static constexpr bool PAIRS = false, MATRIX = false;
    static constexpr int PER = 4;
    static constexpr bool SCALED = true;
    static WEFT_INLINE int64_t bytes(int dim) { return dim + 4; }
    static WEFT_INLINE vf open(vu words, int i) {
        return __builtin_convertvector(reinterpret_cast<vi>(words << (24 - 8 * i)) >> 24, vf);
    }
    static WEFT_INLINE float scale(const char* row, int dim) {
        float found;
        std::memcpy(&found, row + dim, 4);
        return found;
    }
    template <int V>
    static WEFT_INLINE void values(const char* row, int d, vf (&out)[V]) {
        for (int v = 0; v < V; v++) out[v] = bytes_at(row + d + v * LANES);
    }
    template <int V>
    static int place_of(int i) { return i; }
    static WEFT_INLINE float value(const char* row, int d) { return static_cast<float>(static_cast<int8_t>(row[d])); }
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

// Asks memory for entries that are read later, a few lines in each turn of the work before: all at once they would wait for each other,
// and the work too.  A turn is a square of keys, ASKED dimensions of scores, a pair's weights, ASKED entries of values (squares.h asks in a
// way of its own): some 100 cycles.  Entries that lie behind each other are asked for as one.
inline constexpr int ASKED = 16;
class Asking {
    struct Run {
        const Entries* from;
        int64_t offset;
    };

    Run runs[3];
    int count = 0, mine = 0, entry = 0;
    int64_t bytes = 0, apart = 0, each = 0, left = 0;
    const char* at = nullptr;
    bool near = false;

    bool more() {
        while (mine < count && entry >= runs[mine].from->high)
            if (++mine < count) entry = runs[mine].from->low;
        if (mine >= count) return false;
        const char* const* rows = runs[mine].from->rows;
        const int first = entry++, stop = runs[mine].from->high;
        if (bytes == apart)
            while (entry < stop && rows[entry] - rows[entry - 1] == apart) entry++;
        at = rows[first] + runs[mine].offset;
        const int64_t outside = reinterpret_cast<uintptr_t>(at) % LINE_BYTES;
        at -= outside, left = outside + (entry - 1 - first) * apart + bytes;
        return true;
    }

public:
    Asking() = default;
    // bytes: of each entry; apart: what is between entries that lie behind each other; near: whether they go to the first cache.
    Asking(int64_t bytes, int64_t apart, bool near) : bytes(bytes), apart(apart), near(near) {}

    void add(const Entries& from, int64_t offset) {
        if (count == 0) entry = from.low;
        runs[count++] = {&from, offset};
    }
    // turns: of all that is done meanwhile.
    void spread(int64_t turns) {
        int64_t lines = 0;
        for (int i = 0; i < count; i++) lines += (runs[i].from->high - runs[i].from->low) * bytes / LINE_BYTES;
        each = (lines + turns - 1) / turns;
    }
    WEFT_INLINE void turn() {
        for (int64_t i = 0; i < each;) {
            if (left <= 0 && !more()) {
                each = 0;
                return;
            }
            constexpr int SOME = 8;  // of which each would cost more than its own instruction, were it asked for by itself
            if (!near && each - i >= SOME && left >= SOME * LINE_BYTES) {
#pragma GCC unroll 8
                for (int l = 0; l < SOME; l++) __builtin_prefetch(at + l * LINE_BYTES, 0, 2);
                i += SOME, at += SOME * LINE_BYTES, left -= SOME * LINE_BYTES;
                continue;
            }
            if (near) __builtin_prefetch(at);
            else __builtin_prefetch(at, 0, 2);
            i++, at += LINE_BYTES, left -= LINE_BYTES;
        }
    }
};

// LINE_BYTES / 4 words of LANES rows, turned around: words[w] has the w-th word of each row.
WEFT_INLINE void load_turned(const char* const* rows, int64_t offset, vu (&words)[LANES]) {
#if defined(__AVX512F__)
    for (int q = 0; q < 4; q++) {  // 16 bytes of four rows in a register; then squares of four words are turned
        __m512i some[4];
        for (int r = 0; r < 4; r++) {
            const auto quarter = [&](int i) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows[4 * i + r] + offset) + q); };
            some[r] = _mm512_castsi128_si512(quarter(0));
            some[r] = _mm512_inserti32x4(some[r], quarter(1), 1);
            some[r] = _mm512_inserti32x4(some[r], quarter(2), 2);
            some[r] = _mm512_inserti32x4(some[r], quarter(3), 3);
        }
        const __m512i a = _mm512_unpacklo_epi32(some[0], some[1]), b = _mm512_unpackhi_epi32(some[0], some[1]);
        const __m512i c = _mm512_unpacklo_epi32(some[2], some[3]), d = _mm512_unpackhi_epi32(some[2], some[3]);
        words[4 * q] = reinterpret_cast<vu>(_mm512_unpacklo_epi64(a, c));
        words[4 * q + 1] = reinterpret_cast<vu>(_mm512_unpackhi_epi64(a, c));
        words[4 * q + 2] = reinterpret_cast<vu>(_mm512_unpacklo_epi64(b, d));
        words[4 * q + 3] = reinterpret_cast<vu>(_mm512_unpackhi_epi64(b, d));
    }
#else
    for (int e = 0; e < LANES; e++) words[e] = load_bits(rows[e] + offset);
    turn<LANES / 2>(words);
#endif
}

// Keys of entries [0, E) of `rows` as [D][E].
template <class T>
void transposed(const char* const* rows, int64_t offset, int dim, float* out, Asking& asking) {
    for (int part = 0; part < PART_VECTORS; part++, out += LANES, rows += LANES) {
        int d = 0;
        for (; d + LANES * T::PER <= dim; d += LANES * T::PER) {
            vu words[LANES];
            asking.turn();
            load_turned(rows, offset + d / T::PER * 4, words);
            for (int w = 0; w < LANES; w++)
                for (int i = 0; i < T::PER; i++) store(out + (d + w * T::PER + i) * KEY_PART, T::open(words[w], i));
        }
        for (; d < dim; d++)
            for (int e = 0; e < LANES; e++) out[d * KEY_PART + e] = T::value(rows[e] + offset, d);
    }
}

// Scores of R rows of q [R, D] with keys [D][E], C apart.
template <class T, int R>
void scores(const float* q, const float* keys, int dim, float* out, Asking& asking) {
    vf total[R][PART_VECTORS];
    for (int r = 0; r < R; r++)
        for (int v = 0; v < PART_VECTORS; v++) total[r][v] = vf{};
    for (int d = 0; d < dim;) {
        asking.turn();
        for (const int stop = d + ASKED < dim ? d + ASKED : dim; d < stop; d++) {
            vf key[PART_VECTORS];
            for (int v = 0; v < PART_VECTORS; v++) key[v] = load(keys + d * KEY_PART + v * LANES);
            for (int r = 0; r < R; r++) {
                const vf input = all(q[r * dim + d]);
                for (int v = 0; v < PART_VECTORS; v++) total[r][v] += key[v] * input;
            }
        }
    }
    for (int r = 0; r < R; r++)
        for (int v = 0; v < PART_VECTORS; v++) store(out + r * CHUNK + v * LANES, total[r][v]);
}

// One unfinished result beside the next one; both are shares of 1.
WEFT_INLINE vf joined(vf mixed, float share, vf next, float next_share) { return mixed * share + next * next_share; }

// mixed [R, D] * before + (weights [R, C] times values of entries [first, stop)) * now, of dimensions [d, d + V * LANES).
template <class T, int R, int V>
WEFT_INLINE void mix_some(const Entries& from, int64_t offset, const float* weights, int first, int stop, const float* before,
                          const float* now, int dim, int d, float* mixed, Asking& asking) {
    vf total[R][V] = {};
    for (int e = first; e < stop;) {
        asking.turn();
        for (const int end = e + ASKED < stop ? e + ASKED : stop; e < end; e++) {
            vf value[V];
            T::template values<V>(from.rows[e] + offset, d, value);
            for (int r = 0; r < R; r++) {
                const vf weight = all(weights[r * CHUNK + e]);
                for (int v = 0; v < V; v++) total[r][v] += value[v] * weight;
            }
        }
    }
    for (int r = 0; r < R; r++)
        for (int v = 0; v < V; v++) {
            float* mine = mixed + r * dim + d + v * LANES;
            store(mine, joined(load(mine), before[r], total[r][v], now[r]));
        }
}
template <class T, int R>
void mix(const Entries& from, int64_t offset, const float* weights, int first, int stop, const float* before, const float* now, int dim,
         float* mixed, Asking& asking) {
    int d = 0;
    for (; d + MIX_VECTORS * LANES <= dim; d += MIX_VECTORS * LANES)
        mix_some<T, R, MIX_VECTORS>(from, offset, weights, first, stop, before, now, dim, d, mixed, asking);
    for (; d + LANES <= dim; d += LANES)
        mix_some<T, R, 1>(from, offset, weights, first, stop, before, now, dim, d, mixed, asking);
    for (; d < dim; d++)
        for (int r = 0; r < R; r++) {
            float total = 0.0f;
            for (int e = first; e < stop; e++) total += T::value(from.rows[e] + offset, d) * weights[r * CHUNK + e];
            mixed[r * dim + d] = joined(all(mixed[r * dim + d]), before[r], all(total), now[r])[0];
        }
}
// Where `mix` leaves value d.
template <class T>
WEFT_INLINE int mixed_at(int d, int dim) {
    constexpr int WIDE = MIX_VECTORS * LANES;
    const int start = d / WIDE * WIDE;
    return start + WIDE <= dim ? start + T::template place_of<MIX_VECTORS>(d - start) : d;
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
