/* test_score_kernels.c: the kernels of selection of every tier that this CPU supports: sums of rows with the scalar
 * tier, powers, sums and scores with the same in double, numbers of 8 bits and their products exactly. Built and run as
 * test_kernels.c is. */
#include <float.h>

#include "kernel_cases.h"
#include "avx_vnni.h"

#if DHSA_X86 && DHSA_HAVE_AVXVNNI && defined(__linux__)
extern const dhsa_byte_kernels dhsa_bytes_avx2, dhsa_bytes_avx2vnni;
#endif

static void test_add_sums(int n)
{
    const int lanes = kn->lanes;
    float *p = random_floats((size_t)n * lanes), *weight = random_floats((size_t)lanes), *score = floats((size_t)n);
    weight[lanes / 2] = 0; /* this row does not count, whatever p holds */
    for (int j = 0; j < n; j++) p[j * lanes + lanes / 2] = j % 2 ? NAN : INFINITY;
    for (int j = 0; j < n; j++) score[j] = (float)j;
    kn->add_sums(p, n, weight, score);
    for (int j = 0; j < n; j++) {
        double want = j;
        for (int r = 0; r < lanes; r++)
            if (r != lanes / 2) want += (double)p[j * lanes + r] * weight[r];
        near("add_sums", n, j, score[j], (float)want, 2e-7f * (float)(j + lanes));
    }
    weight[0] = 1;
    p[(n - 1) * lanes] = NAN;
    kn->add_sums(p, n, weight, score);
    for (int j = 0; j < n; j++) near("add_sums", n, j, (float)isnan(score[j]), j == n - 1, 0);
}

/* The power of two of dhsa_powers in double. */
static double power(double x)
{
    if (isnan(x) || x <= -127) return 0;
    if (x >= 63) return 0x1p63;
    return ldexp(1 + x - floor(x), (int)floor(x));
}

/* Products of rows and keys, and what makes exponents of them. `used` lanes hold rows. */
typedef struct {
    int n, lanes, used;
    float *s;
    dhsa_powers powers;
} exponents;

static exponents random_exponents(int n, int used, float cap, int spread)
{
    const int lanes = kn->lanes;
    exponents e = {n, lanes, used, floats((size_t)n * lanes), {.cap = cap}};
    float *key = random_floats((size_t)n), *row = random_floats((size_t)lanes), *far = random_floats((size_t)n),
          *row_far = random_floats((size_t)lanes);
    for (int i = 0; i < n * lanes; i++) e.s[i] = i % lanes < used ? uniform() * 5000 : NAN; /* not computed */
    for (int j = 0; j < n; j++) key[j] = fabsf(key[j]) + 0.01f;
    for (int r = 0; r < lanes; r++) row[r] = r < used ? row[r] * (cap > 0 ? 0.001f : 0.01f) : 0;
    for (int j = 0; j < n; j++) far[j] = j % 3 ? fabsf(far[j]) : 0;
    for (int r = 0; r < lanes; r++) row_far[r] = r < used ? fabsf(row_far[r]) * 8 : 0;
    e.powers.key = key;
    e.powers.row = row;
    if (spread) {
        e.powers.spread = far;
        e.powers.row_spread = row_far;
    }
    return e;
}

static double exponent_of(const exponents *e, int j, int r)
{
    const double x = (double)e->s[j * e->lanes + r] * e->powers.key[j] * e->powers.row[r];
    return e->powers.cap > 0 ? e->powers.cap * tanh(x) : x;
}

/* The most by which power(x) may differ. x is a sum of numbers up to `size`, and is rounded in units of 2^-16 too,
 * since an exponent shares 31 bits with its fraction. Below 2^-126, powers are no longer exact. */
static double power_error(double x, double size)
{
    const double value = power(x);
    return (value > 0 ? value * (5e-5 + 1e-6 * size) : 0) + 0x1p-126;
}

