/* select.c: the public entries of scores and of selection, and what they may be asked for. */
#include <inttypes.h>
#include <math.h>

#include "core/threads.h"
#include "pipeline/pipeline.h"
#include "select/scorer.h"

dhsa_status dhsa_score_check(const dhsa_tensor *q, const dhsa_tensor *k, const dhsa_score_config *c, dhsa_error *error)
{
    dhsa_status status;
    if ((status = dhsa_given(c, "config", error)) || (status = dhsa_qk_check(q, k, error))) return status;
    if (q->shape[2] > k->shape[2])
        return dhsa_fail(error, DHSA_ERR_VALUE, "q: %" PRId64 " queries are more than the %" PRId64 " keys, expected Lq <= Lk",
                         q->shape[2], k->shape[2]);
    if (c->score != DHSA_SCORE_ROWS && c->score != DHSA_SCORE_BLOCK)
        return dhsa_fail(error, DHSA_ERR_VALUE, "score: unknown kind %d", (int)c->score);
    if (c->pooling != DHSA_POOL_MEAN && c->pooling != DHSA_POOL_MEAN_SQRT)
        return dhsa_fail(error, DHSA_ERR_VALUE, "pooling: unknown kind %d", (int)c->pooling);
    if (c->heads != DHSA_HEADS_GROUP && c->heads != DHSA_HEADS_ALL && c->heads != DHSA_HEADS_HEAD)
        return dhsa_fail(error, DHSA_ERR_VALUE, "heads: unknown kind %d", (int)c->heads);
    if (c->query_block < 1 || c->query_block > INT32_MAX)
        return dhsa_fail(error, DHSA_ERR_VALUE, "query_block: got %" PRId64 ", expected 1 to %d", c->query_block, INT32_MAX);
    if (c->score == DHSA_SCORE_ROWS && (c->rows < 1 || c->rows > c->query_block))
        return dhsa_fail(error, DHSA_ERR_VALUE, "rows: got %" PRId64 ", expected 1 to the query_block of %" PRId64, c->rows,
                         c->query_block);
    if ((status = dhsa_scaling_check(c->scale, c->softcap, error))) return status;
    if (c->window < 0) return dhsa_fail(error, DHSA_ERR_VALUE, "window: got %" PRId64 ", expected at least 1", c->window);
    return DHSA_OK;
}

dhsa_status dhsa_select_check(const dhsa_tensor *q, const dhsa_tensor *k, const dhsa_select_config *c, dhsa_error *error)
{
    if (!c) return dhsa_given(c, "config", error);
    const dhsa_method *method = dhsa_method_find(c->method);
    dhsa_score_config score = c->score;
    if (!method) {
        if ((int)c->method < 0 || c->method > DHSA_METHOD_ORACLE)
            return dhsa_fail(error, DHSA_ERR_VALUE, "method: unknown kind %d", (int)c->method);
        return dhsa_fail(error, DHSA_ERR_NOT_IMPLEMENTED, "method: number %d is not there yet", (int)c->method);
    }
    if (!method->has_chunks && !method->has_rows) score.rows = 1; /* has no say */
    const dhsa_status status = dhsa_score_check(q, k, &score, error);
    if (status) return status;
    if ((c->method == DHSA_METHOD_DHSA) != (score.score == DHSA_SCORE_BLOCK))
        return dhsa_fail(error, DHSA_ERR_VALUE, "score: the block score goes with method dhsa, and only with it; got %s",
                         method->name);
    if (c->budget < 1) return dhsa_fail(error, DHSA_ERR_VALUE, "budget: got %" PRId64 ", expected at least 1", c->budget);
    if (c->sink < 0) return dhsa_fail(error, DHSA_ERR_VALUE, "sink: got %" PRId64 ", expected at least 0", c->sink);
    if (c->local < 0) return dhsa_fail(error, DHSA_ERR_VALUE, "local: got %" PRId64 ", expected at least 0", c->local);
    if (c->dense_tail < 0)
        return dhsa_fail(error, DHSA_ERR_VALUE, "dense_tail: got %" PRId64 ", expected at least 0", c->dense_tail);
    if (c->sink > c->budget || c->local > c->budget - c->sink)
        return dhsa_fail(error, DHSA_ERR_VALUE,
                         "budget: %" PRId64 " keys do not hold the %" PRId64 " of sink and %" PRId64 " of local", c->budget,
                         c->sink, c->local);
    if (!(c->mass >= 0 && c->mass <= 1))
        return dhsa_fail(error, DHSA_ERR_VALUE, "mass: got %g, expected above 0, at most 1 (0: none)", c->mass);
    if (c->mass > 0 && !method->has_mass)
        return dhsa_fail(error, DHSA_ERR_VALUE, "mass: the scores of method %s are no shares of mass; give a budget", method->name);
    if (c->mass > 0 && (c->floor < 0 || c->floor > c->budget || c->floor < c->sink + c->local))
        return dhsa_fail(error, DHSA_ERR_VALUE,
                         "floor: got %" PRId64 ", expected sink + local = %" PRId64 " to the budget of %" PRId64, c->floor,
                         c->sink + c->local, c->budget);
    if (c->shortlist < 0 || (c->shortlist > 0 && c->mass == 0 && c->shortlist < c->budget))
        return dhsa_fail(error, DHSA_ERR_VALUE, "shortlist: got %" PRId64 ", expected at least the budget of %" PRId64,
                         c->shortlist, c->budget);
    if (c->key_block < method->has_blocks || c->key_block > INT32_MAX)
        return dhsa_fail(error, DHSA_ERR_VALUE, "key_block: got %" PRId64 ", expected 1 to %d", c->key_block, INT32_MAX);
    if (method->has_stride && (c->stride < 1 || c->stride > DHSA_MAX_STRIDE || c->key_block % c->stride != 0))
        return dhsa_fail(error, DHSA_ERR_VALUE,
                         "stride: got %" PRId64 ", expected a divisor of key_block = %" PRId64 ", at most %d", c->stride,
                         c->key_block, DHSA_MAX_STRIDE);
    return DHSA_OK;
}

