/* span.h: which keys are candidates of a query block, which blocks see every visible key, and how many keys the lists
 * of the other blocks have. Only here is decided whether a call is exact. Private to the core. */
#ifndef DHSA_SPAN_H
#define DHSA_SPAN_H

#include "core/internal.h"

/* Keys [lo, end) of one query block. The keys of [local_lo, local_end) are forced: they are on the list of a block that
 * is not exact, whatever their scores. */
typedef struct {
    int64_t lo, end, local_lo, local_end;
} dhsa_span;

/* The candidates of a block: the keys up to its nominal end (at most Lk). In a window layer they begin where the
 * windows of its queries begin (row scores), or at the nominal end minus the window, but not above the first position
 * of the block (scores of the paper). In bidirectional attention they are all keys, or with a window the union of the
 * windows of its queries. No local keys are set. */
dhsa_span dhsa_span_candidates(const dhsa_score_config *config, int64_t q_len, int64_t k_len, int64_t block);
/* Whether a block is exact, that is, sees every visible key: it ends within the budget (within the floor, where a share
 * of mass decides), the window is no longer than that, or the block is part of the dense tail. *span receives the keys
 * that it may see: the union of the windows of its queries if it is exact, otherwise the candidates. The local keys of
 * *span are the last config->local ones; in bidirectional attention they are those around the middle of the block.
 * Bidirectional attention has no dense tail. */
int dhsa_span_exact(const dhsa_select_config *config, int64_t q_len, int64_t k_len, int64_t block, dhsa_span *span);
/* dhsa_leaves_out, declared in dhsa.h and also in span.c, says whether any block of a call is not exact. */

/* The number of keys on the list of a block; where a share of mass decides, the largest number possible. */
int64_t dhsa_block_keys(const dhsa_select_config *config, int64_t q_len, int64_t k_len, int64_t block);

/* Head sets: 1, Hkv or H. */
int64_t dhsa_head_sets(const dhsa_score_config *config, const dhsa_tensor *q, const dhsa_tensor *k);
static inline int64_t dhsa_block_count(const dhsa_score_config *config, int64_t q_len)
{
    return dhsa_ceil_div(q_len, config->query_block);
}

#endif
