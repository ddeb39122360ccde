/* tile_tpl.h: the body that all tiers share. The file of a tier defines the vector type and operations below and
 * includes this file, which defines one complete table. Nothing here depends on the instruction set; sizes come from
 * macros.
 *
 * Required before inclusion:
 *   K_ISA and K_TEXT (name as token and as string), V_LEN, V_PER (vectors in a row of a panel)
 *   QK_ROWS, PV_ROWS (keys and value columns of a register tile)
 *   vf, vm (mask): v_load, v_store (aligned or not), v_set1, v_add, v_sub, v_mul, v_div,
 *       v_fma(a, b, c) = a * b + c, v_max and v_min (the second argument if either is NaN)
 *   v_exp2 (2^x for x <= about 0; -inf -> 0, NaN -> NaN), v_rcp (to fp32 rounding), v_sum (the sum across a vector)
 *   v_range(lo, hi, j): mask of lo[i] <= j < hi[i] from int32 arrays; v_pick(m, a, b) = m ? a : b; v_eq(a, b): mask
 *   v_from_f16(const uint16_t *), v_from_bf16, v_to_f16(vf, uint16_t *), v_to_bf16
 *   v_pairs_bf16(const uint16_t *, vf *even, vf *odd): the even and the odd ones of 2 * V_LEN elements
 *   v_of_bits(vf): the float whose image in memory is x < 2^31, rounded to a whole number; 0 for x < 0 and NaN
 *   v_transpose(vf[V_LEN]): transposes V_LEN x V_LEN elements; v_sums(const vf[V_LEN]): the sum across each vector */

#include <float.h>
#include <math.h>
#include <string.h>

#include "dhsa.h"
#include "kernels/kernels.h"
#include "kernels/softmax_tpl.h"

/* ---- products -------------------------------------------------------------------------------------------------- */

/* The products of `rows` keys and one panel, stored or, with `adding`, added. rows is a constant after inlining, so
 * that the sums stay in registers. */
K_INLINE void qk_tile(const float *q, const float *k, ptrdiff_t k_stride, int dim, float *s, int adding, const int rows,
                      const int per)
{
    vf acc[QK_ROWS][V_PER];
#pragma GCC unroll 16
    for (int i = 0; i < rows; i++)
#pragma GCC unroll 8
        for (int u = 0; u < per; u++) acc[i][u] = v_set1(0.0f);
#pragma GCC unroll 4
    for (int d = 0; d < dim; d++) {
        vf x[V_PER];
#pragma GCC unroll 8
        for (int u = 0; u < per; u++) x[u] = v_load(q + (ptrdiff_t)d * K_LANES + u * V_LEN);
#pragma GCC unroll 16
        for (int i = 0; i < rows; i++) {
            const vf y = v_set1(k[i * k_stride + d]);
#pragma GCC unroll 8
            for (int u = 0; u < per; u++) acc[i][u] = v_fma(x[u], y, acc[i][u]);
        }
    }
#pragma GCC unroll 16
    for (int i = 0; i < rows; i++)
#pragma GCC unroll 8
        for (int u = 0; u < per; u++) {
            float *at = s + i * K_LANES + u * V_LEN;
            v_store(at, adding ? v_add(v_load(at), acc[i][u]) : acc[i][u]);
        }
}

K_INLINE void qk_panel(const float *q, const float *k, ptrdiff_t k_stride, int n, int dim, float *s, dhsa_ahead *ahead,
                       const int per)
{
    /* Half of the columns at a time, at most 128: short sums round less, and that part of the panel stays in L1 for
     * all keys. */
    const int step = dim < 32 ? dim : dim < 256 ? (dim + 1) / 2 : 128;
    for (int d = 0; d < dim; d += step, q += step * K_LANES, k += step) {
        const int part = dim - d < step ? dim - d : step, adding = d > 0;
        const float *row = k;
        float *at = s;
        int j = 0;
        for (; j + QK_ROWS <= n; j += QK_ROWS, row += QK_ROWS * k_stride, at += QK_ROWS * K_LANES) {
            qk_tile(q, row, k_stride, part, at, adding, QK_ROWS, per);
            dhsa_ask(ahead, QK_ROWS * part);
        }
#if QK_ROWS > 4
        for (; j + 4 <= n; j += 4, row += 4 * k_stride, at += 4 * K_LANES)
            qk_tile(q, row, k_stride, part, at, adding, 4, per);
#endif
        for (; j < n; j++, row += k_stride, at += K_LANES) qk_tile(q, row, k_stride, part, at, adding, 1, per);
    }
}

static void K_NAME(qk)(const float *q, const float *k, ptrdiff_t k_stride, int n, int dim, int rows, float *s,
                       dhsa_ahead *ahead)
{
    K_FOR_ROWS(rows, qk_panel, q, k, k_stride, n, dim, s, ahead);
}

