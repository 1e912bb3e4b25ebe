// Tiles of products whose inputs are rounded first, in matrix registers (AMX): one of them holds sixteen lines of 64 bytes, and one
// instruction multiplies a line of each of sixteen rows with sixteen lines of a panel, which is how panels lie anyway.
// Included by the files of the instruction sets.
//
// Legend.  A *step* is what one line holds of a row's inputs, LINE_WORDS words.  S: registers that the rows of a tile fill, 1 or 2.
// P: panels of a tile.  Rows of a tile lie as [steps][rows][LINE_WORDS].
#pragma once

#include "dots.h"

namespace weft::WEFT_ISA {

inline constexpr int MATRIX_ROWS = 16;

#if defined(WEFT_MATRIX)
// A thread's registers while this lives.
class Registers {
public:
    struct alignas(LINE_BYTES) Sizes {
        uint8_t palette = 1, start = 0, none[14] = {};
        uint16_t bytes[16] = {};
        uint8_t rows[16] = {};

        void set(int index, int64_t high, int64_t wide = LINE_BYTES) {
            if (high > 0) rows[index] = static_cast<uint8_t>(high), bytes[index] = static_cast<uint16_t>(wide);
        }
    };

    // Sums in 0 to 3, rows in 4 and 5, weights in 6 and 7; of tiles of at most `high` rows, none of 0.
    explicit Registers(int64_t high) : used(high > 0) {
        if (!used) return;
        Sizes sizes;
        const bool two = high > MATRIX_ROWS;
        const int64_t first = two ? MATRIX_ROWS : high, second = high - MATRIX_ROWS;
        for (int i = 0; i < 4; i++) sizes.set(i, two && i > 1 ? second : first);
        sizes.set(4, first), sizes.set(5, second), sizes.set(6, MATRIX_ROWS), sizes.set(7, MATRIX_ROWS);
        asm volatile("ldtilecfg %0" ::"m"(sizes));
    }
    explicit Registers(const Sizes& sizes) : used(true) { asm volatile("ldtilecfg %0" ::"m"(sizes)); }
    ~Registers() {
        if (used) asm volatile("tilerelease");
    }
    Registers(const Registers&) = delete;
    Registers& operator=(const Registers&) = delete;

private:
    bool used;
};

template <int T>
WEFT_INLINE void clear_register() {
    asm volatile("tilezero %%tmm%c0" ::"i"(T));
}
template <int T>
WEFT_INLINE void load_register(const void* at, int64_t apart) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(at), "r"(apart), "i"(T) : "memory");
}
template <int T>
WEFT_INLINE void store_register(void* at, int64_t apart) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(at), "r"(apart), "i"(T) : "memory");
}
// Sums C += rows A times weights B.  Of bfloat16, each sum adds up the even inputs of the step and the odd ones, from 0 on, and then both.
template <class D, int C, int A, int B>
WEFT_INLINE void multiply_registers() {
    if constexpr (D::INPUTS == 4) asm volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
    else asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}

// Calls `run` (register of sums, register of rows, panel) for each register of sums of a tile, as constants.
template <int S, int P, class Run>
WEFT_INLINE void each_register(const Run& run) {
    static_assert(S * P <= 4 && (S == 1 || P <= 2));
    [&]<int... I>(std::integer_sequence<int, I...>) {
        (run(std::integral_constant<int, I / P * 2 + I % P>{}, std::integral_constant<int, I / P>{}, std::integral_constant<int, I % P>{}), ...);
    }(std::make_integer_sequence<int, S * P>{});
}

template <int P>
using Squares = int32_t[2 * MATRIX_ROWS][P * PANEL];  // sums of a tile

// What is left to do of a tile whose sums are complete.  It is done row by row between the steps of the next one: those leave most of a core
// idle, and the sums have to go through memory first.
struct Ending {
    alignas(LINE_BYTES) int32_t kept[2][2 * MATRIX_ROWS * FEW_PANELS * PANEL];
    vf fine[FEW_PANELS][PARTS], offset[FEW_PANELS][PARTS];
    Linear a;
    Part part;  // of the next row
    const int32_t* sums = nullptr;  // of that row
    int64_t left = 0;  // rows
    int which = 0;     // of `kept` is the tile's
    bool whole = false;  // whether those are sums as products give them, without scales
    void (*rest)(Ending&) = nullptr;

