// Attention's products two numbers at a time, where the processor adds up products of pairs: of bfloat16 with bfloat16, or of whole
// numbers of 16 bits.  Queries, and the weights of values, are rounded to such numbers.  Included by the files of the instruction sets.
//
// Legend.  D: head_dim, in whole vectors of words.  C: CHUNK.  E: KEY_PART.  A word holds two numbers of 16 bits.
#pragma once

#include "dots.h"
#include "tiles.h"

namespace weft::WEFT_ISA {

#if defined(__AVX512VNNI__)
// Of two entries, the 2 * LANES numbers `a` and `b`: words of both for each place, in the order that `paired_at` tells.
WEFT_INLINE void beside(__m512i a, __m512i b, vu (&out)[2]) {
    out[0] = reinterpret_cast<vu>(_mm512_unpacklo_epi16(a, b)), out[1] = reinterpret_cast<vu>(_mm512_unpackhi_epi16(a, b));
}
WEFT_INLINE int paired_at(int i) { return i / (2 * LANES) * 2 * LANES + i % 8 / 4 * LANES + i % (2 * LANES) / 8 * 4 + i % 4; }

struct BytePairs : ByteRows {
    static constexpr bool PAIRS = true;
    using Total = vi;
    static bool fit(int dim) { return dim % (4 * LANES) == 0; }
    static WEFT_INLINE vi dot(vi total, vu keys, vu inputs) {
        return reinterpret_cast<vi>(_mm512_dpwssd_epi32(reinterpret_cast<__m512i>(total), reinterpret_cast<__m512i>(keys),
                                                        reinterpret_cast<__m512i>(inputs)));
    }
    static WEFT_INLINE vf floats(vi total, float unit) { return __builtin_convertvector(total, vf) * unit; }
    // Bytes 0 and 2 of each word, and bytes 1 and 3.
    static WEFT_INLINE void keys(vu words, vu (&out)[2]) {
        const auto bytes = reinterpret_cast<__m512i>(words);
        out[0] = reinterpret_cast<vu>(_mm512_srai_epi16(_mm512_slli_epi16(bytes, 8), 8));
        out[1] = reinterpret_cast<vu>(_mm512_srai_epi16(bytes, 8));
    }
    static int key_place(int d) { return d / 4 * 4 + d % 2 * 2 + d % 4 / 2; }
    static WEFT_INLINE void values(const char* one, const char* other, int d, vu (&out)[2]) {
        const auto wide = [&](const char* row) { return _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(row + d))); };
        beside(wide(one), wide(other), out);
    }
    // x [count] times what makes its largest 2^15 - 1, to the nearest; returns what makes that undone, NaN where some x is not finite.
    static float round(const float* x, int count, uint16_t* out) {
        const float most = largest(x, count), fine = most > 1.0e-32f ? 32767.0f / most : 0.0f;
        for (int i = 0; i < count; i += LANES)
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i),
                                _mm512_cvtsepi32_epi16(_mm512_cvtps_epi32(reinterpret_cast<__m512>(load(x + i) * fine))));
        return most / 32767.0f;
    }
    static WEFT_INLINE vf weight(vf x) { return x; }  // is rounded beside the values' scales
    template <int V>
    static int place_of(int i) { return paired_at(i); }
};
#endif

#if defined(__AVX512BF16__)
struct HalfPairs : HalfRows {
    static constexpr bool PAIRS = true;
    using Total = vf;
    static bool fit(int dim) { return dim % (2 * LANES) == 0; }
    static WEFT_INLINE vf dot(vf total, vu keys, vu inputs) { return dot2(total, keys, reinterpret_cast<vi>(inputs)); }
    static WEFT_INLINE vf floats(vf total, float) { return total; }
    static WEFT_INLINE void keys(vu words, vu (&out)[1]) { out[0] = words; }
    static int key_place(int d) { return d; }
    static WEFT_INLINE void values(const char* one, const char* other, int d, vu (&out)[2]) {
        beside(_mm512_loadu_si512(one + 2 * d), _mm512_loadu_si512(other + 2 * d), out);
    }
    static WEFT_INLINE __m256i narrow(vf x) { return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(reinterpret_cast<__m512>(x))); }
    static float round(const float* x, int count, uint16_t* out) {
        for (int i = 0; i < count; i += LANES) _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i), narrow(load(x + i)));
        return 1.0f;
    }
    static WEFT_INLINE vf weight(vf x) {  // so that the sum is of the weights that multiply
        return reinterpret_cast<vf>(_mm512_slli_epi32(_mm512_cvtepu16_epi32(narrow(x)), 16));
    }
    template <int V>
    static int place_of(int i) { return paired_at(i); }
};
#endif

