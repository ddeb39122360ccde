/* key_index.h: what is kept of the keys of one sequence in one layer from call to call, as the rest of select/ and core/ use it. */
#ifndef DHSA_KEY_INDEX_H
#define DHSA_KEY_INDEX_H

#include "chunk/chunk.h"

/* Means of chunks, of which the first `done` are those of the keys. */
typedef struct {
    dhsa_chunks chunks; /* edges and their number are the borrower's */
    int64_t done;
    int open;
} dhsa_level;

enum { DHSA_LEVEL_FINE = 0, DHSA_LEVEL_COARSE, DHSA_LEVELS };

struct dhsa_key_index {
    dhsa_dtype dtype;
    int64_t kv_heads, dim;
    int64_t item;                           /* of the batch of the call at hand */
    uint64_t *fingerprints;                 /* [known]: of each key, of all its bytes in all heads */
    int64_t known, fingerprints_room, turn; /* turn: the first of the keys said to be the same that the next call looks at */
    int32_t *edges;                         /* keys before edges[chunks] are cut; in a step others follow, up to edges[total] */
    int64_t chunks, total, edges_room;
    float *sum; /* [kv_heads, dim]: of the keys [edges[chunks], summed) */
    int64_t summed;
    dhsa_level levels[DHSA_LEVELS];
};

/* Makes `index` one of the keys of batch item b: what it knows again stays, the rest is forgotten, what is new is cut. The first
 * `same` keys are said to be those of the last call, and few of them are looked at. step: the keys that came one at a time since
 * something was cut are one chunk, the last key another; otherwise everything is cut. */
dhsa_status dhsa_key_index_update(dhsa_key_index *index, const dhsa_tensor *k, int64_t b, const dhsa_boundary_config *config,
                                  int step, int64_t same, int num_threads, dhsa_error *error);
/* The same, all keys being cut as `boundaries` says, [n] padded with Lk: in place of cutting, and of cuts that were there. */
dhsa_status dhsa_key_index_assign(dhsa_key_index *index, const dhsa_tensor *k, int64_t b, const int32_t *boundaries, int64_t n,
                                  int64_t same, int num_threads, dhsa_error *error);
/* Fills the means of a level for its chunks, edges [count + 1], which were these up to the last call's end: only the missing ones.
 * *chunks becomes a view of them. Thread t has arenas + t * stride, 2 * dim floats. */
dhsa_status dhsa_key_index_means(dhsa_key_index *index, int level, dhsa_means_kind kind, const dhsa_kernels *kernels,
                                 const dhsa_tensor *k, int64_t b, const int32_t *edges, int64_t count, dhsa_chunks *chunks,
                                 char *arenas, int64_t stride, int num_threads, dhsa_error *error);

#endif