static void test_power_tops(int n, int used, float cap)
{
    const exponents e = random_exponents(n, used, cap, 0);
    float *top = random_floats((size_t)e.lanes), *before = floats((size_t)e.lanes);
    memcpy(before, top, (size_t)e.lanes * sizeof *top);
    before[0] = top[0] = 1e4f; /* larger than every exponent */
    e.s[n / 2 * e.lanes] = NAN;
    if (used > 1) e.s[n / 3 * e.lanes + 1] = INFINITY;
    if (used > 2) e.s[n / 3 * e.lanes + 2] = -INFINITY;
    kn->power_tops(e.s, n, used, &e.powers, top);
    for (int r = 0; r < used; r++) {
        double want = before[r];
        for (int j = 0; j < n; j++) want = fmax(want, exponent_of(&e, j, r)); /* leaves a NaN out */
        near("power_tops", n, r, top[r], (float)want, (float)(3e-7 * fabs(want) + 1e-6 * cap));
    }
}

/* power_sums and power_scores of the same products. A product of NaN, a row whose factor is NaN, and a row whose shift
 * is +inf add nothing, whatever the products are. */
static void test_powers(int n, int used, float cap, int degree, int spread)
{
    const exponents e = random_exponents(n, used, cap, spread);
    float *shift = random_floats((size_t)e.lanes), *weight = random_floats((size_t)n);
    float *sum = random_floats((size_t)e.lanes), *score = random_floats((size_t)n), *before = floats((size_t)n);
    float *sum_before = floats((size_t)e.lanes);
    for (int r = 0; r < e.lanes; r++) shift[r] = r < used ? shift[r] * 40 : INFINITY;
    for (int j = 0; j < n; j++) weight[j] = 1 + fabsf(weight[j]) * 9;
    memcpy(before, score, (size_t)n * sizeof *score);
    memcpy(sum_before, sum, (size_t)e.lanes * sizeof *sum);
    e.s[n / 2 * e.lanes] = NAN;
    if (used > 1) e.s[n / 2 * e.lanes + 1] = INFINITY;
    if (used > 2) e.s[n / 2 * e.lanes + 2] = -INFINITY;
    if (used > 4) ((float *)e.powers.row)[4] = NAN;
    if (used > 5) {
        shift[5] = INFINITY;
        e.s[n / 2 * e.lanes + 5] = INFINITY;
        e.s[n / 3 * e.lanes + 5] = NAN;
    }
    if (used > 6) shift[6] = 1000;  /* powers of 0 */
    if (used > 7) shift[7] = -1000; /* the largest powers */
    if (!spread && degree == 1) {
        kn->power_sums(e.s, n, used, &e.powers, weight, shift, sum);
        for (int r = 0; r < used; r++) {
            double want = sum_before[r], error = 1e-6 * fabs(want);
            for (int j = 0; j < n; j++) {
                const double x = exponent_of(&e, j, r), y = x - shift[r];
                want += weight[j] * power(y);
                error += weight[j] * power_error(y, isfinite(x) ? fabs(x) + fabs(shift[r]) + cap : 0);
            }
            near("power_sums", n, r, sum[r], (float)want, (float)(error + 1e-6 * fabs(want)));
        }
    }
    kn->power_scores(e.s, n, used, &e.powers, degree, shift, score);
    for (int j = 0; j < n; j++) {
        double want = before[j], error = 1e-6 * fabs(want);
        for (int r = 0; r < used; r++) {
            const double x = exponent_of(&e, j, r),
                         more = spread ? (double)e.powers.spread[j] * e.powers.row_spread[r] : 0;
            const double y = degree * (x - shift[r]) + more;
            want += power(y);
            error += power_error(y, isfinite(x) ? 2 * (fabs(x) + fabs(shift[r]) + cap) + more : 0);
        }
        near(degree == 1 ? "power_scores" : "power_scores squared", n, j, score[j], (float)want,
             (float)(error + 1e-6 * fabs(want)));
    }
}

/* Exponents so large that their rounding would matter: the largest one, which is the shift, has the power 1 exactly,
 * and products that are equal have equal powers. */
