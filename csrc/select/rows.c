/* rows.c: row scores: mean rows of a block's queries against chunk means, a softmax over the chunks for each row, and the
 * sum of its squares (and, where asked for, of the probabilities themselves: attention mass) over rows: ours. Which chunks are
 * candidates is scores.c's. */
#include <float.h>
#include <math.h>
#include <string.h>

#include "select/select.h"

enum {
    TILE = 128,             /* chunks of a tile: its products stay in L1 through the softmax, its means in L2 for all panels */
    PANELS = 8,             /* panels that share a tile of means, */
    PRODUCTS = 1024 * 1024, /* if this many bytes hold their probabilities, which then stay in L2 */
};

/* What one thread works in; pointers into its arena. */
typedef struct {
    float *products;       /* [panels at a time] of [product_rows, lanes] */
    float *alpha;          /* [panels] of [tiles, lanes]: what the softmax of a tile did to those before it */
    float *m, *l;          /* [panels, lanes] */
    float *weight;         /* [lanes] */
    float *part;           /* [TILE, lanes]: products of split numbers */
    float *score;          /* [TILE] */
    float *top;            /* [lanes]: largest products, which the softmax finds anew */
    float *mean;           /* [2, dim] */
    char *panel, *second;  /* [panels] of packed rows, in fp32 or bf16; their second parts */
    char *rows, *low;      /* [lanes, dim]: the rows before they are packed */
    char *tile, *tile_low; /* [TILE] means that do not lie ready in chunks.means */
} scratch;

/* Tiles begin at multiples of TILE, so the first may be short at either end; the cut chunk is a tile of its own. */
static int64_t whole_tiles(int64_t first, int64_t n) { return n ? dhsa_ceil_div(first % TILE + n, TILE) : 0; }

static int64_t product_rows(int64_t chunks) { return dhsa_round_up(chunks + TILE - 1, TILE) + DHSA_PAIR_STEP; }

static int64_t max_tiles(const dhsa_scorer *s) { return dhsa_ceil_div(s->capacity + TILE - 1, TILE) + 1; }

static int64_t panel_bytes(const dhsa_scorer *s) { return s->kernels->lanes * (s->bf16 ? s->chunks.row * 2 : s->q->shape[3] * 4); }

/* Bytes of one mean as the products take it. */
static int64_t mean_bytes(const dhsa_scorer *s) { return s->chunks.row * (s->bf16 ? 2 : 4); }

/* How many panels are worked on at a time against this many chunks. */
static int panels_at_once(const dhsa_scorer *s, int64_t chunks)
{
    const int64_t fit = PRODUCTS / (product_rows(chunks) * s->kernels->lanes * 4);
    return (int)DHSA_MIN(DHSA_MAX(fit, 1), s->panels);
}

/* Returns the bytes an arena needs; base may be NULL to only ask. */
static int64_t lay_out(const dhsa_scorer *s, char *base, scratch *w)
{
    const int64_t lanes = s->kernels->lanes, dim = s->q->shape[3], split = s->chunks.kind == DHSA_MEANS_SPLIT, panels = s->panels;
    const int64_t rows = lanes * dim * (s->chunks.kind == DHSA_MEANS_F32 ? 4 : 2);
    const struct {
        void *to;
        int64_t bytes;
    } parts[] = {
        {&w->mean, 2 * dim * 4}, /* first: where dhsa_chunks_fill works */
        {&w->products,
         DHSA_MIN(DHSA_MAX(PRODUCTS, product_rows(s->capacity) * lanes * 4), panels * product_rows(s->capacity) * lanes * 4)},
        {&w->alpha, panels * max_tiles(s) * lanes * 4},
        {&w->m, panels * lanes * 4},
        {&w->l, panels * lanes * 4},
        {&w->weight, lanes * 4},
        {&w->part, split * TILE * lanes * 4},
        {&w->score, TILE * 4},
        {&w->top, lanes * 4},
        {&w->panel, panels * panel_bytes(s)},
        {&w->second, split * panels * panel_bytes(s)},
        {&w->rows, rows},
        {&w->low, split * rows},
        {&w->tile, TILE * mean_bytes(s)},
        {&w->tile_low, split * TILE * mean_bytes(s)},
    };
    int64_t at = 0;
    for (size_t i = 0; i < sizeof parts / sizeof *parts; i++) {
        char *here = base ? base + at : NULL;
        memcpy(parts[i].to, &here, sizeof here);
        at += dhsa_round_up(parts[i].bytes, DHSA_ALIGN);
    }
    return at;
}

