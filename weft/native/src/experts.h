// A mixture of experts as operations of a program: rows are sent to their experts, each expert's rows are computed together, and
// the results are added up in the order of the experts, so that a row's bits do not depend on the rows beside it.
//
// Legend.  T: rows.  E: experts.  k: experts of a row.  A *pair* is a row and one of its experts; pairs are numbered expert by expert.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "program.h"

namespace weft {

struct Experts {
    const float* router;  // [T, E], router_stride apart
    float* shares;        // [T, k]
    int64_t* ids;         // [T, k]
    const float* x;       // [T, width]
    float* out;           // [T, width]
    float* results;       // [T * k, width]
    int64_t router_stride, x_stride, out_stride, width;
    int num, top_k;
    bool normalize;
};

// Softmax over all experts, then the best k of each row, the first of equals first.
inline void route(const Experts& a, int64_t rows, Share share) {
    int64_t from, to;
    share.range(rows, 1, from, to);
    std::vector<float> law(static_cast<size_t>(a.num));
    for (int64_t row = from; row < to; row++) {
        const float* logits = a.router + row * a.router_stride;
        const float most = *std::max_element(logits, logits + a.num);
        float total = 0.0f;
        for (int e = 0; e < a.num; e++) total += law[static_cast<size_t>(e)] = std::exp(logits[e] - most);
        float kept = 0.0f;
        for (int i = 0; i < a.top_k; i++) {
            const auto best = std::max_element(law.begin(), law.end());
            a.ids[row * a.top_k + i] = best - law.begin();
            kept += a.shares[row * a.top_k + i] = *best / total;
            *best = -1.0f;
        }
        if (a.normalize)
            for (int i = 0; i < a.top_k; i++) a.shares[row * a.top_k + i] /= kept;
    }
}

// Experts for each thread from which on threads take whole ones, as they come: nobody waits for the others then.
inline constexpr size_t EXPERTS_EACH = 4;

// Numbers the pairs, and lists the experts that have some, those with most first.  By one of the threads, before the others go on.
inline void arrange(const Experts& a, Step& step, int threads) {
    const auto pairs = static_cast<size_t>(step.rows * a.top_k);
    step.first_pair.assign(static_cast<size_t>(a.num) + 1, 0);
    step.pair_row.resize(pairs);
    step.pair_of.resize(pairs);
    const auto expert = [&](size_t i) {  // a hook may have written anything
        return static_cast<size_t>(std::clamp<int64_t>(a.ids[i], 0, a.num - 1));
    };
    for (size_t i = 0; i < pairs; i++) step.first_pair[expert(i) + 1]++;
    for (size_t e = 0; e < static_cast<size_t>(a.num); e++) step.first_pair[e + 1] += step.first_pair[e];
    std::vector<int64_t> next(step.first_pair.begin(), step.first_pair.end() - 1);
    for (size_t i = 0; i < pairs; i++) {
        const int64_t pair = next[expert(i)]++;
        step.pair_of[i] = pair;
        step.pair_row[static_cast<size_t>(pair)] = static_cast<int64_t>(i) / a.top_k;
    }
    const auto rows_of = [&](size_t e) { return step.first_pair[e + 1] - step.first_pair[e]; };
    step.busy.clear();
    for (size_t e = 0; e < static_cast<size_t>(a.num); e++)
        if (rows_of(e)) step.busy.push_back(e);
    std::stable_sort(step.busy.begin(), step.busy.end(), [&](size_t e, size_t f) { return rows_of(e) > rows_of(f); });
    // Not where one has more than a thread's part of all pairs: the others would wait for it.
    const bool even = !step.busy.empty() && rows_of(step.busy.front()) * threads <= static_cast<int64_t>(pairs);
    step.whole = even && step.busy.size() >= EXPERTS_EACH * static_cast<size_t>(threads);
    step.taken = 0;
}

// An expert's gates and what they open, and the product that reads them.
struct Expert {
    Linear up, down;

    // Of its pairs [first, first + ...) the first one's: rows of x by pair, all else by pair.
    Expert at(const Step& step, int64_t first) const {
        Expert found = *this;
        found.up.picks = step.pair_row.data() + first;
        found.up.out += first * up.out_stride, found.up.gate.x = found.up.out, found.up.gate.out += first * up.gate.out_stride;
        found.down.x = found.up.gate.out, found.down.out += first * down.out_stride;
        return found;
    }
};

// results, by pair.
inline void compute(const std::vector<Expert>& all, const Kernels& kernels, Pool& pool, Step& step, Share share) {
    const auto each = [&](size_t e, const auto& run) {
        const int64_t first = step.first_pair[e];
        run(all[e].at(step, first), step.first_pair[e + 1] - first);
    };
    if (step.whole) {
        const Share alone = pool.alone(share.index);
        for (size_t i; (i = step.taken.fetch_add(1, std::memory_order_relaxed)) < step.busy.size();)
            each(step.busy[i], [&](const Expert& one, int64_t rows) { kernels.mlp(one.up, one.down, rows, alone); });
        return;
    }
    for (const size_t e : step.busy) each(e, [&](const Expert& one, int64_t rows) { kernels.linear(one.up, rows, share); });
    share.meet();
    for (const size_t e : step.busy) each(e, [&](const Expert& one, int64_t rows) { kernels.linear(one.down, rows, share); });
}

// out [T, width] = sum of shares times results, in the order of the experts.
inline void combine(const Experts& a, const Kernels& kernels, const Step& step, Share share) {
    int64_t from, to;
    share.range(step.rows, 1, from, to);
    const auto each = static_cast<size_t>(a.top_k);
    std::vector<std::pair<int64_t, float>> mine(each);
    std::vector<const float*> results(each);
    std::vector<float> shares(each);
    for (int64_t row = from; row < to; row++) {
        const size_t first = static_cast<size_t>(row) * each;
        for (size_t i = 0; i < each; i++) mine[i] = {step.pair_of[first + i], a.shares[first + i]};
        std::sort(mine.begin(), mine.end());
        for (size_t i = 0; i < each; i++) results[i] = a.results + mine[i].first * a.width, shares[i] = mine[i].second;
        kernels.blend(results.data(), shares.data(), a.top_k, a.width, a.out + row * a.out_stride);
    }
}

}  // namespace weft
