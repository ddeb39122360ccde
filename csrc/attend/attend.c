/* attend.c: the attention executor. Dense attention, sliding windows and every sparse method are the same loop over
 * tiles of a list of keys; only the list differs. This file plans tiles and masks, and the kernels do the
 * arithmetic. Which keys matter is decided elsewhere. */
#include <assert.h>
#include <math.h>
#include <stdatomic.h>
#include <string.h>

#include "attend/attend.h"
#include "attend/keys.h"
#include "core/arena.h"
#include "core/threads.h"
#include "kernels/half.h"

enum {
    TILE = 128,       /* keys of a tile: its scores stay in L1, the packed tile and the queries in L2 */
    TILE_PAIRS = 256, /* the same for 16-bit products, which are so fast that loading and storing the sums counts */
    MAX_ROWS = 512, /* query rows of an item: all heads of a group times a run of queries; they share the packed keys */
    WIDE = 1024,    /* fewer rows where one of queries and one of outputs have more elements than this together */
    MIN_ITEMS = 16, /* a small problem is divided into about this many items, so that threads can share it */
    MIN_ITEMS_PAIRS = 8, /* the same for 16-bit products: every item packs its keys, which counts for more there */
    SPLIT = 3            /* products of bf16 that make one of fp32 at precision "high" */
};

typedef struct {
    const dhsa_problem *p;
    const dhsa_selection *list; /* NULL: every key */
    const dhsa_kernels *kernels;
    int64_t heads;       /* query heads of an item: G, or 1 if every head has its own list */
    int64_t head_sets;   /* items per batch item and run of queries: H / heads */
    int64_t run;         /* largest number of queries of an item */
    int64_t block, runs; /* queries of a block; runs that a block is divided into */
    int64_t blocks;
    int panels, tile;
    const dhsa_pair_kernels *pair; /* NULL: products are fp32, whatever the dtype */
    /* Of fp32 inputs that are multiplied as bf16: the numbers that stand for one. 0: inputs are packed as they are. */
    int parts;
    int64_t dim, padded;     /* head_dim of queries and keys; numbers of a packed row of them */
    int64_t v_dim, v_padded; /* the same of values and outputs */
    int64_t v_stride;        /* elements of a strip of values (for pairs see kernels.h) */
    float factor, sign;
    float least;                  /* log2 of skip, 0: none; a tile that is this far below the maximum is left out */
    _Atomic int64_t *done, *left; /* number of products of a tile and a panel; number of those left out */
    char *arenas;
    int64_t arena_size;
} attend_plan;

/* The working memory of one thread: pointers into its arena. Sizes are those of a full item. */
typedef struct {
    float *o, *s, *m, *l, *alpha, *top;
    void *q, *k, *v;   /* fp32 or 16 bits, as the kernels pack them */
    uint16_t *p;       /* probabilities in 16 bits */
    uint16_t *narrow;  /* rows of fp32 after rounding, before they are packed */
    float *ones;       /* [lanes] */
    int32_t *lo, *hi;  /* [panels * lanes]: a row sees the entries [lo, hi) of the key list */
    const void **rows; /* keys of the tile, then its values; after these, the same for the next tile */
    dhsa_ahead ahead;
    dhsa_exp_job job;
    struct {
        int count;                   /* 0: none */
        const uint16_t *p, *low, *v; /* low: NULL, or the smaller parts of p */
        const float *alpha;
        float *o;
    } due;              /* pairs only: the panel whose values are not added yet */
    int turn;           /* half of alpha and p that the next panel uses; the other belongs to `due` */
    int packed, poison; /* whether the values of the tile are packed; whether one of them is not finite */
    int64_t done, left;
} attend_scratch;

