/* avx512.c: the AVX-512 tier: panels of 48 rows, which with 8 keys makes 24 sums, and the fewest instructions beside the
 * multiplications. */
#include "kernels/tiers.h"
#if DHSA_X86
#define K_ISA avx512
#define V_PER 3
#include "kernels/avx512_tpl.h"
#else
typedef int dhsa_avx512_not_here; /* an empty translation unit is not ISO C */
#endif