static void test_far_powers(int n, int used)
{
    const int lanes = kn->lanes;
    for (float size = 1e3f; size < 1e30f; size *= 100) {
        const exponents e = random_exponents(n, used, 0, 0);
        float *shift = floats((size_t)lanes), *sum = floats((size_t)lanes), *score = floats((size_t)n),
              *weight = floats((size_t)n);
        for (int r = 0; r < used; r++)
            ((float *)e.powers.row)[r] = (r % 2 ? -1.0f : 1.0f) * (1 + fabsf(uniform())) * size;
        for (int r = 0; r < lanes; r++) {
            shift[r] = r < used ? -INFINITY : INFINITY;
            sum[r] = 0;
        }
        for (int j = 0; j < n; j++) {
            weight[j] = (float)(1 << j % 3);
            score[j] = 0;
        }
        kn->power_tops(e.s, n, used, &e.powers, shift);
        for (int r = used; r < lanes; r++) shift[r] = INFINITY;
        kn->power_sums(e.s, n, used, &e.powers, weight, shift, sum);
        kn->power_scores(e.s, n, used, &e.powers, 2, shift, score);
        for (int r = 0; r < used; r++) {
            double want = 0;
            for (int j = 0; j < n; j++) {
                const float x = e.s[j * lanes + r] * e.powers.key[j];
                want += weight[j] * power((double)(x * e.powers.row[r]) - shift[r]);
            }
            near("power_sums of far", n, r, sum[r], (float)want, (float)(want * 2e-3));
        }
        for (int j = 0; j < n; j++) {
            double want = 0;
            for (int r = 0; r < used; r++) {
                const float x = e.s[j * lanes + r] * e.powers.key[j];
                want += power(2 * ((double)(x * e.powers.row[r]) - shift[r]));
            }
            near("power_scores of far", n, j, score[j], (float)want, (float)(want * 2e-3 + 0x1p-126));
        }
    }
}

/* Each row alone, since the largest powers hide small ones in a sum: known values of power(x). */
static void test_power_values(void)
{
    static const float x[] = {0,     0.5f,  1,     -1,  -1.25f,    3.75f,    -100.5f, -127, -128,   -1e30f,
                              62.5f, 63.0f, 1e30f, 200, -INFINITY, INFINITY, NAN,     -126, 20.125f};
    const int n = sizeof x / sizeof *x, lanes = kn->lanes;
    float *s = floats((size_t)n * lanes), *key = floats((size_t)n), *row = floats((size_t)lanes),
          *shift = floats((size_t)lanes), *score = floats((size_t)n);
    for (int r = 0; r < lanes; r++) {
        for (int r2 = 0; r2 < lanes; r2++) {
            row[r2] = 1;
            shift[r2] = r2 == r ? 0 : INFINITY;
            for (int j = 0; j < n; j++) s[j * lanes + r2] = x[j];
        }
        for (int j = 0; j < n; j++) {
            key[j] = 1;
            score[j] = 0;
        }
        const dhsa_powers powers = {.key = key, .row = row};
        kn->power_scores(s, n, lanes, &powers, 1, shift, score);
        for (int j = 0; j < n; j++) near("power", j, r, score[j], (float)power(x[j]), 0);
    }
}

static void test_sum_rows(int n, int dim, int dtype)
{
    const int64_t size = dhsa_dtype_size(dtype), apart = dim + n % 3;
    char *rows = guarded((size_t)((n - 1) * apart + dim) * (size_t)size);
    float *sum = floats((size_t)dim), *want = floats((size_t)dim);
    for (int64_t i = 0; i < (n - 1) * apart + dim; i++) {
        const float x = uniform();
        const uint16_t half = dtype == DHSA_F16 ? dhsa_to_f16(x) : dhsa_to_bf16(x);
        memcpy(rows + i * size, dtype == DHSA_F32 ? (const void *)&x : &half, (size_t)size);
    }
    for (int back = 0; back < 2; back++) {
        const char *first = back ? rows + (n - 1) * apart * size : rows;
        const ptrdiff_t stride = (ptrdiff_t)(back ? -apart * size : apart * size);
        kn->sum_rows(first, stride, dtype, n, dim, sum);
        ref->load(first, dtype, dim, want);
        for (int i = 1; i < n; i++) ref->add(first + i * stride, dtype, dim, want);
        for (int d = 0; d < dim; d++) near("sum_rows", n, d, sum[d], want[d], 0);
    }
}