/* Lays the scratch out in an arena and returns its size. With base NULL it only computes the size. */
static int64_t attend_lay_out(const attend_plan *pl, char *base, attend_scratch *w)
{
    const int64_t lanes = pl->kernels->lanes, rows = pl->panels * lanes, size = pl->pair ? 2 : 4;
    const int64_t halves = pl->parts == SPLIT ? 2 : 1; /* of values and probabilities */
    int64_t used = 0;
    w->q = dhsa_part(base, &used, rows * pl->padded * size);
    w->o = dhsa_part(base, &used, rows * pl->v_padded * 4);
    w->s = dhsa_part(base, &used, pl->tile * lanes * 4);
    w->k = dhsa_part(base, &used, pl->tile * pl->padded * size);
    w->v = dhsa_part(base, &used,
                     pl->pair ? pl->tile * pl->v_padded * size * halves
                              : pl->v_padded / pl->kernels->value_step * pl->v_stride * size);
    w->p = dhsa_part(base, &used, pl->pair ? 2 * halves * pl->tile * lanes * size : 0);
    w->narrow =
        dhsa_part(base, &used, pl->parts ? DHSA_PAIR_STEP * DHSA_MAX(pl->padded, halves * pl->v_padded) * size : 0);
    w->ones = dhsa_part(base, &used, lanes * 4);
    w->m = dhsa_part(base, &used, rows * 4);
    w->l = dhsa_part(base, &used, rows * 4);
    w->alpha = dhsa_part(base, &used, 2 * lanes * 4);
    w->top = dhsa_part(base, &used, lanes * 4);
    w->lo = dhsa_part(base, &used, rows * 4);
    w->hi = dhsa_part(base, &used, rows * 4);
    w->rows = dhsa_part(base, &used, DHSA_MAX(4 * pl->tile, lanes) * (int64_t)sizeof(void *));
    return used;
}

static float narrow_value(const attend_plan *pl, uint16_t x)
{
    return pl->p->v.dtype == DHSA_F16 ? dhsa_from_f16(x) : dhsa_from_bf16(x);
}

/* Adds the values of a tile, whose rows are `rows`, in which some are inf or NaN. 0 times these is NaN, so a row must
 * not read the values of keys that it does not see. */
static void pv_guarded(const attend_plan *pl, const attend_scratch *w, const void *const *rows, int offset, int n,
                       int count, int base, const int32_t *lo, const int32_t *hi, float *o)
{
    const int lanes = pl->kernels->lanes, step = pl->kernels->value_step;
    for (int d = 0; d < pl->v_dim; d++)
        for (int r = 0; r < lanes; r++) {
            float sum = 0;
            for (int j = DHSA_MAX(0, lo[r] - base); j < DHSA_MIN(count, hi[r] - base); j++) {
                const float p = w->s[(ptrdiff_t)j * lanes + r];
                if (pl->parts)
                    sum += p * ((const float *)rows[n + offset + j])[d];
                else if (pl->pair)
                    sum +=
                        p *
                        narrow_value(
                            pl, ((const uint16_t *)w->v)[dhsa_square(d, offset + j, dhsa_round_up(n, DHSA_PAIR_STEP))]);
                else
                    sum += p * ((const float *)w->v)[d / step * pl->v_stride + (offset + j) * step + d % step];
            }
            o[(ptrdiff_t)d * lanes + r] = o[(ptrdiff_t)d * lanes + r] * w->alpha[r] + sum;
        }
}

/* A run of queries of one head set and the list of keys they attend to. */
typedef struct {
    int64_t b, head, kv_head; /* batch item, first query head, its KV head */
    int64_t first, queries;   /* index of the first query, number of queries */
    key_list list;
    int rows, panels;
} item;

static void find_item(const attend_plan *pl, int64_t index, item *it)
{
    const dhsa_problem *p = pl->p;
    const int64_t G = p->q.shape[1] / p->k.shape[1], per_run = p->q.shape[0] * pl->head_sets;
    /* Late queries see the most keys, so their items come first. */
    const int64_t at = pl->blocks * pl->runs - 1 - index / per_run, block = at / pl->runs;
    it->b = index % per_run / pl->head_sets;
    it->head = index % pl->head_sets * pl->heads;
    it->kv_head = it->head / G;
    it->first = block * pl->block + at % pl->runs * pl->run;
    it->queries = DHSA_MIN(DHSA_MIN(pl->run, (block + 1) * pl->block - it->first), p->q.shape[2] - it->first);
    it->list = it->queries > 0 ? list_of(p, pl->list, it->b, it->head, block) : (key_list){NULL, 0, 0};
    it->rows = (int)(it->queries * pl->heads);
    it->panels = (int)dhsa_ceil_div(it->rows, pl->kernels->lanes);
}

