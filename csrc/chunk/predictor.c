/* predictor.c: the boundary network of the paper on the keys of one layer (window attention, LayerNorm, pooling, MLP).
 * Gaps are picked by its logits in boundaries.c. Source: arXiv 2510.24606 (dynamic chunking). Weights have torch's
 * layouts.
 *
 * What depends on one token only is computed once per token, not once per window: the in-projection, and the values
 * times the out-projection, head by head (sum_t p_ht W_h v_t = W_h sum_t p_ht v_t). A window then costs 2w * heads
 * weighted sums. The work is done in tiles of tokens; memory is O(threads * tile). Windows are never padded: the logit
 * of a gap without a full window is -100. */
#include <inttypes.h>
#include <math.h>
#include <string.h>

#include "core/arena.h"
#include "core/threads.h"
#include "chunk/chunk.h"

enum { TILE_TOKENS = 128 };

typedef struct {
    const dhsa_predictor *net;
    const dhsa_tensor *k;
    const dhsa_kernels *kernels;
    int64_t C, heads, w, width; /* width: 2w, tokens of a window */
    int64_t tokens, gaps;       /* of a tile */
    int64_t group;              /* gaps whose windows share a panel */
    int64_t tiles;              /* of a batch item */
    int64_t strip;              /* floats of a packed strip of values */
    int64_t arena_size;
    float *logits, *arenas;
} predictor_plan;

/* Scratch memory of one thread. */
typedef struct {
    float *panel;    /* [C, lanes]: tokens */
    float *wide;     /* [3C, lanes]: their in-projection; later [hidden, lanes] */
    float *out;      /* [C, lanes] */
    float *query;    /* [tokens, C], scaled */
    float *key;      /* [tokens, C] */
    float *value;    /* packed for pv: entry token * heads + h is W_h v_t */
    float *band;     /* [tokens, 4w - 1, heads]: logits of a token against its neighbours */
    float *weight;   /* [(width + group - 1) * heads, lanes]: attention weights */
    float *window;   /* [width * group, C]: the tokens of a group after LayerNorm */
    float *rows;     /* [lanes, 4C + 1]: features of gaps */
    float *features; /* [4C + 1, lanes]: the rows as a panel */
    float *line;     /* [max(width, lanes)] */
    float *poison;   /* [tokens]: 0, or NaN where the projection of a token is not finite */
} predictor_scratch;

static int64_t predictor_lay_out(const predictor_plan *pl, float *base, predictor_scratch *s)
{
    const int64_t lanes = pl->kernels->lanes, C = pl->C, hidden = pl->net->hidden;
    const int64_t sizes[] = {C * lanes,
                             DHSA_MAX(3 * C, hidden) * lanes,
                             C * lanes,
                             pl->tokens * C,
                             pl->tokens * C,
                             dhsa_ceil_div(C, pl->kernels->value_step) * pl->strip,
                             pl->tokens * (4 * pl->w - 1) * pl->heads,
                             (pl->width + pl->group - 1) * pl->heads * lanes,
                             pl->width * pl->group * C,
                             (4 * C + 1) * lanes,
                             (4 * C + 1) * lanes,
                             DHSA_MAX(pl->width, lanes),
                             pl->tokens};
    float **const parts[] = {&s->panel,  &s->wide,   &s->out,  &s->query,    &s->key,  &s->value, &s->band,
                             &s->weight, &s->window, &s->rows, &s->features, &s->line, &s->poison};
    int64_t at = 0;
    for (int i = 0; i < 13; i++) *parts[i] = dhsa_part(base, &at, sizes[i] * 4);
    return at / 4;
}

