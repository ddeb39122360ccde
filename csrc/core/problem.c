/* problem.c: checks of tensors and of attention problems. Public functions make them once in a call, and the code
 * that they call relies on them. A message names the argument, what was passed and what was expected. */
#include <inttypes.h>
#include <math.h>

#include "core/internal.h"
#include "core/threads.h"

static const char *const dtype_names[] = {"float32", "float16", "bfloat16"};

/* The lowest byte that a tensor uses and the one after the highest, relative to data. Returns 0 if the strides
 * overflow. */
static int extent(const dhsa_tensor *t, int64_t *low, int64_t *high)
{
    *low = *high = 0;
    for (int i = 0; i < 4; i++) {
        const int64_t stride = i == 3 ? 1 : t->stride[i];
        int64_t reach;
        if (stride == INT64_MIN || !dhsa_mul(t->shape[i] - 1, stride < 0 ? -stride : stride, &reach)) return 0;
        int64_t *const end = stride < 0 ? low : high;
        if (reach > INT64_MAX / 16 - (*end < 0 ? -*end : *end)) return 0;
        *end += stride < 0 ? -reach : reach;
    }
    const int64_t size = dhsa_dtype_size(t->dtype);
    *low *= size;
    *high = (*high + 1) * size;
    return 1;
}

dhsa_status dhsa_check_pointer(const void *pointer, const char *name, dhsa_error *error)
{
    return pointer ? DHSA_OK : dhsa_fail(error, DHSA_ERR_VALUE, "%s: expected a pointer, got NULL", name);
}

dhsa_status dhsa_tensor_check(const dhsa_tensor *t, const char *name, dhsa_error *error)
{
    if (!t) return dhsa_check_pointer(t, name, error);
    if (t->dtype != DHSA_F32 && t->dtype != DHSA_F16 && t->dtype != DHSA_BF16)
        return dhsa_fail(error, DHSA_ERR_TYPE, "%s: expected dtype float32, float16 or bfloat16", name);
    if (!t->data) return dhsa_fail(error, DHSA_ERR_VALUE, "%s: has no data", name);
    for (int i = 0; i < 4; i++)
        if (t->shape[i] < 1)
            return dhsa_fail(error, DHSA_ERR_VALUE, "%s: dimension %d has size %" PRId64 ", expected at least 1", name,
                             i, t->shape[i]);
    if (t->shape[2] > DHSA_MAX_LENGTH)
        return dhsa_fail(error, DHSA_ERR_VALUE, "%s: length %" PRId64 " is more than the supported %d", name,
                         t->shape[2], DHSA_MAX_LENGTH);
    if (t->shape[3] > 1 && t->stride[3] != 1)
        return dhsa_fail(error, DHSA_ERR_VALUE,
                         "%s: last dimension has stride %" PRId64 ", expected 1 (make it contiguous)", name,
                         t->stride[3]);
    int64_t low, high, n = t->shape[0];
    for (int i = 1; i < 4; i++)
        if (!dhsa_mul(n, t->shape[i], &n) || n > INT64_MAX / 64)
            return dhsa_fail(error, DHSA_ERR_VALUE, "%s: its shape has more elements than can be addressed", name);
    if (!extent(t, &low, &high))
        return dhsa_fail(error, DHSA_ERR_VALUE, "%s: its strides reach further than can be addressed", name);
    return DHSA_OK;
}

/* Arrays are never converted here, since only the caller knows which of two dtypes is meant. */
static dhsa_status dtype_check(const dhsa_tensor *t, const char *name, const dhsa_tensor *q, dhsa_error *error)
{
    if (t->dtype == q->dtype) return DHSA_OK;
    const char *const have = dtype_names[t->dtype], *const want = dtype_names[q->dtype];
    return dhsa_fail(error, DHSA_ERR_TYPE, "%s: dtype is %s, expected %s as q; cast %s to %s", name, have, want, name,
                     want);
}

