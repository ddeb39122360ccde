/* selector.c: the selector, which runs one method over all query blocks: workspaces, threads, exact blocks, and lists
 * stored one after the other. How a method finds its keys is in its file in methods/. */
#include "select/selector.h"

#include <inttypes.h>
#include <string.h>

#include "core/threads.h"
#include "select/finite.h"

dhsa_status dhsa_selector_open(dhsa_selector *s, const dhsa_method *method, const dhsa_tensor *q, const dhsa_tensor *k,
                               const int32_t *boundaries, int64_t n_boundaries, dhsa_key_index *const *key_indexes,
                               const dhsa_select_config *config, int num_threads, dhsa_error *error)
{
    memset(s, 0, sizeof *s);
    s->method = method;
    s->config = config;
    s->kernels = dhsa_kernels_current();
    s->q = q;
    s->k = k;
    s->boundaries = boundaries;
    s->n_boundaries = n_boundaries;
    s->key_indexes = key_indexes;
    s->head_sets = dhsa_head_sets(&config->score, q, k);
    s->blocks = dhsa_block_count(&config->score, q->shape[2]);
    s->heads_per_set = q->shape[1] / s->head_sets;
    s->group = q->shape[1] / k->shape[1];
    s->num_threads = dhsa_select_threads(num_threads, s->head_sets * s->blocks);
    dhsa_status status = DHSA_OK;
    if (method->has_finite && !dhsa_finite_open(s))
        status = dhsa_fail(error, DHSA_ERR_NO_MEMORY, "%s: no memory for flags of %" PRId64 " keys", method->name,
                           k->shape[2]);
    if (!status && method->open) status = method->open(s, error);
    s->arena_stride = dhsa_topk_scratch(s->segments, s->arena_size);
    if (!status) status = dhsa_selector_alloc_arenas(s, error);
    if (status) dhsa_selector_close(s);
    return status;
}

void dhsa_selector_close(dhsa_selector *s)
{
    if (s->state && s->method->close) s->method->close(s);
    dhsa_free(s->state);
    dhsa_finite_close(s);
    dhsa_free(s->arenas);
    memset(s, 0, sizeof *s);
}

dhsa_status dhsa_selector_alloc_arenas(dhsa_selector *s, dhsa_error *error)
{
    if (!s->arenas) s->arenas = dhsa_alloc(DHSA_MAX(s->arena_stride, DHSA_ALIGN), s->num_threads);
    return s->arenas ? DHSA_OK
                     : dhsa_fail(error, DHSA_ERR_NO_MEMORY, "select: no memory for %d workspaces of %" PRId64 " bytes",
                                 s->num_threads, s->arena_stride);
}

void dhsa_selector_free_arenas(dhsa_selector *s)
{
    dhsa_free(s->arenas);
    s->arenas = NULL;
}

dhsa_status dhsa_selector_begin(dhsa_selector *s, int64_t b, dhsa_error *error)
{
    s->b = b;
    if (s->method->has_finite) dhsa_finite_begin(s);
    return s->method->begin ? s->method->begin(s, b, error) : DHSA_OK;
}

/* ---- all blocks ------------------------------------------------------------------------------------------------ */

typedef struct {
    const dhsa_selector *selector;
    int64_t first, blocks;
    const int64_t *indptr; /* where the room of each list begins */
    int64_t *counts;       /* the number of keys of each list */
    int32_t *indices;
} list_job;

static void selector_task(void *context, int64_t index, int thread)
{
    const list_job *job = context;
    const dhsa_selector *s = job->selector;
    /* Set by set, so that the data of a set stays in cache. Late blocks come first: they have the most candidates, and
     * the longest tasks should not be the last to start. */
    const int64_t block = job->blocks - 1 - index % job->blocks, set = index / job->blocks;
    const int64_t at = set * job->blocks + block, room = job->indptr[at + 1] - job->indptr[at];
    int32_t *row = job->indices + job->indptr[at];
    dhsa_span span;
    const int exact = dhsa_span_exact(s->config, s->q->shape[2], s->k->shape[2], job->first + block, &span);
    if (exact || (s->config->mass == 0 && room == span.end - span.lo))
        job->counts[at] = dhsa_write_keys(row, span.lo, span.end);
    else
        job->counts[at] = s->method->list(s, set, job->first + block, span, thread, row, room);
}

dhsa_status dhsa_selector_run(const dhsa_selector *s, int64_t first, int64_t blocks, int64_t *indptr, int32_t *indices,
                              dhsa_error *error)
{
    const int64_t lists = s->head_sets * blocks;
    list_job job = {s, first, blocks, indptr, dhsa_alloc(lists, sizeof *job.counts), indices};
    if (!job.counts)
        return dhsa_fail(error, DHSA_ERR_NO_MEMORY, "select: no memory for the lengths of %" PRId64 " lists", lists);
    for (int64_t at = 0; at < lists; at++)
        indptr[at + 1] = indptr[at] + dhsa_block_keys(s->config, s->q->shape[2], s->k->shape[2], first + at % blocks);
    dhsa_parallel(lists, s->num_threads, selector_task, &job);
    for (int64_t at = 0, from = indptr[0]; at < lists; at++) { /* lists written at `from` close up */
        const int64_t next = indptr[at + 1];
        if (from != indptr[at]) memmove(indices + indptr[at], indices + from, (size_t)job.counts[at] * sizeof *indices);
        indptr[at + 1] = indptr[at] + job.counts[at];
        from = next;
    }
    dhsa_free(job.counts);
    return DHSA_OK;
}
