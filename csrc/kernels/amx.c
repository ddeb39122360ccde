/* amx.c: bf16 products by tile registers: 16 x 16 fp32 sums of 16 x 32 by 32 x 16 bf16 numbers in one instruction.
 * Four sums at a time: two tiles of keys (or of value columns) by the two halves of a panel. */
#include "kernels/tiers.h"
#if DHSA_X86 && DHSA_HAVE_AMX
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,amx-tile,amx-bf16"))),           \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,amx-tile,amx-bf16")
#endif
#include "kernels/bf16_tpl.h"

/* GCC's tile intrinsics are assembly that does not say which memory it reads and writes: nothing may move across. */
static inline void settle(void) { __asm__ volatile("" ::: "memory"); }

/* All eight tiles are 16 rows of 64 bytes. */
static const struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t bytes[16];
    uint8_t rows[16];
} shape = {1, 0, {0}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};

static void begin(void) { _tile_loadconfig(&shape); }

static void end(void) { _tile_release(); }

enum { SQUARE = 16 * STEP, ROW = LANES * 4 }; /* bytes from one row of s, o, or of word pairs of q and p, to the next */

/* Old sums that the next products start from, to be brought to a new maximum while these are under way. */
typedef struct {
    float *at;
    int rows; /* left to do */
    __m512 a0, a1;
} rescale;

static inline __attribute__((always_inline)) void rescale_rows(rescale *next, int rows)
{
    for (; rows > 0 && next->rows > 0; rows--, next->rows--, next->at += LANES) {
        _mm512_storeu_ps(next->at, _mm512_mul_ps(_mm512_loadu_ps(next->at), next->a0));
        _mm512_storeu_ps(next->at + 16, _mm512_mul_ps(_mm512_loadu_ps(next->at + 16), next->a1));
    }
}

/* Sums 0 1 / 2 3 += [32 rows of low and high] x [panel halves of x], over `squares` squares. */
static inline __attribute__((always_inline)) void products(const uint16_t *x, const uint16_t *low, const uint16_t *high,
                                                           int squares, dhsa_ahead *ahead, rescale *next, int rows)
{
    settle();
    for (; squares > 0; squares--, x += STEP * LANES, low += SQUARE, high += SQUARE) {
        _tile_loadd(6, x, ROW);
        _tile_loadd(4, low, STEP * 2);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, x + LANES, ROW);
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(5, high, STEP * 2);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
        if (next) rescale_rows(next, rows);
        dhsa_ask(ahead, STEP * STEP);
    }
}

static inline void zero(void)
{
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
}

static inline void store(float *to)
{
    _tile_stored(0, to, ROW);
    _tile_stored(1, to + 16, ROW);
    _tile_stored(2, to + 16 * LANES, ROW);
    _tile_stored(3, to + 16 * LANES + 16, ROW);
    settle();
}

static void qk(const uint16_t *q, const uint16_t *k, int n, int dim, float *s, dhsa_ahead *ahead)
{
    const int squares = round_step(dim) / STEP;
    for (int j = 0; j < n; j += STEP, k += 2 * squares * SQUARE) {
        zero();
        products(q, k, k + squares * SQUARE, squares, ahead, NULL, 0);
        store(s + (ptrdiff_t)j * LANES);
    }
}

static void pv(const uint16_t *p, const uint16_t *v, ptrdiff_t v_stride, int n, int dim, const float *alpha, float *o,
               dhsa_ahead *ahead)
{
    const int squares = round_step(n) / STEP;
    const __m512 one = _mm512_set1_ps(1.0f);
    rescale next = {o, round_step(dim), _mm512_loadu_ps(alpha), _mm512_loadu_ps(alpha + 16)};
    if ((_mm512_cmp_ps_mask(next.a0, one, _CMP_EQ_OQ) & _mm512_cmp_ps_mask(next.a1, one, _CMP_EQ_OQ)) == 0xffff) next.rows = 0;
    rescale_rows(&next, STEP);
    for (int d = 0; d < dim; d += STEP, v += 2 * v_stride) {
        float *at = o + (ptrdiff_t)d * LANES;
        settle();
        _tile_loadd(0, at, ROW);
        _tile_loadd(1, at + 16, ROW);
        _tile_loadd(2, at + 16 * LANES, ROW);
        _tile_loadd(3, at + 16 * LANES + 16, ROW);
        products(p, v, v + v_stride, squares, ahead, &next, (STEP + squares - 1) / squares);
        store(at);
    }
}

const dhsa_bf16_kernels dhsa_bf16_amx = {begin, end, pack_panel, pack_keys, pack_values, qk, softmax, pv};

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#else
typedef int dhsa_amx_not_here; /* an empty translation unit is not ISO C */
#endif
