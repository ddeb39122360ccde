/* row_scores.c: row scores, this project's scores of chunks. Each row is a mean query of a query block, or a query; it
 * has a softmax over the chunk means. The score of a chunk is the sum over rows of its squared probabilities; its
 * attention mass, where asked for, is the sum of the probabilities themselves. scorer.c finds the candidate chunks, and
 * methods/rows.c decides which groups of them are scored at all.
 *
 * The probabilities are powers of two that are linear between whole exponents (dhsa_powers), relative to the logarithm
 * of the denominator of their row. Where there are two stages, the coarse one, which sees all candidates, gives that
 * logarithm to the fine one, whose products are then used as soon as they are computed and never stored. */
#include <float.h>
#include <math.h>
#include <string.h>

#include "core/arena.h"
#include "select/scorer.h"

enum {
    TILE = 128,            /* chunks of a tile: its products stay in L1, its means in L2 for all panels */
    PANELS = 8,            /* the most panels that share a tile of means */
    PRODUCTS = 512 * 1024, /* the most bytes that stored products take, so that these stay in L2 */
};

/* A tile of the chunks of a block. Empty chunks and chunks without a finite mean are left out. */
typedef struct {
    int64_t row; /* its first row in the products */
    int n;
    int cut;             /* it holds only the cut chunk, whose mean is in row_scores_scratch.mean */
    int in_one_piece;    /* its chunks are consecutive */
    const char *means;   /* [n], in the layout of the products */
    const float *scale;  /* [n]: their factors */
    const int32_t *bias; /* [n], only for DHSA_MEANS_I8 */
    int32_t chunk[TILE]; /* [n]: chunk numbers, counted from the first chunk of the block */
} tile;

/* Scratch memory of one thread; pointers into its arena. */
typedef struct {
    tile *tiles;     /* of the current KV head, or one tile where they are not needed again */
    float *products; /* [panels at a time] of [product_rows, lanes], or of one tile */
    float *factor;   /* [panels, lanes]: of the rows, dhsa_powers.row */
    float *far;      /* [panels, lanes]: of the rows, dhsa_powers.row_spread */
    float *m, *l;    /* [panels, lanes]: references of the exponents of rows; sums, then logarithms of sums */
    float *score;    /* [TILE] */
    float *scale;    /* [TILE]: factors that cannot be used in place */
    float *unit;     /* [most]: the factors of all tiles of a KV head, where the tiles are needed again */
    float *spread;   /* [most]: their spreads, where chunks have any */
    int32_t *bias;   /* [TILE] */
    float *top;      /* [lanes]: largest products, which bf16->qk writes and nothing reads */
    float *mean;     /* [3, dim] */
    char *panel;     /* [panels] of packed rows */
    char *rows;      /* [lanes, row]: the rows before they are packed */
    char *tile;      /* [TILE] means that cannot be used in place in chunks.means */
} row_scores_scratch;

/* The number of tiles of whole chunks; the cut chunk is a tile of its own. Tiles begin at multiples of TILE, so the
 * first and the last may be short, or they are parts of job->live. */
static int64_t whole_tiles(const dhsa_block_job *job, int64_t whole)
{
    if (job->live) return dhsa_ceil_div(job->n_live, TILE);
    return whole ? dhsa_ceil_div(job->first % TILE + whole, TILE) : 0;
}

/* The most chunks that take part, not counting the cut one. */
static int64_t live(const dhsa_block_job *job) { return job->live ? job->n_live : job->n; }

static int64_t product_rows(int64_t chunks) { return dhsa_round_up(chunks + TILE - 1, TILE) + DHSA_PAIR_STEP; }

static int64_t max_tiles(const dhsa_scorer *s) { return dhsa_ceil_div(s->most + TILE - 1, TILE) + 1; }

