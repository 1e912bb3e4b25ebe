// Compiled with -mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx512vnni -mavx512bf16; called only
// where the processor says that it has them.
#define WEFT_ISA avx512_bf16
#define WEFT_NAME "avx512_bf16"
#define WEFT_LANES 16
#define WEFT_TABLE kernels_avx512_bf16
#define WEFT_BELOW kernels_avx512_vnni
#define WEFT_THERE                                                                                       \
    __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&                           \
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni") &&  \
        __builtin_cpu_supports("avx512bf16")
#include "isa.inl"
