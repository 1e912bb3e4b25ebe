// Products with weights in panels, inputs in float32.  Included by the files of the instruction sets.
#pragma once

#include "kernels.h"
#include "rows.h"
#include "simd.h"
#include "weights.h"

namespace weft::WEFT_ISA {

// Rows of the largest register tile, and panels beside each other in it.
inline constexpr int TILE_ROWS = LANES == 16 ? 12 : LANES == 8 ? 6 : 4;
inline constexpr int TILE_PANELS = LANES == 16 ? 2 : 1;
// Where few rows leave registers free: a processor looks further ahead the more streams it reads.
inline constexpr int FEW_PANELS = LANES == 16 ? 4 : 2, FEW_ROWS = LANES == 16 ? 6 : 2;
// Panels beside each other in the tiles of a block of so many rows.
constexpr int64_t panels_beside(int64_t rows) { return rows <= FEW_ROWS ? FEW_PANELS : TILE_PANELS; }
inline constexpr int64_t ROW_BLOCK = 192;               // rows whose inputs stay in the second cache
static_assert(ROW_BLOCK % TILE_ROWS == 0);

template <class W>
inline constexpr int64_t INPUT_BLOCK = W::VALUES == 1 ? 1024 : 2048;  // inputs whose part of a panel stays there: whole groups
static_assert(ROW_BLOCK * 2048 <= INPUTS_SCRATCH);
inline constexpr int64_t OPENED_TILES = 2;  // more tiles than that share weights that were made floats once
inline constexpr int64_t STRETCH = 256;  // inputs whose part of a tile's panels stays in the first cache while tile follows tile
inline constexpr int64_t SHORT_STRETCH = 192, SHORT_TILES = 8;  // with few tiles, so that inputs of all of them stay there too
static_assert(STRETCH * TILE_PANELS * PANEL <= OPENED_SCRATCH);
static_assert(STRETCH % MOST_GROUP == 0 && SHORT_STRETCH >= MOST_GROUP);

// Sums of a tile in memory, [R, P * PANEL].  The second half of the panels is `far` from the first.
struct Sums {
    float* at = nullptr;
    int64_t stride = 0, far = 0;

    template <int P>
    WEFT_INLINE float* of(int r, int p) const {
        if constexpr (P == 1) return at + r * stride;
        else return at + r * stride + p % (P / 2) * PANEL + p / (P / 2) * far;
    }
};

// What a tile computes: rows from `row` and outputs from n on, over lines [line, line + lines) of panels that begin at `panel`.
struct Part {
    const float* x = nullptr;     // inputs of the tile's rows, [K, R]
    const float* sums = nullptr;  // of each row's groups, [R, groups], where the weight has offsets
    Sums from{}, to{};            // what was added up before, if anything, and where it goes
    const char* panel = nullptr;
    int64_t line = 0, lines = 0, n = 0, row = 0;
    int64_t far = 0;              // bytes between the two halves of the panels
    int64_t next = 0;             // bytes from a panel to the one in its place in the next tile
    bool end = false;             // whether nothing is missing then
    bool paired = false;          // whether those halves are gates and what they open
    const float* opened = nullptr;  // those lines as floats, [inputs, panels * PANEL], where several tiles read them
    const float* scales = nullptr;  // of the tile's rows, where they are of 8 bits
    // What a later tile reads of its panels, which lie `apart`: `each` bytes for a line of this one's, which no longer come from memory.
    const char* later = nullptr;
    int64_t each = 0, apart = 0;
    bool cold = false;              // whether what it writes is in no cache: rows of a result lie far from each other
    int32_t* handed = nullptr;      // where what gates open goes as words of the next product's inputs (mlp.h), [words, R]
    // Of tiles in matrix registers (matrix.h): their rows; words that were made of their lines, from panel to panel `made_apart` bytes, or
    // room for those that a tile makes itself; and whether `from` and `to` are memory that holds whole registers.
    int64_t high = 0, made_apart = 0;
    char* made = nullptr;
    bool near = false, keeps = false;

