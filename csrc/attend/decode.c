/* decode.c: attention of a few query rows, as in a decoding step. Its time is that of reading keys and values once.
 * Nothing is therefore packed, and the keys are divided into parts that threads share. A part stores its sums and
 * its maximum. The thread that finishes the last part of a head set combines all parts, in order. */
#include <math.h>
#include <stdatomic.h>
#include <string.h>

#include "attend/keys.h"
#include "core/arena.h"
#include "core/threads.h"

enum {
    PART = 512,         /* largest number of keys of a part */
    ALONE = 512 * 1024, /* with fewer bytes of keys and values, one thread works alone */
};

typedef struct {
    const dhsa_problem *p;
    const dhsa_selection *list; /* NULL: every key */
    const dhsa_kernels *kernels;
    int64_t heads, head_sets; /* query heads that share keys, a head set; head sets of a batch item */
    int64_t parts;            /* largest number of parts of a set */
    int64_t padded, v_padded; /* elements from one row of q to the next; the same for o */
    int rows, stride;         /* query rows of a set; elements from one row of scores to the next */
    float factor, sign;
    float *o, *m, *l;      /* results of parts: o [set][part][row][v_padded], m and l [set][row][part] */
    _Atomic int32_t *done; /* [set]: number of parts that are done */
    char *arenas;
    int64_t arena_size;
} decode_plan;

typedef struct {
    float *q, *s;
    const void **rows;
} decode_scratch;

/* The keys of a head set. Query i sees the entries [lo[i], hi[i]) of the list, all of them within [begin, end). */
typedef struct {
    int64_t b, head, kv_head, begin, end, parts, step;
    int64_t lo[DHSA_DECODE_ROWS], hi[DHSA_DECODE_ROWS];
    key_list list;
} decode_span;

int dhsa_decodes(const dhsa_problem *p, const dhsa_selection *list)
{
    return p->q.shape[2] <= DHSA_DECODE_ROWS / heads_of(p, list) && (!list || list->nq == 1);
}

static void decode_find_span(const decode_plan *pl, int64_t set, decode_span *at)
{
    const dhsa_problem *p = pl->p;
    at->b = set / pl->head_sets;
    at->head = set % pl->head_sets * pl->heads;
    at->kv_head = at->head / (p->q.shape[1] / p->k.shape[1]);
    at->list = list_of(p, pl->list, at->b, at->head, 0);
    at->begin = at->list.n;
    at->end = 0;
    for (int64_t i = 0; i < p->q.shape[2]; i++) {
        seen(p, &at->list, at->b, i, &at->lo[i], &at->hi[i]);
        if (at->lo[i] >= at->hi[i]) continue;
        at->begin = DHSA_MIN(at->begin, at->lo[i]);
        at->end = DHSA_MAX(at->end, at->hi[i]);
    }
    if (at->begin > at->end) at->begin = at->end;
    /* The division depends on the shape only, never on the number of threads. Without keys there is one part, which
     * writes zeros. */
    at->parts = DHSA_MAX(1, dhsa_ceil_div(at->end - at->begin, PART));
    at->step = dhsa_round_up(dhsa_ceil_div(at->end - at->begin, at->parts), DHSA_DECODE_STEP);
}

static void point(const decode_span *at, const dhsa_tensor *t, int64_t from, int n, const void **rows)
{
    const char *base = dhsa_row(t, at->b, at->kv_head, 0);
    const int64_t step = dhsa_step(t, 2);
    for (int j = 0; j < n; j++)
        rows[j] = base + (at->list.keys ? at->list.keys[from + j] : at->list.start + from + j) * step;
}

/* Row r of a head set is query r / heads of head r % heads. */
static void *row_of(const decode_plan *pl, const decode_span *at, const dhsa_tensor *t, int r)
{
    return dhsa_row(t, at->b, at->head + r % pl->heads, r / pl->heads);
}

