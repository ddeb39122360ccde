/* bytes512.c: products of bytes for the tiers with AVX-512, where the CPU has AVX512-VNNI, for both sizes of their
 * panels. vpdpbusd multiplies four unsigned bytes by four signed ones. Not for tiers with tile registers, whose
 * products of bf16 are faster. */
#include "kernels/tiers.h"
#if DHSA_X86
#define DHSA_TARGET DHSA_TARGET_VNNI
#include "kernels/target_begin.h"
#include <immintrin.h>
#include <stdint.h>

#define W_LEN 16
#define BYTES_OF 1
#define BYTES_UNSIGNED 1
#define BYTES_KEYS 8

typedef __m512i vw;

static inline vw w_set1(int32_t x) { return _mm512_set1_epi32(x); }
static inline vw w_load(const void *p) { return _mm512_loadu_si512(p); }
static inline void w_store(float *p, vw x) { _mm512_storeu_ps(p, _mm512_cvtepi32_ps(x)); }
/* Not by intrinsics, of which GCC makes a broadcast and a copy of every sum. */
static inline __attribute__((always_inline)) void w_add(vw *sum, vw x, const void *k)
{
    __asm__("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(*sum) : "v"(x), "m"(*(const int8_t (*)[4])k));
}

#define V_PER 3
#define K_BYTES avx512
#include "kernels/bytes_tpl.h"
#undef V_PER
#undef K_BYTES
#define V_PER 2
#define K_BYTES avx512narrow
#include "kernels/bytes_tpl.h"

#include "kernels/target_end.h"
#else
typedef int dhsa_bytes512_not_here; /* an empty translation unit is not ISO C */
#endif
