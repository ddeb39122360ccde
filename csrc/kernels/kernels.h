/* kernels.h: what a kernel table holds. One table an instruction set; sizes travel with the kernels they belong to.
 * Kernels know tiles, not attention. All buffers are fp32 unless said otherwise.
 *
 * The layout every kernel shares: a *panel* holds `lanes` query rows side by side, x[d * lanes + r], so that one vector
 * instruction works on `lanes` rows at once, keys and values are read a number at a time (broadcast), and the softmax
 * needs no sums across a vector. */
#ifndef DHSA_KERNELS_H
#define DHSA_KERNELS_H

#include <stddef.h>
#include <stdint.h>

#include "core/internal.h"

#define DHSA_MAX_LANES 64
#define DHSA_DECODE_STEP 32
#define DHSA_DECODE_AHEAD 64

/* Rows that will be packed soon. The products ask for their cache lines a few at a time, so that memory works while they
 * compute; a burst of requests between products would wait for memory itself. */
typedef struct dhsa_ahead {
    const char *const *row, *const *end;
    int bytes, at;      /* of a row; where in the first one to go on */
    int64_t rate, owed; /* lines for each 2^20 multiplications of a lane; those done but not yet paid for, times rate */
} dhsa_ahead;

/* Called by products after each `done` multiplications of a lane; ahead may be NULL. */
static inline void dhsa_ask(dhsa_ahead *ahead, int done)
{
    if (!ahead) return;
    for (ahead->owed += done * ahead->rate; ahead->owed >= 1 << 20; ahead->owed -= 1 << 20) {
        if (ahead->row == ahead->end) return;
        __builtin_prefetch(*ahead->row + ahead->at, 0, 2);
        ahead->at += 64;
        if (ahead->at >= ahead->bytes) {
            ahead->at = 0;
            ahead->row++;
        }
    }
}

/* Products of bf16 or fp16 numbers with fp32 sums, where the CPU has instructions for them. One layout serves them all: the two
 * neighbours that an instruction multiplies and adds lie in one 32-bit word, and 16 rows of 32 numbers in one kilobyte, a
 * *square*, that is read from end to end. `lanes` is the table's; K stands for dim rounded up to DHSA_PAIR_STEP, N for n rounded
 * up to it; what is rounded up to is zeros in queries, values and probabilities, so that it adds nothing. */
#define DHSA_PAIR_STEP 32

/* A softmax whose maxima are known and whose exponentials are not. */
typedef struct dhsa_exp_job {
    const float *s, *alpha;
    const int32_t *lo, *hi; /* lo NULL: no mask */
    uint16_t *p;
    float *l;
    int n, base, at;            /* keys; the first one's number; those done */
    int rounded;                /* as in exponent(), softmax_tpl.h */
    float factor, inner, outer; /* of exponents, softmax_tpl.h; outer 0: no softcap */
    float shift[DHSA_MAX_LANES], sum[DHSA_MAX_LANES];
} dhsa_exp_job;

typedef struct dhsa_pair_kernels {
    /* Around the work of one thread: sets up and gives back the tile registers. */
    void (*begin)(void);
    void (*end)(void);
    /* n <= lanes rows to q[(d / 2 * lanes + r) * 2 + d % 2], d < K; negate flips the sign. */
    void (*pack_panel)(const void *const *rows, int n, int dim, int negate, uint16_t *dst);
    /* Keys j, d < K: number dhsa_square(j, d, K). */
    void (*pack_keys)(const void *const *rows, int n, int dim, uint16_t *dst);
    /* Transposed: columns d < K, keys j < N: number dhsa_square(d, j, N). Returns 1 if any number is not finite. */
    int (*pack_values)(const void *const *rows, int n, int dim, uint16_t *dst);
    /* s[j * lanes + r], j < N: what lies past n has no meaning. k: a whole number of squares, read up to key N. top[r]: the largest
     * product over j < n. */
    void (*qk)(const uint16_t *q, const uint16_t *k, int n, int dim, float *s, float *top, dhsa_ahead *ahead);
    /* The softmax of below in two parts: the first finds maxima and alpha and notes in *job what is left, the second does it.
     * Probabilities are rounded to p[(j / 2 * lanes + r) * 2 + j % 2], j < N; s is scratch; top as qk gave it. */
    void (*softmax)(float *s, const float *top, int n, int base, const int32_t *lo, const int32_t *hi, float scale, float softcap,
                    float *m, float *l, float *alpha, uint16_t *p, dhsa_exp_job *job);
    void (*exp)(dhsa_exp_job *job);
    /* o[d * lanes + r] = o * alpha[r] + sum_{j < N} p(j, r) * v(d, j), d < K. v_stride: 16 columns further, in numbers.
     * meanwhile: another panel's job that may be worked on while the tile registers compute; NULL: none. */
    void (*pv)(const uint16_t *p, const uint16_t *v, ptrdiff_t v_stride, int n, int dim, const float *alpha, float *o,
               dhsa_ahead *ahead, dhsa_exp_job *meanwhile);
} dhsa_pair_kernels;

