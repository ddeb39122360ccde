/* bytes256vnni.c: products of bytes for the AVX2 tier, where the CPU has AVX-VNNI: vpdpbusd, as in bytes512.c. */
#include "kernels/tiers.h"
#if DHSA_X86 && DHSA_HAVE_AVXVNNI
#define DHSA_TARGET DHSA_TARGET_AVXVNNI
#include "kernels/target_begin.h"
#include <immintrin.h>
#include <stdint.h>

#define K_BYTES avx2vnni
#define W_LEN 8
#define V_PER 2
#define BYTES_OF 1
#define BYTES_UNSIGNED 1
#define BYTES_KEYS 6

typedef __m256i vw;

static inline vw w_set1(int32_t x) { return _mm256_set1_epi32(x); }
static inline vw w_load(const void *p) { return _mm256_loadu_si256((const __m256i *)p); }
static inline void w_store(float *p, vw x) { _mm256_storeu_ps(p, _mm256_cvtepi32_ps(x)); }
static inline void w_add(vw *sum, vw x, const void *k)
{
    *sum = _mm256_dpbusd_avx_epi32(*sum, x, _mm256_castps_si256(_mm256_broadcast_ss(k)));
}

#include "kernels/bytes_tpl.h"

#include "kernels/target_end.h"
#else
typedef int dhsa_bytes256vnni_not_here; /* an empty translation unit is not ISO C */
#endif