/* One strip of value columns, `cols` of which exist. The sums start from zero and are added to o at the end, since
 * short sums round less. */
K_INLINE void pv_tile(const float *p, const float *v, int n, const float *alpha, float *o, const int cols,
                      const int per)
{
    vf acc[PV_ROWS][V_PER];
#pragma GCC unroll 16
    for (int i = 0; i < cols; i++)
#pragma GCC unroll 8
        for (int u = 0; u < per; u++) acc[i][u] = v_set1(0.0f);
#pragma GCC unroll 4
    for (int j = 0; j < n; j++) {
        vf x[V_PER];
#pragma GCC unroll 8
        for (int u = 0; u < per; u++) x[u] = v_load(p + (ptrdiff_t)j * K_LANES + u * V_LEN);
#pragma GCC unroll 16
        for (int i = 0; i < cols; i++) {
            const vf y = v_set1(v[(ptrdiff_t)j * PV_ROWS + i]);
#pragma GCC unroll 8
            for (int u = 0; u < per; u++) acc[i][u] = v_fma(x[u], y, acc[i][u]);
        }
    }
#pragma GCC unroll 8
    for (int u = 0; u < per; u++) {
        const vf a = v_load(alpha + u * V_LEN);
#pragma GCC unroll 16
        for (int i = 0; i < cols; i++) {
            float *at = o + i * K_LANES + u * V_LEN;
            v_store(at, v_fma(v_load(at), a, acc[i][u]));
        }
    }
}

K_INLINE void pv_panel(const float *p, const float *v, ptrdiff_t v_stride, int n, int dim, const float *alpha, float *o,
                       dhsa_ahead *ahead, const int per)
{
    int d = 0;
    for (; d + PV_ROWS <= dim; d += PV_ROWS, v += v_stride) {
        pv_tile(p, v, n, alpha, o + (ptrdiff_t)d * K_LANES, PV_ROWS, per);
        dhsa_ask(ahead, PV_ROWS * n);
    }
    for (int i = 0; d < dim; d++, i++) pv_tile(p, v + i, n, alpha, o + (ptrdiff_t)d * K_LANES, 1, per);
}

static void K_NAME(pv)(const float *p, const float *v, ptrdiff_t v_stride, int n, int dim, int rows, const float *alpha,
                       float *o, dhsa_ahead *ahead)
{
    K_FOR_ROWS(rows, pv_panel, p, v, v_stride, n, dim, alpha, o, ahead);
}

/* ---- softmax --------------------------------------------------------------------------------------------------- */

K_INLINE void softmax_panel(float *s, int n, int base, const int32_t *lo, const int32_t *hi, float scale, float softcap,
                            float *m, float *l, float *alpha, const int per)
{
    if (softcap > 0) {
        if (lo)
            softmax_tile(s, n, base, lo, hi, scale, softcap, m, l, alpha, 1, 1, per);
        else
            softmax_tile(s, n, base, lo, hi, scale, softcap, m, l, alpha, 0, 1, per);
    } else {
        if (lo)
            softmax_tile(s, n, base, lo, hi, scale, softcap, m, l, alpha, 1, 0, per);
        else
            softmax_tile(s, n, base, lo, hi, scale, softcap, m, l, alpha, 0, 0, per);
    }
}

static void K_NAME(softmax)(float *s, int n, int rows, int base, const int32_t *lo, const int32_t *hi, float scale,
                            float softcap, float *m, float *l, float *alpha)
{
    K_FOR_ROWS(rows, softmax_panel, s, n, base, lo, hi, scale, softcap, m, l, alpha);
}

K_INLINE void tops_of(const float *s, int n, int base, const int32_t *lo, const int32_t *hi, float *top,
                      const int masked, const int per)
{
    const vf zero = v_set1(0.0f), none = v_set1(-INFINITY);
    vf most[V_PER], poison[V_PER];
#pragma GCC unroll 8
    for (int u = 0; u < per; u++) {
        most[u] = none;
        poison[u] = zero;
    }
    for (int j = 0; j < n; j++)
#pragma GCC unroll 8
        for (int u = 0; u < per; u++) {
            vf x = v_load(s + (ptrdiff_t)j * K_LANES + u * V_LEN), seen = x;
            if (masked) {
                const vm sees = v_range(lo + u * V_LEN, hi + u * V_LEN, base + j);
                seen = v_pick(sees, x, none);
                x = v_pick(sees, x, zero);
            }
            most[u] = v_max(most[u], seen);
            /* x * 0 is 0 unless x is inf or NaN, which a maximum alone may not show. */
            poison[u] = v_fma(x, zero, poison[u]);
        }
#pragma GCC unroll 8
    for (int u = 0; u < per; u++) v_store(top + u * V_LEN, v_add(most[u], poison[u]));
}

