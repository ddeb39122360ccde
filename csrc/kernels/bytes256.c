/* bytes256.c: products of 8-bit numbers for the AVX2 tier, by vpmaddwd: two numbers of 16 bits at a time, since
 * vpmaddubsw would cut sums of bytes off at 16 bits. */
#include "kernels/tiers.h"
#if DHSA_X86
#define DHSA_TARGET DHSA_TARGET_AVX2
#include "kernels/target_begin.h"
#include <immintrin.h>
#include <stdint.h>

#define K_BYTES avx2
#define W_LEN 8
#define V_PER 2
#define BYTES_OF 2
#define BYTES_UNSIGNED 0
#define BYTES_KEYS 6

typedef __m256i vw;

static inline vw w_set1(int32_t x) { return _mm256_set1_epi32(x); }
static inline vw w_load(const void *p) { return _mm256_loadu_si256((const __m256i *)p); }
static inline void w_store(float *p, vw x) { _mm256_storeu_ps(p, _mm256_cvtepi32_ps(x)); }
/* Not by intrinsics, of which GCC 12 makes copies of the sums, some of them in memory. */
static inline __attribute__((always_inline)) void w_add(vw *sum, vw x, const void *k)
{
    vw y = _mm256_castps_si256(_mm256_broadcast_ss(k)), product;
    __asm__("vpmaddwd %2, %3, %1\n\tvpaddd %1, %0, %0" : "+x"(*sum), "=x"(product) : "x"(x), "x"(y));
}

#include "kernels/bytes_tpl.h"

#include "kernels/target_end.h"
#else
typedef int dhsa_bytes256_not_here; /* an empty translation unit is not ISO C */
#endif