dhsa_status dhsa_qk_check(const dhsa_tensor *q, const dhsa_tensor *k, dhsa_error *error)
{
    dhsa_status status;
    if ((status = dhsa_tensor_check(q, "q", error)) || (status = dhsa_tensor_check(k, "k", error))) return status;
    if ((status = dtype_check(k, "k", q, error))) return status;
    if (k->shape[0] != q->shape[0])
        return dhsa_fail(error, DHSA_ERR_VALUE, "k: batch is %" PRId64 ", expected %" PRId64 " as q", k->shape[0],
                         q->shape[0]);
    if (q->shape[1] % k->shape[1] != 0)
        return dhsa_fail(error, DHSA_ERR_VALUE, "k: %" PRId64 " heads do not divide the %" PRId64 " heads of q",
                         k->shape[1], q->shape[1]);
    /* The executor counts the rows of an item, which has all heads of a group, in int. */
    if (q->shape[1] > INT32_MAX / 2)
        return dhsa_fail(error, DHSA_ERR_VALUE, "q: %" PRId64 " heads are more than the supported %d", q->shape[1],
                         INT32_MAX / 2);
    if (k->shape[3] != q->shape[3])
        return dhsa_fail(error, DHSA_ERR_VALUE, "k: head_dim is %" PRId64 ", expected %" PRId64 " as q", k->shape[3],
                         q->shape[3]);
    if (q->shape[3] > DHSA_MAX_HEAD_DIM)
        return dhsa_fail(error, DHSA_ERR_NOT_IMPLEMENTED, "q: head_dim %" PRId64 " is not supported yet, at most %d",
                         q->shape[3], DHSA_MAX_HEAD_DIM);
    return DHSA_OK;
}

dhsa_status dhsa_threads_check(int num_threads, dhsa_error *error)
{
    if (num_threads < 1 || num_threads > DHSA_MAX_THREADS)
        return dhsa_fail(error, DHSA_ERR_VALUE, "num_threads: got %d, expected 1 to %d", num_threads, DHSA_MAX_THREADS);
    return DHSA_OK;
}

dhsa_status dhsa_scaling_check(double scale, double softcap, dhsa_error *error)
{
    /* Kernels compute in fp32, with scale and softcap times log2(e), and with scale / softcap. */
    if (!(fabs(scale) <= 1e38))
        return dhsa_fail(error, DHSA_ERR_VALUE, "scale: got %g, expected a finite number of at most 1e38", scale);
    if (softcap == 0) return DHSA_OK;
    if (!(softcap >= 1e-30 && softcap <= 1e38 && fabs(scale) / softcap <= 1e38))
        return dhsa_fail(error, DHSA_ERR_VALUE,
                         "softcap: got %g, expected 1e-30 to 1e38, and at least 1e-38 of the scale", softcap);
    return DHSA_OK;
}

/* Whether two elements may have the same address. They do not if each dimension, in ascending order of the strides,
 * steps over all dimensions before it. */
static int overlaps_itself(const dhsa_tensor *t)
{
    int order[4], n = 0;
    for (int i = 0; i < 4; i++) {
        if (t->shape[i] == 1) continue;
        int at = n++;
        const int64_t s = llabs((long long)t->stride[i]);
        for (; at > 0 && llabs((long long)t->stride[order[at - 1]]) > s; at--) order[at] = order[at - 1];
        order[at] = i;
    }
    int64_t reach = 0;
    for (int i = 0; i < n; i++) {
        const int64_t s = llabs((long long)t->stride[order[i]]);
        if (s <= reach) return 1;
        reach += s * (t->shape[order[i]] - 1);
    }
    return 0;
}

static int share_memory(const dhsa_tensor *a, const dhsa_tensor *b)
{
    int64_t alow, ahigh, blow, bhigh;
    extent(a, &alow, &ahigh);
    extent(b, &blow, &bhigh);
    const intptr_t pa = (intptr_t)a->data, pb = (intptr_t)b->data;
    return pa + alow < pb + bhigh && pb + blow < pa + ahigh;
}