/* Computes query, key and out-projected values of tokens [at, at + n) of the tile, n <= lanes. */
static void predictor_project(const predictor_plan *pl, predictor_scratch *s, int64_t b, int64_t token, int64_t at,
                              int n)
{
    const dhsa_kernels *kn = pl->kernels;
    const int64_t C = pl->C, dim = pl->k->shape[3], per_head = C / pl->heads, lanes = kn->lanes, step = kn->value_step;
    const float root = 1.0f / sqrtf((float)per_head);
    const void *rows[DHSA_MAX_LANES];
    for (int64_t h = 0; h < pl->k->shape[1]; h++) {
        for (int r = 0; r < n; r++) rows[r] = dhsa_row(pl->k, b, h, token + at + r);
        kn->pack_panel(rows, pl->k->dtype, n, (int)dim, 1.0f, s->panel + h * dim * lanes);
    }
    kn->qk(s->panel, pl->net->in_proj_weight, C, (int)(3 * C), (int)C, kn->lanes, s->wide, NULL);
    for (int r = 0; r < n; r++) s->poison[at + r] = 0;
    for (int64_t c = 0; c < 3 * C; c++)
        for (int r = 0; r < n; r++) {
            s->wide[c * lanes + r] += pl->net->in_proj_bias[c];
            s->poison[at + r] += s->wide[c * lanes + r] * 0.0f;
        }
    for (int64_t c = 0; c < C; c++)
        for (int r = 0; r < n; r++) {
            s->query[(at + r) * C + c] = s->wide[c * lanes + r] * root;
            s->key[(at + r) * C + c] = s->wide[(C + c) * lanes + r];
        }
    for (int64_t h = 0; h < pl->heads; h++) {
        memcpy(s->panel, s->wide + (2 * C + h * per_head) * lanes, (size_t)(per_head * lanes) * sizeof *s->panel);
        kn->qk(s->panel, pl->net->out_proj_weight + h * per_head, C, (int)C, (int)per_head, kn->lanes, s->out, NULL);
        for (int64_t c = 0; c < C; c++)
            for (int r = 0; r < n; r++)
                s->value[c / step * pl->strip + ((at + r) * pl->heads + h) * step + c % step] = s->out[c * lanes + r];
    }
}

/* Computes the attention logits of every token of the tile against the tokens less than `width` away from it. */
static void fill_band(const predictor_plan *pl, predictor_scratch *s, int64_t tokens)
{
    const int64_t C = pl->C, per_head = C / pl->heads, reach = pl->width - 1;
    for (int64_t a = 0; a < tokens; a++)
        for (int64_t t = DHSA_MAX(a - reach, 0); t < DHSA_MIN(a + reach + 1, tokens); t++)
            for (int64_t h = 0; h < pl->heads; h++)
                s->band[(a * (4 * pl->w - 1) + t - a + reach) * pl->heads + h] =
                    pl->kernels->dot(s->query + a * C + h * per_head, s->key + t * C + h * per_head, per_head);
}

/* Writes the attention weights of token a, in the window that begins at token x, to lane r. The first window of the
 * group begins at token `base`. */
static void window_weights(const predictor_plan *pl, predictor_scratch *s, int64_t a, int64_t x, int64_t base,
                           int64_t r)
{
    const int64_t heads = pl->heads, lanes = pl->kernels->lanes;
    const float *band = s->band + (a * (4 * pl->w - 1) + x - a + pl->width - 1) * heads;
    for (int64_t h = 0; h < heads; h++) {
        float top = -INFINITY, sum = 0;
        for (int64_t t = 0; t < pl->width; t++) top = band[t * heads + h] > top ? band[t * heads + h] : top;
        for (int64_t t = 0; t < pl->width; t++) sum += s->line[t] = expf(band[t * heads + h] - top);
        for (int64_t t = 0; t < pl->width; t++) s->weight[((x - base + t) * heads + h) * lanes + r] = s->line[t] / sum;
    }
}

