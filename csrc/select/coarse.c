/* coarse.c: scores of key blocks from mean queries and mean keys, see coarse.h. The float64 definition is block_rows in
 * dhsa/_twin/blocks.py. */
#include "select/coarse.h"

#include <math.h>
#include <string.h>

int32_t *dhsa_block_edges(int64_t length, int64_t key_block)
{
    const int64_t n = dhsa_ceil_div(length, key_block);
    int32_t *edges = dhsa_alloc(n + 1, sizeof *edges);
    for (int64_t u = 0; edges && u <= n; u++) edges[u] = (int32_t)DHSA_MIN(u * key_block, length);
    return edges;
}

void dhsa_mean_queries_pack(void *of, int64_t first, int n, float *panel, int32_t *lo, int32_t *hi)
{
    const dhsa_mean_queries *m = of;
    const dhsa_tensor *q = m->s->q;
    const int64_t dim = q->shape[3], stride = dhsa_step(q, 2);
    const void *rows[DHSA_MAX_LANES];
    (void)lo, (void)hi;
    for (int r = 0; r < n; r++) {
        const int64_t from = m->queries.lo + (first + r) / m->heads * m->run,
                      count = DHSA_MIN(m->run, m->queries.end - from);
        float *row = m->rows + r * dim;
        m->kernels->sum_rows(dhsa_row(q, m->s->b, m->head + (first + r) % m->heads, from), (ptrdiff_t)stride, q->dtype,
                             count, dim, row);
        for (int64_t d = 0; d < dim; d++) row[d] /= (float)count;
        rows[r] = row;
    }
    m->kernels->pack_panel(rows, DHSA_F32, n, (int)dim, dhsa_probe_sign(m->s), panel);
}

/* ---- mean keys of blocks --------------------------------------------------------------------------------------- */

int dhsa_block_means_open(dhsa_block_means *m, const dhsa_selector *s)
{
    const int64_t k_len = s->k->shape[2], blocks = dhsa_ceil_div(k_len, s->config->key_block);
    m->edges = dhsa_block_edges(k_len, s->config->key_block);
    const int opened = dhsa_chunks_open(&m->chunks, DHSA_MEANS_F32, 0, 0, s->k->shape[1], blocks, s->k->shape[3]);
    m->chunks.edges = m->edges;
    m->chunks.chunks = blocks;
    return opened && m->edges;
}

void dhsa_block_means_close(dhsa_block_means *m)
{
    dhsa_chunks_close(&m->chunks);
    dhsa_free(m->edges);
}

void dhsa_block_means_begin(dhsa_block_means *m, const dhsa_selector *s)
{
    dhsa_chunks_fill(s->kernels, s->k, s->b, &m->chunks, 0, s->arenas, s->arena_stride, s->num_threads);
}

const float *dhsa_block_mean(const dhsa_block_means *m, const dhsa_selector *s, int64_t kv_head, int64_t u, int64_t end,
                             float *cut, float *sum, int *good)
{
    if (m->edges[u + 1] > end) {
        *good = dhsa_chunk_mean(s->kernels, s->k, s->b, kv_head, m->edges[u], end, cut, sum);
        return cut;
    }
    const int64_t at = kv_head * m->chunks.pitch + u;
    *good = m->chunks.state[at] == DHSA_CHUNK_GOOD;
    return (const float *)m->chunks.means + at * s->k->shape[3];
}

/* ---- key blocks ------------------------------------------------------------------------------------------------ */

typedef struct {
    dhsa_mean_queries rows;
    const dhsa_coarse *coarse;
    int64_t cut_end;   /* where the last key block ends for this query block */
    float *mean, *sum; /* [dim]: the mean of a key block that is cut, and scratch for its sum */
} coarse_job;

/* Scratch memory of one thread, after that of the probe. */
static int64_t coarse_lay_out(const dhsa_coarse *c, int64_t dim, char *arena, coarse_job *w)
{
    int64_t used = c->probe.arena_size;
    w->rows.rows = dhsa_part(arena, &used, DHSA_MAX_LANES * dim * 4);
    w->mean = dhsa_part(arena, &used, dim * 4);
    w->sum = dhsa_part(arena, &used, dim * 4);
    return used;
}

int dhsa_coarse_open(dhsa_coarse *c, const dhsa_selector *s, int64_t run)
{
    const int64_t dim = s->q->shape[3], blocks = dhsa_ceil_div(s->k->shape[2], s->config->key_block);
    const int64_t queries = DHSA_MIN(s->config->score.query_block, s->q->shape[2]);
    coarse_job unused;
    c->run = run;
    dhsa_probe_plan(&c->probe, DHSA_PROBE_KEYS, dhsa_ceil_div(queries, run) * DHSA_MIN(s->heads_per_set, s->group),
                    blocks, dim, 1);
    c->arena_size = coarse_lay_out(c, dim, NULL, &unused);
    return dhsa_block_means_open(&c->means, s);
}

void dhsa_coarse_close(dhsa_coarse *c) { dhsa_block_means_close(&c->means); }

static const float *coarse_keys(void *of, int64_t first, int n, float *tile, ptrdiff_t *stride)
{
    const coarse_job *w = of;
    const dhsa_selector *s = w->rows.s;
    const int64_t dim = s->q->shape[3], kv_head = w->rows.head / s->group;
    for (int j = 0; j < n; j++) {
        int good;
        const float *mean =
            dhsa_block_mean(&w->coarse->means, s, kv_head, first + j, w->cut_end, w->mean, w->sum, &good);
        memcpy(tile + j * dim, mean, (size_t)dim * sizeof *tile);
        if (!good) tile[j * dim] = NAN; /* rows that see this block do not count */
    }
    *stride = dim;
    return tile;
}

void dhsa_coarse_score(const dhsa_coarse *c, const dhsa_selector *s, int64_t set, int64_t block, dhsa_span span,
                       char *arena, float *score)
{
    const int64_t first = set * s->heads_per_set, heads = DHSA_MIN(s->heads_per_set, s->group);
    const int64_t from = span.lo / s->config->key_block, to = dhsa_ceil_div(span.end, s->config->key_block);
    coarse_job w = {
        {s, c->probe.kernels, dhsa_block_queries(s, block), c->run, 0, heads, NULL}, c, span.end, NULL, NULL};
    coarse_lay_out(c, s->q->shape[3], arena, &w);
    for (int64_t u = from; u < to; u++) score[u] = 0;
    dhsa_probe_run run = dhsa_probe_start(s, dhsa_mean_queries_count(&w.rows), from, to);
    run.of = &w;
    run.pack = dhsa_mean_queries_pack;
    run.keys = coarse_keys;
    run.score = score;
    for (w.rows.head = first; w.rows.head < first + s->heads_per_set; w.rows.head += heads)
        dhsa_probe_do(&c->probe, &run, arena);
}
