// Products whose inputs are rounded first, each row by itself and once for all threads (rounded.h).  Several inputs lie in a word
// and one instruction adds up their products.  Included by the files of the instruction sets.
//
// Legend.  R: rows of a tile.  P: panels of a tile.  A word holds D::INPUTS inputs of one row, or of one output of a panel; a line of a
// panel gives VALUES / INPUTS words of each output.
#pragma once

#include "nested.h"
#include "rounded.h"

namespace weft::WEFT_ISA {

// totals += found * scale (+ offset * sum) of one group.
template <class D, class W, bool OFFSETS, int R, int P>
WEFT_INLINE void settle_dots(const Weight& w, const Part& part, int64_t group, const typename D::Total (&found)[R][P][PARTS],
                             const typename D::Sum* sums, int64_t stride, vf (&totals)[R][P][PARTS]) {
    vf fine[P][PARTS], offset[P][PARTS];
    each_sum<1, P>([&](int, int p, int v) {
        const char* mine = panel_of<P>(w, part.panel, part.far, p);
        __builtin_prefetch(mine + part.next + w.scales_at() + group * w.scale_stride());
        const vf scale = scales<W>(w, mine, group, v);
        fine[p][v] = scale * D::template unit<W>();
        offset[p][v] = OFFSETS ? offsets<W>(w, mine, group, v) + scale * D::template half<W>() : vf{};
    });
    each_sum<R, P>([&](int r, int p, int v) {
        totals[r][p][v] += D::floats(found[r][p][v]) * fine[p][v];
        if (OFFSETS) totals[r][p][v] += offset[p][v] * static_cast<float>(sums[r * stride + group]);
    });
}

// totals += found times the multiples of one group.
template <class D, int R, int P>
WEFT_INLINE void settle_nested(const Weight& w, const Part& part, int64_t group, const typename D::Total (&found)[R][P][PARTS],
                               typename D::Total (&totals)[R][P][PARTS]) {
    vi times[P][PARTS];
    each_sum<1, P>([&](int, int p, int v) {
        const char* mine = panel_of<P>(w, part.panel, part.far, p);
        if (group % 4 == 0) __builtin_prefetch(mine + part.next + w.scales_at() + group * w.scale_stride());
        times[p][v] = multiples(w, mine, group, v);
    });
    if (w.group <= SHORT_GROUP)
        each_sum<R, P>([&](int r, int p, int v) { totals[r][p][v] = add_times(totals[r][p][v], found[r][p][v], times[p][v]); });
    else
        each_sum<R, P>([&](int r, int p, int v) { totals[r][p][v] += found[r][p][v] * times[p][v]; });
}

// One word of P panels times one of R rows.
template <class D, int R, int P>
WEFT_INLINE void add_word(const vu (&weight)[P][PARTS], const int32_t* x, typename D::Total (&total)[R][P][PARTS]) {
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) {
        const vi input = vi{} + x[r];
        each_sum<1, P>([&](int, int p, int v) { total[r][p][v] = D::dot(total[r][p][v], weight[p][v], input); });
    }
}

// Adds the products of `words` words to `result`.  Each tile makes its words out of lines itself: to write them down once for all tiles
// of a block costs more, with 3 tiles as with 24, where a group's sums are settled all the same (of nested scales they are not).
template <class D, class W, int R, int P>
WEFT_INLINE void add_words(const Weight& w, const Part& part, int64_t first, int64_t words, typename D::Total (&result)[R][P][PARTS]) {
    constexpr int EACH = W::VALUES / D::INPUTS;
    typename D::Total total[R][P][PARTS];  // of its own, which a compiler keeps in registers
    each_sum<R, P>([&](int r, int p, int v) { total[r][p][v] = result[r][p][v]; });
    const auto* x = reinterpret_cast<const int32_t*>(part.x) + first * R;
    const char* later = part.later;
    const int64_t lines = w.k / W::VALUES, begin = part.line + first / EACH, end = begin + words / EACH;
    const char* panels[P];
    for (int p = 0; p < P; p++) panels[p] = panel_of<P>(w, part.panel, part.far, p);
    for (int64_t line = begin; line < end; line++) {
        if (later) ask_for_later<P>(part, later);
        else ask_for<P>(panels, line, lines, part.next);
        vu raw[P][PARTS];
        each_sum<1, P>([&](int, int p, int v) { raw[p][v] = load_bits(panels[p] + line * LINE_BYTES + v * LANES * 4); });
#pragma GCC unroll 4
        for (int j = 0; j < EACH; j++, x += R) {
            vu weight[P][PARTS];
            each_sum<1, P>([&](int, int p, int v) { weight[p][v] = D::word(W{}, raw[p][v], j); });
            add_word<D, R, P>(weight, x, total);
        }
    }
    each_sum<R, P>([&](int r, int p, int v) { result[r][p][v] = total[r][p][v]; });
}

