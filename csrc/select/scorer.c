/* scorer.c: scores each chunk for each query block: finds the candidates, and holds what row scores (row_scores.c) and
 * the scores of the paper (mean_scores.c) have in common. Source: arXiv 2510.24606. */
#include <inttypes.h>
#include <math.h>
#include <string.h>

#include "select/scorer.h"

/* ---- one block ------------------------------------------------------------------------------------------------- */

/* Returns the index of the first entry of edges [0, n) that is at least x (above: more than x), or n. */
static int64_t search(const int32_t *edges, int64_t n, int64_t x, int above)
{
    int64_t low = 0;
    while (low < n) {
        const int64_t mid = low + (n - low) / 2;
        if (edges[mid] < x || (above && edges[mid] == x))
            low = mid + 1;
        else
            n = mid;
    }
    return low;
}

/* Writes the chunks of list->groups that are whole chunks of the block to list->live; returns how many. */
static int64_t find_live(const dhsa_block_job *job, const dhsa_shortlist *list)
{
    const int64_t last = job->first + job->n - (job->cut_end != 0);
    int64_t n = 0;
    for (int64_t g = 0; g < list->n_groups; g++) {
        const int64_t from = list->groups[g] * (int64_t)DHSA_CHUNK_GROUP;
        for (int64_t c = DHSA_MAX(from, job->first); c < DHSA_MIN(from + DHSA_CHUNK_GROUP, last); c++)
            list->live[n++] = (int32_t)c;
    }
    return n;
}

/* Replaces the score of a chunk that is empty or not finite. As in exact attention, a NaN must reach the queries that
 * see it, so a chunk that is not finite is always picked. Adding 0 turns -0 into +0, so that the two zeros tie. */
static void finish_score(unsigned char state, float *score, float *mass)
{
    *score = state == DHSA_CHUNK_EMPTY ? -INFINITY : state == DHSA_CHUNK_BAD ? INFINITY : *score + 0.0f;
    if (mass && state != DHSA_CHUNK_GOOD) *mass = 0;
}

void dhsa_scorer_run(const dhsa_scorer *s, int64_t set, int64_t block, dhsa_shortlist *list, char *arena, float *score,
                     float *mass, int64_t *first, int64_t *last)
{
    const int64_t q_len = s->q->shape[2], k_len = s->k->shape[2], chunks = s->chunks.chunks;
    const dhsa_span span = dhsa_span_candidates(s->config, q_len, k_len, block);
    const int32_t *edges = s->chunks.edges;
    *first = search(edges, chunks + 1, span.lo, 1) - 1;
    *last = search(edges, chunks + 1, span.end, 0);
    dhsa_block_job job = {.set = set, .from = block * s->config->query_block, .first = *first, .n = *last - *first};
    job.to = DHSA_MIN(job.from + s->config->query_block, q_len);
    const int row_scores = s->config->score == DHSA_SCORE_ROWS;
    const int64_t kv = set * s->k->shape[1] / s->head_sets; /* the first KV head of the set */
    /* Row scores use no keys past the end of the block. The scores of the paper use the means of whole chunks. */
    if (row_scores && edges[*last] > span.end) job.cut_end = span.end;
    if (list) {
        job.logs = list->logs;
        job.rows_packed = &list->rows_packed;
        job.logs_given = list->groups != NULL;
        job.live = list->groups ? list->live : NULL;
        if (list->groups) job.n_live = list->n_live = find_live(&job, list);
    }
    const unsigned char last_state =
        row_scores ? dhsa_row_scores(s, &job, kv, arena, score + *first, mass ? mass + *first : NULL)
                   : dhsa_mean_score(s, &job, kv, arena, score + *first);
    if (job.live && job.cut_end) list->live[list->n_live++] = (int32_t)(*last - 1);
    const int64_t n = job.live ? list->n_live : job.n;
    for (int64_t i = 0; i < n && (s->chunks.odd || !row_scores); i++) {
        const int64_t c = job.live ? job.live[i] : *first + i;
        unsigned char state = DHSA_CHUNK_GOOD;
        for (int64_t h = kv; h < kv + s->kv_per_set; h++)
            state = DHSA_MAX(state, s->chunks.state[h * s->chunks.pitch + c]);
        if (c < *last - 1) finish_score(state, score + c, mass ? mass + c : NULL);
    }
    finish_score(last_state, score + *last - 1, mass ? mass + *last - 1 : NULL);
}

