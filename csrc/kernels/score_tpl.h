/* score_tpl.h: the kernels of selection, included by tile_tpl.h: sums of rows, rounding to bf16, and sums of the
 * probabilities of row scores or of their squares. */

/* V_LEN elements of a row of type dtype, from column d on. */
K_INLINE vf load_part(const char *row, int64_t d, const int dtype)
{
    return dtype == DHSA_F32   ? v_load((const float *)row + d)
           : dtype == DHSA_F16 ? v_from_f16((const uint16_t *)row + d)
                               : v_from_bf16((const uint16_t *)row + d);
}

/* Sums all rows over `vectors` vectors of columns from d on. The sums stay in registers. */
K_INLINE void sum_strip(const char *row, ptrdiff_t stride, int64_t n, int64_t d, float *dst, const int dtype,
                        const int vectors)
{
    vf sum[8];
#pragma GCC unroll 8
    for (int u = 0; u < vectors; u++) sum[u] = load_part(row, d + u * V_LEN, dtype);
    for (int64_t i = 1; i < n; i++) {
        row += stride;
#pragma GCC unroll 8
        for (int u = 0; u < vectors; u++) sum[u] = v_add(sum[u], load_part(row, d + u * V_LEN, dtype));
    }
#pragma GCC unroll 8
    for (int u = 0; u < vectors; u++) v_store(dst + d + u * V_LEN, sum[u]);
}

K_INLINE void sum_as(const char *rows, ptrdiff_t stride, int64_t n, int64_t dim, float *dst, const int dtype)
{
    int64_t d = 0;
    for (; d + 8 * V_LEN <= dim; d += 8 * V_LEN) sum_strip(rows, stride, n, d, dst, dtype, 8);
    for (; d + V_LEN <= dim; d += V_LEN) sum_strip(rows, stride, n, d, dst, dtype, 1);
    for (; d < dim; d++) {
        float sum = K_NAME(convert)(rows, dtype, d);
        for (int64_t i = 1; i < n; i++) sum += K_NAME(convert)(rows + i * stride, dtype, d);
        dst[d] = sum;
    }
}

static void K_NAME(sum_rows)(const void *rows, ptrdiff_t stride, int dtype, int64_t n, int64_t dim, float *dst)
{
    K_BY_DTYPE(dtype, sum_as, rows, stride, n, dim, dst);
}

static void K_NAME(round_bf16)(const float *x, int64_t n, uint16_t *dst)
{
    const vf most = v_set1(0x1.fep127f), least = v_set1(-0x1.fep127f);
    for (int64_t i = 0; i < n; i += V_LEN) {
        float line[V_LEN] = {0};
        uint16_t half[V_LEN];
        const int count = n - i < V_LEN ? (int)(n - i) : V_LEN;
        memcpy(line, x + i, (size_t)count * sizeof *line);
        v_to_bf16(v_max(least, v_min(most, v_load(line))), half);
        memcpy(dst + i, half, (size_t)count * sizeof *half);
    }
}

/* The weighted probabilities of one key, or their squares, summed over the vectors of a row but not across a vector. */
K_INLINE vf add_rows(const float *p, const vf *weight, const vm *none, const int square)
{
    vf sum = v_set1(0.0f);
#pragma GCC unroll 8
    for (int u = 0; u < V_PER; u++) {
        const vf x = v_pick(none[u], v_set1(0.0f), v_mul(v_load(p + u * V_LEN), weight[u]));
        sum = square ? v_fma(x, x, sum) : v_add(x, sum);
    }
    return sum;
}

K_INLINE void add_keys(const float *p, int n, const float *weight, float *score, const int square)
{
    vf by[V_PER];
    vm none[V_PER];
    int j = 0;
    for (int u = 0; u < V_PER; u++) {
        by[u] = v_load(weight + u * V_LEN);
        none[u] = v_eq(by[u], v_set1(0.0f));
    }
    /* V_LEN keys at a time: after a transposition, the sums across vectors are sums of vectors. */
    for (; j + V_LEN <= n; j += V_LEN) {
        vf x[V_LEN];
#pragma GCC unroll 16
        for (int i = 0; i < V_LEN; i++) x[i] = add_rows(p + (ptrdiff_t)(j + i) * K_LANES, by, none, square);
        v_transpose(x);
#pragma GCC unroll 4
        for (int step = V_LEN / 2; step > 0; step /= 2)
#pragma GCC unroll 8
            for (int i = 0; i < step; i++) x[i] = v_add(x[i], x[i + step]);
        v_store(score + j, v_add(v_load(score + j), x[0]));
    }
    for (; j < n; j++) score[j] += v_sum(add_rows(p + (ptrdiff_t)j * K_LANES, by, none, square));
}

static void K_NAME(add_squares)(const float *p, int n, const float *weight, float *score)
{
    add_keys(p, n, weight, score, 1);
}

static void K_NAME(add_sums)(const float *p, int n, const float *weight, float *mass)
{
    add_keys(p, n, weight, mass, 0);
}

/* Adds key by key, for all rows at once, so that the sums stay in registers. */
static void K_NAME(weigh_keys)(const float *p, int n, const float *weight, const float *alpha, float *sum)
{
    vf x[V_PER];
#pragma GCC unroll 8
    for (int u = 0; u < V_PER; u++) x[u] = v_mul(v_load(sum + u * V_LEN), v_load(alpha + u * V_LEN));
    for (int j = 0; j < n; j++) {
        const vf by = v_set1(weight[j]);
#pragma GCC unroll 8
        for (int u = 0; u < V_PER; u++) x[u] = v_fma(by, v_load(p + (ptrdiff_t)j * K_LANES + u * V_LEN), x[u]);
    }
#pragma GCC unroll 8
    for (int u = 0; u < V_PER; u++) v_store(sum + u * V_LEN, x[u]);
}
