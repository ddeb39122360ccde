/* bytesneon.c: products of bytes for the NEON tier, where the CPU has its dot products: sdot multiplies four signed
 * bytes by four. */
#include "kernels/tiers.h"
#if DHSA_ARM64
#define DHSA_TARGET DHSA_TARGET_DOTPROD
#include "kernels/target_begin.h"
#include <arm_neon.h>
#include <stdint.h>
#include <string.h>

#define K_BYTES neon
#define W_LEN 4
#define V_PER 4
#define BYTES_OF 1
#define BYTES_UNSIGNED 0
#define BYTES_KEYS 4

typedef int32x4_t vw;

static inline vw w_set1(int32_t x) { return vdupq_n_s32(x); }
static inline vw w_load(const void *p) { return vreinterpretq_s32_s8(vld1q_s8(p)); }
static inline void w_store(float *p, vw x) { vst1q_f32(p, vcvtq_f32_s32(x)); }
static inline void w_add(vw *sum, vw x, const void *k)
{
    int32_t word;
    memcpy(&word, k, sizeof word);
    *sum = vdotq_s32(*sum, vreinterpretq_s8_s32(x), vreinterpretq_s8_s32(vdupq_n_s32(word)));
}

#include "kernels/bytes_tpl.h"

#include "kernels/target_end.h"
#else
typedef int dhsa_bytesneon_not_here; /* an empty translation unit is not ISO C */
#endif