    ~Ending() { finish(); }
    void finish() {
        if (left > 0) rest(*this);
    }
};

// One row of it.
template <class D, class W, int P>
WEFT_INLINE void end_row(Ending& e) {
    const Linear& a = e.a;
    Part& row = e.part;
    vf total[1][P][PARTS];
    each_sum<1, P>([&](int, int p, int v) { total[0][p][v] = load(reinterpret_cast<const float*>(e.sums) + p * PANEL + v * LANES); });
    if constexpr (W::SCALED) {
        if (e.whole)
            each_sum<1, P>([&](int, int p, int v) {
                const auto sum = *reinterpret_cast<const typename D::Sum*>(row.sums);
                const auto mine = D::start(a.weight.offsets ? 0 : sum) + reinterpret_cast<typename D::Total>(total[0][p][v]);
                total[0][p][v] = vf{};
                total[0][p][v] += D::floats(mine) * e.fine[p][v];
                if (a.weight.offsets) total[0][p][v] += e.offset[p][v] * static_cast<float>(sum);
            });
    }
    if (D::SCALED) each_sum<1, P>([&](int, int p, int v) { total[0][p][v] *= *row.scales; });
    e.sums += P * PANEL, e.left--;
    bool handed = false;
    if constexpr (P > 1 && D::INPUTS == 2) {
        if (row.handed) {
            for (int p = 0; p < P / 2; p++) {
                const int64_t word = (row.n + p * PANEL) / 2;
                const auto words = Halves::words<W>(reinterpret_cast<__m512>(opened<1, P>(a, row, total, 0, p, 0)));
                _mm256_storeu_si256(reinterpret_cast<__m256i*>(row.handed + word / LINE_WORDS * row.high * LINE_WORDS + word % LINE_WORDS), words);
            }
            row.handed += LINE_WORDS, handed = true;
        }
    }
    if (!handed) put<1, P>(a, row, total);
    row.row++, row.to.at += row.to.stride, row.scales++, row.sums += e.whole ? 1 : 0;
}
template <class D, class W, int P>
void end_rows(Ending& e) {
    while (e.left > 0) end_row<D, W, P>(e);
}

// Between a tile and memory that holds no whole registers: `high` rows of sums, as they are; outputs end at N.
template <int P>
inline void fetch_squares(const Linear& a, const Part& part, Squares<P>& to) {
    const int64_t left = a.weight.n - part.n;
    for (int64_t r = 0; r < part.high; r++)
        for (int p = 0; p < P; p++) {
            const int64_t some = part.paired || left - p * PANEL > PANEL ? PANEL : left - p * PANEL;
            if (!part.from.at) std::memset(&to[r][p * PANEL], 0, LINE_BYTES);
            else if (some > 0) std::memcpy(&to[r][p * PANEL], part.from.of<P>(r, p), static_cast<size_t>(some) * 4);
        }
}
template <int P>
inline void put_squares(const Linear& a, const Part& part, const Squares<P>& from) {
    const int64_t left = a.weight.n - part.n;
    for (int64_t r = 0; r < part.high; r++)
        for (int p = 0; p < P; p++) {
            const int64_t some = part.paired || left - p * PANEL > PANEL ? PANEL : left - p * PANEL;
            if (some > 0) std::memcpy(part.to.of<P>(r, p), &from[r][p * PANEL], static_cast<size_t>(some) * 4);
        }
}

// Words that a tile makes for itself, a few steps before it multiplies them, so that vectors work while registers do: a ring of steps for
// each panel, in the first cache.
template <class D, class W, int P>
struct Making {
    static constexpr int STEPS = 4, BEFORE = 2, EACH = W::VALUES / D::INPUTS, LINES = LINE_WORDS / EACH;
    static constexpr int64_t BYTES = LINE_WORDS * LINE_BYTES;  // of a step's words
    char* ring;
    const char* from[P];   // lines that are not made yet
    const char* times[P];  // multiples of the group that they are in
    int64_t made = 0, steps, next, line = 0;  // line: of that group

