/* block.c: fixed blocks of keys by their mean: for each head a softmax of the query block's mean query over the mean keys, summed
 * over the heads of a set. The common baseline of block-sparse attention, as in the block selection of MInference
 * (arXiv 2407.02490) and of MoBA (arXiv 2502.13189). */
#include <inttypes.h>
#include <math.h>
#include <string.h>

#include "chunk/chunk.h"
#include "select/selector.h"

typedef struct {
    dhsa_chunks blocks; /* of keys */
    int32_t *edges;
} block_state;

/* What one thread works in; the means come first, where dhsa_chunks_fill works. */
typedef struct {
    float *key, *sum, *query;    /* [dim]: the mean of the last block, where it is cut; scratch; the mean query */
    float *logit, *score, *mass; /* [units] */
    int64_t size;                /* of the arena */
} scratch;

static scratch lay_out(const dhsa_selector *s, char *arena)
{
    const int64_t dim = s->k->shape[3];
    int64_t used = 0;
    scratch w;
    w.key = dhsa_part(arena, &used, dim * 4);
    w.sum = dhsa_part(arena, &used, dim * 4);
    w.query = dhsa_part(arena, &used, dim * 4);
    w.logit = dhsa_part(arena, &used, s->units * 4);
    w.score = dhsa_part(arena, &used, s->units * 4);
    w.mass = dhsa_part(arena, &used, s->units * 4);
    w.size = used;
    return w;
}

static dhsa_status open(dhsa_selector *s, dhsa_error *error)
{
    const int64_t length = s->config->key_block, k_len = s->k->shape[2], dim = s->k->shape[3];
    s->units = dhsa_ceil_div(k_len, length);
    s->arena_size = lay_out(s, NULL).size;
    block_state *state = s->state = dhsa_alloc(1, sizeof *state);
    if (state) {
        memset(state, 0, sizeof *state);
        state->edges = dhsa_alloc(s->units + 1, sizeof *state->edges);
    }
    if (!state || !state->edges || !dhsa_chunks_open(&state->blocks, DHSA_MEANS_F32, 0, s->k->shape[1], s->units, dim))
        return dhsa_fail(error, DHSA_ERR_NO_MEMORY, "select: no memory for the means of %" PRId64 " blocks of keys", s->units);
    for (int64_t c = 0; c <= s->units; c++) state->edges[c] = (int32_t)DHSA_MIN(c * length, k_len);
    state->blocks.edges = state->edges;
    state->blocks.chunks = s->units;
    return DHSA_OK;
}

static void close(dhsa_selector *s)
{
    block_state *state = s->state;
    if (!state) return;
    dhsa_chunks_close(&state->blocks);
    dhsa_free(state->edges);
    dhsa_free(state);
}

static dhsa_status begin(dhsa_selector *s, int64_t b, dhsa_error *error)
{
    block_state *state = s->state;
    (void)error;
    dhsa_chunks_fill(s->kernels, s->k, b, &state->blocks, 0, s->arenas, s->arena_stride, s->num_threads);
    return DHSA_OK;
}

/* Adds the probabilities of one head to the mass of blocks [first, last); state says which blocks of its KV head take part, and
 * last_key is the mean of the last one as the query block sees it. */
static void add_head(const dhsa_selector *s, int64_t head, int64_t from, int64_t to, const dhsa_units *units,
                     const unsigned char *state, const float *means, const float *last_key, int last_good, const scratch *w)
{
    const dhsa_kernels *kn = s->kernels;
    const int64_t dim = s->q->shape[3];
    const float scale = (float)s->config->score.scale, cap = (float)s->config->score.softcap;
    float top = -INFINITY, sum = 0;
    dhsa_mean_query(kn, s->q, s->b, head, from, to, 1.0f, w->query);
    if (!dhsa_all_finite(kn, w->query, dim)) return; /* no opinion */
    for (int64_t c = units->first; c < units->last; c++) {
        const int last = c == units->last - 1;
        w->logit[c] = -INFINITY;
        if (last ? !last_good : state[c] != DHSA_CHUNK_GOOD) continue;
        const float x = scale * kn->dot(w->query, last ? last_key : means + c * dim, dim);
        w->logit[c] = cap > 0 ? cap * tanhf(x / cap) : x;
        if (!isfinite(w->logit[c])) return;
        top = fmaxf(top, w->logit[c]);
    }
    if (top == -INFINITY) return;
    for (int64_t c = units->first; c < units->last; c++) sum += w->logit[c] = expf(w->logit[c] - top);
    for (int64_t c = units->first; c < units->last; c++) w->mass[c] += w->logit[c] / sum;
}

static int64_t list(const dhsa_selector *s, int64_t set, int64_t block, dhsa_span span, int thread, int32_t *row, int64_t room)
{
    const block_state *state = s->state;
    const dhsa_chunks *blocks = &state->blocks;
    const int64_t length = s->config->key_block, dim = s->k->shape[3];
    const int64_t from = block * s->config->score.query_block, to = DHSA_MIN(from + s->config->score.query_block, s->q->shape[2]);
    const scratch w = lay_out(s, dhsa_selector_arena(s, thread));
    dhsa_units units = {state->edges, span.lo / length, dhsa_ceil_div(span.end, length), w.score, w.mass};
    const int64_t last = units.last - 1, first_head = set * s->heads_per_set;
    for (int64_t c = units.first; c < units.last; c++) w.score[c] = w.mass[c] = 0;
    const float *means = NULL, *last_key = NULL;
    const unsigned char *good = NULL;
    int last_good = 0;
    for (int64_t h = first_head; h < first_head + s->heads_per_set; h++) {
        const int64_t kv = h / s->group;
        if (h == first_head || h % s->group == 0) { /* another KV head */
            means = (const float *)blocks->means + kv * blocks->pitch * dim;
            good = blocks->state + kv * blocks->pitch;
            last_key = means + last * dim;
            last_good = good[last] == DHSA_CHUNK_GOOD;
            if (state->edges[last + 1] > span.end) { /* no query may look past its block's end */
                last_good = dhsa_chunk_mean(s->kernels, s->k, s->b, kv, state->edges[last], span.end, w.key, w.sum);
                last_key = w.key;
            }
            /* A NaN must reach the rows that see it, as in exact attention: such a block is always picked. */
            for (int64_t c = units.first; c < units.last; c++)
                if (c == last ? !last_good : good[c] != DHSA_CHUNK_GOOD) w.score[c] = INFINITY;
        }
        add_head(s, h, from, to, &units, good, means, last_key, last_good, &w);
    }
    for (int64_t c = units.first; c < units.last; c++) {
        if (w.score[c] == INFINITY)
            w.mass[c] = 0;
        else
            w.score[c] = w.mass[c];
    }
    return dhsa_take(s, thread, span, &units, row, room);
}

const dhsa_method dhsa_method_block = {
    .name = "block", .has_mass = 1, .has_blocks = 1, .open = open, .close = close, .begin = begin, .list = list};