#if defined(__AVX512BF16__)
// What gates open, as words of W that the next product reads: word by word, each of all R rows.
template <class W, int R, int P>
WEFT_INLINE void hand_on(const Linear& a, const Part& part, const vf (&totals)[R][P][PARTS]) {
    static_assert(LANES == PANEL);
    for (int p = 0; p < P / 2; p++) {
        int32_t* to = part.handed + (part.n + p * PANEL) / 2 * R;
        vu square[LANES] = {};
        for (int r = 0; r < R; r++) {
            const auto words = Halves::words<W>(reinterpret_cast<__m512>(opened<R, P>(a, part, totals, r, p, 0)));
            square[r] = reinterpret_cast<vu>(_mm512_zextsi256_si512(words));
        }
        if (R > 1) turn<LANES / 2>(square);
        for (int w = 0; w < (R > 1 ? PANEL / 2 : 1); w++)
            _mm512_mask_storeu_epi32(to + w * R, R > 1 ? (1 << R) - 1 : 0xff, reinterpret_cast<__m512i>(square[w]));
    }
}
#endif

// Whether sums stay whole until a row's scale comes.
template <class D, class W, bool OFFSETS>
inline constexpr bool NESTS = std::is_same_v<D, Bytes> && std::is_same_v<W, I4> && !OFFSETS;

template <class D, class W, bool OFFSETS, int R, int P>
void dot_tile(const Linear& a, const Part& part) {
    const Weight& w = a.weight;
    const int64_t groups = w.groups();
    const auto* sums = reinterpret_cast<const typename D::Sum*>(part.sums);
    constexpr int EACH = W::VALUES / D::INPUTS;
    vf totals[R][P][PARTS];
    const int64_t words = part.lines * EACH;
    if (part.cold) ask_to_write<R, P>(a, part);
    if (NESTS<D, W, OFFSETS> && w.nested) {
        if constexpr (NESTS<D, W, OFFSETS>) {
            const int64_t step = w.group / D::INPUTS;
            typename D::Total whole[R][P][PARTS];
            fetch<R, P>(a, part, totals);
            for (int p = 0; p < P; p++) __builtin_prefetch(panel_of<P>(w, part.panel, part.far, p) + part.next + w.line_bytes());
            each_sum<R, P>([&](int r, int p, int v) { whole[r][p][v] = reinterpret_cast<vi>(totals[r][p][v]); });
            for (int64_t first = 0; first < words; first += step) {
                const int64_t group = part.line * EACH / step + first / step;
                typename D::Total total[R][P][PARTS];
                each_sum<R, P>([&](int r, int p, int v) { total[r][p][v] = D::start(sums[r * groups + group]); });
                add_words<D, W, R, P>(w, part, first, step, total);
                settle_nested<D, R, P>(w, part, group, total, whole);
            }
            each_sum<R, P>([&](int r, int p, int v) {
                totals[r][p][v] = part.end ? D::floats(whole[r][p][v]) * row_scales(w, panel_of<P>(w, part.panel, part.far, p), v)
                                           : reinterpret_cast<vf>(whole[r][p][v]);
            });
        }
    } else if (W::SCALED && w.grouped()) {
        const int64_t step = w.group / D::INPUTS;
        fetch<R, P>(a, part, totals);
        for (int64_t first = 0; first < words; first += step) {
            const int64_t group = part.line * EACH / step + first / step;
            typename D::Total total[R][P][PARTS];
            each_sum<R, P>([&](int r, int p, int v) { total[r][p][v] = D::start(OFFSETS ? 0 : sums[r * groups + group]); });
            add_words<D, W, R, P>(w, part, first, step, total);
            if constexpr (W::SCALED) settle_dots<D, W, OFFSETS, R, P>(w, part, group, total, sums, groups, totals);
        }
    } else {
        typename D::Total total[R][P][PARTS];
        fetch<R, P>(a, part, totals);  // sums of whole numbers as they are, between stretches
        each_sum<R, P>([&](int r, int p, int v) {
            total[r][p][v] = part.from.at ? reinterpret_cast<typename D::Total>(totals[r][p][v]) : D::start(W::SCALED && !OFFSETS ? sums[r] : 0);
        });
        add_words<D, W, R, P>(w, part, 0, words, total);
        each_sum<R, P>([&](int r, int p, int v) { totals[r][p][v] = W::SCALED && part.end ? vf{} : reinterpret_cast<vf>(total[r][p][v]); });
        if constexpr (W::SCALED)
            if (part.end) settle_dots<D, W, OFFSETS, R, P>(w, part, 0, total, sums, 1, totals);
    }
    if (D::SCALED && part.end) each_sum<R, P>([&](int r, int p, int v) { totals[r][p][v] *= part.scales[r]; });
#if defined(__AVX512BF16__)
    if constexpr (P > 1)
        if (part.handed && part.end) return hand_on<W, R, P>(a, part, totals);
#endif
    put<R, P>(a, part, totals);
}

