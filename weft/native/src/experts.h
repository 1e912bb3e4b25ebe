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
    float *gathered, *results;  // [T * k, width]
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

// Numbers the pairs.  By one thread, before the others go on.
inline void arrange(const Experts& a, Step& step) {
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
}

inline void gather(const Experts& a, const Step& step, Share share) {
    int64_t from, to;
    share.range(static_cast<int64_t>(step.pair_row.size()), 1, from, to);
    for (int64_t pair = from; pair < to; pair++)
        std::copy_n(a.x + step.pair_row[static_cast<size_t>(pair)] * a.x_stride, a.width, a.gathered + pair * a.width);
}

// out [T, width] = sum of shares times results, in the order of the experts.
inline void combine(const Experts& a, const Step& step, Share share) {
    int64_t from, to;
    share.range(step.rows, 1, from, to);
    std::vector<std::pair<int64_t, float>> mine(static_cast<size_t>(a.top_k));
    for (int64_t row = from; row < to; row++) {
        for (int i = 0; i < a.top_k; i++) {
            const auto at = static_cast<size_t>(row * a.top_k + i);
            mine[static_cast<size_t>(i)] = {step.pair_of[at], a.shares[at]};
        }
        std::sort(mine.begin(), mine.end());
        float* out = a.out + row * a.out_stride;
        std::fill_n(out, a.width, 0.0f);
        for (const auto& [pair, part] : mine) {
            const float* result = a.results + pair * a.width;
            for (int64_t i = 0; i < a.width; i++) out[i] += result[i] * part;
        }
    }
}

}  // namespace weft
