/* test_kernels.c: compares the kernels of attention of every tier that this CPU supports with the scalar tier on the
 * same rows; test_score_kernels.c does those of selection. Prints the number of comparisons; exits with 1 if there is a
 * difference. Built and run by tests/core/test_programs.py, for this CPU and, if a cross compiler and an emulator are
 * installed, for 64-bit Arm. */
#include "kernel_cases.h"

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

static void cases(void)
{
    static const int dims[] = {1, 3, 8, 20, 64, 80, 256, 576}, counts[] = {1, 2, 7, 13, 64};
    for (size_t i = 0; i < sizeof counts / sizeof *counts; i++) {
        const int n = counts[i];
        for (size_t d = 0; d < sizeof dims / sizeof *dims; d++) {
            test_products(n, dims[d]);
            for (int dtype = DHSA_F32; dtype <= DHSA_BF16; dtype++) test_moves(n, dims[d], dtype);
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
        forget();
    }
    test_conversions(DHSA_F16);
    test_conversions(DHSA_BF16);
}

int main(void) { return of_every_tier(cases); }