static inline ptrdiff_t dhsa_square(ptrdiff_t row, ptrdiff_t at, ptrdiff_t length)
{
    return ((row / 16 * (length / 32) + at / 32) * 16 + row % 16) * 32 + at % 32;
}

typedef struct dhsa_kernels {
    const char *isa;
    int lanes;      /* rows of a panel */
    int value_step; /* value columns of one packed strip, see pack_values */

    /* s[j * lanes + r] = sum_d q[d * lanes + r] * k[j * k_stride + d] for j < n, d < dim. Any n >= 0, dim >= 1.
     * Lanes from `rows` on (in whole vectors) are not used: neither there nor below. q and s aligned to DHSA_ALIGN. ahead may be
     * NULL. A general matrix product: also used for chunk scores and the predictor. */
    void (*qk)(const float *q, const float *k, ptrdiff_t k_stride, int n, int dim, int rows, float *s, dhsa_ahead *ahead);

    /* One online-softmax step of a panel over n keys. Row r sees key j if lo[r] <= base + j < hi[r]; lo NULL: all see all.
     * s in: raw products; out: probabilities relative to the new maximum. scale >= 0; softcap 0: none.
     * m: running maximum of the (scaled, softcapped) logits times log2(e), -inf before the first key; l: running sum of
     * probabilities; alpha out: the factor that brings what was accumulated so far to the new maximum. */
    void (*softmax)(float *s, int n, int rows, int base, const int32_t *lo, const int32_t *hi, float scale, float softcap, float *m,
                    float *l, float *alpha);

    /* top[r]: the largest raw product that row r sees, -inf if it sees none, NaN if any that it sees is not finite. */
    void (*tops)(const float *s, int n, int rows, int base, const int32_t *lo, const int32_t *hi, float *top);

    /* o[d * lanes + r] = o * alpha[r] + sum_{j < n} p[j * lanes + r] * v(j, d), v packed by pack_values with the
     * same v_stride. */
    void (*pv)(const float *p, const float *v, ptrdiff_t v_stride, int n, int dim, int rows, const float *alpha, float *o,
               dhsa_ahead *ahead);

    /* Copies n rows (pointers to fp32 / fp16 / bf16 numbers) into dst[j * dim + d], converting to fp32. */
    void (*pack_rows)(const void *const *rows, int dtype, int n, int dim, float *dst);
    /* The same into strips of value_step columns, v_stride >= n * value_step numbers each: dst[d / value_step * v_stride +
     * j * value_step + d % value_step], last strip padded with zeros. Returns 1 if any number is not finite. */
    int (*pack_values)(const void *const *rows, int dtype, int n, int dim, ptrdiff_t v_stride, float *dst);
    /* n <= lanes rows to a panel q[d * lanes + r], the rest zeros. */
    void (*pack_panel)(const void *const *rows, int dtype, int n, int dim, float factor, float *dst);
    /* rows[r][d] = o[d * lanes + r] * factor[r], rounded to dtype, for r < n. */
    void (*store_panel)(const float *o, const float *factor, int n, int dim, int dtype, void *const *rows);

    /* score[j] += sum over r of (p[j * lanes + r] * weight[r])^2 for j < n; a lane of weight 0 adds nothing, NaN or not. */
    void (*add_squares)(const float *p, int n, const float *weight, float *score);
    /* The same without squaring. */
    void (*add_sums)(const float *p, int n, const float *weight, float *mass);
    /* sum[r] = sum[r] * alpha[r] + sum over j < n of p[j * lanes + r] * weight[j]; sum, alpha and p aligned to DHSA_ALIGN. */
    void (*weigh_keys)(const float *p, int n, const float *weight, const float *alpha, float *sum);
    /* dst[d] = sum of n >= 1 rows, `stride` bytes apart, one after the other from the first on. */
    void (*sum_rows)(const void *rows, ptrdiff_t stride, int dtype, int64_t n, int64_t dim, float *dst);
    /* dst = x rounded to bf16, the largest finite number at most. */
    void (*round_bf16)(const float *x, int64_t n, uint16_t *dst);

    /* Vectors of n fp32 numbers, any alignment. */
    void (*load)(const void *src, int dtype, int64_t n, float *dst); /* dst = src, converted */
    void (*add)(const void *src, int dtype, int64_t n, float *dst);  /* dst += src, converted */
    float (*dot)(const float *a, const float *b, int64_t n);

    /* Decoding: a few rows, no panels. Keys and values are pointers to their rows, fp32 / fp16 / bf16 as they lie in memory;
     * DHSA_DECODE_AHEAD pointers past the last are read too: rows worth a prefetch, which need not be rows. Rows of q and o are
     * dim numbers, rounded up to DHSA_DECODE_STEP; in which order is the kernels' own affair. */
    /* A row of q: times factor, zeros past dim. */
    void (*decode_load)(const void *row, int dtype, int dim, float factor, float *dst);
    /* s[r * s_stride + j] = the product of row r and key j, r < rows, j < n. */
    void (*decode_qk)(const float *q, ptrdiff_t q_stride, int rows, const void *const *k, int dtype, int n, int dim, float *s,
                      ptrdiff_t s_stride);
    /* The softmax of one row; s, scale, softcap, m and l as in `softmax`, m and l those of these keys alone. Overwrites up to
     * DHSA_DECODE_STEP - 1 numbers past the end of s. */
    void (*decode_softmax)(float *s, int n, float scale, float softcap, float *m, float *l);
    /* Row r of o += sum_j p[r * p_stride + j] * v[j]. */
    void (*decode_pv)(const float *p, ptrdiff_t p_stride, int rows, const void *const *v, int dtype, int n, int dim, float *o,
                      ptrdiff_t o_stride);
    /* row = sum_{i < n} weight[i] * (row i of o) / divisor, in the order of dtype and rounded to it. */
    void (*decode_merge)(const float *o, ptrdiff_t o_stride, const float *weight, int n, float divisor, int dim, int dtype,
                         void *row);

    const dhsa_pair_kernels *bf16, *f16; /* NULL: such numbers are converted to fp32 while packing */
    const struct dhsa_kernels *plain;    /* what serves dtypes without such products, if not this table: wider panels */

    /* For benchmarks only: nothing but independent FMAs, which no other kernel is; returns how many operations, 2 for each FMA. */
    double (*fma_work)(int64_t loops);
} dhsa_kernels;