/* The bytes of a packed panel. Bytes are packed by fours and pairs by DHSA_PAIR_STEP, as the rows of means are. */
static int64_t panel_bytes(const dhsa_scorer *s)
{
    const int64_t row = s->chunks.row;
    return s->kernels->lanes * (s->bytes ? row * s->bytes->size : s->bf16 ? row * 2 : s->q->shape[3] * 4);
}

/* Bytes of one mean in the layout of the products. */
static int64_t mean_bytes(const dhsa_scorer *s)
{
    return s->chunks.row * (s->bytes ? s->bytes->size : s->bf16 ? 2 : 4);
}

/* Whether the products take means in another type than they are stored in: bytes as 16 bits, bf16 as fp32. */
static int converts_means(const dhsa_scorer *s)
{
    return mean_bytes(s) != s->chunks.row * dhsa_means_size(s->chunks.kind);
}

/* Copies a mean that is not in squares from where it is stored to where the products take it. */
static void take_mean(const dhsa_scorer *s, const void *from, void *to)
{
    const int64_t row = s->chunks.row;
    if (!converts_means(s))
        memcpy(to, from, (size_t)mean_bytes(s));
    else if (s->bytes)
        for (int64_t d = 0; d < row; d++) ((int16_t *)to)[d] = ((const int8_t *)from)[d];
    else
        s->kernels->load(from, DHSA_BF16, row, to);
}

/* How many panels are worked on at a time if the products of this many chunks are stored. */
static int panels_at_once(const dhsa_scorer *s, int64_t chunks)
{
    const int64_t fit = PRODUCTS / (product_rows(chunks) * s->kernels->lanes * 4);
    return (int)DHSA_MIN(DHSA_MAX(fit, 1), s->panels);
}

/* Returns the bytes that an arena needs; with base NULL it does nothing else. */
static int64_t row_scores_lay_out(const dhsa_scorer *s, char *base, row_scores_scratch *w)
{
    const int64_t lanes = s->kernels->lanes, dim = s->q->shape[3], panels = s->panels;
    const struct {
        void *to;
        int64_t bytes;
    } parts[] = {
        {&w->mean, 3 * dim * 4}, /* comes first: dhsa_chunks_fill uses this memory too */
        /* The packed rows are at the same place for both stages, which differ in `most` only. */
        {&w->panel, panels * panel_bytes(s)},
        {&w->factor, panels * lanes * 4},
        {&w->far, panels * lanes * 4},
        {&w->products,
         DHSA_MIN(DHSA_MAX(PRODUCTS, product_rows(s->most) * lanes * 4), panels * product_rows(s->most) * lanes * 4)},
        {&w->tiles, max_tiles(s) * (int64_t)sizeof *w->tiles},
        {&w->m, panels * lanes * 4},
        {&w->l, panels * lanes * 4},
        {&w->score, TILE * 4},
        {&w->scale, TILE * 4},
        {&w->unit, product_rows(s->most) * 4},
        {&w->spread, s->chunks.spreads ? product_rows(s->most) * 4 : 0},
        {&w->bias, TILE * 4},
        {&w->top, lanes * 4},
        {&w->rows, lanes * DHSA_MAX(s->chunks.row * dhsa_means_size(s->chunks.kind), dim * 4)},
        {&w->tile, TILE * mean_bytes(s)},
    };
    int64_t at = 0;
    for (size_t i = 0; i < sizeof parts / sizeof *parts; i++) {
        void *here = dhsa_part(base, &at, parts[i].bytes);
        memcpy(parts[i].to, &here, sizeof here);
    }
    return at;
}

int64_t dhsa_row_scores_rows(const dhsa_scorer *s)
{
    return dhsa_ceil_div(DHSA_MIN(s->config->query_block, s->q->shape[2]), s->step) * s->heads_per_kv;
}

int64_t dhsa_row_scores_plan(dhsa_scorer *s)
{
    row_scores_scratch unused;
    s->step = dhsa_ceil_div(s->config->query_block, s->config->mean_queries);
    s->panels = (int)DHSA_MIN(PANELS, dhsa_ceil_div(dhsa_row_scores_rows(s), s->kernels->lanes));
    return row_scores_lay_out(s, NULL, &unused);
}

