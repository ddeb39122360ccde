/* prefill.c: the pipeline: boundaries, scores and lists, then attention; or attention alone where nothing is left out.
 * It strings the steps together and says what it did; how each is done lies in select/ and attend/. */
#include <inttypes.h>
#include <string.h>

#include "core/internal.h"
#include "select/select.h"

/* Number of (query, key) pairs visible to queries at positions [first, last]. */
static double pairs_visible(int64_t first, int64_t last, int64_t window)
{
    double pairs = 0;
    if (window && last >= window) {
        const int64_t from = DHSA_MAX(first, window); /* from here on every query sees `window` keys */
        pairs += (double)(last - from + 1) * (double)window;
        last = from - 1;
    }
    if (last >= first) pairs += (double)(last - first + 1) * (double)(first + last + 2) / 2;
    return pairs;
}

/* The same, of the keys on an ascending list. All but a block's worth at either end are seen by every query. */
static int64_t pairs_listed(const int32_t *keys, int64_t n, int64_t first, int64_t last, int64_t window)
{
    int64_t pairs = 0, at = 0;
    if (window)
        for (; at < n && keys[at] + window - 1 < last; at++) {
            const int64_t from = DHSA_MAX(first, keys[at]), to = keys[at] + window - 1;
            pairs += DHSA_MAX(to - from + 1, 0);
        }
    for (; n > at && keys[n - 1] > first; n--) pairs += DHSA_MAX(last - keys[n - 1] + 1, 0);
    return pairs + (n - at) * (last - first + 1);
}

static double density(const dhsa_problem *p, const dhsa_selection *s)
{
    const int64_t q_len = p->q.shape[2], offset = p->k.shape[2] - q_len;
    const int64_t window = p->window < p->k.shape[2] ? p->window : 0; /* a wider one cuts nothing, and could overflow */
    double pairs = 0;
    for (int64_t r = 0; r < s->batch * s->heads * s->nq; r++) {
        const int64_t from = r % s->nq * s->query_block, to = DHSA_MIN(from + s->query_block, q_len) - 1;
        pairs +=
            (double)pairs_listed(s->indices + s->indptr[r], s->indptr[r + 1] - s->indptr[r], offset + from, offset + to, window);
    }
    return pairs / ((double)(s->batch * s->heads) * pairs_visible(offset, offset + q_len - 1, window));
}

static dhsa_status run_exact(const dhsa_problem *p, dhsa_stats *stats, dhsa_error *error)
{
    const double start = dhsa_now();
    const dhsa_status status = dhsa_attend_dense(p, error);
    stats->path = p->window && p->window < p->k.shape[2] ? DHSA_PATH_WINDOW : DHSA_PATH_DENSE;
    stats->attend_seconds = dhsa_now() - start;
    return status;
}

static dhsa_status run_sparse(const dhsa_problem *p, const dhsa_boundary_config *config, const dhsa_select_config *select,
                              dhsa_stats *stats, dhsa_error *error)
{
    const double start = dhsa_now();
    const int64_t batch = p->q.shape[0], k_len = p->k.shape[2], capacity = dhsa_boundaries_capacity(config, k_len);
    dhsa_selection list = {batch,
                           dhsa_score_sets(&select->score, &p->q, &p->k),
                           dhsa_block_count(&select->score, p->q.shape[2]),
                           select->score.query_block,
                           NULL,
                           NULL};
    const int64_t rows = list.batch * list.heads * list.nq;
    int64_t *counts = dhsa_alloc(batch, sizeof *counts), *indptr = dhsa_alloc(rows + 1, sizeof *indptr);
    int32_t *boundaries = dhsa_alloc(batch, capacity * (int64_t)sizeof *boundaries), *indices = NULL;
    dhsa_status status;
    if (!counts || !indptr || !boundaries) {
        status = dhsa_fail(error, DHSA_ERR_NO_MEMORY, "prefill: no memory for %" PRId64 " boundaries and %" PRId64 " lists",
                           capacity, rows);
        goto cleanup;
    }
    if ((status = dhsa_boundaries(&p->k, config, boundaries, capacity, counts, p->num_threads, error)) ||
        (status = dhsa_select_plan(&p->q, &p->k, select, indptr, error)))
        goto cleanup;
    if (!(indices = dhsa_alloc(indptr[rows], sizeof *indices))) {
        status = dhsa_fail(error, DHSA_ERR_NO_MEMORY, "prefill: no memory for lists of %" PRId64 " keys", indptr[rows]);
        goto cleanup;
    }
    if ((status = dhsa_select(&p->q, &p->k, boundaries, capacity, select, indptr, indices, p->num_threads, error))) goto cleanup;
    list.indptr = indptr;
    list.indices = indices;
    stats->path = DHSA_PATH_SPARSE;
    stats->density = density(p, &list);
    const double chosen = dhsa_now();
    stats->select_seconds = chosen - start;
    status = dhsa_attend_sparse(p, &list, error);
    stats->attend_seconds = dhsa_now() - chosen;
cleanup:
    dhsa_free(counts);
    dhsa_free(indptr);
    dhsa_free(boundaries);
    dhsa_free(indices);
    return status;
}

dhsa_status dhsa_prefill(const dhsa_problem *p, const dhsa_boundary_config *boundaries, const dhsa_select_config *config,
                         dhsa_stats *stats, dhsa_error *error)
{
    dhsa_select_config select = *config;
    dhsa_status status;
    memset(stats, 0, sizeof *stats);
    stats->density = 1.0;
    if ((status = dhsa_problem_check(p, error))) return status;
    if (!p->causal || p->key_ranges)
        return dhsa_fail(error, DHSA_ERR_NOT_IMPLEMENTED, "%s: sparse attention is causal, without ranges of its own",
                         p->key_ranges ? "key_ranges" : "causal");
    const int rows = select.score.score == DHSA_SCORE_ROWS;
    select.score.scale = rows ? p->scale : 1.0;
    select.score.softcap = rows ? p->softcap : 0.0;
    select.score.window = p->window;
    if ((status = dhsa_select_check(&p->q, &p->k, &select, error))) return status;
    const int64_t blocks = dhsa_block_count(&select.score, p->q.shape[2]);
    for (int64_t i = 0; i < blocks; i++) {
        dhsa_span span;
        if (!dhsa_span_exact(&select, p->q.shape[2], p->k.shape[2], i, &span))
            return run_sparse(p, boundaries, &select, stats, error);
    }
    return run_exact(p, stats, error);
}
