/* probe.c: the loop shared by methods that compute logits of queries and keys: panels of rows, tiles of keys and an
 * online softmax. Each probability (or the sum or maximum of those of a key block) is passed on with a weight that
 * rescales it to the final maximum and sum. */
#include "select/probe.h"

#include <float.h>
#include <math.h>
#include <string.h>

#include "core/arena.h"

enum {
    PANELS = 12,         /* the most panels that share a tile */
    PART_BYTES = 1 << 20 /* the most bytes that the parts of these panels take */
};

/* Scratch memory of one thread; pointers into its arena. */
typedef struct {
    float *panel;          /* [panels] of [dim, lanes] */
    int32_t *lo, *hi;      /* [panels, lanes]: each row sees keys [lo, hi) */
    float *m, *l, *alpha;  /* [panels, lanes]; alpha [panels] of [tiles, lanes] */
    float *weight, *spare; /* [lanes] */
    float *top;            /* [lanes]: largest products, which pair->qk writes and nothing reads */
    float *s, *tile;
    float *part; /* [panels] of [part_rows, lanes]: what is kept */
} probe_scratch;

static int64_t probe_lay_out(const dhsa_probe *b, char *base, probe_scratch *w)
{
    const int64_t lanes = b->kernels->lanes, twice = b->way == DHSA_PROBE_TWICE;
    const int64_t dim = b->pair ? dhsa_round_up(b->dim, DHSA_PAIR_STEP) : b->dim;
    const struct {
        void *to;
        int64_t elements;
    } parts[] = {
        {&w->panel, b->panels * dim * lanes},
        {&w->lo, b->panels * lanes},
        {&w->hi, b->panels * lanes},
        {&w->m, b->panels * lanes},
        {&w->l, b->panels * lanes},
        {&w->alpha, twice ? lanes : b->panels * b->tiles * lanes},
        {&w->weight, lanes},
        {&w->spare, lanes},
        {&w->top, lanes},
        {&w->s, b->tile * lanes},
        {&w->tile, b->tile * dim},
        {&w->part, b->panels * b->part_rows * lanes},
    };
    int64_t at = 0;
    for (size_t i = 0; i < sizeof parts / sizeof *parts; i++) {
        void *here = dhsa_part(base, &at, parts[i].elements * 4);
        memcpy(parts[i].to, &here, sizeof here);
    }
    return at;
}

static int probe_by_block(const dhsa_probe *b) { return b->way == DHSA_PROBE_SUMS || b->way == DHSA_PROBE_TOPS; }

/* The number of tiles of a key block. */
static int64_t probe_tiles_of_block(const dhsa_probe *b) { return dhsa_ceil_div(b->key_block, b->tile); }

static int64_t probe_count_tiles(const dhsa_probe *b, int64_t from, int64_t to)
{
    if (!probe_by_block(b)) return dhsa_ceil_div(to - from, b->tile);
    return (dhsa_ceil_div(to, b->key_block) - from / b->key_block) * probe_tiles_of_block(b);
}

/* Returns the keys [lo, end) of a tile, which may be empty. */
static dhsa_span probe_find_tile(const dhsa_probe *b, int64_t from, int64_t to, int64_t index)
{
    int64_t first = from + index * b->tile, last = to;
    if (probe_by_block(b)) {
        const int64_t per = probe_tiles_of_block(b), block = from / b->key_block + index / per;
        first = block * b->key_block + index % per * b->tile;
        last = DHSA_MIN(to, (block + 1) * b->key_block);
    }
    return (dhsa_span){.lo = DHSA_MAX(first, from), .end = DHSA_MIN(first + b->tile, last)};
}

static void probe_plan(dhsa_probe *b, dhsa_probe_way way, int64_t rows, int64_t keys, int64_t dim, int64_t key_block)
{
    probe_scratch unused;
    b->way = way;
    b->dim = dim;
    b->key_block = DHSA_MIN(key_block, keys); /* a key block is no longer than all keys */
    /* Products of pairs write whole squares, so their tiles must be a whole number of these. */
    b->tile = probe_by_block(b) ? DHSA_MIN(DHSA_PROBE_TILE, b->key_block) : DHSA_PROBE_TILE;
    b->tiles = probe_count_tiles(b, 0, keys);
    b->part_rows = way == DHSA_PROBE_TWICE ? 0 : way == DHSA_PROBE_KEYS ? b->tiles * b->tile : b->tiles;
    const int64_t lanes = b->kernels->lanes, fit = PART_BYTES / DHSA_MAX(b->part_rows * lanes * 4, 1);
    b->panels = DHSA_MIN(DHSA_MIN(PANELS, DHSA_MAX(fit, 1)), dhsa_ceil_div(rows, lanes));
    b->arena_size = probe_lay_out(b, NULL, &unused);
}

