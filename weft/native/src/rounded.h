// Rows of inputs that are rounded before they are multiplied, each by itself: to whole numbers of 8 bits with one scale for the row (for
// weights of whole numbers), or, where the processor multiplies them, to bfloat16.  Included by the files of the instruction sets.
//
// Legend.  R: rows of a tile.  A word holds D::INPUTS inputs of one row, or of one output of a panel; a line of a panel gives
// VALUES / INPUTS words of each output.
#pragma once

#include "kernels.h"
#include "linear.h"
#include "narrow.h"
#include "simd.h"

namespace weft::WEFT_ISA {

inline constexpr int LINE_WORDS = LINE_BYTES / 4;
// Whether rows rounded to bytes are multiplied otherwise than by the instruction set below this one.
#if defined(WEFT_BELOW) && defined(__AVX512BF16__) && !defined(WEFT_MATRIX)
inline constexpr bool OWN_BYTES = false;
#else
inline constexpr bool OWN_BYTES = true;
#endif
#if defined(WEFT_MATRIX)
inline constexpr bool MATRICES = true;
#else
inline constexpr bool MATRICES = false;
#endif

#if defined(__AVX512BF16__)
// total + x0 w0 + x1 w1 in float32, the odd one first; what is subnormal counts as 0.
WEFT_INLINE vf dot2(vf total, vu weights, vi inputs) {
    return reinterpret_cast<vf>(_mm512_dpbf16_ps(reinterpret_cast<__m512>(total), reinterpret_cast<__m512bh>(weights),
                                                 reinterpret_cast<__m512bh>(inputs)));
}

struct Halves {
    static constexpr int INPUTS = 2;
    static constexpr bool SCALED = false;  // rows have no scale
    using Total = vf;
    using Sum = float;
    static WEFT_INLINE vf dot(vf total, vu weights, vi inputs) { return dot2(total, weights, inputs); }
    static WEFT_INLINE vf start(float) { return vf{}; }
    static WEFT_INLINE vf floats(vf total) { return total; }
    template <class W>
    static constexpr float unit() { return 1.0f / W::UNIT; }
    template <class W>  // values are less their half
    static constexpr float half() { return static_cast<float>(W::HALF); }
    static WEFT_INLINE vu word(BF16, vu line, int) { return line; }
    // Which of a line's inputs is the even one of a word; so many further is the odd one.
    static constexpr int even(I8, int j) { return 2 * j; }
    static constexpr int even(I4, int j) { return j % 2 + j / 2 * 4; }
    template <class W>
    static constexpr int ODD = std::is_same_v<W, I4> ? 2 : 1;
    static WEFT_INLINE vu word(I8, vu line, int j) {  // their floats end after eight digits
        const vu first = reinterpret_cast<vu>(I8::value(line, 2 * j)), second = reinterpret_cast<vu>(I8::value(line, 2 * j + 1));
        return first >> 16 | (second & 0xffff0000u);
    }
    // A permutation looks at the low five bits of each half, of which the table ignores one.  Inputs (0, 2), (1, 3), (4, 6), (5, 7).
    static WEFT_INLINE vu word(I4, vu line, int j) {
        const __m512i table = _mm512_broadcast_i64x4(_mm256_set_epi16(
            0x40e0, 0x40c0, 0x40a0, 0x4080, 0x4040, 0x4000, 0x3f80, 0, static_cast<int16_t>(0xbf80), static_cast<int16_t>(0xc000),
            static_cast<int16_t>(0xc040), static_cast<int16_t>(0xc080), static_cast<int16_t>(0xc0a0), static_cast<int16_t>(0xc0c0),
            static_cast<int16_t>(0xc0e0), static_cast<int16_t>(0xc100)));
        const auto at = reinterpret_cast<__m512i>(line >> (j % 2 * 8 + j / 2 * 4));
        return reinterpret_cast<vu>(_mm512_permutexvar_epi16(at, table));
    }
    // Sixteen floats as words of W, in the order in which its lines have their inputs.
    template <class W>
    static WEFT_INLINE __m256i words(__m512 x) {
        const auto found = reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x));
        if (!std::is_same_v<W, I4>) return found;
        return _mm256_shuffle_epi8(
            found, _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15)));
    }
    template <class W>
    static void round(const Linear& a, const float* x, int32_t* words, float*, float* sums, int);
};

