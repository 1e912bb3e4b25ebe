// Weights in panels: how a line is read, how panels are filled, and rows of them as embeddings.  Included by the files of the
// instruction sets.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace weft::WEFT_ISA {

inline constexpr int PARTS = PANEL / LANES;  // vectors of a panel
inline constexpr float MULTIPLES = 15.0f;    // the largest multiple of a row's nested scales

// `value(word, i)`: input i of a line as floats, out of the words of LANES outputs; whole numbers come less their half, and
// UNIT times too large, which their scales put right.
struct F32 {
    static constexpr int VALUES = 1;
    static constexpr bool SCALED = false;
    static constexpr float UNIT = 1.0f;
    static WEFT_INLINE vf value(vu word, int) { return reinterpret_cast<vf>(word); }
};
struct BF16 {
    static constexpr int VALUES = 2;
    static constexpr bool SCALED = false;
    static constexpr int HALF = 0;
    static constexpr float UNIT = 1.0f;
    static WEFT_INLINE vf value(vu word, int i) { return reinterpret_cast<vf>(i ? word & 0xffff0000u : word << 16); }
};
struct I8 {
    static constexpr int VALUES = 4;
    static constexpr bool SCALED = true;
    static constexpr int HALF = 128;
    static constexpr float UNIT = 16777216.0f;  // 2^24: the byte stands at a word's head, with its sign
    static WEFT_INLINE vf value(vu word, int i) {
        const vu head = i < 3 ? (word << (24 - 8 * i)) & 0xff000000u : word & 0xff000000u;
        return __builtin_convertvector(reinterpret_cast<vi>(head ^ 0x80000000u), vf);
    }
    static constexpr int QUADS = 1;
    static WEFT_INLINE vu quad(vu word, int) { return word; }  // four inputs as bytes
};
struct I4 {
    static constexpr int VALUES = 8;
    static constexpr bool SCALED = true;
    static constexpr int HALF = 8;
#if WEFT_LANES == 16
    static constexpr float UNIT = 1.0f;
    static WEFT_INLINE vf value(vu word, int i) {  // a permutation looks at the low four bits alone
        const vf table = {-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7};
        return reinterpret_cast<vf>(_mm512_permutexvar_ps(reinterpret_cast<__m512i>(word >> (i < 4 ? 8 * i : 8 * i - 28)),
                                                          reinterpret_cast<__m512>(table)));
    }
#else
    static constexpr float UNIT = 268435456.0f;  // 2^28
    static WEFT_INLINE vf value(vu word, int i) {
        const vu head = (word << (i < 4 ? 28 - 8 * i : 56 - 8 * i)) & 0xf0000000u;
        return __builtin_convertvector(reinterpret_cast<vi>(head ^ 0x80000000u), vf);
    }
#endif
    static constexpr int QUADS = 2;
    static WEFT_INLINE vu quad(vu word, int i) { return (i ? word >> 4 : word) & 0x0f0f0f0fu; }
};

// Of nested scales: those of LANES outputs, and what one group's are of them.
WEFT_INLINE vf row_scales(const Weight& w, const char* panel, int part) {
    return load(reinterpret_cast<const float*>(panel + w.line_bytes()) + part * LANES);
}
WEFT_INLINE vi multiples(const Weight& w, const char* panel, int64_t group, int part) {
    return load_bytes(panel + w.scales_at() + group * w.scale_stride() + part * LANES);
}

// Scales of one group of a panel, LANES outputs from `part` on, and their offsets less what the scales put right.
WEFT_INLINE vf scales(const Weight& w, const char* panel, int64_t group, int part) {
    const char* at = panel + w.scales_at() + group * w.scale_stride();
    if (w.nested) return row_scales(w, panel, part) * __builtin_convertvector(multiples(w, panel, group, part), vf);
    return w.grouped() ? half(reinterpret_cast<const uint16_t*>(at) + part * LANES)
                       : load(reinterpret_cast<const float*>(at) + part * LANES);
}
WEFT_INLINE vf offsets(const Weight& w, const char* panel, int64_t group, int part) {
    const char* at = panel + w.line_bytes() + group * w.scale_stride() + w.scale_stride() / 2;
    return w.grouped() ? half(reinterpret_cast<const uint16_t*>(at) + part * LANES)
                       : load(reinterpret_cast<const float*>(at) + part * LANES);
}

// ------------------------------------------------------------------------------------------ panels, in and out

