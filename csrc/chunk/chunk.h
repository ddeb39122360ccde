/* chunk.h: how keys are cut into chunks, and the means of chunks. Private to the core; the public entries are in
 * dhsa.h. */
#ifndef DHSA_CHUNK_H
#define DHSA_CHUNK_H

#include "core/internal.h"
#include "kernels/kernels.h"

/* ---- boundaries ------------------------------------------------------------------------------------------------ */

/* Cuts keys [from, to) of batch item 0 of k, where the keys before them are cut already. Writes absolute boundaries
 * from `from` to `to`, at most dhsa_boundaries_capacity(config, to - from) entries. config->num_chunks is meant for all
 * `to` keys: only the share that dhsa_boundaries_share returns is picked here. */
dhsa_status dhsa_boundaries_after(const dhsa_tensor *k, int64_t from, int64_t to, const dhsa_boundary_config *config,
                                  int32_t *boundaries, int64_t *count, int num_threads, dhsa_error *error);
int64_t dhsa_boundaries_share(const dhsa_boundary_config *config, int64_t from, int64_t to);
/* Checks boundaries [batch, n]: each row begins with 0, never decreases and ends with length. */
dhsa_status dhsa_boundaries_check(const int32_t *boundaries, int64_t batch, int64_t n, int64_t length,
                                  dhsa_error *error);
/* dhsa_boundary_config_check checks a config by itself, its network included if it has one. dhsa_boundary_config_fits
 * checks that the network a config needs is there and fits k. */
dhsa_status dhsa_boundary_config_check(const dhsa_boundary_config *config, dhsa_error *error);
dhsa_status dhsa_boundary_config_fits(const dhsa_boundary_config *config, const dhsa_tensor *k, dhsa_error *error);
/* dhsa_predictor_check and dhsa_compact_check check a network by itself. dhsa_predictor_width checks that a network of
 * `channels` channels fits k; its error message says how to train one that does. */
dhsa_status dhsa_predictor_check(const dhsa_predictor *predictor, dhsa_error *error);
dhsa_status dhsa_compact_check(const dhsa_compact *compact, dhsa_error *error);
dhsa_status dhsa_predictor_width(int64_t channels, const dhsa_tensor *k, dhsa_error *error);

/* The public functions without the suffix, for arguments that have been checked. */
dhsa_status dhsa_boundaries_checked(const dhsa_tensor *k, const dhsa_boundary_config *config, int32_t *boundaries,
                                    int64_t capacity, int64_t *counts, int num_threads, dhsa_error *error);
dhsa_status dhsa_predictor_logits_checked(const dhsa_predictor *net, const dhsa_tensor *k, float *logits,
                                          int num_threads, dhsa_error *error);
dhsa_status dhsa_compact_logits_checked(const dhsa_compact *net, const dhsa_tensor *k, float *logits, int num_threads,
                                        dhsa_error *error);
/* ---- chunk means of one batch item ----------------------------------------------------------------------------- */

enum { DHSA_CHUNK_GOOD = 0, DHSA_CHUNK_BAD /* its mean is not finite */, DHSA_CHUNK_EMPTY };

/* How means are stored for products. Selection by row scores quantizes them (dhsa_kernels.quantize), since it only
 * needs the order of scores: they are whole numbers up to 127, which are stored as bytes, or as bf16 where that is what
 * the CPU multiplies. Their products have no rounding error, so that all tiers choose by the same numbers. Scores that
 * a caller asks for, and the paper's scores, use fp32 means. */
typedef enum { DHSA_MEANS_F32 = 0, DHSA_MEANS_BF16, DHSA_MEANS_I8, DHSA_MEANS_KINDS } dhsa_means_kind;

/* A shortlist takes or leaves out a group of DHSA_CHUNK_GROUP neighbouring chunks as a whole. The coarse stage scores
 * the means of groups. */
enum { DHSA_CHUNK_GROUP = DHSA_GROUP_CHUNKS };

typedef struct {
    dhsa_means_kind kind;
    const int32_t *edges; /* [chunks + 1], without the padding */
    int64_t chunks;
    int64_t row;   /* elements of a stored mean: dim, rounded up to what the products take */
    int64_t pitch; /* means from one KV head to the next */
    int squares;   /* means are in the layout that 16-bit products take keys in, dhsa_square() */
    void *means;   /* [kv_heads, pitch, row]; zeros where the state is not good */
    float *scale;  /* [kv_heads, pitch]: factors of the means; not for DHSA_MEANS_F32 */
    int32_t *bias; /* [kv_heads, pitch]: as dhsa_byte_kernels takes it; only for DHSA_MEANS_I8 */
    float *spread; /* [kv_heads, pitch]: the mean squared distance of a chunk's keys to their mean, divided by dim;
                      only where `spreads` is set */
    int spreads;
    unsigned char *state; /* [kv_heads, pitch] */
    int odd;              /* at least one state is not good */
} dhsa_chunks;

