// A token out of each row of logits: truncation by threshold, without sorting the vocabulary, and the race (weft/core/noise.py).
// Included by the files of the instruction sets.
//
// The winner is the token with the greatest  (logit - max) / temperature + gumbel,  gumbel = -log(E), E = -log(1 - u) and u a hash of
// the row's key and the token.  As u <= E, a token whose u is not below exp of what it lacks to the best one so far has lost,
// and no logarithm is taken for it.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "kernels.h"
#include "simd.h"

namespace weft::WEFT_ISA {

struct Candidate {
    float logit;
    int32_t id;
};
inline bool likelier(const Candidate& a, const Candidate& b) { return a.logit != b.logit ? a.logit > b.logit : a.id < b.id; }

WEFT_INLINE uint32_t hashed(uint64_t key, uint64_t id) {
    uint64_t x = key + (id + 1) * 0xD1342543DE82EF95u;
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
    return static_cast<uint32_t>((x ^ (x >> 31)) >> 32);
}

struct Race {
    const Draw& row;
    double most;  // the greatest logit
    double best = -std::numeric_limits<double>::infinity();
    int32_t winner = 0;

    void enter(int32_t id, float logit) {
        const double u = (hashed(row.key, static_cast<uint64_t>(id)) + 0.5) * 0x1p-32;
        const double score = (static_cast<double>(logit) - most) / row.temperature - std::log(-std::log1p(-u));
        if (score > best || (score == best && id < winner)) best = score, winner = id;
    }
};

inline constexpr float NEVER_LOGIT = -std::numeric_limits<float>::infinity();
inline constexpr int64_t STRIP = 64;  // logits that are looked at together

inline float most_of(const float* x, int64_t count) {
    vf found = all(NEVER_LOGIT);
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) found = larger(load(x + i), found);
    float most = top(found);
    for (; i < count; i++) most = x[i] > most ? x[i] : most;
    return most;
}

inline float inverse_of(const Draw& row) { return static_cast<float>(std::min(1.0 / row.temperature, 1e38)); }

// All tokens of at least `limit`.
inline void race_all(const Draw& row, float most, double limit, Race& race) {
    const float inverse = inverse_of(row);
    for (int64_t first = 0; first < row.vocab; first += STRIP) {
        const int64_t count = row.vocab - first < STRIP ? row.vocab - first : STRIP;
        float lacks[STRIP];
        uint32_t bits[STRIP];
        // A little too large, for the error of floats: whoever is near enters, and is looked at exactly.
        const float share = static_cast<float>(std::exp(-race.best)) * 1.001f;
        for (int64_t i = 0; i < count; i += LANES) {
            float some[LANES];
            const int64_t left = count - i < LANES ? count - i : LANES;
            for (int64_t j = 0; j < LANES; j++) some[j] = j < left ? row.logits[first + i + j] : NEVER_LOGIT;
            store(lacks + i, exponential((load(some) - most) * inverse) * share);
        }
        for (int64_t i = 0; i < STRIP; i++) bits[i] = hashed(row.key, static_cast<uint64_t>(first + i));
        for (int64_t i = 0; i < count; i++)
            if (static_cast<float>(bits[i] >> 8) * 0x1p-24f < lacks[i] && row.logits[first + i] >= limit)
                race.enter(static_cast<int32_t>(first + i), row.logits[first + i]);
    }
}

// Tokens whose logit is at least `limit`.
inline void gather_from(const Draw& row, float limit, std::vector<Candidate>& found) {
    found.clear();
    for (int64_t first = 0; first < row.vocab; first += STRIP) {
        const int64_t count = row.vocab - first < STRIP ? row.vocab - first : STRIP;
        if (most_of(row.logits + first, count) < limit) continue;
        for (int64_t i = first; i < first + count; i++)
            if (row.logits[i] >= limit) found.push_back({row.logits[i], static_cast<int32_t>(i)});
    }
}

// The k-th greatest logit.  The k-th greatest of the strips' greatest ones is none of the k - 1 greatest of all: from it on they are
// all gathered.
inline float kth(const Draw& row, int64_t k, std::vector<float>& strips, std::vector<Candidate>& found) {
    strips.clear();
    for (int64_t first = 0; first < row.vocab; first += STRIP)
        strips.push_back(most_of(row.logits + first, row.vocab - first < STRIP ? row.vocab - first : STRIP));
    float limit = NEVER_LOGIT;
    if (k <= static_cast<int64_t>(strips.size())) {
        std::nth_element(strips.begin(), strips.begin() + (k - 1), strips.end(), std::greater<float>());
        limit = strips[static_cast<size_t>(k - 1)];
    }
    gather_from(row, limit, found);
    std::nth_element(found.begin(), found.begin() + (k - 1), found.end(), likelier);
    return found[static_cast<size_t>(k - 1)].logit;
}

