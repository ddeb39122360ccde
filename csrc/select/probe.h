/* probe.h: rows of queries against keys, a tile at a time: products, softmax, and what a method makes of the probabilities.
 * What the rows and keys are (single ones, means, groups of neighbours) is decided by the method, which lends functions. */
#ifndef DHSA_PROBE_H
#define DHSA_PROBE_H

#include "select/selector.h"

/* What becomes of the probabilities. All but TWICE take one pass over the keys and keep numbers relative to the maximum of
 * their time, which is made good once the sums are known. */
typedef enum {
    DHSA_PROBE_KEYS,  /* each is kept: for few keys */
    DHSA_PROBE_SUMS,  /* their sums over blocks of keys are kept, */
    DHSA_PROBE_TOPS,  /* or the largest of each block */
    DHSA_PROBE_TWICE, /* nothing is kept: they are computed anew when the sums are known */
} dhsa_probe_way;

enum { DHSA_PROBE_TILE = 128 /* keys of a tile at most: its products stay in L1 */ };

typedef struct {
    const dhsa_kernels *kernels;
    const dhsa_pair_kernels *pair; /* NULL: products are fp32; else rows and keys are packed for it, by the method */
    dhsa_probe_way way;
    int64_t dim;        /* numbers of a row and of a key */
    int64_t key_block;  /* SUMS, TOPS: keys of a block, which begins at a multiple of it */
    int64_t tile;       /* keys of a tile at most */
    int64_t tiles;      /* of a run over all keys, at most */
    int64_t part_rows;  /* numbers kept for a lane */
    int64_t panels;     /* worked on at a time */
    int64_t arena_size; /* bytes: what a run works in */
} dhsa_probe;

/* A run: `rows` rows against keys [from, to). Logits are cap(scale * product), scale >= 0. The functions below serve as pack and
 * keys where rows are single queries, dhsa_mean_queries_pack (coarse.h) where they are means. */
typedef struct dhsa_probe_run {
    int64_t rows, from, to;
    float scale, softcap; /* 0: none */
    void *of;             /* handed to the functions */
    /* Packs rows [first, first + n), n <= lanes, and says which keys [lo, hi) each sees: not needed if it is all of them. */
    void (*pack)(void *of, int64_t first, int n, float *panel, int32_t *lo, int32_t *hi);
    /* Keys [first, first + n) as fp32 numbers, *stride from one to the next: where they lie, or in tile [n * dim]. */
    const float *(*keys)(void *of, int64_t first, int n, float *tile, ptrdiff_t *stride);
    /* p[j * lanes + r] * weight[r] is the probability of key first + j for row `row` + r, j < n; with SUMS and TOPS n is 1 and
     * first lies in the block. A row of weight 0 says nothing, whatever p holds: it saw no key, or its logits have a NaN or +inf.
     * NULL: they go to `score`. */
    void (*visit)(void *of, int64_t row, int64_t first, int n, const float *p, const float *weight);
    /* Where visit is NULL, [c] of key c, with SUMS and TOPS of block c: probabilities of all rows are added to it, with TOPS the
     * largest is kept. */
    float *score;
} dhsa_probe_run;

/* Sizes a probe of at most `rows` rows and keys [0, keys). */
void dhsa_probe_plan(dhsa_probe *probe, dhsa_probe_way way, int64_t rows, int64_t keys, int64_t dim, int64_t key_block);
/* The same for TWICE and rows and keys of a dtype, whose own products it takes where the tier has some. Keys that no row sees may
 * then be among those handed on, with probabilities of 0. */
void dhsa_probe_plan_as(dhsa_probe *probe, dhsa_dtype dtype, int64_t rows, int64_t keys, int64_t dim);
/* Runs it; arena aligned to DHSA_ALIGN. */
void dhsa_probe_do(const dhsa_probe *probe, const dhsa_probe_run *run, char *arena);

/* Rows that are single queries and the keys that they see: row r is query `query` + r / heads of head `head` + r % heads, and all
 * of these heads read one KV head. What `of` points to begins with it where the two functions serve a run. */
typedef struct {
    const dhsa_probe *probe;
    const dhsa_tensor *q, *k;
    int64_t b, window; /* the batch item; 0: no window */
    int negate;        /* the scale is negative */
    int64_t head, heads, query;
} dhsa_probe_queries;
void dhsa_probe_pack_queries(void *of, int64_t first, int n, float *panel, int32_t *lo, int32_t *hi);
const float *dhsa_probe_read_keys(void *of, int64_t first, int n, float *tile, ptrdiff_t *stride);
/* n keys of a KV head as fp32 numbers, `step` apart, from key `at` on: where they lie, or in tile. */
const float *dhsa_probe_load_keys(const dhsa_kernels *kernels, const dhsa_tensor *k, int64_t b, int64_t kv_head, int64_t at,
                                  int64_t step, int n, float *tile, ptrdiff_t *stride);

/* The sign of a scale, which goes into the rows so that the largest product stays the largest logit. */
static inline float dhsa_probe_sign(const dhsa_selector *s) { return s->config->score.scale < 0 ? -1.0f : 1.0f; }
/* Queries of the selector's batch item, from `query` on; the heads are to be set. */
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
/* A run with the scale and softcap of a selector, from which pack, keys and what they work on are still missing. */
static inline dhsa_probe_run dhsa_probe_start(const dhsa_selector *s, int64_t rows, int64_t from, int64_t to)
{
    return (dhsa_probe_run){.rows = rows,
                            .from = from,
                            .to = to,
                            .scale = (float)(s->config->score.scale * dhsa_probe_sign(s)),
                            .softcap = (float)s->config->score.softcap};
}
/* Positions of a block's queries: first one and end. */
static inline dhsa_span dhsa_block_queries(const dhsa_selector *s, int64_t block)
{
    const int64_t from = block * s->config->score.query_block;
    return (dhsa_span){from, DHSA_MIN(from + s->config->score.query_block, s->q->shape[2])};
}

#endif
