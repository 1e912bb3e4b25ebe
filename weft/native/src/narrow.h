// Products of weights of whole numbers with inputs that are rounded to whole numbers too, of 8 bits, with one scale for each
// row: dot products of four bytes at a time, exact in 32 bits, and a float only at the end of each group.  Included by the files
// of the instruction sets.
#pragma once

#include "kernels.h"
#include "linear.h"
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

// Rows as whole numbers: four inputs in a word, tile after tile, [K / 4, R]; each row's scale, and the sums of its groups.
struct Rounded {
    int32_t* words;
    float* scales;
    int32_t* sums;  // [rows, groups], times `factor`
};

// The largest magnitude; NaN where a value is not finite.
inline float largest(const float* x, int64_t count) {
    vf most = vf{}, odd = vf{};
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) {
        const vf v = load(x + i);
        most = larger(most, v < 0.0f ? -v : v);
        odd += v * 0.0f;
    }
    float found = top(most), strange = sum(odd);
    for (; i < count; i++) {
        found = std::fabs(x[i]) > found ? std::fabs(x[i]) : found;
        strange += x[i] * 0.0f;
    }
    return found + strange;
}

// x * fine to the nearest whole number of at most 127 in magnitude; 127 for what is no number.
WEFT_INLINE vi nearest(vf x, float fine) {
    const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number
    vf whole = (x * fine + magic) - magic;
    whole = whole < 127.0f ? whole : vf{} + 127.0f;
    return __builtin_convertvector(whole > -127.0f ? whole : vf{} - 127.0f, vi);
}

// Inputs [i, end) of a row as words that lie `high` apart; returns their sum.
inline int32_t round_group(const float* x, int64_t i, int64_t end, float fine, int32_t* words, int64_t high) {
    vi totals = vi{};
    int32_t total = 0;
    for (; i + LANES <= end; i += LANES) {
        const vi whole = nearest(load(x + i), fine);
        totals += whole;
        int32_t packed[LANES / 4];
        store_bytes(packed, whole);
        for (int q = 0; q < LANES / 4; q++) words[(i / 4 + q) * high] = packed[q];
    }
    for (; i < end; i += 4) {
        float some[LANES] = {};
        for (int j = 0; j < 4; j++) some[j] = x[i + j];
        const vi whole = nearest(load(some), fine);
        uint32_t word = 0;
        for (int j = 0; j < 4; j++) {
            total += whole[j];
            word |= (static_cast<uint32_t>(whole[j]) & 0xffu) << 8 * j;
        }
        words[i / 4 * high] = static_cast<int32_t>(word);
    }
    for (int j = 0; j < LANES; j++) total += totals[j];
    return total;
}

inline void rounded(const Linear& a, int64_t first, int64_t rows, int64_t most_rows, int32_t factor, const Rounded& to) {
    const int64_t k = a.weight.k, groups = a.weight.groups(), group = a.weight.group;
    const int64_t tiles = (rows + most_rows - 1) / most_rows;
    for (int64_t t = 0; t < tiles; t++) {
        const int64_t start = rows * t / tiles, high = rows * (t + 1) / tiles - start;
        for (int64_t r = 0; r < high; r++) {
            const float* x = a.x + (first + start + r) * a.x_stride;
            const float most = largest(x, k), fine = most > 1.0e-36f ? 127.0f / most : 0.0f;
            to.scales[start + r] = most / 127.0f;  // NaN shows in the outputs
            int32_t* words = to.words + start * (k / 4) + r;
            for (int64_t g = 0; g < groups; g++)
                to.sums[(start + r) * groups + g] = factor * round_group(x, g * group, (g + 1) * group, fine, words, high);
        }
    }
}

template <class W, bool OFFSETS, int R, int P>
void narrow_tile(const Linear& a, const int32_t* x, const float* row_scales, const int32_t* sums, const Part& part) {
    const Weight& w = a.weight;
    const int64_t stride = w.panel_bytes(), groups = w.groups(), step = w.group / W::VALUES;
    vf totals[R][P][PARTS] = {};
    for (int64_t g = 0; g < groups; g++) {
        vi total[R][P][PARTS];
        for (int r = 0; r < R; r++) {
            const vi start = vi{} + (OFFSETS ? 0 : sums[r * groups + g]);
            for (int p = 0; p < P; p++)
                for (int v = 0; v < PARTS; v++) total[r][p][v] = start;
        }
        for (int64_t line = g * step; line < (g + 1) * step; line++) {
            ask_for<P>(part.panel, stride, line, w.k / W::VALUES);
            vu words[P][PARTS];
            for (int p = 0; p < P; p++)
                for (int v = 0; v < PARTS; v++) words[p][v] = load_bits(part.panel + p * stride + line * LINE_BYTES + v * LANES * 4);
            for (int j = 0; j < W::QUADS; j++) {
                const int32_t* mine = x + (line * W::QUADS + j) * R;
                vu weight[P][PARTS];
                for (int p = 0; p < P; p++)
                    for (int v = 0; v < PARTS; v++) weight[p][v] = W::quad(words[p][v], j);
                for (int r = 0; r < R; r++) {
                    const vi input = vi{} + mine[r];
                    for (int p = 0; p < P; p++)
                        for (int v = 0; v < PARTS; v++) total[r][p][v] = dot4(total[r][p][v], weight[p][v], input);
                }
            }
        }
        for (int p = 0; p < P; p++)
            for (int v = 0; v < PARTS; v++) {
                const char* mine = part.panel + p * w.panel_bytes();
                __builtin_prefetch(mine + P * w.panel_bytes() + w.line_bytes() + g * w.scale_stride());
                const vf scale = scales<W>(w, mine, g, v);
                const vf offset = OFFSETS ? offsets<W>(w, mine, g, v) : vf{};
                for (int r = 0; r < R; r++) {
                    totals[r][p][v] += __builtin_convertvector(total[r][p][v], vf) * scale;
                    if (OFFSETS) totals[r][p][v] += offset * static_cast<float>(sums[r * groups + g]);
                }
            }
    }
    for (int r = 0; r < R; r++)
        for (int p = 0; p < P; p++)
            for (int v = 0; v < PARTS; v++) totals[r][p][v] *= row_scales[r];
    put<R, P>(a, part, totals);
}

