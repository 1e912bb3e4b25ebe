// Products whose inputs are rounded first, each row by itself and once for all threads (rounded.h): which rows, outputs and inputs are
// multiplied when.  Included by the files of the instruction sets.
//
// Legend.  R: rows of a tile.  P: panels of a tile.  A word holds D::INPUTS inputs of one row, or of one output of a panel; a line of a
// panel gives VALUES / INPUTS words of each output.
#pragma once

#include <algorithm>
#include <numeric>
#include <variant>

#include "dots.h"
#include "matrix.h"

namespace weft::WEFT_ISA {

// Small groups are settled often, in floats that lie in registers beside the sums of fewer rows.
inline constexpr int GROUPED_ROWS = LANES == 16 ? 8 : TILE_ROWS;
// Rows of the largest tile in vectors.  Where there are matrix registers, those are for few rows of bytes or few bits, and for odd widths.
template <class D, class W>
inline constexpr int DOT_ROWS = !MATRICES ? TILE_ROWS : D::SCALED && std::is_same_v<W, I4> ? GROUPED_ROWS : 4;
inline constexpr int64_t SMALL_GROUP = 64;
inline constexpr int64_t NEAR_WORDS = 448;  // of two panels, near the first cache: longer sums, which are put down less often, are worth more
inline constexpr int64_t BLOCK_WORDS = 160 * 1024;  // of a block of rows, in the second cache
inline constexpr int64_t FEWEST_ROWS = 60;          // for which weights are worth to be read
inline constexpr int64_t OWN_ROWS = 16;             // that each thread rounds for itself, at most

// Rows for which nested weights become bytes, at least.
inline constexpr int64_t WIDENED_ROWS = GROUPED_ROWS;
// Matrix registers: rows of bytes that they are for, at least; words of a stretch,
// which is all inputs of most weights, since sums cost more to put down than lines to read from the second cache; of one for which words
// are made, in the first; words of a block of rows, and its rows at most: they compute so fast that weights are to be read for many.
inline constexpr int64_t MATRIX_FROM = 2, MATRIX_WORDS = 4096, MADE_WORDS = 224;
inline constexpr int64_t MATRIX_BLOCK_WORDS = 320 * 1024, MATRIX_BLOCK = 512;
static_assert(MATRIX_BLOCK * TILE_PANELS * PANEL <= BETWEEN_SCRATCH);

template <class D, class W>
WEFT_INLINE bool nests(const Weight& w) { return D::SCALED && std::is_same_v<W, I4> && w.nested; }

// Whether products of so many rows are for matrix registers.  Those of bytes are exact in any order; of bfloat16 vectors have theirs.
template <class D, class W>
WEFT_INLINE bool by_matrices(const Weight& w, int64_t rows) {
    if (!MATRICES || rows < (!W::SCALED ? 1 : !D::SCALED ? HALVES_FROM : nests<D, W>(w) ? WIDENED_ROWS : MATRIX_FROM)) return false;
    return in_steps<D, W>(w) || (nests<D, W>(w) && w.k % (LINE_WORDS * D::INPUTS) == 0);
}

// How a product of so many rows is computed.
template <class D, class W>
struct Way {
    bool matrices, makes;  // in matrix registers; words that are made of the weight's lines
    int64_t most, wide;    // rows of a tile, panels beside each other
    int64_t fitting;       // words of a block of rows

    Way(const Weight& w, int64_t rows) {
        matrices = by_matrices<D, W>(w, rows);
        makes = matrices ? W::VALUES != D::INPUTS : nests<D, W>(w) && rows >= WIDENED_ROWS;
        most = matrices ? 2 * MATRIX_ROWS : !makes && w.grouped() && w.group <= SMALL_GROUP ? std::min(GROUPED_ROWS, DOT_ROWS<D, W>) : DOT_ROWS<D, W>;
        wide = !matrices ? panels_beside(rows) : rows <= MATRIX_ROWS ? FEW_PANELS : TILE_PANELS;
        fitting = matrices ? MATRIX_BLOCK_WORDS : BLOCK_WORDS;
    }

