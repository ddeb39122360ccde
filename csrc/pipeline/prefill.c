/* prefill.c: the pipeline: boundaries if the method has chunks, then scores, lists and attention over the lists, one
 * wave of query blocks at a time; or attention alone where no keys are left out. This file calls the steps and reports
 * what was done; the steps themselves are in chunk/, select/ and attend/. */
#include <assert.h>
#include <inttypes.h>
#include <string.h>

#include "attend/attend.h"
#include "chunk/key_index.h"
#include "pipeline/pipeline.h"

static dhsa_status run_exact(const dhsa_problem *p, dhsa_stats *stats, dhsa_error *error)
{
    const double start = dhsa_now();
    const dhsa_status status = dhsa_attend_checked(p, NULL, error);
    stats->path = p->window && p->window < p->k.shape[2] ? DHSA_PATH_WINDOW : DHSA_PATH_DENSE;
    stats->attend_seconds = dhsa_now() - start;
    return status;
}

/* ---- waves ----------------------------------------------------------------------------------------------------- */

/* Lists are made and used one wave at a time: query blocks [first, first + blocks) of batch items [b, b + batch). A
 * small call is a single wave; otherwise a wave is a part of one batch item. Waves depend on the shape only. */
enum {
    WAVE_KEYS = 1 << 18, /* keys on the lists of a wave, at most */
    WAVE_LISTS = 32      /* but there are at least this many lists, if the call has them, for threads to share */
};

typedef struct {
    const dhsa_problem *p;
    const dhsa_select_config *config;
    dhsa_selector selector;
    int64_t head_sets, blocks;
    int64_t capacity;          /* entries of a row of boundaries; 0 if the method has no chunks */
    const int32_t *boundaries; /* NULL if the method has no chunks */
    int32_t *own;              /* the memory of boundaries that were allocated here */
    int64_t *indptr;
    int32_t *indices;
    int32_t
        *ranges; /* [B, Lq, 2]: bidirectional windows, which depend on positions that a part does not have; or NULL */
    float *lse;
    double pairs;
} pipeline;

typedef struct {
    int64_t b, batch, first, blocks, keys; /* keys: the sum over all lists */
} wave;

/* Returns the wave that ends before block `end`. The last blocks take the longest, so they come first. */
static wave next_wave(const pipeline *l, int64_t b, int64_t batch, int64_t end)
{
    const int64_t q_len = l->p->q.shape[2], k_len = l->p->k.shape[2], lists = batch * l->head_sets;
    wave w = {b, batch, end, 0, 0};
    while (w.first > 0) {
        const int64_t keys = lists * dhsa_block_keys(l->config, q_len, k_len, w.first - 1);
        if (w.blocks > 0 && w.keys + keys > WAVE_KEYS && lists * w.blocks >= WAVE_LISTS) break;
        w.keys += keys;
        w.blocks++;
        w.first--;
    }
    return w;
}

static dhsa_tensor part_of(const dhsa_tensor *t, int64_t b, int64_t batch, int64_t from, int64_t to)
{
    dhsa_tensor part = *t;
    part.data = dhsa_row(t, b, 0, from);
    part.shape[0] = batch;
    part.shape[2] = to - from;
    return part;
}

static dhsa_status select_wave(pipeline *l, const wave *w, dhsa_error *error)
{
    dhsa_status status = dhsa_selector_alloc_arenas(&l->selector, error);
    l->indptr[0] = 0;
    for (int64_t i = 0; i < w->batch && !status; i++) {
        /* The work that the blocks of a batch item share is done once, before its first wave. */
        if (w->first + w->blocks == l->blocks) status = dhsa_selector_begin(&l->selector, w->b + i, error);
        if (!status)
            status = dhsa_selector_run(&l->selector, w->first, w->blocks, l->indptr + i * l->head_sets * w->blocks,
                                       l->indices, error);
    }
    /* Scoring and attention do not need their workspaces at the same time. */
    dhsa_selector_free_arenas(&l->selector);
    return status;
}

