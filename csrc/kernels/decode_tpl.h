/* decode_tpl.h: the part of tile_tpl.h for a decoding step: a few query rows against many keys. A panel would be
 * mostly padding, and packing would double the memory traffic, which alone limits the speed. Keys and values are
 * therefore read once, directly from the rows of the caller. Vectors run along head_dim (products) or along the keys
 * (softmax). */

/* Vectors of sums that are held in registers. */
#define D_SUMS (V_LEN == 8 || V_LEN == 1 ? 8 : 16)
#define D_UNIT (2 * V_LEN)       /* columns of a row that are read at a time */
#define D_COLS (D_SUMS / 8)      /* units of value columns whose sums, for four rows, are held in registers */
#define D_KEYS 16                /* keys of a block: they stay in L1 while the rows are processed, four at a time */
#define D_AHEAD_BYTES (8 * 1024) /* rows are prefetched this far ahead, which takes longer than a memory access */

K_INLINE int decode_ahead(int dim, const int dtype)
{
    const int rows = D_AHEAD_BYTES / (dim * (dtype == DHSA_F32 ? 4 : 2));
    return rows < 1 ? 1 : rows > DHSA_DECODE_AHEAD - D_KEYS ? DHSA_DECODE_AHEAD - D_KEYS : rows;
}

/* Loads one unit of a row, the columns from d on, into two vectors. With `tail`, the unit reaches past the end of
 * the row and is filled up with zeros. bf16 is loaded as the even and the odd columns, which takes two instructions
 * less than loading it in order; queries and outputs have the same order. */
K_INLINE void load_unit(const void *row, int d, int dim, vf *x, const int tail, const int dtype)
{
    const float *whole = (const float *)row + d;
    const uint16_t *half = (const uint16_t *)row + d;
    float whole_line[D_UNIT];
    uint16_t half_line[D_UNIT];
    if (tail && dtype == DHSA_F32) {
        memset(whole_line, 0, sizeof whole_line);
        whole = memcpy(whole_line, whole, (size_t)(dim - d) * sizeof *whole);
    } else if (tail) {
        memset(half_line, 0, sizeof half_line);
        half = memcpy(half_line, half, (size_t)(dim - d) * sizeof *half);
    }
    if (dtype == DHSA_BF16) {
        v_pairs_bf16(half, &x[0], &x[1]);
    } else {
        x[0] = dtype == DHSA_F32 ? v_load(whole) : v_from_f16(half);
        x[1] = dtype == DHSA_F32 ? v_load(whole + V_LEN) : v_from_f16(half + V_LEN);
    }
}

/* Prefetches one unit of a row, each cache line once, into L2, which has room for all lines that are requested
 * ahead. */
K_INLINE void prefetch_unit(const void *row, int d, const int dtype)
{
    const int size = dtype == DHSA_F32 ? 4 : 2;
    for (int at = 0; at < D_UNIT * size; at += 64)
        if (D_UNIT * size >= 64 || d * size % 64 == 0)
            __builtin_prefetch((const char *)row + (ptrdiff_t)d * size + at, 0, 2);
}

/* Where the next unit to be prefetched is. Whatever the order is in which units are read, they are prefetched in the
 * order of memory, which the hardware recognizes. */
typedef struct {
    const void *const *row;
    int d;
} decode_cursor;

K_INLINE void prefetch_next(decode_cursor *at, int dim, const int dtype)
{
    prefetch_unit(*at->row, at->d, dtype);
    at->d += D_UNIT;
    if (at->d >= dim) {
        at->d = 0;
        at->row++;
    }
}

static void K_NAME(decode_load)(const void *row, int dtype, int dim, float factor, float *dst)
{
    for (int d = 0; d < dim; d += D_UNIT) {
        vf x[2];
        K_BY_DTYPE(dtype, load_unit, row, d, dim, x, d + D_UNIT > dim);
        v_store(dst + d, v_mul(x[0], v_set1(factor)));
        v_store(dst + d + V_LEN, v_mul(x[1], v_set1(factor)));
    }
}

/* acc[r * keys + i] += the product of one unit of row r and that unit of key i. */
K_INLINE void decode_step(const float *q, ptrdiff_t q_stride, const void *const *k, int d, int dim, vf *acc,
                          const int dtype, const int rows, const int keys, const int tail)
{
#pragma GCC unroll 16
    for (int i = 0; i < keys; i++) {
        vf y[2];
        load_unit(k[i], d, dim, y, tail, dtype);
#pragma GCC unroll 4
        for (int r = 0; r < rows; r++) {
            acc[r * keys + i] = v_fma(v_load(q + r * q_stride + d), y[0], acc[r * keys + i]);
            acc[r * keys + i] = v_fma(v_load(q + r * q_stride + d + V_LEN), y[1], acc[r * keys + i]);
        }
    }
}

