/* block.c: selects fixed key blocks by their mean keys: for each head a softmax of the mean query of the query block
 * over the mean keys, summed over the heads of a set. The common baseline of block-sparse attention, as in the block
 * selection of MInference (arXiv 2407.02490) and of MoBA (arXiv 2502.13189). */
#include <inttypes.h>
#include <math.h>
#include <string.h>

#include "select/coarse.h"

/* Scratch memory of one thread. key and sum come first: dhsa_chunks_fill uses this memory too. */
typedef struct {
    float *key, *sum, *query;    /* [dim]: the mean of the last key block if it is cut; scratch; the mean query */
    float *logit, *score, *mass; /* [segments] */
    int64_t size;                /* bytes of all parts */
} block_parts;

static block_parts block_lay_out(const dhsa_selector *s, char *arena)
{
    const int64_t dim = s->k->shape[3];
    int64_t used = 0;
    block_parts w;
    w.key = dhsa_part(arena, &used, dim * 4);
    w.sum = dhsa_part(arena, &used, dim * 4);
    w.query = dhsa_part(arena, &used, dim * 4);
    w.logit = dhsa_part(arena, &used, s->segments * 4);
    w.score = dhsa_part(arena, &used, s->segments * 4);
    w.mass = dhsa_part(arena, &used, s->segments * 4);
    w.size = used;
    return w;
}

static dhsa_status block_open(dhsa_selector *s, dhsa_error *error)
{
    s->segments = dhsa_ceil_div(s->k->shape[2], s->config->key_block);
    s->arena_size = block_lay_out(s, NULL).size;
    dhsa_block_means *means = s->state = dhsa_alloc_zeroed(1, sizeof *means);
    if (means && dhsa_block_means_open(means, s)) return DHSA_OK;
    return dhsa_fail(error, DHSA_ERR_NO_MEMORY, "block: no memory for the means of %" PRId64 " blocks of keys",
                     s->segments);
}

static void block_close(dhsa_selector *s) { dhsa_block_means_close(s->state); }

static dhsa_status block_begin(dhsa_selector *s, int64_t b, dhsa_error *error)
{
    (void)b, (void)error;
    dhsa_block_means_begin(s->state, s);
    return DHSA_OK;
}

/* Adds the probabilities of one head to the mass of all segments. state says which key blocks of its KV head have a
 * finite mean, and last_key is the mean of the last key block, up to the end of the query block. */
static void block_add_head(const dhsa_selector *s, int64_t head, int64_t from, int64_t to,
                           const dhsa_segments *segments, const unsigned char *state, const float *means,
                           const float *last_key, int last_good, const block_parts *w)
{
    const dhsa_kernels *kn = s->kernels;
    const int64_t dim = s->q->shape[3];
    const float scale = (float)s->config->score.scale, cap = (float)s->config->score.softcap;
    float top = -INFINITY, sum = 0;
    dhsa_mean_query(kn, s->q, s->b, head, from, to, 1.0f, w->query);
    if (!dhsa_all_finite(kn, w->query, dim)) return; /* the head does not count */
    for (int64_t c = segments->first; c < segments->last; c++) {
        const int last = c == segments->last - 1;
        w->logit[c] = -INFINITY;
        if (last ? !last_good : state[c] != DHSA_CHUNK_GOOD) continue;
        const float x = scale * kn->dot(w->query, last ? last_key : means + c * dim, dim);
        w->logit[c] = cap > 0 ? cap * tanhf(x / cap) : x;
        if (!isfinite(w->logit[c])) return;
        top = fmaxf(top, w->logit[c]);
    }
    if (top == -INFINITY) return;
    for (int64_t c = segments->first; c < segments->last; c++) sum += w->logit[c] = expf(w->logit[c] - top);
    for (int64_t c = segments->first; c < segments->last; c++) w->mass[c] += w->logit[c] / sum;
}

static int64_t block_list(const dhsa_selector *s, int64_t set, int64_t block, dhsa_span span, int thread, int32_t *list,
                          int64_t room)
{
    const dhsa_block_means *state = s->state;
    const dhsa_chunks *blocks = &state->chunks;
    const int64_t length = s->config->key_block, dim = s->k->shape[3];
    const int64_t from = block * s->config->score.query_block,
                  to = DHSA_MIN(from + s->config->score.query_block, s->q->shape[2]);
    const block_parts w = block_lay_out(s, dhsa_selector_arena(s, thread));
    dhsa_segments segments = {.edges = state->edges,
                              .first = span.lo / length,
                              .last = dhsa_ceil_div(span.end, length),
                              .score = w.score,
                              .mass = w.mass};
    const int64_t last = segments.last - 1, first_head = set * s->heads_per_set;
    for (int64_t c = segments.first; c < segments.last; c++) w.score[c] = w.mass[c] = 0;
    const float *means = NULL, *last_key = NULL;
    const unsigned char *good = NULL;
    int last_good = 0;
    for (int64_t h = first_head; h < first_head + s->heads_per_set; h++) {
        const int64_t kv = h / s->group;
        if (h == first_head || h % s->group == 0) { /* the next KV head */
            means = (const float *)blocks->means + kv * blocks->pitch * dim;
            good = blocks->state + kv * blocks->pitch;
            last_key =
                dhsa_block_mean(state, s, kv, last, span.end, w.key, w.sum, &last_good); /* of keys below span.end */
            /* As in exact attention, a NaN must reach the queries that see it, so such a key block is always picked. */
            for (int64_t c = segments.first; c < segments.last; c++)
                if (c == last ? !last_good : good[c] != DHSA_CHUNK_GOOD) w.score[c] = INFINITY;
        }
        block_add_head(s, h, from, to, &segments, good, means, last_key, last_good, &w);
    }
    for (int64_t c = segments.first; c < segments.last; c++) {
        if (w.score[c] == INFINITY)
            w.mass[c] = 0;
        else
            w.score[c] = w.mass[c];
    }
    return dhsa_topk(s, thread, span, &segments, list, room);
}

const dhsa_method dhsa_method_block = {.name = "block",
                                       .has_mass = 1,
                                       .has_blocks = 1,
                                       .has_both_sides = 1,
                                       .open = block_open,
                                       .close = block_close,
                                       .begin = block_begin,
                                       .list = block_list};