int dhsa_all_finite(const dhsa_kernels *kernels, const float *x, int64_t n);
/* Writes the mean of keys [from, to) of one KV head to mean [dim]; sum [dim] is scratch. Returns 0 if the mean is not
 * finite, and writes zeros then. */
int dhsa_chunk_mean(const dhsa_kernels *kernels, const dhsa_tensor *k, int64_t b, int64_t kv_head, int64_t from,
                    int64_t to, float *mean, float *sum);
/* The sum of the squares of all elements of keys [from, to); line [dim] is scratch. */
float dhsa_chunk_squares(const dhsa_kernels *kernels, const dhsa_tensor *k, int64_t b, int64_t kv_head, int64_t from,
                         int64_t to, float *line);
/* The spread of n keys with this mean and sum of squares; 0 where that is not finite. */
float dhsa_chunk_spread(const dhsa_kernels *kernels, const float *mean, float squares, int64_t n, int64_t dim);
/* Writes a mean [dim] to `to`, in the type that `kind` says, padded with zeros to `row` elements, and its factor and
 * bias. */
void dhsa_mean_store(const dhsa_kernels *kernels, dhsa_means_kind kind, const float *mean, int64_t dim, int64_t row,
                     void *to, float *scale, int32_t *bias);
/* Writes a mean [dim] as entry `at` of `means`, which has the layout of chunks->means, and of scale and bias, which are
 * not used where chunks have none. */
void dhsa_mean_put(const dhsa_kernels *kernels, const dhsa_chunks *chunks, const float *mean, int64_t dim, void *means,
                   float *scale, int32_t *bias, int64_t at);
/* The bytes of an element of a mean. */
static inline int64_t dhsa_means_size(dhsa_means_kind kind)
{
    return kind == DHSA_MEANS_F32 ? 4 : kind == DHSA_MEANS_BF16 ? 2 : 1;
}
/* Sets the layout of the means of `capacity` chunks, without memory for them. */
void dhsa_chunks_plan(dhsa_chunks *chunks, dhsa_means_kind kind, int squares, int spreads, int64_t capacity,
                      int64_t dim);
/* Allocates the means of `capacity` chunks of each KV head. Returns 0 if there is no memory. */
int dhsa_chunks_open(dhsa_chunks *chunks, dhsa_means_kind kind, int squares, int spreads, int64_t kv_heads,
                     int64_t capacity, int64_t dim);
void dhsa_chunks_close(dhsa_chunks *chunks);
/* What is stored of the chunks of a KV head, as arrays with one entry of `size` bytes for each chunk: states, means,
 * and scale, bias and spread where there are any. Returns the number of arrays. */
typedef struct {
    char *at;
    int64_t size;
} dhsa_chunks_part;
enum { DHSA_CHUNKS_PARTS = 5 };
int dhsa_chunks_parts(const dhsa_chunks *chunks, int64_t head, dhsa_chunks_part *part);
/* Makes room for `capacity` chunks; the first `used` keep their means. The old memory is freed unless `copy` is set,
 * which says that it belongs to another dhsa_chunks. Returns 0, and changes nothing, if there is no memory. */
int dhsa_chunks_grow(dhsa_chunks *chunks, int64_t kv_heads, int64_t capacity, int64_t dim, int64_t used, int copy);
/* Fills chunks->means and ->state from chunk `first` on, for batch item b of k. Thread t uses 3 * dim floats at
 * scratch + t * stride. */
void dhsa_chunks_fill(const dhsa_kernels *kernels, const dhsa_tensor *k, int64_t b, dhsa_chunks *chunks, int64_t first,
                      char *scratch, int64_t stride, int num_threads);
/* Fills chunks, which must have room, from means of the same number of chunks. */
void dhsa_chunks_take(dhsa_chunks *chunks, const dhsa_means *means);
/* Sets chunks->odd from the states. */
void dhsa_chunks_look(dhsa_chunks *chunks, int64_t kv_heads);

/* Writes the mean of queries [from, to) of head h, times sign (-1, 0 or 1), to mean [dim]. */
void dhsa_mean_query(const dhsa_kernels *kernels, const dhsa_tensor *q, int64_t b, int64_t h, int64_t from, int64_t to,
                     float sign, float *mean);

#endif