/* The keys that any of `rows` rows sees, [lo_min, hi_max), and those that all of them see, [lo_max, hi_min). */
typedef struct {
    int32_t lo_min, lo_max, hi_min, hi_max;
} dhsa_bounds;

static inline dhsa_bounds dhsa_bounds_of(const int32_t *lo, const int32_t *hi, int rows)
{
    dhsa_bounds b = {INT32_MAX, 0, INT32_MAX, 0};
    for (int r = 0; r < rows; r++) {
        b.lo_min = DHSA_MIN(b.lo_min, lo[r]);
        b.lo_max = DHSA_MAX(b.lo_max, lo[r]);
        b.hi_min = DHSA_MIN(b.hi_min, hi[r]);
        b.hi_max = DHSA_MAX(b.hi_max, hi[r]);
    }
    return b;
}

/* The products of a dtype's own, or NULL. */
static inline const dhsa_pair_kernels *dhsa_pair_products(const dhsa_kernels *kernels, int dtype)
{
    return dtype == DHSA_BF16 ? kernels->bf16 : dtype == DHSA_F16 ? kernels->f16 : NULL;
}

/* The table that attends to inputs of a dtype. */
static inline const dhsa_kernels *dhsa_kernels_for(const dhsa_kernels *kernels, int dtype)
{
    return kernels->plain && !dhsa_pair_products(kernels, dtype) ? kernels->plain : kernels;
}

/* The table in use; safe to call from any thread, never NULL. */
const dhsa_kernels *dhsa_kernels_current(void);
/* The table of a tier, for tests; NULL if it is not compiled in or not usable here. */
const dhsa_kernels *dhsa_kernels_find(const char *isa);

#endif
