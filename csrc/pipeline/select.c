/* lists.c: what a selection may be asked for, which blocks are exact and how many keys the others may have, and the public
 * entries. The same for every method; how keys are found is theirs, what scores buy is take.c's. */
#include <inttypes.h>

#include "select/selector.h"

enum { MAX_STRIDE = 1024 }; /* a row of xattention holds so many queries */

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
    if (method->has_stride && (c->stride < 1 || c->stride > MAX_STRIDE || c->key_block % c->stride != 0))
        return dhsa_fail(error, DHSA_ERR_VALUE,
                         "stride: got %" PRId64 ", expected a divisor of key_block = %" PRId64 ", at most %d", c->stride,
                         c->key_block, MAX_STRIDE);
    return DHSA_OK;
}

int dhsa_span_exact(const dhsa_select_config *c, int64_t q_len, int64_t k_len, int64_t block, dhsa_span *span)
{
    const int64_t end_query = DHSA_MIN((block + 1) * c->score.query_block, q_len), window = c->score.window;
    const int64_t least = c->mass > 0 ? c->floor : c->budget;
    *span = dhsa_span_candidates(&c->score, q_len, k_len, block);
    if (!(end_query > q_len - c->dense_tail || span->end <= least || (window && window <= least))) return 0;
    span->lo = window ? DHSA_MAX(k_len - q_len + block * c->score.query_block - window + 1, 0) : 0;
    return 1;
}

int64_t dhsa_block_keys(const dhsa_select_config *c, int64_t q_len, int64_t k_len, int64_t block)
{
    dhsa_span span;
    const int exact = dhsa_span_exact(c, q_len, k_len, block, &span);
    return exact ? span.end - span.lo : DHSA_MIN(span.end - span.lo, c->budget);
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
    if ((status = dhsa_selector_open(&s, q, k, boundaries, n_boundaries, NULL, config, num_threads, error))) return status;
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
