/* coarse.c: mean rows against mean keys of fixed blocks, see coarse.h. The definition is block_rows in the reference. */
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

void dhsa_mean_rows_pack(const dhsa_mean_rows *m, const dhsa_kernels *kernels, int64_t first, int n, float *panel)
{
    const dhsa_tensor *q = m->s->q;
    const int64_t dim = q->shape[3], stride = q->stride[2] * dhsa_dtype_size(q->dtype);
    const void *rows[DHSA_MAX_LANES];
    for (int r = 0; r < n; r++) {
        const int64_t from = m->queries.lo + (first + r) / m->heads * m->run, count = DHSA_MIN(m->run, m->queries.end - from);
        float *row = m->rows + r * dim;
        kernels->sum_rows(dhsa_row(q, m->s->b, m->head + (first + r) % m->heads, from), (ptrdiff_t)stride, q->dtype, count, dim,
                          row);
        for (int64_t d = 0; d < dim; d++) row[d] /= (float)count;
        rows[r] = row;
    }
    kernels->pack_panel(rows, DHSA_F32, n, (int)dim, dhsa_probe_sign(m->s), panel);
}

/* ---- key blocks --------------------------------------------------------------------------------------------------- */

typedef struct {
    const dhsa_coarse *coarse;
    dhsa_mean_rows rows;
    int64_t cut_end;   /* where the last key block ends for this block of queries */
    float *mean, *sum; /* [dim]: the mean of a block that is cut; what it is summed in */
    float *score;
} job;

/* What one thread works in, after the probe. */
static int64_t lay_out(const dhsa_coarse *c, int64_t dim, char *arena, job *w)
{
    int64_t used = c->probe.arena_size;
    w->rows.rows = dhsa_part(arena, &used, DHSA_MAX_LANES * dim * 4);
    w->mean = dhsa_part(arena, &used, dim * 4);
    w->sum = dhsa_part(arena, &used, dim * 4);
    return used;
}

int dhsa_coarse_open(dhsa_coarse *c, const dhsa_selector *s, int64_t run)
{
    const int64_t k_len = s->k->shape[2], dim = s->q->shape[3], blocks = dhsa_ceil_div(k_len, s->config->key_block);
    const int64_t queries = DHSA_MIN(s->config->score.query_block, s->q->shape[2]);
    job unused;
    c->run = run;
    c->edges = dhsa_block_edges(k_len, s->config->key_block);
    dhsa_probe_plan(&c->probe, DHSA_PROBE_KEYS, dhsa_ceil_div(queries, run) * DHSA_MIN(s->heads_per_set, s->group), blocks, dim, 1);
    c->arena_size = lay_out(c, dim, NULL, &unused);
    const int opened = dhsa_chunks_open(&c->means, DHSA_MEANS_F32, 0, s->k->shape[1], blocks, dim);
    c->means.edges = c->edges;
    c->means.chunks = blocks;
    return opened && c->edges;
}

void dhsa_coarse_close(dhsa_coarse *c)
{
    dhsa_chunks_close(&c->means);
    dhsa_free(c->edges);
}

void dhsa_coarse_begin(dhsa_coarse *c, const dhsa_selector *s)
{
    dhsa_chunks_fill(s->kernels, s->k, s->b, &c->means, 0, s->arenas, s->arena_stride, s->num_threads);
}

static void pack(void *of, int64_t first, int n, float *panel, int32_t *lo, int32_t *hi)
{
    const job *w = of;
    (void)lo, (void)hi;
    dhsa_mean_rows_pack(&w->rows, w->coarse->probe.kernels, first, n, panel);
}

static const float *keys(void *of, int64_t first, int n, float *tile, ptrdiff_t *stride)
{
    const job *w = of;
    const dhsa_selector *s = w->rows.s;
    const dhsa_chunks *means = &w->coarse->means;
    const int64_t dim = s->q->shape[3], kv_head = w->rows.head / s->group;
    memcpy(tile, (const float *)means->means + (kv_head * means->pitch + first) * dim, (size_t)(n * dim) * sizeof *tile);
    for (int j = 0; j < n; j++) {
        int finite = means->state[kv_head * means->pitch + first + j] == DHSA_CHUNK_GOOD;
        if (means->edges[first + j + 1] > w->cut_end) {
            finite = dhsa_chunk_mean(s->kernels, s->k, s->b, kv_head, means->edges[first + j], w->cut_end, w->mean, w->sum);
            memcpy(tile + j * dim, w->mean, (size_t)dim * sizeof *tile);
        }
        if (!finite) tile[j * dim] = NAN; /* rows that see it are to say nothing */
    }
    *stride = dim;
    return tile;
}

static void take(void *of, int64_t row, int64_t first, int n, const float *p, const float *weight)
{
    const job *w = of;
    (void)row;
    w->coarse->probe.kernels->add_sums(p, n, weight, w->score + first);
}

void dhsa_coarse_score(const dhsa_coarse *c, const dhsa_selector *s, int64_t set, int64_t block, dhsa_span span, char *arena,
                       float *score)
{
    const int64_t dim = s->q->shape[3], first = set * s->heads_per_set, heads = DHSA_MIN(s->heads_per_set, s->group);
    const int64_t from = span.lo / s->config->key_block, to = dhsa_ceil_div(span.end, s->config->key_block);
    job w = {.coarse = c, .rows = {s, dhsa_block_queries(s, block), c->run, 0, heads, NULL}, .cut_end = span.end, .score = score};
    lay_out(c, dim, arena, &w);
    for (int64_t u = from; u < to; u++) score[u] = 0;
    for (w.rows.head = first; w.rows.head < first + s->heads_per_set; w.rows.head += heads) {
        const dhsa_probe_run run = {.rows = dhsa_mean_rows_count(&w.rows),
                                    .from = from,
                                    .to = to,
                                    .scale = (float)(s->config->score.scale * dhsa_probe_sign(s)),
                                    .softcap = (float)s->config->score.softcap,
                                    .of = &w,
                                    .pack = pack,
                                    .keys = keys,
                                    .take = take};
        dhsa_probe_do(&c->probe, &run, arena);
    }
}
