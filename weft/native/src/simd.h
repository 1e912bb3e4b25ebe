// Vectors of LANES floats, by the compiler's vector extension: the same source for every instruction set.
// Included by one file for each, which defines WEFT_ISA (a namespace) and WEFT_LANES.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <utility>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "kernels.h"

namespace weft::WEFT_ISA {

inline constexpr int LANES = WEFT_LANES;
#if defined(WEFT_BELOW)
// Of the instruction set below this one; there where this one is.
inline const Kernels& below() {
    static const Kernels& found = *WEFT_BELOW();
    return found;
}
#endif

typedef float vf __attribute__((vector_size(4 * WEFT_LANES)));
typedef int32_t vi __attribute__((vector_size(4 * WEFT_LANES)));
typedef uint32_t vu __attribute__((vector_size(4 * WEFT_LANES)));
typedef uint16_t vh __attribute__((vector_size(2 * WEFT_LANES)));
typedef float vf_any __attribute__((vector_size(4 * WEFT_LANES), aligned(4), may_alias));
typedef uint32_t vu_any __attribute__((vector_size(4 * WEFT_LANES), aligned(1), may_alias));  // rows of bytes lie anywhere
typedef int32_t vi_any __attribute__((vector_size(4 * WEFT_LANES), aligned(4), may_alias));
typedef uint16_t vh_any __attribute__((vector_size(2 * WEFT_LANES), aligned(2), may_alias));

#define WEFT_INLINE inline __attribute__((always_inline))

WEFT_INLINE vf load(const float* p) { return *reinterpret_cast<const vf_any*>(p); }
WEFT_INLINE void store(float* p, vf x) { *reinterpret_cast<vf_any*>(p) = x; }
// The first `count` values, and zeros.
WEFT_INLINE vf some(const float* p, int64_t count) {
    vf found = vf{};
    for (int64_t i = 0; i < LANES && i < count; i++) found[i] = p[i];
    return found;
}
WEFT_INLINE vu load_bits(const void* p) { return *reinterpret_cast<const vu_any*>(p); }
WEFT_INLINE void store_bits(void* p, vu x) { *reinterpret_cast<vu_any*>(p) = x; }
WEFT_INLINE vf all(float x) { return x - vf{}; }  // subtracting zero is nothing to a compiler, adding it is not
WEFT_INLINE vf select(vi where, vf yes, vf no) { return where ? yes : no; }

typedef int8_t vb __attribute__((vector_size(WEFT_LANES)));
typedef int8_t vb_any __attribute__((vector_size(WEFT_LANES), aligned(1), may_alias));

// Between small whole numbers and those of 32 bits; compilers take the general conversions apart.
WEFT_INLINE vu load_halves(const uint16_t* p) {
#if defined(__AVX512F__)
    return reinterpret_cast<vu>(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
#elif defined(__AVX2__)
    return reinterpret_cast<vu>(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#else
    return __builtin_convertvector(*reinterpret_cast<const vh_any*>(p), vu);
#endif
}
WEFT_INLINE vi load_bytes(const void* p) {
#if defined(__AVX512F__)
    return reinterpret_cast<vi>(_mm512_cvtepi8_epi32(_mm_loadu_si128(static_cast<const __m128i*>(p))));
#elif defined(__AVX2__)
    return reinterpret_cast<vi>(_mm256_cvtepi8_epi32(_mm_loadl_epi64(static_cast<const __m128i*>(p))));
#else
    return __builtin_convertvector(*static_cast<const vb_any*>(p), vi);
#endif
}
WEFT_INLINE void store_bytes(void* p, vi x) {  // the lowest byte of each
#if defined(__AVX512F__)
    _mm_storeu_si128(static_cast<__m128i*>(p), _mm512_cvtepi32_epi8(reinterpret_cast<__m512i>(x)));
#else
    *static_cast<vb_any*>(p) = __builtin_convertvector(x, vb);
#endif
}
WEFT_INLINE vf bytes_at(const char* p) { return __builtin_convertvector(load_bytes(p), vf); }

// bfloat16 is the upper half of a float.
WEFT_INLINE vf widen(const uint16_t* p) {
    return reinterpret_cast<vf>(load_halves(p) << 16);
}
WEFT_INLINE float widen_one(uint16_t x) {
    const uint32_t bits = static_cast<uint32_t>(x) << 16;
    float out;
    std::memcpy(&out, &bits, 4);
    return out;
}
// To the nearest, ties to even; NaN stays NaN.
WEFT_INLINE uint16_t narrow_one(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((bits >> 16) | 64);
    return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16);
}

// IEEE binary16: its bits are a float's with another bias, which one product puts right (subnormal ones too); no inf, no NaN.
WEFT_INLINE vf half(const uint16_t* p) {
#if defined(__AVX512F__)
    return reinterpret_cast<vf>(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
#else
    const vu bits = load_halves(p);
    const vf magnitude = reinterpret_cast<vf>((bits & 0x7fffu) << 13) * 5192296858534827628530496329220096.0f;  // 2^112
    return reinterpret_cast<vf>(reinterpret_cast<vu>(magnitude) | (bits & 0x8000u) << 16);
#endif
}
WEFT_INLINE float half_one(uint16_t h) {
    const uint32_t sign = (h & 0x8000u) << 16, rest = h & 0x7fffu;
    uint32_t bits;
    if (rest >= 0x7c00u) bits = sign | 0x7f800000u | (rest & 0x3ffu) << 13;
    else if (rest >= 0x400u) bits = sign | ((rest << 13) + 0x38000000u);
    else {
        const float small = static_cast<float>(rest) * 5.9604644775390625e-8f;
        std::memcpy(&bits, &small, 4);
        bits |= sign;
    }
    float out;
    std::memcpy(&out, &bits, 4);
    return out;
}
// To the nearest, ties to even, of a finite x of at most 65504.
WEFT_INLINE uint16_t half_of(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    const uint32_t sign = bits >> 16 & 0x8000u;
    bits &= 0x7fffffffu;
    if (bits < 0x38800000u) {  // below the normal ones: a sum with 1/2 leaves as many digits as they have
        float small;
        std::memcpy(&small, &bits, 4);
        small += 0.5f;
        std::memcpy(&bits, &small, 4);
        return static_cast<uint16_t>(sign | (bits - 0x3f000000u));
    }
    bits += 0xfffu + (bits >> 13 & 1);
    return static_cast<uint16_t>(sign | ((bits - 0x38000000u) >> 13));
}

// Lanes of two vectors in an order that is known to the compiler.
#if defined(__clang__)
#define WEFT_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define WEFT_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, vi{__VA_ARGS__})
#endif
using Lanes = std::make_integer_sequence<int, LANES>;

template <int S, int... I>
WEFT_INLINE vf moved(vf x, std::integer_sequence<int, I...>) {  // lane i gets what lane i + S has
    return WEFT_SHUFFLE(x, x, (I + S) % LANES...);
}
template <int S = LANES / 2>
WEFT_INLINE float sum(vf x) {
    x += moved<S>(x, Lanes{});
    if constexpr (S > 1) return sum<S / 2>(x);
    else return x[0];
}
template <int S = LANES / 2>
WEFT_INLINE int32_t sum(vi x) {
    x += reinterpret_cast<vi>(moved<S>(reinterpret_cast<vf>(x), Lanes{}));
    if constexpr (S > 1) return sum<S / 2>(x);
    else return x[0];
}
WEFT_INLINE vf larger(vf a, vf b) {  // b where either is no number
#if defined(__AVX512F__)
    return reinterpret_cast<vf>(_mm512_max_ps(reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b)));
#else
    return a > b ? a : b;
#endif
}
template <int S = LANES / 2>
WEFT_INLINE float top(vf x) {
    x = larger(x, moved<S>(x, Lanes{}));
    if constexpr (S > 1) return top<S / 2>(x);
    else return x[0];
}

// One step of turning a square of words around: what lies S lanes and S vectors off the diagonal changes places.
template <int S, int... I>
WEFT_INLINE void exchange(vu& a, vu& b, std::integer_sequence<int, I...>) {
    const vu low = WEFT_SHUFFLE(a, b, ((I & S) ? LANES + I - S : I)...);
    b = WEFT_SHUFFLE(a, b, ((I & S) ? LANES + I : I + S)...);
    a = low;
}
template <int S>
WEFT_INLINE void turn(vu (&words)[LANES]) {
    for (int i = 0; i < LANES; i++)
        if (!(i & S)) exchange<S>(words[i], words[i + S], Lanes{});
    if constexpr (S > 1) turn<S / 2>(words);
}

#if defined(__AVX512F__)
// x in sixteenths of ln 2, a whole number of them, and e to that many: the sixteen roots by a permutation of one register, less what the
// number's lowest bits would add to them when it is shifted to the exponent.
struct Sixteenths {
    vf whole, power;
};
WEFT_INLINE Sixteenths sixteenths(vf x) {
    const vf magic = all(12582912.0f);  // 1.5 * 2^23: adding it rounds to a whole number
    const vf moved = x * 23.0831206542234137f + magic;
    const __m512i n = reinterpret_cast<__m512i>(moved), roots = _mm512_setr_epi32(
        0x3F800000, 0x3F7DAAC3, 0x3F7B95C2, 0x3F79C3D3, 0x3F7837F0, 0x3F76F532, 0x3F75FED7, 0x3F75583F,
        0x3F7504F3, 0x3F7508A4, 0x3F75672A, 0x3F76248C, 0x3F7744FD, 0x3F78CCDF, 0x3F7AC0C7, 0x3F7D257D);
    return {moved - magic, reinterpret_cast<vf>(_mm512_add_epi32(_mm512_permutexvar_epi32(n, roots), _mm512_slli_epi32(n, 19)))};
}
#endif

// e^x within about two units in the last place; 0 below -87, where floats end, and for -inf and what is no number.
WEFT_INLINE vf exponential(vf x) {
    const vi alive = x > -87.0f;
#if defined(__AVX512F__)  // three powers of what is beyond sixteenths of ln 2, a 46th at most
    x = reinterpret_cast<vf>(_mm512_min_ps(reinterpret_cast<__m512>(x), _mm512_set1_ps(88.0f)));
    const auto [whole, power] = sixteenths(x);
    const vf rest = (x - whole * 0.0433216094970703125f) - whole * 8.92879262693385771e-8f;
    const vf more = rest * ((1.66666666e-1f * rest + 0.5f) * rest + 1.0f);
    return select(alive, power * more + power, vf{});
#else
    const vf magic = all(12582912.0f);  // 1.5 * 2^23: adding it rounds to a whole number
    x = select(alive, x, vf{});
    x = select(x < 88.0f, x, all(88.0f));
    const vf whole = (x * 1.44269504088896341f + magic) - magic;
    const vf rest = (x - whole * 0.693145751953125f) - whole * 1.42860682030941723e-6f;
    vf p = all(1.9875691500e-4f);
    p = p * rest + 1.3981999507e-3f;
    p = p * rest + 8.3334519073e-3f;
    p = p * rest + 4.1665795894e-2f;
    p = p * rest + 1.6666665459e-1f;
    p = p * rest + 5.0000001201e-1f;
    p = p * (rest * rest) + (rest + 1.0f);
    const vi power = (__builtin_convertvector(whole, vi) + 127) << 23;
    return select(alive, p * reinterpret_cast<vf>(power), vf{});
#endif
}
// 1 / x of a finite x of at least 1, within two units in the last place: a quotient takes as long as sixteen products.
WEFT_INLINE vf inverse(vf x) {
#if defined(__AVX512F__)
    const vf near = reinterpret_cast<vf>(_mm512_rcp14_ps(reinterpret_cast<__m512>(x)));
    return near + near * (1.0f - x * near);
#else
    return 1.0f / x;
#endif
}
WEFT_INLINE vf hyperbolic_tangent(vf x) { return 1.0f - 2.0f / (exponential(2.0f * x) + 1.0f); }

}  // namespace weft::WEFT_ISA