template <class D, class W, bool OFFSETS, int P, int R>
constexpr Tile dot_tile_of(int rows) {
    if constexpr (R == 1) {
        return dot_tile<D, W, OFFSETS, 1, P>;
    } else {
        return rows == R ? dot_tile<D, W, OFFSETS, R, P> : dot_tile_of<D, W, OFFSETS, P, R - 1>(rows);
    }
}

// Small groups are settled often, in floats that lie in registers beside the sums of fewer rows.
inline constexpr int GROUPED_ROWS = LANES == 16 ? 8 : TILE_ROWS;
inline constexpr int64_t SMALL_GROUP = 64;
inline constexpr int64_t NEAR_WORDS = 448;  // of two panels, near the first cache: longer sums, which are put down less often, are worth more
inline constexpr int64_t BLOCK_WORDS = 160 * 1024;  // of a block of rows, in the second cache
inline constexpr int64_t FEWEST_ROWS = 60;          // for which weights are worth to be read

// Panels [from, to), or gates and what they open, times rows that are rounded: stretches of inputs whose weights stay in the first
// cache, in blocks whose rows stay in the second.  between: of R * P * PANEL floats for each tile, what is added up so far.
// T: what tiles read, W or, of nested scales, the bytes that a stretch of it is made for all of them, in `widened`.
template <class D, class W, bool OFFSETS, class T = W>
void multiply(const Linear& a, const Rows<D>& rows, int64_t first, int64_t count, int64_t most, int64_t from, int64_t to, bool paired,
              float* between, int32_t* handed = nullptr, char* widened = nullptr) {
    constexpr int EACH = W::VALUES / D::INPUTS;
    constexpr bool WIDE = !std::is_same_v<W, T>;
    const Weight& w = a.weight;
    Linear read = a;
    const int64_t each = w.k / D::INPUTS, tiles = (count + most - 1) / most, group = w.grouped() ? w.group / D::INPUTS : EACH;
    const int64_t near = tiles == 1 && !WIDE ? each : group > NEAR_WORDS ? group : NEAR_WORDS / group * group;
    const int64_t parts = (each + near - 1) / near;
    const int64_t stretch = ((each + parts - 1) / parts + group - 1) / group * group;  // nearly equal ones
    const int64_t fitting = BLOCK_WORDS / count / stretch * stretch, block = tiles == 1 ? each : fitting > stretch ? fitting : stretch;
    const int64_t wide = panels_beside(count), unit = paired ? 2 : 1;
    for (int64_t input = 0; input < each; input += block) {
        const int64_t stop = input + block < each ? input + block : each;
        for (int64_t p = from, panels = 1; p < to; p += panels / unit) {
            panels = p + wide / unit <= to ? wide : unit;
            for (int64_t begin = input; begin < stop; begin += stretch) {
                const int64_t end = begin + stretch < stop ? begin + stretch : stop, lines = (end - begin) / EACH;
                Part whole;
                whole.paired = paired, whole.end = end == each;
                whole.place(w, p, panels, begin / EACH, lines);
                Part seen = whole;
                if constexpr (WIDE) {
                    read.weight = Weight{widened, w.n, (end - begin) * D::INPUTS, Format::I8, (end - begin) * D::INPUTS};
                    seen.place(read.weight, 0, panels, 0, end - begin);
                    seen.n = whole.n, seen.far = (panels / 2) * read.weight.panel_bytes();
                    widen(w, whole, panels, widened, read.weight.panel_bytes());
                }
                for (int64_t t = 0; t < tiles; t++) {
                    const int64_t top = count * t / tiles, tall = count * (t + 1) / tiles - top;
                    Part part = seen;
                    part.x = reinterpret_cast<const float*>(rows.words + top * each + begin * tall);
                    part.sums = rows.sums + top * (WIDE ? 1 : w.groups());
                    part.scales = rows.scales + top, part.row = first + top;
                    // Between blocks sums wait where results go, between stretches nearby.
                    const Sums out{a.out + part.row * a.out_stride + part.n, a.out_stride, paired ? w.n / 2 : panels / 2 * PANEL};
                    const Sums here{between + top * panels * PANEL, panels * PANEL, panels / 2 * PANEL};
                    if (begin > 0) part.from = begin > input ? here : out;
                    part.to = end < stop ? here : out;
                    part.cold = tiles > 1 && end == stop;
                    if (handed) part.handed = handed + top * (a.gate.inner / D::INPUTS);
                    // A tile that reads its lines from memory itself asks for those after them too.
                    const char* after = end < stop ? whole.panel + end / EACH * LINE_BYTES : whole.panel + whole.next + input / EACH * LINE_BYTES;
                    part.ask_later(after, whole.far, lines * LINE_BYTES, WIDE ? t : t - 1, WIDE ? tiles : tiles - 1);
                    const int high = static_cast<int>(tall);
                    const Tile run = panels == 1             ? dot_tile_of<D, T, OFFSETS, 1, TILE_ROWS>(high)
                                     : panels == TILE_PANELS ? dot_tile_of<D, T, OFFSETS, TILE_PANELS, TILE_ROWS>(high)
                                                             : dot_tile_of<D, T, OFFSETS, FEW_PANELS, FEW_ROWS>(high);
                    run(read, part);
                }
            }
        }
    }
}

