/* coarse.h: mean rows of a block's queries against the mean keys of fixed blocks: what hisa filters by and proxy asks for the
 * budget of a head. */
#ifndef DHSA_COARSE_H
#define DHSA_COARSE_H

#include "chunk/chunk.h"
#include "select/probe.h"

/* Rows [first, first + n) of a probe are means of `run` neighbouring queries of a block: row r is mean r / heads of head
 * head + r % heads. */
typedef struct {
    const dhsa_selector *s;
    dhsa_span queries;
    int64_t run, head, heads;
    float *rows; /* [DHSA_MAX_LANES, dim] to work in */
} dhsa_mean_rows;

static inline int64_t dhsa_mean_rows_count(const dhsa_mean_rows *m)
{
    return dhsa_ceil_div(m->queries.end - m->queries.lo, m->run) * m->heads;
}
void dhsa_mean_rows_pack(const dhsa_mean_rows *m, const dhsa_kernels *kernels, int64_t first, int n, float *panel);

typedef struct {
    dhsa_probe probe;
    dhsa_chunks means;
    int32_t *edges;     /* of the key blocks */
    int64_t run;        /* queries of a mean row */
    int64_t arena_size; /* bytes: what scoring works in */
} dhsa_coarse;

/* Edges 0, key_block, ..., length; NULL if there is no memory. dhsa_free. */
int32_t *dhsa_block_edges(int64_t length, int64_t key_block);
/* Returns 0 if there is no memory. close in any case. */
int dhsa_coarse_open(dhsa_coarse *c, const dhsa_selector *s, int64_t run);
void dhsa_coarse_close(dhsa_coarse *c);
/* Turns to the selector's batch row: means, in parallel. */
void dhsa_coarse_begin(dhsa_coarse *c, const dhsa_selector *s);
/* score[u] of each key block u with a candidate: probabilities of the mean rows over their mean keys, summed over rows and the
 * heads of the set. A block that straddles the end is cut there. */
void dhsa_coarse_score(const dhsa_coarse *c, const dhsa_selector *s, int64_t set, int64_t block, dhsa_span span, char *arena,
                       float *score);

#endif