/* Prefetches the queries of the mean query that begins at `from`. Rows of several heads alternate, an order that the
 * hardware does not prefetch by itself. */
static void prefetch_queries(const dhsa_scorer *s, int64_t h, int64_t from, int64_t to)
{
    const int64_t bytes = s->q->shape[3] * dhsa_dtype_size(s->q->dtype);
    for (int64_t i = from; i < DHSA_MIN(from + DHSA_MIN(s->step, 8), to); i++)
        for (int64_t byte = 0; byte < bytes; byte += 64)
            __builtin_prefetch((const char *)dhsa_row(s->q, s->b, h, i) + byte);
}

/* Packs mean queries [at, at + n) of a KV head into a panel, and writes their factors. A row that is not finite gets
 * the factor NaN. */
static void pack_rows(const dhsa_scorer *s, const dhsa_block_job *job, int64_t kv_head, int64_t at, int n,
                      row_scores_scratch *w, int panel)
{
    const dhsa_means_kind kind = s->chunks.kind;
    const int64_t dim = s->q->shape[3], bytes = s->chunks.row * dhsa_means_size(kind), lanes = s->kernels->lanes,
                  head = s->config->heads == DHSA_HEADS_HEAD ? job->set : kv_head * s->heads_per_kv;
    const double softcap = s->config->softcap, log2e = 1.4426950408889634;
    const double unit = softcap > 0 ? s->config->scale / softcap : s->config->scale * log2e;
    const void *rows[DHSA_MAX_LANES];
    float *factor = w->factor + panel * lanes, *far = w->far + panel * lanes;
    for (int r = 0; r < lanes; r++) factor[r] = far[r] = 0;
    for (int r = 0; r < n; r++) {
        const int64_t from = job->from + (at + r) / s->heads_per_kv * s->step;
        float scale = 1;
        int32_t bias;
        prefetch_queries(s, head + (at + r) % s->heads_per_kv, from + s->step, job->to);
        dhsa_mean_query(s->kernels, s->q, s->b, head + (at + r) % s->heads_per_kv, from,
                        DHSA_MIN(from + s->step, job->to), 1.0f, w->mean);
        rows[r] = w->rows + r * bytes;
        const int finite = dhsa_all_finite(s->kernels, w->mean, dim);
        if (!finite) memset(w->mean, 0, (size_t)dim * sizeof *w->mean);
        far[r] = (float)(s->kernels->dot(w->mean, w->mean, dim) * s->config->scale * s->config->scale * log2e);
        dhsa_mean_store(s->kernels, kind, w->mean, dim, s->chunks.row, w->rows + r * bytes, &scale, &bias);
        factor[r] = finite ? (float)(scale * unit) : NAN;
    }
    char *to = w->panel + panel * panel_bytes(s);
    if (s->bytes)
        s->bytes->pack_panel((const int8_t *const *)rows, n, (int)dim, to);
    else if (s->bf16)
        s->bf16->pack_panel(rows, n, (int)dim, 0, (uint16_t *)to);
    else
        s->kernels->pack_panel(rows, kind == DHSA_MEANS_F32 ? DHSA_F32 : DHSA_BF16, n, (int)dim, 1.0f, (float *)to);
}