/* Applies LayerNorm over the channels to each of n lanes of s->out and writes the results as rows [n, C]. */
static void predictor_normalise(const predictor_plan *pl, predictor_scratch *s, int n, float *rows)
{
    const int64_t C = pl->C, lanes = pl->kernels->lanes;
    float mean[DHSA_MAX_LANES] = {0}, scale[DHSA_MAX_LANES] = {0};
    for (int64_t c = 0; c < C; c++)
        for (int r = 0; r < n; r++) mean[r] += s->out[c * lanes + r];
    for (int r = 0; r < n; r++) mean[r] /= (float)C;
    for (int64_t c = 0; c < C; c++)
        for (int r = 0; r < n; r++) {
            const float x = s->out[c * lanes + r] - mean[r];
            scale[r] += x * x;
        }
    for (int r = 0; r < n; r++) scale[r] = 1.0f / sqrtf(scale[r] / (float)C + 1e-5f);
    for (int64_t c = 0; c < C; c++)
        for (int r = 0; r < n; r++)
            s->out[c * lanes + r] =
                (s->out[c * lanes + r] - mean[r]) * scale[r] * pl->net->norm_weight[c] + pl->net->norm_bias[c];
    float ones[DHSA_MAX_LANES];
    void *to[DHSA_MAX_LANES];
    for (int r = 0; r < DHSA_MAX_LANES; r++) ones[r] = 1.0f;
    for (int r = 0; r < n; r++) to[r] = rows + r * C;
    pl->kernels->store_panel(s->out, ones, n, (int)C, DHSA_F32, to);
}

/* Encodes the tokens of the windows of gaps [x, x + gaps) of the tile into s->window. The windows begin at tokens x,
 * x + 1, ... */
static void predictor_encode(const predictor_plan *pl, predictor_scratch *s, int64_t x, int64_t gaps)
{
    const dhsa_kernels *kn = pl->kernels;
    const int64_t C = pl->C, heads = pl->heads, lanes = kn->lanes, slots = gaps * pl->width,
                  tokens = pl->width + gaps - 1;
    const float zeros[DHSA_MAX_LANES] = {0};
    for (int64_t first = 0; first < slots; first += lanes) {
        const int n = (int)DHSA_MIN(lanes, slots - first);
        memset(s->weight, 0, (size_t)(tokens * heads * lanes) * sizeof *s->weight);
        memset(s->out, 0, (size_t)(C * lanes) * sizeof *s->out);
        for (int r = 0; r < n; r++) {
            const int64_t gap = (first + r) / pl->width, token = (first + r) % pl->width;
            window_weights(pl, s, x + gap + token, x + gap, x, r);
        }
        kn->pv(s->weight, s->value + x * heads * kn->value_step, pl->strip, (int)(tokens * heads), (int)C, kn->lanes,
               zeros, s->out, NULL);
        for (int64_t c = 0; c < C; c++)
            for (int r = 0; r < n; r++) s->out[c * lanes + r] += pl->net->out_proj_bias[c];
        predictor_normalise(pl, s, n, s->window + first * C);
    }
}

/* Pools one half of a window, [w, C], to its mean or gated sum. */
static void predictor_pool(const predictor_plan *pl, predictor_scratch *s, const float *half, float *sum)
{
    const int64_t C = pl->C;
    float total = 0, top = -INFINITY;
    for (int64_t t = 0; t < pl->w; t++) {
        s->line[t] = pl->net->gate_weight ? pl->kernels->dot(pl->net->gate_weight, half + t * C, C) : 0.0f;
        top = s->line[t] > top ? s->line[t] : top;
    }
    for (int64_t t = 0; t < pl->w; t++) total += s->line[t] = expf(s->line[t] - top);
    for (int64_t t = 0; t < pl->w; t++) {
        const float p = s->line[t] / total;
        for (int64_t c = 0; c < C; c++) sum[c] = (t == 0 ? 0.0f : sum[c]) + p * half[t * C + c];
    }
}

/* Writes the features of one gap to row r of s->rows. */
static void fill_features(const predictor_plan *pl, predictor_scratch *s, const float *window, int64_t r)
{
    const int64_t C = pl->C;
    float *to = s->rows + r * (4 * C + 1), *left = to, *right = to + C;
    predictor_pool(pl, s, window, left);
    predictor_pool(pl, s, window + pl->w * C, right);
    for (int64_t c = 0; c < C; c++) {
        to[2 * C + c] = fabsf(left[c] - right[c]);
        to[3 * C + c] = left[c] * right[c];
    }
    const float l = sqrtf(pl->kernels->dot(left, left, C)), m = sqrtf(pl->kernels->dot(right, right, C));
    const float norms = (l < 1e-6f ? 1e-6f : l) * (m < 1e-6f ? 1e-6f : m); /* NaN stays NaN */
    to[4 * C] = pl->kernels->dot(left, right, C) / norms;
}