// Whether nested weights are made bytes for so many rows, at least.
inline constexpr int64_t WIDENED_ROWS = GROUPED_ROWS + 1;
static_assert(FEW_PANELS * (NEAR_WORDS + 1) * LINE_BYTES <= SUMS_SCRATCH * 4);
template <class W>
WEFT_INLINE bool widens(const Linear& a, int64_t rows) {
    return std::is_same_v<W, I4> && a.weight.nested && a.inputs == Inputs::INT8 && rows >= WIDENED_ROWS;
}
// Rows of a tile, at most.
template <class W>
WEFT_INLINE int64_t tile_rows(const Weight& w) {
    return w.grouped() && w.group <= SMALL_GROUP ? GROUPED_ROWS : TILE_ROWS;
}

// Rows of a block, in whole tiles: as many as have all their words, `each` of a row, in the second cache, where these are enough; of
// nearly equal blocks.  size: words of `high` rows, which SHARED holds.
template <class Size>
int64_t block_rows(int64_t rows, int64_t each, int64_t most, const Size& size) {
    int64_t high = BLOCK_WORDS / each / most * most;
    if (high < FEWEST_ROWS || high > ROW_BLOCK) high = ROW_BLOCK;
    while (high > 1 && size(high) > SHARED) high /= 2;
    const int64_t blocks = (rows + high - 1) / high, equal = ((rows + blocks - 1) / blocks + most - 1) / most * most;
    return equal < high ? equal : high;
}

