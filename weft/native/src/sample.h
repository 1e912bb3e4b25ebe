// A token out of each row of logits: truncation by threshold, without sorting the vocabulary, and the race (weft/core/noise.py).
// Included by the files of the instruction sets.
//
// The winner is the token with the greatest  (logit - max) / temperature + gumbel,  gumbel = -log(E), E = -log(1 - u) and u a hash of
// the row's key and the token.  As u <= E, a token whose u is not below exp of what it lacks to the best one so far has lost;
// where that is below the smallest u there is, no hash is made for it.  Logarithms of base 2 are compared, that of u by its bits as a
// float: exponent and fraction read as one number are log2(u), or up to 0.09 less.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "kernels.h"
#include "simd.h"

namespace weft::WEFT_ISA {

inline constexpr float ENDLESS = std::numeric_limits<float>::infinity(), NEVER_LOGIT = -ENDLESS;
inline constexpr int64_t STRIP = 64;   // logits that are looked at together
inline constexpr int64_t BLOCK = 512;  // logits whose weights are added up as floats
inline constexpr float LEAST_LOG = -22.9f;  // of the smallest u, 2^-33
inline constexpr float BITS_OF_NAT = 12102203.2f;  // 2^23 / log(2)
inline constexpr uint64_t TOKEN_STEP = 0xD1342543DE82EF95u, MULTIPLY_1 = 0xBF58476D1CE4E5B9u, MULTIPLY_2 = 0x94D049BB133111EBu;

typedef uint64_t vw __attribute__((vector_size(4 * WEFT_LANES)));  // half as many words of 64 bits

WEFT_INLINE uint32_t hashed(uint64_t key, uint64_t id) {
    uint64_t x = key + (id + 1) * TOKEN_STEP;
    x = (x ^ (x >> 30)) * MULTIPLY_1;
    x = (x ^ (x >> 27)) * MULTIPLY_2;
    return static_cast<uint32_t>((x ^ (x >> 31)) >> 32);
}
WEFT_INLINE vw mixed(vw x) {
    x = (x ^ (x >> 30)) * MULTIPLY_1;
    return (x ^ (x >> 27)) * MULTIPLY_2;
}
// The upper halves of words, a's and b's in turn.
template <int... I>
WEFT_INLINE vu paired(vw a, vw b, std::integer_sequence<int, I...>) {
    return WEFT_SHUFFLE(reinterpret_cast<vu>(a), reinterpret_cast<vu>(b), ((I & 1 ? LANES : 0) + (I | 1))...);
}
// Of LANES tokens, what goes into their hashes: of every other one, and of those between.
struct Seeds {
    vw even, odd;

