/* scorer.h: the scores of chunks for one block of queries and one set of heads: row scores (row_scores.c) and the paper's scores of
 * mean queries (mean_scores.c). Private to the core. */
#ifndef DHSA_SCORER_H
#define DHSA_SCORER_H

#include "chunk/key_index.h"
#include "select/span.h"

typedef struct {
    const dhsa_kernels *kernels;
    const dhsa_pair_kernels *bf16; /* NULL: products are fp32 */
    const dhsa_tensor *q, *k;
    const dhsa_score_config *config;
    int64_t b, head_sets, blocks;
    dhsa_chunks chunks;
    dhsa_key_index *const *key_indexes; /* [batch] that keep the means, at `level`; NULL: the scorer has means of its own */
    int level;
    int64_t capacity;     /* chunks, padding included */
    int64_t most;         /* chunks that are scored for one block, at most: whole groups */
    int64_t step;         /* queries of a mean query */
    int64_t heads_per_kv; /* query heads of a set that share a KV head */
    int64_t kv_per_set;
    int panels;         /* panels of rows worked on at a time, at most */
    int64_t arena_size; /* bytes that a thread works in, which the caller lends: a multiple of DHSA_ALIGN */
} dhsa_scorer;

/* One block against chunks [first, first + n): what the two scores have in common. */
typedef struct {
    int64_t set, from, to; /* queries [from, to) */
    int64_t first, n;
    int64_t cut_end; /* rows: the last chunk is cut here; 0: it is not */
    /* rows: only chunks of these groups take part, ascending; and the cut one. NULL: all. Group g: chunks from g *
     * DHSA_CHUNK_GROUP on. */
    const int32_t *groups;
    int64_t n_groups;
} dhsa_block_job;

/* Allocates the means for boundaries rows of n_boundaries entries, unless key_indexes (may be NULL) keep them, at `level`. rounded:
 * row scores of means in bf16, whatever the input. Arguments have been checked. */
dhsa_status dhsa_scorer_open(dhsa_scorer *s, const dhsa_tensor *q, const dhsa_tensor *k, const dhsa_score_config *config,
                             int64_t n_boundaries, int rounded, dhsa_key_index *const *key_indexes, int level, dhsa_error *error);
void dhsa_scorer_close(dhsa_scorer *s);
/* Turns to batch item b and its boundaries: chunk means, in parallel. Thread t works at arenas + t * stride. */
dhsa_status dhsa_scorer_begin(dhsa_scorer *s, int64_t b, const int32_t *boundaries, int64_t n_boundaries, char *arenas,
                              int64_t stride, int num_threads, dhsa_error *error);
/* Scores of the chunks [*first, *last) that hold candidates of one block, into score[*first .. *last). Never NaN;
 * empty chunks -inf, chunks without a finite mean +inf. groups: NULL, or [n_groups]: chunks of others score
 * -inf. mass: NULL, or alike the sums of probabilities (row scores only), 0 for chunks that are not finite scored. */
void dhsa_scorer_run(const dhsa_scorer *s, int64_t set, int64_t block, const int32_t *groups, int64_t n_groups, char *arena,
                     float *score, float *mass, int64_t *first, int64_t *last);

/* Row scores, row_scores.c. Sizes s->panels and says what an arena must hold. */
int64_t dhsa_row_scores_plan(dhsa_scorer *s);
/* Scores [n] of one block, kv the first KV head of its set, and if mass is not NULL the mass of each chunk; returns the state of
 * the last chunk as the block sees it. */
unsigned char dhsa_row_scores(const dhsa_scorer *s, const dhsa_block_job *job, int64_t kv, char *arena, float *score, float *mass);
/* The paper's score, mean_scores.c, alike. */
int64_t dhsa_mean_plan(const dhsa_scorer *s);
unsigned char dhsa_mean_score(const dhsa_scorer *s, const dhsa_block_job *job, int64_t kv, char *arena, float *score);

#endif
