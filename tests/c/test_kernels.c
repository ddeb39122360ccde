/* test_kernels.c: compares every kernel of every tier that this CPU supports with the scalar tier on the same rows.
 * Every buffer ends at a guard page, so that a read or write past it always crashes. Prints the number of comparisons;
 * exits with 1 if there is a difference. Built and run by tests/core/test_programs.py, for this CPU and, if a cross
 * compiler and an emulator are installed, for 64-bit Arm. */
#include <float.h>
#include <math.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "core/internal.h"
#include "kernels/kernels.h"
#include "kernels/cpu.h"
#include "kernels/half.h"
#include "kernels/tiers.h"
#include "avx_vnni.h"

#if DHSA_X86 && DHSA_HAVE_AVXVNNI && defined(__linux__)
extern const dhsa_byte_kernels dhsa_bytes_avx2, dhsa_bytes_avx2vnni;
#endif

static const dhsa_kernels *ref, *kn;
static int failures, checks;
static uint64_t state = 88172645463325252u;

static float uniform(void)
{
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return (float)(state >> 40) * 0x1p-23f - 1.0f;
}

/* What guarded() mapped since the last forget(). A process may only have a limited number of mappings. */
static struct {
    void *base;
    size_t bytes;
} made[8192];
static int n_made;

static void forget(void)
{
    while (n_made > 0) {
        n_made--;
        munmap(made[n_made].base, made[n_made].bytes);
    }
}