/* Compares with the same operations of single numbers, exactly: all tiers must choose by the same numbers. */
static void quantize_as_expected(const char *what, const float *x, int dim)
{
    int8_t *whole = guarded((size_t)dim);
    float most = 0;
    for (int d = 0; d < dim; d++) most = fmaxf(most, fabsf(x[d]));
    const float factor = 127.0f / most;
    const int small = isinf(factor);
    near(what, dim, -1, kn->quantize(x, dim, whole), small ? 0 : most / 127.0f, 0);
    for (int d = 0; d < dim; d++) {
        const volatile float scaled = x[d] * factor;
        near(what, dim, d, whole[d], small ? 0 : rintf(scaled), 0);
    }
}

static void test_quantize(int dim)
{
    float *x = random_floats((size_t)dim);
    quantize_as_expected("quantize", x, dim);
    x[dim / 2] = FLT_MAX;
    quantize_as_expected("quantize large", x, dim);
    x[dim / 2] = -FLT_MAX;
    quantize_as_expected("quantize large", x, dim);
    for (int d = 0; d < dim; d++) x[d] = (float)(d % 127) - 62.5f; /* ties, since the factor is 1 */
    x[dim - 1] = dim % 2 ? 127 : -127;
    quantize_as_expected("quantize ties", x, dim);
    if (dim > 1) {
        int8_t *whole = guarded((size_t)dim);
        const float tie[] = {0.5f, 1.5f, 2.5f, -0.5f, -1.5f, -2.5f, 125.5f}, even[] = {0, 2, 2, 0, -2, -2, 126};
        for (int i = 0; i < 7; i++) {
            x[0] = tie[i];
            near("quantize ties", dim, i, kn->quantize(x, dim, whole), 1, 0);
            near("quantize ties", dim, i, whole[0], even[i], 0);
        }
    }
    for (int d = 0; d < dim; d++) x[d] = d % 2 ? 0.0f : -0.0f;
    quantize_as_expected("quantize zeros", x, dim);
    /* The smallest largest magnitude that has a finite factor, the one below it, and denormal numbers beside it. */
    float least = 127.0f / FLT_MAX;
    while (isinf(127.0f / least)) least = nextafterf(least, 1);
    while (!isinf(127.0f / nextafterf(least, 0))) least = nextafterf(least, 0);
    for (int d = 0; d < dim; d++) x[d] = uniform() * 0x1p-127f;
    quantize_as_expected("quantize denormals", x, dim);
    x[dim - 1] = nextafterf(least, 0);
    quantize_as_expected("quantize small", x, dim);
    x[dim - 1] = least;
    quantize_as_expected("quantize small", x, dim);
}

/* Number i of a panel; those to which 128 is added are unsigned. */
static int number_of(const dhsa_byte_kernels *bytes, const void *panel, ptrdiff_t i)
{
    if (bytes->size == 2) return ((const int16_t *)panel)[i];
    return bytes->added ? ((const uint8_t *)panel)[i] : ((const int8_t *)panel)[i];
}

