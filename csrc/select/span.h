/* span.h: which keys are candidates of a block of queries, which blocks see every visible key, and how many keys the lists of the
 * others have: the one place where "is this call exact?" is decided. Private to the core. */
#ifndef DHSA_SPAN_H
#define DHSA_SPAN_H

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
/* (Whether any block of a call is not: dhsa_leaves_out, in dhsa.h, which span.c holds too.) */
/* The most keys the list of a block has: just as many, unless a share of mass decides. */
int64_t dhsa_block_keys(const dhsa_select_config *config, int64_t q_len, int64_t k_len, int64_t block);

/* Head sets: 1, Hkv or H. */
int64_t dhsa_head_sets(const dhsa_score_config *config, const dhsa_tensor *q, const dhsa_tensor *k);
static inline int64_t dhsa_block_count(const dhsa_score_config *config, int64_t q_len)
{
    return dhsa_ceil_div(q_len, config->query_block);
}

#endif