int64_t dhsa_rows_plan(dhsa_scorer *s)
{
    const dhsa_score_config *c = s->config;
    const int64_t lanes = s->kernels->lanes;
    scratch unused;
    s->step = dhsa_ceil_div(c->query_block, c->rows);
    const int64_t rows = dhsa_ceil_div(DHSA_MIN(c->query_block, s->q->shape[2]), s->step) * s->heads_per_kv;
    s->panels = (int)DHSA_MIN(PANELS, dhsa_ceil_div(rows, lanes));
    return lay_out(s, NULL, &unused);
}

/* Asks for the queries of the mean row from `from` on: those of several heads take turns, which hardware does not foresee. */
static void prefetch_queries(const dhsa_scorer *s, int64_t h, int64_t from, int64_t to)
{
    const int64_t bytes = s->q->shape[3] * dhsa_dtype_size(s->q->dtype);
    for (int64_t i = from; i < DHSA_MIN(from + DHSA_MIN(s->step, 8), to); i++)
        for (int64_t byte = 0; byte < bytes; byte += 64) __builtin_prefetch((const char *)dhsa_row(s->q, s->b, h, i) + byte);
}

/* Mean rows [at, at + n) of a KV head into a panel. */
static void pack_rows(const dhsa_scorer *s, const dhsa_block_job *job, int64_t kv_head, int64_t at, int n, scratch *w, int panel)
{
    const dhsa_means_kind kind = s->chunks.kind;
    const int64_t dim = s->q->shape[3], head = s->config->heads == DHSA_HEADS_HEAD ? job->set : kv_head * s->heads_per_kv;
    const int64_t bytes = dim * (kind == DHSA_MEANS_F32 ? 4 : 2);
    /* The sign of the scale goes into the rows: the largest product stays the largest logit. */
    const float sign = s->config->scale < 0 ? -1.0f : s->config->scale > 0 ? 1.0f : 0.0f;
    const void *rows[DHSA_MAX_LANES], *low[DHSA_MAX_LANES];
    for (int r = 0; r < n; r++) {
        const int64_t from = job->from + (at + r) / s->heads_per_kv * s->step;
        prefetch_queries(s, head + (at + r) % s->heads_per_kv, from + s->step, job->to);
        dhsa_mean_query(s->kernels, s->q, s->b, head + (at + r) % s->heads_per_kv, from, DHSA_MIN(from + s->step, job->to), sign,
                        w->mean);
        /* All products of such a row are infinite or NaN. A softcap would make numbers of them: it is to say nothing. */
        if (!dhsa_all_finite(s->kernels, w->mean, dim)) w->mean[0] = NAN;
        rows[r] = w->rows + r * bytes;
        low[r] = w->low + r * bytes;
        dhsa_mean_store(s->kernels, kind, w->mean, dim, dim, w->rows + r * bytes,
                        kind == DHSA_MEANS_SPLIT ? (uint16_t *)(w->low + r * bytes) : NULL);
    }
    char *to = w->panel + panel * panel_bytes(s);
    if (s->bf16)
        s->bf16->pack_panel(rows, n, (int)dim, 0, (uint16_t *)to);
    else
        s->kernels->pack_panel(rows, kind == DHSA_MEANS_F32 ? DHSA_F32 : DHSA_BF16, n, (int)dim, 1.0f, (float *)to);
    if (kind == DHSA_MEANS_SPLIT) s->bf16->pack_panel(low, n, (int)dim, 0, (uint16_t *)(w->second + panel * panel_bytes(s)));
}

/* A tile of a block's chunks. */
typedef struct {
    int64_t first; /* in the block's chunks */
    int64_t row;   /* of the products */
    int n, good;   /* chunks; those among them that take part: not the empty ones and those without a finite mean */
    const unsigned char *state;
    const char *means, *low; /* [good], as the products take them */
} tile;

/* cut: the state of the last chunk where it is cut (its mean is then in w->mean). */
static tile find_tile(const dhsa_scorer *s, const dhsa_block_job *job, int64_t kv_head, int64_t index, const unsigned char *cut)
{
    const int64_t whole = job->n - (job->cut_end != 0), base = job->first % TILE, first = DHSA_MAX(index * TILE - base, 0);
    tile t = {.first = first, .row = index * TILE, .n = (int)(DHSA_MIN((index + 1) * TILE - base, whole) - first)};
    if (first >= whole) {
        t = (tile){.first = whole, .row = index * TILE, .n = 1, .state = cut};
    } else {
        t.state = s->chunks.state + kv_head * s->chunks.chunks + job->first + first;
    }
    for (int c = 0; c < t.n; c++) t.good += t.state[c] == DHSA_CHUNK_GOOD;
    return t;
}

