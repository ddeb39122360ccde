/* coarse.h: mean queries of a block's queries against the mean keys of fixed blocks: what hisa filters by and proxy asks for the
 * budget of a head. */
#ifndef DHSA_COARSE_H
#define DHSA_COARSE_H

#include "chunk/chunk.h"
#include "select/probe.h"

/* Rows of a probe that are means of `run` neighbouring queries of a block: row r is mean r / heads of head head + r % heads. What
 * `of` points to begins with it where dhsa_mean_queries_pack serves a run. */
typedef struct {
    const dhsa_selector *s;
    const dhsa_kernels *kernels; /* the probe's */
    dhsa_span queries;
    int64_t run, head, heads;
    float *rows; /* [DHSA_MAX_LANES, dim] to work in */
} dhsa_mean_queries;

static inline int64_t dhsa_mean_queries_count(const dhsa_mean_queries *m)
{
    return dhsa_ceil_div(m->queries.end - m->queries.lo, m->run) * m->heads;
}
void dhsa_mean_queries_pack(void *of, int64_t first, int n, float *panel, int32_t *lo, int32_t *hi);

/* Mean keys of the fixed blocks of a selector. */
typedef struct {
    dhsa_chunks chunks;
    int32_t *edges;
} dhsa_block_means;

/* Returns 0 if there is no memory. close in any case. */
int dhsa_block_means_open(dhsa_block_means *m, const dhsa_selector *s);
void dhsa_block_means_close(dhsa_block_means *m);
/* Turns to the selector's batch item, in parallel. */
void dhsa_block_means_begin(dhsa_block_means *m, const dhsa_selector *s);
/* The mean of block u of a KV head, of its keys below `end` only; *good: whether it is finite. To `cut` [dim] where the block is
 * cut, with `sum` [dim] to work in. */
const float *dhsa_block_mean(const dhsa_block_means *m, const dhsa_selector *s, int64_t kv_head, int64_t u, int64_t end, float *cut,
                             float *sum, int *good);

typedef struct {
    dhsa_probe probe;
    dhsa_block_means means;
    int64_t run;        /* queries of a mean query */
    int64_t arena_size; /* bytes: what scoring works in */
} dhsa_coarse;

/* Edges 0, key_block, ..., length; NULL if there is no memory. dhsa_free. */
int32_t *dhsa_block_edges(int64_t length, int64_t key_block);
/* Returns 0 if there is no memory. close in any case. */
int dhsa_coarse_open(dhsa_coarse *c, const dhsa_selector *s, int64_t run);
void dhsa_coarse_close(dhsa_coarse *c);
/* score[u] of each key block u with a candidate: probabilities of the mean queries over their mean keys, summed over rows and the
 * heads of the set. A block that straddles the end is cut there. */
void dhsa_coarse_score(const dhsa_coarse *c, const dhsa_selector *s, int64_t set, int64_t block, dhsa_span span, char *arena,
                       float *score);

#endif