#if defined(__AVX512VNNI__)
WEFT_INLINE vu both(uint32_t word) { return reinterpret_cast<vu>(_mm512_set1_epi32(static_cast<int>(word))); }

// A query [D] as words [D / 2], QUERY_ROWS apart, that lie as those of keys do; returns its unit.
template <class T>
float paired_query(const float* q, int dim, uint32_t* words) {
    alignas(64) float moved[MAX_DIM];
    alignas(64) uint32_t found[MAX_DIM / 2];
    for (int d = 0; d < dim; d++) moved[T::key_place(d)] = q[d];
    const float unit = T::round(moved, dim, reinterpret_cast<uint16_t*>(found));
    for (int d = 0; d < dim / 2; d++) words[d * QUERY_ROWS] = found[d];
    return unit;
}

// Keys of entries [0, E) of `rows` as words [D / 2][E].
template <class T>
void paired_keys(const char* const* rows, int64_t offset, int dim, uint32_t* out, Asking& asking) {
    constexpr int EACH = T::PER / 2;  // words of keys that a word of an entry gives
    for (int part = 0; part < PART_VECTORS; part++, rows += LANES)
        for (int word = 0; word < dim / T::PER; word += LANES) {
            vu some[LANES];
            asking.turn();
            load_turned(rows, offset + word * 4, some);
            for (int w = 0; w < LANES; w++) {
                vu found[EACH];
                T::keys(some[w], found);
                for (int i = 0; i < EACH; i++)
                    _mm512_store_si512(out + ((word + w) * EACH + i) * KEY_PART + part * LANES, reinterpret_cast<__m512i>(found[i]));
            }
        }
}

// Scores of R queries, words [D / 2, R] that are QUERY_ROWS apart, and their units, with keys [D / 2][E], C apart.
template <class T, int R>
void paired_scores(const uint32_t* q, const float* units, const uint32_t* keys, int dim, float* out, Asking& asking) {
    typename T::Total total[R][PART_VECTORS] = {};
    static_assert(LANES % (ASKED / 2) == 0);
    for (int d = 0; d < dim / 2;) {
        asking.turn();
        for (const int stop = d + ASKED / 2; d < stop; d++) {
            vu key[PART_VECTORS];
            for (int v = 0; v < PART_VECTORS; v++) key[v] = load_bits(keys + d * KEY_PART + v * LANES);
            for (int r = 0; r < R; r++) {
                const vu input = both(q[d * QUERY_ROWS + r]);
                for (int v = 0; v < PART_VECTORS; v++) total[r][v] = T::dot(total[r][v], key[v], input);
            }
        }
    }
    for (int r = 0; r < R; r++)
        for (int v = 0; v < PART_VECTORS; v++) store(out + r * CHUNK + v * LANES, T::floats(total[r][v], units[r]));
}

// As `mix`, weights being words [R, C / 2] and their units.
template <class T, int R>
void paired_mix(const Entries& from, int64_t offset, const uint32_t* weights, const float* units, int first, int stop,
                const float* before, const float* now, int dim, float* mixed, Asking& asking) {
    for (int d = 0; d < dim; d += 2 * LANES) {
        typename T::Total total[R][2] = {};
        static_assert(KEY_PART % ASKED == 0);  // of which `first` and `stop` are multiples
        for (int pair = first / 2; pair < stop / 2;) {
            asking.turn();
            for (const int end = pair + ASKED / 2; pair < end; pair++) {
                vu value[2];
                T::values(from.rows[2 * pair] + offset, from.rows[2 * pair + 1] + offset, d, value);
                for (int r = 0; r < R; r++) {
                    const vu weight = both(weights[r * (CHUNK / 2) + pair]);
                    for (int v = 0; v < 2; v++) total[r][v] = T::dot(total[r][v], value[v], weight);
                }
            }
        }
        for (int r = 0; r < R; r++)
            for (int v = 0; v < 2; v++) {
                float* mine = mixed + r * dim + d + v * LANES;
                store(mine, joined(load(mine), before[r], T::floats(total[r][v], units[r]), now[r]));
            }
    }
}
#endif

}  // namespace weft::WEFT_ISA