// A block of rows, rounded for all threads; or by each of them for itself, where they are few: that is less than to wait for the others.
template <class D>
struct Block {
    int64_t first, count, tiles, each;
    bool own;
    int32_t* spare;  // of a thread, as many words as `own` rows are, or a tile
    Rows<D> rows;

    Block(const Weight& w, int64_t first, int64_t count, int64_t most, Share share)
        : first(first), count(count), tiles((count + most - 1) / most), each(w.k / D::INPUTS),
          own(tiles == 1 && Rows<D>::size(w, count, each) + count * each <= INPUTS_SCRATCH),
          spare(reinterpret_cast<int32_t*>(share.scratch)), rows(own ? spare + count * each : share.shared, count, each) {}

    template <class W>
    void round(const Linear& a, Share share, int factor) const {
        for (int64_t t = own ? 0 : share.index; t < tiles; t += own ? 1 : share.count) {
            const int64_t top = count * t / tiles;
            round_tile<D, W>(a, first + top, count * (t + 1) / tiles - top, rows, top, each, spare, factor);
        }
        if (!own) share.meet();
    }
};

template <class D, class W, bool OFFSETS>
void dots_in(const Linear& a, int64_t rows, Share share) {
    const Weight& w = a.weight;
    const bool paired = a.gate.out != nullptr;
    const int64_t panels = (w.n + PANEL - 1) / PANEL / (paired ? 2 : 1), unit = panels_beside(rows) / (paired ? 2 : 1);
    const bool wide = NESTS<D, W, OFFSETS> && widens<W>(a, rows);
    const int64_t each = w.k / D::INPUTS, most = wide ? TILE_ROWS : tile_rows<W>(w);
    Linear summed = a;  // where weights become bytes, a row has one sum
    if (wide) summed.weight.group = w.k;
    const int64_t high = block_rows(rows, each, most, [&](int64_t count) { return Rows<D>::size(summed.weight, count, each); });
    const int factor = OFFSETS ? 1 : wide ? -I8::HALF : -W::HALF;  // what weights have too much
    float* between = share.scratch + INPUTS_SCRATCH + SUMS_SCRATCH;
    for (int64_t first = 0; first < rows; first += high) {
        const Block<D> block(summed.weight, first, rows - first < high ? rows - first : high, most, share);
        block.template round<W>(summed, share, factor);
        each_share(a, share, panels, unit, !block.own || rows == block.count, [&](int64_t from, int64_t to) {
            if constexpr (NESTS<D, W, OFFSETS>)
                if (wide) {
                    char* widened = reinterpret_cast<char*>(share.scratch + INPUTS_SCRATCH);
                    return multiply<D, W, OFFSETS, I8>(a, block.rows, first, block.count, most, from, to, paired, between, nullptr, widened);
                }
            multiply<D, W, OFFSETS>(a, block.rows, first, block.count, most, from, to, paired, between);
        });
        if (!block.own) share.meet();  // before somebody writes the next rows there
    }
}

// ------------------------------------------------------------------------------------------ which product is whose

// Whether rows are rounded first.
template <class W>
WEFT_INLINE bool dots(const Linear& a) {
#if defined(__AVX512BF16__)
    if (W::VALUES > 1 && a.inputs != Inputs::FLOAT32) return true;
#endif
    return W::SCALED && a.inputs == Inputs::INT8;
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
    if constexpr (W::SCALED) {
        if (a.inputs == Inputs::INT8)
            return a.weight.offsets ? dots_in<Bytes, W, true>(a, rows, share) : dots_in<Bytes, W, false>(a, rows, share);
    }
#if defined(__AVX512BF16__)
    if constexpr (W::VALUES > 1) {
        if (dots<W>(a)) return a.weight.offsets ? dots_in<Halves, W, true>(a, rows, share) : dots_in<Halves, W, false>(a, rows, share);
    }
#endif
    linear_in<W>(a, rows, share);
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
