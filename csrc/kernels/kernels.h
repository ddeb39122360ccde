/* kernels.h: the table of kernels. There is one table for each instruction set, which also holds the sizes that its
 * kernels were written for. Kernels work on tiles; they do not depend on attention problems. All buffers are fp32
 * unless stated otherwise.
 *
 * All kernels share one layout. A *panel* holds `lanes` query rows side by side, x[d * lanes + r], so that a vector
 * instruction works on several rows at once, keys and values are read one element at a time (by a broadcast), and
 * the softmax needs no sums across a vector. */
#ifndef DHSA_KERNELS_H
#define DHSA_KERNELS_H

#include <stddef.h>
#include <stdint.h>

#include "core/internal.h"

#define DHSA_MAX_LANES 64
#define DHSA_DECODE_STEP 32
#define DHSA_DECODE_AHEAD 80

/* Rows that will be packed soon. The products prefetch the cache lines of these rows a few at a time, so that memory
 * accesses overlap with arithmetic. If all lines were requested between two products, the requests would have to
 * wait for memory. */
typedef struct dhsa_ahead {
    /* Rows from `values` on have value_bytes bytes, those before `bytes`. */
    const char *const *row, *const *values, *const *end;
    int bytes, value_bytes;
    int at;             /* offset in the first row of the next line to prefetch */
    int64_t rate, owed; /* lines for each 2^20 multiplications of a lane; lines due, times 2^20 */
} dhsa_ahead;

/* Called by products after each `done` multiplications of a lane. ahead may be NULL. */
static inline void dhsa_ask(dhsa_ahead *ahead, int done)
{
    if (!ahead) return;
    for (ahead->owed += done * ahead->rate; ahead->owed >= 1 << 20; ahead->owed -= 1 << 20) {
        if (ahead->row == ahead->end) return;
        __builtin_prefetch(*ahead->row + ahead->at, 0, 2);
        ahead->at += 64;
        if (ahead->at >= ahead->bytes) {
            ahead->at = 0;
            if (++ahead->row == ahead->values) ahead->bytes = ahead->value_bytes;
        }
    }
}

/* Products of bf16 or fp16 with fp32 sums, where the CPU has instructions for them. They all share one layout. The
 * two neighbouring elements that an instruction multiplies and adds lie in one 32-bit word, and 16 rows of 32
 * elements lie in one contiguous kilobyte, a *square*. `lanes` is that of the table. K stands for dim and N for n,
 * both rounded up to DHSA_PAIR_STEP. The padding of queries, values and probabilities is zeros, so that it adds
 * nothing. */
#define DHSA_PAIR_STEP 32

/* A softmax of which the maxima are computed and the exponentials are not. */
typedef struct dhsa_exp_job {
    const float *s, *alpha;
    const int32_t *lo, *hi; /* lo NULL: no mask */
    uint16_t *p;
    uint16_t *low; /* NULL, or as p: the differences from p to the probabilities */
    float *l;
    int n, base, at;            /* number of keys; index of the first one; number of keys that are done */
    int rounded;                /* argument of exponent() in softmax_tpl.h */
    float factor, inner, outer; /* struct exponents in softmax_tpl.h; outer 0: no softcap */
    float shift[DHSA_MAX_LANES], sum[DHSA_MAX_LANES];
} dhsa_exp_job;

