/* xattention.c: selects key blocks by the sums of strided antidiagonals of the logits. Source: XAttention, arXiv
 * 2503.16428. A group of `stride` neighbouring queries, in reverse order, is one long row, and so is a group of
 * `stride` neighbouring keys: their product is the sum of an antidiagonal of the square between them. Groups of queries
 * begin with the query block, groups of keys with key 0. Queries and keys that are missing in a group, or that lie at
 * or above the end of the block, count as zeros. The float64 definition is `twin` in dhsa/methods/xattention.py. */
#include <string.h>

#include "select/coarse.h"
#include "select/finite.h"

typedef struct {
    dhsa_probe probe;
    int32_t *edges; /* of the key blocks */
} xattention_state;

/* One query block, for the callbacks of the probe. */
typedef struct {
    const dhsa_selector *s;
    dhsa_span queries, span;
    int64_t head;
    float *score, *mass; /* [segments]: of the key blocks */
} xattention_block;

/* Scratch memory of one thread, after that of the probe. */
static int64_t xattention_lay_out(const dhsa_selector *s, char *arena, xattention_block *w)
{
    int64_t used = ((const xattention_state *)s->state)->probe.arena_size;
    w->score = dhsa_part(arena, &used, s->segments * 4);
    w->mass = dhsa_part(arena, &used, s->segments * 4);
    return used;
}

static const float zeros[DHSA_MAX_HEAD_DIM]; /* in place of a query that is missing */

static void xattention_pack(void *of, int64_t first, int n, float *panel, int32_t *lo, int32_t *hi)
{
    const xattention_block *w = of;
    const dhsa_selector *s = w->s;
    const xattention_state *st = s->state;
    const int64_t stride = s->config->stride, window = s->config->score.window, dim = s->q->shape[3];
    const int64_t offset = s->k->shape[2] - s->q->shape[2];
    for (int64_t t = 0; t < stride; t++) {
        const void *rows[DHSA_MAX_LANES];
        for (int r = 0; r < n; r++) {
            const int64_t query = w->queries.lo + (first + r) * stride + stride - 1 - t;
            rows[r] = query < w->queries.end ? dhsa_row(s->q, s->b, w->head, query) : zeros;
        }
        st->probe.kernels->pack_panel(rows, s->q->dtype, n, (int)dim, dhsa_probe_sign(s),
                                      panel + t * dim * st->probe.kernels->lanes);
    }
    /* A group of queries sees each group of keys in which at least one query sees at least one key. */
    for (int r = 0; r < n; r++) {
        const int64_t from = w->queries.lo + (first + r) * stride, to = DHSA_MIN(from + stride, w->queries.end);
        hi[r] = (int32_t)((offset + to - 1) / stride + 1);
        lo[r] = (int32_t)(window ? DHSA_MAX(offset + from - window + 1, 0) / stride : 0);
    }
}

static const float *xattention_keys(void *of, int64_t first, int n, float *tile, ptrdiff_t *pitch)
{
    const xattention_block *w = of;
    const dhsa_tensor *k = w->s->k;
    const int64_t stride = w->s->config->stride, dim = k->shape[3], from = first * stride;
    const int64_t to = DHSA_MIN(from + n * stride, w->span.end), kv_head = w->head / w->s->group;
    *pitch = (ptrdiff_t)(stride * dim);
    const float *lie = (const float *)dhsa_row(k, w->s->b, kv_head, from);
    if (k->dtype == DHSA_F32 && k->stride[2] == dim && to - from == n * stride)
        return lie; /* a group is one row already */
    for (int64_t j = from; j < to; j++)
        w->s->kernels->load(dhsa_row(k, w->s->b, kv_head, j), k->dtype, dim, tile + (j - from) * dim);
    memset(tile + (to - from) * dim, 0, (size_t)((from + n * stride - to) * dim) * sizeof *tile);
    return tile;
}

static int64_t xattention_list(const dhsa_selector *s, int64_t set, int64_t block, dhsa_span span, int thread,
                               int32_t *list, int64_t room)
{
    const xattention_state *st = s->state;
    const dhsa_select_config *c = s->config;
    char *arena = dhsa_selector_arena(s, thread);
    xattention_block w = {s, dhsa_block_queries(s, block), span, 0, NULL, NULL};
    xattention_lay_out(s, arena, &w);
    const int64_t first = span.lo / c->key_block, last = dhsa_ceil_div(span.end, c->key_block);
    for (int64_t u = first; u < last; u++) w.score[u] = 0;
    dhsa_probe_run run = dhsa_probe_start(s, dhsa_ceil_div(w.queries.end - w.queries.lo, c->stride),
                                          span.lo / c->stride, dhsa_ceil_div(span.end, c->stride));
    run.of = &w;
    run.pack = xattention_pack;
    run.keys = xattention_keys;
    run.score = w.score;
    /* XAttention divides the sums by the stride. */
    run.scale = (float)(c->score.scale * dhsa_probe_sign(s) / (double)c->stride);
    for (int64_t h = 0; h < s->heads_per_set; h++) {
        w.head = set * s->heads_per_set + h;
        dhsa_probe_do(&st->probe, &run, arena);
    }
    memcpy(w.mass + first, w.score + first, (size_t)(last - first) * sizeof *w.score);
    dhsa_finite_blocks(s, set, span, w.score, w.mass);
    const dhsa_segments segments = {.edges = st->edges, .first = first, .last = last, .score = w.score, .mass = w.mass};
    return dhsa_topk(s, thread, span, &segments, list, room);
}

static dhsa_status xattention_open(dhsa_selector *s, dhsa_error *error)
{
    const dhsa_select_config *c = s->config;
    const int64_t k_len = s->k->shape[2], dim = s->q->shape[3];
    xattention_block unused;
    xattention_state *st = s->state = dhsa_alloc_zeroed(1, sizeof *st);
    s->segments = dhsa_ceil_div(k_len, c->key_block);
    if (st) {
        dhsa_probe_plan(&st->probe, DHSA_PROBE_SUMS,
                        dhsa_ceil_div(DHSA_MIN(c->score.query_block, s->q->shape[2]), c->stride),
                        dhsa_ceil_div(k_len, c->stride), c->stride * dim, c->key_block / c->stride);
        st->edges = dhsa_block_edges(k_len, c->key_block);
        s->arena_size = xattention_lay_out(s, NULL, &unused);
    }
    if (st && st->edges) return DHSA_OK;
    return dhsa_fail(error, DHSA_ERR_NO_MEMORY, "xattention: no memory for %lld blocks of keys",
                     (long long)s->segments);
}

static void xattention_close(dhsa_selector *s) { dhsa_free(((xattention_state *)s->state)->edges); }

const dhsa_method dhsa_method_xattention = {.name = "xattention",
                                            .has_mass = 1,
                                            .has_blocks = 1,
                                            .has_stride = 1,
                                            .has_finite = 1,
                                            .open = xattention_open,
                                            .close = xattention_close,
                                            .list = xattention_list};
