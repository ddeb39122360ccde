/* keys.h: the keys that a query sees: the visible range of a problem, restricted to the list of a selection. Used by
 * attend.c and decode.c. */
#ifndef DHSA_ATTEND_KEYS_H
#define DHSA_ATTEND_KEYS_H

#include "core/internal.h"
#include "kernels/kernels.h"

/* n ascending keys; with keys NULL they are start, start + 1, ... */
typedef struct {
    const int32_t *keys;
    int64_t start, n;
} key_list;

/* The list of a block of queries of one head; s NULL: every key. */
static inline key_list list_of(const dhsa_problem *p, const dhsa_selection *s, int64_t b, int64_t head, int64_t block)
{
    key_list list = {NULL, 0, p->k.shape[2]};
    if (s) {
        const int64_t H = p->q.shape[1], Hkv = p->k.shape[1];
        const int64_t set = s->heads == 1 ? 0 : s->heads == Hkv ? head / (H / Hkv) : head;
        const int64_t *row = s->indptr + (b * s->heads + set) * s->nq + block;
        list.n = row[1] - row[0];
        if (list.n > 0) list.keys = s->indices + row[0];                        /* there may be no indices at all */
        if (list.n > 0 && list.keys[list.n - 1] - list.keys[0] == list.n - 1) { /* ascending, unique and without gaps */
            list.start = list.keys[0];
            list.keys = NULL;
        }
    }
    return list;
}

/* The number of query heads that are processed together: those of a KV group, which share keys, or 1 if each head
 * has its own list. (With Hkv == H a group is one head.) */
static inline int64_t heads_of(const dhsa_problem *p, const dhsa_selection *list)
{
    const int64_t H = p->q.shape[1], Hkv = p->k.shape[1];
    return list && list->heads == H && list->heads != Hkv && list->heads != 1 ? 1 : H / Hkv;
}

/* The positions [*start, *stop) of the keys that query i sees. */
static inline void visible(const dhsa_problem *p, int64_t b, int64_t i, int64_t *start, int64_t *stop)
{
    const int64_t q_len = p->q.shape[2], k_len = p->k.shape[2];
    if (p->key_ranges) {
        const int32_t *range = p->key_ranges + 2 * (b * q_len + i);
        *start = range[0];
        *stop = range[1];
    } else if (p->causal) {
        *stop = i + k_len - q_len + 1;
        *start = p->window ? DHSA_MAX(0, *stop - p->window) : 0;
    } else {
        const int64_t at = i + k_len - q_len;
        *start = p->window ? DHSA_MAX(0, at - p->window + 1) : 0;
        *stop = p->window && p->window < k_len - at ? at + p->window : k_len;
    }
}

/* The first entry of an ascending list that is >= key. */
static inline int64_t lower_bound(const int32_t *list, int64_t n, int64_t key)
{
    int64_t low = 0;
    while (n > 0) {
        const int64_t half = n / 2;
        if (list[low + half] < key) {
            low += half + 1;
            n -= half + 1;
        } else {
            n = half;
        }
    }
    return low;
}

/* The entries [*lo, *hi) of a list that query i sees. */
static inline void seen(const dhsa_problem *p, const key_list *list, int64_t b, int64_t i, int64_t *lo, int64_t *hi)
{
    int64_t start, stop;
    visible(p, b, i, &start, &stop);
    if (list->keys) {
        *lo = lower_bound(list->keys, list->n, start);
        *hi = lower_bound(list->keys, list->n, stop);
    } else {
        *lo = DHSA_MIN(DHSA_MAX(start - list->start, 0), list->n);
        *hi = DHSA_MIN(DHSA_MAX(stop - list->start, 0), list->n);
    }
}

/* In decode.c: attention of a few query rows, for problems for which dhsa_decodes() returns 1. */
int dhsa_decodes(const dhsa_problem *p, const dhsa_selection *list);
dhsa_status dhsa_decode(const dhsa_problem *p, const dhsa_selection *list, dhsa_error *error);

#endif
