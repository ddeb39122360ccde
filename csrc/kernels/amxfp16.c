/* amxfp16.c: fp16 products by tile registers, for CPUs with AMX-FP16. */
#include "kernels/tiers.h"
#if DHSA_X86 && DHSA_HAVE_AMX
#define PAIR_FP16 1
#define PAIR_TABLE dhsa_f16_amx
/* The instruction tdpfp16ps in bytes, since GCC 12 and older assemblers do not support it, for the registers that
 * amx_tpl.h uses. */
#define MULTIPLY(sum, rows, panel) MULTIPLY_##sum
#define MULTIPLY_0 __asm__ volatile(".byte 0xc4, 0xe2, 0x4b, 0x5c, 0xc4") /* tile 0 += tile 4 x tile 6 */
#define MULTIPLY_1 __asm__ volatile(".byte 0xc4, 0xe2, 0x43, 0x5c, 0xcc") /* tile 1 += tile 4 x tile 7 */
#define MULTIPLY_2 __asm__ volatile(".byte 0xc4, 0xe2, 0x4b, 0x5c, 0xd5") /* tile 2 += tile 5 x tile 6 */
#define MULTIPLY_3 __asm__ volatile(".byte 0xc4, 0xe2, 0x43, 0x5c, 0xdd") /* tile 3 += tile 5 x tile 7 */

#include "kernels/amx_tpl.h"
#else
typedef int dhsa_amxfp16_not_here; /* an empty translation unit is not ISO C */
#endif