// The sum of exp((x - most) / temperature).
inline double weight_of_all(const Draw& row, float most) {
    const float inverse = inverse_of(row);
    double total = 0.0;
    for (int64_t first = 0; first < row.vocab; first += STRIP) {
        const int64_t count = row.vocab - first < STRIP ? row.vocab - first : STRIP;
        vf added = vf{};
        for (int64_t i = 0; i < count; i += LANES) {
            float some[LANES];
            for (int64_t j = 0; j < LANES; j++) some[j] = i + j < count ? row.logits[first + i + j] : NEVER_LOGIT;
            added += exponential((load(some) - most) * inverse);
        }
        total += sum(added);
    }
    return total;
}

// The smallest logit of the likeliest ones that together reach top_p of `total`.  found: candidates, of which none that is kept is
// missing; they come out in another order.
inline double nucleus(const Draw& row, double most, double total, std::vector<Candidate>& found) {
    double before = 0.0;
    auto sorted = found.begin();
    for (int64_t step = 256; sorted != found.end(); step *= 8) {
        const auto stop = found.end() - sorted > step ? sorted + step : found.end();
        if (stop != found.end()) std::nth_element(sorted, stop, found.end(), likelier);
        std::sort(sorted, stop, likelier);
        for (; sorted != stop; ++sorted) {
            if (before >= row.top_p && sorted != found.begin()) return (sorted - 1)->logit;
            before += std::exp((static_cast<double>(sorted->logit) - most) / row.temperature) / total;
        }
    }
    return found.empty() ? most : found.back().logit;
}

// Whether something is no number.
inline bool strange(const float* x, int64_t count) {
    vi found = vi{};
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) {
        const vf some = load(x + i);
        found |= some != some;
    }
    int32_t any = 0;
    for (int j = 0; j < LANES; j++) any |= found[j];
    for (; i < count; i++) any |= x[i] != x[i];
    return any != 0;
}

// -1 where the greatest logit is no finite number.
inline int64_t draw_one(const Draw& row, std::vector<Candidate>& found, std::vector<float>& strips) {
    const float most = most_of(row.logits, row.vocab);
    if (!std::isfinite(most) || strange(row.logits, row.vocab)) return -1;
    if (row.temperature == 0.0) return std::find(row.logits, row.logits + row.vocab, most) - row.logits;
    double limit = -std::numeric_limits<double>::infinity();
    if (row.min_p > 0.0) limit = static_cast<double>(most) + row.temperature * std::log(row.min_p);
    Race race{row, most};
    const bool cuts = row.top_k > 0 && row.top_k < row.vocab;
    if (!cuts && row.top_p >= 1.0) {
        for (int64_t i = 0; i < row.vocab; i++)
            if (row.logits[i] == most) {
                race.enter(static_cast<int32_t>(i), most);
                break;
            }
        race_all(row, most, limit, race);
        return race.winner;
    }
    if (cuts) {
        const float last = kth(row, row.top_k, strips, found);
        limit = std::max(limit, static_cast<double>(last));
        std::erase_if(found, [&](const Candidate& c) { return c.logit < last; });
        if (row.top_p < 1.0) {
            double total = 0.0;
            for (const Candidate& c : found) total += std::exp((static_cast<double>(c.logit) - most) / row.temperature);
            limit = std::max(limit, nucleus(row, most, total, found));
        }
    } else {
        // What each weighs less than this weighs too little together to reach into the nucleus.
        const double total = weight_of_all(row, most), spare = (1.0 - row.top_p) * total / static_cast<double>(row.vocab) * 0.99;
        const double least = spare > 0.0 ? most + row.temperature * std::log(spare) : -std::numeric_limits<double>::infinity();
        gather_from(row, std::nextafter(static_cast<float>(least), NEVER_LOGIT), found);
        limit = std::max(limit, nucleus(row, most, total, found));
    }
    for (const Candidate& c : found)
        if (c.logit >= limit) race.enter(c.id, c.logit);
    return race.winner;
}

// The token of each row, one row a thread.
inline void draw(const Draw* rows, int64_t count, int64_t* ids, Share share) {
    std::vector<Candidate> found;
    std::vector<float> strips;
    for (int64_t i = share.index; i < count; i += share.count) ids[i] = draw_one(rows[i], found, strips);
}

}  // namespace weft::WEFT_ISA