/* Applies the MLP to the n gaps whose features are in s->rows. */
static void predictor_classify(const predictor_plan *pl, predictor_scratch *s, int n, float *logits)
{
    const int64_t lanes = pl->kernels->lanes, hidden = pl->net->hidden, inputs = 4 * pl->C + 1;
    const void *rows[DHSA_MAX_LANES];
    for (int r = 0; r < n; r++) rows[r] = s->rows + r * inputs;
    pl->kernels->pack_panel(rows, DHSA_F32, n, (int)inputs, 1.0f, s->features);
    pl->kernels->qk(s->features, pl->net->mlp0_weight, inputs, (int)hidden, (int)inputs, pl->kernels->lanes, s->wide,
                    NULL);
    for (int r = 0; r < n; r++) logits[r] = pl->net->mlp2_bias;
    for (int64_t c = 0; c < hidden; c++)
        for (int r = 0; r < n; r++) {
            const float x = s->wide[c * lanes + r] + pl->net->mlp0_bias[c];
            logits[r] += (x < 0 ? 0.0f : x) * pl->net->mlp2_weight[c];
        }
}

static void predictor_tile_task(void *context, int64_t index, int thread)
{
    const predictor_plan *pl = context;
    const int64_t length = pl->k->shape[2], b = index / pl->tiles, lanes = pl->kernels->lanes;
    const int64_t first = pl->w - 1 + index % pl->tiles * pl->gaps, gaps = DHSA_MIN(pl->gaps, length - pl->w - first);
    const int64_t tokens = gaps + pl->width - 1;
    float *logits = pl->logits + b * length + first;
    predictor_scratch s;
    predictor_lay_out(pl, pl->arenas + thread * pl->arena_size, &s);
    /* The products read the columns beyond C of the last strip, so these must be finite. */
    if (pl->C % pl->kernels->value_step)
        memset(s.value, 0, (size_t)(dhsa_ceil_div(pl->C, pl->kernels->value_step) * pl->strip) * sizeof *s.value);
    for (int64_t at = 0; at < tokens; at += lanes)
        predictor_project(pl, &s, b, first - pl->w + 1, at, (int)DHSA_MIN(lanes, tokens - at));
    fill_band(pl, &s, tokens);
    int64_t lane = 0, done = 0;
    for (int64_t x = 0, count; x < gaps; x += count) {
        count = DHSA_MIN(pl->group, gaps - x);
        /* A weight of 0 times NaN is NaN. Next to a token that is not finite, windows are therefore computed one by
         * one. */
        for (int64_t t = x; t < x + count + pl->width - 1; t++)
            if (s.poison[t] != 0) count = 1;
        predictor_encode(pl, &s, x, count);
        for (int64_t g = 0; g < count; g++) {
            fill_features(pl, &s, s.window + g * pl->width * pl->C, lane++);
            if (lane == lanes || x + g == gaps - 1) {
                predictor_classify(pl, &s, (int)lane, logits + done);
                done += lane;
                lane = 0;
            }
        }
    }
}

dhsa_status dhsa_predictor_width(int64_t channels, const dhsa_tensor *k, dhsa_error *error)
{
    if (channels == k->shape[1] * k->shape[3]) return DHSA_OK;
    return dhsa_fail(
        error, DHSA_ERR_VALUE,
        "predictor: made for %" PRId64 " channels, but k has %" PRId64 " (%" PRId64 " heads of %" PRId64
        "); train one for this model: python -m dhsa train-boundaries --model MODEL --text FILES --out FILE",
        channels, k->shape[1] * k->shape[3], k->shape[1], k->shape[3]);
}

