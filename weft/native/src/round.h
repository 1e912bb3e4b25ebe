// Floats rounded to weights of whole numbers: what each group of inputs spans, and the values on a grid that is given.
// Included by the files of the instruction sets.
#pragma once

#include "kernels.h"
#include "simd.h"
#include "weights.h"

namespace weft::WEFT_ISA {

WEFT_INLINE vf source_at(const Source& s, int64_t at) {
    return s.kind ? widen(static_cast<const uint16_t*>(s.values) + at) : load(static_cast<const float*>(s.values) + at);
}
WEFT_INLINE float source_one(const Source& s, int64_t at) {
    return s.kind ? widen_one(static_cast<const uint16_t*>(s.values)[at]) : static_cast<const float*>(s.values)[at];
}

// low, high [n, k / group]: the smallest and the largest of each group; NaN where a value is not finite.  high null: low is the value
// of the largest magnitude, the first of them.
inline void spans(const Source& source, int64_t n, int64_t k, int64_t group, float* low, float* high, Share share) {
    int64_t from, to;
    share.range(n * (k / group), 1, from, to);
    for (int64_t g = from; g < to; g++) {
        const int64_t first = g * group;
        vf least = all(source_one(source, first)), most = least, odd = vf{};
        int64_t i = 0;
        for (; i + LANES <= group; i += LANES) {
            const vf x = source_at(source, first + i);
            least = x < least ? x : least;
            most = larger(most, x);
            odd += x * 0.0f;
        }
        float bottom = -top(-least), peak = top(most), strange = sum(odd);
        for (; i < group; i++) {
            const float x = source_one(source, first + i);
            bottom = x < bottom ? x : bottom;
            peak = x > peak ? x : peak;
            strange += x * 0.0f;
        }
        if (high) {
            low[g] = bottom + strange, high[g] = peak + strange;
            continue;
        }
        float found = peak > -bottom ? peak : bottom;
        if (peak == -bottom)
            for (i = 0; i < group; i++)
                if (const float x = source_one(source, first + i); x == peak || x == bottom) {
                    found = x;
                    break;
                }
        low[g] = found + strange;
    }
}

// Rounds n rows of K inputs to outputs [first, first + n): (x - base) / step to the nearest, ties to even, where the step is the scale
// (1 for a scale of 0) and the base the offset, or as many steps below 0 as half the grid has.  scales, offsets: [n, groups].
inline void pack_rounded(const Weight& w, const Source& source, const float* scales, const float* offsets, int64_t n, int64_t first,
                         Share share) {
    const int64_t groups = w.groups();
    const float half = w.format == Format::I8 ? 128.0f : 8.0f, last = 2.0f * half - 1.0f, magic = 12582912.0f;
    auto* row = reinterpret_cast<uint8_t*>(share.scratch);
    int64_t from, to;
    touched(first, n, share, from, to);
    for (int64_t p = from; p < to; p++) {
        int64_t begin, end;
        outputs(p, first, n, begin, end);
        char* panel = const_cast<char*>(w.panel(p));
        for (int64_t out = begin; out < end; out++) {
            const int64_t mine = (out - first) * groups;
            for (int64_t g = 0; g < groups; g++) {
                const float scale = scales[mine + g], base = offsets ? offsets[mine + g] : -half * scale;
                const float step = scale == 0.0f ? 1.0f : scale;
                const int64_t at = g * w.group, start = (out - first) * w.k + at;
                int64_t i = 0;
                for (; i + LANES <= w.group; i += LANES) {
                    vf whole = ((source_at(source, start + i) - base) / step + magic) - magic;
                    whole = select(whole > 0.0f, whole, vf{});
                    whole = select(whole < last, whole, all(last));
                    store_bytes(row + at + i, __builtin_convertvector(whole, vi));
                }
                for (; i < w.group; i++) {
                    float whole = ((source_one(source, start + i) - base) / step + magic) - magic;
                    whole = whole > 0.0f ? whole : 0.0f;
                    row[at + i] = static_cast<uint8_t>(whole < last ? whole : last);
                }
            }
            put_row(w, panel, out % PANEL, row, 0);
            put_scales(w, panel, out % PANEL, scales + mine, offsets ? offsets + mine : nullptr, 1);
        }
    }
}

}  // namespace weft::WEFT_ISA