    // Lines of panels [p, p + panels), or of half as many gates and of what those open.
    WEFT_INLINE void place(const Weight& w, int64_t p, int64_t panels, int64_t from_line, int64_t count) {
        panel = w.panel(p), n = p * PANEL, line = from_line, lines = count;
        far = paired ? w.n / (2 * PANEL) * w.panel_bytes() : panels / 2 * w.panel_bytes();
        next = (paired ? panels / 2 : panels) * w.panel_bytes();
    }
    // The share-th of `shares` equal parts of what a later tile reads, `bytes` from `after` on of each of its panels.
    WEFT_INLINE void ask_later(const char* after, int64_t distance, int64_t bytes, int64_t share, int64_t shares) {
        if (share < 0) return;
        each = (bytes + shares * lines - 1) / (shares * lines);
        later = after + share * lines * each, apart = distance;
    }
    // The same by whole lines, `each` of each panel in each of `steps` steps.
    WEFT_INLINE void ask_later_lines(const char* after, int64_t distance, int64_t count, int64_t share, int64_t shares, int64_t steps) {
        each = (count + shares * steps - 1) / (shares * steps);
        later = after + share * steps * each * LINE_BYTES, apart = distance;
    }
};

template <int P>
WEFT_INLINE const char* panel_of(const Weight& w, const char* panel, int64_t far, int p) {
    if constexpr (P == 1) return panel;
    else return panel + p % (P / 2) * w.panel_bytes() + p / (P / 2) * far;
}

// Asks memory for what P panels hold after `line`, or for the beginning of the next P: the processor's own prefetching ends at every
// page, and rows keep it from looking far.  Worth a third of the speed where weights come from memory.  They go to the second cache: a
// Zen 4 can wait for more lines there than in the first (a fifth of the time of one row of 8 or 4 bits), a Xeon does not mind.
inline constexpr int64_t AHEAD = 256;  // lines, of all panels together
template <int P>
WEFT_INLINE void ask_for(const char* const (&panels)[P], int64_t line, int64_t lines, int64_t next) {
    constexpr int64_t FURTHEST = AHEAD / (P > 1 ? P : 2);
    const int64_t at = line + (FURTHEST < lines ? FURTHEST : lines), more = at < lines ? at * LINE_BYTES : next + (at - lines) * LINE_BYTES;
    for (int p = 0; p < P; p++) __builtin_prefetch(panels[p] + more, 0, 2);
}

template <int P>
WEFT_INLINE void ask_for_later(const Part& part, const char*& later) {
    __builtin_prefetch(later, 0, 2);
    if (P > 1) __builtin_prefetch(later + part.apart, 0, 2);
    later += part.each;
}

// Asks for the lines that a tile will write, before it computes: else each store waits until its line is there, an eighth of the
// whole product.
template <int R, int P>
WEFT_INLINE void ask_to_write(const Linear& a, const Part& part) {
    const bool opens = P > 1 && part.paired && part.end;
    if (opens && part.handed) return;
    for (int r = 0; r < R; r++)
        for (int p = 0; p < (opens ? P / 2 : P); p++)
            __builtin_prefetch(opens ? a.gate.out + (part.row + r) * a.gate.out_stride + part.n + p * PANEL : part.to.of<P>(r, p), 1);
}

// Calls `run` (row, panel, part of it) for each vector of a tile's sums, unrolled: a compiler would keep in memory what loops go over.
template <int R, int P, class Run>
WEFT_INLINE void each_sum(const Run& run) {
#pragma GCC unroll 16
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int p = 0; p < P; p++)
#pragma GCC unroll 4
            for (int v = 0; v < PARTS; v++) run(r, p, v);
}