    WEFT_INLINE static Seeds of(uint64_t key, vi ids) {
        const vw both = reinterpret_cast<vw>(ids);
        return {((both & UINT32_MAX) + 1) * TOKEN_STEP + key, ((both >> 32) + 1) * TOKEN_STEP + key};
    }
    WEFT_INLINE void next(int64_t tokens) { even += static_cast<uint64_t>(tokens) * TOKEN_STEP, odd += static_cast<uint64_t>(tokens) * TOKEN_STEP; }
    // But for their lowest bits, which are all that the hash's last step changes of its upper half.
    WEFT_INLINE vu hashes() const { return paired(mixed(even), mixed(odd), Lanes{}); }
};

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

WEFT_INLINE bool any(vi where) {
#if defined(__AVX512F__)
    return _mm512_test_epi32_mask(reinterpret_cast<__m512i>(where), reinterpret_cast<__m512i>(where)) != 0;
#elif defined(__AVX2__)
    return _mm256_movemask_ps(reinterpret_cast<__m256>(where)) != 0;
#else
    int32_t found = 0;
    for (int j = 0; j < LANES; j++) found |= where[j];
    return found != 0;
#endif
}

template <int... I>
WEFT_INLINE vi numbered(std::integer_sequence<int, I...>) { return vi{I...}; }
WEFT_INLINE vi lanes() { return numbered(Lanes{}); }

// LANES logits from p on, of which there are `left`, and `beyond` in place of those that there are not.
WEFT_INLINE vf logits_at(const float* p, int64_t left, float beyond = NEVER_LOGIT) {
    if (left >= LANES) return load(p);
    float last[LANES];
    for (int64_t j = 0; j < LANES; j++) last[j] = j < left ? p[j] : beyond;
    return load(last);
}

// `look` (vector, place) at `count` numbers, SIDES vectors of which do not wait for each other; what fills up the last is -inf.
inline constexpr int SIDES = 4;
template <class Look>
WEFT_INLINE void each_vector(const float* x, int64_t count, const Look& look) {
    int64_t i = 0;
    for (; i + SIDES * LANES <= count; i += SIDES * LANES)
        for (int side = 0; side < SIDES; side++) look(load(x + i + side * LANES), side);
    for (; i < count; i += LANES) look(logits_at(x + i, count - i), 0);
}

inline float most_of(const float* x, int64_t count) {
    vf found[SIDES];
    std::fill_n(found, SIDES, all(NEVER_LOGIT));
    each_vector(x, count, [&](vf here, int side) { found[side] = larger(here, found[side]); });
    return top(larger(larger(found[0], found[1]), larger(found[2], found[3])));
}

// The greatest logit and the first token that has it, -1 where something is no number, or the greatest one is not finite.
inline int64_t likeliest(const Draw& row, float& most) {
    int64_t at = 0;
    vi strange[SIDES]{};  // the greatest magnitudes, as words: those of what is no number are greater than infinity's
    most = NEVER_LOGIT;
    for (int64_t first = 0; first < row.vocab; first += BLOCK) {
        vf found[SIDES];
        std::fill_n(found, SIDES, all(NEVER_LOGIT));
        each_vector(row.logits + first, std::min(BLOCK, row.vocab - first), [&](vf here, int side) {
            const vi magnitude = reinterpret_cast<vi>(here) & INT32_MAX;
            strange[side] = magnitude > strange[side] ? magnitude : strange[side];
            found[side] = larger(here, found[side]);
        });
        if (const float here = top(larger(larger(found[0], found[1]), larger(found[2], found[3]))); here > most) most = here, at = first;
    }
    for (const vi& some : strange)
        if (any(some > 0x7F800000)) return -1;
    if (!std::isfinite(most)) return -1;
    return std::find(row.logits + at, row.logits + row.vocab, most) - row.logits;
}

inline float inverse_of(double temperature) { return static_cast<float>(std::min(1.0 / temperature, 1e38)); }

inline constexpr int MOST_LEVELS = 4;
inline constexpr int64_t FEW = 64;
inline constexpr int MOST_LOOKS = 12;
inline constexpr int64_t LARGE = 1 << 15, SAMPLED = 16;
inline constexpr float NEAR = 0.25f, FAR = 2.0f;  // of what is found in a part to what holds for all: most of the time, and nearly always

// What is found out about the numbers that lack at most as much as each level to the greatest one: how many they are, or else what they
// weigh by exp.  The last level is that of all.
template <bool COUNT, int LEVELS = MOST_LEVELS>
struct Levels {
    float lack[LEVELS];
    double found[LEVELS];