/* ---- the scorer ------------------------------------------------------------------------------------------------ */

dhsa_status dhsa_scorer_open(dhsa_scorer *s, const dhsa_tensor *q, const dhsa_tensor *k,
                             const dhsa_score_config *config, int64_t n_boundaries, int quantized,
                             dhsa_key_index *const *key_indexes, int level, dhsa_error *error)
{
    const int64_t H = q->shape[1], Hkv = k->shape[1], dim = q->shape[3];
    const int row_scores = config->score == DHSA_SCORE_ROWS;
    memset(s, 0, sizeof *s);
    s->kernels = dhsa_kernels_current();
    s->q = q;
    s->k = k;
    s->config = config;
    s->head_sets = dhsa_head_sets(config, q, k);
    s->blocks = dhsa_block_count(config, q->shape[2]);
    s->capacity = n_boundaries - 1;
    /* There is room for whole groups, even if the last one is not full. A shortlist does not lower this: it limits
     * the number of keys, and any number of empty chunks may be among its chunks. Memory that is not touched costs
     * nothing. */
    s->most = dhsa_round_up(s->capacity, DHSA_CHUNK_GROUP);
    s->heads_per_kv = config->heads == DHSA_HEADS_HEAD ? 1 : H / Hkv;
    s->kv_per_set = config->heads == DHSA_HEADS_ALL ? Hkv : 1;
    dhsa_means_kind kind = DHSA_MEANS_F32;
    if (row_scores && quantized) {
        s->bytes = s->kernels->bytes;
        s->bf16 = s->bytes ? NULL : s->kernels->bf16;
        kind = s->bytes ? DHSA_MEANS_I8 : DHSA_MEANS_BF16;
    }
    const int spreads = level == DHSA_LEVEL_COARSE;
    s->key_indexes = key_indexes;
    s->level = level;
    int opened = 1;
    if (key_indexes)
        dhsa_chunks_plan(&s->chunks, kind, s->bf16 != NULL, spreads, s->capacity, dim);
    else
        opened = dhsa_chunks_open(&s->chunks, kind, s->bf16 != NULL, spreads, Hkv, s->capacity, dim);
    s->arena_size = row_scores ? dhsa_row_scores_plan(s) : dhsa_mean_plan(s);
    if (opened) return DHSA_OK;
    dhsa_scorer_close(s);
    return dhsa_fail(error, DHSA_ERR_NO_MEMORY, "scores: no memory for the means of %" PRId64 " chunks",
                     n_boundaries - 1);
}

void dhsa_scorer_close(dhsa_scorer *s)
{
    if (!s->key_indexes) dhsa_chunks_close(&s->chunks);
    memset(s, 0, sizeof *s);
}

dhsa_status dhsa_scorer_begin(dhsa_scorer *s, int64_t b, const int32_t *boundaries, int64_t n_boundaries, char *arenas,
                              int64_t stride, int num_threads, dhsa_error *error)
{
    const int64_t count = search(boundaries, n_boundaries, s->k->shape[2], 0); /* the padding is left out */
    s->b = b;
    if (s->key_indexes)
        return dhsa_key_index_means(s->key_indexes[b], s->level, s->chunks.kind, s->kernels, s->k, b, boundaries, count,
                                    &s->chunks, arenas, stride, num_threads, error);
    s->chunks.edges = boundaries;
    s->chunks.chunks = count;
    if (s->means)
        dhsa_chunks_take(&s->chunks, s->means);
    else
        dhsa_chunks_fill(s->kernels, s->k, b, &s->chunks, 0, arenas, stride, num_threads);
    return DHSA_OK;
}
