/* select.c: the public entries that compute scores and selections. */
#include <inttypes.h>
#include <math.h>

#include "core/threads.h"
#include "pipeline/pipeline.h"
#include "select/scorer.h"

/* Checks the arrays of a call, and the fields of its config that come from the layer. The rest has been checked. */
static dhsa_status call_check(const dhsa_tensor *q, const dhsa_tensor *k, const dhsa_score_config *c, dhsa_error *error)
{
    dhsa_status status;
    if ((status = dhsa_qk_check(q, k, error))) return status;
    if (q->shape[2] > k->shape[2])
        return dhsa_fail(error, DHSA_ERR_VALUE,
                         "q: %" PRId64 " queries are more than the %" PRId64 " keys, expected Lq <= Lk", q->shape[2],
                         k->shape[2]);
    if ((status = dhsa_scaling_check(c->scale, c->softcap, error))) return status;
    if (c->window < 0)
        return dhsa_fail(error, DHSA_ERR_VALUE, "window: got %" PRId64 ", expected at least 1", c->window);
    return DHSA_OK;
}

dhsa_status dhsa_sides_check(const dhsa_select_config *c, int bidirectional, dhsa_error *error)
{
    const dhsa_method *method = dhsa_method_find(c->method);
    if (!bidirectional || method->has_both_sides) return DHSA_OK;
    return dhsa_fail(error, DHSA_ERR_NOT_IMPLEMENTED,
                     "causal: method %s selects for causal attention only; rows, block and window serve both sides",
                     method->name);
}

dhsa_status dhsa_select_plan(const dhsa_tensor *q, const dhsa_tensor *k, const dhsa_select_config *config,
                             int64_t *indptr, dhsa_error *error)
{
    dhsa_status status;
    if ((status = dhsa_config_check(config, NULL, error)) || (status = call_check(q, k, &config->score, error)) ||
        (status = dhsa_sides_check(config, config->score.bidirectional, error)) ||
        (status = dhsa_check_pointer(indptr, "indptr", error)))
        return status;
    const int64_t blocks = dhsa_block_count(&config->score, q->shape[2]);
    const int64_t lists = q->shape[0] * dhsa_head_sets(&config->score, q, k);
    int64_t unused;
    if (!dhsa_mul(lists * blocks, k->shape[2], &unused))
        return dhsa_fail(error, DHSA_ERR_VALUE,
                         "query_block: %" PRId64 " makes lists of more keys than 64 bits can count",
                         config->score.query_block);
    indptr[0] = 0;
    for (int64_t list = 0; list < lists; list++)
        for (int64_t i = 0; i < blocks; i++) {
            const int64_t at = list * blocks + i;
            indptr[at + 1] = indptr[at] + dhsa_block_keys(config, q->shape[2], k->shape[2], i);
        }
    return DHSA_OK;
}

/* Checks that indptr is as dhsa_select_plan writes it. *sparse receives whether any block has to be scored. */
static dhsa_status check_indptr(const dhsa_tensor *q, const dhsa_tensor *k, const dhsa_select_config *config,
                                const int64_t *indptr, int *sparse, dhsa_error *error)
{
    const int64_t blocks = dhsa_block_count(&config->score, q->shape[2]);
    const int64_t lists = q->shape[0] * dhsa_head_sets(&config->score, q, k);
    *sparse = 0;
    if (indptr[0] != 0)
        return dhsa_fail(error, DHSA_ERR_VALUE, "indptr: begins with %" PRId64 ", expected 0", indptr[0]);
    for (int64_t i = 0; i < blocks; i++) {
        dhsa_span span;
        const int64_t size = dhsa_block_keys(config, q->shape[2], k->shape[2], i);
        *sparse |= !dhsa_span_exact(config, q->shape[2], k->shape[2], i, &span);
        for (int64_t at = i; at < lists * blocks; at += blocks)
            if (indptr[at] < 0 || indptr[at] > INT64_MAX - size || indptr[at + 1] != indptr[at] + size)
                return dhsa_fail(error, DHSA_ERR_VALUE,
                                 "indptr: row %" PRId64 " is [%" PRId64 ", %" PRId64 "), expected %" PRId64 " keys", at,
                                 indptr[at], indptr[at + 1], size);
    }
    return DHSA_OK;
}

