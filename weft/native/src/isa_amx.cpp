// Compiled as isa_avx512_bf16.cpp, and with -mamx-tile -mamx-int8 -mamx-bf16; called only where the processor says that it has them and
// the system lets this process use them.
#if !defined(WEFT_ABSENT)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace weft {

// Linux keeps matrix registers, 8 KB of a thread, for those processes alone that ask for them (arch_prctl(2)).
static bool matrices_there() {
    unsigned a = 0, b = 0, c = 0, d = 0;
    constexpr unsigned WANTED = 1u << 22 | 1u << 24 | 1u << 25;  // AMX-BF16, AMX-TILE, AMX-INT8
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & WANTED) != WANTED) return false;
#if defined(__linux__)
    constexpr long REQUEST = 0x1023, DATA = 18;  // ARCH_REQ_XCOMP_PERM, the state of the registers
    return syscall(SYS_arch_prctl, REQUEST, DATA) == 0;
#else
    return false;
#endif
}

}  // namespace weft
#endif

#define WEFT_ISA amx
#define WEFT_NAME "amx"
#define WEFT_LANES 16
#define WEFT_MATRIX
#define WEFT_TABLE kernels_amx
#define WEFT_BELOW kernels_avx512_bf16
#define WEFT_THERE                                                                                       \
    __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&                           \
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni") &&  \
        __builtin_cpu_supports("avx512bf16") && matrices_there()
#include "isa.inl"