    Making(const Weight& w, const Part& part, int64_t steps) : ring(part.made), steps(steps), next(part.next) {
        for (int p = 0; p < P; p++) {
            const char* panel = panel_of<P>(w, part.panel, part.far, p);
            from[p] = panel + part.line * LINE_BYTES;
            if constexpr (NESTS<D, W>) {
                times[p] = panel + w.scales_at() + part.line * W::VALUES / w.group * w.scale_stride();
                if (ring && w.nested) __builtin_prefetch(panel + next + w.line_bytes(), 0, 2);  // the scales of rows, which stand before those
            }
        }
    }
    WEFT_INLINE char* place(int64_t step, int p) const { return ring + (p * STEPS + step % STEPS) * BYTES; }

    WEFT_INLINE void make(const Weight& w) {
        bool nested = false;
        if constexpr (NESTS<D, W>) nested = w.nested;
        for (int done = 0, count = LINES; done < LINES; done += count) {
            if constexpr (NESTS<D, W>)
                if (nested) count = static_cast<int>(std::min<int64_t>(LINES - done, w.group / W::VALUES - line));
            for (int p = 0; p < P; p++) {
                auto* to = reinterpret_cast<float*>(place(made, p)) + done * EACH * PANEL;
                if constexpr (NESTS<D, W>)
                    if (nested) {
                        if (line == 0) __builtin_prefetch(times[p] + next, 0, 2);
                        widen_group(from[p], reinterpret_cast<vu>(load_bytes(times[p])), count, to);
                        continue;
                    }
#pragma GCC unroll 4
                for (int i = 0; i < count; i++) {
                    const vu raw = load_bits(from[p] + i * LINE_BYTES);
                    for (int j = 0; j < EACH; j++, to += PANEL) store(to, reinterpret_cast<vf>(D::word(W{}, raw, j)));
                }
            }
            for (int p = 0; p < P; p++) from[p] += count * LINE_BYTES;
            if constexpr (NESTS<D, W>)
                if (nested && (line += count) == w.group / W::VALUES) {
                    line = 0;
                    for (int p = 0; p < P; p++) times[p] += w.scale_stride();
                }
        }
        made++;
    }
    // Those that are multiplied soon.
    WEFT_INLINE void make_until(const Weight& w, int64_t step) {
        while (made < steps && made <= step + BEFORE) make(w);
    }
};

// Adds the products of steps [first, stop) to the registers, and ends rows of the tile before meanwhile.
template <class D, class W, int S, int P, bool MAKES>
WEFT_INLINE void add_steps(const Weight& w, const Part& part, int64_t first, int64_t stop, const char*& later, Ending& ending,
                           Making<D, W, P>& making) {
    constexpr int EACH = W::VALUES / D::INPUTS, LINES = LINE_WORDS / EACH;  // lines of the weight for a step
    const char *panels[P], *lines[P];
    for (int p = 0; p < P; p++) {
        panels[p] = panel_of<P>(w, part.panel, part.far, p);
        lines[p] = (part.made ? part.made + p * part.made_apart : panels[p] + part.line * LINE_BYTES) + first * LINE_WORDS * LINE_BYTES;
    }
    const int64_t apart = part.high * LINE_BYTES, ended = (ending.left + stop - first - 1) / (stop - first);
    const char* rows = reinterpret_cast<const char*>(part.x) + first * apart;
    Part row = part;
    const int64_t cold = part.cold ? (part.high + stop - first - 1) / (stop - first) : 0;
    int64_t asked = 0;
    for (int64_t step = first; step < stop; step++, rows += apart) {
        if constexpr (MAKES) {
            making.make_until(w, step);
            for (int p = 0; p < P; p++) lines[p] = making.place(step, p);
        }
        load_register<4>(rows, LINE_BYTES);
        if constexpr (S == 2) load_register<5>(rows + MATRIX_ROWS * LINE_BYTES, LINE_BYTES);
        [&]<int... p>(std::integer_sequence<int, p...>) {
            ((load_register<6 + p % 2>(lines[p], LINE_BYTES), multiply_registers<D, p, 4, 6 + p % 2>(),
              S == 2 ? multiply_registers<D, S == 2 ? 2 + p : p, 5, 6 + p % 2>() : void()), ...);
        }(std::make_integer_sequence<int, P>{});
        if (later) {
            for (int64_t i = 0; i < part.each; i++, later += LINE_BYTES) {
                __builtin_prefetch(later, 0, 2);
                if (P > 1) __builtin_prefetch(later + part.apart, 0, 2);
            }
        } else if (MAKES || !part.made) {
            for (int i = 0; i < LINES; i++) ask_for<P>(panels, part.line + step * LINES + i, w.k / W::VALUES, part.next);
        }
        for (int64_t i = 0; i < cold && asked < part.high; i++, asked++, row.row++, row.to.at += row.to.stride) ask_to_write<1, P>(ending.a, row);
        for (int64_t i = 0; i < ended && ending.left > 0; i++) end_row<D, W, P>(ending);
        for (int p = 0; p < P; p++) lines[p] += LINE_WORDS * LINE_BYTES;
    }
}

