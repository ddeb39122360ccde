/* scores.c: how much each block of queries wants each chunk: candidates, what the two scores of chunks (rows.c, dhsa.c) have in
 * common, their methods, and dhsa_chunk_scores. What a score buys is take.c's. Source: arXiv 2510.24606. */
#include <inttypes.h>
#include <math.h>
#include <string.h>

#include "core/threads.h"
#include "select/selector.h"
#include "chunk/past.h"

/* ---- arguments and spans --------------------------------------------------------------------------------------- */

dhsa_span dhsa_span_candidates(const dhsa_score_config *config, int64_t q_len, int64_t k_len, int64_t block)
{
    const int64_t start = k_len - q_len + block * config->query_block, nominal = start + config->query_block;
    dhsa_span span = {0, DHSA_MIN(nominal, k_len)};
    if (config->window) {
        const int64_t lo =
            config->score == DHSA_SCORE_ROWS ? start - config->window + 1 : DHSA_MIN(nominal - config->window, start);
        span.lo = DHSA_MAX(lo, 0);
    }
    return span;
}

int64_t dhsa_score_sets(const dhsa_score_config *config, const dhsa_tensor *q, const dhsa_tensor *k)
{
    return config->heads == DHSA_HEADS_ALL ? 1 : config->heads == DHSA_HEADS_GROUP ? k->shape[1] : q->shape[1];
}

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

dhsa_status dhsa_boundaries_check(const int32_t *boundaries, int64_t batch, int64_t n, int64_t length, dhsa_error *error)
{
    if (!boundaries || n < 2)
        return dhsa_fail(error, DHSA_ERR_VALUE, "boundaries: expected at least the two entries 0 and %" PRId64, length);
    for (int64_t b = 0; b < batch; b++) {
        const int32_t *row = boundaries + b * n;
        if (row[0] != 0)
            return dhsa_fail(error, DHSA_ERR_VALUE, "boundaries: row %" PRId64 " begins with %d, expected 0", b, row[0]);
        for (int64_t c = 1; c < n; c++)
            if (row[c] < row[c - 1])
                return dhsa_fail(error, DHSA_ERR_VALUE, "boundaries: row %" PRId64 " falls from %d to %d at entry %" PRId64, b,
                                 row[c - 1], row[c], c);
        if (row[n - 1] != length)
            return dhsa_fail(error, DHSA_ERR_VALUE,
                             "boundaries: row %" PRId64 " ends with %d, expected the number of keys, %" PRId64, b, row[n - 1],
                             length);
    }
    return DHSA_OK;
}

/* ---- one block -------------------------------------------------------------------------------------------------- */

void dhsa_mean_query(const dhsa_kernels *kernels, const dhsa_tensor *q, int64_t b, int64_t h, int64_t from, int64_t to, float sign,
                     float *mean)
{
    const int64_t dim = q->shape[3], stride = q->stride[2] * dhsa_dtype_size(q->dtype);
    const float n = sign < 0 ? -(float)(to - from) : (float)(to - from);
    kernels->sum_rows(dhsa_row(q, b, h, from), (ptrdiff_t)stride, q->dtype, to - from, dim, mean);
    /* Divided, not times 1 / n: a mean that lies on a tie of bf16 must stay there. */
    for (int64_t d = 0; d < dim; d++) mean[d] /= n;
    for (int64_t d = 0; sign == 0 && d < dim; d++) mean[d] *= 0.0f;
}

/* First entry of edges [0, n) that is at least x (above: more than x). */
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

void dhsa_scorer_run(const dhsa_scorer *s, int64_t set, int64_t block, const int32_t *groups, int64_t n_groups, char *arena,
                     float *score, float *mass, int64_t *first, int64_t *last)
{
    const int64_t q_len = s->q->shape[2], k_len = s->k->shape[2], chunks = s->chunks.chunks;
    const dhsa_span span = dhsa_span_candidates(s->config, q_len, k_len, block);
    const int32_t *edges = s->chunks.edges;
    *first = search(edges, chunks + 1, span.lo, 1) - 1;
    *last = search(edges, chunks + 1, span.end, 0);
    dhsa_block_job job = {.set = set, .from = block * s->config->query_block, .first = *first, .n = *last - *first};
    job.groups = groups;
    job.n_groups = n_groups;
    job.to = DHSA_MIN(job.from + s->config->query_block, q_len);
    const int rows = s->config->score == DHSA_SCORE_ROWS;
    const int64_t kv = set * s->k->shape[1] / s->sets; /* the first KV head of the set */
    /* Row scores may not look past the block's end; the paper's means are of whole chunks. */
    if (rows && edges[*last] > span.end) job.cut_end = span.end;
    score += *first;
    if (mass) mass += *first;
    const unsigned char last_state =
        rows ? dhsa_rows_score(s, &job, kv, arena, score, mass) : dhsa_mean_score(s, &job, kv, arena, score);
    for (int64_t c = 0; c < job.n; c++) {
        unsigned char state = DHSA_CHUNK_GOOD;
        if (score[c] == -INFINITY && !s->chunks.bad) continue; /* on no shortlist */
        for (int64_t h = kv; h < kv + s->kv_per_set; h++)
            state = DHSA_MAX(state, s->chunks.state[h * s->chunks.pitch + job.first + c]);
        if (c == job.n - 1) state = last_state;
        /* A NaN must reach the rows that see it, as in exact attention: such a chunk is always picked.
         * Adding 0 makes one number of the two zeros, so that they tie. */
        score[c] = state == DHSA_CHUNK_EMPTY ? -INFINITY : state == DHSA_CHUNK_BAD ? INFINITY : score[c] + 0.0f;
        if (mass && state != DHSA_CHUNK_GOOD) mass[c] = 0;
    }
}