// Outputs of panel p that lie in [first, first + n).
WEFT_INLINE void outputs(int64_t p, int64_t first, int64_t n, int64_t& begin, int64_t& end) {
    begin = p * PANEL < first ? first : p * PANEL;
    end = (p + 1) * PANEL < first + n ? (p + 1) * PANEL : first + n;
}

// Panels that outputs [first, first + n) touch and this thread fills: no two threads write one line.
WEFT_INLINE void touched(int64_t first, int64_t n, Share share, int64_t& from, int64_t& to) {
    const int64_t low = first / PANEL, high = (first + n + PANEL - 1) / PANEL;
    share.range(high - low, 1, from, to);
    from += low, to += low;
}

// Rows of `words` words, one after the other, become the lines of a panel; those that fill no square are left, from the line that is
// returned.
WEFT_INLINE int64_t pack_words(const char* rows, int64_t words, char* panel) {
    int64_t line = 0;
    for (; line + LANES <= words; line += LANES)
        for (int part = 0; part < PARTS; part++) {
            vu square[LANES];
            for (int r = 0; r < LANES; r++) square[r] = load_bits(rows + ((part * LANES + r) * words + line) * 4);
            turn<LANES / 2>(square);
            for (int i = 0; i < LANES; i++)
                store(reinterpret_cast<float*>(panel) + (line + i) * PANEL + part * LANES, reinterpret_cast<vf>(square[i]));
        }
    return line;
}

// source_kind: 0 float32, 1 bfloat16, 2 float16; row-major [n, k].  They become outputs [first, first + n) of float panels.
inline void pack(const Weight& w, const void* source, int source_kind, int64_t n, int64_t first, Share share) {
    const int values = values_of_line(w.format);
    const bool alike = source_kind == (w.format == Format::F32 ? 0 : 1);  // then a line is a word of each output
    int64_t from, to;
    touched(first, n, share, from, to);
    for (int64_t p = from; p < to; p++) {
        int64_t begin, end;
        outputs(p, first, n, begin, end);
        char* panel = const_cast<char*>(w.panel(p));
        int64_t line = 0;
        if (alike && end - begin == PANEL)
            line = pack_words(static_cast<const char*>(source) + (begin - first) * (w.k / values) * 4, w.k / values, panel);
        for (; line < w.k / values; line++)
            for (int64_t out = begin; out < end; out++)
                for (int i = 0; i < values; i++) {
                    const int64_t at = (out - first) * w.k + line * values + i;
                    float x;
                    uint16_t raw = 0;
                    if (source_kind == 0) {
                        x = static_cast<const float*>(source)[at];
                    } else {
                        raw = static_cast<const uint16_t*>(source)[at];
                        x = source_kind == 1 ? widen_one(raw) : half_one(raw);
                    }
                    const int64_t cell = (line * PANEL + out % PANEL) * values + i;
                    if (w.format == Format::F32) reinterpret_cast<float*>(panel)[cell] = x;
                    else reinterpret_cast<uint16_t*>(panel)[cell] = source_kind == 1 ? raw : narrow_one(x);
                }
    }
}

WEFT_INLINE int nibble(int i) { return i < 4 ? 2 * i : 2 * i - 7; }  // of input i in a word of I4

// Whole numbers of one output, each plus `shift`, become lane `lane` of a panel.
WEFT_INLINE void put_row(const Weight& w, char* panel, int64_t lane, const uint8_t* row, int shift) {
    if (w.format == Format::I8) {
        for (int64_t i = 0; i < w.k; i += 4) {
            uint8_t word[4];
            for (int j = 0; j < 4; j++) word[j] = static_cast<uint8_t>(row[i + j] + shift);
            std::memcpy(panel + (i / 4 * PANEL + lane) * 4, word, 4);
        }
        return;
    }
    for (int64_t line = 0; line < w.k / 8; line++) {
        uint32_t word = 0;
        for (int i = 0; i < 8; i++) word |= static_cast<uint32_t>(row[line * 8 + i] + shift) << 4 * nibble(i);
        std::memcpy(panel + (line * PANEL + lane) * 4, &word, 4);
    }
}