static void decode_merge(const decode_plan *pl, int64_t set, const decode_span *at)
{
    const dhsa_problem *p = pl->p;
    const int64_t H = p->q.shape[1], q_len = p->q.shape[2];
    for (int r = 0; r < pl->rows; r++) {
        float *m = pl->m + (set * pl->rows + r) * pl->parts, top = -INFINITY;
        const float *l = pl->l + (set * pl->rows + r) * pl->parts;
        /* A sink is a part without values. */
        const float sink = p->sinks ? p->sinks[at->head + r % pl->heads] * 1.44269504088896340736f : -INFINITY;
        double sum = 0;
        top = sink;
        for (int64_t i = 0; i < at->parts; i++) top = DHSA_MAX(top, m[i]);
        for (int64_t i = 0; i < at->parts; i++) {
            m[i] = top == -INFINITY ? 0.0f : exp2f(m[i] - top);
            sum += (double)m[i] * l[i];
        }
        if (sink != -INFINITY) sum += exp2f(sink - top);
        pl->kernels->decode_merge(pl->o + (set * pl->parts * pl->rows + r) * pl->v_padded, pl->rows * pl->v_padded, m,
                                  (int)at->parts, sum == 0 ? 1.0f : (float)sum, (int)p->v.shape[3], p->out.dtype,
                                  row_of(pl, at, &p->out, r));
        /* m is in units of log2. If no key was seen, the sum is 0 and lse is -inf. */
        if (p->lse)
            p->lse[(at->b * H + at->head + r % pl->heads) * q_len + r / pl->heads] =
                sum == 0 ? -INFINITY : (float)(top * 0.693147180559945309 + log(sum));
    }
}

/* o += P V for the rows of queries [first, first + count) and entries [from, to) of the part. */
static void add_values(const decode_plan *pl, const decode_scratch *w, int64_t first, int64_t count, int64_t from,
                       int64_t to, float *o)
{
    const int64_t r = first * pl->heads;
    if (from < to)
        pl->kernels->decode_pv(w->s + r * pl->stride + from, pl->stride, (int)(count * pl->heads), w->rows + from,
                               pl->p->v.dtype, (int)(to - from), (int)pl->p->v.shape[3], o + r * pl->v_padded,
                               pl->v_padded);
}

static int64_t decode_lay_out(const decode_plan *pl, char *base, decode_scratch *w)
{
    int64_t used = 0;
    w->q = dhsa_part(base, &used, pl->rows * pl->padded * 4);
    w->s = dhsa_part(base, &used, (int64_t)pl->rows * pl->stride * 4);
    w->rows = dhsa_part(base, &used, (2 * PART + DHSA_DECODE_AHEAD) * (int64_t)sizeof(void *));
    return used;
}

static void decode_task(void *context, int64_t index, int thread)
{
    const decode_plan *pl = context;
    const dhsa_problem *p = pl->p;
    const int64_t set = index / pl->parts, part = index % pl->parts, queries = p->q.shape[2], dim = p->q.shape[3];
    decode_span at;
    decode_scratch w;
    decode_find_span(pl, set, &at);
    if (part >= at.parts) return;
    decode_lay_out(pl, pl->arenas + thread * pl->arena_size, &w);
    const int64_t from = DHSA_MIN(at.begin + part * at.step, at.end);
    const int n = (int)DHSA_MIN(at.step, at.end - from);
    float *o = pl->o + (set * pl->parts + part) * pl->rows * pl->v_padded;
    memset(o, 0, (size_t)(pl->rows * pl->v_padded) * sizeof *o);
    for (int r = 0; r < pl->rows; r++)
        pl->kernels->decode_load(row_of(pl, &at, &p->q, r), p->q.dtype, (int)dim, pl->sign, w.q + r * pl->padded);
    /* The values follow the keys, so that the first values are prefetched while the last keys are read. */
    point(&at, &p->k, from, n, w.rows);
    point(&at, &p->v, from, n, w.rows + n);
    for (int i = 0; i < DHSA_DECODE_AHEAD; i++) w.rows[2 * n + i] = w.rows[DHSA_MAX(2 * n - 1, 0)];
    pl->kernels->decode_qk(w.q, pl->padded, pl->rows, w.rows, p->k.dtype, n, (int)dim, w.s, pl->stride);
    int64_t start = 0, stop = n; /* entries that all queries see */
    for (int64_t i = 0; i < queries; i++) {
        at.lo[i] = DHSA_MIN(DHSA_MAX(at.lo[i] - from, 0), n);
        at.hi[i] = DHSA_MAX(DHSA_MIN(at.hi[i] - from, n), at.lo[i]);
        start = DHSA_MAX(start, at.lo[i]);
        stop = DHSA_MIN(stop, at.hi[i]);
        for (int64_t r = i * pl->heads; r < (i + 1) * pl->heads; r++) {
            const int64_t to = (set * pl->rows + r) * pl->parts + part;
            pl->kernels->decode_softmax(w.s + r * pl->stride + at.lo[i], (int)(at.hi[i] - at.lo[i]), pl->factor,
                                        (float)p->softcap, pl->m + to, pl->l + to);
        }
    }
    if (start >= stop) start = stop = n;
    w.rows += n;
    add_values(pl, &w, 0, queries, start, stop, o);
    /* A row must not read a value that it does not see, which may be NaN. Entries that not all queries see are
     * therefore added query by query. */
    for (int64_t i = 0; i < queries; i++) {
        add_values(pl, &w, i, 1, at.lo[i], DHSA_MIN(at.hi[i], start), o);
        add_values(pl, &w, i, 1, DHSA_MAX(at.lo[i], stop), at.hi[i], o);
    }
    if (atomic_fetch_add_explicit(&pl->done[set], 1, memory_order_acq_rel) + 1 == at.parts) decode_merge(pl, set, &at);
}