void dhsa_probe_plan(dhsa_probe *b, dhsa_probe_way way, int64_t rows, int64_t keys, int64_t dim, int64_t key_block)
{
    b->kernels = dhsa_kernels_for(dhsa_kernels_current(), DHSA_F32);
    b->pair = NULL;
    probe_plan(b, way, rows, keys, dim, key_block);
}

void dhsa_probe_plan_as(dhsa_probe *b, dhsa_dtype dtype, int64_t rows, int64_t keys, int64_t dim)
{
    b->kernels = dhsa_kernels_for(dhsa_kernels_current(), dtype);
    b->pair = dhsa_pair_products(b->kernels, dtype);
    probe_plan(b, DHSA_PROBE_TWICE, rows, keys, dim, 1);
}

/* Returns the part of a tile that at least one row of a panel sees. *masked: whether some row does not see all of
 * it. */
static dhsa_span probe_clip(const dhsa_probe *b, const int32_t *lo, const int32_t *hi, int used, dhsa_span tile,
                            int *masked)
{
    const dhsa_bounds all = dhsa_bounds_of(lo, hi, used);
    dhsa_span seen = {.lo = DHSA_MAX(tile.lo, all.lo_min), .end = DHSA_MIN(tile.end, all.hi_max)};
    if (b->pair) seen.lo -= (seen.lo - tile.lo) % DHSA_PAIR_STEP; /* begins with a whole square */
    *masked = all.lo_max > seen.lo || all.hi_min < seen.end;
    return seen;
}

/* Computes the probabilities of one panel and tile, relative to the maximum so far. Returns the keys they belong to. */
static dhsa_span probe_multiply(const dhsa_probe *b, const dhsa_probe_run *run, const probe_scratch *w, int64_t p,
                                int used, dhsa_span tile, const float *keys, ptrdiff_t stride, float *s, float *l,
                                float *alpha)
{
    const int64_t lanes = b->kernels->lanes;
    const int32_t *lo = w->lo + p * lanes, *hi = w->hi + p * lanes;
    int masked;
    const dhsa_span seen = probe_clip(b, lo, hi, used, tile, &masked);
    const int n = (int)(seen.end - seen.lo);
    if (n <= 0) return seen;
    const int64_t padded = dhsa_round_up(b->dim, DHSA_PAIR_STEP);
    if (b->pair)
        b->pair->qk((const uint16_t *)(w->panel + p * padded * lanes),
                    (const uint16_t *)keys + (seen.lo - tile.lo) * padded, n, (int)b->dim, s, w->top, NULL);
    else
        b->kernels->qk(w->panel + p * b->dim * lanes, keys + (seen.lo - tile.lo) * stride, stride, n, (int)b->dim, used,
                       s, NULL);
    b->kernels->softmax(s, n, used, (int)seen.lo, masked ? lo : NULL, hi, run->scale, run->softcap, w->m + p * lanes, l,
                        alpha);
    return seen;
}

/* Reduces the n values of each row to their sum, or with `tops` to their maximum. */
static void probe_reduce(const float *s, int n, int lanes, int used, int tops, float *part)
{
    memcpy(part, s, (size_t)lanes * sizeof *part);
    for (int j = 1; j < n; j++) {
        const float *p = s + (ptrdiff_t)j * lanes;
        if (tops)
            for (int r = 0; r < used; r++) part[r] = part[r] > p[r] ? part[r] : p[r];
        else
            for (int r = 0; r < used; r++) part[r] += p[r];
    }
}

static void probe_find_weights(const float *l, int64_t lanes, int used, float *weight)
{
    /* If a logit is NaN or +inf, the sum is not finite. */
    for (int r = 0; r < lanes; r++) weight[r] = r < used && l[r] > 0 && l[r] <= FLT_MAX ? 1.0f / l[r] : 0.0f;
}

