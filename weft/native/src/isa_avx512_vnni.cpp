// Compiled with -mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx512vnni; called only where the processor says that it has them.
#define WEFT_ISA avx512_vnni
#define WEFT_NAME "avx512_vnni"
#define WEFT_LANES 16
#define WEFT_TABLE kernels_avx512_vnni
#define WEFT_BELOW kernels_avx512
#define WEFT_THERE                                                                                       \
    __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&                           \
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni")
#include "isa.inl"