/* Finds the chunks of tile `index`. cut: the state of the cut chunk, if there is one. */
static void find_tile(const dhsa_scorer *s, const dhsa_block_job *job, int64_t kv_head, int64_t index,
                      unsigned char cut, tile *t)
{
    const int64_t whole = job->n - (job->cut_end != 0), base = job->first % TILE, tiles = whole_tiles(job, whole);
    const unsigned char *state = s->chunks.state + kv_head * s->chunks.pitch + job->first;
    t->row = index * TILE;
    t->n = 0;
    t->cut = index == tiles;
    if (t->cut) {
        t->chunk[0] = (int32_t)whole;
        t->n = cut == DHSA_CHUNK_GOOD;
    } else if (job->live) {
        const int32_t *lives = job->live + index * TILE, first = (int32_t)job->first;
        const int n = (int)DHSA_MIN(TILE, job->n_live - index * TILE);
        for (int i = 0; i < n; i++) t->chunk[i] = lives[i] - first;
        t->n = n;
        if (s->chunks.odd) {
            t->n = 0;
            for (int i = 0; i < n; i++)
                if (state[t->chunk[i]] == DHSA_CHUNK_GOOD) t->chunk[t->n++] = t->chunk[i];
        }
    } else {
        for (int64_t c = DHSA_MAX(index * TILE - base, 0); c < DHSA_MIN((index + 1) * TILE - base, whole); c++)
            if (state[c] == DHSA_CHUNK_GOOD) t->chunk[t->n++] = (int32_t)c;
    }
    t->in_one_piece = t->n > 0 && t->chunk[t->n - 1] - t->chunk[0] == t->n - 1;
}

/* The number of consecutive chunks of a tile from entry i on. */
static int run_length(const tile *t, int i)
{
    int n = 1;
    while (i + n < t->n && t->chunk[i + n] - t->chunk[i] == n) n++;
    return n;
}

/* Copies the means of a tile whose chunks are not consecutive; runs of means, or whole squares, are copied at once. */
static void gather_means(const dhsa_scorer *s, int64_t at, const tile *t, char *to)
{
    const int64_t row = s->chunks.row, size = dhsa_means_size(s->chunks.kind);
    const char *means = s->chunks.means;
    for (int i = 0, run; i < t->n; i += run) {
        const int64_t c = at + t->chunk[i];
        run = 1;
        if (!s->chunks.squares && converts_means(s)) {
            take_mean(s, means + c * row * size, to + i * mean_bytes(s));
            continue;
        }
        if (!s->chunks.squares) {
            run = run_length(t, i);
            memcpy(to + i * mean_bytes(s), means + c * row * size, (size_t)(run * mean_bytes(s)));
            continue;
        }
        if (c % 16 == 0 && i % 16 == 0 && i + 16 <= t->n && t->chunk[i + 15] - t->chunk[i] == 15) {
            run = 16;
            memcpy(to + i * row * 2, means + c * row * 2, (size_t)row * 32);
            continue;
        }
        for (int64_t d = 0; d < row; d += DHSA_PAIR_STEP)
            memcpy(to + dhsa_square(i, d, row) * 2, means + dhsa_square(c, d, row) * 2, DHSA_PAIR_STEP * 2);
    }
}

/* Stores the mean of the cut chunk as the only one of a tile. */
static void load_cut(const dhsa_scorer *s, row_scores_scratch *w)
{
    const int64_t dim = s->q->shape[3];
    uint16_t narrow[DHSA_MAX_HEAD_DIM + DHSA_PAIR_STEP];
    w->scale[0] = 1;
    if (converts_means(s)) {
        dhsa_mean_store(s->kernels, s->chunks.kind, w->mean, dim, s->chunks.row, narrow, w->scale, w->bias);
        take_mean(s, narrow, w->tile);
    } else {
        dhsa_mean_put(s->kernels, &s->chunks, w->mean, dim, w->tile, w->scale, w->bias, 0);
    }
}

