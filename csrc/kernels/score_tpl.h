/* score_tpl.h: the kernels of selection, included by tile_tpl.h: sums of rows, quantization, sums of probabilities,
 * and row scores. */

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

/* Plain loops, which compilers turn into vectors of the tier. */
static float K_NAME(quantize)(const float *x, int64_t n, int8_t *dst)
{
    /* Adding this number leaves no room for a fraction, so that it rounds, half to even. */
    const float rounder = 0x1.8p23f;
    uint32_t largest = 0; /* images of magnitudes in memory, which have their order */
    float most;
    for (int64_t i = 0; i < n; i++) {
        uint32_t bits;
        memcpy(&bits, x + i, sizeof bits);
        bits &= 0x7fffffff;
        largest = DHSA_MAX(largest, bits);
    }
    memcpy(&most, &largest, sizeof most);
    const float factor = 127.0f / most;
    if (!isfinite(factor)) {
        memset(dst, 0, (size_t)n);
        return 0;
    }
    for (int64_t i = 0; i < n; i++) dst[i] = (int8_t)(int32_t)(x[i] * factor + rounder - rounder);
    return most / 127.0f;
}

/* The weighted probabilities of one key, summed over the vectors of a row but not across a vector. */
K_INLINE vf add_rows(const float *p, const vf *weight, const vm *none)
{
    vf sum = v_set1(0.0f);
#pragma GCC unroll 8
    for (int u = 0; u < V_PER; u++)
        sum = v_add(sum, v_pick(none[u], v_set1(0.0f), v_mul(v_load(p + u * V_LEN), weight[u])));
    return sum;
}

static void K_NAME(add_sums)(const float *p, int n, const float *weight, float *sum)
{
    vf by[V_PER];
    vm none[V_PER];
    int j = 0;
    for (int u = 0; u < V_PER; u++) {
        by[u] = v_load(weight + u * V_LEN);
        none[u] = v_eq(by[u], v_set1(0.0f));
    }
    for (; j + V_LEN <= n; j += V_LEN) {
        vf x[V_LEN];
#pragma GCC unroll 16
        for (int i = 0; i < V_LEN; i++) x[i] = add_rows(p + (ptrdiff_t)(j + i) * K_LANES, by, none);
        v_store(sum + j, v_add(v_load(sum + j), v_sums(x)));
    }
    for (; j < n; j++) sum[j] += v_sum(add_rows(p + (ptrdiff_t)j * K_LANES, by, none));
}

/* ---- row scores ------------------------------------------------------------------------------------------------ */

#define K_EXPONENT_BITS 8388608.0f /* 2^23: the exponent of a float counts in units of this */

/* power(x) for y = (x + 127) * 2^23, whose integer part is the image of that float in memory. */
K_INLINE vf power_vf(vf y) { return v_of_bits(v_min(v_set1(190.0f * K_EXPONENT_BITS), y)); }

/* The exponent of product x. */
K_INLINE vf power_exponent(vf x, vf key, vf row, float cap)
{
    const vf y = v_mul(v_mul(x, key), row);
    return cap > 0 ? v_mul(v_set1(cap), tanh_vf(y)) : y;
}

/* Whether the difference of exponents and shifts must be computed from exponents as power_tops has them. A sum of
 * products is faster, but for it a large shift has a rounding error that exponents do not have. */
K_INLINE int power_is_careful(int rows, const dhsa_powers *powers, const float *shift)
{
    int far = powers->cap > 0;
    for (int r = 0; r < rows; r++) far |= fabsf(shift[r]) > 0x1p13f && fabsf(shift[r]) <= FLT_MAX;
    return far;
}

K_INLINE void power_tops_of(const float *s, int n, const dhsa_powers *powers, float *top, const int capped,
                            const int per)
{
    vf row[V_PER], most[V_PER];
#pragma GCC unroll 8
    for (int u = 0; u < per; u++) {
        row[u] = v_load(powers->row + u * V_LEN);
        most[u] = v_load(top + u * V_LEN);
    }
    for (int j = 0; j < n; j++, s += K_LANES) {
        const vf key = v_set1(powers->key[j]);
#pragma GCC unroll 8
        for (int u = 0; u < per; u++)
            most[u] = v_max(power_exponent(v_load(s + u * V_LEN), key, row[u], capped ? powers->cap : 0), most[u]);
    }
#pragma GCC unroll 8
    for (int u = 0; u < per; u++) v_store(top + u * V_LEN, most[u]);
}

static void K_NAME(power_tops)(const float *s, int n, int rows, const dhsa_powers *powers, float *top)
{
    if (powers->cap > 0)
        power_tops_of(s, n, powers, top, 1, V_PER);
    else
        K_FOR_ROWS(rows, power_tops_of, s, n, powers, top, 0);
}

/* The factor and the addend that make y of power_vf from a product times its key's factor, or (careful) from the
 * difference of an exponent and its shift. */
