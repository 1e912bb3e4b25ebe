// Gates and what they open, and the product that reads it, block of rows by block: where inputs are rounded to bfloat16, what is opened
// is written as the words that the second product reads, and never leaves the caches.  Bits are those of the two products apart.
// Included by the files of the instruction sets.
#pragma once

#include "blocks.h"

namespace weft::WEFT_ISA {

#if defined(__AVX512BF16__)
// Whether both products have the same tiles and nothing is read of what is opened but its words.
template <class W>
WEFT_INLINE bool hands_on(const Linear& up, const Linear& down, int64_t rows) {
    if constexpr (!BY_HALVES<W>) {
        return false;
    } else {
        const auto halves = [](const Linear& a) {
            return dots<W>(a) && !(W::SCALED && a.inputs == Inputs::INT8) && !a.weight.offsets;
        };
        const Way<Halves, W> first(up.weight, rows), second(down.weight, rows);
        return opens<W>(up) && halves(up) && halves(down) && first.most == second.most && first.matrices == second.matrices;
    }
}

template <class W>
void handed_on(const Linear& up, const Linear& down, int64_t rows, Share share) {
    const int64_t each = down.weight.k / Halves::INPUTS;
    const auto size = [&](int64_t count) {
        return Rows<Halves>::size(up.weight, count, up.weight.k / Halves::INPUTS) + Rows<Halves>::size(down.weight, count, each);
    };
    const Way<Halves, W> way(up.weight, rows);
    // Where the second product's words are too many for that cache, those of the first fill it: the second takes its own bit by bit.
    const bool fits = way.fitting / each >= FEWEST_ROWS;
    const int64_t high = way.block_rows(rows, fits ? each : up.weight.k / Halves::INPUTS, size);
    float* between = share.scratch + INPUTS_SCRATCH + SUMS_SCRATCH;
    char* made = reinterpret_cast<char*>(share.scratch + INPUTS_SCRATCH);
    for (int64_t first = 0; first < rows; first += high) {
        const Block<Halves> block(up.weight, way, first, rows - first < high ? rows - first : high, share);
        const Rows<Halves> handed(share.shared + (block.own ? 0 : Rows<Halves>::size(up.weight, block.count, block.each)), block.count, each);
        block.template round<W>(up, share, 0);
        each_share(up, share, up.weight.n / (2 * PANEL), way.wide / 2, true, [&](int64_t from, int64_t to) {
            multiply<Halves, W>(up, way, block.rows, first, block.count, from, to, true, between, made, handed.words);
        });
        share.meet();
        each_share(down, share, (down.weight.n + PANEL - 1) / PANEL, way.wide, true, [&](int64_t from, int64_t to) {
            multiply<Halves, W>(down, way, handed, first, block.count, from, to, false, between, made);
        });
        if (first + high < rows) share.meet();  // before somebody writes the next words there
    }
}
#endif

// down of what the gates of `up` open; up.gate.out may hold anything then.
inline void mlp(const Linear& up, const Linear& down, int64_t rows, Share share) {
    if (rows <= 0) return;
#if defined(__AVX512BF16__)
    if (up.weight.format == down.weight.format) {
        if (up.weight.format == Format::BF16 && hands_on<BF16>(up, down, rows)) return handed_on<BF16>(up, down, rows, share);
        if (up.weight.format == Format::I8 && hands_on<I8>(up, down, rows)) return handed_on<I8>(up, down, rows, share);
        if (up.weight.format == Format::I4 && hands_on<I4>(up, down, rows)) return handed_on<I4>(up, down, rows, share);
    }
#endif
    linear(up, rows, share);
    share.meet();
    linear(down, rows, share);
}

}  // namespace weft::WEFT_ISA