using NarrowTile = void (*)(const Linear&, const int32_t*, const float*, const int32_t*, const Part&);

template <class W, bool OFFSETS, int P, int R>
constexpr NarrowTile narrow_tile_of(int rows) {
    if constexpr (R == 1) {
        return narrow_tile<W, OFFSETS, 1, P>;
    } else {
        return rows == R ? narrow_tile<W, OFFSETS, R, P> : narrow_tile_of<W, OFFSETS, P, R - 1>(rows);
    }
}

// Small groups are settled often, in floats that lie in registers beside the sums of fewer rows.
inline constexpr int GROUPED_ROWS = LANES == 16 ? 8 : TILE_ROWS;
inline constexpr int64_t SMALL_GROUP = 64;

template <class W, bool OFFSETS>
void narrow_in(const Linear& a, int64_t rows, Share share) {
    const Weight& w = a.weight;
    int64_t from, to;
    share.range((w.n + PANEL - 1) / PANEL, FEW_PANELS, from, to);
    if (from == to) return;
    int64_t high = ROW_BLOCK;
    while (high > 1 && (high * w.k / 4 > INPUTS_SCRATCH || high * (w.groups() + 1) > SUMS_SCRATCH)) high /= 2;
    const int64_t most = w.group <= SMALL_GROUP ? GROUPED_ROWS : TILE_ROWS;
    float* spare = share.scratch + INPUTS_SCRATCH;
    const Rounded inputs{reinterpret_cast<int32_t*>(share.scratch), spare, reinterpret_cast<int32_t*>(spare + high)};
    for (int64_t first = 0; first < rows; first += high) {
        const int64_t count = rows - first < high ? rows - first : high;
        rounded(a, first, count, most, OFFSETS ? 1 : -W::HALF, inputs);  // what weights have too much
        each_tile(count, most, from, to, STRETCH, [&](int tall, int panels, int64_t top, int64_t p, int64_t, int64_t) {
            Part part{nullptr, nullptr, a.out + (first + top) * a.out_stride, w.panel(p), 0, 0, p * PANEL, true, true};
            NarrowTile run = panels == 1             ? narrow_tile_of<W, OFFSETS, 1, TILE_ROWS>(tall)
                             : panels == TILE_PANELS ? narrow_tile_of<W, OFFSETS, TILE_PANELS, TILE_ROWS>(tall)
                                                     : narrow_tile_of<W, OFFSETS, FEW_PANELS, 2>(tall);
            run(a, inputs.words + top * (w.k / 4), inputs.scales + top, inputs.sums + top * w.groups(), part);
        });
    }
}

// Arithmetic alone, in registers: 12 sums that do not wait for each other, `turns` times; with bytes, or with floats.  Returns how
// many operations (an addition or a product of two numbers) that was, less nothing that a compiler could leave out.
inline double arithmetic(int64_t turns, bool bytes) {
    constexpr int SUMS = 12;
    if (bytes) {
        vi total[SUMS] = {};
        vu weights[SUMS];
        for (int i = 0; i < SUMS; i++) weights[i] = vu{} + 0x01020304u * static_cast<uint32_t>(i + 1);
        for (int64_t turn = 0; turn < turns; turn++) {
            const vi inputs = vi{} + static_cast<int32_t>(turn);
            for (int i = 0; i < SUMS; i++) total[i] = dot4(total[i], weights[i], inputs);
        }
        int32_t odd = 0;
        for (int i = 0; i < SUMS; i++) odd |= total[i][0];
        return (odd == 1 ? 1.0 : 0.0) + 8.0 * LANES * SUMS * static_cast<double>(turns);
    }
    vf total[SUMS];
    for (int i = 0; i < SUMS; i++) total[i] = all(static_cast<float>(i));
    const vf weight = all(0.999f);
    for (int64_t turn = 0; turn < turns; turn++)
        for (int i = 0; i < SUMS; i++) {
            total[i] = total[i] * weight + weight;
        }
    float odd = 0.0f;
    for (int i = 0; i < SUMS; i++) odd += total[i][0];
    return (odd == 1.0f ? 1.0 : 0.0) + 2.0 * LANES * SUMS * static_cast<double>(turns);
}

inline void linear(const Linear& a, int64_t rows, Share share) {
    if (rows <= 0) return;
    switch (a.weight.format) {
        case Format::F32: return linear_in<F32>(a, rows, share);
        case Format::BF16: return linear_in<BF16>(a, rows, share);
        case Format::I8:
            if (!a.narrow) return linear_in<I8>(a, rows, share);
            return a.weight.offsets ? narrow_in<I8, true>(a, rows, share) : narrow_in<I8, false>(a, rows, share);
        case Format::I4:
            if (!a.narrow) return linear_in<I4>(a, rows, share);
            return a.weight.offsets ? narrow_in<I4, true>(a, rows, share) : narrow_in<I4, false>(a, rows, share);
    }
}

}  // namespace weft::WEFT_ISA