/* Attends the queries of a wave to the keys up to the last of them, as a problem of its own. */
static dhsa_status attend_wave(pipeline *l, const wave *w, dhsa_error *error)
{
    const int64_t H = l->p->q.shape[1], q_len = l->p->q.shape[2], block = l->config->score.query_block;
    const int64_t from = w->first * block, to = DHSA_MIN((w->first + w->blocks) * block, q_len), n = to - from;
    const int64_t end = l->p->causal ? l->p->k.shape[2] - q_len + to : l->p->k.shape[2];
    const int whole = n == q_len;
    dhsa_problem part = *l->p;
    part.q = part_of(&l->p->q, w->b, w->batch, from, to);
    part.out = part_of(&l->p->out, w->b, w->batch, from, to);
    part.k = part_of(&l->p->k, w->b, w->batch, 0, end);
    part.v = part_of(&l->p->v, w->b, w->batch, 0, end);
    /* The ranges take the place of the window, which stays for how attention divides its work. */
    if (l->ranges) part.key_ranges = l->ranges + 2 * (w->b * q_len + from);
    if (l->p->lse) part.lse = whole ? l->p->lse + w->b * H * q_len : l->lse;
    const dhsa_selection list = {w->batch, l->head_sets, w->blocks, block, l->indptr, l->indices};
    assert(dhsa_selection_check(&list, w->batch * l->head_sets * w->blocks + 1, -1, w->batch, H, l->p->k.shape[1], n,
                                end, NULL) == DHSA_OK);
    const dhsa_status status = dhsa_attend_checked(&part, &list, error);
    if (!status && l->p->lse && !whole) /* one batch item */
        for (int64_t h = 0; h < H; h++)
            memcpy(l->p->lse + (w->b * H + h) * q_len + from, l->lse + h * n, (size_t)n * sizeof *l->lse);
    l->pairs += status ? 0 : dhsa_pairs_kept(l->p, &list, l->p->k.shape[2] - q_len + from, n);
    return status;
}

/* Runs all waves. With stats NULL it only finds the largest number of lists and of keys of a wave. */
static dhsa_status run_waves(pipeline *l, dhsa_stats *stats, int64_t *lists, int64_t *keys, dhsa_error *error)
{
    const int64_t batch = l->p->q.shape[0];
    const wave all = next_wave(l, 0, batch, l->blocks);
    const int one = all.blocks == l->blocks;
    dhsa_status status = DHSA_OK;
    for (int64_t b = 0; b < batch && !status; b += one ? batch : 1)
        for (int64_t end = l->blocks; end > 0 && !status;) {
            const wave w = one ? all : next_wave(l, b, 1, end);
            end = w.first;
            if (!stats) {
                *lists = DHSA_MAX(*lists, w.batch * l->head_sets * w.blocks);
                *keys = DHSA_MAX(*keys, w.keys);
                continue;
            }
            const double start = dhsa_now();
            status = select_wave(l, &w, error);
            const double chosen = dhsa_now();
            if (!status) status = attend_wave(l, &w, error);
            stats->select_seconds += chosen - start;
            stats->attend_seconds += dhsa_now() - chosen;
        }
    return status;
}

static dhsa_status cut(pipeline *l, const dhsa_boundary_config *config, dhsa_error *error)
{
    const dhsa_tensor *k = &l->p->k;
    int64_t *counts = dhsa_alloc(k->shape[0], sizeof *counts);
    l->capacity = dhsa_boundaries_capacity(config, k->shape[2]);
    l->boundaries = l->own = dhsa_alloc(k->shape[0], l->capacity * (int64_t)sizeof *l->own);
    const dhsa_status status =
        counts && l->own
            ? dhsa_boundaries_checked(k, config, l->own, l->capacity, counts, l->p->num_threads, error)
            : dhsa_fail(error, DHSA_ERR_NO_MEMORY, "prefill: no memory for %" PRId64 " boundaries", l->capacity);
    dhsa_free(counts);
    return status;
}

/* Updates the key indexes, which cut only the keys that are new to them, and takes the boundaries from them. */
static dhsa_status cut_indexed(pipeline *l, const dhsa_boundary_config *config, dhsa_key_index *const *key_indexes,
                               int64_t same, dhsa_error *error)
{
    const dhsa_tensor *k = &l->p->k;
    for (int64_t b = 0; b < k->shape[0]; b++) {
        const dhsa_status status = l->boundaries
                                       ? dhsa_key_index_assign(key_indexes[b], k, b, l->boundaries + b * l->capacity,
                                                               l->capacity, same, l->p->num_threads, error)
                                       : dhsa_key_index_update(key_indexes[b], k, b, config, l->p->q.shape[2] == 1,
                                                               same, l->p->num_threads, error);
        if (status) return status;
    }
    if (l->boundaries) return DHSA_OK;
    for (int64_t b = 0; b < k->shape[0]; b++)
        l->capacity = DHSA_MAX(l->capacity, dhsa_key_index_boundaries(key_indexes[b], NULL));
    int32_t *boundaries = l->own = dhsa_alloc(k->shape[0], l->capacity * (int64_t)sizeof *boundaries);
    if (!boundaries)
        return dhsa_fail(error, DHSA_ERR_NO_MEMORY, "prefill: no memory for %" PRId64 " boundaries", l->capacity);
    for (int64_t b = 0; b < k->shape[0]; b++) {
        int32_t *row = boundaries + b * l->capacity;
        for (int64_t i = dhsa_key_index_boundaries(key_indexes[b], row); i < l->capacity; i++)
            row[i] = (int32_t)k->shape[2];
    }
    l->boundaries = boundaries;
    return DHSA_OK;
}

