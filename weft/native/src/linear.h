// Products with weights in panels.  Included by the files of the instruction sets.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace weft::WEFT_ISA {

inline constexpr int PARTS = PANEL / LANES;  // vectors of a panel
// Rows of the largest register tile, and panels beside each other in it.
inline constexpr int TILE_ROWS = LANES == 16 ? 12 : LANES == 8 ? 6 : 4;
inline constexpr int TILE_PANELS = LANES == 16 ? 2 : 1;
inline constexpr int FEW_PANELS = LANES == 16 ? 4 : 2;  // where one or two rows leave registers free
inline constexpr int ROW_BLOCK = TILE_ROWS * 16;        // rows whose inputs stay in the second cache
inline constexpr int LINE_BLOCK = 1024;                  // lines of a panel that stay there
static_assert(ROW_BLOCK * LINE_BLOCK * 2 <= SCRATCH);

struct F32 {
    static constexpr int VALUES = 1;
    static WEFT_INLINE void weights(const char* line, int part, vf* w) {
        w[0] = load(reinterpret_cast<const float*>(line) + part * LANES);
    }
};
struct BF16 {
    static constexpr int VALUES = 2;
    static WEFT_INLINE void weights(const char* line, int part, vf* w) {
        const vu pair = load_bits(line + part * LANES * 4);
        w[0] = reinterpret_cast<vf>(pair << 16);
        w[1] = reinterpret_cast<vf>(pair & 0xffff0000u);
    }
};

// Rows [0, R) of panels [0, P), over `lines` lines.  x: their inputs, [K, R].  begin: whether nothing was added up before; end:
// whether it is the last.
template <class W, int R, int P>
void tile(const Linear& a, const float* x, const char* panel, int64_t stride, int64_t lines, int64_t n, bool begin, bool end) {
    vf total[R][P][PARTS];
    float* out = a.out;
    for (int r = 0; r < R; r++)
        for (int p = 0; p < P; p++)
            for (int v = 0; v < PARTS; v++) {
                const int64_t at = n + p * PANEL + v * LANES;
                if (begin) {
                    total[r][p][v] = vf{};
                } else if (at + LANES <= a.n) {
                    total[r][p][v] = load(out + r * a.out_stride + at);
                } else {
                    float some[LANES] = {};
                    for (int64_t i = 0; i < LANES && at + i < a.n; i++) some[i] = out[r * a.out_stride + at + i];
                    total[r][p][v] = load(some);
                }
            }
    for (int64_t line = 0; line < lines; line++) {
        const float* mine = x + line * W::VALUES * R;
        vf w[P][PARTS][W::VALUES];
        for (int p = 0; p < P; p++)
            for (int v = 0; v < PARTS; v++) W::weights(panel + p * stride + line * LINE_BYTES, v, w[p][v]);
        for (int r = 0; r < R; r++)
            for (int i = 0; i < W::VALUES; i++) {
                const vf input = all(mine[i * R + r]);  // read once for all panels: registers are what a tile is short of
                for (int p = 0; p < P; p++)
                    for (int v = 0; v < PARTS; v++) total[r][p][v] += w[p][v][i] * input;
            }
    }
    for (int r = 0; r < R; r++)
        for (int p = 0; p < P; p++)
            for (int v = 0; v < PARTS; v++) {
                const int64_t at = n + p * PANEL + v * LANES;
                float* to = out + r * a.out_stride + at;
                vf found = total[r][p][v];
                if (at + LANES <= a.n) {
                    if (end && a.bias) found += load(a.bias + at);
                    store(to, found);
                } else {
                    float some[LANES];
                    store(some, found);
                    for (int64_t i = 0; i < LANES && at + i < a.n; i++)
                        to[i] = some[i] + (end && a.bias ? a.bias[at + i] : 0.0f);
                }
            }
}

using Tile = void (*)(const Linear&, const float*, const char*, int64_t, int64_t, int64_t, bool, bool);

template <class W, int P, int R>
constexpr Tile tile_of(int rows) {
    if constexpr (R == 1) {
        return tile<W, 1, P>;
    } else {
        return rows == R ? tile<W, R, P> : tile_of<W, P, R - 1>(rows);
    }
}

// Inputs of rows [first, first + rows), lines [line, line + lines), as the tiles read them: tile after tile, [K, R] each.
template <class W>
void turned(const Linear& a, int64_t first, int64_t rows, int64_t tiles, int64_t line, int64_t lines, float* out) {
    const int64_t count = lines * W::VALUES;
    for (int64_t t = 0; t < tiles; t++) {
        const int64_t top = rows * t / tiles, high = rows * (t + 1) / tiles - top;
        for (int64_t r = 0; r < high; r++) {
            const float* x = a.x + (first + top + r) * a.x_stride + line * W::VALUES;
            float* to = out + top * count + r;
            for (int64_t i = 0; i < count; i++) to[i * high] = x[i];
        }
    }
}