K_INLINE void tops_panel(const float *s, int n, int base, const int32_t *lo, const int32_t *hi, float *top,
                         const int per)
{
    if (lo)
        tops_of(s, n, base, lo, hi, top, 1, per);
    else
        tops_of(s, n, base, lo, hi, top, 0, per);
}

static void K_NAME(tops)(const float *s, int n, int rows, int base, const int32_t *lo, const int32_t *hi, float *top)
{
    K_FOR_ROWS(rows, tops_panel, s, n, base, lo, hi, top);
}

/* ---- moving and converting ------------------------------------------------------------------------------------- */

static float K_NAME(convert)(const void *src, int dtype, int64_t i)
{
    if (dtype == DHSA_F32) return ((const float *)src)[i];
    float whole[V_LEN];
    uint16_t half[V_LEN] = {((const uint16_t *)src)[i]};
    v_store(whole, dtype == DHSA_F16 ? v_from_f16(half) : v_from_bf16(half));
    return whole[0];
}

K_INLINE void load_as(const void *src, int64_t n, float *dst, const int adding, const int dtype)
{
    int64_t i = 0;
    for (; i + V_LEN <= n; i += V_LEN) {
        const vf x = dtype == DHSA_F32   ? v_load((const float *)src + i)
                     : dtype == DHSA_F16 ? v_from_f16((const uint16_t *)src + i)
                                         : v_from_bf16((const uint16_t *)src + i);
        v_store(dst + i, adding ? v_add(v_load(dst + i), x) : x);
    }
    for (; i < n; i++) dst[i] = K_NAME(convert)(src, dtype, i) + (adding ? dst[i] : 0.0f);
}

static void K_NAME(load)(const void *src, int dtype, int64_t n, float *dst)
{
    if (dtype == DHSA_F32)
        memcpy(dst, src, (size_t)n * sizeof *dst);
    else if (dtype == DHSA_F16)
        load_as(src, n, dst, 0, DHSA_F16);
    else
        load_as(src, n, dst, 0, DHSA_BF16);
}

static void K_NAME(add)(const void *src, int dtype, int64_t n, float *dst)
{
    K_BY_DTYPE(dtype, load_as, src, n, dst, 1);
}

static float K_NAME(dot)(const float *a, const float *b, int64_t n)
{
    vf s0 = v_set1(0.0f), s1 = v_set1(0.0f);
    int64_t i = 0;
    for (; i + 2 * V_LEN <= n; i += 2 * V_LEN) {
        s0 = v_fma(v_load(a + i), v_load(b + i), s0);
        s1 = v_fma(v_load(a + i + V_LEN), v_load(b + i + V_LEN), s1);
    }
    float sum = v_sum(v_add(s0, s1));
    for (; i < n; i++) sum += a[i] * b[i];
    return sum;
}

/* Gathered rows lie anywhere in memory, so later rows are prefetched while one is copied. */
K_INLINE void prefetch_row(const void *row, int dim, int dtype)
{
    for (int at = 0; at < dim * (dtype == DHSA_F32 ? 4 : 2); at += 64) __builtin_prefetch((const char *)row + at);
}

static void K_NAME(pack_rows)(const void *const *rows, int dtype, int n, int dim, float *dst)
{
    for (int j = 0; j < n; j++) {
        if (j + 4 < n) prefetch_row(rows[j + 4], dim, dtype);
        K_NAME(load)(rows[j], dtype, dim, dst + (ptrdiff_t)j * dim);
    }
}

/* V_LEN elements of a row from column d on, with zeros past its end. */
K_INLINE vf row_part(const void *row, int dtype, int d, int dim)
{
    if (d + V_LEN <= dim)
        return dtype == DHSA_F32   ? v_load((const float *)row + d)
               : dtype == DHSA_F16 ? v_from_f16((const uint16_t *)row + d)
                                   : v_from_bf16((const uint16_t *)row + d);
    float line[V_LEN] = {0};
    for (int i = 0; d + i < dim; i++) line[i] = K_NAME(convert)(row, dtype, d + i);
    return v_load(line);
}

static int K_NAME(pack_values)(const void *const *rows, int dtype, int n, int dim, ptrdiff_t v_stride, float *dst)
{
    enum { PART = V_LEN > PV_ROWS ? V_LEN : PV_ROWS }; /* a whole number of vectors and of strips */
    vf poison = v_set1(0.0f);
    for (int j = 0; j < n; j++) {
        if (j + 4 < n) prefetch_row(rows[j + 4], dim, dtype);
        float *at = dst + (ptrdiff_t)j * PV_ROWS;
        for (int d = 0; d < dim; d += PART) {
            float part[PART];
            for (int i = 0; i < PART; i += V_LEN) {
                const vf x = d + i < dim ? row_part(rows[j], dtype, d + i, dim) : v_set1(0.0f);
                /* x * 0 is 0 unless x is inf or NaN. */
                poison = v_fma(x, v_set1(0.0f), poison);
                v_store(part + i, x);
            }
            for (int i = 0; i < PART && d + i < dim; i += PV_ROWS, at += v_stride)
                memcpy(at, part + i, PV_ROWS * sizeof *at);
        }
    }
    return v_sum(poison) != 0.0f;
}

