/* scores.c: how much each block of queries wants each chunk: the paper's block score and row scores, and dhsa_chunk_scores.
 * What a score buys is dhsa.c's. Source: arXiv 2510.24606 (block); rows are ours: squared softmax of mean rows, summed. */
#include <inttypes.h>
#include <math.h>
#include <string.h>

#include "core/threads.h"
#include "select/select.h"

enum {
    PANELS = 4,      /* panels of rows that share a tile of chunk means */
    CHUNK_TILE = 128 /* chunk means of a tile, so that they stay in L2 from one panel to the next */
};

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
    dhsa_status status = dhsa_qk_check(q, k, error);
    if (status) return status;
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

/* What one thread works in; pointers into its arena. */
typedef struct {
    float *products; /* [panels] of [chunks, lanes] */
    float *panel;    /* [panels] of [dim, lanes] */
    float *rows;     /* [lanes, dim] */
    float *cut;      /* mean key of the part of the straddling chunk below the block's end */
    float *sum;      /* [dim] */
    float *last;     /* [lanes]: products of the cut mean */
} scratch;

/* Returns the floats an arena needs; base may be NULL to only ask. */
static int64_t lay_out(const dhsa_scorer *s, float *base, scratch *w)
{
    const int64_t dim = dhsa_round_up(s->q->shape[3], DHSA_ALIGN / 4);
    const int64_t sizes[] = {s->panels * s->product_size,
                             s->panels * s->panel_size,
                             dhsa_round_up(s->kernels->lanes * s->q->shape[3], DHSA_ALIGN / 4),
                             dim,
                             dim,
                             DHSA_MAX_LANES};
    float **const parts[] = {&w->products, &w->panel, &w->rows, &w->cut, &w->sum, &w->last};
    int64_t at = 0;
    for (int i = 0; i < 6; i++) {
        *parts[i] = base ? base + at : NULL;
        at += sizes[i];
    }
    return at;
}

/* Queries [from, to) of head h, averaged. */
static void mean_query(const dhsa_scorer *s, int64_t h, int64_t from, int64_t to, float *mean)
{
    const int64_t dim = s->q->shape[3];
    const float factor = 1.0f / (float)(to - from);
    s->kernels->load(dhsa_row(s->q, s->b, h, from), s->q->dtype, dim, mean);
    for (int64_t i = from + 1; i < to; i++) s->kernels->add(dhsa_row(s->q, s->b, h, i), s->q->dtype, dim, mean);
    for (int64_t d = 0; d < dim; d++) mean[d] *= factor;
}

/* One block against chunks [first, first + n): what the two scores have in common. */
typedef struct {
    int64_t set, from, to; /* queries [from, to) */
    int64_t first, n;
    int64_t cut_end; /* rows: the last chunk is cut here; 0: it is not */
} block_job;

static void pack_rows(const dhsa_scorer *s, const block_job *job, int64_t kv_head, int64_t at, int n, scratch *w, float *panel)
{
    const int64_t dim = s->q->shape[3], head = s->config->heads == DHSA_HEADS_HEAD ? job->set : kv_head * s->heads_per_kv;
    const void *rows[DHSA_MAX_LANES];
    for (int r = 0; r < n; r++) {
        const int64_t from = job->from + (at + r) / s->heads_per_kv * s->step;
        float *row = w->rows + r * dim;
        mean_query(s, head + (at + r) % s->heads_per_kv, from, DHSA_MIN(from + s->step, job->to), row);
        /* All products of such a row are infinite or NaN. A softcap would make numbers of them: it is to say nothing. */
        if (!dhsa_all_finite(s->kernels, row, dim)) row[0] = NAN;
        rows[r] = row;
    }
    /* The sign of the scale goes into the rows: the largest product stays the largest logit, and -inf stays -inf. */
    const double scale = s->config->scale;
    s->kernels->pack_panel(rows, DHSA_F32, n, (int)dim, scale < 0 ? -1.0f : scale > 0 ? 1.0f : 0.0f, panel);
}

