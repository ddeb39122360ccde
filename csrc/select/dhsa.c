/* dhsa.c: Dynamic Hierarchical Sparse Attention's selection: chunk scores to the lists of keys that query blocks may see.
 * Forced keys (sink, local), weighted top-k, ties, exact blocks. Scores are scores.c's, attention is attend/'s. */
#include <inttypes.h>
#include <string.h>

#include "core/threads.h"
#include "select/select.h"

dhsa_status dhsa_select_check(const dhsa_tensor *q, const dhsa_tensor *k, const dhsa_select_config *c, dhsa_error *error)
{
    const dhsa_status status = dhsa_score_check(q, k, &c->score, error);
    if (status) return status;
    if (c->budget < 1) return dhsa_fail(error, DHSA_ERR_VALUE, "budget: got %" PRId64 ", expected at least 1", c->budget);
    if (c->sink < 0) return dhsa_fail(error, DHSA_ERR_VALUE, "sink: got %" PRId64 ", expected at least 0", c->sink);
    if (c->local < 0) return dhsa_fail(error, DHSA_ERR_VALUE, "local: got %" PRId64 ", expected at least 0", c->local);
    if (c->dense_tail < 0)
        return dhsa_fail(error, DHSA_ERR_VALUE, "dense_tail: got %" PRId64 ", expected at least 0", c->dense_tail);
    if (c->sink > c->budget || c->local > c->budget - c->sink)
        return dhsa_fail(error, DHSA_ERR_VALUE,
                         "budget: %" PRId64 " keys do not hold the %" PRId64 " of sink and %" PRId64 " of local", c->budget,
                         c->sink, c->local);
    return DHSA_OK;
}