dhsa_status dhsa_select(const dhsa_tensor *q, const dhsa_tensor *k, const int32_t *boundaries, int64_t n_boundaries,
                        const dhsa_select_config *config, int64_t *indptr, int32_t *indices, int num_threads,
                        dhsa_error *error)
{
    dhsa_selector s;
    dhsa_status status;
    int sparse;
    if ((status = dhsa_config_check(config, NULL, error)) || (status = call_check(q, k, &config->score, error)) ||
        (status = dhsa_sides_check(config, config->score.bidirectional, error)) ||
        (status = dhsa_threads_check(num_threads, error)) || (status = dhsa_check_pointer(indptr, "indptr", error)) ||
        (status = dhsa_check_pointer(indices, "indices", error)) ||
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
        if (!status) status = dhsa_selector_run(&s, 0, s.blocks, indptr + b * s.head_sets * s.blocks, indices, error);
    }
    dhsa_selector_close(&s);
    return status;
}

/* Checks means that a caller has computed. n: how many there must be. */
static dhsa_status means_check(const dhsa_means *means, const char *name, const dhsa_tensor *k, int64_t n, int spread,
                               dhsa_error *error)
{
    const dhsa_status status = dhsa_check_pointer(means, name, error);
    if (status) return status;
    if (means->kv_heads == k->shape[1] && means->dim == k->shape[3] && means->chunks == n && means->mean &&
        means->scale && means->state && (!spread || means->spread))
        return DHSA_OK;
    return dhsa_fail(error, DHSA_ERR_VALUE,
                     "%s: got [%" PRId64 ", %" PRId64 ", %" PRId64 "], expected [%" PRId64 ", %" PRId64 ", %" PRId64
                     "] with all parts",
                     name, means->kv_heads, means->chunks, means->dim, k->shape[1], n, k->shape[3]);
}

dhsa_status dhsa_select_blocks(const dhsa_tensor *q, const dhsa_tensor *k, const int32_t *boundaries,
                               int64_t n_boundaries, const dhsa_means *chunks, const dhsa_means *groups,
                               const dhsa_select_config *config, int64_t first, int64_t blocks, int64_t *indptr,
                               int32_t *indices, int64_t n_indices, int num_threads, dhsa_error *error)
{
    dhsa_selector s;
    dhsa_status status;
    int sparse = 0;
    int64_t keys = 0;
    if ((status = dhsa_config_check(config, NULL, error)) || (status = call_check(q, k, &config->score, error)) ||
        (status = dhsa_threads_check(num_threads, error)) || (status = dhsa_check_pointer(indptr, "indptr", error)) ||
        (status = dhsa_check_pointer(indices, "indices", error)))
        return status;
    const dhsa_method *method = dhsa_method_find(config->method);
    const int rows = config->method == DHSA_METHOD_ROWS;
    if (!rows && config->method != DHSA_METHOD_WINDOW && config->method != DHSA_METHOD_POWER)
        return dhsa_fail(error, DHSA_ERR_NOT_IMPLEMENTED,
                         "method: %s reads keys of other blocks; expected rows, window or power", method->name);
    if (config->score.bidirectional || q->shape[0] != 1)
        return dhsa_fail(error, DHSA_ERR_VALUE, "q: expected causal attention of a batch of one");
    const int64_t all = dhsa_block_count(&config->score, q->shape[2]);
    if (first < 0 || blocks < 1 || first > all - blocks)
        return dhsa_fail(error, DHSA_ERR_VALUE,
                         "first: blocks %" PRId64 " to %" PRId64 " are not among the %" PRId64 " blocks", first,
                         first + blocks, all);
    for (int64_t i = first; i < first + blocks; i++) {
        dhsa_span span;
        keys += dhsa_block_keys(config, q->shape[2], k->shape[2], i);
        sparse |= !dhsa_span_exact(config, q->shape[2], k->shape[2], i, &span);
    }
    if (n_indices / dhsa_head_sets(&config->score, q, k) < keys)
        return dhsa_fail(error, DHSA_ERR_VALUE, "indices: %" PRId64 " entries are too few", n_indices);
    if (rows) {
        if ((status = dhsa_boundaries_check(boundaries, 1, n_boundaries, k->shape[2], error)) ||
            (status = means_check(chunks, "chunks", k, n_boundaries - 1, 0, error)) ||
            (status =
                 groups || (config->shortlist > 0 && config->mass == 0 && k->shape[2] > config->shortlist)
                     ? means_check(groups, "groups", k, dhsa_ceil_div(n_boundaries - 1, DHSA_GROUP_CHUNKS), 1, error)
                     : DHSA_OK))
            return status;
        if (boundaries[n_boundaries - 2] == k->shape[2])
            return dhsa_fail(error, DHSA_ERR_VALUE, "boundaries: expected no padding");
    }
    if ((status = dhsa_selector_open(&s, method, q, k, rows ? boundaries : NULL, n_boundaries, NULL, config,
                                     num_threads, error)))
        return status;
    s.chunk_means = chunks;
    s.group_means = groups;
    if (sparse) status = dhsa_selector_begin(&s, 0, error);
    indptr[0] = 0;
    if (!status) status = dhsa_selector_run(&s, first, blocks, indptr, indices, error);
    dhsa_selector_close(&s);
    return status;
}