/* Sets t->means, t->scale and t->bias: in place in s->chunks, or copied to w. */
static void load_tile(const dhsa_scorer *s, const dhsa_block_job *job, int64_t kv_head, row_scores_scratch *w, tile *t)
{
    const dhsa_chunks *c = &s->chunks;
    const int64_t at = kv_head * c->pitch + job->first;
    t->means = w->tile;
    t->scale = w->scale;
    t->bias = w->bias;
    if (t->cut) {
        load_cut(s, w);
    } else if (t->in_one_piece && !converts_means(s) && (!c->squares || (at + t->chunk[0]) % 16 == 0)) {
        t->means = (const char *)c->means + (at + t->chunk[0]) * c->row * dhsa_means_size(c->kind);
        if (c->scale) t->scale = c->scale + at + t->chunk[0];
        if (c->bias) t->bias = c->bias + at + t->chunk[0];
    } else {
        gather_means(s, at, t, w->tile);
        const int n = t->n;
        if (c->scale)
            for (int i = 0; i < n; i++) w->scale[i] = c->scale[at + t->chunk[i]];
        if (c->bias)
            for (int i = 0; i < n; i++) w->bias[i] = c->bias[at + t->chunk[i]];
    }
    for (int i = 0; !c->scale && i < t->n; i++) w->scale[i] = 1;
}

static void multiply(const dhsa_scorer *s, const tile *t, int panel, int used, row_scores_scratch *w, float *products,
                     dhsa_ahead *ahead)
{
    const int dim = (int)s->q->shape[3];
    const void *rows = w->panel + panel * panel_bytes(s);
    if (s->bytes)
        s->bytes->qk(rows, t->means, t->bias, t->n, dim, used, products, ahead);
    else if (s->bf16)
        s->bf16->qk(rows, (const uint16_t *)t->means, t->n, dim, products, w->top, ahead);
    else
        s->kernels->qk(rows, (const float *)t->means, s->chunks.row, t->n, dim, used, products, ahead);
}

/* Returns what the products of tile t prefetch: the means of the next tile, or nothing if they are not consecutive. */
static dhsa_ahead row_scores_look_ahead(const dhsa_scorer *s, const dhsa_block_job *job, int64_t kv_head, const tile *t,
                                        int panels, const char **next)
{
    const int64_t first = t->chunk[t->n - 1] + 1, n = job->live || t->cut ? 0 : DHSA_MIN(TILE, job->n - first);
    const int64_t bytes = s->chunks.row * dhsa_means_size(s->chunks.kind);
    *next = (const char *)s->chunks.means + (kv_head * s->chunks.pitch + job->first + first) * bytes;
    dhsa_ahead ahead = {.row = next, .end = next + (n > 0), .bytes = (int)(n * bytes)};
    ahead.rate = dhsa_ceil_div(dhsa_ceil_div(n * bytes, 64) << 20, (int64_t)panels * t->n * s->q->shape[3]);
    return ahead;
}

/* The number of keys of a chunk, up to where the block cuts it. */
static float length_of(const dhsa_scorer *s, const dhsa_block_job *job, int64_t chunk)
{
    const int32_t *edges = s->chunks.edges + job->first + chunk;
    return (float)((job->cut_end && chunk == job->n - 1 ? job->cut_end : edges[1]) - edges[0]);
}

/* spread: NULL, or [n]. */
static dhsa_powers powers_of(const dhsa_scorer *s, const row_scores_scratch *w, const float *key, const float *spread,
                             int panel)
{
    const double log2e = 1.4426950408889634;
    const int64_t at = panel * s->kernels->lanes;
    return (dhsa_powers){key, w->factor + at, (float)(s->config->softcap * log2e), spread, w->far + at};
}

/* The spreads of a tile, in place or copied to w->spread; NULL where chunks have none, as has the cut one. */
static const float *spreads_of(const dhsa_scorer *s, const dhsa_block_job *job, int64_t kv_head, const tile *t,
                               row_scores_scratch *w)
{
    const float *spread = s->chunks.spread + kv_head * s->chunks.pitch + job->first;
    if (!s->chunks.spreads || t->cut) return NULL;
    if (t->in_one_piece) return spread + t->chunk[0];
    for (int i = 0; i < t->n; i++) w->spread[t->row + i] = spread[t->chunk[i]];
    return w->spread + t->row;
}

