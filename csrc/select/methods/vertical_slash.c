/* vertical_slash.c: selects the columns (keys) and diagonals (distances) to which the last queries of the prompt attend
 * most, for all query blocks. Source: MInference, arXiv 2407.02490. They are found once for each batch item and head
 * set, in O(Lk). Half of the room that the forced keys of a block leave goes to diagonals, the rest to columns. The
 * float64 definition is `twin` in dhsa/methods/vertical_slash.py. */
#include <string.h>

#include "core/arena.h"
#include "core/threads.h"
#include "select/finite.h"
#include "select/probe.h"

enum {
    PROBE_QUERIES = 64,
    DIGIT = 11, /* bits of a radix pass; an odd number of passes covers 32 bits */
};

typedef struct {
    dhsa_probe probe;
    int32_t *columns, *diagonals; /* [sets, Lk], best first; diagonal d: each query and the key d before it */
} vertical_slash_state;

/* ---- attention of the last queries ----------------------------------------------------------------------------- */

/* Scratch memory of one thread, after that of the probe. diagonal has room on both sides for rows that see no key
 * there. */
typedef struct {
    dhsa_probe_queries rows;
    float *column, *diagonal;
    int32_t *order;
} vertical_slash_probe;

static int64_t vertical_slash_lay_out(const dhsa_selector *s, char *arena, vertical_slash_probe *w)
{
    const int64_t k_len = s->k->shape[2], wide = (k_len + 2 * DHSA_MAX_LANES) * 4;
    int64_t used = ((const vertical_slash_state *)s->state)->probe.arena_size;
    w->column = dhsa_part(arena, &used, wide);
    w->diagonal = dhsa_part(arena, &used, wide);
    if (arena) w->diagonal += DHSA_MAX_LANES;
    w->order = dhsa_part(arena, &used, wide);
    return used;
}

static void vertical_slash_visit(void *of, int64_t row, int64_t first, int n, const float *p, const float *weight)
{
    const vertical_slash_probe *w = of;
    const dhsa_kernels *kernels = w->rows.probe->kernels;
    const int lanes = kernels->lanes;
    kernels->add_sums(p, n, weight, w->column + first);
    /* The rows of a panel are consecutive queries, so their diagonals through a key are consecutive too. */
    for (int j = 0; j < n; j++, p += lanes) {
        float *diagonal = w->diagonal + (w->rows.k->shape[2] - w->rows.q->shape[2] + w->rows.query + row - first - j);
        for (int r = 0; r < lanes; r++) diagonal[r] += weight[r] == 0 ? 0 : p[r] * weight[r];
    }
}

/* A stable sort of order [n], best score first; the result is in `to`. Scores are not negative. */
static void vertical_slash_sort(const float *score, int64_t n, int32_t *order, int32_t *to)
{
    for (int shift = 0; shift < 32; shift += DIGIT) {
        int64_t start[1 << DIGIT] = {0}, at = 0;
        for (int pass = 0; pass < 2; pass++) {
            for (int64_t i = 0; i < n; i++) {
                uint32_t bits;
                memcpy(&bits, score + order[i], sizeof bits);
                int64_t *slot = start + (~bits >> shift & ((1u << DIGIT) - 1));
                if (pass)
                    to[(*slot)++] = order[i];
                else
                    ++*slot;
            }
            for (int digit = 0; !pass && digit < 1 << DIGIT; digit++) {
                const int64_t count = start[digit];
                start[digit] = at;
                at += count;
            }
        }
        int32_t *swap = order;
        order = to;
        to = swap;
    }
}

static void vertical_slash_task(void *context, int64_t set, int thread)
{
    const dhsa_selector *s = context;
    const vertical_slash_state *st = s->state;
    const int64_t k_len = s->k->shape[2], window = s->config->score.window;
    char *arena = dhsa_selector_arena(s, thread);
    const int64_t queries = DHSA_MIN(PROBE_QUERIES, s->q->shape[2]);
    vertical_slash_probe w = {.rows = dhsa_selector_queries(s, &st->probe, 1, s->q->shape[2] - queries)};
    vertical_slash_lay_out(s, arena, &w);
    memset(w.column, 0, (size_t)k_len * sizeof *w.column);
    memset(w.diagonal - DHSA_MAX_LANES, 0, (size_t)(k_len + 2 * DHSA_MAX_LANES) * sizeof *w.diagonal);
    dhsa_probe_run run = dhsa_probe_start(s, queries, window ? DHSA_MAX(k_len - queries - window + 1, 0) : 0, k_len);
    run.of = &w;
    run.pack = dhsa_probe_pack_queries;
    run.keys = dhsa_probe_read_keys;
    run.visit = vertical_slash_visit;
    for (int64_t h = 0; h < s->heads_per_set; h++) {
        w.rows.head = set * s->heads_per_set + h;
        dhsa_probe_do(&st->probe, &run, arena);
    }
    /* Of equal sums the more recent key, and the diagonal of more recent keys, come first. */
    for (int64_t j = 0; j < k_len; j++) w.order[j] = (int32_t)(k_len - 1 - j);
    vertical_slash_sort(w.column, k_len, w.order, st->columns + set * k_len);
    for (int64_t d = 0; d < k_len; d++) w.order[d] = (int32_t)d;
    vertical_slash_sort(w.diagonal, k_len, w.order, st->diagonals + set * k_len);
}