/* ---- scores alone ---------------------------------------------------------------------------------------------- */

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
    const int64_t block = s->blocks - 1 - index / s->head_sets, set = index % s->head_sets;
    float *score = job->scores + ((s->b * s->head_sets + set) * s->blocks + block) * job->width;
    int64_t first, last;
    dhsa_scorer_run(s, set, block, NULL, job->arenas + thread * s->arena_size, score, NULL, &first, &last);
    for (int64_t c = 0; c < first; c++) score[c] = -INFINITY;
    for (int64_t c = last; c < job->width; c++) score[c] = -INFINITY;
}

dhsa_status dhsa_chunk_scores(const dhsa_tensor *q, const dhsa_tensor *k, const int32_t *boundaries,
                              int64_t n_boundaries, const dhsa_score_config *config, float *scores, int num_threads,
                              dhsa_error *error)
{
    scores_job job = {.scores = scores};
    dhsa_scorer *s = &job.scorer;
    dhsa_status status;
    if (config && config->bidirectional && config->score == DHSA_SCORE_BLOCK)
        return dhsa_fail(error, DHSA_ERR_NOT_IMPLEMENTED, "causal: the block score is for causal attention only");
    if ((status = dhsa_score_config_check(config, error)) || (status = call_check(q, k, config, error)) ||
        (status = dhsa_threads_check(num_threads, error)) || (status = dhsa_check_pointer(scores, "scores", error)) ||
        (status = dhsa_boundaries_check(boundaries, k->shape[0], n_boundaries, k->shape[2], error)) ||
        (status = dhsa_scorer_open(s, q, k, config, n_boundaries, config->quantized, NULL, DHSA_LEVEL_FINE, error)))
        return status;
    job.width = n_boundaries - 1;
    num_threads = dhsa_select_threads(num_threads, s->head_sets * s->blocks);
    job.arenas = dhsa_alloc(s->arena_size, num_threads);
    if (!job.arenas) status = dhsa_fail(error, DHSA_ERR_NO_MEMORY, "scores: no memory for %d workspaces", num_threads);
    for (int64_t b = 0; b < q->shape[0] && !status; b++) {
        status = dhsa_scorer_begin(s, b, boundaries + b * n_boundaries, n_boundaries, job.arenas, s->arena_size,
                                   num_threads, error);
        if (!status) dhsa_parallel(s->head_sets * s->blocks, num_threads, scores_task, &job);
    }
    dhsa_free(job.arenas);
    dhsa_scorer_close(s);
    return status;
}
