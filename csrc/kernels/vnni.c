/* vnni.c: products of bytes for the tiers with AVX-512, where the CPU has AVX512-VNNI, for both sizes of their panels.
 * Not for tiers with tile registers, whose products of bf16 are faster. */
#include "kernels/tiers.h"
#if DHSA_X86
#define DHSA_TARGET DHSA_TARGET_VNNI
#include "kernels/target_begin.h"
#include <immintrin.h>
#include <string.h>

#include "kernels/kernels.h"

enum { BYTES_KEYS = 8 }; /* keys of a register tile */

/* Adds the products of x and four bytes in memory, the same for all lanes. Not by intrinsics, of which GCC makes a
 * broadcast and a copy of every sum. */
static inline __attribute__((always_inline)) void add_bytes(__m512i *sum, __m512i x, const int8_t *k)
{
    __asm__("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(*sum) : "v"(x), "m"(*(const int8_t (*)[4])k));
}

#define V_PER 3
#define K_BYTES avx512
#include "kernels/vnni_tpl.h"
#undef V_PER
#undef K_BYTES
#define V_PER 2
#define K_BYTES avx512narrow
#include "kernels/vnni_tpl.h"

#include "kernels/target_end.h"
#else
typedef int dhsa_vnni_not_here; /* an empty translation unit is not ISO C */
#endif