dhsa_status dhsa_decode(const dhsa_problem *p, const dhsa_selection *list, dhsa_error *error)
{
    decode_plan pl = {.p = p, .list = list, .kernels = dhsa_kernels_current(), .heads = heads_of(p, list), .parts = 1};
    decode_scratch w;
    int64_t keys = 0;
    pl.head_sets = p->q.shape[1] / pl.heads;
    pl.rows = (int)(p->q.shape[2] * pl.heads);
    pl.padded = dhsa_round_up(p->q.shape[3], DHSA_DECODE_STEP);
    pl.v_padded = dhsa_round_up(p->v.shape[3], DHSA_DECODE_STEP);
    pl.stride = PART + DHSA_DECODE_STEP;
    /* The sign of the scale is applied to the queries, so that the largest product gives the largest logit. */
    pl.factor = (float)fabs(p->scale);
    pl.sign = p->scale < 0 ? -1.0f : 1.0f;
    const int64_t n_sets = p->q.shape[0] * pl.head_sets;
    for (int64_t set = 0; set < n_sets; set++) {
        decode_span at;
        decode_find_span(&pl, set, &at);
        pl.parts = DHSA_MAX(pl.parts, at.parts);
        keys += at.end - at.begin;
    }
    const int64_t items = n_sets * pl.parts,
                  bytes = keys * (p->q.shape[3] + p->v.shape[3]) * dhsa_dtype_size(p->k.dtype);
    const int threads = bytes < ALONE ? 1 : (int)DHSA_MIN(items, p->num_threads);
    pl.arena_size = decode_lay_out(&pl, NULL, &w);
    char *memory = NULL;
    int64_t total;
    for (int laid = 0; laid < 2; laid++) { /* the first pass only computes the size */
        total = 0;
        pl.o = dhsa_part(memory, &total, items * pl.rows * pl.v_padded * 4);
        pl.m = dhsa_part(memory, &total, items * pl.rows * 4);
        pl.l = dhsa_part(memory, &total, items * pl.rows * 4);
        pl.done = dhsa_part(memory, &total, n_sets * (int64_t)sizeof *pl.done);
        pl.arenas = dhsa_part(memory, &total, threads * pl.arena_size);
        if (!laid && !(memory = dhsa_alloc(total, 1)))
            return dhsa_fail(error, DHSA_ERR_NO_MEMORY, "attention: no memory for a workspace of %lld bytes",
                             (long long)total);
    }
    for (int64_t set = 0; set < n_sets; set++) atomic_init(&pl.done[set], 0);
    dhsa_parallel(items, threads, decode_task, &pl);
    dhsa_free(memory);
    return DHSA_OK;
}
