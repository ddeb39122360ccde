/* amx_tpl.h: products by tile registers (AMX). One instruction multiplies 16 x 32 by 32 x 16 elements of 16 bits and
 * adds the products to 16 x 16 fp32 sums. Four such squares of sums are computed at a time: two tiles of keys (or of
 * value columns) by the two halves of a panel. amx.c and amxfp16.c include this file. They define MULTIPLY(sum,
 * rows, panel) and PAIR_TABLE, the name of the table. */
#define DHSA_TARGET DHSA_TARGET_AMX
#include "kernels/target_begin.h"

#include "kernels/pairs_tpl.h"

/* A compiler barrier. The tile intrinsics of GCC are inline assembly that does not declare which memory it reads and
 * writes, so memory accesses must not move across them. */
static inline void settle(void) { __asm__ volatile("" ::: "memory"); }

/* All eight tile registers have 16 rows of 64 bytes. */
static const struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t bytes[16];
    uint8_t rows[16];
} shape = {1, 0, {0}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};

static void begin(void) { _tile_loadconfig(&shape); }

static void end(void) { _tile_release(); }

enum {
    SQUARE = 16 * STEP, /* elements of a square */
    ROW = LANES * 4     /* bytes from one row of s or o, or of 32-bit words of q or p, to the next */
};

/* Vector work that is done between tile instructions, a few rows in each step. It uses no tile register, so that it
 * takes almost no additional time. */
typedef struct {
    /* qk: the largest products so far, of the rows of s that are stored */
    const float *done;
    int stored;
    __m512 top0, top1;
    /* pv: old sums that must be rescaled to the new maximum before they are loaded */
    float *old;
    int stale, stale_step;
    __m512 alpha0, alpha1;
    /* pv: the exponentials of another panel */
    dhsa_exp_job *job;
    int pairs_step;
} side;

static inline __attribute__((always_inline)) void find_top(side *w, int rows)
{
    for (; rows > 0 && w->stored > 0; rows--, w->stored--, w->done += LANES) {
        w->top0 = _mm512_max_ps(w->top0, _mm512_loadu_ps(w->done));
        w->top1 = _mm512_max_ps(w->top1, _mm512_loadu_ps(w->done + 16));
    }
}

static inline __attribute__((always_inline)) void rescale(side *w, int rows)
{
    for (; rows > 0 && w->stale > 0; rows--, w->stale--, w->old += LANES) {
        _mm512_storeu_ps(w->old, _mm512_mul_ps(_mm512_loadu_ps(w->old), w->alpha0));
        _mm512_storeu_ps(w->old + 16, _mm512_mul_ps(_mm512_loadu_ps(w->old + 16), w->alpha1));
    }
}

/* Adds to the sums in tiles 0 1 / 2 3 the products of the 16 rows of low / the 16 rows of high and the two halves of
 * panel x, over `squares` squares. */
static inline __attribute__((always_inline)) void products(const uint16_t *x, const uint16_t *low, const uint16_t *high,
                                                           int squares, dhsa_ahead *ahead, side *w, const int values)
{
    settle();
    for (; squares > 0; squares--, x += STEP * LANES, low += SQUARE, high += SQUARE) {
        _tile_loadd(6, x, ROW);
        _tile_loadd(4, low, STEP * 2);
        MULTIPLY(0, 4, 6);
        _tile_loadd(7, x + LANES, ROW);
        MULTIPLY(1, 4, 7);
        _tile_loadd(5, high, STEP * 2);
        MULTIPLY(2, 5, 6);
        MULTIPLY(3, 5, 7);
        if (values) {
            rescale(w, w->stale_step);
            exp_some(w->job, w->pairs_step);
        } else {
            find_top(w, 4);
        }
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

static inline void load(const float *from)
{
    settle();
    _tile_loadd(0, from, ROW);
    _tile_loadd(1, from + 16, ROW);
    _tile_loadd(2, from + 16 * LANES, ROW);
    _tile_loadd(3, from + 16 * LANES + 16, ROW);
}

static inline void store(float *to)
{
    _tile_stored(0, to, ROW);
    _tile_stored(1, to + 16, ROW);
    _tile_stored(2, to + 16 * LANES, ROW);
    _tile_stored(3, to + 16 * LANES + 16, ROW);
    settle();
}

static void qk(const uint16_t *q, const uint16_t *k, int n, int dim, float *s, float *top, dhsa_ahead *ahead)
{
    const int squares = round_step(dim) / STEP;
    side w = {.done = s, .top0 = _mm512_set1_ps(-INFINITY), .top1 = _mm512_set1_ps(-INFINITY)};
    for (int j = 0; j < n; j += STEP, k += 2 * squares * SQUARE) {
        zero();
        products(q, k, k + squares * SQUARE, squares, ahead, &w, 0);
        store(s + (ptrdiff_t)j * LANES);
        w.stored += n - j < STEP ? n - j : STEP;
    }
    find_top(&w, n);
    _mm512_storeu_ps(top, w.top0);
    _mm512_storeu_ps(top + 16, w.top1);
}

static void pv(const uint16_t *p, const uint16_t *v, ptrdiff_t v_stride, int n, int dim, const float *alpha, float *o,
               dhsa_ahead *ahead, dhsa_exp_job *meanwhile)
{
    const int squares = round_step(n) / STEP, steps = squares * (round_step(dim) / STEP);
    const __m512 one = _mm512_set1_ps(1.0f), a0 = _mm512_loadu_ps(alpha), a1 = _mm512_loadu_ps(alpha + 16);
    const int same = (_mm512_cmp_ps_mask(a0, one, _CMP_EQ_OQ) & _mm512_cmp_ps_mask(a1, one, _CMP_EQ_OQ)) == 0xffff;
    side w = {.old = o, .stale = same ? 0 : round_step(dim), .alpha0 = a0, .alpha1 = a1, .job = meanwhile};
    w.stale_step = (STEP + squares - 1) / squares;
    w.pairs_step = meanwhile ? (meanwhile->n / 2 + steps - 1) / steps : 0;
    rescale(&w, STEP);
    for (int d = 0; d < dim; d += STEP, v += 2 * v_stride, o += STEP * LANES) {
        load(o);
        products(p, v, v + v_stride, squares, ahead, &w, 1);
        store(o);
    }
}

const dhsa_pair_kernels PAIR_TABLE = {begin, end,     pack_panel, pack_keys, pack_values,
                                      qk,    softmax, finish_exp, pv,        NARROW};

#include "kernels/target_end.h"