    // Rows of a block, in whole tiles: as many as have all their words, `each` of a row, in the second cache, where these are enough; of
    // nearly equal blocks.  size: words of `high` rows, which SHARED holds.
    template <class Size>
    int64_t block_rows(int64_t rows, int64_t each, const Size& size) const {
        const int64_t limit = matrices ? MATRIX_BLOCK : ROW_BLOCK;
        int64_t high = fitting / each / most * most;
        if (high < FEWEST_ROWS || high > limit) high = limit;
        while (high > 1 && size(high) > SHARED) high /= 2;
        const int64_t blocks = (rows + high - 1) / high, equal = ((rows + blocks - 1) / blocks + most - 1) / most * most;
        return equal < high ? equal : high;
    }
};

// Panels [from, to), or gates and what they open, times rows that are rounded: stretches of inputs whose weights stay in the first
// cache, in blocks whose rows stay in the second.  between: of R * P * PANEL floats for each tile, what is added up so far.
// T: what tiles in vectors read, W or, of nested scales, bytes, which the first of them makes.  made: words that are made of a stretch
// for all tiles, where they are.
template <class D, class W, class T = W>
void multiply(const Linear& a, const Way<D, W>& way, const Rows<D>& rows, int64_t first, int64_t count, int64_t from, int64_t to,
              bool paired, float* between, char* made, int32_t* handed = nullptr) {
    constexpr int EACH = W::VALUES / D::INPUTS, MOST = DOT_ROWS<D, W>;
    constexpr bool WIDE = !std::is_same_v<W, T>;
    const Weight& w = a.weight;
    Linear read = a;
    const int64_t each = w.k / D::INPUTS, tiles = (count + way.most - 1) / way.most, highest = (count + tiles - 1) / tiles;
    const bool nested = nests<D, W>(w) && way.makes;  // then a row has one sum
    const int64_t group = std::lcm(w.grouped() ? w.group / D::INPUTS : EACH, MATRICES ? LINE_WORDS : 1);
    const int64_t longest = !way.matrices ? NEAR_WORDS : way.makes ? MADE_WORDS : MATRIX_WORDS;
    // One tile in matrix registers makes its words for itself, while it multiplies (`Making`).
    const bool itself = way.matrices && way.makes && tiles == 1;
    const int64_t near = tiles == 1 ? each : group > longest ? group : longest / group * group;
    const int64_t parts = (each + near - 1) / near;
    const int64_t stretch = ((each + parts - 1) / parts + group - 1) / group * group;  // nearly equal ones
    const int64_t fitting = way.fitting / count / stretch * stretch, block = tiles == 1 ? each : fitting > stretch ? fitting : stretch;
    const int64_t unit = paired ? 2 : 1;
    const Registers registers(way.matrices ? highest : 0);
    [[maybe_unused]] const std::conditional_t<D::SCALED, std::monostate, Flushing> flushing;
    Ending ending;
    for (int64_t input = 0; input < each; input += block) {
        const int64_t stop = input + block < each ? input + block : each;
        for (int64_t p = from, panels = 1; p < to; p += panels / unit) {
            panels = p + way.wide / unit <= to ? way.wide : unit;
            for (int64_t begin = input; begin < stop; begin += stretch) {
                const int64_t end = begin + stretch < stop ? begin + stretch : stop, lines = (end - begin) / EACH;
                Part whole;
                whole.paired = paired, whole.end = end == each;
                whole.place(w, p, panels, begin / EACH, lines);
                Part seen = whole;
                if constexpr (WIDE) {
                    read.weight = Weight{made, w.n, (end - begin) * D::INPUTS, Format::I8, (end - begin) * D::INPUTS};
                    seen.place(read.weight, 0, panels, 0, end - begin);
                    seen.n = whole.n, seen.far = (panels / 2) * read.weight.panel_bytes();
                } else if (itself) {
                    seen.made = made;
                } else if (way.makes) {
                    seen.made = made, seen.made_apart = (end - begin + 1) * LINE_BYTES;
                    make_words<D, W>(w, whole, panels, made, seen.made_apart);
                }
                for (int64_t t = 0; t < tiles; t++) {
                    const int64_t top = count * t / tiles, tall = count * (t + 1) / tiles - top;
                    const bool widens = WIDE && t == 0;  // that tile makes bytes, for itself and for the others
                    Part part = widens ? whole : seen;
                    if (widens && tiles > 1) part.made = made, part.made_apart = read.weight.panel_bytes();
                    part.x = reinterpret_cast<const float*>(rows.words + top * each + begin * tall);
                    part.sums = rows.sums + top * (nested ? 1 : w.groups());
                    part.scales = rows.scales + top, part.row = first + top, part.high = tall;
                    // Between blocks sums wait where results go, between stretches nearby.
                    const Sums out{a.out + part.row * a.out_stride + part.n, a.out_stride, paired ? w.n / 2 : panels / 2 * PANEL};
                    const Sums here{between + t * highest * panels * PANEL, panels * PANEL, panels / 2 * PANEL};
                    part.near = begin > input, part.keeps = end < stop;
                    if (begin > 0) part.from = part.near ? here : out;
                    part.to = part.keeps ? here : out;
                    part.cold = tiles > 1 && end == stop;
                    if (handed) part.handed = handed + top * (a.gate.inner / D::INPUTS);
                    // Each tile asks for its share, so that memory is never idle; one that makes bytes asks as one that is alone.
                    const char* after = end < stop ? whole.panel + end / EACH * LINE_BYTES : whole.panel + whole.next + input / EACH * LINE_BYTES;
                    if (!way.matrices && tiles > 1) part.ask_later(after, whole.far, lines * LINE_BYTES, t - WIDE, tiles - WIDE);
                    else if (tiles > 1) part.ask_later_lines(after, whole.far, lines, t, tiles, (end - begin) / LINE_WORDS);
                    const int high = static_cast<int>(tall);
                    if constexpr (MATRICES)
                        if (way.matrices) {
                            matrix_tile_of<D, W>(highest, panels, itself)(a, part, ending);
                            continue;
                        }
                    if constexpr (WIDE)
                        if (widens) {
                            (panels == 1 ? tile_of<MOST>(high, [](auto r) -> Tile { return widening_tile<r, 1>; })
                                         : tile_of<MOST>(high, [](auto r) -> Tile { return widening_tile<r, TILE_PANELS>; }))(a, part);
                            continue;
                        }
                    const Tile run =
                        panels == 1             ? tile_of<MOST>(high, [](auto r) -> Tile { return dot_tile<D, T, r, 1>; })
                        : panels == TILE_PANELS ? tile_of<MOST>(high, [](auto r) -> Tile { return dot_tile<D, T, r, TILE_PANELS>; })
                                                : tile_of<std::min(FEW_ROWS, MOST)>(high, [](auto r) -> Tile { return dot_tile<D, T, r, FEW_PANELS>; });
                    run(read, part);
                }
            }
        }
    }
}

static_assert(FEW_PANELS * (NEAR_WORDS + 1) * LINE_BYTES <= SUMS_SCRATCH * 4 && FEW_PANELS * (MADE_WORDS + 1) * LINE_BYTES <= SUMS_SCRATCH * 4);

// A block of rows, rounded for all threads; or by each of them for itself, where they are few: that is less than to wait for the others.
template <class D>
struct Block {
    int64_t first, count, tiles, each;
    bool lines, own;
    int32_t* spare;  // of a thread, as many words as `own` rows are, or a tile
    Rows<D> rows;