// totals += found * scale (+ offset * sum) of one group.
template <class D, class W, bool OFFSETS, int P>
WEFT_INLINE void add_group(const Weight& w, const Part& part, int64_t group, const Squares<P>& found, Squares<P>& totals) {
    const auto* sums = reinterpret_cast<const typename D::Sum*>(part.sums) + group;
    vf fine[P][PARTS], offset[P][PARTS];
    scales_of<D, W, P>(w, part, group, fine);
    if constexpr (OFFSETS) offsets_of<D, W, P>(w, part, group, offset);
    for (int64_t r = 0; r < part.high; r++, sums += w.groups())
        each_sum<1, P>([&](int, int p, int v) {
            const int at = p * PANEL + v * LANES;
            auto* mine = reinterpret_cast<float*>(&totals[r][at]);
            const auto some = D::start(OFFSETS ? 0 : *sums) + reinterpret_cast<typename D::Total>(load(reinterpret_cast<const float*>(&found[r][at])));
            vf total = load(mine) + D::floats(some) * fine[p][v];
            if (OFFSETS) total += offset[p][v] * static_cast<float>(*sums);
            store(mine, total);
        });
}

template <class D, class W, int S, int P, bool MAKES>
void matrix_tile(const Linear& a, const Part& part, Ending& ending) {
    constexpr int EACH = W::VALUES / D::INPUTS;
    const Weight& w = a.weight;
    const bool nested = NESTS<D, W> && w.nested, grouped = W::SCALED && w.grouped() && !nested;
    const int64_t steps = part.lines * EACH / LINE_WORDS, each = grouped ? w.group / D::INPUTS / LINE_WORDS : steps;
    const char* later = part.later;
    Making<D, W, P> making(w, part, steps);
    if (grouped || ending.rest != end_rows<D, W, P>) ending.finish();
    ending.a = a;
    Squares<P>& found = *reinterpret_cast<Squares<P>*>(ending.kept[1 - ending.which]);
    if (grouped) fetch_squares<P>(a, part, found);
    for (int64_t first = 0; first < steps; first += each) {
        if (!grouped && part.from.at) {
            if (!part.near) fetch_squares<P>(a, part, found);
            each_register<S, P>([&](auto sum, auto s, auto p) {
                if (part.near) load_register<sum>(part.from.of<P>(s * MATRIX_ROWS, p), part.from.stride * 4);
                else load_register<sum>(&found[s * MATRIX_ROWS][p * PANEL], sizeof found[0]);
            });
        } else {
            each_register<S, P>([&](auto sum, auto, auto) { clear_register<sum>(); });
        }
        add_steps<D, W, S, P, MAKES>(w, part, first, first + each, later, ending, making);
        if constexpr (W::SCALED) {
            if (grouped) {
                alignas(LINE_BYTES) Squares<P> some;
                each_register<S, P>([&](auto sum, auto s, auto p) { store_register<sum>(&some[s * MATRIX_ROWS][p * PANEL], sizeof some[0]); });
                const int64_t group = part.line * EACH / LINE_WORDS / each + first / each;
                w.offsets ? add_group<D, W, true, P>(w, part, group, some, found) : add_group<D, W, false, P>(w, part, group, some, found);
                continue;
            }
        }
        each_register<S, P>([&](auto sum, auto s, auto p) {
            if (!part.end && part.keeps) store_register<sum>(part.to.of<P>(s * MATRIX_ROWS, p), part.to.stride * 4);
            else store_register<sum>(&found[s * MATRIX_ROWS][p * PANEL], sizeof found[0]);
        });
    }
    if (!part.end) return grouped || !part.keeps ? put_squares<P>(a, part, found) : void();
    ending.finish();
    if constexpr (W::SCALED) {
        vf fine[P][PARTS], offset[P][PARTS] = {};
        if (nested) each_sum<1, P>([&](int, int p, int v) { fine[p][v] = row_scales(w, panel_of<P>(w, part.panel, part.far, p), v); });
        else if (!grouped) scales_of<D, W, P>(w, part, 0, fine);
        if (!grouped && w.offsets) offsets_of<D, W, P>(w, part, 0, offset);
        if (!grouped) each_sum<1, P>([&](int, int p, int v) { ending.fine[p][v] = fine[p][v], ending.offset[p][v] = offset[p][v]; });
    }
    ending.which = 1 - ending.which, ending.part = part, ending.sums = found[0], ending.left = part.high;
    ending.whole = W::SCALED && !grouped, ending.rest = end_rows<D, W, P>;
}