dhsa_status dhsa_select_plan(const dhsa_tensor *q, const dhsa_tensor *k, const dhsa_select_config *config, int64_t *indptr,
                             dhsa_error *error)
{
    dhsa_status status;
    if ((status = dhsa_select_check(q, k, config, error)) || (status = dhsa_given(indptr, "indptr", error))) return status;
    const int64_t blocks = dhsa_block_count(&config->score, q->shape[2]);
    const int64_t lists = q->shape[0] * dhsa_score_sets(&config->score, q, k);
    int64_t unused;
    if (!dhsa_mul(lists * blocks, k->shape[2], &unused))
        return dhsa_fail(error, DHSA_ERR_VALUE, "query_block: %" PRId64 " makes more lists than can be counted",
                         config->score.query_block);
    indptr[0] = 0;
    for (int64_t list = 0; list < lists; list++)
        for (int64_t i = 0; i < blocks; i++) {
            const int64_t at = list * blocks + i;
            indptr[at + 1] = indptr[at] + dhsa_block_keys(config, q->shape[2], k->shape[2], i);
        }
    return DHSA_OK;
}

/* indptr must be what dhsa_select_plan gives. *sparse receives whether any block has to be scored. */
static dhsa_status check_indptr(const dhsa_tensor *q, const dhsa_tensor *k, const dhsa_select_config *config, const int64_t *indptr,
                                int *sparse, dhsa_error *error)
{
    const int64_t blocks = dhsa_block_count(&config->score, q->shape[2]);
    const int64_t lists = q->shape[0] * dhsa_score_sets(&config->score, q, k);
    *sparse = 0;
    if (indptr[0] != 0) return dhsa_fail(error, DHSA_ERR_VALUE, "indptr: begins with %" PRId64 ", expected 0", indptr[0]);
    for (int64_t i = 0; i < blocks; i++) {
        dhsa_span span;
        const int64_t size = dhsa_block_keys(config, q->shape[2], k->shape[2], i);
        *sparse |= !dhsa_span_exact(config, q->shape[2], k->shape[2], i, &span);
        for (int64_t at = i; at < lists * blocks; at += blocks)
            if (indptr[at] < 0 || indptr[at] > INT64_MAX - size || indptr[at + 1] != indptr[at] + size)
                return dhsa_fail(error, DHSA_ERR_VALUE,
                                 "indptr: row %" PRId64 " is [%" PRId64 ", %" PRId64 "), expected %" PRId64 " keys", at, indptr[at],
                                 indptr[at + 1], size);
    }
    return DHSA_OK;
}