static dhsa_status vertical_slash_begin(dhsa_selector *s, int64_t b, dhsa_error *error)
{
    (void)b, (void)error;
    dhsa_parallel(s->head_sets, s->num_threads, vertical_slash_task, s);
    return DHSA_OK;
}

/* ---- lists ----------------------------------------------------------------------------------------------------- */

/* Marks those of keys [from, to) that are not marked yet, the most recent ones first and `most` at most; returns how
 * many. */
static int64_t vertical_slash_mark(uint64_t *marks, int64_t from, int64_t to, int64_t most)
{
    int64_t done = 0;
    while (from < to && done < most) {
        const int64_t word = (to - 1) / 64, low = DHSA_MAX(from - word * 64, 0), high = to - word * 64;
        uint64_t fresh = ~marks[word] & ~(uint64_t)0 << low & ~(uint64_t)0 >> (64 - high);
        to = word * 64;
        while (__builtin_popcountll(fresh) > most - done) fresh &= fresh - 1; /* drops the oldest */
        marks[word] |= fresh;
        done += __builtin_popcountll(fresh);
    }
    return done;
}

static int64_t vertical_slash_list(const dhsa_selector *s, int64_t set, int64_t block, dhsa_span span, int thread,
                                   int32_t *list, int64_t room)
{
    const vertical_slash_state *st = s->state;
    const int64_t k_len = s->k->shape[2], offset = k_len - s->q->shape[2];
    const dhsa_span queries = dhsa_block_queries(s, block);
    const int64_t from = span.lo + DHSA_MAX(DHSA_MIN(s->config->sink, span.end) - span.lo, 0),
                  to = span.end - s->config->local;
    int64_t left = room - (from - span.lo) - (span.end - to);
    int64_t used = 0;
    uint64_t *marks =
        dhsa_part(dhsa_selector_arena(s, thread), &used, dhsa_ceil_div(k_len, 64) * (int64_t)sizeof *marks);
    memset(marks + from / 64, 0, (size_t)(dhsa_ceil_div(DHSA_MAX(to, from), 64) - from / 64) * sizeof *marks);
    if (dhsa_finite_next(s, set, from, to) < to) /* usually there is none */
        for (int64_t j = to - 1; j >= from; j--)
            if (dhsa_finite_next(s, set, j, j + 1) == j) left -= vertical_slash_mark(marks, j, j + 1, left);
    int64_t half = left - left / 2;
    left -= half;
    for (const int32_t *d = st->diagonals + set * k_len; half > 0; d++)
        half -= vertical_slash_mark(marks, DHSA_MAX(offset + queries.lo - *d, from),
                                    DHSA_MIN(offset + queries.end - *d, to), half);
    for (const int32_t *j = st->columns + set * k_len; left > 0; j++)
        if (*j >= from && *j < to) left -= vertical_slash_mark(marks, *j, *j + 1, left);
    int64_t n = dhsa_write_keys(list, span.lo, from);
    for (int64_t word = from / 64; word * 64 < to; word++)
        for (uint64_t bits = marks[word]; bits; bits &= bits - 1)
            list[n++] = (int32_t)(word * 64 + __builtin_ctzll(bits));
    return n + dhsa_write_keys(list + n, to, span.end);
}

static dhsa_status vertical_slash_open(dhsa_selector *s, dhsa_error *error)
{
    const int64_t k_len = s->k->shape[2];
    vertical_slash_probe unused;
    vertical_slash_state *st = s->state = dhsa_alloc_zeroed(1, sizeof *st);
    if (st) {
        dhsa_probe_plan(&st->probe, DHSA_PROBE_TWICE, DHSA_MIN(PROBE_QUERIES, s->q->shape[2]), k_len, s->q->shape[3],
                        1);
        s->arena_size = vertical_slash_lay_out(s, NULL, &unused);
        st->columns = dhsa_alloc(s->head_sets * k_len, sizeof *st->columns);
        st->diagonals = dhsa_alloc(s->head_sets * k_len, sizeof *st->diagonals);
    }
    if (st && st->columns && st->diagonals) return DHSA_OK;
    return dhsa_fail(error, DHSA_ERR_NO_MEMORY, "vertical_slash: no memory for the columns of %lld keys",
                     (long long)k_len);
}

static void vertical_slash_close(dhsa_selector *s)
{
    vertical_slash_state *st = s->state;
    dhsa_free(st->columns);
    dhsa_free(st->diagonals);
}

const dhsa_method dhsa_method_vertical_slash = {.name = "vertical_slash",
                                                .has_finite = 1,
                                                .open = vertical_slash_open,
                                                .close = vertical_slash_close,
                                                .begin = vertical_slash_begin,
                                                .list = vertical_slash_list};