typedef struct dhsa_pair_kernels {
    /* Called before and after the work of one thread: set up and release the tile registers. */
    void (*begin)(void);
    void (*end)(void);
    /* Packs n <= lanes rows into dst[(d / 2 * lanes + r) * 2 + d % 2], d < K. negate flips the sign. */
    void (*pack_panel)(const void *const *rows, int n, int dim, int negate, uint16_t *dst);
    /* Packs key j, column d < K, into dst[dhsa_square(j, d, K)]. */
    void (*pack_keys)(const void *const *rows, int n, int dim, uint16_t *dst);
    /* Packs values transposed: column d < K of key j < N into dst[dhsa_square(d, j, length)], where length >= N is a
     * multiple of DHSA_PAIR_STEP. Returns 1 if any element is not finite. */
    int (*pack_values)(const void *const *rows, int n, int dim, ptrdiff_t length, uint16_t *dst);
    /* s[j * lanes + r] = the product of row r and key j, j < N; products of keys past n have no meaning. k is read
     * up to key N, in whole squares. top[r] = the largest product over j < n. */
    void (*qk)(const uint16_t *q, const uint16_t *k, int n, int dim, float *s, float *top, dhsa_ahead *ahead);
    /* The softmax of dhsa_kernels in two parts. `softmax` computes the maxima and alpha and stores the remaining
     * work in *job; `exp` does that work. Probabilities are rounded into p[(j / 2 * lanes + r) * 2 + j % 2], j < N,
     * and unless low is NULL what rounding took from them, rounded again, into low.
     * s may be overwritten and must stay valid until `exp` returns. top is that of `qk`. */
    void (*softmax)(float *s, const float *top, int n, int base, const int32_t *lo, const int32_t *hi, float scale,
                    float softcap, float *m, float *l, float *alpha, uint16_t *p, uint16_t *low, dhsa_exp_job *job);
    void (*exp)(dhsa_exp_job *job);
    /* o[d * lanes + r] = o * alpha[r] + sum_{j < N} p(j, r) * v(d, j), d < K. v_stride: elements from one group of
     * 16 columns to the next. meanwhile: the job of another panel, part of which may be done while the tile
     * registers compute; NULL: none. */
    void (*pv)(const uint16_t *p, const uint16_t *v, ptrdiff_t v_stride, int n, int dim, const float *alpha, float *o,
               dhsa_ahead *ahead, dhsa_exp_job *meanwhile);
    /* bf16 only: rounds a row of fp32 to `high` [K], and unless low is NULL the differences from these to `low` [K].
     * Both are 0 past dim. Finite numbers stay finite; of others, low is 0. */
    void (*narrow)(const float *row, int dim, uint16_t *high, uint16_t *low);
} dhsa_pair_kernels;

/* The index of element `at` of row `row` in squares that hold rows of `length` elements. */
static inline ptrdiff_t dhsa_square(ptrdiff_t row, ptrdiff_t at, ptrdiff_t length)
{
    return ((row / 16 * (length / 32) + at / 32) * 16 + row % 16) * 32 + at % 32;
}

/* How the products s[j * lanes + r] of n keys and a panel become exponents of two, for row scores. Both sides were
 * divided by a factor when they were quantized: key j by key[j], and row[r] is the factor of row r times the scale of
 * the logits times log2(e). The exponent is s * key[j] * row[r]; with a softcap it is cap * tanh(that), where cap is
 * the softcap times log2(e) and row[r] is divided by cap.
 *
 * Of a key that stands for several, spread[j] says how far they are apart; power_scores adds spread[j] * row_spread[r]
 * to the exponent, since some of them then have larger products than their mean.
 *
 * power(x) is a power of two that is linear between whole exponents: 2^floor(x) * (1 + x - floor(x)), at most 6 percent
 * above 2^x. This takes a few instructions, and scores are only ranked. It is 0 for x <= -127 and for NaN, and no
 * larger than 2^63, so that sums are finite. */
typedef struct {
    const float *key;                 /* [n] */
    const float *row;                 /* [lanes] */
    float cap;                        /* 0: no softcap */
    const float *spread, *row_spread; /* [n], [lanes]; NULL: none */
} dhsa_powers;

/* Products of rows and keys of 8 bits, from -127 to 127, exact in 32 bits, where the CPU has instructions for them. */
typedef struct {
    int size;  /* bytes that a number takes in panels and keys: 1, or 2 where bytes must be widened to 16 bits */
    int added; /* to every number of a panel: 128 where products are of unsigned bytes, else 0 */
    /* Packs n <= lanes rows, dim elements each, as numbers of `size` bytes, so that those that an instruction
     * multiplies at once lie in one 32-bit word: with w = 4 / size, number d of row r at (d / w * lanes + r) * w + d %
     * w. The padding of dim to a multiple of 4 and the other lanes are 0, before `added`. */
    void (*pack_panel)(const int8_t *const *rows, int n, int dim, void *dst);
    /* s[j * lanes + r] = sum_d row r * k[j * dhsa_round_up(dim, 4) + d] for j < n. bias[j] is -128 times the sum of the
     * elements of key j. The padding of k is zeros. Vectors that hold only lanes from `rows` on are not computed. */
    void (*qk)(const void *q, const void *k, const int32_t *bias, int n, int dim, int rows, float *s,
               dhsa_ahead *ahead);
} dhsa_byte_kernels;

