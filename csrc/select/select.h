/* select.h: what the files of select/ share: which keys are a block's candidates, chunk means, and the scorer of chunks for
 * one (head set, query block). What a method is lies in method.h. Private to the core; the public entries are in dhsa.h. */
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
/* Whether a block sees every visible key: it ends within the budget (within the floor, where a share of mass decides), its
 * windows do, or it is part of the dense tail.
 * *span receives the keys it may see: the union of its queries' windows if exact, else the candidates. */
int dhsa_span_exact(const dhsa_select_config *config, int64_t q_len, int64_t k_len, int64_t block, dhsa_span *span);
/* The most keys the list of a block has: just as many, unless a share of mass decides. */
int64_t dhsa_block_keys(const dhsa_select_config *config, int64_t q_len, int64_t k_len, int64_t block);

dhsa_status dhsa_score_check(const dhsa_tensor *q, const dhsa_tensor *k, const dhsa_score_config *config, dhsa_error *error);
dhsa_status dhsa_select_check(const dhsa_tensor *q, const dhsa_tensor *k, const dhsa_select_config *config, dhsa_error *error);
/* The cuts of keys [from, to) of one batch row (k's first), where those before are cut already: absolute boundaries from `from` to
 * `to`, dhsa_boundaries_capacity(config, to - from) entries at most. How many it picks is these keys' share of config->num_chunks,
 * which is meant for all `to` keys. */
dhsa_status dhsa_boundaries_after(const dhsa_tensor *k, int64_t from, int64_t to, const dhsa_boundary_config *config,
                                  int32_t *boundaries, int64_t *count, int num_threads, dhsa_error *error);
int64_t dhsa_boundaries_share(const dhsa_boundary_config *config, int64_t from, int64_t to);
/* Rows [batch, n]: from 0, never falling, ending in length. */
dhsa_status dhsa_boundaries_check(const int32_t *boundaries, int64_t batch, int64_t n, int64_t length, dhsa_error *error);
/* Checks of a config, whose network has to fit k, and of either network. */
dhsa_status dhsa_boundary_config_check(const dhsa_boundary_config *config, const dhsa_tensor *k, dhsa_error *error);
dhsa_status dhsa_predictor_check(const dhsa_predictor *predictor, const dhsa_tensor *k, dhsa_error *error);
dhsa_status dhsa_compact_check(const dhsa_compact *compact, const dhsa_tensor *k, dhsa_error *error);
/* Whether a boundary network of so many channels fits k; else a message that says how to get one that does. */
dhsa_status dhsa_predictor_width(int64_t channels, const dhsa_tensor *k, dhsa_error *error);
/* Sharing sets: 1, Hkv or H. */
int64_t dhsa_score_sets(const dhsa_score_config *config, const dhsa_tensor *q, const dhsa_tensor *k);
static inline int64_t dhsa_block_count(const dhsa_score_config *config, int64_t q_len)
{
    return dhsa_ceil_div(q_len, config->query_block);
}

/* ---- chunk means of one batch row ---------------------------------------------------------------------------- */

enum { DHSA_CHUNK_GOOD = 0, DHSA_CHUNK_BAD /* its mean is not finite */, DHSA_CHUNK_EMPTY };

/* How means are kept for products. Selection by_length rounds them to bf16 once they are made, on every tier, so that tiers
 * choose alike: it only orders what it scores, and the means of many keys are then small. Plain row scores, those that a caller
 * asks for and the paper's are of fp32 means (row scores of bf16 input are not, either way). */
typedef enum { DHSA_MEANS_F32 = 0, DHSA_MEANS_BF16 } dhsa_means_kind;

/* Neighbouring chunks that a shortlist takes or leaves together: whole squares of means. A group's coarse look is at units of so
 * many chunks: it is as good as the best of its units, since the mean of a whole group hides a single key. */
enum { DHSA_CHUNK_GROUP = 16, DHSA_CHUNK_UNIT = 4 };

typedef struct {
    dhsa_means_kind kind;
    const int32_t *edges; /* [chunks + 1], without the padding */
    int64_t chunks;
    int64_t row;          /* numbers of a mean: dim, in bf16 rounded up to DHSA_PAIR_STEP */
    int64_t pitch;        /* means from one KV head to the next */
    int squares;          /* means lie as the products of pairs take keys, dhsa_square() */
    void *means;          /* [kv_heads, pitch, row] fp32 or bf16; zeros where the state is not good */
    unsigned char *state; /* [kv_heads, pitch] */
    int bad;              /* a mean somewhere is not finite */
} dhsa_chunks;

int dhsa_all_finite(const dhsa_kernels *kernels, const float *x, int64_t n);
/* Mean of keys [from, to) of one KV head into mean [dim] (sum: scratch [dim]). Returns 0 if it is not finite; mean is zeros then.
 */
int dhsa_chunk_mean(const dhsa_kernels *kernels, const dhsa_tensor *k, int64_t b, int64_t kv_head, int64_t from, int64_t to,
                    float *mean, float *sum);
