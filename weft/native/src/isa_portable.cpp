// Whatever the compiler targets by itself: four lanes fit SSE2 and NEON.
#define WEFT_ISA portable
#define WEFT_NAME "portable"
#define WEFT_LANES 4
#define WEFT_TABLE kernels_portable
#define WEFT_THERE true
#include "isa.inl"
