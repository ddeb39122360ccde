/* key_index.h: the key index: what is kept between calls of the keys of one sequence in one layer. Private to the core;
 * the public entries are in dhsa.h. */
#ifndef DHSA_KEY_INDEX_H
#define DHSA_KEY_INDEX_H

#include "chunk/chunk.h"

/* Means of chunks, of which the first `done` are valid. */
typedef struct {
    dhsa_chunks chunks; /* edges points to memory of the last caller */
    int64_t done;
    int open;
} dhsa_level;

enum { DHSA_LEVEL_FINE = 0, DHSA_LEVEL_COARSE, DHSA_LEVELS };

struct dhsa_key_index {
    dhsa_dtype dtype;
    int64_t kv_heads, dim;
    int64_t item;                           /* the batch item in the current call */
    uint64_t *fingerprints;                 /* [known]: of each key, of all its bytes in all KV heads */
    int64_t known, fingerprints_room, turn; /* turn: where the stretch of keys that the next call checks begins */
    int32_t *edges; /* [total + 1]: keys before edges[chunks] are cut; later edges are those of a decoding step */
    int64_t chunks, total, edges_room;
    float *sum;     /* [kv_heads, dim + 1]: sum of the keys [edges[chunks], summed), then of their squares */
    int64_t summed; /* -1: the sum is not computed */
    dhsa_level levels[DHSA_LEVELS];
};

/* Updates `index` to the keys of batch item b: what it holds of recognised keys stays, the rest is dropped, and new
 * keys are cut. The caller says that the first `same` keys are those of the last call, so only a few of them are
 * checked. step: the keys that came one at a time since the last cut are one chunk, and the last key is another;
 * otherwise all keys are cut. */
dhsa_status dhsa_key_index_update(dhsa_key_index *index, const dhsa_tensor *k, int64_t b,
                                  const dhsa_boundary_config *config, int step, int64_t same, int num_threads,
                                  dhsa_error *error);
/* The same, but all keys are cut at `boundaries`, [n] padded with Lk, which also replace earlier cuts. */
dhsa_status dhsa_key_index_assign(dhsa_key_index *index, const dhsa_tensor *k, int64_t b, const int32_t *boundaries,
                                  int64_t n, int64_t same, int num_threads, dhsa_error *error);
/* Computes the means of a level that are missing, for the chunks with edges [count + 1]. The edges of chunks that the
 * index kept must be those of the last call. *chunks becomes a view of the means. Thread t uses 3 * dim floats at
 * arenas + t * stride. */
dhsa_status dhsa_key_index_means(dhsa_key_index *index, int level, dhsa_means_kind kind, const dhsa_kernels *kernels,
                                 const dhsa_tensor *k, int64_t b, const int32_t *edges, int64_t count,
                                 dhsa_chunks *chunks, char *arenas, int64_t stride, int num_threads, dhsa_error *error);

#endif