    void weigh(const float* x, int64_t all_of_them, float most, float inverse) {
        std::fill_n(found, LEVELS, 0.0);
        vf low[LEVELS];
        for (int l = 0; l < LEVELS; l++) low[l] = all(-lack[l]);
        for (int64_t first = 0; first < all_of_them; first += BLOCK) {
            const int64_t stop = std::min(first + BLOCK, all_of_them);
            std::conditional_t<COUNT, vi, vf> added[LEVELS]{};
            for (int64_t i = first; i < stop; i += LANES) {
                const vf d = (logits_at(x + i, stop - i) - most) * inverse;
                if constexpr (COUNT) {
                    for (int l = 0; l < LEVELS; l++) added[l] -= d >= low[l];
                    if (stop - i < LANES) added[LEVELS - 1][0] -= static_cast<int32_t>(LANES - stop + i);  // what fills up lacks all
                } else {
                    const vf e = exponential(d);
                    for (int l = 0; l < LEVELS - 1; l++) added[l] += select(d >= low[l], e, vf{});
                    added[LEVELS - 1] += e;
                }
            }
            for (int l = 0; l < LEVELS; l++) found[l] += sum(added[l]);
        }
    }
};

// The greatest and the smallest of some numbers.
struct Span {
    float greatest, least;
};
inline Span span(const float* x, int64_t count) {
    vf greatest = all(NEVER_LOGIT), least = all(ENDLESS);
    for (int64_t i = 0; i < count; i += LANES) {
        const vf here = logits_at(x + i, count - i, *x);
        greatest = larger(here, greatest), least = here < least ? here : least;
    }
    return {top(greatest), -top(-least)};
}

// Those of x that are wanted, to p and behind it, where LANES are written; how many they are.
WEFT_INLINE int64_t put(float* p, vf x, vi wanted) {
#if defined(__AVX512F__)
    const __mmask16 which = _mm512_test_epi32_mask(reinterpret_cast<__m512i>(wanted), reinterpret_cast<__m512i>(wanted));
    store(p, reinterpret_cast<vf>(_mm512_maskz_compress_ps(which, reinterpret_cast<__m512>(x))));
    return __builtin_popcount(which);
#else
    if (!any(wanted)) return 0;
    float values[LANES];
    int32_t in[LANES], count = 0;
    store(values, x);
    std::memcpy(in, &wanted, sizeof in);
    for (int j = 0; j < LANES; j++) p[count] = values[j], count -= in[j];
    return count;
#endif
}

// The numbers in x that `in` holds for, into `some`, which may be x; how many they are.
template <class In>
inline int64_t gather(const float* x, int64_t count, float* some, const In& in) {
    int64_t kept = 0, i = 0;
    for (; i + SIDES * LANES <= count; i += SIDES * LANES) {
        vf here[SIDES];
        vi wanted[SIDES], any_of_them{};
        for (int side = 0; side < SIDES; side++) {
            here[side] = load(x + i + side * LANES), wanted[side] = in(here[side]);
            any_of_them |= wanted[side];
        }
        if (!any(any_of_them)) continue;
        for (int side = 0; side < SIDES; side++) kept += put(some + kept, here[side], wanted[side]);
    }
    for (; i < count; i += LANES) {
        const vf here = logits_at(x + i, count - i);
        kept += put(some + kept, here, in(here) & (lanes() < static_cast<int32_t>(count - i)));
    }
    return kept;
}

template <bool COUNT>
inline float lack_nearly(const float* x, int64_t count, float most, double temperature, double wanted, float* some);

// Of the greatest of `count` numbers, as many as together weigh top_p of all or, where they are COUNTed, as are top_k, the smallest one.
// The level in which that is reached is parted again and again, until it holds few, which are sorted.  some: memory, which may be x.
template <bool COUNT>
inline float smallest_kept(const float* x, int64_t count, float most, double temperature, double wanted, float* some) {
    const float inverse = COUNT ? 1.0f : inverse_of(temperature);
    Levels<COUNT> levels{{1.0f, 4.0f, 10.0f, ENDLESS}, {}};
    if (count > LARGE && x != some) {
        const float near = lack_nearly<COUNT>(x, count, most, temperature, wanted, some);
        levels.lack[1] = near - NEAR, levels.lack[2] = near + NEAR;
    }
    double before = 0.0;  // of those that are greater than x
    for (int look = 0; look < MOST_LOOKS && (look == 0 || count > FEW); look++) {
        levels.weigh(x, count, most, inverse);
        if (!COUNT && look == 0) wanted *= levels.found[MOST_LEVELS - 1];
        int l = 0;
        while (l < MOST_LEVELS - 1 && before + levels.found[l] < wanted) l++;
        const float low = l ? levels.lack[l - 1] : -1.0f, high = levels.lack[l];
        if (l) before += levels.found[l - 1];
        count = gather(x, count, some, [&](vf here) {
            const vf d = (here - most) * inverse;
            return (d < -low) & (d >= -high);
        });
        x = some;
        const Span all_of_them = span(x, count);
        if (all_of_them.greatest == all_of_them.least) return all_of_them.least;
        const float nearest = (most - all_of_them.greatest) * inverse, farthest = (most - all_of_them.least) * inverse;
        for (int i = 0; i < MOST_LEVELS - 1; i++)
            levels.lack[i] = nearest + std::min(farthest - nearest, 100.0f) * static_cast<float>(i + 1) / MOST_LEVELS;
        levels.lack[MOST_LEVELS - 1] = ENDLESS;
    }
    std::sort(some, some + count, std::greater<float>());
    for (int64_t i = 0; i < count; i++) {
        before += COUNT ? 1.0 : std::exp((static_cast<double>(some[i]) - most) / temperature);
        if (before >= wanted) return some[i];
    }
    return count ? some[count - 1] : most;
}

// About how much the smallest one kept of many lacks to the greatest one, as a part of them says.  some: memory, not x.
template <bool COUNT>
inline float lack_nearly(const float* x, int64_t count, float most, double temperature, double wanted, float* some) {
    int64_t taken = 0;
    for (int64_t i = 0; i + STRIP <= count; i += STRIP * SAMPLED, taken += STRIP) std::memcpy(some + taken, x + i, STRIP * 4);
    const float least = smallest_kept<COUNT>(some, taken, most, temperature, COUNT ? wanted / SAMPLED : wanted, some);
    return (most - least) * (COUNT ? 1.0f : inverse_of(temperature));
}

// All tokens of at least `limit`.  Of a block of which few can win these are put together first, since hashes cost most.
inline void race_all(const Draw& row, float most, double limit, Race& race) {
    const float inverse = inverse_of(row.temperature);
    const float farthest = (std::nextafter(static_cast<float>(limit), NEVER_LOGIT) - most) * inverse;
    float behind = 0.0f, least = 0.0f, lacks[BLOCK + LANES], names[BLOCK + LANES];
    double told = -std::numeric_limits<double>::infinity();
    const auto near_enough = [&](vf lack, const Seeds& seeds) {
        const vf u = __builtin_convertvector(reinterpret_cast<vi>(seeds.hashes() >> 8), vf);  // times 2^24
        return reinterpret_cast<vi>(u) < __builtin_convertvector(larger(lack * BITS_OF_NAT + behind, vf{}), vi);
    };
    const auto enter = [&](vi enters, vi ids) {
        if (!any(enters)) return;
        for (int j = 0; j < LANES; j++)
            if (enters[j] && row.logits[ids[j]] >= limit) race.enter(ids[j], row.logits[ids[j]]);
    };
    int64_t there = 0;  // of the block before
    for (int64_t first = 0; first < row.vocab; first += BLOCK) {
        if (race.best != told) {
            // A little too far, for the error of floats: whoever is near enters, and is looked at exactly.
            told = race.best, behind = static_cast<float>((127 + 24 + 0.002) * 0x1p23 - told * BITS_OF_NAT);
            least = std::max(static_cast<float>(told) + LEAST_LOG - 0.01f, farthest);
        }
        const int64_t stop = std::min(first + BLOCK, row.vocab);
        const vi ids = lanes() + static_cast<int32_t>(first);
        const auto lack_of = [&](int64_t i) { return (logits_at(row.logits + i, std::max<int64_t>(stop - i, 0)) - most) * inverse; };
        if (there > BLOCK * 3 / 4) {
            Seeds seeds = Seeds::of(row.key, ids);
            vi counted{};  // one vector of SIDES
            for (int64_t i = first; i < stop; i += SIDES * LANES) {
                vi enters[SIDES], some{};
                for (int side = 0; side < SIDES; side++, seeds.next(LANES)) {
                    const vf lack = lack_of(i + side * LANES);
                    some |= enters[side] = near_enough(lack, seeds);
                    if (side == 0) counted -= lack >= least;
                }
                if (!any(some)) continue;
                for (int side = 0; side < SIDES; side++) enter(enters[side], ids + static_cast<int32_t>(i - first + side * LANES));
            }
            there = SIDES * sum(counted);
            continue;
        }
        there = 0;
        for (int64_t i = first; i < stop; i += SIDES * LANES) {
            vf lack[SIDES];
            vi in[SIDES], some{};
            for (int side = 0; side < SIDES; side++) lack[side] = lack_of(i + side * LANES), some |= in[side] = lack[side] >= least;
            if (!any(some)) continue;
            for (int side = 0; side < SIDES; side++) {
                put(names + there, reinterpret_cast<vf>(ids + static_cast<int32_t>(i - first + side * LANES)), in[side]);
                there += put(lacks + there, lack[side], in[side]);
            }
        }
        store(lacks + there, all(NEVER_LOGIT));  // what fills up loses
        for (int64_t i = 0; i < there; i += LANES) {
            const vi found = reinterpret_cast<vi>(load(names + i));
            enter(near_enough(load(lacks + i), Seeds::of(row.key, found)), found);
        }
    }
}

// A number that at least k of a row are not below, for k that are no more than its strips.
inline float floor_of(const Draw& row, int64_t k, float* some) {
    int64_t strips = 0;
    for (int64_t first = 0; first < row.vocab; first += STRIP)
        some[strips++] = most_of(row.logits + first, row.vocab - first < STRIP ? row.vocab - first : STRIP);
    if (k > strips) return NEVER_LOGIT;
    std::nth_element(some, some + (k - 1), some + strips, std::greater<float>());
    return some[k - 1];
}

// The winner among the greatest that together weigh top_p, `limit` the least that enters, -1 where it is not known.  Whoever wins among
// some more than these wins among these too if it is one of them, and that two sums tell: what is greater than it weighs less than
// top_p, and those that raced weigh as much.  So their smallest one need not be found, which is dear.
inline int32_t winner_nearly(const Draw& row, float most, int64_t first, double limit, float* some) {
    const float inverse = inverse_of(row.temperature);
    const float lack = lack_nearly<false>(row.logits, row.vocab, most, row.temperature, row.top_p, some) + FAR;
    Race race{row, most};
    race.enter(static_cast<int32_t>(first), most);
    race_all(row, most, std::max(limit, most - static_cast<double>(lack) / inverse), race);
    const float above = std::nextafter((row.logits[race.winner] - most) * inverse, ENDLESS);
    Levels<false, 3> weighed{{-above, lack, ENDLESS}, {}};
    weighed.weigh(row.logits, row.vocab, most, inverse);
    const double wanted = row.top_p * weighed.found[2];
    return weighed.found[0] < wanted && weighed.found[1] >= wanted ? race.winner : -1;
}

// -1 where the greatest logit is no finite number.  some: as many floats as logits, and LANES more.
inline int64_t draw_one(const Draw& row, float* some) {
    float most;
    const int64_t first = likeliest(row, most);
    if (first < 0 || row.temperature == 0.0) return first;
    double limit = -std::numeric_limits<double>::infinity();
    if (row.min_p > 0.0) limit = static_cast<double>(most) + row.temperature * std::log(row.min_p);
    if (row.top_p < 1.0 && row.top_k <= 0 && row.vocab > LARGE)
        if (const int32_t winner = winner_nearly(row, most, first, limit, some); winner >= 0) return winner;
    const float* x = row.logits;
    int64_t count = row.vocab;
    const auto keep = [&](float least) { count = gather(row.logits, row.vocab, some, [least](vf here) { return here >= least; }), x = some; };
    if (row.top_k > 0 && row.top_k < row.vocab) {
        keep(floor_of(row, row.top_k, some));
        const float last = smallest_kept<true>(x, count, most, row.temperature, static_cast<double>(row.top_k), some);
        limit = std::max(limit, static_cast<double>(last));
        if (row.top_p < 1.0) keep(last);
    }
    if (row.top_p < 1.0) limit = std::max(limit, static_cast<double>(smallest_kept<false>(x, count, most, row.temperature, row.top_p, some)));
    Race race{row, most};
    race.enter(static_cast<int32_t>(first), most);
    race_all(row, most, limit, race);
    return race.winner;
}

// The token of each row, one row a thread.
inline void draw(const Draw* rows, int64_t count, int64_t* ids, Share share) {
    std::vector<float> more;
    for (int64_t i = share.index; i < count; i += share.count) {
        const int64_t needed = rows[i].vocab + LANES;
        if (needed > SCRATCH) more.resize(static_cast<size_t>(needed));
        ids[i] = draw_one(rows[i], needed > SCRATCH ? more.data() : share.scratch);
    }
}

}  // namespace weft::WEFT_ISA
