// Tiles of products whose inputs are rounded first (rounded.h), in vectors: several inputs lie in a word and one instruction adds up
// their products.  Included by the files of the instruction sets.
//
// Legend.  R: rows of a tile.  P: panels of a tile.  A word holds D::INPUTS inputs of one row, or of one output of a panel; a line of a
// panel gives VALUES / INPUTS words of each output.
#pragma once

#include "nested.h"
#include "rounded.h"

namespace weft::WEFT_ISA {

// Scales of one group of P panels.
template <class D, class W, int P>
WEFT_INLINE void scales_of(const Weight& w, const Part& part, int64_t group, vf (&fine)[P][PARTS]) {
    each_sum<1, P>([&](int, int p, int v) {
        const char* mine = panel_of<P>(w, part.panel, part.far, p);
        __builtin_prefetch(mine + part.next + w.scales_at() + group * w.scale_stride());
        fine[p][v] = scales(w, mine, group, v) * D::template unit<W>();
    });
}
// Their offsets, with what a value has too much, where weights have offsets.
template <class D, class W, int P>
WEFT_INLINE void offsets_of(const Weight& w, const Part& part, int64_t group, vf (&offset)[P][PARTS]) {
    each_sum<1, P>([&](int, int p, int v) {
        const char* mine = panel_of<P>(w, part.panel, part.far, p);
        offset[p][v] = offsets(w, mine, group, v) + scales(w, mine, group, v) * D::template half<W>();
    });
}

// totals += found * scale (+ offset * sum) of one group.
template <class D, class W, int R, int P>
WEFT_INLINE void settle_dots(const Weight& w, const Part& part, int64_t group, const typename D::Total (&found)[R][P][PARTS],
                             const typename D::Sum* sums, int64_t stride, vf (&totals)[R][P][PARTS]) {
    vf fine[P][PARTS];
    scales_of<D, W, P>(w, part, group, fine);
    each_sum<R, P>([&](int r, int p, int v) { totals[r][p][v] += D::floats(found[r][p][v]) * fine[p][v]; });
    if (w.offsets) {
        vf offset[P][PARTS];
        offsets_of<D, W, P>(w, part, group, offset);
        each_sum<R, P>([&](int r, int p, int v) { totals[r][p][v] += offset[p][v] * static_cast<float>(sums[r * stride + group]); });
    }
}

// totals, which hold whole numbers, += found times the multiples of one group.
template <int R, int P>
WEFT_INLINE void settle_nested(const Weight& w, const Part& part, int64_t group, const vi (&found)[R][P][PARTS], vf (&totals)[R][P][PARTS]) {
    const auto whole = [&](int r, int p, int v) { return reinterpret_cast<vi>(totals[r][p][v]); };
    vi times[P][PARTS];
    each_sum<1, P>([&](int, int p, int v) {
        const char* mine = panel_of<P>(w, part.panel, part.far, p);
        if (group % 4 == 0) __builtin_prefetch(mine + part.next + w.scales_at() + group * w.scale_stride());
        times[p][v] = multiples(w, mine, group, v);
    });
    if (w.group <= SHORT_GROUP)
        each_sum<R, P>([&](int r, int p, int v) {
            totals[r][p][v] = reinterpret_cast<vf>(add_times(whole(r, p, v), found[r][p][v], times[p][v]));
        });
    else
        each_sum<R, P>([&](int r, int p, int v) { totals[r][p][v] = reinterpret_cast<vf>(whole(r, p, v) + found[r][p][v] * times[p][v]); });
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
// of a block costs more, with 3 tiles as with 24, where a group's sums are settled all the same (`widening_tile`: where they are not).
template <class D, class W, int R, int P>
WEFT_INLINE void add_words(const Weight& w, const Part& part, int64_t first, int64_t words, typename D::Total (&result)[R][P][PARTS]) {
    constexpr int EACH = W::VALUES / D::INPUTS;
    typename D::Total total[R][P][PARTS];  // of its own, which a compiler keeps in registers
    each_sum<R, P>([&](int r, int p, int v) { total[r][p][v] = result[r][p][v]; });
    const auto* x = reinterpret_cast<const int32_t*>(part.x) + first * R;
    const char* later = part.later ? part.later + first / EACH * part.each : nullptr;  // of a group, what is its part's
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

// Whether a row's words are whole steps of matrix registers, in each group.
template <class D, class W>
WEFT_INLINE bool in_steps(const Weight& w) {
    constexpr int64_t STEP = LINE_WORDS * D::INPUTS;
    return w.k % STEP == 0 && (!W::SCALED || !w.grouped() || w.group % STEP == 0);
}

#if defined(WEFT_MATRIX)
// What is subnormal counts as 0 while this lives, as it does in matrix registers.
class Flushing {
public:
    Flushing() { _mm_setcsr(before | 0x8040); }
    ~Flushing() { _mm_setcsr(before); }
    Flushing(const Flushing&) = delete;
    Flushing& operator=(const Flushing&) = delete;

private:
    unsigned before = _mm_getcsr();
};

// Adds the products of `words` words to `result` in the order of matrix registers: of each step the even inputs and the odd ones, from 0
// on, and then both.  So few rows, for which words of bfloat16 are dear to make, have the bits of many.
template <class W, int R, int P>
WEFT_INLINE void add_apart(const Weight& w, const Part& part, int64_t first, int64_t words, vf (&result)[R][P][PARTS]) {
    constexpr int EACH = W::VALUES / Halves::INPUTS, LINES = LINE_WORDS / EACH;
    vf total[R][P][PARTS];
    each_sum<R, P>([&](int r, int p, int v) { total[r][p][v] = result[r][p][v]; });
    const auto* x = reinterpret_cast<const int32_t*>(part.x) + first * R;
    const int64_t lines = w.k / W::VALUES, begin = part.line + first / EACH, end = begin + words / EACH;
    const char* panels[P];
    for (int p = 0; p < P; p++) panels[p] = panel_of<P>(w, part.panel, part.far, p);
    for (int64_t step = begin; step < end; step += LINES) {
        vf even[R][P][PARTS] = {}, odd[R][P][PARTS] = {};
#pragma GCC unroll 1
        for (int64_t line = step; line < step + LINES; line++) {
            ask_for<P>(panels, line, lines, part.next);
            vu raw[P][PARTS];
            each_sum<1, P>([&](int, int p, int v) { raw[p][v] = load_bits(panels[p] + line * LINE_BYTES + v * LANES * 4); });
#pragma GCC unroll 4
            for (int j = 0; j < EACH; j++, x += R) {
                vf low[P][PARTS], high[P][PARTS];
                each_sum<1, P>([&](int, int p, int v) {
                    low[p][v] = W::value(raw[p][v], Halves::even(W{}, j));
                    high[p][v] = W::value(raw[p][v], Halves::even(W{}, j) + Halves::ODD<W>);
                });
                each_sum<R, P>([&](int r, int p, int v) {
                    const vu input = vu{} + static_cast<uint32_t>(x[r]);
                    even[r][p][v] += reinterpret_cast<vf>(input << 16) * low[p][v];
                    odd[r][p][v] += reinterpret_cast<vf>(input & 0xffff0000u) * high[p][v];
                });
            }
        }
        each_sum<R, P>([&](int r, int p, int v) { total[r][p][v] += even[r][p][v] + odd[r][p][v]; });
    }
    each_sum<R, P>([&](int r, int p, int v) { result[r][p][v] = total[r][p][v]; });
}
#else
struct Flushing {
    Flushing() {}
};
#endif

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

// Whether scales may be nested, so that sums stay whole until a row's scale comes.
template <class D, class W>
inline constexpr bool NESTS = std::is_same_v<D, Bytes> && std::is_same_v<W, I4>;

// Rows from which on weights of few bits, made words of bfloat16, go through matrix registers.
inline constexpr int64_t HALVES_FROM = 3;

template <class D, class W, int R, int P>
WEFT_INLINE void add_products(const Weight& w, const Part& part, int64_t first, int64_t words, typename D::Total (&result)[R][P][PARTS]) {
#if defined(WEFT_MATRIX)
    if constexpr (!D::SCALED && W::SCALED && R < HALVES_FROM)
        if (in_steps<D, W>(w)) return add_apart<W, R, P>(w, part, first, words, result);
#endif
    add_words<D, W, R, P>(w, part, first, words, result);
}

template <class D, class W, int R, int P>
void dot_tile(const Linear& a, const Part& part) {
    constexpr int EACH = W::VALUES / D::INPUTS;
    const Weight& w = a.weight;
    const bool nested = NESTS<D, W> && w.nested, grouped = W::SCALED && (nested || w.grouped());
    const int64_t words = part.lines * EACH, step = grouped ? w.group / D::INPUTS : words, groups = grouped ? w.groups() : 1;
    const auto* sums = reinterpret_cast<const typename D::Sum*>(part.sums);
    if (part.cold) ask_to_write<R, P>(a, part);
    for (int p = 0; p < P && nested; p++) __builtin_prefetch(panel_of<P>(w, part.panel, part.far, p) + part.next + w.line_bytes());
    vf totals[R][P][PARTS];
    fetch<R, P>(a, part, totals);  // between stretches, sums of whole numbers that no scale has been at are as they are
    int64_t group = grouped ? part.line * EACH / step : 0;
    for (int64_t first = 0; first < words; first += step, group++) {
        typename D::Total total[R][P][PARTS];
        if (!grouped && part.from.at)
            each_sum<R, P>([&](int r, int p, int v) { total[r][p][v] = reinterpret_cast<typename D::Total>(totals[r][p][v]); });
        else if (D::SCALED && !w.offsets)
            each_sum<R, P>([&](int r, int p, int v) { total[r][p][v] = D::start(sums[r * groups + group]); });
        else
            each_sum<R, P>([&](int r, int p, int v) { total[r][p][v] = typename D::Total{}; });
        add_products<D, W, R, P>(w, part, first, step, total);
        if constexpr (NESTS<D, W>)
            if (nested) {
                settle_nested<R, P>(w, part, group, total, totals);
                continue;
            }
        if constexpr (W::SCALED)
            if (grouped) {
                settle_dots<D, W, R, P>(w, part, group, total, sums, groups, totals);
                continue;
            }
        each_sum<R, P>([&](int r, int p, int v) { totals[r][p][v] = reinterpret_cast<vf>(total[r][p][v]); });
    }
    if constexpr (W::SCALED)
        if (part.end && (nested || !grouped)) {
            typename D::Total total[R][P][PARTS];
            each_sum<R, P>([&](int r, int p, int v) { total[r][p][v] = reinterpret_cast<typename D::Total>(totals[r][p][v]), totals[r][p][v] = vf{}; });
            if (nested)
                each_sum<R, P>([&](int r, int p, int v) {
                    totals[r][p][v] = D::floats(total[r][p][v]) * row_scales(w, panel_of<P>(w, part.panel, part.far, p), v);
                });
            else settle_dots<D, W, R, P>(w, part, 0, total, sums, 1, totals);
        }
    if (D::SCALED && part.end) each_sum<R, P>([&](int r, int p, int v) { totals[r][p][v] *= part.scales[r]; });
#if defined(__AVX512BF16__)
    if constexpr (P > 1)
        if (part.handed && part.end) return hand_on<W, R, P>(a, part, totals);
#endif
    put<R, P>(a, part, totals);
}

// The same of nested scales, whose weights become bytes while they are multiplied, so that a row has one sum.  Where `part.made` is memory,
// they are put there too, with the scales of the outputs behind them: for later tiles, to which they are weights of 8 bits.
template <int R, int P>
void widening_tile(const Linear& a, const Part& part) {
    const Weight& w = a.weight;
    const char* panels[P];
    for (int p = 0; p < P; p++) {
        panels[p] = panel_of<P>(w, part.panel, part.far, p);
        __builtin_prefetch(panels[p] + part.next + w.line_bytes());
    }
    if (part.cold) ask_to_write<R, P>(a, part);
    vf totals[R][P][PARTS];
    fetch<R, P>(a, part, totals);
    vi total[R][P][PARTS];
    const auto* sums = reinterpret_cast<const int32_t*>(part.sums);
    each_sum<R, P>([&](int r, int p, int v) { total[r][p][v] = part.from.at ? reinterpret_cast<vi>(totals[r][p][v]) : vi{} + sums[r]; });
    const auto* x = reinterpret_cast<const int32_t*>(part.x);
    auto* made = reinterpret_cast<float*>(part.made);
    const auto keep = [&](int p, int v, vf line) { store(made + p * (part.made_apart / 4) + v * LANES, line); };
    const int64_t lines = w.k / I4::VALUES, step = w.group / I4::VALUES, end = part.line + part.lines;
    int64_t group = part.line / step;
    for (int64_t line = part.line; line < end; group++) {
        Widening widening[P][PARTS];
        each_sum<1, P>([&](int, int p, int v) {
            if (group % 4 == 0) __builtin_prefetch(panels[p] + part.next + w.scales_at() + group * w.scale_stride());
            widening[p][v] = Widening(reinterpret_cast<vu>(multiples(w, panels[p], group, v)));
        });
        for (const int64_t stop = line + step; line < stop; line++) {
            ask_for<P>(panels, line, lines, part.next);
            vu raw[P][PARTS];
            each_sum<1, P>([&](int, int p, int v) { raw[p][v] = load_bits(panels[p] + line * LINE_BYTES + v * LANES * 4); });
#pragma GCC unroll 2
            for (int j = 0; j < I4::QUADS; j++, x += R) {
                vu weight[P][PARTS];
                each_sum<1, P>([&](int, int p, int v) { weight[p][v] = widening[p][v].bytes(raw[p][v], j); });
                if (made) {
                    each_sum<1, P>([&](int, int p, int v) { keep(p, v, reinterpret_cast<vf>(weight[p][v])); });
                    made += PANEL;
                }
                add_word<Bytes, R, P>(weight, x, total);
            }
        }
    }
    if (made) each_sum<1, P>([&](int, int p, int v) { keep(p, v, row_scales(w, panels[p], v)); });
    each_sum<R, P>([&](int r, int p, int v) {
        totals[r][p][v] = part.end ? Bytes::floats(total[r][p][v]) * row_scales(w, panels[p], v) * part.scales[r]
                                   : reinterpret_cast<vf>(total[r][p][v]);
    });
    put<R, P>(a, part, totals);
}

}  // namespace weft::WEFT_ISA