/* Returns memory that ends where an unreadable page begins. */
static void *guarded(size_t bytes)
{
    const size_t page = (size_t)sysconf(_SC_PAGESIZE), pages = (bytes + page - 1) / page + 1;
    char *base = mmap(NULL, pages * page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (n_made == sizeof made / sizeof *made || base == MAP_FAILED ||
        mprotect(base + (pages - 1) * page, page, PROT_NONE) != 0) {
        perror("guarded");
        _exit(2);
    }
    made[n_made].base = base;
    made[n_made++].bytes = pages * page;
    return base + (pages - 1) * page - bytes;
}

static float *floats(size_t n) { return guarded(n * sizeof(float)); }

static float *random_floats(size_t n)
{
    float *x = floats(n);
    for (size_t i = 0; i < n; i++) x[i] = uniform();
    return x;
}

static void near(const char *what, int a, int b, float got, float want, float tolerance)
{
    checks++;
    if ((isnan(got) && isnan(want)) || got == want || fabsf(got - want) <= tolerance) return;
    if (failures++ < 20)
        printf("%s %s (%d, %d): got %.9g, want %.9g, tolerance %.3g\n", kn->isa, what, a, b, got, want, tolerance);
}

/* Random rows of one dtype and pointers to them. */
static const void **random_rows(int n, int dim, int dtype)
{
    const void **rows = guarded((size_t)n * sizeof *rows);
    for (int r = 0; r < n; r++) {
        if (dtype == DHSA_F32) {
            rows[r] = random_floats((size_t)dim);
        } else {
            uint16_t *half = guarded((size_t)dim * 2);
            for (int d = 0; d < dim; d++)
                half[d] = dtype == DHSA_F16 ? dhsa_to_f16(uniform()) : dhsa_to_bf16(uniform());
            rows[r] = half;
        }
    }
    return rows;
}

/* Copies one part of a panel: the panels of the scalar tier hold fewer rows. */
static void split(const float *panel, int part, int dim, float *out)
{
    for (int d = 0; d < dim; d++)
        for (int r = 0; r < ref->lanes; r++)
            out[d * ref->lanes + r] = panel[(ptrdiff_t)d * kn->lanes + part * ref->lanes + r];
}

static void test_products(int n, int dim)
{
    const int lanes = kn->lanes, small = ref->lanes;
    float *q = random_floats((size_t)dim * lanes), *k = random_floats((size_t)n * dim), *s = floats((size_t)n * lanes);
    float *q_part = floats((size_t)dim * small), *s_part = floats((size_t)n * small);
    kn->qk(q, k, dim, n, dim, lanes, s, NULL);
    for (int part = 0; part < lanes / small; part++) {
        split(q, part, dim, q_part);
        ref->qk(q_part, k, dim, n, dim, small, s_part, NULL);
        for (int j = 0; j < n; j++)
            for (int r = 0; r < small; r++)
                near("qk", j, part * small + r, s[(ptrdiff_t)j * lanes + part * small + r], s_part[j * small + r],
                     1e-6f * (float)dim);
    }
    /* values: the same rows packed by each tier, without the first key, as attention does at the edge of a window */
    const void **rows = random_rows(n, dim, DHSA_F32);
    const int step = kn->value_step, ref_step = ref->value_step;
    float *v = floats((size_t)dhsa_round_up(dim, step) * n), *v_ref = floats((size_t)dhsa_round_up(dim, ref_step) * n);
    float *o = random_floats((size_t)dim * lanes), *o_part = floats((size_t)dim * small),
          *alpha = random_floats((size_t)lanes);
    float *alpha_part = floats((size_t)small), *before = floats((size_t)dim * lanes);
    memcpy(before, o, sizeof(float) * (size_t)dim * lanes);
    if (kn->pack_values(rows, DHSA_F32, n, dim, (ptrdiff_t)n * step, v) |
        ref->pack_values(rows, DHSA_F32, n, dim, (ptrdiff_t)n * ref_step, v_ref))
        near("finite values", n, dim, 1, 0, 0);
    const int skip = n > 1;
    for (int used = 1; used < lanes; used += 5) { /* a panel that is not full has the same values in its used rows */
        float *part = floats((size_t)n * lanes), *sum = floats((size_t)dim * lanes),
              *full = floats((size_t)dim * lanes);
        memcpy(sum, o, sizeof(float) * (size_t)dim * lanes);
        memcpy(full, o, sizeof(float) * (size_t)dim * lanes);
        kn->qk(q, k, dim, n, dim, used, part, NULL);
        kn->pv(s, v, (ptrdiff_t)n * step, n, dim, used, alpha, sum, NULL);
        kn->pv(s, v, (ptrdiff_t)n * step, n, dim, lanes, alpha, full, NULL);
        for (int r = 0; r < used; r++) {
            for (int j = 0; j < n; j++) near("qk of part", j, r, part[j * lanes + r], s[j * lanes + r], 0);
            for (int d = 0; d < dim; d++) near("pv of part", d, r, sum[d * lanes + r], full[d * lanes + r], 0);
        }
    }
    kn->pv(s + skip * lanes, v + skip * step, (ptrdiff_t)n * step, n - skip, dim, lanes, alpha, o, NULL);
    for (int part = 0; part < lanes / small; part++) {
        split(before, part, dim, o_part);
        split(s, part, n, s_part);
        split(alpha, part, 1, alpha_part);
        ref->pv(s_part + skip * small, v_ref + skip * ref_step, (ptrdiff_t)n * ref_step, n - skip, dim, small,
                alpha_part, o_part, NULL);
        for (int d = 0; d < dim; d++)
            for (int r = 0; r < small; r++)
                near("pv", d, part * small + r, o[(ptrdiff_t)d * lanes + part * small + r], o_part[d * small + r],
                     3e-5f * (float)n);
    }
}

static void test_softmax(int n, int masked, float softcap)
{
    const int lanes = kn->lanes, small = ref->lanes;
    float *s = floats((size_t)n * lanes), *m = floats((size_t)lanes), *l = floats((size_t)lanes),
          *alpha = floats((size_t)lanes);
    float *s2 = floats((size_t)n * small), *m2 = floats((size_t)small), *l2 = floats((size_t)small),
          *alpha2 = floats((size_t)small);
    float *s0 = floats((size_t)n * lanes), *m0 = floats((size_t)lanes), *l0 = floats((size_t)lanes);
    int32_t *lo = guarded((size_t)lanes * 4), *hi = guarded((size_t)lanes * 4), *lo2 = guarded((size_t)small * 4),
            *hi2 = guarded((size_t)small * 4);
    const int base = 5;
    for (int i = 0; i < n * lanes; i++) s0[i] = s[i] = uniform() * 80;
    for (int r = 0; r < lanes; r++) {
        m0[r] = m[r] = r % 3 ? uniform() * 10 : -INFINITY;
        l0[r] = l[r] = r % 3 ? 1.0f + r : 0;
        lo[r] = base + r % (n + 2) - 1;
        hi[r] = base + n - r % (n + 3);
    }
    /* a NaN, infinities, and a row that sees nothing */
    s0[(n / 2) * lanes + 1] = s[(n / 2) * lanes + 1] = NAN;
    s0[(n / 2) * lanes + 2] = s[(n / 2) * lanes + 2] = INFINITY;
    s0[(n / 2) * lanes + 3] = s[(n / 2) * lanes + 3] = -INFINITY;
    for (int j = 0; j < n; j++) s0[j * lanes + 4] = s[j * lanes + 4] = -INFINITY;
    m0[4] = m[4] = -INFINITY;
    l0[4] = l[4] = 0;
    const int used = 1 + n % lanes;
    float *part = floats((size_t)n * lanes), *m_part = floats((size_t)lanes), *l_part = floats((size_t)lanes);
    memcpy(part, s, sizeof(float) * (size_t)n * lanes);
    memcpy(m_part, m, sizeof(float) * (size_t)lanes);
    memcpy(l_part, l, sizeof(float) * (size_t)lanes);
    kn->softmax(part, n, used, base, masked ? lo : NULL, hi, 0.3f, softcap, m_part, l_part, alpha);
    kn->softmax(s, n, lanes, base, masked ? lo : NULL, hi, 0.3f, softcap, m, l, alpha);
    for (int r = 0; r < used; r++) {
        near("softmax of part", n, r, m_part[r], m[r], 0);
        near("softmax of part", n, r, l_part[r], l[r], 0);
        for (int j = 0; j < n; j++) near("softmax of part", j, r, part[j * lanes + r], s[j * lanes + r], 0);
    }
    for (int part = 0; part < lanes / small; part++) {
        split(s0, part, n, s2);
        split(m0, part, 1, m2);
        split(l0, part, 1, l2);
        memcpy(lo2, lo + part * small, sizeof(int32_t) * (size_t)small);
        memcpy(hi2, hi + part * small, sizeof(int32_t) * (size_t)small);
        ref->softmax(s2, n, small, base, masked ? lo2 : NULL, hi2, 0.3f, softcap, m2, l2, alpha2);
        for (int r = 0; r < small; r++) {
            const int at = part * small + r;
            near("softmax m", n, at, m[at], m2[r], 2e-5f);
            near("softmax l", n, at, l[at], l2[r], 3e-5f * (1 + fabsf(l2[r])));
            near("softmax alpha", n, at, alpha[at], alpha2[r], 3e-5f);
            for (int j = 0; j < n; j++) {
                const float want = s2[j * small + r];
                near("softmax p", j, at, s[(ptrdiff_t)j * lanes + at], want, 3e-5f * (1 + fabsf(want)));
            }
        }
    }
}

/* Compares the largest products that rows see with a loop. Products that they do not see, and rows past `used`, may
 * hold anything. */
static void test_tops(int n, int masked)
{
    const int lanes = kn->lanes, base = 5, used = 1 + n % lanes;
    float *s = random_floats((size_t)n * lanes), *top = floats((size_t)lanes);
    int32_t *lo = guarded((size_t)lanes * 4), *hi = guarded((size_t)lanes * 4);
    for (int r = 0; r < lanes; r++) {
        lo[r] = base + r % (n + 2) - 1;
        hi[r] = base + n - r % (n + 3);
    }
    s[n / 2 * lanes] = NAN;
    s[n / 2 * lanes + 3] = INFINITY;
    s[n / 3 * lanes + 5] = -INFINITY;
    kn->tops(s, n, used, base, masked ? lo : NULL, hi, top);
    for (int r = 0; r < used; r++) {
        float want = -INFINITY;
        for (int j = 0; j < n; j++) {
            if (masked && (base + j < lo[r] || base + j >= hi[r])) continue;
            const float x = s[j * lanes + r];
            want = isnan(want) || !isfinite(x) ? NAN : fmaxf(want, x);
        }
        near("tops", n, r, top[r], want, 0);
    }
}

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

static void test_moves(int n, int dim, int dtype)
{
    const int lanes = kn->lanes, step = kn->value_step, padded = (int)dhsa_round_up(dim, step);
    const void **rows = random_rows(n, dim, dtype);
    float *a = floats((size_t)n * dim), *b = floats((size_t)n * dim), *v = floats((size_t)(n + 1) * padded);
    const ptrdiff_t v_stride = (ptrdiff_t)(n + 1) * step; /* a strip may be longer than the values in it */
    kn->pack_rows(rows, dtype, n, dim, a);
    ref->pack_rows(rows, dtype, n, dim, b);
    near("finite", n, dim, (float)kn->pack_values(rows, dtype, n, dim, v_stride, v), 0, 0);
    for (int j = 0; j < n; j++)
        for (int d = 0; d < padded; d++) {
            const float want = d < dim ? b[j * dim + d] : 0;
            if (d < dim) near("pack_rows", j, d, a[j * dim + d], want, 0);
            near("pack_values", j, d, v[d / step * v_stride + j * step + d % step], want, 0);
        }
    if (dtype == DHSA_F32) {
        float *row = (float *)rows[n - 1];
        const float kept = row[dim - 1];
        const float bad[] = {NAN, INFINITY, -INFINITY};
        for (int i = 0; i < 3; i++) {
            row[dim - 1] = bad[i];
            near("not finite", n, i, (float)(kn->pack_values(rows, dtype, n, dim, v_stride, v) != 0), 1, 0);
        }
        row[dim - 1] = kept;
    }
    const int used = DHSA_MIN(n, lanes);
    float *panel = floats((size_t)dim * lanes), *factor = floats((size_t)lanes);
    kn->pack_panel(rows, dtype, used, dim, -2.0f, panel);
    for (int r = 0; r < lanes; r++) {
        factor[r] = 1.0f / (1.0f + (float)r);
        for (int d = 0; d < dim; d++)
            near("pack_panel", r, d, panel[(ptrdiff_t)d * lanes + r], r < used ? -2.0f * b[r * dim + d] : 0, 0);
    }
    void **out = guarded((size_t)used * sizeof *out);
    for (int r = 0; r < used; r++) out[r] = guarded((size_t)dim * (size_t)dhsa_dtype_size(dtype));
    kn->store_panel(panel, factor, used, dim, dtype, out);
    for (int r = 0; r < used; r++)
        for (int d = 0; d < dim; d++) {
            const float want = panel[(ptrdiff_t)d * lanes + r] * factor[r];
            if (dtype == DHSA_F32)
                near("store_panel", r, d, ((float *)out[r])[d], want, 0);
            else
                near("store_panel", r, d, ((uint16_t *)out[r])[d],
                     dtype == DHSA_F16 ? dhsa_to_f16(want) : dhsa_to_bf16(want), 0);
        }
    float *sum = random_floats((size_t)dim), *copy = floats((size_t)dim);
    memcpy(copy, sum, sizeof(float) * (size_t)dim);
    kn->add(rows[0], dtype, dim, sum);
    for (int d = 0; d < dim; d++) near("add", 0, d, sum[d], copy[d] + b[d], 0);
    near("dot", dim, dtype, kn->dot(a, sum, dim), ref->dot(a, sum, dim), 1e-6f * (float)dim);
}

/* Widens all 65,536 16-bit values, and narrows fp32 values around every rounding boundary. */
static void test_conversions(int dtype)
{
    uint16_t *half = guarded(65536 * 2);
    float *got = floats(65536);
    for (int i = 0; i < 65536; i++) half[i] = (uint16_t)i;
    kn->load(half, dtype, 65536, got);
    for (int i = 0; i < 65536; i++)
        near("widen", i, dtype, got[i], dtype == DHSA_F16 ? dhsa_from_f16((uint16_t)i) : dhsa_from_bf16((uint16_t)i),
             0);
    const int lanes = kn->lanes;
    float *panel = floats((size_t)lanes), *one = floats((size_t)lanes);
    uint16_t back[DHSA_MAX_LANES];
    void *rows[DHSA_MAX_LANES];
    for (int r = 0; r < lanes; r++) {
        one[r] = 1;
        rows[r] = back + r;
    }
    for (int i = 0; i < 65536; i++) {
        /* the value itself, the midpoint between it and the next value, and the two fp32 values next to the midpoint */
        const float x = dtype == DHSA_F16 ? dhsa_from_f16((uint16_t)i) : dhsa_from_bf16((uint16_t)i);
        const float y = dtype == DHSA_F16 ? dhsa_from_f16((uint16_t)(i + 1)) : dhsa_from_bf16((uint16_t)(i + 1)),
                    mid = x / 2 + y / 2;
        const float tries[4] = {x, mid, nextafterf(mid, x), nextafterf(mid, y)};
        for (int r = 0; r < 4; r++) panel[r] = tries[r];
        kn->store_panel(panel, one, 4, 1, dtype, rows);
        for (int r = 0; r < 4; r++) {
            const uint16_t want = dtype == DHSA_F16 ? dhsa_to_f16(tries[r]) : dhsa_to_bf16(tries[r]);
            if (isnan(tries[r]))
                near("narrow NaN", i, r, isnan(dtype == DHSA_F16 ? dhsa_from_f16(back[r]) : dhsa_from_bf16(back[r])), 1,
                     0);
            else
                near("narrow", i, r, back[r], want, 0);
        }
    }
}

/* Products of 16-bit values. Packing must be exact; products are compared with sums in float64, where each product of
 * two values is exact. */
static void test_pairs(const dhsa_pair_kernels *half, int n, int dim, int dtype)
{
    const int fp16 = dtype == DHSA_F16;
    float (*number)(uint16_t) = fp16 ? dhsa_from_f16 : dhsa_from_bf16;
    const int lanes = kn->lanes, K = (int)dhsa_round_up(dim, DHSA_PAIR_STEP), N = (int)dhsa_round_up(n, DHSA_PAIR_STEP);
    const int used = DHSA_MIN(n, lanes);
    const void **keys = random_rows(n, dim, dtype), **queries = random_rows(used, dim, dtype);
    uint16_t *q = guarded((size_t)K * lanes * 2), *k = guarded((size_t)N * K * 2), *v = guarded((size_t)K * N * 2);
    uint16_t *p = guarded((size_t)N * lanes * 2);
    float *s = floats((size_t)N * lanes), *o = random_floats((size_t)K * lanes), *before = floats((size_t)K * lanes);
    float *alpha = random_floats((size_t)lanes), *top = floats((size_t)lanes);
    half->begin();
    half->pack_panel(queries, used, dim, n % 2, q);
    half->pack_keys(keys, n, dim, k);
    near("pairs finite", n, dim, (float)half->pack_values(keys, n, dim, N, v), 0, 0);
    for (int d = 0; d < K; d++) {
        for (int r = 0; r < lanes; r++) {
            const uint16_t want = r < used && d < dim ? ((const uint16_t *)queries[r])[d] ^ (n % 2 ? 0x8000 : 0) : 0;
            near("pairs pack_panel", d, r, q[((ptrdiff_t)(d / 2) * lanes + r) * 2 + d % 2] & (want ? 0xffff : 0x7fff),
                 want, 0);
        }
        for (int j = 0; j < n; j++)
            near("pairs pack_keys", j, d, k[dhsa_square(j, d, K)], d < dim ? ((const uint16_t *)keys[j])[d] : 0, 0);
        for (int j = 0; j < N; j++)
            near("pairs pack_values", j, d, v[dhsa_square(d, j, N)],
                 j < n && d < dim ? ((const uint16_t *)keys[j])[d] : 0, 0);
    }
    half->qk(q, k, n, dim, s, top, NULL);
    for (int j = 0; j < n; j++)
        for (int r = 0; r < used; r++) {
            double sum = 0;
            for (int d = 0; d < dim; d++)
                sum += (double)number(((const uint16_t *)queries[r])[d]) * number(((const uint16_t *)keys[j])[d]);
            near("pairs qk", j, r, s[(ptrdiff_t)j * lanes + r], (float)(n % 2 ? -sum : sum), 1e-6f * (float)dim);
        }
    for (int r = 0; r < used; r++) {
        float most = -INFINITY;
        for (int j = 0; j < n; j++) most = fmaxf(most, s[(ptrdiff_t)j * lanes + r]);
        near("pairs qk top", n, r, top[r], most, 0);
    }
    /* The softmax must equal the fp32 one, with its probabilities rounded. */
    for (int masked = 0; masked < 2; masked++) {
        const size_t room = (size_t)lanes;
        float *m = floats(room), *l = floats(room), *m_want = floats(room), *l_want = floats(room),
              *want = floats((size_t)N * lanes);
        int32_t *lo = guarded(room * 4), *hi = guarded(room * 4);
        dhsa_exp_job job;
        for (int r = 0; r < lanes; r++) {
            m[r] = m_want[r] = -INFINITY;
            l[r] = l_want[r] = 0;
            lo[r] = 5 + r % 3;
            hi[r] = 5 + n - r % 2;
        }
        for (int r = 0; r < lanes; r++) top[r] = -INFINITY;
        for (int j = 0; j < N * lanes; j++) {
            want[j] = s[j] = uniform();
            if (j / lanes < n) top[j % lanes] = fmaxf(top[j % lanes], s[j]);
        }
        half->softmax(s, top, n, 5, masked ? lo : NULL, hi, 1.5f, 0, m, l, alpha, p, NULL, &job);
        half->exp(&job);
        kn->softmax(want, n, lanes, 5, masked ? lo : NULL, hi, 1.5f, 0, m_want, l_want, alpha);
        for (int r = 0; r < lanes; r++) {
            near("pairs softmax m", n, r, m[r], m_want[r], 0);
            near("pairs softmax l", n, r, l[r], l_want[r], 4e-6f * l_want[r]);
            for (int j = 0; j < N; j++)
                near("pairs softmax p", j, r, number(p[((ptrdiff_t)(j / 2) * lanes + r) * 2 + j % 2]),
                     j < n ? want[(ptrdiff_t)j * lanes + r] : 0, (fp16 ? 0x1p-12f : 0x1p-9f) + 3e-6f);
        }
    }
    for (int scaled = 0; scaled < 2; scaled++) {
        for (int r = 0; r < lanes && !scaled; r++) alpha[r] = 1; /* first without scaling, then with it */
        for (int r = 0; r < lanes && scaled; r++) alpha[r] = uniform();
        memcpy(before, o, sizeof(float) * (size_t)K * lanes);
        half->pv(p, v, (ptrdiff_t)N * 16, n, dim, alpha, o, NULL, NULL);
        for (int d = 0; d < dim; d++)
            for (int r = 0; r < lanes; r++) {
                double sum = (double)before[(ptrdiff_t)d * lanes + r] * alpha[r];
                for (int j = 0; j < n; j++)
                    sum += (double)number(p[((ptrdiff_t)(j / 2) * lanes + r) * 2 + j % 2]) *
                           number(v[dhsa_square(d, j, N)]);
                near("pairs pv", d, r, o[(ptrdiff_t)d * lanes + r], (float)sum, 1e-6f * (float)(n + 4));
            }
    }
    uint16_t *last = (uint16_t *)keys[n - 1],
             bad[] = {fp16 ? 0x7c00 : 0x7f80, fp16 ? 0xfc00 : 0xff80, fp16 ? 0x7e01 : 0x7fc1};
    for (int i = 0; i < 3; i++) {
        last[dim - 1] = bad[i];
        near("pairs not finite", n, i, (float)(half->pack_values(keys, n, dim, N, v) != 0), 1, 0);
    }
    half->end();
}

static float number(const void *row, int dtype, int d)
{
    return dtype == DHSA_F32   ? ((const float *)row)[d]
           : dtype == DHSA_F16 ? dhsa_from_f16(((const uint16_t *)row)[d])
                               : dhsa_from_bf16(((const uint16_t *)row)[d]);
}

/* Returns pointers to random rows, followed by invalid ones: a kernel may prefetch at these, but not read from them. */
static const void **keys_of(int n, int dim, int dtype)
{
    const void **rows = random_rows(n, dim, dtype), **all = guarded((size_t)(n + DHSA_DECODE_AHEAD) * sizeof *all);
    memset(all, 0x55, (size_t)(n + DHSA_DECODE_AHEAD) * sizeof *all);
    memcpy(all, rows, (size_t)n * sizeof *all);
    return all;
}

/* Two parts of a decoding step, and the result of merging them. */
static void test_decode(int n, int dim, int dtype, int rows)
{
    const int padded = (int)dhsa_round_up(dim, DHSA_DECODE_STEP), stride = n + DHSA_DECODE_STEP - 1;
    const void **queries = random_rows(rows, dim, dtype), **keys = keys_of(n, dim, dtype),
               **values = keys_of(n, dim, dtype);
    const size_t sums = (size_t)rows * padded, scores = (size_t)rows * stride;
    float *q = floats(sums), *o = floats(2 * sums), *s = floats(scores), *q2 = floats(sums), *s2 = floats(scores);
    for (int r = 0; r < rows; r++) {
        kn->decode_load(queries[r], dtype, dim, -1.0f, q + r * padded);
        ref->decode_load(queries[r], dtype, dim, -1.0f, q2 + r * padded);
    }
    kn->decode_qk(q, padded, rows, keys, dtype, n, dim, s, stride);
    ref->decode_qk(q2, padded, rows, keys, dtype, n, dim, s2, stride);
    for (int r = 0; r < rows; r++)
        for (int j = 0; j < n; j++) {
            double sum = 0;
            for (int d = 0; d < dim; d++) sum -= (double)number(queries[r], dtype, d) * number(keys[j], dtype, d);
            near("decode_qk", r, j, s[r * stride + j], s2[r * stride + j], 1e-6f * (float)dim);
            near("decode_qk in float64", r, j, s[r * stride + j], (float)sum, 1e-6f * (float)dim);
        }
    /* the second part is the first key twice, added in two calls */
    memset(o, 0, 2 * sums * sizeof *o);
    kn->decode_pv(s, stride, rows, values, dtype, n, dim, o, padded);
    kn->decode_pv(s, stride, rows, values, dtype, 1, dim, o + sums, padded);
    kn->decode_pv(s, stride, rows, values, dtype, 1, dim, o + sums, padded);
    float *weight = floats(2);
    weight[0] = 0.5f;
    weight[1] = 3.0f;
    for (int r = 0; r < rows; r++) {
        void *row = guarded((size_t)dim * (size_t)dhsa_dtype_size(dtype));
        kn->decode_merge(o + r * padded, (ptrdiff_t)sums, weight, 2, 7.0f, dim, dtype, row);
        for (int d = 0; d < dim; d++) {
            double sum = 6.0 * s[r * stride] * number(values[0], dtype, d);
            for (int j = 0; j < n; j++) sum += 0.5 * s[r * stride + j] * number(values[j], dtype, d);
            const float rounding = dtype == DHSA_F32   ? 0
                                   : dtype == DHSA_F16 ? 0x1p-11f
                                                       : 0x1p-8f,
                        want = (float)(sum / 7);
            near("decode_pv", r, d, number(row, dtype, d), want, 1e-6f * (float)(n + 6) + rounding * fabsf(want));
        }
    }
}

static void test_decode_softmax(int n, float softcap)
{
    float *s = floats((size_t)n + DHSA_DECODE_STEP - 1), *s2 = floats((size_t)n + DHSA_DECODE_STEP - 1);
    float m, l, m2, l2;
    /* finite logits, a NaN, infinities, only -inf, and logits so large that their rounding matters */
    for (int kind = 0; kind < 6; kind++) {
        for (int j = 0; j < n; j++) s2[j] = s[j] = kind == 4 ? -INFINITY : uniform() * (kind == 5 ? 1e12f : 80.0f);
        const float bad[] = {1, NAN, INFINITY, -INFINITY};
        if (kind < 4) s2[n / 2] = s[n / 2] = bad[kind];
        kn->decode_softmax(s, n, 0.3f, softcap, &m, &l);
        ref->decode_softmax(s2, n, 0.3f, softcap, &m2, &l2);
        near("decode_softmax l", n, kind, l, kind == 1 ? NAN : l2, 3e-5f * (1 + fabsf(l2)));
        if (kind == 1) continue; /* a row with a NaN has no defined maximum: it depends on the vector width */
        near("decode_softmax m", n, kind, m, m2, 2e-5f + 1e-6f * fabsf(m2));
        for (int j = 0; j < n; j++) near("decode_softmax p", j, kind, s[j], s2[j], 3e-5f);
    }
    kn->decode_softmax(s, 0, 0.3f, softcap, &m, &l);
    near("decode_softmax of nothing, m", 0, 0, m, -INFINITY, 0);
    near("decode_softmax of nothing, l", 0, 0, l, 0, 0);
}

int main(void)
{
    static const int dims[] = {1, 3, 8, 20, 64, 80, 256, 576}, counts[] = {1, 2, 7, 13, 64};
    ref = dhsa_kernels_find("scalar");
    for (int tier = 0; dhsa_isa_detected(tier); tier++) {
        kn = dhsa_kernels_find(dhsa_isa_detected(tier));
        checks = 0;
        for (size_t i = 0; i < sizeof counts / sizeof *counts; i++) {
            const int n = counts[i];
            for (size_t d = 0; d < sizeof dims / sizeof *dims; d++) {
                test_products(n, dims[d]);
                for (int dtype = DHSA_F32; dtype <= DHSA_BF16; dtype++) {
                    test_moves(n, dims[d], dtype);
                    test_sum_rows(n, dims[d], dtype);
                }
                test_quantize(dims[d]);
                if (kn->bf16) test_pairs(kn->bf16, n, dims[d], DHSA_BF16);
                if (kn->f16) test_pairs(kn->f16, n, dims[d], DHSA_F16);
                for (int dtype = DHSA_F32; dtype <= DHSA_BF16; dtype++)
                    for (int rows = 1; rows <= 7; rows++) {
                        test_decode(n, dims[d], dtype, rows);
                        forget();
                    }
            }
            for (int masked = 0; masked < 2; masked++) {
                for (int capped = 0; capped < 2; capped++) test_softmax(n, masked, capped ? 20.0f : 0.0f);
                test_tops(n, masked);
            }
            for (int capped = 0; capped < 2; capped++) test_decode_softmax(n, capped ? 20.0f : 0.0f);
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
            forget();
        }
        test_power_values();
        if (kn->bytes) test_all_bytes(kn->bytes, 1);
        test_bytes_of_avx2();
        forget();
        test_conversions(DHSA_F16);
        test_conversions(DHSA_BF16);
        printf("%s: %d comparisons with scalar\n", kn->isa, checks);
    }
    printf("%d differences\n", failures);
    return failures != 0;
}
