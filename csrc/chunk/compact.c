/* compact.c: this project's own boundary network, which costs very little. The keys of each token are projected once to
 * a narrow width, mixed there, and pooled over the w tokens up to a gap and the w tokens after it. A small MLP compares
 * the two halves.
 *
 *   z = P k + p;  t = Q [z, max(z, 0)] + q;  u = maximum (first half of its channels) or mean (second half) of t over w
 * tokens;   logit = b . max(A [|l - r|, l, r] + a, 0) + c   with l and r the u of the two sides.
 *
 * Reasons for this form: the label compares the attention that two groups of keys receive, so a few features that tell
 * how a key is attended to are enough. The pooled features of a run of tokens are shared by the gap before it and the
 * gap after it. The network of the paper is in predictor.c. */
#include <inttypes.h>
#include <math.h>
#include <string.h>

#include "core/arena.h"
#include "core/threads.h"
#include "chunk/chunk.h"

enum { TILE_TOKENS = 256 };

typedef struct {
    const dhsa_compact *net;
    const dhsa_tensor *k;
    const dhsa_kernels *kernels;
    int64_t tokens, gaps, tiles; /* tokens and gaps of a tile; tiles of a batch item */
    int64_t pitch;               /* floats from one channel of a tile to the next */
    float *weights;              /* the weights of the projection as panels: [R / lanes] of [C, lanes] */
    int64_t arena_size;
    float *logits, *arenas;
} compact_plan;

/* Scratch memory of one thread. */
typedef struct {
    float *rows;     /* [lanes, C]: keys in fp32, KV heads side by side */
    float *panel;    /* [max(2R, 3M), lanes] */
    float *wide;     /* [max(lanes, M, N), lanes] */
    float *token;    /* [M, pitch]: t */
    float *pooled;   /* [M, pitch]: entry j is u of tokens j .. j + w - 1 */
    float *poison;   /* [pitch]: 0, or NaN where t is not finite */
    float *poisoned; /* [pitch]: entry j is NaN if poison is NaN for any of tokens j .. j + w - 1, otherwise 0 */
} compact_scratch;

static int64_t compact_lay_out(const compact_plan *pl, float *base, compact_scratch *s)
{
    const dhsa_compact *n = pl->net;
    const int64_t lanes = pl->kernels->lanes;
    const int64_t sizes[] = {n->channels * lanes,
                             DHSA_MAX(2 * n->width, 3 * n->pooled) * lanes,
                             DHSA_MAX(DHSA_MAX(lanes, n->pooled), n->hidden) * lanes,
                             n->pooled * pl->pitch,
                             n->pooled * pl->pitch,
                             pl->pitch,
                             pl->pitch};
    float **const parts[] = {&s->rows, &s->panel, &s->wide, &s->token, &s->pooled, &s->poison, &s->poisoned};
    int64_t at = 0;
    for (int i = 0; i < 7; i++) *parts[i] = dhsa_part(base, &at, sizes[i] * 4);
    return at / 4;
}

/* Returns n tokens as rows of fp32 values, *stride apart: in k itself if it holds such rows, otherwise in s->rows. */
static const float *compact_gather(const compact_plan *pl, compact_scratch *s, int64_t b, int64_t token, int n,
                                   ptrdiff_t *stride)
{
    const int64_t C = pl->net->channels, heads = pl->k->shape[1], dim = pl->k->shape[3];
    if (pl->k->dtype == DHSA_F32 && heads == 1) {
        *stride = (ptrdiff_t)pl->k->stride[2];
        return dhsa_row(pl->k, b, 0, token);
    }
    for (int r = 0; r < n; r++)
        for (int64_t h = 0; h < heads; h++)
            pl->kernels->load(dhsa_row(pl->k, b, h, token + r), pl->k->dtype, dim, s->rows + r * C + h * dim);
    *stride = (ptrdiff_t)C;
    return s->rows;
}