static dhsa_status out_check(const dhsa_problem *p, dhsa_error *error)
{
    const dhsa_tensor *q = &p->q, *out = &p->out, *inputs[] = {&p->q, &p->k, &p->v};
    const char *const names[] = {"q", "k", "v"};
    dhsa_status status;
    if ((status = dhsa_tensor_check(out, "out", error))) return status;
    if (out->dtype != q->dtype)
        return dhsa_fail(error, DHSA_ERR_TYPE, "out: dtype is %s, expected %s as q; make it with that",
                         dtype_names[out->dtype], dtype_names[q->dtype]);
    for (int i = 0; i < 4; i++) {
        const int64_t want = i == 3 ? p->v.shape[3] : q->shape[i];
        if (out->shape[i] != want)
            return dhsa_fail(error, DHSA_ERR_VALUE,
                             "out: dimension %d has size %" PRId64 ", expected %" PRId64 " as %s", i, out->shape[i],
                             want, i == 3 ? "v" : "q");
    }
    if (overlaps_itself(out)) return dhsa_fail(error, DHSA_ERR_VALUE, "out: its elements overlap in memory");
    for (int i = 0; i < 3; i++)
        if (share_memory(out, inputs[i]))
            return dhsa_fail(error, DHSA_ERR_VALUE, "out: shares memory with %s", names[i]);
    return DHSA_OK;
}

dhsa_status dhsa_problem_check(const dhsa_problem *p, dhsa_error *error)
{
    if (!p) return dhsa_check_pointer(p, "problem", error);
    const dhsa_tensor *q = &p->q, *k = &p->k, *v = &p->v;
    dhsa_status status;
    if ((status = dhsa_qk_check(q, k, error)) || (status = dhsa_tensor_check(v, "v", error))) return status;
    if ((status = dtype_check(v, "v", q, error))) return status;
    for (int i = 0; i < 3; i++)
        if (v->shape[i] != k->shape[i])
            return dhsa_fail(error, DHSA_ERR_VALUE, "v: dimension %d has size %" PRId64 ", expected %" PRId64 " as k",
                             i, v->shape[i], k->shape[i]);
    if (v->shape[3] > DHSA_MAX_VALUE_DIM)
        return dhsa_fail(error, DHSA_ERR_NOT_IMPLEMENTED, "v: head_dim %" PRId64 " is not supported yet, at most %d",
                         v->shape[3], DHSA_MAX_VALUE_DIM);
    if ((status = out_check(p, error))) return status;
    if (p->causal && !p->key_ranges && q->shape[2] > k->shape[2])
        return dhsa_fail(error, DHSA_ERR_VALUE,
                         "q: %" PRId64 " queries are more than the %" PRId64 " keys, expected Lq <= Lk when causal",
                         q->shape[2], k->shape[2]);
    if ((status = dhsa_scaling_check(p->scale, p->softcap, error))) return status;
    if ((int)p->precision < DHSA_PRECISION_HIGHEST || p->precision > DHSA_PRECISION_MEDIUM)
        return dhsa_fail(error, DHSA_ERR_VALUE, "precision: got %d, expected a dhsa_precision", (int)p->precision);
    if (p->skip && !(p->skip > 0 && p->skip < 1))
        return dhsa_fail(error, DHSA_ERR_VALUE, "skip: got %g, expected a number above 0 and below 1", p->skip);
    if (p->window < 0)
        return dhsa_fail(error, DHSA_ERR_VALUE, "window: got %" PRId64 ", expected at least 1", p->window);
    if (p->window && p->key_ranges)
        return dhsa_fail(error, DHSA_ERR_NOT_IMPLEMENTED,
                         "window: cannot be given together with key_ranges, which take its place");
    if (p->window && q->shape[2] > k->shape[2])
        return dhsa_fail(error, DHSA_ERR_VALUE,
                         "q: %" PRId64 " queries are more than the %" PRId64 " keys, expected Lq <= Lk with a window",
                         q->shape[2], k->shape[2]);
    if (p->key_ranges)
        for (int64_t i = 0; i < q->shape[0] * q->shape[2]; i++) {
            const int32_t start = p->key_ranges[2 * i], stop = p->key_ranges[2 * i + 1];
            if (start < 0 || stop < start || stop > k->shape[2])
                return dhsa_fail(error, DHSA_ERR_VALUE,
                                 "key_ranges: row %" PRId64 " is [%d, %d), expected 0 <= start <= stop <= %" PRId64, i,
                                 start, stop, k->shape[2]);
        }
    for (int64_t h = 0; p->sinks && h < q->shape[1]; h++)
        if (!(fabsf(p->sinks[h]) <= 1e38f) && p->sinks[h] != -INFINITY)
            return dhsa_fail(error, DHSA_ERR_VALUE,
                             "sinks: that of head %" PRId64 " is %g, expected a number of at most 1e38 or -inf", h,
                             (double)p->sinks[h]);
    return dhsa_threads_check(p->num_threads, error);
}