/* Row r of an item is query r / heads of head r % heads, so that neighbours in a panel see almost the same keys. If
 * tiles may be left out, it is query r % queries of head r / queries: neighbouring queries of one head agree ten
 * times as often that a tile is negligible. */
static int64_t item_query(const attend_plan *pl, const item *it, int64_t r)
{
    return pl->least ? r % it->queries : r / pl->heads;
}

static int64_t item_head(const attend_plan *pl, const item *it, int64_t r)
{
    return it->head + (pl->least ? r / it->queries : r % pl->heads);
}

static void *item_row(const attend_plan *pl, const item *it, const dhsa_tensor *t, int64_t r)
{
    return dhsa_row(t, it->b, item_head(pl, it, r), it->first + item_query(pl, it, r));
}

/* Finds the entries of the list that each row sees, and the span [*begin, *end) that contains all of them. */
static void find_ranges(const attend_plan *pl, const item *it, attend_scratch *w, int64_t *begin, int64_t *end)
{
    const int64_t padded = (int64_t)it->panels * pl->kernels->lanes;
    *begin = it->list.n;
    *end = 0;
    for (int64_t i = 0; i < it->queries; i++) {
        int64_t start, stop;
        seen(pl->p, &it->list, it->b, it->first + i, &start, &stop);
        if (start < stop) {
            *begin = DHSA_MIN(*begin, start);
            *end = DHSA_MAX(*end, stop);
        }
        for (int64_t h = 0; h < pl->heads; h++) {
            const int64_t r = pl->least ? h * it->queries + i : i * pl->heads + h;
            w->lo[r] = (int32_t)start;
            w->hi[r] = (int32_t)stop;
        }
    }
    /* Padding rows get the range of the last row, so that they do not cause a mask. */
    for (int64_t r = it->rows; r < padded; r++) {
        w->lo[r] = w->lo[it->rows - 1];
        w->hi[r] = w->hi[it->rows - 1];
    }
}

/* Rounds n <= DHSA_PAIR_STEP rows of fp32 to rows of pl->padded numbers, and replaces the pointers. At precision "high"
 * a row of queries is [high, high, low] and a row of keys [high, low, high], so that one product of such rows is the
 * sum of three. */
static void narrow_rows(const attend_plan *pl, attend_scratch *w, const void *const *rows, int n, int keys,
                        const void **to)
{
    const int64_t K = pl->padded / pl->parts;
    for (int i = 0; i < n; i++) {
        uint16_t *row = w->narrow + i * pl->padded;
        const int low = keys ? 1 : 2;
        pl->pair->narrow(rows[i], (int)pl->dim, row, pl->parts == SPLIT ? row + low * K : NULL);
        if (pl->parts == SPLIT) memcpy(row + (SPLIT - low) * K, row, (size_t)K * sizeof *row);
        to[i] = row;
    }
}

static void pack_queries(const attend_plan *pl, const item *it, attend_scratch *w)
{
    const int lanes = pl->kernels->lanes, dim = (int)(pl->parts ? pl->padded : pl->dim);
    for (int at = 0; at < it->panels; at++) {
        const int n = DHSA_MIN(lanes, it->rows - at * lanes);
        const ptrdiff_t first = (ptrdiff_t)at * lanes * pl->padded;
        for (int r = 0; r < n; r++) w->rows[r] = item_row(pl, it, &pl->p->q, at * lanes + r);
        if (pl->parts) narrow_rows(pl, w, w->rows, n, 0, w->rows);
        if (pl->pair)
            pl->pair->pack_panel(w->rows, n, dim, pl->sign < 0, (uint16_t *)w->q + first);
        else
            pl->kernels->pack_panel(w->rows, pl->p->q.dtype, n, dim, pl->sign, (float *)w->q + first);
    }
}