/* The keys that each query sees in a bidirectional window, as key_ranges; NULL if there is no memory. */
static int32_t *window_ranges(const dhsa_problem *p)
{
    const int64_t batch = p->q.shape[0], q_len = p->q.shape[2], k_len = p->k.shape[2];
    int32_t *ranges = dhsa_alloc(batch * q_len, 2 * (int64_t)sizeof *ranges);
    for (int64_t i = 0; ranges && i < batch * q_len; i++) {
        const int64_t at = i % q_len + k_len - q_len;
        ranges[2 * i] = (int32_t)DHSA_MAX(0, at - p->window + 1);
        ranges[2 * i + 1] = (int32_t)(p->window < k_len - at ? at + p->window : k_len);
    }
    return ranges;
}

static dhsa_status run_sparse(const dhsa_problem *p, const dhsa_boundary_config *config, const int32_t *boundaries,
                              int64_t n_boundaries, const dhsa_select_config *select,
                              dhsa_key_index *const *key_indexes, int64_t same, int keep_means, dhsa_stats *stats,
                              dhsa_error *error)
{
    const double start = dhsa_now();
    const int64_t H = p->q.shape[1], q_len = p->q.shape[2];
    pipeline l = {.p = p, .config = select, .capacity = n_boundaries, .boundaries = boundaries};
    l.head_sets = dhsa_head_sets(&select->score, &p->q, &p->k);
    l.blocks = dhsa_block_count(&select->score, q_len);
    int64_t lists = 0, keys = 0;
    dhsa_status status;
    if (dhsa_method_has_chunks(select->method) && (key_indexes || !boundaries) &&
        (status = key_indexes ? cut_indexed(&l, config, key_indexes, same, error) : cut(&l, config, error)))
        goto cleanup;
    run_waves(&l, NULL, &lists, &keys, NULL);
    l.indptr = dhsa_alloc(lists + 1, sizeof *l.indptr);
    l.indices = dhsa_alloc(keys, sizeof *l.indices);
    l.lse =
        p->lse
            ? dhsa_alloc(H, DHSA_MIN(lists / l.head_sets * select->score.query_block, q_len) * (int64_t)sizeof *l.lse)
            : NULL;
    if (!p->causal && p->window) l.ranges = window_ranges(p);
    if (!l.indptr || !l.indices || (p->lse && !l.lse) || (!p->causal && p->window && !l.ranges)) {
        status = dhsa_fail(error, DHSA_ERR_NO_MEMORY, "prefill: no memory for lists of %" PRId64 " keys", keys);
        goto cleanup;
    }
    if ((status = dhsa_selector_open(&l.selector, dhsa_method_find(select->method), &p->q, &p->k, l.boundaries,
                                     l.capacity, key_indexes, select, p->num_threads, error)))
        goto cleanup;
    stats->path = DHSA_PATH_SPARSE;
    stats->select_seconds = dhsa_now() - start;
    status = run_waves(&l, stats, NULL, NULL, error);
    stats->density = l.pairs / dhsa_pairs_visible(p, l.head_sets);
    dhsa_selector_close(&l.selector);
cleanup:
    /* A call that failed midway leaves key indexes that cannot be used, so they are emptied. */
    for (int64_t b = 0; key_indexes && status && b < p->k.shape[0]; b++) dhsa_key_index_reset(key_indexes[b]);
    for (int64_t b = 0; key_indexes && !keep_means && b < p->k.shape[0]; b++) dhsa_key_index_drop_means(key_indexes[b]);
    dhsa_free(l.own);
    dhsa_free(l.indptr);
    dhsa_free(l.indices);
    dhsa_free(l.lse);
    dhsa_free(l.ranges);
    return status;
}

