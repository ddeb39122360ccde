/* selector.h: what a method of selection is, and what it is given to work with. A method is one file of select/methods/ with a
 * const dhsa_method, which registry.c there lists; who calls it, and what forced keys, budgets, windows and exact blocks mean, is
 * the same for all of them. */
#ifndef DHSA_SELECTOR_H
#define DHSA_SELECTOR_H

#include "core/arena.h"
#include "kernels/kernels.h"
#include "select/span.h"

typedef struct dhsa_selector dhsa_selector;

typedef struct {
    const char *name;
    int has_mass;         /* its scores are shares of attention mass, so that a share may be asked for in place of a budget */
    int has_chunks;       /* needs boundaries */
    int has_mean_queries; /* without chunks, but with mean queries: config->score.mean_queries */
    int has_blocks;       /* of config->key_block keys */
    int has_stride;       /* config->stride, a divisor of key_block */
    int has_finite;       /* asks which keys hold a NaN or inf (finite.h): looked up before begin */
    /* Sizes s->arena_size and s->segments and allocates s->state, by dhsa_alloc_zeroed. Where there is a state, also one that a
     * failure left half made, close frees what it points to; the selector frees the state itself. open, close and begin may be
     * NULL. */
    dhsa_status (*open)(dhsa_selector *s, dhsa_error *error);
    void (*close)(dhsa_selector *s);
    /* Turns to a batch item: work that all blocks share. May use dhsa_parallel, with s->num_threads and the arenas. */
    dhsa_status (*begin)(dhsa_selector *s, int64_t b, dhsa_error *error);
    /* One list: writes ascending keys of (set, block), out of its candidates, to row [room] and returns how many: `room`, unless
     * a share of mass decides. Only for blocks that are not exact. Called from within a task of `thread`. */
    int64_t (*list)(const dhsa_selector *s, int64_t set, int64_t block, dhsa_span span, int thread, int32_t *list, int64_t room);
} dhsa_method;

struct dhsa_selector {
    const dhsa_method *method;
    const dhsa_select_config *config;
    const dhsa_kernels *kernels;
    const dhsa_tensor *q, *k;
    const int32_t *boundaries; /* [batch, n_boundaries]; NULL where the method has no chunks */
    int64_t n_boundaries;
    dhsa_key_index *const *key_indexes; /* [batch] that keep the means of chunks, or NULL */
    int num_threads;
    int64_t b, head_sets, blocks; /* the batch item at hand; head sets; query blocks */
    int64_t heads_per_set;        /* query heads of a set: from set * heads_per_set on */
    int64_t group;                /* query heads of a KV head: head h reads KV head h / group */
    /* Set by the method. */
    int64_t arena_size; /* bytes it works in, for each thread */
    int64_t segments;   /* the most segments that it hands to dhsa_topk; 0: it does not */
    void *state;
    /* Which keys hold a NaN or inf, where the method asks: finite.h. */
    unsigned char *flags; /* [flag_rows, Lk]: 1 where any of a row's KV heads has such a key; a row a KV head, or one for all */
    int64_t flag_rows;
    /* Work spaces: the method's arena_size bytes, then dhsa_topk's; each lays out its own parts (core/arena.h). */
    char *arenas;
    int64_t arena_stride;
};

/* What `thread` works in, aligned to DHSA_ALIGN. */
static inline char *dhsa_selector_arena(const dhsa_selector *s, int thread) { return s->arenas + thread * s->arena_stride; }

/* The method of a kind; NULL if there is none. methods/registry.c */
const dhsa_method *dhsa_method_find(dhsa_method_kind kind);

/* Allocates; arguments have been checked. boundaries is borrowed and may be NULL if the method has no chunks; key_indexes may be
 * NULL. */
dhsa_status dhsa_selector_open(dhsa_selector *s, const dhsa_method *method, const dhsa_tensor *q, const dhsa_tensor *k,
                               const int32_t *boundaries, int64_t n_boundaries, dhsa_key_index *const *key_indexes,
                               const dhsa_select_config *config, int num_threads, dhsa_error *error);
void dhsa_selector_close(dhsa_selector *s);
/* The workspaces of threads, which open makes, can be given back and made anew while the state stays. */
void dhsa_selector_free_arenas(dhsa_selector *s);
dhsa_status dhsa_selector_alloc_arenas(dhsa_selector *s, dhsa_error *error);
dhsa_status dhsa_selector_begin(dhsa_selector *s, int64_t b, dhsa_error *error);
/* Writes the lists of blocks [first, first + blocks) of the batch item, for every set, one after the other: that of (set, block)
 * is indices[indptr[at] .. indptr[at + 1]) with at = set * blocks + block - first. indptr[0] says where the first one begins, the
 * others are written; indices needs room for dhsa_block_keys keys of each. begin must have been called if any is not exact. */
dhsa_status dhsa_selector_run(const dhsa_selector *s, int64_t first, int64_t blocks, int64_t *indptr, int32_t *indices,
                              dhsa_error *error);
/* Threads worth a workspace where there are this many lists: none that would find nothing to do, but what all lists share
 * is worth a few in any case. */
static inline int dhsa_select_threads(int num_threads, int64_t lists) { return (int)DHSA_MIN(num_threads, DHSA_MAX(lists, 16)); }

/* ---- from scores to a list, topk.c --------------------------------------------------------------------------- */

/* What is scored: runs of keys. Segment c holds keys [edges[c], edges[c + 1]), or with edges NULL key c alone; segments [first,
 * last) hold all candidates of the block, and may reach past them at both ends. */
typedef struct {
    const int32_t *edges;
    int64_t first, last;
    const float *score; /* [c] of segment c: which come first. Not NaN; +inf: is taken in any case, as far as the room goes */
    const float *mass;  /* [c]: estimated attention mass on any scale, finite, >= 0, and 0 where the score is +inf. NULL: none */
} dhsa_segments;

/* The list of a block: the sinks and local keys, then keys by the score of their segment until the list is full, or until they hold
 * the share of mass asked for. Of equal scores, and within a segment that only partly fits, the most recent keys come first.
 * Returns its length. `list` has room for `room` keys. */
int64_t dhsa_topk(const dhsa_selector *s, int thread, dhsa_span span, const dhsa_segments *segments, int32_t *list, int64_t room);
/* Whole segments, best first, until they hold `keys` candidates (all, if there are no more), ascending into chosen, which has room
 * for all of them; returns how many. Of equal scores the most recent come first. */
int64_t dhsa_topk_segments(const dhsa_selector *s, int thread, dhsa_span span, const dhsa_segments *segments, int64_t keys,
                           int32_t *chosen);
/* Writes keys [from, to) to list and returns how many. */
int64_t dhsa_write_keys(int32_t *list, int64_t from, int64_t to);

#endif
