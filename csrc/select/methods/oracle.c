/* oracle.c: single keys by their exact attention mass: dense probabilities of a block's queries, summed. Twice the products of
 * dense attention: slow, for study. The definition is oracle_units in the reference. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "select/finite.h"
#include "select/probe.h"

typedef struct {
    dhsa_probe probe;
    dhsa_finite finite;
} state;

typedef struct {
    const dhsa_selector *s;
    dhsa_span queries;
    int64_t head, heads; /* query heads of one KV head, which share the work on its keys */
    float *score, *mass; /* [units] */
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
    dhsa_probe_pack(w->s, ((const state *)w->s->state)->probe.kernels, w->head, w->heads, w->queries.lo, first, n, panel, lo, hi);
}

static const float *keys(void *of, int64_t first, int n, float *tile, ptrdiff_t *stride)
{
    const job *w = of;
    return dhsa_probe_rows(w->s->kernels, w->s->k, w->s->b, w->head / w->s->group, first, 1, n, tile, stride);
}

static void take(void *of, int64_t row, int64_t first, int n, const float *p, const float *weight)
{
    const job *w = of;
    (void)row;
    ((const state *)w->s->state)->probe.kernels->add_sums(p, n, weight, w->score + first);
}

static int64_t list(const dhsa_selector *s, int64_t set, int64_t block, dhsa_span span, int thread, int32_t *row, int64_t room)
{
    const state *st = s->state;
    char *arena = dhsa_selector_arena(s, thread);
    const int64_t first = set * s->heads_per_set, heads = DHSA_MIN(s->heads_per_set, s->group);
    job w = {s, dhsa_block_queries(s, block), 0, heads, NULL, NULL};
    lay_out(s, arena, &w);
    for (int64_t j = span.lo; j < span.end; j++) w.score[j] = 0;
    for (w.head = first; w.head < first + s->heads_per_set; w.head += heads) {
        const dhsa_probe_run run = {.rows = (w.queries.end - w.queries.lo) * heads,
                                    .from = span.lo,
                                    .to = span.end,
                                    .scale = (float)(s->config->score.scale * dhsa_probe_sign(s)),
                                    .softcap = (float)s->config->score.softcap,
                                    .of = &w,
                                    .pack = pack,
                                    .keys = keys,
                                    .take = take};
        dhsa_probe_do(&st->probe, &run, arena);
    }
    memcpy(w.mass + span.lo, w.score + span.lo, (size_t)(span.end - span.lo) * sizeof *w.mass);
    for (int64_t j = span.lo; (j = dhsa_finite_next(&st->finite, s, set, j, span.end)) < span.end; j++) {
        w.score[j] = INFINITY;
        w.mass[j] = 0;
    }
    const dhsa_units units = {NULL, span.lo, span.end, w.score, w.mass};
    return dhsa_take(s, thread, span, &units, row, room);
}

static dhsa_status open(dhsa_selector *s, dhsa_error *error)
{
    job unused;
    state *st = s->state = calloc(1, sizeof *st);
    if (!st || !dhsa_finite_open(&st->finite, s))
        return dhsa_fail(error, DHSA_ERR_NO_MEMORY, "oracle: no memory for flags of %lld keys", (long long)s->k->shape[2]);
    const int64_t queries = DHSA_MIN(s->config->score.query_block, s->q->shape[2]);
    dhsa_probe_plan(&st->probe, DHSA_PROBE_TWICE, queries * DHSA_MIN(s->heads_per_set, s->group), s->k->shape[2], s->q->shape[3],
                    1);
    s->units = s->k->shape[2];
    s->arena_size = lay_out(s, NULL, &unused);
    return DHSA_OK;
}

static void close(dhsa_selector *s)
{
    state *st = s->state;
    if (!st) return;
    dhsa_finite_close(&st->finite);
    free(st);
}

static dhsa_status begin(dhsa_selector *s, int64_t b, dhsa_error *error)
{
    (void)b, (void)error;
    dhsa_finite_begin(&((const state *)s->state)->finite, s);
    return DHSA_OK;
}

const dhsa_method dhsa_method_oracle = {
    .name = "oracle", .has_mass = 1, .open = open, .close = close, .begin = begin, .list = list};