dhsa_status dhsa_predictor_check(const dhsa_predictor *p, dhsa_error *error)
{
    if (!p) return dhsa_fail(error, DHSA_ERR_VALUE, "predictor: none given");
    const void *const needed[] = {p->in_proj_weight, p->in_proj_bias, p->out_proj_weight,
                                  p->out_proj_bias,  p->norm_weight,  p->norm_bias,
                                  p->mlp0_weight,    p->mlp0_bias,    p->mlp2_weight};
    for (int i = 0; i < 9; i++)
        if (!needed[i]) return dhsa_fail(error, DHSA_ERR_VALUE, "predictor: weights are missing");
    if (p->channels < 1 || p->channels > 1 << 20 || p->hidden < 1 || p->hidden > 1 << 24)
        return dhsa_fail(error, DHSA_ERR_VALUE,
                         "predictor: %" PRId64 " channels and %" PRId64 " hidden units are not supported", p->channels,
                         p->hidden);
    if (p->heads < 1 || p->channels % p->heads)
        return dhsa_fail(error, DHSA_ERR_VALUE, "predictor: %" PRId64 " heads do not divide its %" PRId64 " channels",
                         p->heads, p->channels);
    if (p->window < 1)
        return dhsa_fail(error, DHSA_ERR_VALUE, "predictor: window is %" PRId64 ", expected at least 1", p->window);
    return DHSA_OK;
}

dhsa_status dhsa_predictor_logits(const dhsa_predictor *net, const dhsa_tensor *k, float *logits, int num_threads,
                                  dhsa_error *error)
{
    dhsa_status status;
    if ((status = dhsa_tensor_check(k, "k", error)) || (status = dhsa_threads_check(num_threads, error)) ||
        (status = dhsa_predictor_check(net, error)) || (status = dhsa_predictor_width(net->channels, k, error)) ||
        (status = dhsa_check_pointer(logits, "logits", error)))
        return status;
    return dhsa_predictor_logits_checked(net, k, logits, num_threads, error);
}

dhsa_status dhsa_predictor_logits_checked(const dhsa_predictor *net, const dhsa_tensor *k, float *logits,
                                          int num_threads, dhsa_error *error)
{
    const int64_t length = k->shape[2];
    for (int64_t i = 0; i < k->shape[0] * length; i++) logits[i] = -100.0f;
    if (net->window > length / 2) return DHSA_OK; /* no gap has a full window */
    predictor_plan pl = {.net = net,
                         .k = k,
                         .kernels = dhsa_kernels_for(dhsa_kernels_current(), DHSA_F32),
                         .C = net->channels,
                         .heads = net->heads,
                         .w = net->window};
    const int lanes = pl.kernels->lanes;
    const int64_t gaps = length - 2 * pl.w + 1;
    predictor_scratch unused;
    pl.width = 2 * pl.w;
    pl.tokens = DHSA_MIN(DHSA_MAX(dhsa_round_up(TILE_TOKENS, lanes), dhsa_round_up(4 * pl.width, lanes)), length);
    pl.gaps = pl.tokens - pl.width + 1;
    pl.tiles = dhsa_ceil_div(gaps, pl.gaps);
    pl.group = DHSA_MAX(1, lanes / pl.width);
    pl.strip = pl.tokens * pl.heads * pl.kernels->value_step;
    pl.logits = logits;
    int64_t most;
    /* The limits are far above what networks need, and low enough for the products in predictor_lay_out and for the int
     * arguments of kernels. */
    if (!dhsa_mul(pl.tokens * pl.heads, DHSA_MAX(pl.C, 4 * pl.w), &most) || most > (int64_t)1 << 36 ||
        (pl.width + pl.group) * pl.heads > 1 << 30)
        return dhsa_fail(error, DHSA_ERR_NO_MEMORY,
                         "predictor: a window of %" PRId64 " tokens on each side is too large", pl.w);
    pl.arena_size = predictor_lay_out(&pl, NULL, &unused);
    const int64_t tasks = k->shape[0] * pl.tiles;
    const int threads = (int)DHSA_MIN(tasks, num_threads);
    pl.arenas = dhsa_alloc(pl.arena_size, threads * (int64_t)sizeof *pl.arenas);
    if (!pl.arenas)
        return dhsa_fail(error, DHSA_ERR_NO_MEMORY, "predictor: no memory for %d workspaces of %" PRId64 " floats",
                         threads, pl.arena_size);
    dhsa_parallel(tasks, threads, predictor_tile_task, &pl);
    dhsa_free(pl.arenas);
    return DHSA_OK;
}
