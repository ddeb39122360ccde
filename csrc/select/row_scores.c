/* row_scores.c: row scores, this project's scores of chunks. Each row is a mean query of a query block; it has a
 * softmax over the chunk means. The score of a chunk is the sum over rows of its squared probabilities; its attention
 * mass, where asked for, is the sum of the probabilities themselves. scorer.c finds the candidate chunks, and
 * methods/rows.c decides which groups of them are scored at all. */
#include <float.h>
#include <math.h>
#include <string.h>

#include "core/arena.h"
#include "select/scorer.h"

enum {
    TILE = 128, /* chunks of a tile: its products stay in L1 through the softmax, its means in L2 for all panels */
    PANELS = 8, /* the most panels that share a tile of means */
    PRODUCTS = 1024 * 1024, /* the most bytes that their probabilities take, so that these stay in L2 */
};

/* A tile of the chunks of a block. Empty chunks and chunks without a finite mean are left out. */
typedef struct {
    int64_t row; /* its first row in the products */
    int n;
    int cut;             /* it holds only the cut chunk, whose mean is in row_scores_scratch.mean */
    int in_one_piece;    /* its chunks are consecutive */
    const char *means;   /* [n], in the layout of the products */
    int32_t chunk[TILE]; /* [n]: chunk numbers, counted from the first chunk of the block */
} tile;

/* Scratch memory of one thread; pointers into its arena. */
typedef struct {
    tile *tiles;     /* of the current KV head */
    float *products; /* [panels at a time] of [product_rows, lanes] */
    float *alpha;    /* [panels] of [tiles, lanes]: the factor by which a tile's softmax rescales earlier tiles */
    float *m, *l;    /* [panels, lanes] */
    float *weight;   /* [lanes] */
    float *score;    /* [TILE] */
    float *top;      /* [lanes]: largest products, which bf16->qk writes and nothing reads */
    float *mean;     /* [2, dim] */
    char *panel;     /* [panels] of packed rows, in fp32 or bf16 */
    char *rows;      /* [lanes, dim]: the rows before they are packed */
    char *tile;      /* [TILE] means that cannot be used in place in chunks.means */
} row_scores_scratch;

/* The number of tiles of whole chunks; the cut chunk is a tile of its own. Tiles begin at multiples of TILE, so the
 * first and the last may be short. With a shortlist, each holds TILE / DHSA_CHUNK_GROUP groups of it. */
static int64_t whole_tiles(const dhsa_block_job *job, int64_t whole)
{
    if (job->groups) return dhsa_ceil_div(job->n_groups, TILE / DHSA_CHUNK_GROUP);
    return whole ? dhsa_ceil_div(job->first % TILE + whole, TILE) : 0;
}

/* The most chunks that take part, not counting the cut one. */
static int64_t live(const dhsa_block_job *job) { return job->groups ? job->n_groups * DHSA_CHUNK_GROUP : job->n; }

static int64_t product_rows(int64_t chunks) { return dhsa_round_up(chunks + TILE - 1, TILE) + DHSA_PAIR_STEP; }

static int64_t max_tiles(const dhsa_scorer *s) { return dhsa_ceil_div(s->most + TILE - 1, TILE) + 1; }

static int64_t panel_bytes(const dhsa_scorer *s)
{
    return s->kernels->lanes * (s->bf16 ? s->chunks.row * 2 : s->q->shape[3] * 4);
}

/* Bytes of one mean in the layout of the products. */
static int64_t mean_bytes(const dhsa_scorer *s) { return s->chunks.row * (s->bf16 ? 2 : 4); }

/* How many panels are worked on at a time against this many chunks. */
static int panels_at_once(const dhsa_scorer *s, int64_t chunks)
{
    const int64_t fit = PRODUCTS / (product_rows(chunks) * s->kernels->lanes * 4);
    return (int)DHSA_MIN(DHSA_MAX(fit, 1), s->panels);
}

