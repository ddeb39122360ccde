/* amxfp16.c: fp16 products by tile registers, for CPUs that multiply those too (AMX-FP16). */
#include "kernels/tiers.h"
#if DHSA_X86 && DHSA_HAVE_AMX
#define PAIR_FP16 1
#define PAIR_TABLE dhsa_f16_amx
/* tdpfp16ps, spelled out: GCC 12 and older assemblers do not know it. Only the registers that amx_tpl.h uses. */
#define MULTIPLY(sum, rows, panel) MULTIPLY_##sum
#define MULTIPLY_0 __asm__ volatile(".byte 0xc4, 0xe2, 0x4b, 0x5c, 0xc4") /* 0 += 4 x 6 */
#define MULTIPLY_1 __asm__ volatile(".byte 0xc4, 0xe2, 0x43, 0x5c, 0xcc") /* 1 += 4 x 7 */
#define MULTIPLY_2 __asm__ volatile(".byte 0xc4, 0xe2, 0x4b, 0x5c, 0xd5") /* 2 += 5 x 6 */
#define MULTIPLY_3 __asm__ volatile(".byte 0xc4, 0xe2, 0x43, 0x5c, 0xdd") /* 3 += 5 x 7 */

#include "kernels/amx_tpl.h"
#else
typedef int dhsa_amxfp16_not_here; /* an empty translation unit is not ISO C */
#endif
