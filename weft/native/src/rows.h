// Operations on the values of a row: norms, rotations, activations, sums.  Included by the files of the instruction sets.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace weft::WEFT_ISA {

inline void norm_one(const float* x, const float* weight, float* out, int width, float eps) {
    vf squares = vf{};
    int at = 0;
    for (; at + LANES <= width; at += LANES) {
        const vf v = load(x + at);
        squares += v * v;
    }
    float total = sum(squares);
    for (int i = at; i < width; i++) total += x[i] * x[i];
    const float root = 1.0f / std::sqrt(total / static_cast<float>(width) + eps);
    for (at = 0; at + LANES <= width; at += LANES) store(out + at, load(x + at) * root * load(weight + at));
    for (int i = at; i < width; i++) out[i] = x[i] * root * weight[i];
}

inline void norm(const Norm& a, int64_t rows, Share share) {
    int64_t from, to;
    share.range(rows, 1, from, to);
    for (int64_t row = from; row < to; row++)
        for (int head = 0; head < a.heads; head++) {
            const int64_t at = head * a.width;
            norm_one(a.x + row * a.x_stride + at, a.weight, a.out + row * a.out_stride + at, a.width, a.eps);
        }
}

inline void rope(const Rope& a, const float* cos, const float* sin, int64_t rows, Share share) {
    int64_t from, to;
    share.range(rows, 1, from, to);
    for (int64_t i = from * a.heads; i < to * a.heads; i++) {
        const int64_t row = i / a.heads;
        float* left = a.x + row * a.stride + i % a.heads * a.dim;
        float* right = left + a.pairs;
        const float *c = cos + row * a.pairs, *s = sin + row * a.pairs;
        int at = 0;
        for (; at + LANES <= a.pairs; at += LANES) {
            const vf l = load(left + at), r = load(right + at), cs = load(c + at), sn = load(s + at);
            store(left + at, l * cs - r * sn);
            store(right + at, r * cs + l * sn);
        }
        for (; at < a.pairs; at++) {
            const float l = left[at], r = right[at];
            left[at] = l * c[at] - r * s[at];
            right[at] = r * c[at] + l * s[at];
        }
    }
}

WEFT_INLINE vf activated(vf x, Activation which) {
    if (which == Activation::SILU) return x * inverse(1.0f + exponential(-x));
    // (1 + tanh(u)) / 2 = 1 / (1 + e^(-2u)), which loses nothing where the tanh is near -1.
    const vf inner = 0.7978845608028654f * (x + 0.044715f * x * x * x);
    return x * inverse(1.0f + exponential(-2.0f * inner));
}

inline void gated(const Gated& a, int64_t rows, Share share) {
    const int64_t steps = (a.inner + LANES - 1) / LANES;
    int64_t from, to;
    share.range(rows * steps, 1, from, to);
    for (int64_t i = from; i < to; i++) {
        const int64_t row = i / steps, at = i % steps * LANES;
        const float *gate = a.x + row * a.x_stride + at, *up = gate + a.inner;
        float* out = a.out + row * a.out_stride + at;
        if (at + LANES <= a.inner) {
            store(out, activated(load(gate), a.activation) * load(up));
            continue;
        }
        float some[LANES] = {};
        const int64_t left = a.inner - at;
        for (int64_t j = 0; j < left; j++) some[j] = gate[j];
        store(some, activated(load(some), a.activation));
        for (int64_t j = 0; j < left; j++) out[j] = some[j] * up[j];
    }
}

inline void add(float* into, const float* x, int64_t stride, int64_t width, int64_t rows, Share share) {
    int64_t from, to;
    share.range(rows, 1, from, to);
    for (int64_t row = from; row < to; row++) {
        float* mine = into + row * stride;
        const float* theirs = x + row * stride;
        int64_t at = 0;
        for (; at + LANES <= width; at += LANES) store(mine + at, load(mine + at) + load(theirs + at));
        for (; at < width; at++) mine[at] += theirs[at];
    }
}

inline void softcap(float* x, int64_t count, float cap, Share share) {
    int64_t from, to;
    share.range(count, LANES, from, to);
    for (int64_t at = from; at < to; at += LANES) {
        const int64_t left = to - at < LANES ? to - at : LANES;
        float some[LANES] = {};
        std::memcpy(some, x + at, static_cast<size_t>(left) * 4);
        store(some, cap * hyperbolic_tangent(load(some) / cap));
        std::memcpy(x + at, some, static_cast<size_t>(left) * 4);
    }
}

// out [width] = sum of shares times rows, in their order.
inline void blend(const float* const* rows, const float* shares, int count, int64_t width, float* out) {
    constexpr int SOME = 8;  // sums that do not wait for each other
    int64_t at = 0;
    for (; at + SOME * LANES <= width; at += SOME * LANES) {
        vf total[SOME] = {};
        for (int i = 0; i < count; i++)
            for (int v = 0; v < SOME; v++) total[v] += load(rows[i] + at + v * LANES) * shares[i];
        for (int v = 0; v < SOME; v++) store(out + at + v * LANES, total[v]);
    }
    for (; at < width; at++) {
        float total = 0.0f;
        for (int i = 0; i < count; i++) total += rows[i][at] * shares[i];
        out[at] = total;
    }
}

// Bytes: by itself the processor looks ahead to the end of a page only.  Into the second cache, as products ask (`AHEAD`): a Zen 4 reads a
// sixth faster than with 2,048 into the first.
inline constexpr int64_t READ_AHEAD = 8192;

// The exclusive or of all words, which is to say: every byte read once.
inline uint32_t read(const char* from, int64_t bytes, Share share) {
    int64_t first, stop;
    share.range(bytes, 4096, first, stop);
    vu found[8] = {};
    int64_t at = first;
    for (; at + 8 * LANES * 4 <= stop; at += 8 * LANES * 4) {
        for (int i = 0; i < 8 * LANES * 4; i += LINE_BYTES) __builtin_prefetch(from + at + READ_AHEAD + i, 0, 2);
        for (int i = 0; i < 8; i++) found[i] ^= load_bits(from + at + i * LANES * 4);
    }
    uint32_t rest = 0;
    for (; at < stop; at++) rest ^= static_cast<uint8_t>(from[at]);
    for (int i = 0; i < 8; i++)
        for (int lane = 0; lane < LANES; lane++) rest ^= found[i][lane];
    return rest;
}

}  // namespace weft::WEFT_ISA