/* Adds the squared probabilities of a tile to score, and the probabilities to mass unless it is NULL. */
static void add_tile(const dhsa_scorer *s, const tile *t, const float *products, int used, const dhsa_powers *powers,
                     const float *shift, row_scores_scratch *w, float *score, float *mass)
{
    for (int degree = 2; degree > (mass == NULL); degree--) {
        float *to = degree == 2 ? score : mass;
        if (t->in_one_piece) {
            s->kernels->power_scores(products, t->n, used, powers, degree, shift, to + t->chunk[0]);
            continue;
        }
        memset(w->score, 0, (size_t)t->n * sizeof *w->score);
        s->kernels->power_scores(products, t->n, used, powers, degree, shift, w->score);
        for (int i = 0; i < t->n; i++) to[t->chunk[i]] += w->score[i];
    }
}

/* The rows of a KV head that are worked on at a time: `panels` panels from row `at` on, of `rows` in all. */
typedef struct {
    int64_t kv_head, at, rows, tiles;
    int panels;
    unsigned char cut; /* state of the cut chunk */
} rows_at_once;

static int used_lanes(const dhsa_scorer *s, const rows_at_once *r, int panel)
{
    return (int)DHSA_MIN(s->kernels->lanes, r->rows - r->at - panel * s->kernels->lanes);
}

/* Whether power() of exponents above a row's reference may have been cut. */
static int has_overflown(float sum) { return sum >= 0x1p60f; }

/* A row that does not count gets the logarithm +inf, so that its probabilities are 0: one that is not finite, or that
 * has a logit that is not. */
static float log_of_sum(float reference, float sum, float factor)
{
    return isfinite(reference) && sum > 0 && !has_overflown(sum) && !isnan(factor) ? reference + log2f(sum) : INFINITY;
}

/* Stores the products of a tile, which is not empty. */
static void store_products(const dhsa_scorer *s, const dhsa_block_job *job, const rows_at_once *r,
                           row_scores_scratch *w, tile *t, int64_t pitch)
{
    const char *next;
    dhsa_ahead ahead = row_scores_look_ahead(s, job, r->kv_head, t, r->panels, &next);
    load_tile(s, job, r->kv_head, w, t);
    memcpy(w->unit + t->row, t->scale, (size_t)t->n * sizeof *w->unit);
    for (int p = 0; p < r->panels; p++)
        multiply(s, t, p, used_lanes(s, r, p), w, w->products + p * pitch + t->row * s->kernels->lanes, &ahead);
}

static void find_tops(const dhsa_scorer *s, const rows_at_once *r, row_scores_scratch *w, const tile *t, int64_t pitch)
{
    const int64_t lanes = s->kernels->lanes;
    for (int p = 0; p < r->panels && t->n > 0; p++) {
        const dhsa_powers powers = powers_of(s, w, w->unit + t->row, NULL, p);
        s->kernels->power_tops(w->products + p * pitch + t->row * lanes, t->n, used_lanes(s, r, p), &powers,
                               w->m + p * lanes);
    }
}

static void add_sums_of(const dhsa_scorer *s, const dhsa_block_job *job, const rows_at_once *r, row_scores_scratch *w,
                        const tile *t, int64_t pitch)
{
    const int64_t lanes = s->kernels->lanes;
    if (t->in_one_piece && !t->cut) {
        const int32_t *restrict edges = s->chunks.edges + job->first + t->chunk[0];
        float *restrict length = w->score;
        for (int i = 0, n = t->n; i < n; i++) length[i] = (float)(edges[i + 1] - edges[i]);
    } else {
        for (int i = 0; i < t->n; i++) w->score[i] = length_of(s, job, t->chunk[i]);
    }
    for (int p = 0; p < r->panels && t->n > 0; p++) {
        const dhsa_powers powers = powers_of(s, w, w->unit + t->row, NULL, p);
        s->kernels->power_sums(w->products + p * pitch + t->row * lanes, t->n, used_lanes(s, r, p), &powers, w->score,
                               w->m + p * lanes, w->l + p * lanes);
    }
}