/* ---- the scorer -------------------------------------------------------------------------------------------------- */

dhsa_status dhsa_scorer_open(dhsa_scorer *s, const dhsa_tensor *q, const dhsa_tensor *k, const dhsa_score_config *config,
                             int64_t n_boundaries, int rounded, dhsa_past *const *pasts, int level, dhsa_error *error)
{
    const int64_t H = q->shape[1], Hkv = k->shape[1], dim = q->shape[3];
    const int rows = config->score == DHSA_SCORE_ROWS;
    memset(s, 0, sizeof *s);
    s->kernels = dhsa_kernels_current();
    s->q = q;
    s->k = k;
    s->config = config;
    s->sets = dhsa_score_sets(config, q, k);
    s->blocks = dhsa_block_count(config, q->shape[2]);
    s->capacity = n_boundaries - 1;
    /* Whole groups are laid out even where the last one is not full. A shortlist lowers nothing: it is of so many keys, and empty
     * chunks, which have none, may be in any number between them. Memory that is not touched costs nothing. */
    s->most = dhsa_round_up(s->capacity, DHSA_CHUNK_GROUP);
    s->heads_per_kv = config->heads == DHSA_HEADS_HEAD ? 1 : H / Hkv;
    s->kv_per_set = config->heads == DHSA_HEADS_ALL ? Hkv : 1;
    const dhsa_means_kind kind = rows && (rounded || q->dtype == DHSA_BF16) ? DHSA_MEANS_BF16 : DHSA_MEANS_F32;
    if (kind == DHSA_MEANS_BF16) s->bf16 = s->kernels->bf16;
    s->pasts = pasts;
    s->level = level;
    int opened = 1;
    if (pasts)
        dhsa_chunks_plan(&s->chunks, kind, s->bf16 != NULL, s->capacity, dim);
    else
        opened = dhsa_chunks_open(&s->chunks, kind, s->bf16 != NULL, Hkv, s->capacity, dim);
    s->arena_size = rows ? dhsa_rows_plan(s) : dhsa_mean_plan(s);
    if (opened) return DHSA_OK;
    dhsa_scorer_close(s);
    return dhsa_fail(error, DHSA_ERR_NO_MEMORY, "scores: no memory for the means of %" PRId64 " chunks", n_boundaries - 1);
}

void dhsa_scorer_close(dhsa_scorer *s)
{
    if (!s->pasts) dhsa_chunks_close(&s->chunks);
    memset(s, 0, sizeof *s);
}

dhsa_status dhsa_scorer_begin(dhsa_scorer *s, int64_t b, const int32_t *boundaries, int64_t n_boundaries, char *arenas,
                              int64_t stride, int num_threads, dhsa_error *error)
{
    const int64_t count = search(boundaries, n_boundaries, s->k->shape[2], 0); /* the padding is left out */
    s->b = b;
    if (s->pasts)
        return dhsa_past_means(s->pasts[b], s->level, s->chunks.kind, s->kernels, s->k, b, boundaries, count, &s->chunks, arenas,
                               stride, num_threads, error);
    s->chunks.edges = boundaries;
    s->chunks.chunks = count;
    dhsa_chunks_fill(s->kernels, s->k, b, &s->chunks, 0, arenas, stride, num_threads);
    return DHSA_OK;
}

/* ---- the paper's method ------------------------------------------------------------------------------------------ */

static dhsa_status open_chunks(dhsa_selector *s, dhsa_error *error)
{
    dhsa_scorer *scorer = dhsa_alloc(1, sizeof *scorer);
    if (!scorer) return dhsa_fail(error, DHSA_ERR_NO_MEMORY, "scores: no memory");
    const dhsa_status status =
        dhsa_scorer_open(scorer, s->q, s->k, &s->config->score, s->n_boundaries, 0, s->pasts, DHSA_LEVEL_FINE, error);
    if (status) {
        dhsa_free(scorer);
        return status;
    }
    s->state = scorer;
    s->units = scorer->capacity;
    s->arena_size = scorer->arena_size; /* what the scorer works in, then scores */
    dhsa_part(NULL, &s->arena_size, scorer->capacity * 4);
    return DHSA_OK;
}

static void close_chunks(dhsa_selector *s)
{
    if (s->state) dhsa_scorer_close(s->state);
    dhsa_free(s->state);
}

static dhsa_status begin_chunks(dhsa_selector *s, int64_t b, dhsa_error *error)
{
    return dhsa_scorer_begin(s->state, b, s->boundaries + b * s->n_boundaries, s->n_boundaries, s->arenas, s->arena_stride,
                             s->num_threads, error);
}

static int64_t list_chunks(const dhsa_selector *s, int64_t set, int64_t block, dhsa_span span, int thread, int32_t *row,
                           int64_t room)
{
    const dhsa_scorer *scorer = s->state;
    char *arena = dhsa_selector_arena(s, thread);
    int64_t used = scorer->arena_size;
    float *score = dhsa_part(arena, &used, scorer->capacity * 4);
    dhsa_units units = {.edges = scorer->chunks.edges, .score = score};
    dhsa_scorer_run(scorer, set, block, NULL, 0, arena, score, NULL, &units.first, &units.last);
    return dhsa_take(s, thread, span, &units, row, room);
}

const dhsa_method dhsa_method_dhsa = {
    .name = "dhsa", .has_chunks = 1, .open = open_chunks, .close = close_chunks, .begin = begin_chunks, .list = list_chunks};

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