/* The rows of list entries [at, at + n): n keys, then n values. */
static void find_rows(const attend_plan *pl, const item *it, int64_t at, int n, const void **rows)
{
    const dhsa_tensor *const tensors[2] = {&pl->p->k, &pl->p->v};
    for (int which = 0; which < 2; which++, rows += n) {
        const dhsa_tensor *t = tensors[which];
        const char *base = dhsa_row(t, it->b, it->kv_head, 0);
        const int64_t step = dhsa_step(t, 2);
        for (int j = 0; j < n; j++)
            rows[j] = base + (it->list.keys ? it->list.keys[at + j] : it->list.start + at + j) * step;
    }
}

/* Packs the keys of a tile, the first n of `rows`. */
static void pack_keys(const attend_plan *pl, attend_scratch *w, const void *const *rows, int n)
{
    if (pl->parts)
        for (int j = 0; j < n; j += DHSA_PAIR_STEP) { /* whole squares */
            const void *narrow[DHSA_PAIR_STEP];
            const int some = DHSA_MIN(DHSA_PAIR_STEP, n - j);
            narrow_rows(pl, w, rows + j, some, 1, narrow);
            pl->pair->pack_keys(narrow, some, (int)pl->padded, (uint16_t *)w->k + j * pl->padded);
        }
    else if (pl->pair)
        pl->pair->pack_keys(rows, n, (int)pl->dim, w->k);
    else
        pl->kernels->pack_rows(rows, pl->p->k.dtype, n, (int)pl->dim, w->k);
    w->packed = 0;
}

/* The numbers of a packed row of values: the keys of a tile, twice at precision "high", the smaller parts last. */
static ptrdiff_t value_length(const attend_plan *pl, int n)
{
    return dhsa_round_up(n, DHSA_PAIR_STEP) * (pl->parts == SPLIT ? 2 : 1);
}

/* Packs n values of fp32 as bf16. Returns 1 if any element is not finite. */
static int pack_narrow_values(const attend_plan *pl, attend_scratch *w, const void *const *rows, int n)
{
    const ptrdiff_t length = value_length(pl, n);
    const void *high[DHSA_PAIR_STEP], *low[DHSA_PAIR_STEP];
    int poison = 0;
    for (int j = 0; j < n; j += DHSA_PAIR_STEP) {
        const int some = DHSA_MIN(DHSA_PAIR_STEP, n - j), split = pl->parts == SPLIT;
        uint16_t *to = (uint16_t *)w->v + dhsa_square(0, j, length);
        for (int i = 0; i < some; i++) {
            uint16_t *row = w->narrow + i * (1 + split) * pl->v_padded;
            high[i] = row;
            low[i] = row + pl->v_padded;
            pl->pair->narrow(rows[j + i], (int)pl->v_dim, row, split ? row + pl->v_padded : NULL);
        }
        poison |= pl->pair->pack_values(high, some, (int)pl->v_dim, length, to);
        if (split) pl->pair->pack_values(low, some, (int)pl->v_dim, length, to + dhsa_square(0, length / 2, length));
    }
    return poison;
}

/* Packs the values of a tile, the n rows after its keys, unless they are packed already. */
static void pack_values(const attend_plan *pl, attend_scratch *w, const void *const *rows, int n)
{
    if (w->packed) return;
    w->packed = 1;
    w->poison = pl->parts  ? pack_narrow_values(pl, w, rows + n, n)
                : pl->pair ? pl->pair->pack_values(rows + n, n, (int)pl->v_dim, value_length(pl, n), w->v)
                           : pl->kernels->pack_values(rows + n, pl->p->k.dtype, n, (int)pl->v_dim, pl->v_stride, w->v);
}

/* Prepares w->ahead, so that the products of this tile, of n keys, prefetch the rows of the next one, of `next`
 * keys. */