/* Brings the means of a tile together, as fp32 or bf16 numbers one after the other. */
static void load_tile(const dhsa_scorer *s, const dhsa_block_job *job, int64_t kv_head, const unsigned char *cut, scratch *w,
                      tile *t)
{
    const int64_t dim = s->q->shape[3], row = s->chunks.row, at = kv_head * s->chunks.pitch + job->first + t->first;
    const int half = s->chunks.kind != DHSA_MEANS_F32, size = half ? 2 : 4;
    const char *means = s->chunks.means, *low = (const char *)s->chunks.low;
    t->means = w->tile;
    t->low = w->tile_low;
    if (t->state == cut) {
        float *mean = w->mean, rounded[256];
        uint16_t narrow[256];
        if (half && !s->bf16) {
            s->kernels->split_bf16(mean, dim, narrow, NULL);
            s->kernels->load(narrow, DHSA_BF16, dim, rounded);
            mean = rounded;
        }
        if (s->bf16)
            dhsa_mean_put(s->kernels, &s->chunks, mean, dim, w->tile, low ? (uint16_t *)w->tile_low : NULL, 0);
        else
            memcpy(w->tile, mean, (size_t)dim * sizeof *mean);
    } else if (t->good == t->n && (s->bf16 || !half) && (!s->chunks.squares || at % 16 == 0)) {
        t->means = means + at * row * size;
        t->low = low ? low + at * row * size : NULL;
    } else {
        for (int c = 0, to = 0; c < t->n; c++) {
            if (t->state[c] != DHSA_CHUNK_GOOD) continue;
            if (s->chunks.squares)
                for (int64_t d = 0; d < row; d += DHSA_PAIR_STEP) {
                    const int64_t here = dhsa_square(to, d, row) * 2, there = dhsa_square(at + c, d, row) * 2;
                    memcpy(w->tile + here, means + there, DHSA_PAIR_STEP * 2);
                    if (low) memcpy(w->tile_low + here, low + there, DHSA_PAIR_STEP * 2);
                }
            else if (half)
                s->kernels->load(means + (at + c) * row * size, DHSA_BF16, row, (float *)w->tile + to * row);
            else
                memcpy(w->tile + to * row * size, means + (at + c) * row * size, (size_t)(row * size));
            to++;
        }
    }
}

static void multiply(const dhsa_scorer *s, const tile *t, int panel, int n, scratch *w, float *products, dhsa_ahead *ahead)
{
    const int dim = (int)s->q->shape[3];
    const void *rows = w->panel + panel * panel_bytes(s), *second = w->second + panel * panel_bytes(s);
    if (!s->bf16) {
        s->kernels->qk(rows, (const float *)t->means, s->chunks.row, t->good, dim, n, products, ahead);
        return;
    }
    s->bf16->qk(rows, (const uint16_t *)t->means, t->good, dim, products, w->top, ahead);
    if (s->chunks.kind != DHSA_MEANS_SPLIT) return;
    /* (a + b) (c + d) without b d, which is smaller than what rounding the two parts left out. */
    for (int i = 0; i < 2; i++) {
        s->bf16->qk(i ? second : rows, (const uint16_t *)(i ? t->means : t->low), t->good, dim, w->part, w->top, NULL);
        s->kernels->add(w->part, DHSA_F32, (int64_t)t->good * s->kernels->lanes, products);
    }
}

/* The products of tile t are to ask for the means of the one after it, which lie in one piece. */
static dhsa_ahead look_ahead(const dhsa_scorer *s, const dhsa_block_job *job, int64_t kv_head, const tile *t, int panels,
                             const char **next)
{
    const int64_t first = t->first + t->n, n = DHSA_MAX(DHSA_MIN(TILE, job->n - first), 0), pieces = s->chunks.low ? 2 : 1;
    const int64_t bytes = s->chunks.row * (s->chunks.kind == DHSA_MEANS_F32 ? 4 : 2);
    const int64_t at = (kv_head * s->chunks.pitch + job->first + first) * bytes;
    next[0] = (const char *)s->chunks.means + at;
    next[1] = (const char *)s->chunks.low + (s->chunks.low ? at : 0);
    dhsa_ahead ahead = {next, next + (n ? pieces : 0), (int)(n * bytes), 0, 0, 0};
    ahead.rate = dhsa_ceil_div(dhsa_ceil_div(pieces * n * bytes, 64) << 20, (int64_t)panels * t->good * s->q->shape[3]);
    return ahead;
}