/* Computes t of tokens [at, at + n) of the tile, n <= lanes. */
static void compact_project(const compact_plan *pl, compact_scratch *s, int64_t b, int64_t token, int64_t at, int n)
{
    const dhsa_kernels *kn = pl->kernels;
    const dhsa_compact *net = pl->net;
    const int64_t lanes = kn->lanes, C = net->channels, R = net->width;
    ptrdiff_t stride;
    const float *rows = compact_gather(pl, s, b, token + at, n, &stride);
    memset(s->panel, 0, (size_t)(2 * R * lanes) * sizeof *s->panel);
    /* Here the panel holds the weights, and the tokens take the place of keys. So the C inputs of a token need no
     * transposing, only its R outputs. */
    for (int64_t first = 0; first < R; first += lanes) {
        const int used = (int)DHSA_MIN(lanes, R - first);
        kn->qk(pl->weights + first * C, rows, stride, n, (int)C, used, s->wide, NULL);
        for (int64_t c = first; c < first + used; c++)
            for (int r = 0; r < n; r++) {
                const float z = s->wide[r * lanes + c - first] + net->project_bias[c];
                s->panel[c * lanes + r] = z;
                s->panel[(R + c) * lanes + r] = z < 0 ? 0.0f : z;
            }
    }
    kn->qk(s->panel, net->token_weight, 2 * R, (int)net->pooled, (int)(2 * R), n, s->wide, NULL);
    for (int r = 0; r < n; r++) s->poison[at + r] = 0;
    for (int64_t c = 0; c < net->pooled; c++)
        for (int r = 0; r < n; r++) {
            const float t = s->wide[c * lanes + r] + net->token_bias[c];
            s->token[c * pl->pitch + at + r] = t;
            s->poison[at + r] += t * 0.0f;
        }
}

/* Computes u of every run of w tokens. */
static void compact_pool(const compact_plan *pl, compact_scratch *s, int64_t tokens)
{
    const int64_t w = pl->net->window, runs = tokens - w + 1, M = pl->net->pooled;
    const float share = 1.0f / (float)w;
    for (int64_t c = 0; c <= M; c++) {
        const float *t = c < M ? s->token + c * pl->pitch : s->poison;
        float *u = c < M ? s->pooled + c * pl->pitch : s->poisoned;
        memcpy(u, t, (size_t)runs * sizeof *u);
        for (int64_t i = 1; i < w; i++)
            if (c < M / 2)
                for (int64_t j = 0; j < runs; j++) u[j] = u[j] > t[j + i] ? u[j] : t[j + i];
            else
                for (int64_t j = 0; j < runs; j++) u[j] += t[j + i];
        if (c >= M / 2)
            for (int64_t j = 0; j < runs; j++) u[j] *= share;
    }
}

/* Applies the MLP to gaps [at, at + n) of the tile. */
static void compact_classify(const compact_plan *pl, compact_scratch *s, int64_t at, int n, float *logits)
{
    const dhsa_compact *net = pl->net;
    const int64_t lanes = pl->kernels->lanes, M = net->pooled;
    float sum[DHSA_MAX_LANES];
    memset(s->panel, 0, (size_t)(3 * M * lanes) * sizeof *s->panel);
    for (int64_t c = 0; c < M; c++) {
        const float *l = s->pooled + c * pl->pitch + at, *r = l + net->window;
        for (int i = 0; i < n; i++) {
            s->panel[c * lanes + i] = fabsf(l[i] - r[i]);
            s->panel[(M + c) * lanes + i] = l[i];
            s->panel[(2 * M + c) * lanes + i] = r[i];
        }
    }
    pl->kernels->qk(s->panel, net->head0_weight, 3 * M, (int)net->hidden, (int)(3 * M), n, s->wide, NULL);
    for (int i = 0; i < n; i++) sum[i] = net->head2_bias + (s->poisoned[at + i] + s->poisoned[at + net->window + i]);
    for (int64_t c = 0; c < net->hidden; c++)
        for (int i = 0; i < n; i++) {
            const float x = s->wide[c * lanes + i] + net->head0_bias[c];
            sum[i] += (x < 0 ? 0.0f : x) * net->head2_weight[c];
        }
    memcpy(logits, sum, (size_t)n * sizeof *logits);
}

static void compact_pack_weights(const compact_plan *pl)
{
    const int64_t lanes = pl->kernels->lanes, C = pl->net->channels, R = pl->net->width;
    const void *rows[DHSA_MAX_LANES];
    for (int64_t first = 0; first < R; first += lanes) {
        const int n = (int)DHSA_MIN(lanes, R - first);
        for (int r = 0; r < n; r++) rows[r] = pl->net->project_weight + (first + r) * C;
        pl->kernels->pack_panel(rows, DHSA_F32, n, (int)C, 1.0f, pl->weights + first * C);
    }
}

