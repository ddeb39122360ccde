/* selector.h: what a method of selection is, and what it is given. A method is one file in select/methods/ with a const
 * dhsa_method that is listed in registry.c there. Its caller, and the meaning of forced keys, budgets, windows and
 * exact blocks, are the same for all methods. */
#ifndef DHSA_SELECTOR_H
#define DHSA_SELECTOR_H

#include "core/arena.h"
#include "kernels/kernels.h"
#include "select/span.h"

typedef struct dhsa_selector dhsa_selector;

typedef struct {
    const char *name;
    int has_mass;         /* its scores are shares of attention mass: a share may be asked for in place of a budget */
    int has_chunks;       /* needs boundaries */
    int has_mean_queries; /* has no chunks, but uses config->score.mean_queries */
    int has_blocks;       /* uses key blocks of config->key_block keys */
    int has_stride;       /* uses config->stride, a divisor of key_block */
    int has_both_sides;   /* serves bidirectional attention */
    int has_finite;       /* needs the keys that hold a NaN or inf (finite.h), which are found before begin */
    /* Sets s->arena_size and s->segments and allocates s->state with dhsa_alloc_zeroed. If there is a state, even one
     * that is incomplete because open failed, close frees what it points to, and the selector frees the state itself.
     * open, close and begin may be NULL. */
    dhsa_status (*open)(dhsa_selector *s, dhsa_error *error);
    void (*close)(dhsa_selector *s);
    /* Does the work that all blocks of a batch item share. May use dhsa_parallel, with s->num_threads and the
     * arenas. */
    dhsa_status (*begin)(dhsa_selector *s, int64_t b, dhsa_error *error);
    /* Writes the list of (set, block), keys of `span` in ascending order, to list [room]. Returns the number of keys:
     * `room`, unless a share of mass decides. Called in a task of `thread`, only for blocks that are not exact. */
    int64_t (*list)(const dhsa_selector *s, int64_t set, int64_t block, dhsa_span span, int thread, int32_t *list,
                    int64_t room);
} dhsa_method;

struct dhsa_selector {
    const dhsa_method *method;
    const dhsa_select_config *config;
    const dhsa_kernels *kernels;
    const dhsa_tensor *q, *k;
    const int32_t *boundaries; /* [batch, n_boundaries]; NULL where the method has no chunks */
    int64_t n_boundaries;
    dhsa_key_index *const *key_indexes;          /* [batch]: they keep the means of chunks; or NULL */
    const dhsa_means *chunk_means, *group_means; /* of the only batch item, if the caller has them; or NULL */
    int num_threads;
    int64_t b, head_sets, blocks; /* the current batch item; head sets; query blocks */
    int64_t heads_per_set;        /* query heads of a set, from set * heads_per_set on */
    int64_t group;                /* query heads of a KV head: head h reads KV head h / group */
    /* Set by the method. */
    int64_t arena_size; /* bytes of scratch for each thread */
    int64_t segments;   /* the most segments that it passes to dhsa_topk; 0: it does not call it */
    void *state;
    /* The keys that hold a NaN or inf, for a method with has_finite (finite.h): 1 where any KV head of a flag row has
     * such a key. There is one flag row for each KV head, or one for all. */
    unsigned char *flags; /* [flag_rows, Lk] */
    int64_t flag_rows;
    /* Workspaces: arena_size bytes for the method, then those for dhsa_topk. Each lays out its own parts
     * (core/arena.h). */
    char *arenas;
    int64_t arena_stride;
};

/* The scratch memory of `thread`, aligned to DHSA_ALIGN. */
static inline char *dhsa_selector_arena(const dhsa_selector *s, int thread)
{
    return s->arenas + thread * s->arena_stride;
}

/* Returns the method of a kind, or NULL if there is none. In methods/registry.c. */
const dhsa_method *dhsa_method_find(dhsa_method_kind kind);

/* Arguments have been checked. boundaries must stay valid until close; it may be NULL if the method has no chunks.
 * key_indexes may be NULL. */
dhsa_status dhsa_selector_open(dhsa_selector *s, const dhsa_method *method, const dhsa_tensor *q, const dhsa_tensor *k,
                               const int32_t *boundaries, int64_t n_boundaries, dhsa_key_index *const *key_indexes,
                               const dhsa_select_config *config, int num_threads, dhsa_error *error);
void dhsa_selector_close(dhsa_selector *s);
/* Free the workspaces that open allocated, and allocate them again; the state stays. */
void dhsa_selector_free_arenas(dhsa_selector *s);
dhsa_status dhsa_selector_alloc_arenas(dhsa_selector *s, dhsa_error *error);
dhsa_status dhsa_selector_begin(dhsa_selector *s, int64_t b, dhsa_error *error);
/* Writes the lists of query blocks [first, first + blocks) of the batch item, for every head set, one after the other.
 * The list of (set, block) is indices[indptr[at] .. indptr[at + 1]) with at = set * blocks + block - first. indptr[0]
 * says where the first list begins; the other entries are written. indices needs room for dhsa_block_keys keys for each
 * list. begin must have been called if any of the blocks is not exact. */
dhsa_status dhsa_selector_run(const dhsa_selector *s, int64_t first, int64_t blocks, int64_t *indptr, int32_t *indices,
                              dhsa_error *error);
/* The number of threads that get a workspace: no more than there are lists, but up to 16 in any case for the work that
 * all lists share. */
static inline int dhsa_select_threads(int num_threads, int64_t lists)
{
    return (int)DHSA_MIN(num_threads, DHSA_MAX(lists, 16));
}

/* ---- from scores to a list, topk.c ----------------------------------------------------------------------------- */

/* Segments: runs of consecutive keys that are scored as one. Segment c holds keys [edges[c], edges[c + 1]), or key c
 * alone if edges is NULL. Segments [first, last) hold all candidates of the block, and may reach past them at both
 * ends. */
typedef struct {
    const int32_t *edges;
    int64_t first, last;
    const int32_t *live; /* NULL, or [n_live]: only these segments count, ascending; they hold enough keys */
    int64_t n_live;
    const float *score; /* [c]: of segment c, not NaN. The highest come first; +inf is always taken, if there is room */
    const float
        *mass; /* [c]: estimated attention mass on any scale; finite, >= 0; 0 where the score is +inf; or NULL */
} dhsa_segments;

/* Writes the list of a block, ascending, to list [room] and returns its length. The sinks and local keys are always on
 * it; other keys are taken by the score of their segment until the list is full, or until it holds the share of mass
 * asked for. Of equal scores, and within a segment that only partly fits, the most recent keys are taken first. */
int64_t dhsa_topk(const dhsa_selector *s, int thread, dhsa_span span, const dhsa_segments *segments, int32_t *list,
                  int64_t room);
/* Chooses whole segments, best first, until they hold `keys` candidates (all segments if there are fewer), writes them
 * to `chosen` in ascending order and returns how many. `chosen` has room for all segments. Of equal scores the most
 * recent are taken first. */
int64_t dhsa_topk_segments(const dhsa_selector *s, int thread, dhsa_span span, const dhsa_segments *segments,
                           int64_t keys, int32_t *chosen);
/* The bytes of a thread's arena, of which arena_size are the method's, with the scratch memory of dhsa_topk. */
int64_t dhsa_topk_scratch(int64_t segments, int64_t arena_size);
/* Writes keys [from, to) to list and returns how many. */
int64_t dhsa_write_keys(int32_t *list, int64_t from, int64_t to);

#endif