typedef struct dhsa_kernels {
    const char *isa;
    int lanes;      /* rows of a panel */
    int value_step; /* value columns of one packed strip, see pack_values */

    /* s[j * lanes + r] = sum_d q[d * lanes + r] * k[j * k_stride + d] for j < n, d < dim; any n >= 0, dim >= 1.
     * Vectors that hold only lanes from `rows` on are not computed, here and below. q and s are aligned to
     * DHSA_ALIGN. ahead may be NULL. This is a general matrix product, which chunk scores and the predictor use as
     * well. */
    void (*qk)(const float *q, const float *k, ptrdiff_t k_stride, int n, int dim, int rows, float *s,
               dhsa_ahead *ahead);

    /* One online-softmax step of a panel over n keys. Row r sees key j if lo[r] <= base + j < hi[r]; lo NULL: all
     * rows see all keys. s on entry: raw products; on return: probabilities relative to the new maximum. scale >= 0;
     * softcap 0: none. m: the running maximum of the (scaled, softcapped) logits times log2(e), -inf before the
     * first key. l: the running sum of probabilities. alpha receives the factor that rescales earlier sums to the
     * new maximum. */
    void (*softmax)(float *s, int n, int rows, int base, const int32_t *lo, const int32_t *hi, float scale,
                    float softcap, float *m, float *l, float *alpha);

    /* top[r] = the largest raw product of a key that row r sees; -inf if it sees none, NaN if one of these is not
     * finite. */
    void (*tops)(const float *s, int n, int rows, int base, const int32_t *lo, const int32_t *hi, float *top);

    /* o[d * lanes + r] = o * alpha[r] + sum_{j < n} p[j * lanes + r] * v(j, d), with v packed by pack_values with
     * the same v_stride. */
    void (*pv)(const float *p, const float *v, ptrdiff_t v_stride, int n, int dim, int rows, const float *alpha,
               float *o, dhsa_ahead *ahead);

    /* Copies n rows, pointers to fp32, fp16 or bf16 elements, into dst[j * dim + d] as fp32. */
    void (*pack_rows)(const void *const *rows, int dtype, int n, int dim, float *dst);
    /* The same into strips of value_step columns, with v_stride >= n * value_step elements each:
     * dst[d / value_step * v_stride + j * value_step + d % value_step]. The last strip is padded with zeros. Returns
     * 1 if any element is not finite. */
    int (*pack_values)(const void *const *rows, int dtype, int n, int dim, ptrdiff_t v_stride, float *dst);
    /* Packs n <= lanes rows, times factor, into a panel dst[d * lanes + r]. The other lanes are zeros. */
    void (*pack_panel)(const void *const *rows, int dtype, int n, int dim, float factor, float *dst);
    /* rows[r][d] = o[d * lanes + r] * factor[r], rounded to dtype, for r < n. */
    void (*store_panel)(const float *o, const float *factor, int n, int dim, int dtype, void *const *rows);

    /* sum[j] += sum over r of p[j * lanes + r] * weight[r] for j < n. A lane of weight 0 adds nothing, even if it is
     * NaN. */
    void (*add_sums)(const float *p, int n, const float *weight, float *sum);

    /* Row scores, see dhsa_powers. Only the first `rows` lanes count; the others may be computed as well. */
    /* top[r] = the larger of itself and the largest exponent of row r. */
    void (*power_tops)(const float *s, int n, int rows, const dhsa_powers *powers, float *top);
    /* sum[r] += sum over j < n of weight[j] * power(exponent - shift[r]). */
    void (*power_sums)(const float *s, int n, int rows, const dhsa_powers *powers, const float *weight,
                       const float *shift, float *sum);
    /* score[j] += sum over r of power(degree * (exponent - shift[r]) + spread) for j < n; degree 1 or 2. The shift of
     * lanes from `rows` on is +inf, so that they add nothing. */
    void (*power_scores)(const float *s, int n, int rows, const dhsa_powers *powers, int degree, const float *shift,
                         float *score);
    /* dst[d] = the sum of n >= 1 rows, `stride` bytes apart, added in order. */
    void (*sum_rows)(const void *rows, ptrdiff_t stride, int dtype, int64_t n, int64_t dim, float *dst);
    /* Divides x [n], finite, by its largest magnitude / 127 and rounds to whole numbers, half to even. Returns that
     * divisor, or 0 where x is so small that all numbers are 0. */
    float (*quantize)(const float *x, int64_t n, int8_t *dst);

    /* Operations on vectors of n elements, of any alignment. */
    void (*load)(const void *src, int dtype, int64_t n, float *dst); /* dst = src, converted */
    void (*add)(const void *src, int dtype, int64_t n, float *dst);  /* dst += src, converted */
    float (*dot)(const float *a, const float *b, int64_t n);

    /* Decoding: a few query rows, without panels. k and v are arrays of pointers to rows of fp32, fp16 or bf16.
     * After the last row, DHSA_DECODE_AHEAD more pointers are read. These are only prefetched, so they need not
     * point to rows. A row of q or o has dim elements, rounded up to DHSA_DECODE_STEP, in an order that is private
     * to these kernels. */
    /* Loads a row of q, times factor, with zeros past dim. */
    void (*decode_load)(const void *row, int dtype, int dim, float factor, float *dst);
    /* s[r * s_stride + j] = the product of row r and key j, r < rows, j < n. */
    void (*decode_qk)(const float *q, ptrdiff_t q_stride, int rows, const void *const *k, int dtype, int n, int dim,
                      float *s, ptrdiff_t s_stride);
    /* The softmax of one row. s, scale and softcap are as in `softmax`; *m and *l receive the maximum and the sum of
     * these keys alone. Up to DHSA_DECODE_STEP - 1 elements past the end of s are overwritten. */
    void (*decode_softmax)(float *s, int n, float scale, float softcap, float *m, float *l);
    /* Row r of o += sum_{j < n} p[r * p_stride + j] * v[j]. */
    void (*decode_pv)(const float *p, ptrdiff_t p_stride, int rows, const void *const *v, int dtype, int n, int dim,
                      float *o, ptrdiff_t o_stride);
    /* row = sum_{i < n} weight[i] * (row i of o) / divisor, with columns in order and rounded to dtype. */
    void (*decode_merge)(const float *o, ptrdiff_t o_stride, const float *weight, int n, float divisor, int dim,
                         int dtype, void *row);

    const dhsa_pair_kernels *bf16, *f16; /* NULL: this dtype is converted to fp32 while it is packed */
    const dhsa_byte_kernels *bytes;      /* NULL: bytes are multiplied as bf16 or fp32, with the same results */
    int precisions;                      /* bits as of dhsa_isa_precisions() */
    const struct dhsa_kernels *plain;    /* the table, with wider panels, for all other dtypes; NULL: this one */

    /* For benchmarks only: computes independent FMAs and nothing else. Returns the number of operations, 2 for each
     * FMA. */
    double (*fma_work)(int64_t loops);
} dhsa_kernels;

/* The keys that at least one of `rows` rows sees, [lo_min, hi_max), and those that all of them see, [lo_max,
 * hi_min). */
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

/* The kernels that multiply this dtype without conversion, or NULL. */
static inline const dhsa_pair_kernels *dhsa_pair_products(const dhsa_kernels *kernels, int dtype)
{
    return dtype == DHSA_BF16 ? kernels->bf16 : dtype == DHSA_F16 ? kernels->f16 : NULL;
}

/* The table for attention on inputs of this dtype. */
static inline const dhsa_kernels *dhsa_kernels_for(const dhsa_kernels *kernels, int dtype)
{
    return kernels->plain && !dhsa_pair_products(kernels, dtype) ? kernels->plain : kernels;
}

/* The table in use, never NULL. May be called from any thread. */
const dhsa_kernels *dhsa_kernels_current(void);
/* The table of a tier, for tests; NULL if the tier is not compiled in or this machine cannot run it. */
const dhsa_kernels *dhsa_kernels_find(const char *isa);

#endif
