/* hisa.c: selects single keys, but only from the best key blocks. Source: HISA, arXiv 2603.28458. There a trained
 * indexer scores blocks and tokens. A frozen model has none, so both stages use the mean queries of the query block
 * (coarse.c) instead, with a softmax over the key blocks and then over the keys. The float64 definition is `twin` in
 * dhsa/methods/hisa.py. */
#include <math.h>
#include <stdlib.h>

#include "select/coarse.h"
#include "select/finite.h"

enum {
    KEPT = 4,    /* the kept key blocks hold this many times the budget */
    FEW = 16384, /* up to this many keys the probabilities are kept; for more they are computed twice */
};

typedef struct {
    float score;
    int32_t block;
} hisa_rank;

typedef struct {
    dhsa_coarse coarse;
    dhsa_probe fine;
    int64_t most; /* keys of kept key blocks, at most */
} hisa_state;

/* Scratch memory of one thread: first that of the coarse stage, which the fine stage and its rows use later; then
 * these. */
typedef struct {
    float *rows;         /* [lanes, dim]: of the fine stage, laid out when it begins */
    float *coarse;       /* [key blocks] */
    hisa_rank *ranks;    /* [key blocks] */
    int32_t *key;        /* [most] */
    float *fine;         /* [most] */
    int32_t *edges;      /* [segments + 1] */
    float *score, *mass; /* [segments] */
} hisa_parts;

static int64_t hisa_lay_out(const dhsa_selector *s, char *arena, hisa_parts *w)
{
    const hisa_state *st = s->state;
    const int64_t blocks = dhsa_ceil_div(s->k->shape[2], s->config->key_block);
    int64_t used = st->fine.arena_size;
    w->rows = dhsa_part(arena, &used, DHSA_MAX_LANES * s->q->shape[3] * 4);
    used = DHSA_MAX(used, st->coarse.arena_size);
    w->coarse = dhsa_part(arena, &used, blocks * 4);
    w->ranks = dhsa_part(arena, &used, blocks * (int64_t)sizeof *w->ranks);
    w->key = dhsa_part(arena, &used, st->most * 4);
    w->fine = dhsa_part(arena, &used, st->most * 4);
    w->edges = dhsa_part(arena, &used, (s->segments + 1) * 4);
    w->score = dhsa_part(arena, &used, s->segments * 4);
    w->mass = dhsa_part(arena, &used, s->segments * 4);
    return used;
}

/* The fine stage of one KV head. */
typedef struct {
    dhsa_mean_queries rows;
    const int32_t *keys; /* those of the kept blocks, ascending */
} hisa_block;

static const float *hisa_keys(void *of, int64_t first, int n, float *tile, ptrdiff_t *stride)
{
    const hisa_block *w = of;
    const dhsa_selector *s = w->rows.s;
    const int64_t kv_head = w->rows.head / s->group;
    const int32_t *at = w->keys + first;
    if (at[n - 1] - at[0] == n - 1)
        return dhsa_probe_load_keys(s->kernels, s->k, s->b, kv_head, at[0], 1, n, tile, stride);
    for (int j = 0; j < n; j++)
        s->kernels->load(dhsa_row(s->k, s->b, kv_head, at[j]), s->k->dtype, s->k->shape[3], tile + j * s->k->shape[3]);
    *stride = s->k->shape[3];
    return tile;
}

/* Orders by score, best first; of equal scores the later block comes first. */
static int hisa_compare(const void *a, const void *b)
{
    const hisa_rank *x = a, *y = b;
    return x->score != y->score ? (x->score < y->score ? 1 : -1) : y->block - x->block;
}

/* Returns the candidate keys of a key block. */
static dhsa_span hisa_held_by(const dhsa_selector *s, dhsa_span span, int64_t block)
{
    const int64_t key_block = s->config->key_block;
    return (dhsa_span){.lo = DHSA_MAX(block * key_block, span.lo), .end = DHSA_MIN((block + 1) * key_block, span.end)};
}

/* Chooses the kept key blocks: those with forced keys, and the best of the others until the kept blocks hold KEPT times
 * the budget. score holds the coarse scores; it receives 1 for kept blocks and 0 for others. */
static void hisa_filter(const dhsa_selector *s, dhsa_span span, float *score, hisa_rank *ranks)
{
    const dhsa_select_config *c = s->config;
    const int64_t first = span.lo / c->key_block, last = dhsa_ceil_div(span.end, c->key_block);
    const int64_t want = c->budget >= span.end ? span.end : KEPT * c->budget;
    int64_t held = 0, n = 0;
    for (int64_t u = first; u < last; u++) {
        const dhsa_span keys = hisa_held_by(s, span, u);
        const int forced = keys.lo < c->sink || keys.end > span.end - c->local;
        if (!forced) ranks[n++] = (hisa_rank){score[u], (int32_t)u};
        if (forced) held += keys.end - keys.lo;
        score[u] = (float)forced;
    }
    qsort(ranks, (size_t)n, sizeof *ranks, hisa_compare);
    for (int64_t i = 0; i < n && held < want; i++) {
        const dhsa_span keys = hisa_held_by(s, span, ranks[i].block);
        held += keys.end - keys.lo;
        score[ranks[i].block] = 1;
    }
}

