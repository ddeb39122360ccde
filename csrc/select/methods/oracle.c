/* oracle.c: selects single keys by their exact attention mass: the dense probabilities of the queries of a block,
 * summed. It computes twice the products of dense attention, so it is slow and meant for study. The float64 definition
 * is `twin` in dhsa/methods/oracle.py. */
#include <math.h>
#include <string.h>

#include "select/finite.h"
#include "select/probe.h"

/* Scratch memory of one thread, after that of the probe. */
typedef struct {
    float *score, *mass; /* [segments] */
} oracle_parts;

static int64_t oracle_lay_out(const dhsa_selector *s, char *arena, oracle_parts *w)
{
    int64_t used = ((const dhsa_probe *)s->state)->arena_size;
    w->score = dhsa_part(arena, &used, s->segments * 4);
    w->mass = dhsa_part(arena, &used, s->segments * 4);
    return used;
}

static int64_t oracle_list(const dhsa_selector *s, int64_t set, int64_t block, dhsa_span span, int thread,
                           int32_t *list, int64_t room)
{
    const dhsa_probe *probe = s->state;
    const dhsa_span queries = dhsa_block_queries(s, block);
    char *arena = dhsa_selector_arena(s, thread);
    const int64_t first = set * s->heads_per_set,
                  heads = DHSA_MIN(s->heads_per_set, s->group); /* query heads of a KV head */
    dhsa_probe_queries rows = dhsa_selector_queries(s, probe, heads, queries.lo);
    oracle_parts w;
    oracle_lay_out(s, arena, &w);
    for (int64_t j = span.lo; j < span.end; j++) w.score[j] = 0;
    dhsa_probe_run run = dhsa_probe_start(s, (queries.end - queries.lo) * heads, span.lo, span.end);
    run.of = &rows;
    run.pack = dhsa_probe_pack_queries;
    run.keys = dhsa_probe_read_keys;
    run.score = w.score;
    for (rows.head = first; rows.head < first + s->heads_per_set; rows.head += heads) dhsa_probe_do(probe, &run, arena);
    memcpy(w.mass + span.lo, w.score + span.lo, (size_t)(span.end - span.lo) * sizeof *w.mass);
    for (int64_t j = span.lo; (j = dhsa_finite_next(s, set, j, span.end)) < span.end; j++) {
        w.score[j] = INFINITY;
        w.mass[j] = 0;
    }
    const dhsa_segments segments = {.first = span.lo, .last = span.end, .score = w.score, .mass = w.mass};
    return dhsa_topk(s, thread, span, &segments, list, room);
}

static dhsa_status oracle_open(dhsa_selector *s, dhsa_error *error)
{
    oracle_parts unused;
    dhsa_probe *probe = s->state = dhsa_alloc_zeroed(1, sizeof *probe);
    if (!probe) return dhsa_fail(error, DHSA_ERR_NO_MEMORY, "oracle: no memory");
    const int64_t queries = DHSA_MIN(s->config->score.query_block, s->q->shape[2]);
    dhsa_probe_plan(probe, DHSA_PROBE_TWICE, queries * DHSA_MIN(s->heads_per_set, s->group), s->k->shape[2],
                    s->q->shape[3], 1);
    s->segments = s->k->shape[2];
    s->arena_size = oracle_lay_out(s, NULL, &unused);
    return DHSA_OK;
}

const dhsa_method dhsa_method_oracle = {
    .name = "oracle", .has_mass = 1, .has_finite = 1, .open = oracle_open, .list = oracle_list};
