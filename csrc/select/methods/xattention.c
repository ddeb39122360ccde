/* xattention.c: blocks of keys by the sums of strided antidiagonals of the logits. Source: XAttention, arXiv 2503.16428.
 * Groups of `stride` neighbouring queries, in reverse order, and of as many keys are one long row each: one product adds up an
 * antidiagonal of the square between them. Groups of queries begin with the block, those of keys with key 0; what is missing in a
 * group, or lies at or above the block's end, counts as zeros. The definition is xattention_units in the reference. */
#include <stdlib.h>
#include <string.h>

#include "select/coarse.h"
#include "select/finite.h"

typedef struct {
    dhsa_probe probe;
    dhsa_finite finite;
    int32_t *edges; /* of the key blocks */
    char *zeros;    /* a row */
} state;

/* A block at work. */
typedef struct {
    const dhsa_selector *s;
    dhsa_span queries, span;
    int64_t head;
    float *score, *mass; /* [units]: of the key blocks */
} job;

/* What one thread works in, after the probe. */
static int64_t lay_out(const dhsa_selector *s, char *arena, job *w)
{
    int64_t used = ((const state *)s->state)->probe.arena_size;
    w->score = dhsa_part(arena, &used, s->units * 4);
    w->mass = dhsa_part(arena, &used, s->units * 4);
    return used;
}

static void pack(void *of, int64_t first, int n, float *panel, int32_t *lo, int32_t *hi)
{
    const job *w = of;
    const dhsa_selector *s = w->s;
    const state *st = s->state;
    const int64_t stride = s->config->stride, window = s->config->score.window, dim = s->q->shape[3];
    const int64_t offset = s->k->shape[2] - s->q->shape[2];
    for (int64_t t = 0; t < stride; t++) {
        const void *rows[DHSA_MAX_LANES];
        for (int r = 0; r < n; r++) {
            const int64_t query = w->queries.lo + (first + r) * stride + stride - 1 - t;
            rows[r] = query < w->queries.end ? dhsa_row(s->q, s->b, w->head, query) : st->zeros;
        }
        st->probe.kernels->pack_panel(rows, s->q->dtype, n, (int)dim, dhsa_probe_sign(s),
                                      panel + t * dim * st->probe.kernels->lanes);
    }
    /* Groups of keys of which any query of the group sees any key. */
    for (int r = 0; r < n; r++) {
        const int64_t from = w->queries.lo + (first + r) * stride, to = DHSA_MIN(from + stride, w->queries.end);
        hi[r] = (int32_t)((offset + to - 1) / stride + 1);
        lo[r] = (int32_t)(window ? DHSA_MAX(offset + from - window + 1, 0) / stride : 0);
    }
}

static const float *keys(void *of, int64_t first, int n, float *tile, ptrdiff_t *pitch)
{
    const job *w = of;
    const dhsa_tensor *k = w->s->k;
    const int64_t stride = w->s->config->stride, dim = k->shape[3], from = first * stride;
    const int64_t to = DHSA_MIN(from + n * stride, w->span.end), kv_head = w->head / w->s->group;
    *pitch = (ptrdiff_t)(stride * dim);
    const float *lie = (const float *)dhsa_row(k, w->s->b, kv_head, from);
    if (k->dtype == DHSA_F32 && k->stride[2] == dim && to - from == n * stride) return lie; /* a group is one row already */
    for (int64_t j = from; j < to; j++)
        w->s->kernels->load(dhsa_row(k, w->s->b, kv_head, j), k->dtype, dim, tile + (j - from) * dim);
    memset(tile + (to - from) * dim, 0, (size_t)((from + n * stride - to) * dim) * sizeof *tile);
    return tile;
}

static void take(void *of, int64_t row, int64_t first, int n, const float *p, const float *weight)
{
    const job *w = of;
    const dhsa_probe *probe = &((const state *)w->s->state)->probe;
    (void)row;
    probe->kernels->add_sums(p, n, weight, w->score + first / probe->unit);
}

static int64_t list(const dhsa_selector *s, int64_t set, int64_t block, dhsa_span span, int thread, int32_t *row, int64_t room)
{
    const state *st = s->state;
    const dhsa_select_config *c = s->config;
    char *arena = dhsa_selector_arena(s, thread);
    job w = {s, dhsa_block_queries(s, block), span, 0, NULL, NULL};
    lay_out(s, arena, &w);
    const int64_t first = span.lo / c->key_block, last = dhsa_ceil_div(span.end, c->key_block);
    for (int64_t u = first; u < last; u++) w.score[u] = 0;
    /* The source divides the sums by the stride. */
    const float scale = (float)(c->score.scale * dhsa_probe_sign(s) / (double)c->stride);
    for (int64_t h = 0; h < s->heads_per_set; h++) {
        w.head = set * s->heads_per_set + h;
        const dhsa_probe_run run = {.rows = dhsa_ceil_div(w.queries.end - w.queries.lo, c->stride),
                                    .from = span.lo / c->stride,
                                    .to = dhsa_ceil_div(span.end, c->stride),
                                    .scale = scale,
                                    .softcap = (float)c->score.softcap,
                                    .of = &w,
                                    .pack = pack,
                                    .keys = keys,
                                    .take = take};
        dhsa_probe_do(&st->probe, &run, arena);
    }
    memcpy(w.mass + first, w.score + first, (size_t)(last - first) * sizeof *w.score);
    dhsa_finite_blocks(&st->finite, s, set, span, w.score, w.mass);
    const dhsa_units units = {st->edges, first, last, w.score, w.mass};
    return dhsa_take(s, thread, span, &units, row, room);
}

static dhsa_status open(dhsa_selector *s, dhsa_error *error)
{
    const dhsa_select_config *c = s->config;
    const int64_t k_len = s->k->shape[2], dim = s->q->shape[3];
    job unused;
    state *st = s->state = calloc(1, sizeof *st);
    s->units = dhsa_ceil_div(k_len, c->key_block);
    if (st) {
        dhsa_probe_plan(&st->probe, DHSA_PROBE_SUMS, dhsa_ceil_div(DHSA_MIN(c->score.query_block, s->q->shape[2]), c->stride),
                        dhsa_ceil_div(k_len, c->stride), c->stride * dim, c->key_block / c->stride);
        st->edges = dhsa_block_edges(k_len, c->key_block);
        st->zeros = calloc((size_t)dim, sizeof(float));
        s->arena_size = lay_out(s, NULL, &unused);
    }
    if (st && st->edges && st->zeros && dhsa_finite_open(&st->finite, s)) return DHSA_OK;
    return dhsa_fail(error, DHSA_ERR_NO_MEMORY, "xattention: no memory for %lld blocks of keys", (long long)s->units);
}

static void close(dhsa_selector *s)
{
    state *st = s->state;
    if (!st) return;
    dhsa_finite_close(&st->finite);
    dhsa_free(st->edges);
    free(st->zeros);
    free(st);
}

static dhsa_status begin(dhsa_selector *s, int64_t b, dhsa_error *error)
{
    (void)b, (void)error;
    dhsa_finite_begin(&((const state *)s->state)->finite, s);
    return DHSA_OK;
}

const dhsa_method dhsa_method_xattention = {.name = "xattention",
                                            .has_mass = 1,
                                            .has_blocks = 1,
                                            .has_stride = 1,
                                            .open = open,
                                            .close = close,
                                            .begin = begin,
                                            .list = list};