// Between a tile and memory that ends at N.
template <int R, int P>
WEFT_INLINE void fetch(const Linear& a, const Part& part, vf (&totals)[R][P][PARTS]) {
    const int64_t left = a.weight.n - part.n;
    const bool none = !part.from.at, whole = part.paired || P * PANEL <= left;
    each_sum<R, P>([&](int r, int p, int v) {
        const float* from = part.from.of<P>(r, p) + v * LANES;
        totals[r][p][v] = none ? vf{} : whole ? load(from) : some(from, left - p * PANEL - v * LANES);
    });
}
// What gates open, of row r and half a tile's panel p.
template <int R, int P>
WEFT_INLINE vf opened(const Linear& a, const Part& part, const vf (&totals)[R][P][PARTS], int r, int p, int v) {
    const int at = p * PANEL + v * LANES;
    vf gate = totals[r][p][v], up = totals[r][p + P / 2][v];
    if (const float* bias = a.bias ? a.bias + part.n : nullptr) gate += load(bias + at), up += load(bias + a.gate.inner + at);
    return activated(gate, a.gate.activation) * up;
}
template <int R, int P>
WEFT_INLINE void put(const Linear& a, const Part& part, vf (&totals)[R][P][PARTS]) {
    const int64_t left = a.weight.n - part.n;
    const float* bias = part.end && a.bias ? a.bias + part.n : nullptr;
    if constexpr (P > 1) {
        if (part.paired && part.end) {
            for (int r = 0; r < R; r++)
                for (int p = 0; p < P / 2; p++)
                    for (int v = 0; v < PARTS; v++)
                        store(a.gate.out + (part.row + r) * a.gate.out_stride + part.n + p * PANEL + v * LANES,
                              opened<R, P>(a, part, totals, r, p, v));
            return;
        }
    }
    if (part.paired || P * PANEL <= left) {
        if (bias) each_sum<R, P>([&](int r, int p, int v) { totals[r][p][v] += load(bias + p * PANEL + v * LANES); });
        return each_sum<R, P>([&](int r, int p, int v) { store(part.to.of<P>(r, p) + v * LANES, totals[r][p][v]); });
    }
    for (int r = 0; r < R; r++)
        for (int p = 0; p < P; p++) {
            float* to = part.to.of<P>(r, p);
            for (int v = 0; v < PARTS; v++) {
                const int at = p * PANEL + v * LANES, mine = v * LANES;
                for (int64_t i = 0; i < LANES && i < left - at; i++)
                    to[mine + i] = bias ? totals[r][p][v][i] + bias[at + i] : totals[r][p][v][i];
            }
        }
}

// totals = totals + found * scale (+ sum * offset) of one group, `sums` a row's sums of inputs, `stride` apart.
template <int R, int P>
WEFT_INLINE void settle(const Weight& w, const Part& part, int64_t group, const vf (&found)[R][P][PARTS], const float* sums,
                        int64_t stride, vf (&totals)[R][P][PARTS]) {
    const float unit = 1.0f / (w.format == Format::I8 ? I8::UNIT : I4::UNIT), half = w.format == Format::I8 ? I8::HALF : I4::HALF;
    vf fine[P][PARTS];
    each_sum<1, P>([&](int, int p, int v) {
        const char* mine = panel_of<P>(w, part.panel, part.far, p);
        __builtin_prefetch(mine + part.next + w.scales_at() + group * w.scale_stride());
        fine[p][v] = scales(w, mine, group, v) * unit;
    });
    each_sum<R, P>([&](int r, int p, int v) { totals[r][p][v] += found[r][p][v] * fine[p][v]; });
    if (w.offsets) {
        vf offset[P][PARTS];
        each_sum<1, P>([&](int, int p, int v) {
            const char* mine = panel_of<P>(w, part.panel, part.far, p);
            offset[p][v] = offsets(w, mine, group, v) + scales(w, mine, group, v) * half;
        });
        each_sum<R, P>([&](int r, int p, int v) { totals[r][p][v] += offset[p][v] * sums[r * stride + group]; });
    }
}

// One input of each of R rows times weights of P panels.
template <int R, int P>
WEFT_INLINE void add_input(const vf (&weight)[P][PARTS], const float* x, vf (&total)[R][P][PARTS]) {
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) {
        const vf input = all(x[r]);  // read once for all panels: registers are what a tile is short of
        each_sum<1, P>([&](int, int p, int v) { total[r][p][v] += weight[p][v] * input; });
    }
}

