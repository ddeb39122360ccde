/* labels.c: the label that a boundary predictor is trained on, computed from queries and keys. The
 * result is that of `boundary_ratios` in dhsa/labels.py for their dense attention matrix, which is never formed.
 * Nothing here is used when a model runs. Source: arXiv 2510.24606.
 *
 * Gap j needs the attention that rows from j + w on give to 2w columns. In column c these are the rows from c + d on
 * for some d < 2w. So the first 2w - 1 rows of a column are kept one by one, and of all later rows only the sum: 2w
 * values per key, all of them sums of positive values. In a window layer the rows need no upper limit, since a column
 * ends where its key leaves the window. */
#include <inttypes.h>
#include <math.h>
#include <string.h>

#include "core/threads.h"
#include "select/probe.h"

enum {
    QUERIES = 128,   /* queries of a block, whose heads share the keys */
    STRIPES = 16,    /* one task sums blocks s, s + STRIPES, ...: the number of partial sums is fixed */
    MOST_WINDOW = 64 /* bounds the memory for each key */
};

typedef struct {
    const dhsa_tensor *q, *k;
    double scale, softcap;
    int64_t window, sliding;
    dhsa_probe probe;
    double *near;   /* [batch, L, 2w - 1]: rows c .. c + 2w - 2 of column c, summed over the heads */
    double *far;    /* [batch, STRIPES, L]: the sums of the rows after them */
    int64_t *bad;   /* [batch, STRIPES]: the first query with a logit that is NaN or inf, or -1 */
    double *ratios; /* [batch, L] */
    char *arenas;
} label_job;

/* One block of queries and the heads of one KV head. */
typedef struct {
    dhsa_probe_queries rows;
    const label_job *job;
    double *near, *far;
    int64_t *bad;
} label_block;

static int64_t label_query_of(const label_block *w, int64_t row) { return w->rows.query + row / w->rows.heads; }

static void label_visit(void *of, int64_t row, int64_t first, int n, const float *p, const float *weight)
{
    const label_block *w = of;
    const label_job *job = w->job;
    const int64_t lanes = job->probe.kernels->lanes, kept = 2 * job->window - 1;
    const int64_t rows = DHSA_MIN(DHSA_MIN(QUERIES, job->q->shape[2] - w->rows.query) * w->rows.heads - row, lanes);
    for (int64_t r = 0; r < rows; r++) /* every query sees itself: a weight of 0 means a NaN or inf */
        if (weight[r] == 0 && *w->bad < 0) *w->bad = label_query_of(w, row + r);
    if (first + n - 1 + kept <= label_query_of(w, row)) {
        float sums[DHSA_PROBE_TILE] = {0};
        job->probe.kernels->add_sums(p, n, weight, sums);
        for (int j = 0; j < n; j++) w->far[first + j] += sums[j];
        return;
    }
    for (int j = 0; j < n; j++)
        for (int64_t r = 0; r < rows; r++) {
            const int64_t after = label_query_of(w, row + r) - (first + j);
            const double share = (double)p[j * lanes + r] * weight[r];
            if (weight[r] == 0 || after < 0) continue;
            *(after < kept ? &w->near[(first + j) * kept + after] : &w->far[first + j]) += share;
        }
}

static void label_stripe_task(void *context, int64_t index, int thread)
{
    const label_job *job = context;
    const int64_t length = job->q->shape[2], kv_heads = job->k->shape[1], kept = 2 * job->window - 1,
                  b = index / STRIPES;
    label_block w = {.rows = {.probe = &job->probe, .q = job->q, .k = job->k, .b = b, .window = job->sliding},
                     .job = job};
    w.rows.negate = job->scale < 0;
    w.rows.heads = job->q->shape[1] / kv_heads;
    w.near = job->near + b * length * kept;
    w.far = job->far + index * length;
    w.bad = job->bad + index;
    memset(w.far, 0, (size_t)length * sizeof *w.far);
    *w.bad = -1;
    /* A block writes only the near rows of its own queries, so no two stripes write the same entry. */
    for (w.rows.query = index % STRIPES * QUERIES; w.rows.query < length; w.rows.query += STRIPES * QUERIES) {
        const int64_t query = w.rows.query, last = DHSA_MIN(query + QUERIES, length);
        const dhsa_probe_run run = {.rows = (last - query) * w.rows.heads,
                                    .from = job->sliding ? DHSA_MAX(query + 1 - job->sliding, 0) : 0,
                                    .to = last,
                                    .scale = (float)fabs(job->scale),
                                    .softcap = (float)job->softcap,
                                    .of = &w,
                                    .pack = dhsa_probe_pack_queries,
                                    .keys = dhsa_probe_read_keys,
                                    .visit = label_visit};
        for (w.rows.head = 0; w.rows.head < job->q->shape[1]; w.rows.head += w.rows.heads)
            dhsa_probe_do(&job->probe, &run, job->arenas + thread * job->probe.arena_size);
    }
}

