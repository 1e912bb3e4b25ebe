// Compiled with -mavx2 -mfma; called only where the processor says that it has them.
#define WEFT_ISA avx2
#define WEFT_NAME "avx2"
#define WEFT_LANES 8
#define WEFT_TABLE kernels_avx2
#define WEFT_THERE __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")
#include "isa.inl"
