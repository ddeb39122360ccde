/* dhsa.c: the method "dhsa": selects chunks by the score of the paper, the mean query of a query block against the mean
 * key of a chunk. The scores are computed in mean_scores.c. Source: Dynamic Hierarchical Sparse Attention, arXiv
 * 2510.24606. */
#include "select/scorer.h"
#include "select/selector.h"

static dhsa_status dhsa_method_open(dhsa_selector *s, dhsa_error *error)
{
    dhsa_scorer *scorer = s->state = dhsa_alloc_zeroed(1, sizeof *scorer);
    if (!scorer) return dhsa_fail(error, DHSA_ERR_NO_MEMORY, "scores: no memory");
    const dhsa_status status = dhsa_scorer_open(scorer, s->q, s->k, &s->config->score, s->n_boundaries, 0,
                                                s->key_indexes, DHSA_LEVEL_FINE, error);
    if (status) return status;
    s->segments = scorer->capacity;
    s->arena_size = scorer->arena_size; /* scratch of the scorer, then the scores */
    dhsa_part(NULL, &s->arena_size, scorer->capacity * 4);
    return DHSA_OK;
}

static void dhsa_method_close(dhsa_selector *s) { dhsa_scorer_close(s->state); }

static dhsa_status dhsa_method_begin(dhsa_selector *s, int64_t b, dhsa_error *error)
{
    return dhsa_scorer_begin(s->state, b, s->boundaries + b * s->n_boundaries, s->n_boundaries, s->arenas,
                             s->arena_stride, s->num_threads, error);
}

static int64_t dhsa_method_list(const dhsa_selector *s, int64_t set, int64_t block, dhsa_span span, int thread,
                                int32_t *list, int64_t room)
{
    const dhsa_scorer *scorer = s->state;
    char *arena = dhsa_selector_arena(s, thread);
    int64_t used = scorer->arena_size;
    float *score = dhsa_part(arena, &used, scorer->capacity * 4);
    dhsa_segments segments = {.edges = scorer->chunks.edges, .score = score};
    dhsa_scorer_run(scorer, set, block, NULL, arena, score, NULL, &segments.first, &segments.last);
    return dhsa_topk(s, thread, span, &segments, list, room);
}

const dhsa_method dhsa_method_dhsa = {.name = "dhsa",
                                      .has_chunks = 1,
                                      .open = dhsa_method_open,
                                      .close = dhsa_method_close,
                                      .begin = dhsa_method_begin,
                                      .list = dhsa_method_list};