    template <class W>
    Block(const Weight& w, const Way<D, W>& way, int64_t first, int64_t count, Share share)
        : first(first), count(count), tiles((count + way.most - 1) / way.most), each(w.k / D::INPUTS), lines(way.matrices),
          own(tiles == 1 && count <= OWN_ROWS && Rows<D>::size(w, count, each) + count * each <= INPUTS_SCRATCH),
          spare(reinterpret_cast<int32_t*>(share.scratch)), rows(own ? spare + count * each : share.shared, count, each) {}

    template <class W>
    void round(const Linear& a, Share share, int factor) const {
        for (int64_t t = own ? 0 : share.index; t < tiles; t += own ? 1 : share.count) {
            const int64_t top = count * t / tiles;
            round_tile<D, W>(a, first + top, count * (t + 1) / tiles - top, rows, top, each, spare, factor, lines);
        }
        if (!own) share.meet();
    }
};

template <class D, class W>
void dots_in(const Linear& a, int64_t rows, Share share) {
    const Weight& w = a.weight;
    const bool paired = a.gate.out != nullptr;
    const Way<D, W> way(w, rows);
    const int64_t panels = (w.n + PANEL - 1) / PANEL / (paired ? 2 : 1), unit = way.wide / (paired ? 2 : 1), each = w.k / D::INPUTS;
    const bool whole = nests<D, W>(w) && way.makes;
    Linear summed = a;  // where nested weights become bytes, a row has one sum
    if (whole) summed.weight.group = w.k;
    const int64_t high = way.block_rows(rows, each, [&](int64_t count) { return Rows<D>::size(summed.weight, count, each); });
    const int factor = w.offsets ? 1 : whole ? -I8::HALF : -W::HALF;  // what weights have too much
    float* between = share.scratch + INPUTS_SCRATCH + SUMS_SCRATCH;
    char* made = reinterpret_cast<char*>(share.scratch + INPUTS_SCRATCH);
    for (int64_t first = 0; first < rows; first += high) {
        const Block<D> block(summed.weight, way, first, rows - first < high ? rows - first : high, share);
        block.template round<W>(summed, share, factor);
        each_share(a, share, panels, unit, !block.own || rows == block.count, [&](int64_t from, int64_t to) {
            if constexpr (NESTS<D, W>)
                if (way.makes && !way.matrices)
                    return multiply<D, W, I8>(a, way, block.rows, first, block.count, from, to, paired, between, made);
            multiply<D, W>(a, way, block.rows, first, block.count, from, to, paired, between, made);
        });
        if (!block.own) share.meet();  // before somebody writes the next rows there
    }
}

// ------------------------------------------------------------------------------------------ which product is whose

// Whether rows may be rounded to bfloat16 for these weights.
#if defined(__AVX512BF16__)
template <class W>
inline constexpr bool BY_HALVES = W::VALUES > 1;
#else
template <class W>
inline constexpr bool BY_HALVES = false;
#endif

// Whether rows are rounded first.
template <class W>
WEFT_INLINE bool dots(const Linear& a) {
    return (BY_HALVES<W> && a.inputs != Inputs::FLOAT32) || (W::SCALED && a.inputs == Inputs::INT8);
}

// Whether tiles hold gates and what they open side by side.
template <class W>
WEFT_INLINE bool opens(const Linear& a) {
    return dots<W>(a) && TILE_PANELS > 1 && a.weight.n % (2 * PANEL) == 0;
}

template <class W>
void linear_of(const Linear& a, int64_t rows, Share share) {
    if (a.gate.out && !opens<W>(a)) {
        Linear both = a;  // no tile holds a gate and what it opens
        both.gate = {};
        linear_of<W>(both, rows, share);
        share.meet();
        return gated(a.gate, rows, share);
    }
    [[maybe_unused]] const bool bytes = W::SCALED && a.inputs == Inputs::INT8;
    if constexpr (W::SCALED && OWN_BYTES)
        if (bytes) return dots_in<Bytes, W>(a, rows, share);
#if defined(__AVX512BF16__)
    if constexpr (BY_HALVES<W>)
        if (dots<W>(a) && !bytes) return dots_in<Halves, W>(a, rows, share);
#endif
#if defined(WEFT_BELOW)
    below().linear(a, rows, share);
#else
    linear_in<W>(a, rows, share);
#endif
}

inline void linear(const Linear& a, int64_t rows, Share share) {
    if (rows <= 0) return;
    switch (a.weight.format) {
        case Format::F32: return linear_of<F32>(a, rows, share);
        case Format::BF16: return linear_of<BF16>(a, rows, share);
        case Format::I8: return linear_of<I8>(a, rows, share);
        case Format::I4: return linear_of<I4>(a, rows, share);
    }
}

}  // namespace weft::WEFT_ISA
