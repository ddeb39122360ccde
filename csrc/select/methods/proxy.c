/* proxy.c: selects key blocks by the scores of a proxy head, which is the mean of the heads that share it. Source:
 * ProxyAttn, arXiv 2509.24745. Every stride-th query and key take part; the score of a key block is the largest
 * probability in it. The heads that share a proxy head rank the blocks in the same order. Where a share of mass is
 * asked for, each head set decides how many of them it takes by its own mass: the probabilities that its own mean
 * queries give to a key block (coarse.c). The float64 definition is `twin` in dhsa/methods/proxy.py. */
#include "select/coarse.h"
#include "select/finite.h"

enum { RUN = 16 /* queries of a mean query, for the mass of a head set */ };

typedef struct {
    dhsa_probe probe;
    dhsa_coarse own;   /* mass of the head sets; only with a share of mass */
    int32_t *edges;    /* of the key blocks */
    int64_t heads, kv; /* query heads and KV heads of a proxy head */
} proxy_state;

typedef struct {
    const dhsa_selector *s;
    dhsa_span queries;
    int64_t head;
    float *rows;         /* [lanes, dim]: scratch */
    float *score, *mass; /* [segments]: of the key blocks */
} proxy_block;

/* Scratch memory of one thread: first that of the probe and its rows, which st->own uses later; then score and mass. */
static int64_t proxy_lay_out(const dhsa_selector *s, char *arena, proxy_block *w)
{
    const proxy_state *st = s->state;
    int64_t used = st->probe.arena_size;
    w->rows = dhsa_part(arena, &used, DHSA_MAX_LANES * s->q->shape[3] * 4);
    used = DHSA_MAX(used, st->own.arena_size);
    w->score = dhsa_part(arena, &used, s->segments * 4);
    w->mass = dhsa_part(arena, &used, s->segments * 4);
    return used;
}

static void proxy_pack(void *of, int64_t first, int n, float *panel, int32_t *lo, int32_t *hi)
{
    const proxy_block *w = of;
    const dhsa_selector *s = w->s;
    const proxy_state *st = s->state;
    const int64_t stride = s->config->stride, window = s->config->score.window, dim = s->q->shape[3];
    const int64_t offset = s->k->shape[2] - s->q->shape[2], apart = dhsa_step(s->q, 1);
    const void *rows[DHSA_MAX_LANES];
    for (int r = 0; r < n; r++) {
        const int64_t query = w->queries.lo + (first + r) * stride;
        rows[r] = w->rows + r * dim;
        s->kernels->sum_rows(dhsa_row(s->q, s->b, w->head, query), (ptrdiff_t)apart, s->q->dtype, st->heads, dim,
                             w->rows + r * dim);
        hi[r] = (int32_t)((offset + query) / stride + 1);
        lo[r] = (int32_t)(window ? dhsa_ceil_div(DHSA_MAX(offset + query - window + 1, 0), stride) : 0);
    }
    st->probe.kernels->pack_panel(rows, DHSA_F32, n, (int)dim, dhsa_probe_sign(s) / (float)st->heads, panel);
}

static const float *proxy_keys(void *of, int64_t first, int n, float *tile, ptrdiff_t *stride)
{
    const proxy_block *w = of;
    const dhsa_tensor *k = w->s->k;
    const proxy_state *st = w->s->state;
    const int64_t kv_head = w->head / w->s->group, step = w->s->config->stride, dim = k->shape[3];
    if (st->kv == 1)
        return dhsa_probe_load_keys(w->s->kernels, k, w->s->b, kv_head, first * step, step, n, tile, stride);
    const ptrdiff_t apart = (ptrdiff_t)dhsa_step(k, 1);
    for (int j = 0; j < n; j++)
        w->s->kernels->sum_rows(dhsa_row(k, w->s->b, kv_head, (first + j) * step), apart, k->dtype, st->kv, dim,
                                tile + j * dim);
    for (int64_t d = 0; d < n * dim; d++) tile[d] /= (float)st->kv;
    *stride = dim;
    return tile;
}

static int64_t proxy_list(const dhsa_selector *s, int64_t set, int64_t block, dhsa_span span, int thread, int32_t *list,
                          int64_t room)
{
    const proxy_state *st = s->state;
    const dhsa_select_config *c = s->config;
    char *arena = dhsa_selector_arena(s, thread);
    proxy_block w = {
        .s = s, .queries = dhsa_block_queries(s, block), .head = set * s->heads_per_set / st->heads * st->heads};
    proxy_lay_out(s, arena, &w);
    float *score = w.score, *mass = c->mass > 0 ? w.mass : NULL;
    const int64_t first = span.lo / c->key_block, last = dhsa_ceil_div(span.end, c->key_block);
    for (int64_t u = first; u < last; u++) score[u] = 0;
    dhsa_probe_run run = dhsa_probe_start(s, dhsa_ceil_div(w.queries.end - w.queries.lo, c->stride),
                                          span.lo / c->stride, dhsa_ceil_div(span.end, c->stride));
    run.of = &w;
    run.pack = proxy_pack;
    run.keys = proxy_keys;
    run.score = score;
    dhsa_probe_do(&st->probe, &run, arena);
    if (mass) dhsa_coarse_score(&st->own, s, set, block, span, arena, mass);
    dhsa_finite_blocks(s, set, span, score, mass);
    const dhsa_segments segments = {.edges = st->edges, .first = first, .last = last, .score = score, .mass = mass};
    return dhsa_topk(s, thread, span, &segments, list, room);
}

static dhsa_status proxy_open(dhsa_selector *s, dhsa_error *error)
{
    const dhsa_select_config *c = s->config;
    const int64_t k_len = s->k->shape[2], dim = s->q->shape[3];
    proxy_block unused;
    proxy_state *st = s->state = dhsa_alloc_zeroed(1, sizeof *st);
    int opened = st != NULL;
    s->segments = dhsa_ceil_div(k_len, c->key_block);
    if (opened) {
        st->heads = DHSA_MAX(s->heads_per_set, s->group);
        st->kv = st->heads / s->group;
        dhsa_probe_plan(&st->probe, DHSA_PROBE_TOPS,
                        dhsa_ceil_div(DHSA_MIN(c->score.query_block, s->q->shape[2]), c->stride),
                        dhsa_ceil_div(k_len, c->stride), dim, c->key_block / c->stride);
        st->edges = dhsa_block_edges(k_len, c->key_block);
        opened = st->edges && (c->mass == 0 || dhsa_coarse_open(&st->own, s, RUN));
        s->arena_size = proxy_lay_out(s, NULL, &unused);
    }
    return opened ? DHSA_OK
                  : dhsa_fail(error, DHSA_ERR_NO_MEMORY, "proxy: no memory for %lld blocks of keys",
                              (long long)s->segments);
}

static void proxy_close(dhsa_selector *s)
{
    proxy_state *st = s->state;
    dhsa_coarse_close(&st->own);
    dhsa_free(st->edges);
}

static dhsa_status proxy_begin(dhsa_selector *s, int64_t b, dhsa_error *error)
{
    proxy_state *st = s->state;
    (void)b, (void)error;
    if (s->config->mass > 0) dhsa_block_means_begin(&st->own.means, s);
    return DHSA_OK;
}

const dhsa_method dhsa_method_proxy = {.name = "proxy",
                                       .has_mass = 1,
                                       .has_blocks = 1,
                                       .has_stride = 1,
                                       .has_finite = 1,
                                       .open = proxy_open,
                                       .close = proxy_close,
                                       .begin = proxy_begin,
                                       .list = proxy_list};