// Scales of whole rows, when nothing is missing, and the sums to where they go.
template <int R, int P>
WEFT_INLINE void finish(const Linear& a, const Part& part, vf (&totals)[R][P][PARTS]) {
    const Weight& w = a.weight;
    if (w.group && !w.grouped() && part.end) {
        vf total[R][P][PARTS];
        each_sum<R, P>([&](int r, int p, int v) { total[r][p][v] = totals[r][p][v], totals[r][p][v] = vf{}; });
        settle<R, P>(w, part, 0, total, part.sums, 1, totals);
    }
    put<R, P>(a, part, totals);
}

// Lines of P panels as floats, which costs as much as a third of what a tile computes with them.
template <class W, int P>
void open_lines(const Weight& w, const Part& part, float* out) {
    const char* panels[P];
    for (int p = 0; p < P; p++) panels[p] = panel_of<P>(w, part.panel, part.far, p);
    for (int64_t at = 0; at < part.lines; at++)
        for (int p = 0; p < P; p++)
            for (int v = 0; v < PARTS; v++) {
                const vu word = load_bits(panels[p] + (part.line + at) * LINE_BYTES + v * LANES * 4);
#pragma GCC unroll 8
                for (int i = 0; i < W::VALUES; i++)
                    store(out + ((at * W::VALUES + i) * P + p) * PANEL + v * LANES, W::value(word, i));
            }
}

template <class W, int R, int P>
void tile(const Linear& a, const Part& part) {
    const Weight& w = a.weight;
    const char* panels[P];
    for (int p = 0; p < P; p++) panels[p] = panel_of<P>(w, part.panel, part.far, p);
    vf totals[R][P][PARTS];
    fetch<R, P>(a, part, totals);
    const bool grouped = W::SCALED && w.grouped();
    const int64_t step = grouped ? w.group / W::VALUES : part.lines;
    for (int64_t first = 0; first < part.lines; first += step) {
        vf total[R][P][PARTS];
        each_sum<R, P>([&](int r, int p, int v) { total[r][p][v] = grouped ? vf{} : totals[r][p][v]; });
        for (int64_t line = first; line < first + step; line++) {
            const float* x = part.x + line * W::VALUES * R;
            ask_for<P>(panels, part.line + line, w.k / W::VALUES, part.next);
            vu words[P][PARTS];
            for (int p = 0; p < P; p++)
                for (int v = 0; v < PARTS; v++)
                    words[p][v] = load_bits(panels[p] + (part.line + line) * LINE_BYTES + v * LANES * 4);
#pragma GCC unroll 8
            for (int i = 0; i < W::VALUES; i++) {  // shifts are constants then
                vf weight[P][PARTS];
                each_sum<1, P>([&](int, int p, int v) { weight[p][v] = W::value(words[p][v], i); });
                add_input<R, P>(weight, x + i * R, total);
            }
        }
        if (grouped) settle<R, P>(w, part, (part.line + first) / step, total, part.sums, w.groups(), totals);
        else each_sum<R, P>([&](int r, int p, int v) { totals[r][p][v] = total[r][p][v]; });
    }
    finish<R, P>(a, part, totals);
}

// The same of weights that come as floats, of whichever format.
template <int R, int P>
void opened_tile(const Linear& a, const Part& part) {
    const Weight& w = a.weight;
    vf totals[R][P][PARTS];
    fetch<R, P>(a, part, totals);
    const char* later = part.later;
    const int values = values_of_line(w.format);
    const float *x = part.x, *opened = part.opened;
    const int64_t step = w.grouped() ? w.group / values : part.lines;
    for (int64_t first = 0; first < part.lines; first += step) {
        vf total[R][P][PARTS];
        each_sum<R, P>([&](int r, int p, int v) { total[r][p][v] = w.grouped() ? vf{} : totals[r][p][v]; });
        for (int64_t line = first; line < first + step; line++) {
            ask_for_later<P>(part, later);
#pragma GCC unroll 2
            for (int i = 0; i < values; i++, x += R, opened += P * PANEL) {
                vf weight[P][PARTS];
                each_sum<1, P>([&](int, int p, int v) { weight[p][v] = load(opened + p * PANEL + v * LANES); });
                add_input<R, P>(weight, x, total);
            }
        }
        if (w.grouped()) settle<R, P>(w, part, (part.line + first) / step, total, part.sums, w.groups(), totals);
        else each_sum<R, P>([&](int r, int p, int v) { totals[r][p][v] = total[r][p][v]; });
    }
    finish<R, P>(a, part, totals);
}