static void K_NAME(pack_panel)(const void *const *rows, int dtype, int n, int dim, float factor, float *dst)
{
    for (int r = 0; r < K_LANES; r += V_LEN)
        for (int d = 0; d < dim; d += V_LEN) {
            vf x[V_LEN];
            for (int i = 0; i < V_LEN; i++)
                x[i] = r + i < n ? v_mul(row_part(rows[r + i], dtype, d, dim), v_set1(factor)) : v_set1(0.0f);
            v_transpose(x);
            for (int i = 0; i < V_LEN && d + i < dim; i++) v_store(dst + (ptrdiff_t)(d + i) * K_LANES + r, x[i]);
        }
}

K_INLINE void store_part(vf x, void *row, int dtype, int d, int dim)
{
    uint16_t *half = (uint16_t *)row + d, half_line[V_LEN];
    float *whole = (float *)row + d, line[V_LEN];
    const int all = d + V_LEN <= dim;
    if (dtype == DHSA_F32) {
        v_store(all ? whole : line, x);
        for (int i = 0; !all && d + i < dim; i++) whole[i] = line[i];
        return;
    }
    if (dtype == DHSA_F16)
        v_to_f16(x, all ? half : half_line);
    else
        v_to_bf16(x, all ? half : half_line);
    for (int i = 0; !all && d + i < dim; i++) half[i] = half_line[i];
}

static void K_NAME(store_panel)(const float *o, const float *factor, int n, int dim, int dtype, void *const *rows)
{
    for (int r = 0; r < n; r += V_LEN) {
        const vf by = v_load(factor + r);
        for (int d = 0; d < dim; d += V_LEN) {
            vf x[V_LEN];
            for (int i = 0; i < V_LEN; i++)
                x[i] = d + i < dim ? v_mul(v_load(o + (ptrdiff_t)(d + i) * K_LANES + r), by) : v_set1(0.0f);
            v_transpose(x);
            for (int i = 0; i < V_LEN && r + i < n; i++) store_part(x[i], rows[r + i], dtype, d, dim);
        }
    }
}

/* ---- decoding -------------------------------------------------------------------------------------------------- */

#include "kernels/decode_tpl.h"

/* ---- selection ------------------------------------------------------------------------------------------------- */

#include "kernels/score_tpl.h"

/* ---- the machine's peak ---------------------------------------------------------------------------------------- */

static double K_NAME(fma_work)(int64_t loops)
{
    /* Twelve independent chains cover the latency of two FMA units. Values stay near 1, so that there are no
     * denormals and no infinities. */
    vf a[12];
    const vf x = v_set1(0.5f), y = v_set1(0.5f);
    for (int i = 0; i < 12; i++) a[i] = v_set1(1.0f + (float)i * 0.125f);
    for (int64_t n = 0; n < loops; n++)
#pragma GCC unroll 12
        for (int i = 0; i < 12; i++) a[i] = v_fma(a[i], x, y);
    vf sum = a[0];
    for (int i = 1; i < 12; i++) sum = v_add(sum, a[i]);
    /* The sum is used, so that the loop is not optimised away. */
    volatile float keep = v_sum(sum);
    (void)keep;
    return (double)loops * 12 * V_LEN * 2;
}

const dhsa_kernels K_NAME(dhsa_kernels) = {
    .isa = K_TEXT,
    .lanes = K_LANES,
    .value_step = PV_ROWS,
    .qk = K_NAME(qk),
    .softmax = K_NAME(softmax),
    .tops = K_NAME(tops),
    .pv = K_NAME(pv),
    .pack_rows = K_NAME(pack_rows),
    .pack_values = K_NAME(pack_values),
    .pack_panel = K_NAME(pack_panel),
    .store_panel = K_NAME(store_panel),
    .add_sums = K_NAME(add_sums),
    .power_tops = K_NAME(power_tops),
    .power_sums = K_NAME(power_sums),
    .power_scores = K_NAME(power_scores),
    .sum_rows = K_NAME(sum_rows),
    .quantize = K_NAME(quantize),
    .load = K_NAME(load),
    .add = K_NAME(add),
    .dot = K_NAME(dot),
    .decode_load = K_NAME(decode_load),
    .decode_qk = K_NAME(decode_qk),
    .decode_softmax = K_NAME(decode_softmax),
    .decode_pv = K_NAME(decode_pv),
    .decode_merge = K_NAME(decode_merge),
    .fma_work = K_NAME(fma_work),
};