static void attend_look_ahead(const attend_plan *pl, const item *it, attend_scratch *w, const void *const *rows, int n,
                              int next)
{
    const int64_t size = dhsa_dtype_size(pl->p->q.dtype), bytes = pl->dim * size, v_bytes = pl->v_dim * size;
    const int64_t lines = next * (dhsa_ceil_div(bytes, 64) + dhsa_ceil_div(v_bytes, 64));
    const int64_t products = it->panels * n * (pl->dim + pl->v_dim) * DHSA_MAX(pl->parts, 1);
    const char *const *first = (const char *const *)rows;
    w->ahead = (dhsa_ahead){.row = first,
                            .values = first + next,
                            .end = first + 2 * next,
                            .bytes = (int)bytes,
                            .value_bytes = (int)v_bytes};
    w->ahead.rate = dhsa_ceil_div(lines << 20, products);
}

/* Adds the values of the panel before this one. Meanwhile the exponentials of this one may be computed. */
static void add_due(const attend_plan *pl, attend_scratch *w, int n, dhsa_exp_job *meanwhile)
{
    const ptrdiff_t length = value_length(pl, n), stride = length * 16;
    const int count = w->due.count, dim = (int)pl->v_dim;
    w->due.count = 0;
    if (!count) return;
    pl->pair->pv(w->due.p, w->due.v, stride, count, dim, w->due.alpha, w->due.o, &w->ahead, meanwhile);
    if (!w->due.low) return;
    const uint16_t *v_low = w->due.v + dhsa_square(0, length / 2, length);
    pl->pair->pv(w->due.p, v_low, stride, count, dim, w->ones, w->due.o, &w->ahead, meanwhile);
    pl->pair->pv(w->due.low, w->due.v, stride, count, dim, w->ones, w->due.o, &w->ahead, meanwhile);
}

/* Whether, in every row that sees a key (its largest product is not -inf), all probabilities are less than skip
 * times the largest one that the row has met before. */
static int far_below(const attend_plan *pl, const float *top, const float *m, int used)
{
    const float log2e = 1.44269504088896340736f, softcap = (float)pl->p->softcap, factor = pl->factor;
    for (int r = 0; r < used; r++) {
        if (top[r] == -INFINITY) continue;
        const float logit =
            softcap > 0 ? softcap * log2e * tanhf(top[r] * (factor / softcap)) : top[r] * (factor * log2e);
        if (!(logit < m[r] + pl->least)) return 0;
    }
    return 1;
}

/* Whether the products of a panel and `count` keys may be left out. A product that is not finite is never left out,
 * so that it reaches the output. */
static int negligible(const attend_plan *pl, attend_scratch *w, int used, int count, int from, const int32_t *lo,
                      const int32_t *hi, const float *m)
{
    if (!pl->least) return 0;
    w->done++;
    /* For 16-bit products the maxima are known already, and they rule out most tiles. */
    if (pl->pair && !lo && !far_below(pl, w->top, m, used)) return 0;
    float top[DHSA_MAX_LANES];
    pl->kernels->tops(w->s, count, used, from, lo, hi, top);
    if (!far_below(pl, top, m, used)) return 0;
    w->left++;
    return 1;
}

/* One panel, of which `used` rows exist, against the packed tile of list entries [at, at + n), whose rows are
 * `rows`. */
