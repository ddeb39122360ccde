/* chunk.h: how keys are cut into chunks, and the means of chunks. Private to the core; the public entries are in dhsa.h. */
#ifndef DHSA_CHUNK_H
#define DHSA_CHUNK_H

#include "core/internal.h"
#include "kernels/kernels.h"

/* ---- boundaries ---------------------------------------------------------------------------------------------- */

/* The cuts of keys [from, to) of one batch item (k's first), where those before are cut already: absolute boundaries from `from` to
 * `to`, dhsa_boundaries_capacity(config, to - from) entries at most. How many it picks is these keys' share of config->num_chunks,
 * which is meant for all `to` keys. */
dhsa_status dhsa_boundaries_after(const dhsa_tensor *k, int64_t from, int64_t to, const dhsa_boundary_config *config,
                                  int32_t *boundaries, int64_t *count, int num_threads, dhsa_error *error);
int64_t dhsa_boundaries_share(const dhsa_boundary_config *config, int64_t from, int64_t to);
/* Rows [batch, n]: from 0, never falling, ending in length. */
dhsa_status dhsa_boundaries_check(const int32_t *boundaries, int64_t batch, int64_t n, int64_t length, dhsa_error *error);
/* Checks of a config by itself, its network included if it has one; and of whether what it cuts by is there and fits k. */
dhsa_status dhsa_boundary_config_check(const dhsa_boundary_config *config, dhsa_error *error);
dhsa_status dhsa_boundary_config_fits(const dhsa_boundary_config *config, const dhsa_tensor *k, dhsa_error *error);
/* Checks of either network by itself, and whether one of so many channels fits k; else a message that says how to get one. */
dhsa_status dhsa_predictor_check(const dhsa_predictor *predictor, dhsa_error *error);
dhsa_status dhsa_compact_check(const dhsa_compact *compact, dhsa_error *error);
dhsa_status dhsa_predictor_width(int64_t channels, const dhsa_tensor *k, dhsa_error *error);

/* The public functions of these names, of arguments that have been checked. */
dhsa_status dhsa_boundaries_checked(const dhsa_tensor *k, const dhsa_boundary_config *config, int32_t *boundaries, int64_t capacity,
                                    int64_t *counts, int num_threads, dhsa_error *error);
dhsa_status dhsa_predictor_logits_checked(const dhsa_predictor *net, const dhsa_tensor *k, float *logits, int num_threads,
                                          dhsa_error *error);
dhsa_status dhsa_compact_logits_checked(const dhsa_compact *net, const dhsa_tensor *k, float *logits, int num_threads,
                                        dhsa_error *error);
/* ---- chunk means of one batch item ---------------------------------------------------------------------------- */

enum { DHSA_CHUNK_GOOD = 0, DHSA_CHUNK_BAD /* its mean is not finite */, DHSA_CHUNK_EMPTY };

/* How means are kept for products. Selection by row scores rounds them to bf16 once they are made, on every tier, so that
 * tiers choose alike: it only orders what it scores, and the means of many keys are then small. Scores that a caller asks for and
 * the paper's are of fp32 means (row scores of bf16 input are not, either way). */
typedef enum { DHSA_MEANS_F32 = 0, DHSA_MEANS_BF16 } dhsa_means_kind;

/* Neighbouring chunks that a shortlist takes or leaves together: whole squares of means. A group's coarse look is at subgroups of
 * so many chunks: it is as good as the best of its subgroups, since the mean of a whole group hides a single key. */
enum { DHSA_CHUNK_GROUP = 16, DHSA_CHUNK_SUBGROUP = 4 };

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
/* Makes room for `capacity` chunks; the first `used` stay as they are. The old memory is freed, unless it is another's (copy).
 * Returns 0, and changes nothing, if there is no memory. */
int dhsa_chunks_grow(dhsa_chunks *chunks, int64_t kv_heads, int64_t capacity, int64_t dim, int64_t used, int copy);
/* Fills chunks->means and ->state from chunk `first` on, for batch item b of k. Thread t has scratch + t * stride, 2 * dim floats.
 */
void dhsa_chunks_fill(const dhsa_kernels *kernels, const dhsa_tensor *k, int64_t b, dhsa_chunks *chunks, int64_t first,
                      char *scratch, int64_t stride, int num_threads);
/* Sets chunks->bad from the states. */
void dhsa_chunks_look(dhsa_chunks *chunks, int64_t kv_heads);

/* The mean of queries [from, to) of head h, times sign: -1, 0 or 1. */
void dhsa_mean_query(const dhsa_kernels *kernels, const dhsa_tensor *q, int64_t b, int64_t h, int64_t from, int64_t to, float sign,
                     float *mean);

#endif