/* The products of `rows` query rows and the first D_SUMS / rows of n keys, or all n if there are fewer. rows is a
 * constant after inlining. */
K_INLINE void decode_dots(const float *q, ptrdiff_t q_stride, const void *const *k, int n, int dim, float *s,
                          ptrdiff_t s_stride, decode_cursor *ahead, const int dtype, const int rows)
{
    const int keys = D_SUMS / rows;
    const void *at[D_SUMS];
    vf acc[D_SUMS];
    float line[D_SUMS];
    int d = 0;
    /* If there are too few keys, the last one is repeated. */
#pragma GCC unroll 16
    for (int i = 0; i < keys; i++) at[i] = k[i < n ? i : n - 1];
#pragma GCC unroll 16
    for (int i = 0; i < D_SUMS; i++) acc[i] = v_set1(0.0f);
    for (; d + D_UNIT <= dim; d += D_UNIT) {
#pragma GCC unroll 16
        for (int i = 0; i < keys; i++) prefetch_next(ahead, dim, dtype);
        decode_step(q, q_stride, at, d, dim, acc, dtype, rows, keys, 0);
    }
    if (d < dim) decode_step(q, q_stride, at, d, dim, acc, dtype, rows, keys, 1);
#pragma GCC unroll 16
    for (int i = 0; i < D_SUMS; i += V_LEN) v_store(line + i, v_sums(acc + i));
    for (int r = 0; r < rows; r++)
        if (n >= keys)
            memcpy(s + r * s_stride, line + r * keys, (size_t)keys * sizeof *s);
        else
            memcpy(s + r * s_stride, line + r * keys, (size_t)n * sizeof *s);
}

K_INLINE void decode_qk_as(const float *q, ptrdiff_t q_stride, int rows, const void *const *k, int n, int dim, float *s,
                           ptrdiff_t s_stride, const int dtype)
{
    for (int j = 0; j < n; j += D_KEYS) {
        const int end = j + D_KEYS < n ? j + D_KEYS : n, ahead = decode_ahead(dim, dtype);
        int r = 0;
#define D_ROWS(count)                                                                                                  \
    for (; r + count <= rows; r += count) {                                                                            \
        decode_cursor at = {k + j + ahead, 0};                                                                         \
        for (int i = j; i < end; i += D_SUMS / count)                                                                  \
            decode_dots(q + r * q_stride, q_stride, k + i, end - i, dim, s + r * s_stride + i, s_stride, &at, dtype,   \
                        count);                                                                                        \
    }
        D_ROWS(4)
        D_ROWS(2)
        D_ROWS(1)
#undef D_ROWS
    }
}

static void K_NAME(decode_qk)(const float *q, ptrdiff_t q_stride, int rows, const void *const *k, int dtype, int n,
                              int dim, float *s, ptrdiff_t s_stride)
{
    K_BY_DTYPE(dtype, decode_qk_as, q, q_stride, rows, k, n, dim, s, s_stride);
}

static void K_NAME(decode_softmax)(float *s, int n, float scale, float softcap, float *m, float *l)
{
    static const int32_t lane[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    static const int32_t all[16] = {INT32_MAX, INT32_MAX, INT32_MAX, INT32_MAX, INT32_MAX, INT32_MAX,
                                    INT32_MAX, INT32_MAX, INT32_MAX, INT32_MAX, INT32_MAX, INT32_MAX,
                                    INT32_MAX, INT32_MAX, INT32_MAX, INT32_MAX};
    const float factor = softcap > 0 ? 1.0f : scale * K_LOG2E, inner = softcap > 0 ? scale / softcap : 0.0f;
    vf top = v_set1(-INFINITY), sum = v_set1(0.0f);
    float line[V_LEN], most = -INFINITY;
    for (int j = 0; j < n; j += V_LEN) {
        vf x = v_load(s + j);
        if (softcap > 0) x = v_mul(v_set1(softcap * K_LOG2E), tanh_vf(v_mul(x, v_set1(inner))));
        if (j + V_LEN > n) x = v_pick(v_range(lane, all, n - j - 1), x, v_set1(-INFINITY));
        v_store(s + j, x);
        top = v_max(top, x);
    }
    v_store(line, top);
    for (int i = 0; i < V_LEN; i++) most = line[i] > most ? line[i] : most;
    /* As in softmax_begin: if no key was seen, the maximum stays -inf, also with a zero scale. A NaN that the
     * maximum has lost still reaches the sum. */
    const float now = most * factor > -INFINITY ? most * factor : -INFINITY, use = now == -INFINITY ? 0.0f : now;
    const int rounded = v_sum(is_far(v_set1(use))) > 0;
    for (int j = 0; j < n; j += V_LEN) {
        vf p = v_exp2(exponent(v_load(s + j), (exponents){.factor = v_set1(factor)}, v_set1(-use), rounded, 0));
        if (j + V_LEN > n) p = v_pick(v_range(lane, all, n - j - 1), p, v_set1(0.0f));
        v_store(s + j, p);
        sum = v_add(sum, p);
    }
    *m = now;
    *l = v_sum(sum);
}

/* Adds the values of one block of keys, `cols` units of columns from d on. The sums start from zero and are added to
 * o at the end, since short sums round less. */
K_INLINE void decode_pv_tile(const float *p, ptrdiff_t p_stride, const void *const *v, int n, int d, int dim, float *o,
                             ptrdiff_t o_stride, decode_cursor *ahead, const int dtype, const int rows, const int cols,
                             const int tail)
{
    vf acc[4][2 * D_COLS];
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int c = 0; c < 2 * cols; c++) acc[r][c] = v_set1(0.0f);
    for (int j = 0; j < n; j++) {
        vf y[2 * D_COLS];
#pragma GCC unroll 4
        for (int c = 0; c < cols; c++) {
            load_unit(v[j], d + c * D_UNIT, dim, y + 2 * c, tail, dtype);
            if (!tail) prefetch_next(ahead, dim, dtype);
        }
#pragma GCC unroll 4
        for (int r = 0; r < rows; r++) {
            const vf x = v_set1(p[r * p_stride + j]);
#pragma GCC unroll 4
            for (int c = 0; c < 2 * cols; c++) acc[r][c] = v_fma(x, y[c], acc[r][c]);
        }
    }
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int c = 0; c < 2 * cols; c++) {
            float *at = o + r * o_stride + d + c * V_LEN;
            v_store(at, v_add(v_load(at), acc[r][c]));
        }
}