static void attend_panel(const attend_plan *pl, attend_scratch *w, int panel, int used, int64_t at, int n,
                         const void *const *rows)
{
    const dhsa_kernels *kn = pl->kernels;
    const int lanes = kn->lanes, dim = (int)(pl->parts ? pl->padded : pl->dim);
    const int32_t *lo = w->lo + panel * lanes, *hi = w->hi + panel * lanes;
    const dhsa_bounds seen = dhsa_bounds_of(lo, hi, lanes);
    /* Keys that no row of the panel sees are clipped. A mask is needed only if the rows of the panel differ. */
    int64_t from = DHSA_MAX(at, seen.lo_min);
    const int64_t to = DHSA_MIN(at + n, seen.hi_max);
    if (from >= to) return;
    if (pl->pair) from -= (from - at) % DHSA_PAIR_STEP; /* begins at a square */
    const int offset = (int)(from - at), count = (int)(to - from), masked = seen.lo_max > from || seen.hi_min < to;
    const ptrdiff_t first = (ptrdiff_t)panel * lanes;
    float *o = w->o + first * pl->v_padded;
    const float factor = pl->factor, softcap = (float)pl->p->softcap;
    float *m = w->m + first, *l = w->l + first;
    if (!masked) lo = NULL;
    if (pl->pair)
        pl->pair->qk((uint16_t *)w->q + first * pl->padded, (uint16_t *)w->k + (ptrdiff_t)offset * pl->padded, count,
                     dim, w->s, w->top, &w->ahead);
    else
        kn->qk((float *)w->q + first * pl->padded, (float *)w->k + (ptrdiff_t)offset * dim, dim, count, dim, used, w->s,
               &w->ahead);
    if (negligible(pl, w, used, count, (int)from, lo, hi, m)) return;
    pack_values(pl, w, rows, n);
    /* Products of pairs read past the end of a clipped tile, where probabilities are 0 but values may be inf or NaN. */
    const int guarded = w->poison && (masked || (pl->pair && count < n));
    if (pl->pair) {
        if (!guarded) {
            float *alpha = w->alpha + w->turn * lanes;
            uint16_t *p = w->p + w->turn * pl->tile * lanes;
            uint16_t *low = pl->parts == SPLIT ? p + 2 * pl->tile * lanes : NULL;
            pl->pair->softmax(w->s, w->top, count, (int)from, lo, hi, factor, softcap, m, l, alpha, p, low, &w->job);
            add_due(pl, w, n, &w->job);
            pl->pair->exp(&w->job);
            w->due.count = count;
            w->due.p = p;
            w->due.low = low;
            w->due.v = (uint16_t *)w->v + dhsa_square(0, offset, value_length(pl, n));
            w->due.alpha = alpha;
            w->due.o = o;
            w->turn = !w->turn; /* not panel % 2: panels that see no key of the tile are skipped */
            return;
        }
        add_due(pl, w, n, NULL); /* its alpha may lie where the softmax below writes */
    }
    kn->softmax(w->s, count, used, (int)from, lo, hi, factor, softcap, m, l, w->alpha);
    if (guarded)
        pv_guarded(pl, w, rows, offset, n, count, (int)from, w->lo + panel * lanes, hi, o);
    else
        kn->pv(w->s, (float *)w->v + (ptrdiff_t)offset * kn->value_step, pl->v_stride, count, (int)pl->v_dim, used,
               w->alpha, o, &w->ahead);
}

static void store(const attend_plan *pl, const item *it, attend_scratch *w)
{
    const dhsa_problem *p = pl->p;
    const int lanes = pl->kernels->lanes, dim = (int)pl->v_dim;
    const int64_t H = p->q.shape[1], q_len = p->q.shape[2];
    for (int r = 0; p->lse && r < it->rows; r++) {
        const int64_t head = item_head(pl, it, r), i = it->first + item_query(pl, it, r);
        /* m is in units of log2. If no key was seen, l is 0 and lse is -inf. */
        p->lse[(it->b * H + head) * q_len + i] =
            w->l[r] == 0 ? -INFINITY : (float)(w->m[r] * 0.693147180559945309 + log(w->l[r]));
    }
    /* Factors of the output. If no key was seen, the output is zeros. */
    for (int r = 0; r < it->panels * lanes; r++) w->l[r] = w->l[r] == 0 ? 0 : 1 / w->l[r];
    for (int at = 0; at < it->panels; at++) {
        const int n = DHSA_MIN(lanes, it->rows - at * lanes);
        for (int r = 0; r < n; r++) w->rows[r] = item_row(pl, it, &p->out, at * lanes + r);
        pl->kernels->store_panel(w->o + (ptrdiff_t)at * lanes * pl->v_padded, w->l + at * lanes, n, dim, p->out.dtype,
                                 (void *const *)w->rows);
    }
}

