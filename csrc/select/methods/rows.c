/* rows.c: the method "rows", this project's own: selects chunks by row scores, in two stages where there are many keys.
 * The coarse stage scores groups of neighbouring chunks, computes the denominators of the rows' probabilities, and
 * makes a shortlist of config->shortlist keys; the fine stage scores only the chunks on it. That adds one level to the
 * hierarchy of DHSA (arXiv 2510.24606). The scores are computed in row_scores.c. */
#include <inttypes.h>
#include <math.h>

#include "select/scorer.h"
#include "select/selector.h"

typedef struct {
    dhsa_scorer fine, coarse;
    int32_t *edges; /* [groups + 1]: of the groups of the batch item */
    int64_t groups;
} rows_state;

/* Scratch memory of one thread, after that of the scorers. */
typedef struct {
    float *score;  /* [capacity] */
    float *mass;   /* [capacity]; only with a share of mass */
    float *coarse; /* [groups]; only with two stages */
    /* Only with two stages, see dhsa_shortlist. All groups may be on a shortlist, since empty chunks have no keys. */
    float *logs;
    int32_t *groups, *live;
} rows_parts;

static int64_t rows_lay_out(const rows_state *state, int with_mass, char *arena, rows_parts *w)
{
    int64_t used = DHSA_MAX(state->fine.arena_size, state->coarse.arena_size);
    w->score = dhsa_part(arena, &used, state->fine.capacity * 4);
    w->mass = with_mass ? dhsa_part(arena, &used, state->fine.capacity * 4) : NULL;
    w->coarse = dhsa_part(arena, &used, state->groups * 4);
    w->groups = dhsa_part(arena, &used, state->groups * 4);
    w->live = dhsa_part(arena, &used, state->edges ? (state->fine.capacity + 1) * 4 : 0);
    w->logs =
        dhsa_part(arena, &used, state->edges ? state->fine.kv_per_set * dhsa_row_scores_rows(&state->fine) * 4 : 0);
    return used;
}

/* A share of mass refers to all candidates, so there is no shortlist then. */
static int rows_two_stages(const dhsa_select_config *c, int64_t keys)
{
    return c->shortlist > 0 && c->mass == 0 && keys > c->shortlist;
}

static void rows_close(dhsa_selector *s)
{
    rows_state *state = s->state;
    dhsa_scorer_close(&state->fine);
    dhsa_scorer_close(&state->coarse);
    dhsa_free(state->edges);
}

static dhsa_status rows_open(dhsa_selector *s, dhsa_error *error)
{
    const dhsa_select_config *config = s->config;
    const int two = rows_two_stages(config, s->k->shape[2]);
    rows_state *state = s->state = dhsa_alloc_zeroed(1, sizeof *state);
    if (!state) return dhsa_fail(error, DHSA_ERR_NO_MEMORY, "select: no memory");
    rows_parts unused;
    dhsa_status status = dhsa_scorer_open(&state->fine, s->q, s->k, &config->score, s->n_boundaries, 1, s->key_indexes,
                                          DHSA_LEVEL_FINE, error);
    if (status) return status;
    s->segments = state->fine.capacity;
    s->arena_size = rows_lay_out(state, config->mass > 0, NULL, &unused);
    if (!two) return DHSA_OK;
    state->groups = dhsa_ceil_div(state->fine.capacity, DHSA_CHUNK_GROUP);
    state->edges = dhsa_alloc(state->groups + 1, sizeof *state->edges);
    if (!state->edges)
        return dhsa_fail(error, DHSA_ERR_NO_MEMORY, "select: no memory for the edges of %" PRId64 " groups",
                         state->groups);
    status = dhsa_scorer_open(&state->coarse, s->q, s->k, &config->score, state->groups + 1, 1, s->key_indexes,
                              DHSA_LEVEL_COARSE, error);
    s->arena_size = rows_lay_out(state, 0, NULL, &unused);
    return status;
}

static dhsa_status rows_begin(dhsa_selector *s, int64_t b, dhsa_error *error)
{
    rows_state *state = s->state;
    const int32_t *boundaries = s->boundaries + b * s->n_boundaries;
    state->fine.means = s->chunk_means;
    state->coarse.means = s->group_means;
    const dhsa_status status = dhsa_scorer_begin(&state->fine, b, boundaries, s->n_boundaries, s->arenas,
                                                 s->arena_stride, s->num_threads, error);
    if (status || !state->edges) return status;
    for (int64_t g = 0; g <= state->groups; g++)
        state->edges[g] = boundaries[DHSA_MIN(g * DHSA_CHUNK_GROUP, s->n_boundaries - 1)];
    return dhsa_scorer_begin(&state->coarse, b, state->edges, state->groups + 1, s->arenas, s->arena_stride,
                             s->num_threads, error);
}

/* Writes the groups on the shortlist of a block, ascending, to w->groups, and the logarithms of the rows' denominators
 * to w->logs; returns the number of groups. The groups of forced keys are on the list, since they count in its length.
 * *rows_packed: as in dhsa_shortlist. */
static int64_t rows_shortlist(const dhsa_selector *s, int64_t set, int64_t block, dhsa_span span, int thread,
                              const rows_parts *w, int *rows_packed)
{
    const rows_state *state = s->state;
    dhsa_shortlist list = {.logs = w->logs};
    float *score = w->coarse;
    dhsa_segments segments = {.edges = state->edges, .score = score};
    dhsa_scorer_run(&state->coarse, set, block, &list, dhsa_selector_arena(s, thread), score, NULL, &segments.first,
                    &segments.last);
    *rows_packed = list.rows_packed;
    for (int64_t g = segments.first; g < segments.last; g++)
        if (segments.edges[g] < s->config->sink ||
            (segments.edges[g + 1] > span.local_lo && segments.edges[g] < span.local_end))
            score[g] = INFINITY;
    return dhsa_topk_segments(s, thread, span, &segments, s->config->shortlist, w->groups);
}

static int64_t rows_list(const dhsa_selector *s, int64_t set, int64_t block, dhsa_span span, int thread, int32_t *list,
                         int64_t room)
{
    const rows_state *state = s->state;
    const dhsa_scorer *fine = &state->fine;
    char *arena = dhsa_selector_arena(s, thread);
    rows_parts w;
    rows_lay_out(state, s->config->mass > 0, arena, &w);
    dhsa_segments segments = {.edges = fine->chunks.edges, .score = w.score, .mass = w.mass};
    const int two = rows_two_stages(s->config, span.end - span.lo);
    dhsa_shortlist left = {.logs = w.logs, .groups = w.groups, .live = w.live};
    if (two) left.n_groups = rows_shortlist(s, set, block, span, thread, &w, &left.rows_packed);
    dhsa_scorer_run(fine, set, block, two ? &left : NULL, arena, w.score, w.mass, &segments.first, &segments.last);
    if (two) {
        segments.live = left.live;
        segments.n_live = left.n_live;
    }
    return dhsa_topk(s, thread, span, &segments, list, room);
}

const dhsa_method dhsa_method_rows = {.name = "rows",
                                      .has_mass = 1,
                                      .has_chunks = 1,
                                      .has_both_sides = 1,
                                      .open = rows_open,
                                      .close = rows_close,
                                      .begin = rows_begin,
                                      .list = rows_list};