/* Products of bytes are exact, and so is the layout of a panel. */
static void test_bytes(const dhsa_byte_kernels *bytes, int n, int dim, int rows)
{
    const int lanes = kn->lanes, pitch = (int)dhsa_round_up(dim, 4), size = bytes->size, word = 4 / size;
    void *panel = guarded((size_t)pitch * lanes * size), *keys = guarded((size_t)n * pitch * size);
    int8_t *k = guarded((size_t)n * pitch);
    int32_t *bias = guarded((size_t)n * sizeof *bias);
    float *s = floats((size_t)n * lanes);
    const int8_t **row = guarded((size_t)rows * sizeof *row);
    for (int r = 0; r < rows; r++) {
        int8_t *x = guarded((size_t)dim);
        for (int d = 0; d < dim; d++) x[d] = (int8_t)(r == 0 ? 127 : r == 1 ? -127 : lrintf(uniform() * 127));
        row[r] = x;
    }
    memset(k, 0, (size_t)n * pitch);
    for (int j = 0; j < n; j++) {
        int sum = 0;
        for (int d = 0; d < dim; d++) {
            k[j * pitch + d] = (int8_t)(j == 0 ? 127 : j == 1 ? -127 : lrintf(uniform() * 127));
            sum += k[j * pitch + d];
        }
        bias[j] = -128 * sum;
    }
    memcpy(keys, k, (size_t)(size == 1 ? n * pitch : 0));
    for (int i = 0; i < n * pitch && size == 2; i++) ((int16_t *)keys)[i] = k[i];
    memset(panel, 0xaa, (size_t)pitch * lanes * size);
    bytes->pack_panel(row, rows, dim, panel);
    int wrong = 0;
    for (int d = 0; d < pitch; d++)
        for (int r = 0; r < lanes; r++)
            wrong += number_of(bytes, panel, (ptrdiff_t)(d / word * lanes + r) * word + d % word) !=
                     (r < rows && d < dim ? row[r][d] : 0) + bytes->added;
    near("bytes pack_panel", rows, dim, (float)wrong, 0, 0);
    bytes->qk(panel, keys, bias, n, dim, rows, s, NULL);
    for (int j = 0; j < n; j++)
        for (int r = 0; r < rows; r++) {
            int want = 0;
            for (int d = 0; d < dim; d++) want += row[r][d] * k[j * pitch + d];
            near("bytes qk", j, r, s[j * lanes + r], (float)want, 0);
        }
}

/* every: 1, or larger to test only one of so many cases. */
static void test_all_bytes(const dhsa_byte_kernels *bytes, int every)
{
    int at = 0;
    for (int dim = 1; dim <= 130; dim++)
        for (int n = 1; n <= 20; n++) {
            if (at++ % every) continue;
            test_bytes(bytes, n, dim, 1 + (dim + 7 * n) % kn->lanes);
            forget();
        }
    for (int rows = 1; rows <= kn->lanes; rows += every) {
        test_bytes(bytes, 11, DHSA_MAX_HEAD_DIM, rows);
        forget();
    }
}

/* A CPU runs one of the two tables of the AVX2 tier. Here both are run, the one for AVX-VNNI with the instruction
 * emulated where the CPU lacks it. */
static void test_bytes_of_avx2(void)
{
#if DHSA_X86 && DHSA_HAVE_AVXVNNI && defined(__linux__)
    if (strcmp(kn->isa, "avx2") != 0) return;
    const int native = dhsa_cpu_has_avx_vnni();
    if (!native) emulate_avx_vnni();
    test_all_bytes(native ? &dhsa_bytes_avx2 : &dhsa_bytes_avx2vnni, native ? 1 : 211);
#endif
}

static void cases(void)
{
    static const int dims[] = {1, 3, 8, 20, 64, 80, 256, 576}, counts[] = {1, 2, 7, 13, 64};
    for (size_t i = 0; i < sizeof counts / sizeof *counts; i++) {
        const int n = counts[i];
        for (size_t d = 0; d < sizeof dims / sizeof *dims; d++) {
            for (int dtype = DHSA_F32; dtype <= DHSA_BF16; dtype++) test_sum_rows(n, dims[d], dtype);
            test_quantize(dims[d]);
            forget();
        }
        test_add_sums(n);
        for (int used = 1; used <= kn->lanes; used++)
            for (int capped = 0; capped < 2; capped++) {
                const float cap = capped ? 40.0f : 0.0f;
                test_power_tops(n, used, cap);
                for (int degree = 1; degree <= 2; degree++)
                    for (int spread = 0; spread < 2; spread++) test_powers(n, used, cap, degree, spread);
                forget();
            }
        for (int used = 1; used <= kn->lanes; used += 3) {
            test_far_powers(n, used);
            forget();
        }
    }
    test_power_values();
    if (kn->bytes) test_all_bytes(kn->bytes, 1);
    test_bytes_of_avx2();
}

int main(void) { return of_every_tier(cases); }