using Tile = void (*)(const Linear&, const Part&);

// The one of so many rows, R at most; `of` names it, given a constant.
template <int R, class Of>
constexpr Tile tile_of(int rows, const Of& of) {
    if constexpr (R > 1)
        if (rows < R) return tile_of<R - 1>(rows, of);
    return of(std::integral_constant<int, R>{});
}

// Inputs of rows [first, first + rows), from `input` on, as the tiles read them: tile after tile, [K, R] each.  Writes up to LANES
// floats more.
inline void turned(const Linear& a, int64_t first, int64_t rows, int64_t tiles, int64_t input, int64_t count, float* out) {
    static_assert(TILE_ROWS <= LANES);
    for (int64_t t = 0; t < tiles; t++) {
        const int64_t top = rows * t / tiles, high = rows * (t + 1) / tiles - top;
        const float* x[TILE_ROWS];
        for (int64_t r = 0; r < high; r++) x[r] = a.row(first + top + r) + input;
        float* to = out + top * count;
        int64_t i = 0;
        for (; i + LANES <= count; i += LANES) {
            vu square[LANES] = {};
            for (int64_t r = 0; r < high; r++) square[r] = load_bits(x[r] + i);
            turn<LANES / 2>(square);
            // What a vector has beyond its rows is overwritten by the next.
            for (int j = 0; j < LANES; j++) store(to + (i + j) * high, reinterpret_cast<vf>(square[j]));
        }
        for (; i < count; i++)
            for (int64_t r = 0; r < high; r++) to[i * high + r] = x[r][i];
    }
}

// Sums of each group of inputs of rows [first, first + rows), [rows, groups].
inline void summed(const Linear& a, int64_t first, int64_t rows, float* out) {
    const int64_t groups = a.weight.groups(), group = a.weight.group;
    for (int64_t r = 0; r < rows; r++)
        for (int64_t g = 0; g < groups; g++) {
            const float* x = a.row(first + r) + g * group;
            float total = 0.0f;
            for (int64_t i = 0; i < group; i++) total += x[i];
            out[r * groups + g] = total;
        }
}

// Whether so many tiles share weights that are made floats once.
template <class W>
constexpr bool opens(int64_t tiles) {
    return W::VALUES > 1 && tiles > OPENED_TILES;
}

// Inputs that each of so many tiles takes before they take the next: whole groups, and all where there is one tile.
template <class W>
int64_t stretch_of(const Weight& w, int64_t tiles) {
    if (tiles == 1) return w.k;
    if (LANES < 16 || !opens<W>(tiles) || tiles > SHORT_TILES) return STRETCH;
    return w.grouped() ? SHORT_STRETCH / w.group * w.group : SHORT_STRETCH;
}

// Calls `run` (tile height, panels beside each other, first row, first panel, inputs [begin, end)) for rows [0, rows), in `tiles` of
// nearly equal height, panels [from, to) and all inputs, of which several tiles take a stretch before they take the next.
template <class Run>
WEFT_INLINE void each_tile(int64_t rows, int64_t tiles, int64_t from, int64_t to, int64_t inputs, int64_t stretch, const Run& run) {
    for (int64_t p = from; p < to;) {
        const int64_t wide = panels_beside(rows);
        const int64_t count = p + wide <= to ? wide : 1;
        for (int64_t begin = 0; begin < inputs; begin += stretch) {
            const int64_t end = begin + stretch < inputs ? begin + stretch : inputs;
            for (int64_t t = 0; t < tiles; t++) {
                const int64_t top = rows * t / tiles;
                run(static_cast<int>(rows * (t + 1) / tiles - top), static_cast<int>(count), top, p, begin, end);
            }
        }
        p += count;
    }
}