/* The logit, in units of log2, that the softmax of a row begins with. */
static float sink_of(const attend_plan *pl, const item *it, int64_t r)
{
    return pl->p->sinks && r < it->rows ? pl->p->sinks[item_head(pl, it, r)] * 1.44269504088896340736f : -INFINITY;
}

static void attend_task(void *context, int64_t index, int thread)
{
    const attend_plan *pl = context;
    attend_scratch w;
    item it;
    int64_t begin, end;
    find_item(pl, index, &it);
    if (it.queries <= 0) return; /* a short last block has fewer runs */
    attend_lay_out(pl, pl->arenas + thread * pl->arena_size, &w);
    const int64_t rows = (int64_t)it.panels * pl->kernels->lanes;
    memset(w.o, 0, (size_t)(rows * pl->v_padded) * sizeof *w.o);
    for (int64_t r = 0; r < rows; r++) {
        w.m[r] = sink_of(pl, &it, r);
        w.l[r] = w.m[r] == -INFINITY ? 0 : 1;
    }
    for (int r = 0; r < pl->kernels->lanes; r++) w.ones[r] = 1;
    w.due.count = w.turn = 0;
    w.done = w.left = 0;
    if (pl->pair) pl->pair->begin();
    pack_queries(pl, &it, &w);
    find_ranges(pl, &it, &w, &begin, &end);
    const void **now = w.rows, **next_rows = w.rows + 2 * pl->tile;
    if (begin < end) find_rows(pl, &it, begin, (int)DHSA_MIN(pl->tile, end - begin), now);
    for (int64_t at = begin; at < end; at += pl->tile) {
        const int n = (int)DHSA_MIN(pl->tile, end - at), next = (int)DHSA_MAX(DHSA_MIN(pl->tile, end - at - n), 0);
        pack_keys(pl, &w, now, n);
        if (!pl->least) pack_values(pl, &w, now, n);
        find_rows(pl, &it, at + n, next, next_rows);
        attend_look_ahead(pl, &it, &w, next_rows, n, next);
        for (int panel = 0; panel < it.panels; panel++)
            attend_panel(pl, &w, panel, DHSA_MIN(pl->kernels->lanes, it.rows - panel * pl->kernels->lanes), at, n, now);
        if (pl->pair) add_due(pl, &w, n, NULL);
        const void **swap = now;
        now = next_rows;
        next_rows = swap;
    }
    if (pl->pair) pl->pair->end();
    store(pl, &it, &w);
    if (w.done) {
        atomic_fetch_add_explicit(pl->done, w.done, memory_order_relaxed);
        atomic_fetch_add_explicit(pl->left, w.left, memory_order_relaxed);
    }
}