/* Makes whole numbers of the references: power() of exponents relative to such a number is an exact multiple of
 * power() of the exponents themselves, so that any reference gives the same logarithms. Clears the sums. */
static void begin_sums(row_scores_scratch *w, int64_t rows)
{
    for (int64_t i = 0; i < rows; i++) {
        w->m[i] = floorf(w->m[i]);
        w->l[i] = 0;
    }
}

/* Computes the logarithms of the denominators of rows from products that are stored, then adds the probabilities. */
static void score_stored(const dhsa_scorer *s, const dhsa_block_job *job, const rows_at_once *r, row_scores_scratch *w,
                         float *score, float *mass)
{
    const int64_t lanes = s->kernels->lanes, pitch = product_rows(live(job)) * lanes, last = r->tiles - 1;
    int exact = 1;
    for (int64_t i = 0; i < r->panels * lanes; i++) w->m[i] = -INFINITY;
    for (int64_t index = 0; index < r->tiles && r->at == 0; index++)
        find_tile(s, job, r->kv_head, index, r->cut, w->tiles + index);
    /* The first keys and those near the queries have large logits, and power() has a wide range, so that the reference
     * is taken from them. */
    for (int64_t index = 0; index < r->tiles; index += DHSA_MAX(last, 1))
        if (w->tiles[index].n > 0) {
            store_products(s, job, r, w, w->tiles + index, pitch);
            find_tops(s, r, w, w->tiles + index, pitch);
        }
    begin_sums(w, r->panels * lanes);
    for (int64_t index = 0; index < r->tiles; index++) {
        tile *t = w->tiles + index;
        if (t->n == 0) continue;
        if (index > 0 && index < last) store_products(s, job, r, w, t, pitch);
        add_sums_of(s, job, r, w, t, pitch);
    }
    for (int64_t i = 0; i < DHSA_MIN(r->panels * lanes, r->rows - r->at); i++)
        exact &= isfinite(w->m[i]) && w->l[i] > 0 && !has_overflown(w->l[i]);
    if (!exact) { /* the largest exponents themselves are needed */
        for (int64_t index = 0; index < r->tiles; index++) find_tops(s, r, w, w->tiles + index, pitch);
        begin_sums(w, r->panels * lanes);
        for (int64_t index = 0; index < r->tiles; index++) add_sums_of(s, job, r, w, w->tiles + index, pitch);
    }
    for (int64_t i = 0; i < r->panels * lanes; i++)
        w->l[i] = i < r->rows - r->at ? log_of_sum(w->m[i], w->l[i], w->factor[i]) : INFINITY;
    for (int64_t index = 0; index < r->tiles; index++) {
        const tile *t = w->tiles + index;
        if (t->n == 0) continue;
        const float *spread = spreads_of(s, job, r->kv_head, t, w);
        for (int p = 0; p < r->panels; p++) {
            const dhsa_powers powers = powers_of(s, w, w->unit + t->row, spread, p);
            add_tile(s, t, w->products + p * pitch + t->row * lanes, used_lanes(s, r, p), &powers, w->l + p * lanes, w,
                     score, mass);
        }
    }
}

/* The same where the logarithms are given, in w->l. */
static void score_at_once(const dhsa_scorer *s, const dhsa_block_job *job, const rows_at_once *r, row_scores_scratch *w,
                          float *score, float *mass)
{
    const int64_t lanes = s->kernels->lanes;
    for (int64_t index = 0; index < r->tiles; index++) {
        tile *t = w->tiles;
        find_tile(s, job, r->kv_head, index, r->cut, t);
        if (t->n == 0) continue;
        load_tile(s, job, r->kv_head, w, t);
        const char *next;
        dhsa_ahead ahead = row_scores_look_ahead(s, job, r->kv_head, t, r->panels, &next);
        for (int p = 0; p < r->panels; p++) {
            const dhsa_powers powers = powers_of(s, w, t->scale, NULL, p);
            multiply(s, t, p, used_lanes(s, r, p), w, w->products, &ahead);
            add_tile(s, t, w->products, used_lanes(s, r, p), &powers, w->l + p * lanes, w, score, mass);
        }
    }
}