// Rows [first, first + rows) with panels [from, to), lines [line, line + lines).
template <class W>
void block(const Linear& a, int64_t first, int64_t rows, int64_t from, int64_t to, int64_t line, int64_t lines, float* scratch) {
    const int64_t stride = panel_bytes(a.format, a.k);
    const int64_t tiles = (rows + TILE_ROWS - 1) / TILE_ROWS;  // of nearly equal height
    const float* inputs = scratch;
    if (rows == 1) inputs = a.x + first * a.x_stride + line * W::VALUES;
    else turned<W>(a, first, rows, tiles, line, lines, scratch);
    for (int64_t p = from; p < to;) {
        const int64_t wide = rows <= 2 ? FEW_PANELS : TILE_PANELS;
        const int64_t count = p + wide <= to ? wide : 1;
        const char* panel = static_cast<const char*>(a.panels) + p * stride + line * LINE_BYTES;
        for (int64_t t = 0; t < tiles; t++) {
            const int64_t top = rows * t / tiles, high = rows * (t + 1) / tiles - top;
            Linear moved = a;
            moved.out = a.out + (first + top) * a.out_stride;
            const Tile run = count == 1             ? tile_of<W, 1, TILE_ROWS>(static_cast<int>(high))
                             : count == TILE_PANELS ? tile_of<W, TILE_PANELS, TILE_ROWS>(static_cast<int>(high))
                                                    : tile_of<W, FEW_PANELS, 2>(static_cast<int>(high));
            run(moved, inputs + top * lines * W::VALUES, panel, stride, lines, p * PANEL, line == 0,
                line + lines == a.k / W::VALUES);
        }
        p += count;
    }
}

template <class W>
void linear_in(const Linear& a, int64_t rows, Share share) {
    const int64_t panels = (a.n + PANEL - 1) / PANEL, all = a.k / W::VALUES;
    int64_t from, to;
    share.range(panels, FEW_PANELS, from, to);
    if (from == to) return;
    const int64_t most = rows == 1 ? all : LINE_BLOCK;
    for (int64_t first = 0; first < rows; first += ROW_BLOCK)
        for (int64_t line = 0; line < all; line += most)
            block<W>(a, first, rows - first < ROW_BLOCK ? rows - first : ROW_BLOCK, from, to, line,
                     all - line < most ? all - line : most, share.scratch);
}

inline void linear(const Linear& a, int64_t rows, Share share) {
    if (rows <= 0) return;
    if (a.format == Format::F32) linear_in<F32>(a, rows, share);
    else linear_in<BF16>(a, rows, share);
}

// ------------------------------------------------------------------------------------------ panels, in and out

WEFT_INLINE float half_one(uint16_t h) {  // IEEE binary16
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

// source_kind: 0 float32, 1 bfloat16, 2 float16; row-major [n, k].  They become outputs [first, first + n) of the panels.
inline void pack(const void* source, int source_kind, int64_t n, int64_t k, void* panels, Format format, int64_t first,
                 Share share) {
    const int64_t stride = panel_bytes(format, k);
    const int values = values_of_line(format);
    int64_t from, to;  // panels, so that no two threads write one line
    const int64_t low = first / PANEL, high = (first + n + PANEL - 1) / PANEL;
    share.range(high - low, 1, from, to);
    for (int64_t p = low + from; p < low + to; p++) {
        const int64_t begin = p * PANEL < first ? first : p * PANEL;
        const int64_t end = (p + 1) * PANEL < first + n ? (p + 1) * PANEL : first + n;
        char* panel = static_cast<char*>(panels) + p * stride;
        for (int64_t line = 0; line < k / values; line++)
            for (int64_t out = begin; out < end; out++)
                for (int i = 0; i < values; i++) {
                    const int64_t at = (out - first) * k + line * values + i;
                    float x;
                    uint16_t raw = 0;
                    if (source_kind == 0) {
                        x = static_cast<const float*>(source)[at];
                    } else {
                        raw = static_cast<const uint16_t*>(source)[at];
                        x = source_kind == 1 ? widen_one(raw) : half_one(raw);
                    }
                    const int64_t cell = (line * PANEL + out % PANEL) * values + i;
                    if (format == Format::F32) reinterpret_cast<float*>(panel)[cell] = x;
                    else reinterpret_cast<uint16_t*>(panel)[cell] = source_kind == 1 ? raw : narrow_one(x);
                }
    }
}

// out [T, k] = rows `tokens` of the weight, times scale; a negative token gets row 0.
inline void embed(const void* panels, Format format, int64_t k, const int64_t* tokens, float scale, float* out,
                  int64_t stride, int64_t rows, Share share) {
    int64_t from, to;
    share.range(rows, 1, from, to);
    const int values = values_of_line(format);
    for (int64_t row = from; row < to; row++) {
        const int64_t token = tokens[row] < 0 ? 0 : tokens[row];
        const char* panel = static_cast<const char*>(panels) + token / PANEL * panel_bytes(format, k);
        float* mine = out + row * stride;
        for (int64_t line = 0; line < k / values; line++)
            for (int i = 0; i < values; i++) {
                const int64_t cell = (line * PANEL + token % PANEL) * values + i;
                const float x = format == Format::F32 ? reinterpret_cast<const float*>(panel)[cell]
                                                      : widen_one(reinterpret_cast<const uint16_t*>(panel)[cell]);
                mine[line * values + i] = x * scale;
            }
    }
}

}  // namespace weft::WEFT_ISA
