/* power.c: selects key blocks at distances that are powers of two, whatever they hold, so that the number of tokens
 * that reach a token doubles with every layer. Key blocks are as long as query blocks, and a distance is counted in
 * blocks back from the query block itself, which has distance 0. The budget is filled in the order of the number of
 * hops of power-of-two length that a distance takes: first the powers, then sums of two powers, and so on; of equal
 * numbers the nearer block comes first. Source: PowerAttention (arXiv 2503.03588); the order beyond the powers is this
 * project's. */
#include "select/selector.h"

static dhsa_status power_open(dhsa_selector *s, dhsa_error *error)
{
    (void)error;
    s->segments = dhsa_ceil_div(s->k->shape[2], s->config->score.query_block) + 1;
    dhsa_part(NULL, &s->arena_size, (s->segments + 1) * 4);
    dhsa_part(NULL, &s->arena_size, s->segments * 4);
    return DHSA_OK;
}

static int64_t power_list(const dhsa_selector *s, int64_t set, int64_t block, dhsa_span span, int thread, int32_t *list,
                          int64_t room)
{
    const int64_t length = s->config->score.query_block, start = s->k->shape[2] - s->q->shape[2] + block * length;
    const int64_t most = dhsa_ceil_div(start, length);
    char *arena = dhsa_selector_arena(s, thread);
    int64_t used = 0;
    int32_t *edges = dhsa_part(arena, &used, (s->segments + 1) * 4);
    float *score = dhsa_part(arena, &used, s->segments * 4);
    const dhsa_segments segments = {.edges = edges, .first = 0, .last = most + 1, .score = score};
    (void)set;
    for (int64_t c = 0; c <= most; c++) {
        int hops = 0;
        for (int64_t distance = most - c; distance; distance &= distance - 1) hops++;
        edges[c] = (int32_t)DHSA_MAX(start - (most - c) * length, 0);
        score[c] = (float)-hops; /* of equal scores dhsa_topk takes the nearer block */
    }
    edges[most + 1] = (int32_t)span.end;
    return dhsa_topk(s, thread, span, &segments, list, room);
}

const dhsa_method dhsa_method_power = {.name = "power", .open = power_open, .list = power_list};