// Scales of one output, and its offsets if there are any; each stands for `repeat` groups.
WEFT_INLINE void put_scales(const Weight& w, char* panel, int64_t lane, const float* scales, const float* offsets, int64_t repeat) {
    char* to = panel + w.scales_at();
    const int64_t count = w.groups() / repeat;
    if (w.nested) {
        float most = 0.0f;
        for (int64_t given = 0; given < count; given++) most = std::fmax(most, std::fabs(scales[given]));
        const float row = most / MULTIPLES;
        reinterpret_cast<float*>(panel + w.line_bytes())[lane] = row;
        for (int64_t g = 0; g < w.groups(); g++) {
            const float times = row > 0.0f ? scales[g / repeat] / row : 0.0f;
            to[g * PANEL + lane] = static_cast<char>(std::lrintf(std::fmax(-MULTIPLES, std::fmin(times, MULTIPLES))));
        }
        return;
    }
    const int64_t stride = w.offsets ? w.scale_stride() / 2 : w.scale_stride();
    const auto put_one = [&](float x) {
        if (w.grouped()) reinterpret_cast<uint16_t*>(to)[lane] = half_of(x);
        else reinterpret_cast<float*>(to)[lane] = x;
        to += stride;
    };
    for (int64_t given = 0; given < count; given++)
        for (int64_t turn = 0; turn < repeat; turn++) {
            put_one(scales[given]);
            if (w.offsets) put_one(offsets[given]);
        }
}

inline void pack_values(const Weight& w, const Values& v, int64_t n, int64_t first, Share share) {
    int64_t from, to;
    touched(first, n, share, from, to);
    const int64_t repeat = w.groups() / v.groups;
    for (int64_t p = from; p < to; p++) {
        int64_t begin, end;
        outputs(p, first, n, begin, end);
        char* panel = const_cast<char*>(w.panel(p));
        for (int64_t out = begin; out < end; out++) {
            const int64_t at = out - first;
            put_row(w, panel, out % PANEL, v.values + at * w.k, v.shift);
            put_scales(w, panel, out % PANEL, v.scales + at * v.groups, v.offsets ? v.offsets + at * v.groups : nullptr, repeat);
        }
    }
}

// Value i of a word, a whole number with what it has too much.
template <class W>
WEFT_INLINE float number(uint32_t word, int i) {
    if (std::is_same_v<W, F32>) {
        float found;
        std::memcpy(&found, &word, 4);
        return found;
    }
    if (std::is_same_v<W, BF16>) return widen_one(static_cast<uint16_t>(word >> 16 * i));
    return static_cast<float>(std::is_same_v<W, I8> ? word >> 8 * i & 255u : word >> 4 * nibble(i) & 15u);
}

// The values of one output, times `by`.
template <class W>
inline void open_row(const Weight& w, const char* panel, int64_t lane, float by, float* out) {
    const int64_t groups = W::SCALED ? w.groups() : 1, lines = w.k / W::VALUES / groups;
    const char* at = panel + lane * 4;
    for (int64_t g = 0; g < groups; g++) {
        float scale = 1.0f, times = 1.0f, offset = 0.0f;
        if constexpr (W::SCALED) {
            const char* scales = panel + w.scales_at() + g * w.scale_stride();
            const auto stored = [&](const char* p) {
                return w.grouped() ? half_one(reinterpret_cast<const uint16_t*>(p)[lane]) : reinterpret_cast<const float*>(p)[lane];
            };
            if (w.nested) {
                scale = reinterpret_cast<const float*>(panel + w.line_bytes())[lane];
                times = static_cast<float>(static_cast<int8_t>(scales[lane]));
            } else {
                scale = stored(scales);
            }
            if (w.offsets) offset = stored(scales + w.scale_stride() / 2);
        }
        for (int64_t line = 0; line < lines; line++, at += LINE_BYTES, out += W::VALUES) {
            uint32_t word;
            std::memcpy(&word, at, 4);
#pragma GCC unroll 8
            for (int i = 0; i < W::VALUES; i++) {
                const float value = number<W>(word, i);
                if constexpr (W::SCALED) out[i] = (w.offsets ? std::fma(scale, value, offset) : scale * (times * (value - W::HALF))) * by;
                else out[i] = value * by;
            }
        }
    }
}

// out [T, k] = rows `tokens` of the weight, times scale; a negative token gets row 0.
inline void embed(const Weight& w, const int64_t* tokens, float scale, float* out, int64_t stride, int64_t rows, Share share) {
    int64_t from, to;
    share.range(rows, 1, from, to);
    const auto open = [&]<class W>(W) {
        for (int64_t row = from; row < to; row++) {
            const int64_t token = tokens[row] < 0 ? 0 : tokens[row];
            open_row<W>(w, w.panel(token / PANEL), token % PANEL, scale, out + row * stride);
        }
    };
    switch (w.format) {
        case Format::F32: return open(F32{});
        case Format::BF16: return open(BF16{});
        case Format::I8: return open(I8{});
        case Format::I4: return open(I4{});
    }
}

}  // namespace weft::WEFT_ISA