/* One pass over the keys; what is kept is written to w->part. */
static void probe_first_pass(const dhsa_probe *b, const dhsa_probe_run *run, const probe_scratch *w, int64_t at,
                             int64_t panels)
{
    const int64_t lanes = b->kernels->lanes, tiles = probe_count_tiles(b, run->from, run->to);
    for (int64_t i = 0; i < tiles; i++) {
        const dhsa_span tile = probe_find_tile(b, run->from, run->to, i);
        if (tile.lo >= tile.end) continue;
        ptrdiff_t stride;
        const float *keys = run->keys(run->of, tile.lo, (int)(tile.end - tile.lo), w->tile, &stride);
        for (int64_t p = 0; p < panels; p++) {
            const int used = (int)DHSA_MIN(lanes, run->rows - at - p * lanes);
            float *part = w->part + p * b->part_rows * lanes,
                  *s = b->way == DHSA_PROBE_KEYS ? part + i * b->tile * lanes : w->s;
            float *alpha = b->way == DHSA_PROBE_TWICE ? w->alpha : w->alpha + (p * b->tiles + i) * lanes;
            const dhsa_span seen = probe_multiply(b, run, w, p, used, tile, keys, stride, s, w->l + p * lanes, alpha);
            if (seen.lo < seen.end && probe_by_block(b))
                probe_reduce(s, (int)(seen.end - seen.lo), (int)lanes, used, b->way == DHSA_PROBE_TOPS,
                             part + i * lanes);
        }
    }
}

/* Passes probabilities to the method, or adds them to run->score where the method has no visit function. */
static void probe_visit(const dhsa_probe *b, const dhsa_probe_run *run, int64_t row, int64_t first, int n,
                        const float *p, const float *weight)
{
    if (run->visit) {
        run->visit(run->of, row, first, n, p, weight);
    } else if (b->way == DHSA_PROBE_TOPS) {
        float *best = run->score + first / b->key_block;
        for (int r = 0; r < b->kernels->lanes; r++)
            if (weight[r] != 0) *best = DHSA_MAX(*best, p[r] * weight[r]);
    } else {
        b->kernels->add_sums(p, n, weight, run->score + (probe_by_block(b) ? first / b->key_block : first));
    }
}

/* Passes on what was kept, from the last tile to the first. Values of earlier tiles are relative to the maximum up to
 * that tile, so the weights are multiplied by alpha on the way. */
static void probe_hand_on(const dhsa_probe *b, const dhsa_probe_run *run, const probe_scratch *w, int64_t at, int64_t p)
{
    const int64_t lanes = b->kernels->lanes, row = at + p * lanes;
    const int used = (int)DHSA_MIN(lanes, run->rows - row);
    const float *part = w->part + p * b->part_rows * lanes;
    probe_find_weights(w->l + p * lanes, lanes, used, w->weight);
    for (int64_t i = probe_count_tiles(b, run->from, run->to) - 1; i >= 0; i--) {
        const dhsa_span tile = probe_find_tile(b, run->from, run->to, i);
        int masked;
        const dhsa_span seen = probe_clip(b, w->lo + p * lanes, w->hi + p * lanes, used, tile, &masked);
        if (tile.lo >= tile.end || seen.lo >= seen.end) continue;
        if (probe_by_block(b))
            probe_visit(b, run, row, seen.lo, 1, part + i * lanes, w->weight);
        else
            probe_visit(b, run, row, seen.lo, (int)(seen.end - seen.lo), part + i * b->tile * lanes, w->weight);
        const float *alpha = w->alpha + (p * b->tiles + i) * lanes;
        for (int r = 0; r < used; r++) w->weight[r] = w->weight[r] == 0 ? 0 : w->weight[r] * alpha[r];
    }
}

/* Computes the probabilities again. They are relative to the final maxima, which do not change any more. */
static void probe_second_pass(const dhsa_probe *b, const dhsa_probe_run *run, const probe_scratch *w, int64_t at,
                              int64_t panels)
{
    const int64_t lanes = b->kernels->lanes, tiles = probe_count_tiles(b, run->from, run->to);
    for (int64_t i = 0; i < tiles; i++) {
        const dhsa_span tile = probe_find_tile(b, run->from, run->to, i);
        ptrdiff_t stride;
        const float *keys = run->keys(run->of, tile.lo, (int)(tile.end - tile.lo), w->tile, &stride);
        for (int64_t p = 0; p < panels; p++) {
            const int used = (int)DHSA_MIN(lanes, run->rows - at - p * lanes);
            const dhsa_span seen = probe_multiply(b, run, w, p, used, tile, keys, stride, w->s, w->spare, w->alpha);
            if (seen.lo >= seen.end) continue;
            probe_find_weights(w->l + p * lanes, lanes, used, w->weight);
            probe_visit(b, run, at + p * lanes, seen.lo, (int)(seen.end - seen.lo), w->s, w->weight);
        }
    }
}

