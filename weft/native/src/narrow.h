// Whole numbers of 8 bits: their products, four at a time and exact in 32 bits, and rows that are rounded to them, with one scale for
// each row.  Included by the files of the instruction sets.
#pragma once

#include "kernels.h"
#include "simd.h"
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace weft::WEFT_ISA {

// total + sum of four products of bytes: of `weights`, which are not negative, with `inputs`, which have a sign.
WEFT_INLINE vi dot4(vi total, vu weights, vi inputs) {
#if defined(__AVX512VNNI__)
    return reinterpret_cast<vi>(_mm512_dpbusd_epi32(reinterpret_cast<__m512i>(total), reinterpret_cast<__m512i>(weights),
                                                    reinterpret_cast<__m512i>(inputs)));
#elif defined(__AVX512BW__)
    const auto even = reinterpret_cast<__m512i>(weights & 0x00ff00ffu), odd = reinterpret_cast<__m512i>(weights >> 8 & 0x00ff00ffu);
    const auto x = reinterpret_cast<__m512i>(inputs);
    const auto low = _mm512_madd_epi16(even, _mm512_srai_epi16(_mm512_slli_epi16(x, 8), 8));
    return total + reinterpret_cast<vi>(_mm512_add_epi32(low, _mm512_madd_epi16(odd, _mm512_srai_epi16(x, 8))));
#elif defined(__AVX2__)
    const auto even = reinterpret_cast<__m256i>(weights & 0x00ff00ffu), odd = reinterpret_cast<__m256i>(weights >> 8 & 0x00ff00ffu);
    const auto x = reinterpret_cast<__m256i>(inputs);
    const auto low = _mm256_madd_epi16(even, _mm256_srai_epi16(_mm256_slli_epi16(x, 8), 8));
    return total + reinterpret_cast<vi>(_mm256_add_epi32(low, _mm256_madd_epi16(odd, _mm256_srai_epi16(x, 8))));
#else
    for (int i = 0; i < 4; i++)
        total += reinterpret_cast<vi>(weights >> 8 * i & 0xffu) * ((inputs << (24 - 8 * i)) >> 24);
    return total;
#endif
}

// total + small * times, both of 16 bits with a sign.
WEFT_INLINE vi add_times(vi total, vi small, vi times) {
#if defined(__AVX512VNNI__)
    return reinterpret_cast<vi>(_mm512_dpwssd_epi32(reinterpret_cast<__m512i>(total), reinterpret_cast<__m512i>(small),
                                                    reinterpret_cast<__m512i>(times & 0xffff)));
#elif defined(__AVX512BW__)
    return total + reinterpret_cast<vi>(_mm512_madd_epi16(reinterpret_cast<__m512i>(small), reinterpret_cast<__m512i>(times & 0xffff)));
#elif defined(__AVX2__)
    return total + reinterpret_cast<vi>(_mm256_madd_epi16(reinterpret_cast<__m256i>(small), reinterpret_cast<__m256i>(times & 0xffff)));
#else
    return total + small * times;
#endif
}

// The largest magnitude; NaN where a value is not finite.  Of floats without their signs the bits have the same order, and whatever is
// not finite comes last.
inline float largest(const float* x, int64_t count) {
    vi most = vi{};
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) {
        const vi bits = reinterpret_cast<vi>(load_bits(x + i) & 0x7fffffffu);
        most = bits > most ? bits : most;
    }
    int32_t found = 0;
    for (int j = 0; j < LANES; j++) found = most[j] > found ? most[j] : found;
    for (; i < count; i++) {
        int32_t bits;
        std::memcpy(&bits, x + i, 4);
        bits &= 0x7fffffff;
        found = bits > found ? bits : found;
    }
    if (found >= 0x7f800000) return std::numeric_limits<float>::quiet_NaN();
    float out;
    std::memcpy(&out, &found, 4);
    return out;
}

// x * fine to the nearest whole number, of at most 2^22 in magnitude; anything for what is no number.
WEFT_INLINE vu nearest(vf x, float fine) {
    return reinterpret_cast<vu>(x * fine + 12582912.0f) - 0x4b400000u;  // adding 1.5 * 2^23 leaves the number in the lowest bits
}

// Inputs [i, end) of a row, of which `fine` makes 127 at most, as words; returns their sum, a word that may be anything where some input
// is no number.
inline uint32_t round_group(const float* x, int64_t i, int64_t end, float fine, int32_t* words) {
    vu totals = vu{};
    uint32_t total = 0;
    for (; i + LANES <= end; i += LANES) {
        const vu whole = nearest(load(x + i), fine);
        totals += whole;
        store_bytes(words + i / 4, reinterpret_cast<vi>(whole));
    }
    for (; i < end; i += 4) {
        float some[LANES] = {};
        for (int j = 0; j < 4; j++) some[j] = x[i + j];
        const vu whole = nearest(load(some), fine);
        uint32_t word = 0;
        for (int j = 0; j < 4; j++) {
            total += static_cast<uint32_t>(static_cast<int8_t>(whole[j]));
            word |= (whole[j] & 0xffu) << 8 * j;
        }
        words[i / 4] = static_cast<int32_t>(word);
    }
    return total + static_cast<uint32_t>(sum(reinterpret_cast<vi>(totals)));
}

// A row as whole numbers, its scale, and the sums of its groups times `factor`.
inline void round_row(const Weight& w, const float* x, int32_t* words, float* scale, int32_t* sums, int32_t factor) {
    const float most = largest(x, w.k), fine = most > 1.0e-36f ? 127.0f / most : 0.0f;
    *scale = most / 127.0f;  // NaN shows in the outputs
    for (int64_t g = 0; g < w.groups(); g++)
        sums[g] = static_cast<int32_t>(static_cast<uint32_t>(factor) * round_group(x, g * w.group, (g + 1) * w.group, fine, words));
}

}  // namespace weft::WEFT_ISA
