// Weights of 4 bits whose scales are whole multiples of one for each row: sums of whole numbers are exact until a row's scale comes, so
// that it is free where the multiples come in.  Few rows multiply a group's sum.  For more, weights become bytes in the tile that
// multiplies them, and, where several tiles read the same ones, in the first, which writes them down: the others are those of 8 bits.
// Included by the files of the instruction sets.
//
// What can be gained by it (QServe, arXiv:2405.04532, keeps such scales too): a float scale for each group and row costs a conversion
// and a product for eight products of bytes.
#pragma once

#include "linear.h"
#include "narrow.h"
#include "weights.h"

namespace weft::WEFT_ISA {

// Inputs whose sum with 4 bits has 16: 32 * 8 * 127 < 2^15.
inline constexpr int64_t SHORT_GROUP = 32;

typedef uint16_t v16 __attribute__((vector_size(4 * WEFT_LANES)));
WEFT_INLINE vu times_halves(vu x, vu y) { return reinterpret_cast<vu>(reinterpret_cast<v16>(x) * reinterpret_cast<v16>(y)); }
WEFT_INLINE vu plus_halves(vu x, vu y) { return reinterpret_cast<vu>(reinterpret_cast<v16>(x) + reinterpret_cast<v16>(y)); }

// Makes 4 bits bytes, in a group where LANES outputs have these multiples.  A value times its multiple stands as
// (value - 8) * multiple + 128, which a byte holds whatever the sign, so that two of them make a whole number of 16 bits that is right by
// itself: what the lower one borrows in between, it gives back.
struct Widening {
    vu both, bias;

    Widening() = default;
    WEFT_INLINE explicit Widening(vu times) {
        const vu start = (128u - 8u * times) * 257u;
        both = times << 16 | (times & 0xffffu), bias = start << 16 | (start & 0xffffu);
    }
    WEFT_INLINE vu bytes(vu word, int j) const { return plus_halves(times_halves(I4::quad(word, j), both), bias); }
};

// Lines of I4 of one group, from `from` on, as twice as many of I8.
WEFT_INLINE void widen_group(const char* from, vu times, int64_t lines, float* to) {
    const Widening widening(times);
#pragma GCC unroll 4
    for (int64_t i = 0; i < lines; i++, from += LINE_BYTES, to += 2 * PANEL) {
        const vu word = load_bits(from);
        for (int j = 0; j < I4::QUADS; j++) store(to + j * PANEL, reinterpret_cast<vf>(widening.bytes(word, j)));
    }
}
// Lines [first, first + count) of a panel of I4 as those of I8, and a line of the rows' scales behind them.
inline void widen_lines(const Weight& w, const char* panel, int64_t first, int64_t count, char* out) {
    const int64_t step = w.group / I4::VALUES;
    for (int v = 0; v < PARTS; v++) {
        auto* to = reinterpret_cast<float*>(out) + v * LANES;
        const char *from = panel + (first * LINE_BYTES + v * LANES * 4), *times = panel + w.scales_at() + first / step * w.scale_stride() + v * LANES;
        for (int64_t done = 0; done < count; done += step, from += step * LINE_BYTES, to += step * 2 * PANEL, times += w.scale_stride())
            widen_group(from, reinterpret_cast<vu>(load_bytes(times)), step, to);
        store(to, row_scales(w, panel, v));
    }
}

// The lines of `part`, of each of its panels one after the other, `apart` bytes from each other.
inline void widen(const Weight& w, const Part& part, int64_t panels, char* out, int64_t apart) {
    for (int64_t p = 0; p < panels; p++) {
        const int64_t half = panels / 2, second = half && p >= half;
        widen_lines(w, part.panel + (second ? part.far + (p - half) * w.panel_bytes() : p * w.panel_bytes()), part.line, part.lines,
                    out + p * apart);
    }
}

}  // namespace weft::WEFT_ISA