int dhsa_span_exact(const dhsa_select_config *c, int64_t q_len, int64_t k_len, int64_t block, dhsa_span *span)
{
    const int64_t end_query = DHSA_MIN((block + 1) * c->score.query_block, q_len), window = c->score.window;
    *span = dhsa_span_candidates(&c->score, q_len, k_len, block);
    if (!(end_query > q_len - c->dense_tail || span->end <= c->budget || (window && window <= c->budget))) return 0;
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
    const dhsa_status status = dhsa_select_check(q, k, config, error);
    if (status) return status;
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

/* ---- top-k ------------------------------------------------------------------------------------------------------ */

/* What one thread works in, [chunks] each. */
typedef struct {
    float *score;
    uint32_t *key;  /* order-preserving image of the score */
    int32_t *alive; /* chunks whose higher key digits equal the threshold's */
} top_scratch;

/* The candidates that are not forced: keys [from, to), in chunks [first, last). */
typedef struct {
    const int32_t *edges;
    int64_t first, last, from, to;
} free_keys;

static int64_t free_in_chunk(const free_keys *f, int64_t c)
{
    return DHSA_MAX(DHSA_MIN(f->edges[c + 1], f->to) - DHSA_MAX(f->edges[c], f->from), 0);
}

/* The key that the chunk of rank `need` has, keys counted, best first; *left receives how many keys of chunks with just that
 * key are still wanted. A radix select: three histograms of counts, each narrowing the next, so O(chunks). */
static uint32_t threshold(const free_keys *f, top_scratch *w, int64_t need, int64_t *left)
{
    static const int shifts[] = {21, 10, 0}, bits[] = {11, 11, 10};
    uint32_t prefix = 0;
    int64_t count = 0;
    for (int64_t c = f->first; c < f->last; c++) {
        uint32_t u;
        memcpy(&u, w->score + c, sizeof u);
        w->key[c] = u & 0x80000000u ? ~u : u | 0x80000000u;
        if (free_in_chunk(f, c) > 0) w->alive[count++] = (int32_t)c;
    }
    for (int pass = 0; pass < 3; pass++) {
        int32_t histogram[2048] = {0}; /* of keys, at most INT32_MAX / 2 in all */
        const uint32_t mask = (1u << bits[pass]) - 1;
        for (int64_t i = 0; i < count; i++)
            histogram[w->key[w->alive[i]] >> shifts[pass] & mask] += (int32_t)free_in_chunk(f, w->alive[i]);
        uint32_t digit = mask;
        while (histogram[digit] < need) need -= histogram[digit--];
        prefix |= digit << shifts[pass];
        int64_t kept = 0;
        for (int64_t i = 0; i < count; i++)
            if ((w->key[w->alive[i]] >> shifts[pass] & mask) == digit) w->alive[kept++] = w->alive[i];
        count = kept;
    }
    *left = need;
    return prefix;
}

/* Writes keys [from, to) below `end` and returns the new end. */
static int32_t *write_run(int32_t *end, int64_t from, int64_t to)
{
    if (from >= to) return end;
    end -= to - from;
    for (int64_t j = 0; j < to - from; j++) end[j] = (int32_t)(from + j);
    return end;
}

/* Fills a row backwards, so that of equal scores the more recent keys come first. Its length is exactly the budget. */
static void take_best(const dhsa_select_config *config, dhsa_span span, free_keys *f, top_scratch *w, int32_t *row, int64_t size)
{
    const int64_t sink = DHSA_MAX(DHSA_MIN(config->sink, span.end) - span.lo, 0);
    int64_t need = size - sink - config->local, left = 0;
    int32_t *end = row + size;
    f->from = span.lo + sink;
    f->to = span.end - config->local;
    end = write_run(end, f->to, span.end);
    if (need > 0) {
        const uint32_t least = threshold(f, w, need, &left);
        for (int64_t c = f->last - 1; c >= f->first; c--) {
            if (w->key[c] < least) continue;
            const int64_t to = DHSA_MIN(f->edges[c + 1], f->to);
            int64_t from = DHSA_MAX(f->edges[c], f->from);
            if (from >= to) continue;
            if (w->key[c] == least) {
                from = DHSA_MAX(from, to - left);
                left -= to - from;
            }
            end = write_run(end, from, to);
        }
    }
    write_run(end, span.lo, f->from);
}

/* ---- all blocks -------------------------------------------------------------------------------------------------- */

typedef struct {
    const dhsa_selector *selector;
    int64_t first, blocks;
    const int64_t *indptr;
    int32_t *indices;
    char *arenas;
    int64_t stride; /* chunks, rounded up */
} select_job;

static void select_task(void *context, int64_t index, int thread)
{
    const select_job *job = context;
    const dhsa_select_config *config = job->selector->config;
    const dhsa_scorer *s = &job->selector->scorer;
    /* Set by set, so that its means stay in cache; late blocks have most candidates: the heaviest first. */
    const int64_t block = job->blocks - 1 - index % job->blocks, set = index / job->blocks;
    const int64_t at = set * job->blocks + block, size = job->indptr[at + 1] - job->indptr[at];
    int32_t *row = job->indices + job->indptr[at];
    dhsa_span span;
    if (dhsa_span_exact(config, s->q->shape[2], s->k->shape[2], job->first + block, &span) || size == span.end - span.lo) {
        write_run(row + size, span.lo, span.end);
        return;
    }
    float *arena = (float *)(job->arenas + thread * job->stride * 12);
    top_scratch w = {arena, (uint32_t *)(arena + job->stride), (int32_t *)(arena + 2 * job->stride)};
    free_keys f = {.edges = s->chunks.edges};
    dhsa_scorer_run(s, set, job->first + block, thread, w.score, &f.first, &f.last);
    take_best(config, span, &f, &w, row, size);
}

dhsa_status dhsa_selector_run(const dhsa_selector *selector, int64_t first, int64_t blocks, const int64_t *indptr, int32_t *indices,
                              dhsa_error *error)
{
    const dhsa_scorer *s = &selector->scorer;
    select_job job = {selector, first, blocks, indptr, indices, NULL, dhsa_round_up(s->capacity, DHSA_ALIGN / 4)};
    job.arenas = dhsa_alloc(job.stride * 12, s->num_threads);
    if (!job.arenas)
        return dhsa_fail(error, DHSA_ERR_NO_MEMORY, "select: no memory for the scores of %" PRId64 " chunks", s->capacity);
    dhsa_parallel(s->sets * blocks, s->num_threads, select_task, &job);
    dhsa_free(job.arenas);
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
                        const dhsa_select_config *config, const int64_t *indptr, int32_t *indices, int num_threads,
                        dhsa_error *error)
{
    dhsa_selector selector = {.config = config};
    dhsa_status status;
    int sparse;
    if ((status = dhsa_select_check(q, k, config, error)) || (status = dhsa_threads_check(num_threads, error)) ||
        (status = dhsa_boundaries_check(boundaries, k->shape[0], n_boundaries, k->shape[2], error)) ||
        (status = check_indptr(q, k, config, indptr, &sparse, error)) ||
        (status = dhsa_scorer_open(&selector.scorer, q, k, &config->score, n_boundaries, num_threads, error)))
        return status;
    const int64_t blocks = selector.scorer.blocks;
    for (int64_t b = 0; b < q->shape[0] && !status; b++) {
        if (sparse) dhsa_scorer_begin(&selector.scorer, b, boundaries + b * n_boundaries, n_boundaries);
        status = dhsa_selector_run(&selector, 0, blocks, indptr + b * selector.scorer.sets * blocks, indices, error);
    }
    dhsa_scorer_close(&selector.scorer);
    return status;
}