// A row as bfloat16, in the order in which the words of W have their inputs, and the sums of its groups.
template <class W>
void Halves::round(const Linear& a, const float* x, int32_t* words, float*, float* sums, int) {
    auto* out = reinterpret_cast<uint16_t*>(words);
    const auto masked = [](int64_t i, int64_t end) {
        return end - i >= LANES ? static_cast<__mmask16>(0xffff) : static_cast<__mmask16>((1 << (end - i)) - 1);
    };
    const auto some = [&](int64_t i, int64_t end) { return _mm512_maskz_loadu_ps(masked(i, end), x + i); };
    const int64_t k = a.weight.k;
    for (int64_t i = 0; i < k; i += LANES) _mm256_mask_storeu_epi16(out + i, masked(i, k), Halves::words<W>(some(i, k)));
    if (!a.weight.offsets) return;
    for (int64_t g = 0; g < a.weight.groups(); g++) {
        vf total = vf{};
        const int64_t end = (g + 1) * a.weight.group;
        for (int64_t i = g * a.weight.group; i < end; i += LANES)
            total += reinterpret_cast<vf>(_mm512_slli_epi32(_mm512_cvtepu16_epi32(Halves::words<BF16>(some(i, end))), 16));
        sums[g] = sum(total);
    }
}
#endif

struct Bytes {
    static constexpr int INPUTS = 4;
    static constexpr bool SCALED = true;
    using Total = vi;
    using Sum = int32_t;
    static WEFT_INLINE vi dot(vi total, vu weights, vi inputs) { return dot4(total, weights, inputs); }
    static WEFT_INLINE vi start(int32_t sum) { return vi{} + sum; }
    static WEFT_INLINE vf floats(vi total) { return __builtin_convertvector(total, vf); }
    template <class W>
    static constexpr float unit() { return 1.0f; }
    template <class W>
    static constexpr float half() { return 0.0f; }
    template <class W>
    static WEFT_INLINE vu word(W, vu line, int j) { return W::quad(line, j); }
    template <class W>  // factor: of the sums
    static void round(const Linear& a, const float* x, int32_t* words, float* scale, float* sums, int factor) {
        round_row(a.weight, x, words, scale, reinterpret_cast<int32_t*>(sums), factor);
    }
};

// What the rows of a tile are, [words, R] one after the other, their scales and the sums of their groups, [R, groups].
template <class D>
struct Rows {
    int32_t* words;
    float *scales, *sums;

    Rows(int32_t* at, int64_t rows, int64_t each)
        : words(at), scales(reinterpret_cast<float*>(at + rows * each)), sums(scales + rows) {}
    static int64_t size(const Weight& w, int64_t rows, int64_t each) {  // in whole lines of the cache
        return (rows * (each + 1 + w.groups()) + LINE_WORDS - 1) / LINE_WORDS * LINE_WORDS;
    }
};

// Rows [first, first + high) of the inputs, rounded; `spare` holds as many words.  lines: whether the words of a row stay together by
// lines of the cache, as matrix registers read them; then `spare` holds those of one row.
template <class D, class W>
void round_tile(const Linear& a, int64_t first, int64_t high, const Rows<D>& to, int64_t top, int64_t each, int32_t* spare, int factor,
                bool lines) {
    const int64_t groups = a.weight.groups();
    int32_t* words = to.words + top * each;
    for (int64_t r = 0; r < high; r++) {
        int32_t* mine = high == 1 ? words : lines ? spare : spare + r * each;
        D::template round<W>(a, a.row(first + r), mine, to.scales + top + r, to.sums + (top + r) * groups, factor);
        for (int64_t i = 0; i < each && lines && high > 1; i += LINE_WORDS) std::memcpy(words + i * high + r * LINE_WORDS, mine + i, LINE_BYTES);
    }
    if (high == 1 || lines) return;
    int64_t i = 0;
    for (; i + LANES <= each; i += LANES) {
        vu square[LANES] = {};
        for (int64_t r = 0; r < high; r++) square[r] = load_bits(spare + r * each + i);
        turn<LANES / 2>(square);
        // What a vector has beyond its rows is overwritten by the next; the last ones have no next.
        for (int j = 0; j < LANES; j++) {
            int32_t* mine = words + (i + j) * high;
            if (i + j + LANES / high + 1 < each) store(reinterpret_cast<float*>(mine), reinterpret_cast<vf>(square[j]));
            else std::memcpy(mine, &square[j], static_cast<size_t>(high) * 4);
        }
    }
    for (; i < each; i++)
        for (int64_t r = 0; r < high; r++) words[i * high + r] = spare[r * each + i];
}

}  // namespace weft::WEFT_ISA
