/* scorer.h: the scores of chunks for one query block and one head set: row scores (row_scores.c) and the scores of the
 * paper (mean_scores.c). Private to the core. */
#ifndef DHSA_SCORER_H
#define DHSA_SCORER_H

#include "chunk/key_index.h"
#include "select/span.h"

typedef struct {
    const dhsa_kernels *kernels;
    const dhsa_byte_kernels *bytes; /* NULL: not used */
    const dhsa_pair_kernels *bf16;  /* both NULL: products are fp32 */
    const dhsa_tensor *q, *k;
    const dhsa_score_config *config;
    int64_t b, head_sets, blocks;
    dhsa_chunks chunks;
    dhsa_key_index *const *key_indexes; /* [batch]: they keep the means, at `level`. NULL: the scorer does */
    const dhsa_means *means;            /* of the only batch item, if the caller has them; or NULL */
    int level;
    int64_t capacity;     /* chunks, padding included */
    int64_t most;         /* chunks that are scored for one block, at most; whole groups */
    int64_t step;         /* queries of a mean query */
    int64_t heads_per_kv; /* query heads of a set that share a KV head */
    int64_t kv_per_set;
    int panels;         /* panels of rows worked on at a time, at most */
    int64_t arena_size; /* bytes of scratch that the caller provides for each thread; a multiple of DHSA_ALIGN */
} dhsa_scorer;

/* One query block against chunks [first, first + n), for both kinds of scores. */
typedef struct {
    int64_t set, from, to; /* queries [from, to) */
    int64_t first, n;
    int64_t cut_end; /* row scores: the last chunk is cut here; 0: it is not */
    /* Row scores: only these chunks and the cut chunk take part; counted from the first chunk of the batch item,
     * ascending. NULL: all. */
    const int32_t *live;
    int64_t n_live;
    /* Row scores: NULL, or [kv_per_set, dhsa_row_scores_rows]: the logarithms to base 2 of the denominators of the
     * rows' probabilities, relative to logits times log2(e). Written, or with logs_given read. */
    float *logs;
    int logs_given;
    int *rows_packed; /* as in dhsa_shortlist */
} dhsa_block_job;

/* What one stage of row scores leaves to the next. */
typedef struct {
    float *logs; /* as in dhsa_block_job; written by the first stage */
    /* Whether the first stage has left all rows packed in the arena, which nothing may change before the second. */
    int rows_packed;
    /* For the second stage: the groups of chunks that are left, ascending. Group g begins at chunk g *
     * DHSA_CHUNK_GROUP. The first stage has none. */
    const int32_t *groups;
    int64_t n_groups;
    int32_t *live; /* [chunks + 1]: receives the chunks of these groups that hold candidates, and the cut chunk */
    int64_t n_live;
} dhsa_shortlist;

/* Allocates the means of chunks for rows of n_boundaries boundaries, unless key_indexes (may be NULL) keep them, at
 * `level`. quantized: row scores quantize means and mean queries. Arguments have been checked. */
dhsa_status dhsa_scorer_open(dhsa_scorer *s, const dhsa_tensor *q, const dhsa_tensor *k,
                             const dhsa_score_config *config, int64_t n_boundaries, int quantized,
                             dhsa_key_index *const *key_indexes, int level, dhsa_error *error);
void dhsa_scorer_close(dhsa_scorer *s);
/* Computes the chunk means of batch item b for its boundaries, in parallel. Thread t uses scratch at arenas + t *
 * stride. */
dhsa_status dhsa_scorer_begin(dhsa_scorer *s, int64_t b, const int32_t *boundaries, int64_t n_boundaries, char *arenas,
                              int64_t stride, int num_threads, dhsa_error *error);
/* Writes the scores of the chunks [*first, *last) that hold candidates of one query block to score[*first .. *last). A
 * score is never NaN; empty chunks get -inf, and chunks without a finite mean +inf. mass: NULL, or (row scores only) it
 * receives the attention mass of the same chunks, 0 where the chunk is empty or its mean is not finite. list: NULL, or
 * (row scores only) scores are written for the chunks of a shortlist only. */
void dhsa_scorer_run(const dhsa_scorer *s, int64_t set, int64_t block, dhsa_shortlist *list, char *arena, float *score,
                     float *mass, int64_t *first, int64_t *last);

/* Row scores, in row_scores.c. Sets s->step and s->panels and returns the bytes of scratch that a thread needs. */
int64_t dhsa_row_scores_plan(dhsa_scorer *s);
/* The most rows of a block and a KV head. */
int64_t dhsa_row_scores_rows(const dhsa_scorer *s);
/* Writes the scores [n] of one query block, and unless mass is NULL the mass of each chunk. kv is the first KV head of
 * the set. Returns the state of the last chunk, up to where the block cuts it. */
unsigned char dhsa_row_scores(const dhsa_scorer *s, const dhsa_block_job *job, int64_t kv, char *arena, float *score,
                              float *mass);
/* The same two functions for the scores of the paper, in mean_scores.c. */
int64_t dhsa_mean_plan(const dhsa_scorer *s);
unsigned char dhsa_mean_score(const dhsa_scorer *s, const dhsa_block_job *job, int64_t kv, char *arena, float *score);

#endif