/* Adds one KV head's squared probabilities to score [n]. Returns the state of its last chunk as this block sees it. */
static unsigned char score_kv_head(const dhsa_scorer *s, const block_job *job, int64_t kv_head, scratch *w, float *score)
{
    const dhsa_kernels *kn = s->kernels;
    const int lanes = kn->lanes, dim = (int)s->q->shape[3];
    const int64_t at_chunk = kv_head * s->chunks.chunks + job->first, n = job->n;
    const float *means = s->chunks.means + at_chunk * dim;
    const unsigned char *state = s->chunks.state + at_chunk;
    const int64_t rows = dhsa_ceil_div(job->to - job->from, s->step) * s->heads_per_kv;
    const float scale = s->config->scale == 0 ? 1.0f : (float)fabs(s->config->scale);
    unsigned char last = state[n - 1];
    if (job->cut_end) {
        const int64_t from = s->chunks.edges[job->first + n - 1];
        const int finite = dhsa_chunk_mean(kn, s->k, s->b, kv_head, from, job->cut_end, w->cut, w->sum);
        last = finite ? DHSA_CHUNK_GOOD : DHSA_CHUNK_BAD;
    }
    for (int64_t at = 0; at < rows; at += (int64_t)s->panels * lanes) {
        const int panels = (int)DHSA_MIN(s->panels, dhsa_ceil_div(rows - at, lanes));
        for (int p = 0; p < panels; p++)
            pack_rows(s, job, kv_head, at + p * lanes, (int)DHSA_MIN(lanes, rows - at - p * lanes), w,
                      w->panel + p * s->panel_size);
        for (int64_t c = 0; c < n; c += CHUNK_TILE)
            for (int p = 0; p < panels; p++)
                kn->qk(w->panel + p * s->panel_size, means + c * dim, dim, (int)DHSA_MIN(CHUNK_TILE, n - c), dim,
                       w->products + p * s->product_size + c * lanes, NULL);
        for (int p = 0; p < panels; p++) {
            float *products = w->products + p * s->product_size;
            if (job->cut_end) {
                kn->qk(w->panel + p * s->panel_size, w->cut, dim, 1, dim, w->last, NULL);
                memcpy(products + (n - 1) * lanes, w->last, (size_t)lanes * sizeof *products);
            }
            /* Empty chunks and those without a finite mean take no part in the softmax. */
            for (int64_t c = 0; c < n; c++)
                if ((c == n - 1 ? last : state[c]) != DHSA_CHUNK_GOOD)
                    for (int r = 0; r < lanes; r++) products[c * lanes + r] = -INFINITY;
            kn->row_scores(products, n, (int)DHSA_MIN(lanes, rows - at - p * lanes), scale, (float)s->config->softcap, score);
        }
    }
    return last;
}

static unsigned char score_rows(const dhsa_scorer *s, const block_job *job, int64_t kv, scratch *w, float *score)
{
    unsigned char last = DHSA_CHUNK_GOOD;
    for (int64_t c = 0; c < job->n; c++) score[c] = 0;
    for (int64_t h = kv; h < kv + s->kv_per_set; h++) {
        const unsigned char state = score_kv_head(s, job, h, w, score);
        last = DHSA_MAX(last, state);
    }
    return last;
}