static dhsa_status run(const dhsa_problem *p, const dhsa_boundary_config *boundary_config, const int32_t *boundaries,
                       int64_t n_boundaries, const dhsa_select_config *config, dhsa_key_index *const *key_indexes,
                       int64_t same, int keep_means, dhsa_stats *stats, dhsa_error *error)
{
    dhsa_status status;
    if ((status = dhsa_check_pointer(config, "select", error)) || (status = dhsa_check_pointer(stats, "stats", error)))
        return status;
    dhsa_select_config select = *config;
    memset(stats, 0, sizeof *stats);
    stats->density = 1.0;
    if ((status = dhsa_problem_check(p, error)) || (status = dhsa_config_check(config, NULL, error))) return status;
    if (same < 0) return dhsa_fail(error, DHSA_ERR_VALUE, "same: got %" PRId64 ", expected at least 0", same);
    for (int64_t b = 0; key_indexes && b < p->k.shape[0]; b++) {
        if ((status = dhsa_check_pointer(key_indexes[b], "key_indexes", error))) return status;
        key_indexes[b]->item = b;
    }
    for (int64_t b = 0; key_indexes && b < p->k.shape[0]; b++)
        if (key_indexes[b]->item != b)
            return dhsa_fail(error, DHSA_ERR_VALUE,
                             "key_indexes: batch items %" PRId64 " and %" PRId64
                             " share one, expected one for each item",
                             b, key_indexes[b]->item);
    if (p->key_ranges) return dhsa_fail(error, DHSA_ERR_NOT_IMPLEMENTED, "key_ranges: sparse attention takes none");
    if ((status = dhsa_sides_check(config, !p->causal, error))) return status;
    if (!p->causal && key_indexes)
        return dhsa_fail(error, DHSA_ERR_NOT_IMPLEMENTED, "key_indexes: only causal attention can use them again");
    if (!p->causal && p->q.shape[2] > p->k.shape[2])
        return dhsa_fail(error, DHSA_ERR_VALUE,
                         "q: %" PRId64 " queries are more than the %" PRId64
                         " keys, expected Lq <= Lk for sparse attention",
                         p->q.shape[2], p->k.shape[2]);
    const int of_rows = select.score.score == DHSA_SCORE_ROWS;
    select.score.scale = of_rows ? p->scale : 1.0;
    select.score.softcap = of_rows ? p->softcap : 0.0;
    select.score.window = p->window;
    select.score.bidirectional = !p->causal;
    if (key_indexes && !dhsa_method_has_chunks(select.method))
        return dhsa_fail(error, DHSA_ERR_VALUE, "key_indexes: method %s has no chunks to keep",
                         dhsa_method_find(select.method)->name);
    if (key_indexes && p->q.shape[2] == 1) { /* a decoding step */
        select.score.query_block = select.score.mean_queries = 1;
        select.dense_tail = 0;
        /* Steps take as long as reading the keys they choose, so that heads share them. */
        if (select.score.heads == DHSA_HEADS_HEAD) select.score.heads = DHSA_HEADS_GROUP;
        /* A single query needs a shorter shortlist than a block, whose queries differ in the keys that they need. */
        select.shortlist = DHSA_MAX(select.shortlist / 2, DHSA_MIN(select.shortlist, select.budget));
    }
    if (boundaries && !dhsa_method_has_chunks(select.method))
        return dhsa_fail(error, DHSA_ERR_VALUE, "boundaries: this method cuts no chunks; expected none");
    if (boundaries && (status = dhsa_boundaries_check(boundaries, p->k.shape[0], n_boundaries, p->k.shape[2], error)))
        return status;
    if (!dhsa_leaves_out(&select, p->q.shape[2], p->k.shape[2], p->window, p->causal))
        return run_exact(p, stats, error);
    /* Checked before the key indexes are touched: refused arguments leave them unchanged. */
    if (dhsa_method_has_chunks(select.method) && !boundaries &&
        ((status = dhsa_boundary_config_check(boundary_config, error)) ||
         (status = dhsa_boundary_config_fits(boundary_config, &p->k, error))))
        return status;
    return run_sparse(p, boundary_config, boundaries, boundaries ? n_boundaries : 0, &select, key_indexes, same,
                      keep_means, stats, error);
}

dhsa_status dhsa_prefill(const dhsa_problem *p, const dhsa_boundary_config *boundary_config, const int32_t *boundaries,
                         int64_t n_boundaries, const dhsa_select_config *config, dhsa_stats *stats, dhsa_error *error)
{
    return run(p, boundary_config, boundaries, n_boundaries, config, NULL, 0, 0, stats, error);
}

dhsa_status dhsa_prefill_indexed(const dhsa_problem *p, const dhsa_boundary_config *boundary_config,
                                 const int32_t *boundaries, int64_t n_boundaries, const dhsa_select_config *config,
                                 dhsa_key_index *const *key_indexes, int64_t same, int keep_means, dhsa_stats *stats,
                                 dhsa_error *error)
{
    const dhsa_status status = dhsa_check_pointer(key_indexes, "key_indexes", error);
    return status
               ? status
               : run(p, boundary_config, boundaries, n_boundaries, config, key_indexes, same, keep_means, stats, error);
}