/* The attention that column c receives from rows c + d on. The first stripe holds the sum of all stripes. */
static double column(const label_job *job, int64_t b, int64_t c, int64_t d)
{
    const int64_t length = job->q->shape[2], kept = 2 * job->window - 1;
    double sum = job->far[b * STRIPES * length + c];
    for (int64_t e = kept - 1; e >= d; e--) sum += job->near[(b * length + c) * kept + e];
    return sum;
}

static void label_ratio_task(void *context, int64_t b, int thread)
{
    const label_job *job = context;
    const int64_t length = job->q->shape[2], w = job->window;
    double *out = job->ratios + b * length, *far = job->far + b * STRIPES * length;
    (void)thread;
    for (int64_t s = 1; s < STRIPES; s++)
        for (int64_t c = 0; c < length; c++) far[c] += far[s * length + c];
    const double heads = (double)job->q->shape[1];
    for (int64_t j = 0; j < length; j++) {
        double past = 0, future = 0;
        out[j] = 0;
        if (j < 2 * w - 1 || j >= length - 2 * w) continue;
        for (int64_t c = j - w + 1; c <= j; c++) past += column(job, b, c, j + w - c);
        for (int64_t c = j + 1; c <= j + w; c++) future += column(job, b, c, j + w - c);
        out[j] = (DHSA_MAX(past, future) / heads + 1e-6) / (DHSA_MIN(past, future) / heads + 1e-6);
    }
}

dhsa_status dhsa_attention_ratios(const dhsa_tensor *q, const dhsa_tensor *k, int64_t window, int64_t sliding_window,
                                  double scale, double softcap, double *ratios, int num_threads, dhsa_error *error)
{
    dhsa_status status;
    if ((status = dhsa_qk_check(q, k, error)) || (status = dhsa_scaling_check(scale, softcap, error)) ||
        (status = dhsa_threads_check(num_threads, error)) || (status = dhsa_check_pointer(ratios, "ratios", error)))
        return status;
    const int64_t batch = q->shape[0], length = q->shape[2];
    if (k->shape[2] != length)
        return dhsa_fail(error, DHSA_ERR_VALUE, "k: %" PRId64 " keys, expected as many as the %" PRId64 " queries",
                         k->shape[2], length);
    if (window < 1 || window > MOST_WINDOW)
        return dhsa_fail(error, DHSA_ERR_VALUE, "window: got %" PRId64 ", expected 1 to %d", window, MOST_WINDOW);
    if (sliding_window < 0)
        return dhsa_fail(error, DHSA_ERR_VALUE, "sliding_window: got %" PRId64 ", expected at least 1", sliding_window);
    label_job job = {.q = q, .k = k, .scale = scale, .softcap = softcap, .window = window, .ratios = ratios};
    job.sliding = sliding_window < length ? sliding_window : 0;
    dhsa_probe_plan_as(&job.probe, q->dtype, DHSA_MIN(QUERIES, length) * (q->shape[1] / k->shape[1]), length,
                       q->shape[3]);
    num_threads = (int)DHSA_MIN(num_threads, batch * STRIPES);
    job.near = dhsa_alloc_zeroed(batch * length, (2 * window - 1) * (int64_t)sizeof *job.near);
    job.far = dhsa_alloc(batch * length, STRIPES * (int64_t)sizeof *job.far);
    job.bad = dhsa_alloc(batch, STRIPES * (int64_t)sizeof *job.bad);
    job.arenas = dhsa_alloc(job.probe.arena_size, num_threads);
    if (!job.near || !job.far || !job.bad || !job.arenas) {
        status =
            dhsa_fail(error, DHSA_ERR_NO_MEMORY, "attention_ratios: no memory for sums over %" PRId64 " keys", length);
        goto cleanup;
    }
    dhsa_parallel(batch * STRIPES, num_threads, label_stripe_task, &job);
    for (int64_t i = 0; i < batch * STRIPES && !status; i++)
        if (job.bad[i] >= 0)
            status =
                dhsa_fail(error, DHSA_ERR_VALUE,
                          "q: the logits of query %" PRId64 " of batch item %" PRId64 " are not all finite numbers",
                          job.bad[i], i / STRIPES);
    if (status) goto cleanup;
    dhsa_parallel(batch, (int)DHSA_MIN(num_threads, batch), label_ratio_task, &job);
cleanup:
    dhsa_free(job.near);
    dhsa_free(job.far);
    dhsa_free(job.bad);
    dhsa_free(job.arenas);
    return status;
}