void dhsa_probe_do(const dhsa_probe *b, const dhsa_probe_run *run, char *arena)
{
    const int64_t lanes = b->kernels->lanes;
    probe_scratch w;
    probe_lay_out(b, arena, &w);
    if (b->pair) b->pair->begin();
    for (int64_t at = 0; at < run->rows; at += b->panels * lanes) {
        const int64_t panels = DHSA_MIN(b->panels, dhsa_ceil_div(run->rows - at, lanes));
        for (int64_t p = 0; p < panels; p++) {
            const int used = (int)DHSA_MIN(lanes, run->rows - at - p * lanes);
            int32_t *lo = w.lo + p * lanes, *hi = w.hi + p * lanes;
            for (int r = 0; r < lanes; r++) {
                lo[r] = (int32_t)run->from;
                hi[r] = (int32_t)run->to;
                w.m[p * lanes + r] = -INFINITY;
                w.l[p * lanes + r] = w.spare[r] = 0;
            }
            const int64_t dim = b->pair ? dhsa_round_up(b->dim, DHSA_PAIR_STEP) : b->dim;
            run->pack(run->of, at + p * lanes, used, w.panel + p * dim * lanes, lo, hi);
        }
        probe_first_pass(b, run, &w, at, panels);
        if (b->way == DHSA_PROBE_TWICE)
            probe_second_pass(b, run, &w, at, panels);
        else
            for (int64_t p = 0; p < panels; p++) probe_hand_on(b, run, &w, at, p);
    }
    if (b->pair) b->pair->end();
}

void dhsa_probe_pack_queries(void *of, int64_t first, int n, float *panel, int32_t *lo, int32_t *hi)
{
    const dhsa_probe_queries *w = of;
    const dhsa_probe *b = w->probe;
    const int64_t offset = w->k->shape[2] - w->q->shape[2];
    const int dim = (int)w->q->shape[3];
    const void *rows[DHSA_MAX_LANES];
    for (int r = 0; r < n; r++) {
        const int64_t at = w->query + (first + r) / w->heads;
        rows[r] = dhsa_row(w->q, w->b, w->head + (first + r) % w->heads, at);
        hi[r] = (int32_t)(offset + at + 1);
        lo[r] = (int32_t)(w->window ? DHSA_MAX(hi[r] - w->window, 0) : 0);
    }
    if (b->pair)
        b->pair->pack_panel(rows, n, dim, w->negate, (uint16_t *)panel);
    else
        b->kernels->pack_panel(rows, w->q->dtype, n, dim, w->negate ? -1.0f : 1.0f, panel);
}

const float *dhsa_probe_read_keys(void *of, int64_t first, int n, float *tile, ptrdiff_t *stride)
{
    const dhsa_probe_queries *w = of;
    const dhsa_probe *b = w->probe;
    const int64_t kv_head = w->head / (w->q->shape[1] / w->k->shape[1]);
    if (!b->pair) return dhsa_probe_load_keys(b->kernels, w->k, w->b, kv_head, first, 1, n, tile, stride);
    const void *rows[DHSA_PROBE_TILE];
    for (int j = 0; j < n; j++) rows[j] = dhsa_row(w->k, w->b, kv_head, first + j);
    b->pair->pack_keys(rows, n, (int)w->k->shape[3], (uint16_t *)tile);
    return tile;
}

const float *dhsa_probe_load_keys(const dhsa_kernels *kernels, const dhsa_tensor *k, int64_t b, int64_t kv_head,
                                  int64_t at, int64_t step, int n, float *tile, ptrdiff_t *stride)
{
    const int64_t dim = k->shape[3];
    if (k->dtype == DHSA_F32) { /* no copy is needed */
        *stride = (ptrdiff_t)(n > 1 ? k->stride[2] * step : 0);
        return dhsa_row(k, b, kv_head, at);
    }
    const void *rows[DHSA_PROBE_TILE];
    for (int j = 0; j < n; j++) rows[j] = dhsa_row(k, b, kv_head, at + j * step);
    kernels->pack_rows(rows, k->dtype, n, (int)dim, tile);
    *stride = dim;
    return tile;
}