// `run` (first, stop) over a thread's panels.  alone: whether the next meeting comes before the next such call.
template <class Run>
WEFT_INLINE void each_share(const Linear& a, Share share, int64_t panels, int64_t unit, bool alone, const Run& run) {
    if (a.taken && alone) return share.take(panels, unit, run);
    int64_t from, to;
    share.range(panels, unit, from, to);
    if (from < to) run(from, to);
}

template <class W>
void linear_panels(const Linear& a, int64_t rows, Share share, int64_t from, int64_t to) {
    const Weight& w = a.weight;
    const int64_t most = rows == 1 ? w.k : INPUT_BLOCK<W>;
    int64_t high = ROW_BLOCK;
    if (w.offsets)
        while (high > 1 && high * w.groups() > SUMS_SCRATCH) high /= 2;
    float *sums = share.scratch + INPUTS_SCRATCH, *opened = sums + SUMS_SCRATCH;
    for (int64_t first = 0; first < rows; first += high) {
        const int64_t count = rows - first < high ? rows - first : high;
        const int64_t tiles = (count + TILE_ROWS - 1) / TILE_ROWS, stretch = stretch_of<W>(w, tiles);
        if (w.offsets) summed(a, first, count, sums);
        for (int64_t input = 0; input < w.k; input += most) {
            const int64_t wide = w.k - input < most ? w.k - input : most;
            const float* inputs = share.scratch;
            if (count == 1) inputs = a.row(first) + input;
            else turned(a, first, count, tiles, input, wide, share.scratch);
            each_tile(count, tiles, from, to, wide, stretch, [&](int tall, int panels, int64_t top, int64_t p, int64_t begin, int64_t end) {
                Part part{.x = inputs + top * wide + begin * tall, .sums = sums + top * w.groups()};
                part.to = {a.out + (first + top) * a.out_stride + p * PANEL, a.out_stride, panels / 2 * PANEL};
                if (input + begin > 0) part.from = part.to;
                part.place(w, p, panels, (input + begin) / W::VALUES, (end - begin) / W::VALUES);
                part.end = input + end == w.k;
                if (opens<W>(tiles) && panels == TILE_PANELS) {
                    if (top == 0) open_lines<W, TILE_PANELS>(w, part, opened);
                    part.opened = opened;
                    const int64_t next = end < wide ? (input + end) / W::VALUES * LINE_BYTES : part.next + input / W::VALUES * LINE_BYTES;
                    const int64_t mine = (top * tiles + count - 1) / count;
                    part.ask_later(part.panel + next, part.far, part.lines * LINE_BYTES, mine, tiles);
                    return tile_of<TILE_ROWS>(tall, [](auto r) -> Tile { return opened_tile<r, TILE_PANELS>; })(a, part);
                }
                const Tile run = panels == 1             ? tile_of<TILE_ROWS>(tall, [](auto r) -> Tile { return tile<W, r, 1>; })
                                 : panels == TILE_PANELS ? tile_of<TILE_ROWS>(tall, [](auto r) -> Tile { return tile<W, r, TILE_PANELS>; })
                                                         : tile_of<FEW_ROWS>(tall, [](auto r) -> Tile { return tile<W, r, FEW_PANELS>; });
                run(a, part);
            });
        }
    }
}

template <class W>
void linear_in(const Linear& a, int64_t rows, Share share) {
    // Several rows are turned by each thread, once for all of its panels.
    each_share(a, share, (a.weight.n + PANEL - 1) / PANEL, FEW_PANELS, rows == 1, [&](int64_t from, int64_t to) {
        linear_panels<W>(a, rows, share, from, to);
    });
}

}  // namespace weft::WEFT_ISA