/* Adds the squared probabilities of a panel's rows [0, n), and to mass, if not NULL, the probabilities. */
static void add_panel(const dhsa_scorer *s, const dhsa_block_job *job, int64_t kv_head, int64_t tiles, const unsigned char *cut,
                      int panel, int n, scratch *w, float *score, float *mass)
{
    const int lanes = s->kernels->lanes;
    const float *products = w->products + panel * product_rows(job->n) * lanes, *l = w->l + panel * lanes;
    /* A row counts if its sum is a number: NaN and inf turn up in the sum. */
    for (int r = 0; r < lanes; r++) w->weight[r] = r < n && l[r] > 0 && l[r] <= FLT_MAX ? 1.0f / l[r] : 0.0f;
    for (int64_t index = tiles - 1; index >= 0; index--) {
        const tile t = find_tile(s, job, kv_head, index, cut);
        const float *alpha = w->alpha + (panel * max_tiles(s) + index) * lanes;
        if (t.good == 0) continue;
        for (int sums = 0; sums < 1 + (mass != NULL); sums++) {
            void (*const add)(const float *, int, const float *, float *) = sums ? s->kernels->add_sums : s->kernels->add_squares;
            float *to = (sums ? mass : score) + t.first;
            if (t.good == t.n) {
                add(products + t.row * lanes, t.n, w->weight, to);
                continue;
            }
            memset(w->score, 0, (size_t)t.good * sizeof *w->score);
            add(products + t.row * lanes, t.good, w->weight, w->score);
            for (int c = 0, from = 0; c < t.n; c++)
                if (t.state[c] == DHSA_CHUNK_GOOD) to[c] += w->score[from++];
        }
        /* Earlier tiles are relative to the maximum of their time. */
        for (int r = 0; r < lanes; r++) w->weight[r] = w->weight[r] == 0 ? 0 : w->weight[r] * alpha[r];
    }
}

/* Adds one KV head's squared probabilities to score [n], and plain ones to mass. Returns the state of its last chunk as this block
 * sees it. */
static unsigned char score_kv_head(const dhsa_scorer *s, const dhsa_block_job *job, int64_t kv_head, scratch *w, float *score,
                                   float *mass)
{
    const dhsa_kernels *kn = s->kernels;
    const int64_t lanes = kn->lanes, n = job->n, whole = n - (job->cut_end != 0);
    const int64_t tiles = whole_tiles(job->first, whole) + (job->cut_end != 0);
    const int64_t rows = dhsa_ceil_div(job->to - job->from, s->step) * s->heads_per_kv;
    const float scale = s->config->scale == 0 ? 1.0f : (float)fabs(s->config->scale);
    const int most = panels_at_once(s, n);
    unsigned char cut = DHSA_CHUNK_GOOD;
    for (int64_t at = 0; at < rows; at += most * lanes) {
        const int panels = (int)DHSA_MIN(most, dhsa_ceil_div(rows - at, lanes));
        for (int p = 0; p < panels; p++)
            pack_rows(s, job, kv_head, at + p * lanes, (int)DHSA_MIN(lanes, rows - at - p * lanes), w, p);
        if (job->cut_end) {
            const int64_t from = s->chunks.edges[job->first + n - 1];
            const int finite = dhsa_chunk_mean(kn, s->k, s->b, kv_head, from, job->cut_end, w->mean, w->mean + s->q->shape[3]);
            cut = finite ? DHSA_CHUNK_GOOD : DHSA_CHUNK_BAD;
        }
        for (int64_t i = 0; i < panels * lanes; i++) {
            w->m[i] = -INFINITY;
            w->l[i] = 0;
        }
        for (int64_t index = 0; index < tiles; index++) {
            tile t = find_tile(s, job, kv_head, index, &cut);
            if (t.good == 0) continue;
            load_tile(s, job, kv_head, &cut, w, &t);
            const char *next[2];
            dhsa_ahead ahead = look_ahead(s, job, kv_head, &t, panels, next);
            for (int p = 0; p < panels; p++) {
                float *products = w->products + (p * product_rows(n) + t.row) * lanes;
                const int used = (int)DHSA_MIN(lanes, rows - at - p * lanes);
                multiply(s, &t, p, used, w, products, &ahead);
                kn->softmax(products, t.good, used, 0, NULL, NULL, scale, (float)s->config->softcap, w->m + p * lanes,
                            w->l + p * lanes, w->alpha + (p * max_tiles(s) + index) * lanes);
            }
        }
        for (int p = 0; p < panels; p++)
            add_panel(s, job, kv_head, tiles, &cut, p, (int)DHSA_MIN(lanes, rows - at - p * lanes), w, score, mass);
    }
    return job->cut_end ? cut : s->chunks.state[kv_head * s->chunks.chunks + job->first + n - 1];
}

unsigned char dhsa_rows_score(const dhsa_scorer *s, const dhsa_block_job *job, int64_t kv, char *arena, float *score, float *mass)
{
    unsigned char last = DHSA_CHUNK_GOOD;
    scratch w;
    lay_out(s, arena, &w);
    for (int64_t c = 0; c < job->n; c++) score[c] = 0;
    for (int64_t c = 0; mass && c < job->n; c++) mass[c] = 0;
    if (s->bf16) s->bf16->begin();
    for (int64_t h = kv; h < kv + s->kv_per_set; h++) {
        const unsigned char state = score_kv_head(s, job, h, &w, score, mass);
        last = DHSA_MAX(last, state);
    }
    if (s->bf16) s->bf16->end();
    return last;
}
