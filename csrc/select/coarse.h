/* coarse.h: scores of key blocks: the mean queries of a query block against the mean keys of fixed blocks. The method
 * hisa filters key blocks by them. The method proxy decides by them how many keys each head takes. */
#ifndef DHSA_COARSE_H
#define DHSA_COARSE_H

#include "chunk/chunk.h"
#include "select/probe.h"

/* Rows of a probe that are means of `run` neighbouring queries of a query block: row r is mean r / heads of head `head`
 * + r % heads. In a run whose `pack` is dhsa_mean_queries_pack, `of` points to a struct that begins with this one. */
typedef struct {
    const dhsa_selector *s;
    const dhsa_kernels *kernels; /* of the probe */
    dhsa_span queries;
    int64_t run, head, heads;
    float *rows; /* [DHSA_MAX_LANES, dim]: scratch */
} dhsa_mean_queries;

static inline int64_t dhsa_mean_queries_count(const dhsa_mean_queries *m)
{
    return dhsa_ceil_div(m->queries.end - m->queries.lo, m->run) * m->heads;
}
void dhsa_mean_queries_pack(void *of, int64_t first, int n, float *panel, int32_t *lo, int32_t *hi);

/* Mean keys of the fixed key blocks of a selector. */
typedef struct {
    dhsa_chunks chunks;
    int32_t *edges;
} dhsa_block_means;

/* Returns 0 if there is no memory. close must be called in either case. */
int dhsa_block_means_open(dhsa_block_means *m, const dhsa_selector *s);
void dhsa_block_means_close(dhsa_block_means *m);
/* Computes the means for the current batch item of the selector, in parallel. */
void dhsa_block_means_begin(dhsa_block_means *m, const dhsa_selector *s);
/* Returns the mean of key block u of a KV head, over its keys below `end` only. *good says whether it is finite. If
 * `end` cuts the block, the mean is computed in cut [dim], with sum [dim] as scratch. */
const float *dhsa_block_mean(const dhsa_block_means *m, const dhsa_selector *s, int64_t kv_head, int64_t u, int64_t end,
                             float *cut, float *sum, int *good);

typedef struct {
    dhsa_probe probe;
    dhsa_block_means means;
    int64_t run;        /* queries of a mean query */
    int64_t arena_size; /* bytes of scratch that scoring needs */
} dhsa_coarse;

/* Returns the edges 0, key_block, ..., length, to be freed with dhsa_free; NULL if there is no memory. */
int32_t *dhsa_block_edges(int64_t length, int64_t key_block);
/* Returns 0 if there is no memory. close must be called in either case. */
int dhsa_coarse_open(dhsa_coarse *c, const dhsa_selector *s, int64_t run);
void dhsa_coarse_close(dhsa_coarse *c);
/* Writes score[u] of each key block u with a candidate: the probabilities of the mean queries over the mean keys,
 * summed over the mean queries of all heads of the set. A key block that reaches past span.end is cut there. */
void dhsa_coarse_score(const dhsa_coarse *c, const dhsa_selector *s, int64_t set, int64_t block, dhsa_span span,
                       char *arena, float *score);

#endif