/* Writes a mean as `kind` asks. */
void dhsa_mean_store(const dhsa_kernels *kernels, dhsa_means_kind kind, const float *mean, int64_t dim, int64_t row, void *to);
/* The same as mean number `at` of means that lie as those of chunks do. */
void dhsa_mean_put(const dhsa_kernels *kernels, const dhsa_chunks *chunks, const float *mean, int64_t dim, void *means, int64_t at);
/* How means of `capacity` chunks lie, without memory for them. */
void dhsa_chunks_plan(dhsa_chunks *chunks, dhsa_means_kind kind, int squares, int64_t capacity, int64_t dim);
/* Room for the means of `capacity` chunks of each KV head. Returns 0 if there is no memory. */
int dhsa_chunks_open(dhsa_chunks *chunks, dhsa_means_kind kind, int squares, int64_t kv_heads, int64_t capacity, int64_t dim);
void dhsa_chunks_close(dhsa_chunks *chunks);
/* Makes room for `capacity` chunks; the first `keep` stay as they are. The old memory is freed, unless it is another's (copy).
 * Returns 0, and changes nothing, if there is no memory. */
int dhsa_chunks_grow(dhsa_chunks *chunks, int64_t kv_heads, int64_t capacity, int64_t dim, int64_t keep, int copy);
/* Fills chunks->means and ->state from chunk `first` on, for batch row b of k. Thread t has scratch + t * stride, 2 * dim floats.
 */
void dhsa_chunks_fill(const dhsa_kernels *kernels, const dhsa_tensor *k, int64_t b, dhsa_chunks *chunks, int64_t first,
                      char *scratch, int64_t stride, int num_threads);
/* Sets chunks->bad from the states. */
void dhsa_chunks_look(dhsa_chunks *chunks, int64_t kv_heads);

/* ---- scoring ------------------------------------------------------------------------------------------------- */

typedef struct {
    const dhsa_kernels *kernels;
    const dhsa_pair_kernels *bf16; /* NULL: products are fp32 */
    const dhsa_tensor *q, *k;
    const dhsa_score_config *config;
    int64_t b, sets, blocks;
    dhsa_chunks chunks;
    dhsa_past *const *pasts; /* [batch] that keep the means, at `level`; NULL: the scorer has means of its own */
    int level;
    int64_t capacity;     /* chunks, padding included */
    int64_t most;         /* chunks that are scored for one block, at most: whole groups */
    int64_t step;         /* queries of a mean row */
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

/* Allocates the means for boundaries rows of n_boundaries entries, unless pasts (may be NULL) keep them, at `level`. rounded:
 * row scores of means in bf16, whatever the input. Arguments have been checked. */
dhsa_status dhsa_scorer_open(dhsa_scorer *s, const dhsa_tensor *q, const dhsa_tensor *k, const dhsa_score_config *config,
                             int64_t n_boundaries, int rounded, dhsa_past *const *pasts, int level, dhsa_error *error);
void dhsa_scorer_close(dhsa_scorer *s);
/* Turns to batch row b and its boundaries: chunk means, in parallel. Thread t works at arenas + t * stride. */
dhsa_status dhsa_scorer_begin(dhsa_scorer *s, int64_t b, const int32_t *boundaries, int64_t n_boundaries, char *arenas,
                              int64_t stride, int num_threads, dhsa_error *error);
/* Scores of the chunks [*first, *last) that hold candidates of one block, into score[*first .. *last). Never NaN;
 * empty chunks -inf, chunks without a finite mean +inf. groups: NULL, or [n_groups]: chunks of others score
 * -inf. mass: NULL, or alike the sums of probabilities (row scores only), 0 for chunks that are not finite scored. */
void dhsa_scorer_run(const dhsa_scorer *s, int64_t set, int64_t block, const int32_t *groups, int64_t n_groups, char *arena,
                     float *score, float *mass, int64_t *first, int64_t *last);

/* The mean of queries [from, to) of head h, times sign: -1, 0 or 1. */
void dhsa_mean_query(const dhsa_kernels *kernels, const dhsa_tensor *q, int64_t b, int64_t h, int64_t from, int64_t to, float sign,
                     float *mean);

/* Row scores, rows.c. Sizes s->panels and says what an arena must hold. */
int64_t dhsa_rows_plan(dhsa_scorer *s);
/* Scores [n] of one block, kv the first KV head of its set, and if mass is not NULL the mass of each chunk; returns the state of
 * the last chunk as the block sees it. */
unsigned char dhsa_rows_score(const dhsa_scorer *s, const dhsa_block_job *job, int64_t kv, char *arena, float *score, float *mass);
/* The paper's score, dhsa.c, alike. */
int64_t dhsa_mean_plan(const dhsa_scorer *s);
unsigned char dhsa_mean_score(const dhsa_scorer *s, const dhsa_block_job *job, int64_t kv, char *arena, float *score);

#endif