/* The mean query of the set's heads against the mean key of its KV heads: a dot product a chunk and KV head. */
static unsigned char score_block(const dhsa_scorer *s, const block_job *job, int64_t kv, scratch *w, float *score)
{
    const int64_t dim = s->q->shape[3], members = s->heads_per_kv * s->kv_per_set, chunks = s->chunks.chunks;
    const int root = s->config->pooling == DHSA_POOL_MEAN_SQRT;
    float *query = w->rows, *one = w->sum;
    int finite = 1;
    for (int64_t h = 0; h < members; h++) {
        mean_query(s, job->set * members + h, job->from, job->to, h == 0 ? query : one);
        if (h > 0) s->kernels->add(one, DHSA_F32, dim, query);
    }
    const double factor = s->config->scale * (root ? sqrt((double)(job->to - job->from)) : 1.0) / (double)(members * s->kv_per_set);
    for (int64_t c = 0; c < job->n; c++) {
        const int64_t at = job->first + c;
        const double length = (double)(s->chunks.edges[at + 1] - s->chunks.edges[at]);
        double sum = 0;
        for (int64_t h = kv; h < kv + s->kv_per_set; h++)
            sum += s->kernels->dot(query, s->chunks.means + (h * chunks + at) * dim, dim);
        score[c] = (float)(sum * factor * (root ? sqrt(length) : 1.0));
        int good = 1;
        for (int64_t h = kv; h < kv + s->kv_per_set; h++) good &= s->chunks.state[h * chunks + at] == DHSA_CHUNK_GOOD;
        finite &= !good || isfinite(score[c]);
    }
    /* A block of queries that are not finite has no opinion. */
    const double cap = s->config->softcap;
    for (int64_t c = 0; c < job->n; c++) {
        if (!finite)
            score[c] = 0;
        else if (cap > 0)
            score[c] = (float)(cap * tanh(score[c] / cap));
    }
    unsigned char last = DHSA_CHUNK_GOOD;
    for (int64_t h = kv; h < kv + s->kv_per_set; h++) last = DHSA_MAX(last, s->chunks.state[h * chunks + job->first + job->n - 1]);
    return last;
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

void dhsa_scorer_run(const dhsa_scorer *s, int64_t set, int64_t block, int thread, float *score, int64_t *first, int64_t *last)
{
    const int64_t q_len = s->q->shape[2], k_len = s->k->shape[2], chunks = s->chunks.chunks;
    const dhsa_span span = dhsa_span_candidates(s->config, q_len, k_len, block);
    const int32_t *edges = s->chunks.edges;
    scratch w;
    lay_out(s, s->arenas + thread * s->arena_size, &w);
    *first = search(edges, chunks + 1, span.lo, 1) - 1;
    *last = search(edges, chunks + 1, span.end, 0);
    block_job job = {set, block * s->config->query_block, 0, *first, *last - *first, 0};
    job.to = DHSA_MIN(job.from + s->config->query_block, q_len);
    const int rows = s->config->score == DHSA_SCORE_ROWS;
    const int64_t kv = set * s->k->shape[1] / s->sets; /* the first KV head of the set */
    /* Row scores may not look past the block's end; the paper's means are of whole chunks. */
    if (rows && edges[*last] > span.end) job.cut_end = span.end;
    score += *first;
    const unsigned char last_state = rows ? score_rows(s, &job, kv, &w, score) : score_block(s, &job, kv, &w, score);
    for (int64_t c = 0; c < job.n; c++) {
        unsigned char state = DHSA_CHUNK_GOOD;
        for (int64_t h = kv; h < kv + s->kv_per_set; h++) state = DHSA_MAX(state, s->chunks.state[h * chunks + job.first + c]);
        if (c == job.n - 1) state = last_state;
        /* A NaN must reach the rows that see it, as in exact attention: such a chunk is always picked.
         * Adding 0 makes one number of the two zeros, so that they tie. */
        score[c] = state == DHSA_CHUNK_EMPTY ? -INFINITY : state == DHSA_CHUNK_BAD ? INFINITY : score[c] + 0.0f;
    }
}

/* ---- the scorer -------------------------------------------------------------------------------------------------- */

dhsa_status dhsa_scorer_open(dhsa_scorer *s, const dhsa_tensor *q, const dhsa_tensor *k, const dhsa_score_config *config,
                             int64_t n_boundaries, int num_threads, dhsa_error *error)
{
    const int64_t H = q->shape[1], Hkv = k->shape[1], dim = q->shape[3];
    scratch unused;
    memset(s, 0, sizeof *s);
    s->kernels = dhsa_kernels_current();
    s->q = q;
    s->k = k;
    s->config = config;
    s->sets = dhsa_score_sets(config, q, k);
    s->blocks = dhsa_block_count(config, q->shape[2]);
    /* No workspaces for threads that would find nothing to do; the means are worth a few in any case. */
    s->num_threads = (int)DHSA_MIN(num_threads, DHSA_MAX(s->sets * s->blocks, 16));
    s->heads_per_kv = config->heads == DHSA_HEADS_HEAD ? 1 : H / Hkv;
    s->kv_per_set = config->heads == DHSA_HEADS_ALL ? Hkv : 1;
    const int lanes = s->kernels->lanes;
    s->panels = 1;
    if (config->score == DHSA_SCORE_ROWS) {
        s->step = dhsa_ceil_div(config->query_block, config->rows);
        const int64_t rows = dhsa_ceil_div(DHSA_MIN(config->query_block, q->shape[2]), s->step) * s->heads_per_kv;
        s->panels = (int)DHSA_MIN(PANELS, dhsa_ceil_div(rows, lanes));
        s->product_size = dhsa_round_up((n_boundaries - 1) * lanes, DHSA_ALIGN / 4);
        s->panel_size = dhsa_round_up(dim * lanes, DHSA_ALIGN / 4);
    }
    s->arena_size = lay_out(s, NULL, &unused);
    int64_t cells;
    if (!dhsa_mul(Hkv, n_boundaries - 1, &cells)) cells = INT64_MAX;
    s->chunks.means = dhsa_alloc(cells, dim * (int64_t)sizeof *s->chunks.means);
    s->chunks.state = dhsa_alloc(cells, 1);
    s->arenas = dhsa_alloc(s->arena_size, s->num_threads * (int64_t)sizeof *s->arenas);
    if (s->chunks.means && s->chunks.state && s->arenas) return DHSA_OK;
    dhsa_scorer_close(s);
    return dhsa_fail(error, DHSA_ERR_NO_MEMORY, "scores: no memory for the means of %" PRId64 " chunks", n_boundaries - 1);
}

void dhsa_scorer_close(dhsa_scorer *s)
{
    dhsa_free(s->chunks.means);
    dhsa_free(s->chunks.state);
    dhsa_free(s->arenas);
    memset(s, 0, sizeof *s);
}

void dhsa_scorer_begin(dhsa_scorer *s, int64_t b, const int32_t *boundaries, int64_t n_boundaries)
{
    s->b = b;
    s->chunks.edges = boundaries;
    s->chunks.chunks = search(boundaries, n_boundaries, s->k->shape[2], 0);       /* the padding is left out */
    dhsa_chunks_fill(s->kernels, s->k, b, &s->chunks, s->arenas, s->num_threads); /* arenas hold more than dim each */
}

typedef struct {
    dhsa_scorer scorer;
    float *scores;
    int64_t width; /* chunks, padding included */
} scores_job;

static void scores_task(void *context, int64_t index, int thread)
{
    const scores_job *job = context;
    const dhsa_scorer *s = &job->scorer;
    const int64_t block = s->blocks - 1 - index / s->sets, set = index % s->sets;
    float *score = job->scores + ((s->b * s->sets + set) * s->blocks + block) * job->width;
    int64_t first, last;
    dhsa_scorer_run(s, set, block, thread, score, &first, &last);
    for (int64_t c = 0; c < first; c++) score[c] = -INFINITY;
    for (int64_t c = last; c < job->width; c++) score[c] = -INFINITY;
}

dhsa_status dhsa_chunk_scores(const dhsa_tensor *q, const dhsa_tensor *k, const int32_t *boundaries, int64_t n_boundaries,
                              const dhsa_score_config *config, float *scores, int num_threads, dhsa_error *error)
{
    scores_job job = {.scores = scores, .width = n_boundaries - 1};
    dhsa_status status;
    if ((status = dhsa_score_check(q, k, config, error)) || (status = dhsa_threads_check(num_threads, error)) ||
        (status = dhsa_boundaries_check(boundaries, k->shape[0], n_boundaries, k->shape[2], error)) ||
        (status = dhsa_scorer_open(&job.scorer, q, k, config, n_boundaries, num_threads, error)))
        return status;
    for (int64_t b = 0; b < q->shape[0]; b++) {
        dhsa_scorer_begin(&job.scorer, b, boundaries + b * n_boundaries, n_boundaries);
        dhsa_parallel(job.scorer.sets * job.scorer.blocks, job.scorer.num_threads, scores_task, &job);
    }
    dhsa_scorer_close(&job.scorer);
    return DHSA_OK;
}