K_INLINE void power_factors(const dhsa_powers *powers, float degree, const float *shift, vf *factor, vf *addend,
                            const int careful, const int per)
{
    const vf unit = v_set1(degree * K_EXPONENT_BITS), one = v_set1(127.0f * K_EXPONENT_BITS);
#pragma GCC unroll 8
    for (int u = 0; u < per; u++) {
        factor[u] = careful ? unit : v_mul(unit, v_load(powers->row + u * V_LEN));
        addend[u] = careful ? one : v_sub(one, v_mul(unit, v_load(shift + u * V_LEN)));
    }
}

/* power() of the exponent of a product, part u of a row. */
K_INLINE vf power_of(const float *s, vf key, const dhsa_powers *powers, const float *shift, int u, vf factor, vf addend,
                     const int careful)
{
    const vf x = v_load(s + u * V_LEN);
    if (!careful) return power_vf(v_fma(v_mul(x, key), factor, addend));
    const vf exponent = power_exponent(x, key, v_load(powers->row + u * V_LEN), powers->cap);
    return power_vf(v_fma(v_sub(exponent, v_load(shift + u * V_LEN)), factor, addend));
}

K_INLINE void power_sums_of(const float *s, int n, const dhsa_powers *powers, const float *weight, const float *shift,
                            float *sum, const int careful, const int per)
{
    vf factor[V_PER], addend[V_PER], total[V_PER];
    power_factors(powers, 1.0f, shift, factor, addend, careful, per);
#pragma GCC unroll 8
    for (int u = 0; u < per; u++) total[u] = v_load(sum + u * V_LEN);
    for (int j = 0; j < n; j++, s += K_LANES) {
        const vf key = v_set1(powers->key[j]), by = v_set1(weight[j]);
#pragma GCC unroll 8
        for (int u = 0; u < per; u++)
            total[u] = v_fma(power_of(s, key, powers, shift, u, factor[u], addend[u], careful), by, total[u]);
    }
#pragma GCC unroll 8
    for (int u = 0; u < per; u++) v_store(sum + u * V_LEN, total[u]);
}

static void K_NAME(power_sums)(const float *s, int n, int rows, const dhsa_powers *powers, const float *weight,
                               const float *shift, float *sum)
{
    if (power_is_careful(rows, powers, shift))
        power_sums_of(s, n, powers, weight, shift, sum, 1, V_PER);
    else
        K_FOR_ROWS(rows, power_sums_of, s, n, powers, weight, shift, sum, 0);
}

/* The score of one key, summed over the vectors of a row but not across a vector. */
K_INLINE vf power_score(const float *s, int j, const dhsa_powers *powers, const float *shift, const vf *factor,
                        const vf *addend, const vf *row_spread, const int spread, const int careful, const int per)
{
    const vf key = v_set1(powers->key[j]), by = v_set1(spread ? powers->spread[j] : 0.0f);
    vf sum = v_set1(0.0f);
#pragma GCC unroll 8
    for (int u = 0; u < per; u++) {
        const vf base = spread ? v_fma(by, row_spread[u], addend[u]) : addend[u];
        const vf power = power_of(s, key, powers, shift, u, factor[u], base, careful);
        sum = u ? v_add(sum, power) : power;
    }
    return sum;
}

K_INLINE void power_scores_of(const float *s, int n, const dhsa_powers *powers, int degree, const float *shift,
                              float *score, const int spread, const int careful, const int per)
{
    vf factor[V_PER], addend[V_PER], row_spread[V_PER];
    int j = 0;
    power_factors(powers, (float)degree, shift, factor, addend, careful, per);
#pragma GCC unroll 8
    for (int u = 0; u < per; u++)
        row_spread[u] = spread ? v_mul(v_set1(K_EXPONENT_BITS), v_load(powers->row_spread + u * V_LEN)) : v_set1(0.0f);
    for (; j + V_LEN <= n; j += V_LEN) {
        vf x[V_LEN];
#pragma GCC unroll 16
        for (int i = 0; i < V_LEN; i++, s += K_LANES)
            x[i] = power_score(s, j + i, powers, shift, factor, addend, row_spread, spread, careful, per);
        v_store(score + j, v_add(v_load(score + j), v_sums(x)));
    }
    for (; j < n; j++, s += K_LANES)
        score[j] += v_sum(power_score(s, j, powers, shift, factor, addend, row_spread, spread, careful, per));
}

static void K_NAME(power_scores)(const float *s, int n, int rows, const dhsa_powers *powers, int degree,
                                 const float *shift, float *score)
{
    const int careful = power_is_careful(rows, powers, shift);
    if (careful && powers->spread)
        power_scores_of(s, n, powers, degree, shift, score, 1, 1, V_PER);
    else if (careful)
        power_scores_of(s, n, powers, degree, shift, score, 0, 1, V_PER);
    else if (powers->spread)
        K_FOR_ROWS(rows, power_scores_of, s, n, powers, degree, shift, score, 1, 0);
    else
        K_FOR_ROWS(rows, power_scores_of, s, n, powers, degree, shift, score, 0, 0);
}