static int64_t hisa_list(const dhsa_selector *s, int64_t set, int64_t block, dhsa_span span, int thread, int32_t *list,
                         int64_t room)
{
    const hisa_state *st = s->state;
    char *arena = dhsa_selector_arena(s, thread);
    hisa_parts parts;
    hisa_lay_out(s, arena, &parts);
    float *coarse = parts.coarse, *fine = parts.fine, *score = parts.score, *mass = parts.mass;
    int32_t *key = parts.key, *edges = parts.edges;
    const int64_t first = span.lo / s->config->key_block, last = dhsa_ceil_div(span.end, s->config->key_block);
    dhsa_coarse_score(&st->coarse, s, set, block, span, arena, coarse);
    dhsa_finite_blocks(s, set, span, coarse, NULL);
    hisa_filter(s, span, coarse, parts.ranks);

    int64_t n = 0;
    for (int64_t u = first; u < last; u++) {
        const dhsa_span keys_here = hisa_held_by(s, span, u);
        for (int64_t j = keys_here.lo; coarse[u] != 0 && j < keys_here.end; j++) key[n++] = (int32_t)j;
    }
    for (int64_t i = 0; i < n; i++) fine[i] = 0;
    const int64_t head = set * s->heads_per_set, heads = DHSA_MIN(s->heads_per_set, s->group);
    hisa_lay_out(s, arena, &parts); /* the fine stage now uses the memory of the coarse stage */
    hisa_block w = {{s, st->fine.kernels, dhsa_block_queries(s, block), st->coarse.run, head, heads, parts.rows}, key};
    dhsa_probe_run run = dhsa_probe_start(s, dhsa_mean_queries_count(&w.rows), 0, n);
    run.of = &w;
    run.pack = dhsa_mean_queries_pack;
    run.keys = hisa_keys;
    run.score = fine;
    for (; w.rows.head < head + s->heads_per_set; w.rows.head += heads) dhsa_probe_do(&st->fine, &run, arena);

    /* Each kept key is a segment of its own. The keys between two kept keys are one segment that is never selected. */
    int64_t segments = 0;
    edges[0] = (int32_t)span.lo;
    for (int64_t i = 0; i <= n; i++) {
        const int64_t to = i < n ? key[i] : span.end;
        if (edges[segments] < to) {
            score[segments] = -INFINITY;
            mass[segments++] = 0;
            edges[segments] = (int32_t)to;
        }
        if (i == n) break;
        const int bad = dhsa_finite_next(s, set, key[i], key[i] + 1) == key[i];
        score[segments] = bad ? INFINITY : fine[i];
        mass[segments] = bad ? 0 : fine[i];
        edges[++segments] = key[i] + 1;
    }
    const dhsa_segments all = {.edges = edges, .last = segments, .score = score, .mass = mass};
    return dhsa_topk(s, thread, span, &all, list, room);
}

static dhsa_status hisa_open(dhsa_selector *s, dhsa_error *error)
{
    const dhsa_select_config *c = s->config;
    const int64_t k_len = s->k->shape[2], dim = s->q->shape[3], blocks = dhsa_ceil_div(k_len, c->key_block);
    const int64_t queries = DHSA_MIN(c->score.query_block, s->q->shape[2]);
    hisa_parts unused;
    hisa_state *st = s->state = dhsa_alloc_zeroed(1, sizeof *st);
    if (!st || !dhsa_coarse_open(&st->coarse, s, dhsa_ceil_div(c->score.query_block, c->score.mean_queries)))
        return dhsa_fail(error, DHSA_ERR_NO_MEMORY, "hisa: no memory for the means of %lld blocks of keys",
                         (long long)blocks);
    /* The key blocks of forced keys and the last one that is kept may hold more keys than are wanted. */
    st->most = c->budget >= k_len ? k_len : DHSA_MIN((KEPT + 1) * c->budget + 4 * c->key_block, k_len);
    const dhsa_probe_way way = st->most > FEW ? DHSA_PROBE_TWICE : DHSA_PROBE_KEYS;
    dhsa_probe_plan(&st->fine, way, dhsa_ceil_div(queries, st->coarse.run) * DHSA_MIN(s->heads_per_set, s->group),
                    st->most, dim, 1);
    s->segments = 2 * st->most + 1;
    s->arena_size = hisa_lay_out(s, NULL, &unused);
    return DHSA_OK;
}

static void hisa_close(dhsa_selector *s) { dhsa_coarse_close(&((hisa_state *)s->state)->coarse); }

static dhsa_status hisa_begin(dhsa_selector *s, int64_t b, dhsa_error *error)
{
    hisa_state *st = s->state;
    (void)b, (void)error;
    dhsa_block_means_begin(&st->coarse.means, s);
    return DHSA_OK;
}

const dhsa_method dhsa_method_hisa = {.name = "hisa",
                                      .has_mass = 1,
                                      .has_mean_queries = 1,
                                      .has_blocks = 1,
                                      .has_finite = 1,
                                      .open = hisa_open,
                                      .close = hisa_close,
                                      .begin = hisa_begin,
                                      .list = hisa_list};