/* Returns the bytes that an arena needs; with base NULL it does nothing else. */
static int64_t row_scores_lay_out(const dhsa_scorer *s, char *base, row_scores_scratch *w)
{
    const int64_t lanes = s->kernels->lanes, dim = s->q->shape[3], panels = s->panels;
    const int64_t rows = lanes * dim * (s->chunks.kind == DHSA_MEANS_F32 ? 4 : 2);
    const struct {
        void *to;
        int64_t bytes;
    } parts[] = {
        {&w->mean, 2 * dim * 4}, /* comes first: dhsa_chunks_fill uses this memory too */
        {&w->products,
         DHSA_MIN(DHSA_MAX(PRODUCTS, product_rows(s->most) * lanes * 4), panels * product_rows(s->most) * lanes * 4)},
        {&w->tiles, max_tiles(s) * (int64_t)sizeof *w->tiles},
        {&w->alpha, panels * max_tiles(s) * lanes * 4},
        {&w->m, panels * lanes * 4},
        {&w->l, panels * lanes * 4},
        {&w->weight, lanes * 4},
        {&w->score, TILE * 4},
        {&w->top, lanes * 4},
        {&w->panel, panels * panel_bytes(s)},
        {&w->rows, rows},
        {&w->tile, TILE * mean_bytes(s)},
    };
    int64_t at = 0;
    for (size_t i = 0; i < sizeof parts / sizeof *parts; i++) {
        void *here = dhsa_part(base, &at, parts[i].bytes);
        memcpy(parts[i].to, &here, sizeof here);
    }
    return at;
}

int64_t dhsa_row_scores_plan(dhsa_scorer *s)
{
    const dhsa_score_config *c = s->config;
    const int64_t lanes = s->kernels->lanes;
    row_scores_scratch unused;
    s->step = dhsa_ceil_div(c->query_block, c->mean_queries);
    const int64_t rows = dhsa_ceil_div(DHSA_MIN(c->query_block, s->q->shape[2]), s->step) * s->heads_per_kv;
    s->panels = (int)DHSA_MIN(PANELS, dhsa_ceil_div(rows, lanes));
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

/* Packs mean queries [at, at + n) of a KV head into a panel. */
static void pack_rows(const dhsa_scorer *s, const dhsa_block_job *job, int64_t kv_head, int64_t at, int n,
                      row_scores_scratch *w, int panel)
{
    const dhsa_means_kind kind = s->chunks.kind;
    const int64_t dim = s->q->shape[3],
                  head = s->config->heads == DHSA_HEADS_HEAD ? job->set : kv_head * s->heads_per_kv;
    const int64_t bytes = dim * (kind == DHSA_MEANS_F32 ? 4 : 2);
    /* The rows are multiplied by the sign of the scale, so that the largest product is the largest logit. */
    const float sign = s->config->scale < 0 ? -1.0f : s->config->scale > 0 ? 1.0f : 0.0f;
    const void *rows[DHSA_MAX_LANES];
    for (int r = 0; r < n; r++) {
        const int64_t from = job->from + (at + r) / s->heads_per_kv * s->step;
        prefetch_queries(s, head + (at + r) % s->heads_per_kv, from + s->step, job->to);
        dhsa_mean_query(s->kernels, s->q, s->b, head + (at + r) % s->heads_per_kv, from,
                        DHSA_MIN(from + s->step, job->to), sign, w->mean);
        /* All products of such a row are infinite or NaN, but a softcap would make infinite ones finite. With a NaN the
         * row does not count. */
        if (!dhsa_all_finite(s->kernels, w->mean, dim)) w->mean[0] = NAN;
        rows[r] = w->rows + r * bytes;
        dhsa_mean_store(s->kernels, kind, w->mean, dim, dim, w->rows + r * bytes);
    }
    char *to = w->panel + panel * panel_bytes(s);
    if (s->bf16)
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
    } else if (job->groups) {
        const int64_t first = index * (TILE / DHSA_CHUNK_GROUP),
                      last = DHSA_MIN(first + TILE / DHSA_CHUNK_GROUP, job->n_groups);
        for (int64_t g = first; g < last; g++) {
            const int64_t from = job->groups[g] * DHSA_CHUNK_GROUP - job->first;
            for (int64_t c = DHSA_MAX(from, 0); c < DHSA_MIN(from + DHSA_CHUNK_GROUP, whole); c++)
                if (state[c] == DHSA_CHUNK_GOOD) t->chunk[t->n++] = (int32_t)c;
        }
    } else {
        for (int64_t c = DHSA_MAX(index * TILE - base, 0); c < DHSA_MIN((index + 1) * TILE - base, whole); c++)
            if (state[c] == DHSA_CHUNK_GOOD) t->chunk[t->n++] = (int32_t)c;
    }
    t->in_one_piece = t->n > 0 && t->chunk[t->n - 1] - t->chunk[0] == t->n - 1;
}