static void compact_tile_task(void *context, int64_t index, int thread)
{
    const compact_plan *pl = context;
    const int64_t length = pl->k->shape[2], b = index / pl->tiles, lanes = pl->kernels->lanes, w = pl->net->window;
    const int64_t first = w - 1 + index % pl->tiles * pl->gaps, gaps = DHSA_MIN(pl->gaps, length - w - first);
    const int64_t tokens = gaps + 2 * w - 1;
    float *logits = pl->logits + b * length + first;
    compact_scratch s;
    compact_lay_out(pl, pl->arenas + thread * pl->arena_size, &s);
    for (int64_t at = 0; at < tokens; at += lanes)
        compact_project(pl, &s, b, first - w + 1, at, (int)DHSA_MIN(lanes, tokens - at));
    compact_pool(pl, &s, tokens);
    for (int64_t at = 0; at < gaps; at += lanes)
        compact_classify(pl, &s, at, (int)DHSA_MIN(lanes, gaps - at), logits + at);
}

dhsa_status dhsa_compact_check(const dhsa_compact *n, dhsa_error *error)
{
    if (!n) return dhsa_fail(error, DHSA_ERR_VALUE, "predictor: none given");
    const void *const needed[] = {n->project_weight, n->project_bias, n->token_weight, n->token_bias,
                                  n->head0_weight,   n->head0_bias,   n->head2_weight};
    for (int i = 0; i < 7; i++)
        if (!needed[i]) return dhsa_fail(error, DHSA_ERR_VALUE, "predictor: weights are missing");
    const int64_t sizes[] = {n->channels, n->width, n->pooled, n->hidden};
    for (int i = 0; i < 4; i++)
        if (sizes[i] < 1 || sizes[i] > 1 << 20)
            return dhsa_fail(error, DHSA_ERR_VALUE, "predictor: a layer has %" PRId64 " units, expected 1 to %d",
                             sizes[i], 1 << 20);
    if (n->window < 1)
        return dhsa_fail(error, DHSA_ERR_VALUE, "predictor: window is %" PRId64 ", expected at least 1", n->window);
    return DHSA_OK;
}

dhsa_status dhsa_compact_logits(const dhsa_compact *net, const dhsa_tensor *k, float *logits, int num_threads,
                                dhsa_error *error)
{
    dhsa_status status;
    if ((status = dhsa_tensor_check(k, "k", error)) || (status = dhsa_threads_check(num_threads, error)) ||
        (status = dhsa_compact_check(net, error)) || (status = dhsa_predictor_width(net->channels, k, error)) ||
        (status = dhsa_check_pointer(logits, "logits", error)))
        return status;
    return dhsa_compact_logits_checked(net, k, logits, num_threads, error);
}

dhsa_status dhsa_compact_logits_checked(const dhsa_compact *net, const dhsa_tensor *k, float *logits, int num_threads,
                                        dhsa_error *error)
{
    dhsa_status status = DHSA_OK;
    const int64_t length = k->shape[2];
    for (int64_t i = 0; i < k->shape[0] * length; i++) logits[i] = -100.0f;
    if (net->window > length / 2) return DHSA_OK; /* no gap has a full window */
    compact_plan pl = {
        .net = net, .k = k, .kernels = dhsa_kernels_for(dhsa_kernels_current(), DHSA_F32), .logits = logits};
    pl.tokens = DHSA_MIN(DHSA_MAX(TILE_TOKENS, 8 * net->window), length);
    pl.pitch = dhsa_round_up(pl.tokens, DHSA_ALIGN / 4);
    pl.gaps = pl.tokens - 2 * net->window + 1;
    pl.tiles = dhsa_ceil_div(length - 2 * net->window + 1, pl.gaps);
    compact_scratch unused;
    int64_t most;
    if (!dhsa_mul(pl.pitch, net->pooled, &most) || most > (int64_t)1 << 32)
        return dhsa_fail(error, DHSA_ERR_NO_MEMORY,
                         "predictor: a window of %" PRId64 " tokens on each side is too large", net->window);
    pl.arena_size = compact_lay_out(&pl, NULL, &unused);
    const int64_t tasks = k->shape[0] * pl.tiles;
    const int threads = (int)DHSA_MIN(tasks, num_threads);
    pl.weights = dhsa_alloc(dhsa_round_up(net->width, pl.kernels->lanes) * net->channels, sizeof *pl.weights);
    pl.arenas = dhsa_alloc(pl.arena_size, threads * (int64_t)sizeof *pl.arenas);
    if (pl.weights && pl.arenas) {
        compact_pack_weights(&pl);
        dhsa_parallel(tasks, threads, compact_tile_task, &pl);
    } else {
        status = dhsa_fail(error, DHSA_ERR_NO_MEMORY, "predictor: no memory for %d workspaces of %" PRId64 " floats",
                           threads, pl.arena_size);
    }
    dhsa_free(pl.weights);
    dhsa_free(pl.arenas);
    return status;
}
