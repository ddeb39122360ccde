/* select.h: what the files of select/ share: which keys are a block's candidates, chunk means, and the scorer of one
 * (head set, query block). Private to the core; the public entries are in dhsa.h. */
#ifndef DHSA_SELECT_H
#define DHSA_SELECT_H

#include "core/internal.h"

/* Keys [lo, end) of one query block. */
typedef struct {
    int64_t lo, end;
} dhsa_span;

/* The candidates: up to the block's nominal end (capped by Lk), and in a window layer from the union of its queries'
 * windows on (rows) or from the nominal end minus the window (block), but never above the block's own first position. */
dhsa_span dhsa_span_candidates(const dhsa_score_config *config, int64_t q_len, int64_t k_len, int64_t block);
/* Whether a block sees every visible key: it ends within the budget, its windows do, or it is part of the dense tail.
 * *span receives the keys it may see: the union of its queries' windows if exact, else the candidates. */
int dhsa_span_exact(const dhsa_select_config *config, int64_t q_len, int64_t k_len, int64_t block, dhsa_span *span);

dhsa_status dhsa_score_check(const dhsa_tensor *q, const dhsa_tensor *k, const dhsa_score_config *config, dhsa_error *error);
dhsa_status dhsa_select_check(const dhsa_tensor *q, const dhsa_tensor *k, const dhsa_select_config *config, dhsa_error *error);
/* Rows [batch, n]: from 0, never falling, ending in length. */
dhsa_status dhsa_boundaries_check(const int32_t *boundaries, int64_t batch, int64_t n, int64_t length, dhsa_error *error);
/* Sharing sets: 1, Hkv or H. */
int64_t dhsa_score_sets(const dhsa_score_config *config, const dhsa_tensor *q, const dhsa_tensor *k);
static inline int64_t dhsa_block_count(const dhsa_score_config *config, int64_t q_len)
{
    return dhsa_ceil_div(q_len, config->query_block);
}

/* ---- chunk means of one batch row ---------------------------------------------------------------------------- */

enum { DHSA_CHUNK_GOOD = 0, DHSA_CHUNK_BAD /* its mean is not finite */, DHSA_CHUNK_EMPTY };

typedef struct {
    const int32_t *edges; /* [chunks + 1], without the padding */
    int64_t chunks;
    float *means;         /* [kv_heads, chunks, dim]; zeros where the state is not good */
    unsigned char *state; /* [kv_heads, chunks] */
} dhsa_chunks;

int dhsa_all_finite(const dhsa_kernels *kernels, const float *x, int64_t n);
/* Mean of keys [from, to) of one KV head into mean [dim] (sum: scratch [dim]). Returns 0 if it is not finite; mean is zeros then.
 */
int dhsa_chunk_mean(const dhsa_kernels *kernels, const dhsa_tensor *k, int64_t b, int64_t kv_head, int64_t from, int64_t to,
                    float *mean, float *sum);
/* Fills chunks->means and ->state for batch row b of k. scratch: num_threads times dim floats. */
void dhsa_chunks_fill(const dhsa_kernels *kernels, const dhsa_tensor *k, int64_t b, dhsa_chunks *chunks, float *scratch,
                      int num_threads);

/* ---- scoring ------------------------------------------------------------------------------------------------- */

typedef struct {
    const dhsa_kernels *kernels;
    const dhsa_tensor *q, *k;
    const dhsa_score_config *config;
    int64_t b, sets, blocks;
    int num_threads;
    dhsa_chunks chunks;
    int64_t step;         /* queries of a mean row */
    int64_t heads_per_kv; /* query heads of a set that share a KV head */
    int64_t kv_per_set;
    int panels;                                   /* panels of rows worked on at a time */
    int64_t panel_size, product_size, arena_size; /* floats */
    float *arenas;
} dhsa_scorer;

/* Allocates for boundaries rows of n_boundaries entries. Arguments have been checked. */
dhsa_status dhsa_scorer_open(dhsa_scorer *s, const dhsa_tensor *q, const dhsa_tensor *k, const dhsa_score_config *config,
                             int64_t n_boundaries, int num_threads, dhsa_error *error);
void dhsa_scorer_close(dhsa_scorer *s);
/* Turns to batch row b: chunk means, in parallel. */
void dhsa_scorer_begin(dhsa_scorer *s, int64_t b, const int32_t *boundaries, int64_t n_boundaries);
/* Scores of the chunks [*first, *last) that hold candidates of one block, into score[*first .. *last). Never NaN;
 * empty chunks -inf, chunks without a finite mean +inf. To be called from within a task of `thread`. */
void dhsa_scorer_run(const dhsa_scorer *s, int64_t set, int64_t block, int thread, float *score, int64_t *first, int64_t *last);

#endif