/* Adds the squared probabilities of one KV head to score [n], and the probabilities to mass. Returns the state of its
 * last chunk, up to where the block cuts it. logs: job->logs of this KV head. */
static unsigned char score_kv_head(const dhsa_scorer *s, const dhsa_block_job *job, int64_t kv_head,
                                   row_scores_scratch *w, float *logs, float *score, float *mass)
{
    const dhsa_kernels *kn = s->kernels;
    const int64_t lanes = kn->lanes, n = job->n;
    rows_at_once r = {.kv_head = kv_head, .cut = DHSA_CHUNK_GOOD};
    r.rows = dhsa_ceil_div(job->to - job->from, s->step) * s->heads_per_kv;
    r.tiles = whole_tiles(job, n - (job->cut_end != 0)) + (job->cut_end != 0);
    const int most = job->logs_given ? s->panels : panels_at_once(s, live(job));
    const int packed = job->logs_given && *job->rows_packed;
    if (job->logs && !job->logs_given) *job->rows_packed = s->kv_per_set == 1 && r.rows <= most * lanes;
    for (; r.at < r.rows; r.at += most * lanes) {
        r.panels = (int)DHSA_MIN(most, dhsa_ceil_div(r.rows - r.at, lanes));
        for (int p = 0; p < r.panels && !packed; p++)
            pack_rows(s, job, kv_head, r.at + p * lanes, used_lanes(s, &r, p), w, p);
        if (job->cut_end) {
            const int64_t from = s->chunks.edges[job->first + n - 1];
            const int finite =
                dhsa_chunk_mean(kn, s->k, s->b, kv_head, from, job->cut_end, w->mean, w->mean + s->q->shape[3]);
            r.cut = finite ? DHSA_CHUNK_GOOD : DHSA_CHUNK_BAD;
        }
        const int64_t here = DHSA_MIN(r.panels * lanes, r.rows - r.at);
        if (job->logs_given) {
            memcpy(w->l, logs + r.at, (size_t)here * sizeof *logs);
            for (int64_t i = here; i < r.panels * lanes; i++) w->l[i] = INFINITY;
            score_at_once(s, job, &r, w, score, mass);
        } else {
            score_stored(s, job, &r, w, score, mass);
            if (logs) memcpy(logs + r.at, w->l, (size_t)here * sizeof *logs);
        }
    }
    return job->cut_end ? r.cut : s->chunks.state[kv_head * s->chunks.pitch + job->first + n - 1];
}

unsigned char dhsa_row_scores(const dhsa_scorer *s, const dhsa_block_job *job, int64_t kv, char *arena, float *score,
                              float *mass)
{
    unsigned char last = DHSA_CHUNK_GOOD;
    row_scores_scratch w;
    row_scores_lay_out(s, arena, &w);
    if (job->live)
        for (int64_t i = 0; i < job->n_live; i++) score[job->live[i] - job->first] = 0;
    else
        memset(score, 0, (size_t)job->n * sizeof *score);
    if (job->cut_end) score[job->n - 1] = 0;
    for (int64_t c = 0; mass && c < job->n; c++) mass[c] = 0;
    if (s->bf16) s->bf16->begin();
    for (int64_t h = kv; h < kv + s->kv_per_set; h++) {
        float *logs = job->logs ? job->logs + (h - kv) * dhsa_row_scores_rows(s) : NULL;
        const unsigned char state = score_kv_head(s, job, h, &w, logs, score, mass);
        last = DHSA_MAX(last, state);
    }
    if (s->bf16) s->bf16->end();
    for (int64_t c = 0; mass && c < job->n; c++) mass[c] *= length_of(s, job, c);
    return last;
}