dhsa_status dhsa_select(const dhsa_tensor *q, const dhsa_tensor *k, const int32_t *boundaries, int64_t n_boundaries,
                        const dhsa_select_config *config, int64_t *indptr, int32_t *indices, int num_threads, dhsa_error *error)
{
    dhsa_selector s;
    dhsa_status status;
    int sparse;
    if ((status = dhsa_select_check(q, k, config, error)) || (status = dhsa_threads_check(num_threads, error)) ||
        (status = dhsa_given(indptr, "indptr", error)) || (status = dhsa_given(indices, "indices", error)) ||
        (status = check_indptr(q, k, config, indptr, &sparse, error)))
        return status;
    if (!dhsa_method_find(config->method)->has_chunks)
        boundaries = NULL;
    else if ((status = dhsa_boundaries_check(boundaries, k->shape[0], n_boundaries, k->shape[2], error)))
        return status;
    if ((status = dhsa_selector_open(&s, dhsa_method_find(config->method), q, k, boundaries, n_boundaries, NULL, config,
                                     num_threads, error)))
        return status;
    for (int64_t b = 0; b < q->shape[0] && !status; b++) {
        if (sparse) status = dhsa_selector_begin(&s, b, error);
        if (!status) status = dhsa_selector_run(&s, 0, s.blocks, indptr + b * s.sets * s.blocks, indices, error);
    }
    dhsa_selector_close(&s);
    return status;
}

int dhsa_method_has_chunks(dhsa_method_kind kind)
{
    const dhsa_method *method = dhsa_method_find(kind);
    return method && method->has_chunks;
}

/* ---- scores alone ------------------------------------------------------------------------------------------------ */

typedef struct {
    dhsa_scorer scorer;
    float *scores;
    int64_t width; /* chunks, padding included */
    char *arenas;
} scores_job;

static void scores_task(void *context, int64_t index, int thread)
{
    const scores_job *job = context;
    const dhsa_scorer *s = &job->scorer;
    const int64_t block = s->blocks - 1 - index / s->sets, set = index % s->sets;
    float *score = job->scores + ((s->b * s->sets + set) * s->blocks + block) * job->width;
    int64_t first, last;
    dhsa_scorer_run(s, set, block, NULL, 0, job->arenas + thread * s->arena_size, score, NULL, &first, &last);
    for (int64_t c = 0; c < first; c++) score[c] = -INFINITY;
    for (int64_t c = last; c < job->width; c++) score[c] = -INFINITY;
}

dhsa_status dhsa_chunk_scores(const dhsa_tensor *q, const dhsa_tensor *k, const int32_t *boundaries, int64_t n_boundaries,
                              const dhsa_score_config *config, float *scores, int num_threads, dhsa_error *error)
{
    scores_job job = {.scores = scores};
    dhsa_scorer *s = &job.scorer;
    dhsa_status status;
    if ((status = dhsa_score_check(q, k, config, error)) || (status = dhsa_threads_check(num_threads, error)) ||
        (status = dhsa_given(scores, "scores", error)) ||
        (status = dhsa_boundaries_check(boundaries, k->shape[0], n_boundaries, k->shape[2], error)) ||
        (status = dhsa_scorer_open(s, q, k, config, n_boundaries, 0, NULL, DHSA_LEVEL_FINE, error)))
        return status;
    job.width = n_boundaries - 1;
    num_threads = dhsa_select_threads(num_threads, s->sets * s->blocks);
    job.arenas = dhsa_alloc(s->arena_size, num_threads);
    if (!job.arenas) status = dhsa_fail(error, DHSA_ERR_NO_MEMORY, "scores: no memory for %d workspaces", num_threads);
    for (int64_t b = 0; b < q->shape[0] && !status; b++) {
        status =
            dhsa_scorer_begin(s, b, boundaries + b * n_boundaries, n_boundaries, job.arenas, s->arena_size, num_threads, error);
        if (!status) dhsa_parallel(s->sets * s->blocks, num_threads, scores_task, &job);
    }
    dhsa_free(job.arenas);
    dhsa_scorer_close(s);
    return status;
}
