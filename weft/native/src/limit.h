// How fast this processor computes where nothing is read from memory.  Included by the files of the instruction sets.
#pragma once

#include "blocks.h"

namespace weft::WEFT_ISA {

// Arithmetic alone, in registers: sums that do not wait for each other, `turns` times, of products of float32 (kind 0), bytes (1) or
// bfloat16 (2; of float32 where the instruction set has none).  Returns how many operations (an addition or a product of two numbers)
// that was, less nothing that a compiler could leave out.
template <class Total, class Dot>
WEFT_INLINE double spun(int64_t turns, double each, const Dot& dot) {
    constexpr int SUMS = LANES == 16 ? 24 : 12;
    Total total[SUMS];
    for (int i = 0; i < SUMS; i++) total[i] = Total{}, total[i][0] = i;
    for (int64_t turn = 0; turn < turns; turn++)
#pragma GCC unroll 24
        for (int i = 0; i < SUMS; i++) total[i] = dot(total[i], turn);  // unrolled they stay in registers
    double odd = 0.0;
    for (int i = 0; i < SUMS; i++) odd += static_cast<double>(total[i][0]);
    return (odd == 1.5 ? 1.0 : 0.0) + each * LANES * SUMS * static_cast<double>(turns);
}
inline double arithmetic(int64_t turns, int kind) {
#if defined(WEFT_MATRIX)
    const auto registers = [&]<class D>(D) {
        const Registers sized(2 * MATRIX_ROWS);
        for (int64_t turn = 0; turn < turns; turn++) each_register<2, 2>([](auto sum, auto s, auto p) { multiply_registers<D, sum, 4 + s, 6 + p>(); });
        return 2.0 * MATRIX_ROWS * PANEL * LINE_WORDS * D::INPUTS * 4 * static_cast<double>(turns);
    };
    if (kind) return kind == 1 ? registers(Bytes{}) : registers(Halves{});
#endif
    if (kind == 1)
        return spun<vi>(turns, 8.0, [](vi total, int64_t turn) {
            return dot4(total, vu{} + 0x01020304u, vi{} + static_cast<int32_t>(turn));
        });
#if defined(__AVX512BF16__)
    if (kind == 2)
        return spun<vf>(turns, 4.0, [](vf total, int64_t turn) {
            return dot2(total, vu{} + 0x3f003e00u, vi{} + static_cast<int32_t>(turn));
        });
#endif
    const vf weight = all(0.999f);
    return spun<vf>(turns, 2.0, [&](vf total, int64_t) { return total * weight + weight; });
}

}  // namespace weft::WEFT_ISA