dhsa_status dhsa_attend_checked(const dhsa_problem *p, const dhsa_selection *list, dhsa_error *error)
{
    if (dhsa_decodes(p, list)) return dhsa_decode(p, list, error);
    const dhsa_kernels *current = dhsa_kernels_current();
    attend_plan pl = {.p = p, .list = list, .kernels = dhsa_kernels_for(current, p->q.dtype)};
    const int64_t B = p->q.shape[0], H = p->q.shape[1], q_len = p->q.shape[2], dim = p->q.shape[3];
    attend_scratch unused;
    _Atomic int64_t done = 0, left = 0;
    pl.done = &done;
    pl.left = &left;
    pl.least = p->skip ? (float)log2(p->skip) : 0;
    pl.v_dim = p->v.shape[3];
    pl.heads = heads_of(p, list);
    pl.head_sets = H / pl.heads;
    pl.block = list ? DHSA_MIN(list->query_block, q_len) : q_len;
    pl.blocks = dhsa_ceil_div(q_len, pl.block);
    pl.pair = dhsa_pair_products(pl.kernels, p->q.dtype);
    if (p->q.dtype == DHSA_F32 && p->precision && current->precisions >> p->precision & 1) {
        pl.kernels = current;
        pl.pair = current->bf16;
        pl.parts = p->precision == DHSA_PRECISION_HIGH ? SPLIT : 1;
    }
    /* The division into items depends on the shape and the tier only, never on the number of threads. Under a
     * window, the tiles of an item begin at the first key of its first query. There the division does not depend on
     * the batch either, so that a row has the same bits as alone. */
    const int64_t fair =
                      dhsa_ceil_div(q_len * pl.head_sets * (p->window ? 1 : B), pl.pair ? MIN_ITEMS_PAIRS : MIN_ITEMS),
                  most =
                      DHSA_MAX((dim + pl.v_dim > WIDE ? MAX_ROWS * WIDE / (dim + pl.v_dim) : MAX_ROWS) / pl.heads, 1);
    const int64_t least = dhsa_ceil_div(pl.kernels->lanes, pl.heads);
    pl.run = DHSA_MIN(pl.block, DHSA_MAX(least, DHSA_MIN(most, dhsa_round_up(fair, least))));
    pl.runs = dhsa_ceil_div(pl.block, pl.run);
    pl.panels = (int)dhsa_ceil_div(pl.run * pl.heads, pl.kernels->lanes);
    pl.dim = dim;
    pl.tile = pl.pair && pl.parts != SPLIT ? TILE_PAIRS : TILE;
    pl.padded = dhsa_round_up(dim, pl.pair ? DHSA_PAIR_STEP : pl.kernels->value_step) * DHSA_MAX(pl.parts, 1);
    pl.v_padded = dhsa_round_up(pl.v_dim, pl.pair ? DHSA_PAIR_STEP : pl.kernels->value_step);
    /* Not a power of two; else the writes of a row to all strips would share a few cache lines. */
    pl.v_stride = (pl.tile + 2) * pl.kernels->value_step;
    /* The sign of the scale is applied to the queries, so that the largest product gives the largest logit. */
    pl.factor = (float)fabs(p->scale);
    pl.sign = p->scale < 0 ? -1.0f : 1.0f;
    const int64_t items = pl.blocks * pl.runs * B * pl.head_sets;
    const int threads = (int)DHSA_MIN(items, p->num_threads);
    pl.arena_size = attend_lay_out(&pl, NULL, &unused);
    pl.arenas = dhsa_alloc(pl.arena_size, threads);
    if (!pl.arenas)
        return dhsa_fail(error, DHSA_ERR_NO_MEMORY, "attention: no memory for %d workspaces of %lld bytes", threads,
                         (long long)pl.arena_size);
    dhsa_parallel(items, threads, attend_task, &pl);
    dhsa_free(pl.arenas);
    if (p->skip_counts) {
        p->skip_counts[0] += done;
        p->skip_counts[1] += left;
    }
    return DHSA_OK;
}

dhsa_status dhsa_attend_dense(const dhsa_problem *problem, dhsa_error *error)
{
    const dhsa_status status = dhsa_problem_check(problem, error);
    return status ? status : dhsa_attend_checked(problem, NULL, error);
}

dhsa_status dhsa_attend_sparse(const dhsa_problem *problem, const dhsa_selection *s, dhsa_error *error)
{
    dhsa_status status = dhsa_problem_check(problem, error);
    if (status) return status;
    const dhsa_tensor *q = &problem->q, *k = &problem->k;
    int64_t rows;
    if (!s) return dhsa_check_pointer(s, "selection", error);
    if (!dhsa_mul(s->batch, s->heads, &rows) || !dhsa_mul(rows, s->nq, &rows) || rows == INT64_MAX) rows = -1;
    /* The number of indices is the last entry of indptr, which is read after the shape has been checked. */
    status =
        dhsa_selection_check(s, rows + 1, -1, q->shape[0], q->shape[1], k->shape[1], q->shape[2], k->shape[2], error);
    return status ? status : dhsa_attend_checked(problem, s, error);
}