K_INLINE void decode_pv_rows(const float *p, ptrdiff_t p_stride, const void *const *v, int n, int dim, float *o,
                             ptrdiff_t o_stride, const int dtype, const int rows)
{
    int d = 0;
    decode_cursor at = {v + decode_ahead(dim, dtype), 0};
    for (; d + D_COLS * D_UNIT <= dim; d += D_COLS * D_UNIT)
        decode_pv_tile(p, p_stride, v, n, d, dim, o, o_stride, &at, dtype, rows, D_COLS, 0);
    for (; d + D_UNIT <= dim; d += D_UNIT)
        decode_pv_tile(p, p_stride, v, n, d, dim, o, o_stride, &at, dtype, rows, 1, 0);
    if (d < dim) decode_pv_tile(p, p_stride, v, n, d, dim, o, o_stride, &at, dtype, rows, 1, 1);
}

K_INLINE void decode_pv_as(const float *p, ptrdiff_t p_stride, int rows, const void *const *v, int n, int dim, float *o,
                           ptrdiff_t o_stride, const int dtype)
{
    for (int j = 0; j < n; j += D_KEYS) {
        const int count = n - j < D_KEYS ? n - j : D_KEYS;
        int r = 0;
        for (; r + 4 <= rows; r += 4)
            decode_pv_rows(p + r * p_stride + j, p_stride, v + j, count, dim, o + r * o_stride, o_stride, dtype, 4);
        for (; r + 2 <= rows; r += 2)
            decode_pv_rows(p + r * p_stride + j, p_stride, v + j, count, dim, o + r * o_stride, o_stride, dtype, 2);
        for (; r < rows; r++)
            decode_pv_rows(p + r * p_stride + j, p_stride, v + j, count, dim, o + r * o_stride, o_stride, dtype, 1);
    }
}

static void K_NAME(decode_pv)(const float *p, ptrdiff_t p_stride, int rows, const void *const *v, int dtype, int n,
                              int dim, float *o, ptrdiff_t o_stride)
{
    K_BY_DTYPE(dtype, decode_pv_as, p, p_stride, rows, v, n, dim, o, o_stride);
}

static void K_NAME(decode_merge)(const float *o, ptrdiff_t o_stride, const float *weight, int n, float divisor, int dim,
                                 int dtype, void *row)
{
    float line[D_UNIT];
    for (int d = 0; d < dim; d += D_UNIT) {
        for (int u = 0; u < 2; u++) {
            vf sum = v_set1(0.0f);
            float part[V_LEN];
            for (int i = 0; i < n; i++) sum = v_fma(v_load(o + i * o_stride + d + u * V_LEN), v_set1(weight[i]), sum);
            v_store(part, v_div(sum, v_set1(divisor)));
            for (int i = 0; i < V_LEN; i++) line[dtype == DHSA_BF16 ? 2 * i + u : u * V_LEN + i] = part[i];
        }
        store_part(v_load(line), row, dtype, d, dim);
        if (d + V_LEN < dim) store_part(v_load(line + V_LEN), row, dtype, d + V_LEN, dim);
    }
}