// Lines [line, line + lines) of the panels of `part`, word by word as D multiplies them, `apart` bytes from panel to panel.
template <class D, class W>
inline void make_words(const Weight& w, const Part& part, int64_t panels, char* out, int64_t apart) {
    constexpr int EACH = W::VALUES / D::INPUTS;
    if constexpr (NESTS<D, W>)
        if (w.nested) return widen(w, part, panels, out, apart);
    for (int64_t p = 0; p < panels; p++) {
        const int64_t half = panels / 2, second = half && p >= half;
        const char* from = part.panel + (second ? part.far + (p - half) * w.panel_bytes() : p * w.panel_bytes()) + part.line * LINE_BYTES;
        auto* to = reinterpret_cast<float*>(out + p * apart);
        for (int64_t line = 0; line < part.lines; line++, from += LINE_BYTES) {
            const vu raw = load_bits(from);
#pragma GCC unroll 4
            for (int j = 0; j < EACH; j++, to += PANEL) store(to, reinterpret_cast<vf>(D::word(W{}, raw, j)));
        }
    }
}

using MatrixTile = void (*)(const Linear&, const Part&, Ending&);

// makes: whether a tile makes its words for itself.
template <class D, class W, bool MAKES = false>
MatrixTile matrix_tile_of(int64_t high, int64_t panels, bool makes) {
    if constexpr (W::VALUES != D::INPUTS && !MAKES)
        if (makes) return matrix_tile_of<D, W, true>(high, panels, makes);
    if (high > MATRIX_ROWS) return panels == 1 ? matrix_tile<D, W, 2, 1, MAKES> : matrix_tile<D, W, 2, 2, MAKES>;
    return panels == 1 ? matrix_tile<D, W, 1, 1, MAKES> : panels == 2 ? matrix_tile<D, W, 1, 2, MAKES> : matrix_tile<D, W, 1, 4, MAKES>;
}
#else
struct Registers {
    explicit Registers(int64_t) {}
};
template <class D, class W>
inline void make_words(const Weight&, const Part&, int64_t, char*, int64_t) {}
struct Ending {};
template <class D, class W>
void (*matrix_tile_of(int64_t, int64_t, bool))(const Linear&, const Part&, Ending&) { return nullptr; }
#endif

}  // namespace weft::WEFT_ISA