/* Copies the means of a tile whose chunks are not consecutive; whole squares are copied at once. */
static void gather_means(const dhsa_scorer *s, int64_t at, const tile *t, char *to)
{
    const int64_t row = s->chunks.row;
    const char *means = s->chunks.means;
    for (int i = 0, run; i < t->n; i += run) {
        const int64_t c = at + t->chunk[i];
        run = 1;
        if (!s->chunks.squares) {
            if (s->chunks.kind == DHSA_MEANS_F32)
                memcpy((float *)to + i * row, (const float *)means + c * row, (size_t)row * sizeof(float));
            else
                s->kernels->load(means + c * row * 2, DHSA_BF16, row, (float *)to + i * row);
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

/* Sets t->means to the means of a tile in the layout of the products: in place in chunks.means, or copied to
 * w->tile. */
static void load_tile(const dhsa_scorer *s, const dhsa_block_job *job, int64_t kv_head, row_scores_scratch *w, tile *t)
{
    const int64_t dim = s->q->shape[3], row = s->chunks.row, at = kv_head * s->chunks.pitch + job->first;
    const int half = s->chunks.kind != DHSA_MEANS_F32;
    t->means = w->tile;
    if (t->cut) {
        uint16_t narrow[DHSA_MAX_HEAD_DIM];
        if (s->bf16) {
            dhsa_mean_put(s->kernels, &s->chunks, w->mean, dim, w->tile, 0);
        } else if (half) {
            s->kernels->round_bf16(w->mean, dim, narrow);
            s->kernels->load(narrow, DHSA_BF16, dim, (float *)w->tile);
        } else {
            memcpy(w->tile, w->mean, (size_t)dim * sizeof *w->mean);
        }
    } else if (t->in_one_piece && (s->bf16 || !half) && (!s->chunks.squares || (at + t->chunk[0]) % 16 == 0)) {
        t->means = (const char *)s->chunks.means + (at + t->chunk[0]) * row * (half ? 2 : 4);
    } else {
        gather_means(s, at, t, w->tile);
    }
}

static void multiply(const dhsa_scorer *s, const tile *t, int panel, int used, row_scores_scratch *w, float *products,
                     dhsa_ahead *ahead)
{
    const int dim = (int)s->q->shape[3];
    const void *rows = w->panel + panel * panel_bytes(s);
    if (s->bf16)
        s->bf16->qk(rows, (const uint16_t *)t->means, t->n, dim, products, w->top, ahead);
    else
        s->kernels->qk(rows, (const float *)t->means, s->chunks.row, t->n, dim, used, products, ahead);
}

/* Returns what the products of tile t prefetch: the means of the next tile, or nothing if they are not consecutive. */
static dhsa_ahead row_scores_look_ahead(const dhsa_scorer *s, const dhsa_block_job *job, int64_t kv_head, const tile *t,
                                        int panels, const char **next)
{
    const int64_t first = t->chunk[t->n - 1] + 1, n = job->groups || t->cut ? 0 : DHSA_MIN(TILE, job->n - first);
    const int64_t bytes = s->chunks.row * (s->chunks.kind == DHSA_MEANS_F32 ? 4 : 2);
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

/* Computes the denominators of the rows of a panel: the sum of the probabilities of all keys, where each key has that
 * of its chunk. The probabilities of a tile are relative to the maximum up to that tile; alpha rescales them. */
static void panel_weights(const dhsa_scorer *s, const dhsa_block_job *job, int64_t tiles, int panel,
                          row_scores_scratch *w)
{
    const int lanes = s->kernels->lanes;
    float *l = w->l + panel * lanes;
    memset(w->weight, 0, (size_t)lanes * sizeof *w->weight);
    for (int64_t index = 0; index < tiles; index++) {
        const tile *t = w->tiles + index;
        if (t->n == 0) continue;
        const float *alpha = w->alpha + (panel * max_tiles(s) + index) * lanes;
        for (int i = 0; i < t->n; i++) w->score[i] = length_of(s, job, t->chunk[i]);
        s->kernels->weigh_keys(w->products + (panel * product_rows(live(job)) + t->row) * lanes, t->n, w->score, alpha,
                               w->weight);
    }
    /* A row whose plain sum is not finite keeps it, so that add_panel leaves the row out. */
    for (int r = 0; r < lanes; r++)
        if (l[r] > 0 && l[r] <= FLT_MAX) l[r] = w->weight[r];
}

/* Adds the squared probabilities of rows [0, n) of a panel to score, and the probabilities to mass unless it is
 * NULL. */
static void add_panel(const dhsa_scorer *s, const dhsa_block_job *job, int64_t tiles, int panel, int n,
                      row_scores_scratch *w, float *score, float *mass)
{
    const int lanes = s->kernels->lanes;
    const float *l = w->l + panel * lanes;
    panel_weights(s, job, tiles, panel, w);
    /* A row counts if its sum is finite. If a logit is NaN or +inf, the sum is not. */
    for (int r = 0; r < lanes; r++) w->weight[r] = r < n && l[r] > 0 && l[r] <= FLT_MAX ? 1.0f / l[r] : 0.0f;
    for (int64_t index = tiles - 1; index >= 0; index--) {
        const tile *t = w->tiles + index;
        if (t->n == 0) continue;
        const float *products = w->products + (panel * product_rows(live(job)) + t->row) * lanes;
        const float *alpha = w->alpha + (panel * max_tiles(s) + index) * lanes;
        for (int sums = 0; sums < 1 + (mass != NULL); sums++) {
            void (*const add)(const float *, int, const float *, float *) =
                sums ? s->kernels->add_sums : s->kernels->add_squares;
            float *to = sums ? mass : score;
            if (t->in_one_piece) {
                add(products, t->n, w->weight, to + t->chunk[0]);
                continue;
            }
            memset(w->score, 0, (size_t)t->n * sizeof *w->score);
            add(products, t->n, w->weight, w->score);
            for (int i = 0; i < t->n; i++) to[t->chunk[i]] += w->score[i];
        }
        /* Probabilities of earlier tiles are relative to the maximum up to that tile. */
        for (int r = 0; r < lanes; r++) w->weight[r] = w->weight[r] == 0 ? 0 : w->weight[r] * alpha[r];
    }
}

/* Adds the squared probabilities of one KV head to score [n], and the probabilities to mass. Returns the state of its
 * last chunk, up to where the block cuts it. */
static unsigned char score_kv_head(const dhsa_scorer *s, const dhsa_block_job *job, int64_t kv_head,
                                   row_scores_scratch *w, float *score, float *mass)
{
    const dhsa_kernels *kn = s->kernels;
    const int64_t lanes = kn->lanes, n = job->n,
                  tiles = whole_tiles(job, n - (job->cut_end != 0)) + (job->cut_end != 0);
    const int64_t rows = dhsa_ceil_div(job->to - job->from, s->step) * s->heads_per_kv;
    const float scale = s->config->scale == 0 ? 1.0f : (float)fabs(s->config->scale);
    const int most = panels_at_once(s, live(job));
    unsigned char cut = DHSA_CHUNK_GOOD;
    for (int64_t at = 0; at < rows; at += most * lanes) {
        const int panels = (int)DHSA_MIN(most, dhsa_ceil_div(rows - at, lanes));
        for (int p = 0; p < panels; p++)
            pack_rows(s, job, kv_head, at + p * lanes, (int)DHSA_MIN(lanes, rows - at - p * lanes), w, p);
        if (job->cut_end) {
            const int64_t from = s->chunks.edges[job->first + n - 1];
            const int finite =
                dhsa_chunk_mean(kn, s->k, s->b, kv_head, from, job->cut_end, w->mean, w->mean + s->q->shape[3]);
            cut = finite ? DHSA_CHUNK_GOOD : DHSA_CHUNK_BAD;
        }
        for (int64_t i = 0; i < panels * lanes; i++) {
            w->m[i] = -INFINITY;
            w->l[i] = 0;
        }
        for (int64_t index = 0; index < tiles; index++) {
            tile *t = w->tiles + index;
            if (at == 0) find_tile(s, job, kv_head, index, cut, t);
            if (t->n == 0) continue;
            load_tile(s, job, kv_head, w, t);
            const char *next;
            dhsa_ahead ahead = row_scores_look_ahead(s, job, kv_head, t, panels, &next);
            for (int p = 0; p < panels; p++) {
                float *products = w->products + (p * product_rows(live(job)) + t->row) * lanes;
                const int used = (int)DHSA_MIN(lanes, rows - at - p * lanes);
                multiply(s, t, p, used, w, products, &ahead);
                kn->softmax(products, t->n, used, 0, NULL, NULL, scale, (float)s->config->softcap, w->m + p * lanes,
                            w->l + p * lanes, w->alpha + (p * max_tiles(s) + index) * lanes);
            }
        }
        for (int p = 0; p < panels; p++)
            add_panel(s, job, tiles, p, (int)DHSA_MIN(lanes, rows - at - p * lanes), w, score, mass);
    }
    return job->cut_end ? cut : s->chunks.state[kv_head * s->chunks.pitch + job->first + n - 1];
}

unsigned char dhsa_row_scores(const dhsa_scorer *s, const dhsa_block_job *job, int64_t kv, char *arena, float *score,
                              float *mass)
{
    unsigned char last = DHSA_CHUNK_GOOD;
    row_scores_scratch w;
    row_scores_lay_out(s, arena, &w);
    /* Chunks outside the groups come after all others. */
    for (int64_t c = 0; c < job->n; c++) score[c] = job->groups ? -INFINITY : 0;
    for (int64_t g = 0; job->groups && g < job->n_groups; g++) {
        const int64_t from = job->groups[g] * DHSA_CHUNK_GROUP - job->first;
        for (int64_t c = DHSA_MAX(from, 0); c < DHSA_MIN(from + DHSA_CHUNK_GROUP, job->n); c++) score[c] = 0;
    }
    if (job->cut_end) score[job->n - 1] = 0;
    for (int64_t c = 0; mass && c < job->n; c++) mass[c] = 0;
    if (s->bf16) s->bf16->begin();
    for (int64_t h = kv; h < kv + s->kv_per_set; h++) {
        const unsigned char state = score_kv_head(s, job, h, &w, score, mass);
        last = DHSA_MAX(last, state);
    }
    if (s->bf16) s->bf16->end();
    for (int64_t c = 0; mass && c < job->n; c++) mass[c] *= length_of(s, job, c);
    return last;
}
