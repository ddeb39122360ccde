/* probe.h: rows of queries against keys, one tile at a time: products, softmax, and the use of the probabilities. What
 * a row and a key are (a single one, a mean, a group of neighbours) is decided by the method through callbacks. */
#ifndef DHSA_PROBE_H
#define DHSA_PROBE_H

#include "select/selector.h"

/* What is done with the probabilities. All but TWICE take one pass over the keys and keep values relative to the
 * maximum so far, which are rescaled once the sums are known. */
typedef enum {
    DHSA_PROBE_KEYS,  /* each probability is kept: for few keys */
    DHSA_PROBE_SUMS,  /* their sum over each key block is kept */
    DHSA_PROBE_TOPS,  /* the largest of each key block is kept */
    DHSA_PROBE_TWICE, /* nothing is kept: they are computed again when the sums are known */
} dhsa_probe_way;

enum { DHSA_PROBE_TILE = 128 /* keys of a tile at most: its products stay in L1 */ };

typedef struct {
    const dhsa_kernels *kernels;
    const dhsa_pair_kernels *pair; /* NULL: products are fp32; else the method packs rows and keys for it */
    dhsa_probe_way way;
    int64_t dim;        /* elements of a row and of a key */
    int64_t key_block;  /* SUMS, TOPS: keys of a key block, which begins at a multiple of it */
    int64_t tile;       /* keys of a tile, at most */
    int64_t tiles;      /* tiles of a run over all keys, at most */
    int64_t part_rows;  /* values kept for each row */
    int64_t panels;     /* panels worked on at a time, at most */
    int64_t arena_size; /* bytes of scratch that a run needs */
} dhsa_probe;

/* A run: `rows` rows against keys [from, to). Logits are cap(scale * product), scale >= 0. Where rows are single
 * queries, pack and keys are dhsa_probe_pack_queries and dhsa_probe_read_keys; where they are means, pack is
 * dhsa_mean_queries_pack (coarse.h). */
typedef struct dhsa_probe_run {
    int64_t rows, from, to;
    float scale, softcap; /* 0: none */
    void *of;             /* the first argument of the functions */
    /* Packs rows [first, first + n), n <= lanes. If a row does not see all keys of the run, it also sets the keys
     * [lo[r], hi[r]) that the row sees. */
    void (*pack)(void *of, int64_t first, int n, float *panel, int32_t *lo, int32_t *hi);
    /* Returns keys [first, first + n) as fp32 values, *stride from one to the next: in place, or copied to tile [n *
     * dim]. */
    const float *(*keys)(void *of, int64_t first, int n, float *tile, ptrdiff_t *stride);
    /* p[j * lanes + r] * weight[r] is the probability of key first + j for row `row` + r, j < n; with SUMS and TOPS n
     * is 1 and first lies in the key block. A row of weight 0 does not count, whatever p holds: it saw no key, or its
     * logits have a NaN or +inf. NULL: the probabilities are added to `score`. */
    void (*visit)(void *of, int64_t row, int64_t first, int n, const float *p, const float *weight);
    /* Used where visit is NULL: [c] belongs to key c, with SUMS and TOPS to key block c. The probabilities of all rows
     * are added to it; with TOPS it becomes the largest of them. */
    float *score;
} dhsa_probe_run;

/* Sizes a probe for at most `rows` rows and keys [0, keys). */
void dhsa_probe_plan(dhsa_probe *probe, dhsa_probe_way way, int64_t rows, int64_t keys, int64_t dim, int64_t key_block);
/* The same for TWICE and for rows and keys of `dtype`, with products of that dtype where the tier has them. Then keys
 * that no row sees may be passed to visit too, with probabilities of 0. */
void dhsa_probe_plan_as(dhsa_probe *probe, dhsa_dtype dtype, int64_t rows, int64_t keys, int64_t dim);
/* Does a run. arena must be aligned to DHSA_ALIGN. */
void dhsa_probe_do(const dhsa_probe *probe, const dhsa_probe_run *run, char *arena);

/* Rows that are single queries and the keys that they see: row r is query `query` + r / heads of head `head` + r %
 * heads, and all of these heads read one KV head. In a run with the two functions below, `of` points to a struct that
 * begins with this one. */
typedef struct {
    const dhsa_probe *probe;
    const dhsa_tensor *q, *k;
    int64_t b, window; /* the batch item; 0: no window */
    int negate;        /* the scale is negative */
    int64_t head, heads, query;
} dhsa_probe_queries;
void dhsa_probe_pack_queries(void *of, int64_t first, int n, float *panel, int32_t *lo, int32_t *hi);
const float *dhsa_probe_read_keys(void *of, int64_t first, int n, float *tile, ptrdiff_t *stride);
/* Returns n keys of a KV head as fp32 values, `step` apart, from key `at` on: in place, or copied to tile. */
const float *dhsa_probe_load_keys(const dhsa_kernels *kernels, const dhsa_tensor *k, int64_t b, int64_t kv_head,
                                  int64_t at, int64_t step, int n, float *tile, ptrdiff_t *stride);

/* The sign of the scale. The rows are multiplied by it, so that the largest product is the largest logit. */
static inline float dhsa_probe_sign(const dhsa_selector *s) { return s->config->score.scale < 0 ? -1.0f : 1.0f; }
/* Queries of the current batch item of the selector, from `query` on. The caller sets `head`. */
static inline dhsa_probe_queries dhsa_selector_queries(const dhsa_selector *s, const dhsa_probe *probe, int64_t heads,
                                                       int64_t query)
{
    return (dhsa_probe_queries){.probe = probe,
                                .q = s->q,
                                .k = s->k,
                                .b = s->b,
                                .window = s->config->score.window,
                                .negate = s->config->score.scale < 0,
                                .heads = heads,
                                .query = query};
}
/* A run with the scale and softcap of a selector. The caller sets of, pack, keys, and visit or score. */
static inline dhsa_probe_run dhsa_probe_start(const dhsa_selector *s, int64_t rows, int64_t from, int64_t to)
{
    return (dhsa_probe_run){.rows = rows,
                            .from = from,
                            .to = to,
                            .scale = (float)(s->config->score.scale * dhsa_probe_sign(s)),
                            .softcap = (float)s->config->score.softcap};
}
/* The queries [lo, end) of a query block. */
static inline dhsa_span dhsa_block_queries(const dhsa_selector *s, int64_t block)
{
    const int64_t from = block * s->config->score.query_block;
    return (dhsa_span){.lo = from, .end = DHSA_MIN(from + s->config->score.query_block, s->q->shape[2])};
}

#endif
