/* descriptors.c: hands the core problems, selections, configurations, boundaries, means and bytes of key indexes of
 * which some numbers are not what they should be. Each must be refused with an error that names an argument, or served
 * within the memory that it describes: arrays are allocated to the byte, for the address sanitizer to watch.
 *
 * descriptors SEED SECONDS [EXECUTIONS [FIRST]]: every execution depends on the seed and its number only, and a failure
 * prints both. `make fuzz` builds it with sanitizers. */
#include <inttypes.h>
#include <math.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "dhsa.h"

static const char *step = "start";
static uint64_t seed, number;

#define REQUIRE(condition)                                                                                             \
    do {                                                                                                               \
        if (!(condition)) fail(#condition, __LINE__);                                                                  \
    } while (0)
static void fail(const char *what, int line)
{
    fprintf(stderr, "descriptors.c:%d: seed %" PRIu64 ", execution %" PRIu64 ", %s: not so: %s\n", line, seed, number,
            step, what);
    abort();
}

/* Which execution it was, where a sanitizer or a signal ends the program. */
static void tell(void) { fprintf(stderr, "seed %" PRIu64 ", execution %" PRIu64 ", %s\n", seed, number, step); }

static void tell_signal(int which)
{
    tell();
    _Exit(128 + which);
}

#if defined(__GNUC__)
extern void __sanitizer_set_death_callback(void (*callback)(void)) __attribute__((weak));
#endif

static void tell_at_death(void)
{
#if defined(__GNUC__)
    if (__sanitizer_set_death_callback) {
        __sanitizer_set_death_callback(tell);
        return;
    }
#endif
    signal(SIGSEGV, tell_signal);
    signal(SIGFPE, tell_signal);
}

/* ---- choices --------------------------------------------------------------------------------------------------- */

static uint64_t state;

static uint64_t next(void)
{
    uint64_t x = (state += UINT64_C(0x9E3779B97F4A7C15)); /* SplitMix64, of the public domain */
    x = (x ^ x >> 30) * UINT64_C(0xBF58476D1CE4E5B9);
    x = (x ^ x >> 27) * UINT64_C(0x94D049BB133111EB);
    return x ^ x >> 31;
}

static int64_t below(int64_t n) { return (int64_t)(next() % (uint64_t)n); }
static int64_t between(int64_t low, int64_t high) { return low + below(high - low + 1); }
static int one_in(int64_t n) { return below(n) == 0; }

/* A number at which something changes, or near it. */
static int64_t edge(void)
{
    static const int64_t edges[] = {0,
                                    1,
                                    2,
                                    4,
                                    8,
                                    16,
                                    64,
                                    256,
                                    512,
                                    576,
                                    1024,
                                    65536,
                                    INT32_MAX / 2,
                                    INT32_MAX,
                                    INT32_MIN,
                                    INT64_C(1) << 32,
                                    INT64_C(1) << 40,
                                    INT64_MAX / 64,
                                    INT64_MAX / 16,
                                    INT64_MAX / 8,
                                    INT64_MAX / 4,
                                    INT64_MAX / 2,
                                    INT64_MAX - 1,
                                    INT64_MIN + 1};
    const int64_t x = edges[below(sizeof edges / sizeof *edges)];
    switch (below(5)) {
    case 0:
        return (int64_t)((uint64_t)x + 1);
    case 1:
        return (int64_t)((uint64_t)x - 1);
    case 2:
        return (int64_t)(0 - (uint64_t)x);
    case 3:
        return one_in(4) ? (int64_t)next() : x;
    default:
        return x;
    }
}

static double odd_number(void)
{
    static const double numbers[] = {0,    -0.0, 1,   -1,    0.5,  1e-30, 1e-31,  1e-38,    1e38,
                                     2e38, 1e39, NAN, 1e300, 1e-9, 0.999, 1e-300, INFINITY, -INFINITY};
    return numbers[below(sizeof numbers / sizeof *numbers)];
}

/* ---- memory to the byte ---------------------------------------------------------------------------------------- */

static void *pieces[64];
static int pieces_held;

static void *bytes(int64_t size)
{
    REQUIRE(pieces_held < (int)(sizeof pieces / sizeof *pieces));
    char *piece = malloc((size_t)(size > 0 ? size : 1));
    REQUIRE(piece != NULL);
    pieces[pieces_held++] = piece;
    return piece;
}

static void let_go(void)
{
    while (pieces_held > 0) free(pieces[--pieces_held]);
}

static int64_t size_of(dhsa_dtype dtype) { return dtype == DHSA_F32 ? 4 : 2; }

/* Numbers of which some are not finite. */
static void fill(char *to, int64_t n, dhsa_dtype dtype)
{
    const int odd = one_in(4);
    for (int64_t i = 0; i < n; i++) {
        const uint64_t x = next();
        float number32 = (float)((double)(int32_t)x / 2147483648.0 * 3);
        uint16_t number16 = (uint16_t)((x & 0x8000) | 0x3800 | (x & 0x7ff)); /* near 1 in fp16, not far in bf16 */
        if (odd && (x >> 40) % 8 == 0) number32 = (float)odd_number(), number16 = (uint16_t)x;
        if (dtype == DHSA_F32)
            memcpy(to + 4 * i, &number32, 4);
        else
            memcpy(to + 2 * i, &number16, 2);
    }
}

/* Gives a checked tensor memory of just its elements; 0 if these are too many. */
static int place(dhsa_tensor *t)
{
    int64_t low = 0, high = 0, count = 1;
    for (int i = 0; i < 4; i++) {
        count *= t->shape[i];
        if (t->shape[i] > 4096 || count > 4096) return 0;
        const int64_t stride = i == 3 ? 1 : t->stride[i];
        if (t->shape[i] == 1) continue;
        if (stride > 4096 || stride < -4096) return 0;
        *(stride < 0 ? &low : &high) += stride * (t->shape[i] - 1);
    }
    if (high - low > 1 << 16) return 0;
    char *memory = bytes((high - low + 1) * size_of(t->dtype));
    fill(memory, high - low + 1, t->dtype);
    t->data = memory - low * size_of(t->dtype);
    return 1;
}

/* ---- what is expected of a status ------------------------------------------------------------------------------ */

static dhsa_error error;

static int served(dhsa_status status)
{
    REQUIRE(status >= DHSA_OK && status < DHSA_ERR_NO_MEMORY);
    if (status == DHSA_OK) return 1;
    REQUIRE(error.status == status);
    REQUIRE(memchr(error.message, 0, sizeof error.message) != NULL);
    REQUIRE(strchr(error.message, ':') != NULL && error.message[0] >= 'a' && error.message[0] <= 'z');
    return 0;
}

/* ---- problems -------------------------------------------------------------------------------------------------- */

enum { B, HEADS, KV_HEADS, QUERIES, KEYS, DIM, VALUE_DIM, SIZES };

static void contiguous(dhsa_tensor *t, int64_t a, int64_t b, int64_t c, int64_t d)
{
    const int64_t shape[4] = {a, b, c, d};
    uint64_t stride = 1;
    for (int i = 3; i >= 0; i--) {
        t->shape[i] = shape[i];
        t->stride[i] = (int64_t)stride;
        stride *= (uint64_t)shape[i];
    }
}

static void shapes(dhsa_problem *p, const int64_t *s)
{
    contiguous(&p->q, s[B], s[HEADS], s[QUERIES], s[DIM]);
    contiguous(&p->k, s[B], s[KV_HEADS], s[KEYS], s[DIM]);
    contiguous(&p->v, s[B], s[KV_HEADS], s[KEYS], s[VALUE_DIM]);
    contiguous(&p->out, s[B], s[HEADS], s[QUERIES], s[VALUE_DIM]);
}

/* A small problem without data. */
static dhsa_problem plain_problem(int64_t *s)
{
    dhsa_problem p;
    memset(&p, 0, sizeof p);
    const int64_t group = between(1, 3);
    s[B] = between(1, 2);
    s[KV_HEADS] = between(1, 2);
    s[HEADS] = s[KV_HEADS] * group;
    s[QUERIES] = one_in(3) ? 1 : between(1, 20);
    s[KEYS] = s[QUERIES] + below(24);
    s[DIM] = between(1, 9);
    s[VALUE_DIM] = one_in(2) ? s[DIM] : between(1, 9);
    shapes(&p, s);
    p.q.dtype = p.k.dtype = p.v.dtype = p.out.dtype = (dhsa_dtype)below(3);
    p.scale = 0.3;
    p.causal = !one_in(4);
    p.num_threads = one_in(8) ? (int)between(2, 3) : 1;
    p.precision = (dhsa_precision)below(3);
    if (one_in(4)) p.window = between(1, 20);
    if (one_in(4)) p.softcap = 3;
    if (one_in(4)) p.skip = 0.01;
    return p;
}

static dhsa_tensor *tensor_of(dhsa_problem *p, int64_t i)
{
    dhsa_tensor *const all[] = {&p->q, &p->k, &p->v, &p->out};
    return all[i];
}

static void spoil_problem(dhsa_problem *p, int64_t *s)
{
    dhsa_tensor *t = tensor_of(p, below(4));
    switch (below(12)) {
    case 0: /* one size of all tensors that have it */
    case 1:
        s[below(SIZES)] = one_in(2) ? edge() : between(1, 700);
        shapes(p, s);
        if (one_in(2)) /* reachable at any size */
            for (int i = 0; i < 3; i++) memset(tensor_of(p, i)->stride, 0, 3 * sizeof(int64_t));
        break;
    case 2:
        t->shape[below(4)] = edge();
        break;
    case 3:
        t->stride[below(4)] = edge();
        break;
    case 4: /* strides of their own, of either sign, with gaps or overlaps */
    case 5:
        for (int i = 0; i < 3; i++) t->stride[i] = between(-200, 200);
        break;
    case 6: { /* axes in another order */
        const int64_t i = below(3), j = below(3), stride = t->stride[i];
        t->stride[i] = t->stride[j];
        t->stride[j] = stride;
        break;
    }
    case 7:
        t->dtype = (dhsa_dtype)(one_in(2) ? below(5) - 1 : (int)edge());
        break;
    case 8:
        p->window = edge();
        break;
    case 9:
        *(one_in(3) ? &p->scale : one_in(2) ? &p->softcap : &p->skip) = odd_number();
        break;
    case 10:
        if (one_in(2))
            p->num_threads = (int)edge();
        else
            p->precision = (dhsa_precision)edge();
        break;
    default:
        if (one_in(2))
            p->causal = (int)edge();
        else
            t->data = NULL;
    }
}

/* The tables of a problem, where its sizes leave them small. */
static void add_tables(dhsa_problem *p)
{
    const int64_t batch = p->q.shape[0], queries = p->q.shape[2], heads = p->q.shape[1], keys = p->k.shape[2];
    if (one_in(3) && batch >= 1 && batch <= 4 && queries >= 1 && queries <= 64) {
        int32_t *ranges = bytes(batch * queries * 2 * (int64_t)sizeof *ranges);
        for (int64_t i = 0; i < batch * queries; i++) {
            const int64_t most = keys > 0 && keys < 1000 ? keys : 9;
            ranges[2 * i] = (int32_t)below(most + 1);
            ranges[2 * i + 1] = (int32_t)between(ranges[2 * i], most);
        }
        if (one_in(3)) ranges[below(2 * batch * queries)] = (int32_t)edge();
        p->key_ranges = ranges;
        if (one_in(2)) p->window = 0;
    }
    if (one_in(3) && heads >= 1 && heads <= 64) {
        float *sinks = bytes(heads * (int64_t)sizeof *sinks);
        for (int64_t h = 0; h < heads; h++) sinks[h] = one_in(40) ? (float)odd_number() : (float)below(5) - 2;
        p->sinks = sinks;
    }
}

/* Gives a problem memory; 0 if it needs too much of it, or time. */
static int place_problem(dhsa_problem *p)
{
    if (p->num_threads > 3 || p->q.shape[2] > 128 || p->k.shape[2] > 256) return 0;
    for (int i = 0; i < 4; i++)
        if (!place(tensor_of(p, i))) return 0;
    if (one_in(2)) p->lse = bytes(p->q.shape[0] * p->q.shape[1] * p->q.shape[2] * (int64_t)sizeof *p->lse);
    return 1;
}

static uint64_t checked[7], ran[7];

static void fuzz_problem(void)
{
    int64_t s[SIZES], counts[2] = {0, 0};
    dhsa_problem p = plain_problem(s);
    /* Addresses that nothing is read from. */
    for (int i = 0; i < 4; i++) tensor_of(&p, i)->data = (void *)((uintptr_t)(i + 1) << 44);
    for (int64_t n = one_in(6) ? 0 : between(1, 3); n > 0; n--) spoil_problem(&p, s);
    add_tables(&p);
    p.skip_counts = counts;
    step = "a problem is checked";
    if (!served(dhsa_problem_check(&p, &error))) return;
    /* What the kernels rely on, written down once more. */
    REQUIRE(p.q.shape[1] % p.k.shape[1] == 0 && p.q.shape[3] == p.k.shape[3] && p.v.shape[2] == p.k.shape[2]);
    REQUIRE(p.q.shape[3] <= DHSA_MAX_HEAD_DIM && p.v.shape[3] <= DHSA_MAX_VALUE_DIM && p.k.shape[2] <= DHSA_MAX_LENGTH);
    REQUIRE(p.num_threads >= 1 && p.num_threads <= DHSA_MAX_THREADS && fabs(p.scale) <= 1e38);
    if (!one_in(256) || !place_problem(&p)) return;
    step = "a problem is computed";
    if (served(dhsa_attend_dense(&p, &error))) ran[0]++;
}

/* ---- selections ------------------------------------------------------------------------------------------------ */

static void fuzz_selection(void)
{
    int64_t s[SIZES];
    dhsa_problem p = plain_problem(s);
    p.precision = DHSA_PRECISION_HIGHEST;
    const int64_t heads = one_in(3)   ? 1
                          : one_in(2) ? s[HEADS]
                                      : s[KV_HEADS],
                  block = between(1, 24), nq = (s[QUERIES] + block - 1) / block, rows = s[B] * heads * nq,
                  density = between(1, 6);
    int64_t *indptr = bytes((rows + 1) * (int64_t)sizeof *indptr);
    int32_t list[6 * 24 * 2 * 64];
    int64_t n = 0;
    indptr[0] = 0;
    for (int64_t row = 0; row < rows; row++) {
        for (int64_t key = 0; key < s[KEYS] && n < (int64_t)(sizeof list / sizeof *list); key++)
            if (one_in(density)) list[n++] = (int32_t)key;
        indptr[row + 1] = n;
    }
    int32_t *indices = bytes(n * (int64_t)sizeof *indices);
    memcpy(indices, list, (size_t)n * sizeof *indices);
    dhsa_selection selection = {s[B], heads, nq, block, indptr, indices};
    int64_t n_indptr = rows + 1, n_indices = n;
    for (int64_t spoils = one_in(6) ? 0 : between(1, 2); spoils > 0; spoils--) {
        int64_t *const sizes[] = {&selection.batch, &selection.heads, &selection.nq, &selection.query_block};
        switch (below(6)) {
        case 0:
            *sizes[below(4)] = edge();
            break;
        case 1:
            indptr[below(rows + 1)] = one_in(2) ? edge() : below(n + 2);
            break;
        case 2:
            if (n > 0) indices[below(n)] = (int32_t)(one_in(2) ? edge() : below(s[KEYS] + 2) - 1);
            break;
        case 3: /* as if the arrays were shorter than they are */
            n_indptr = below(rows + 2);
            break;
        case 4:
            n_indices = below(n + 1);
            break;
        default:
            if (one_in(2))
                selection.indptr = NULL;
            else
                selection.indices = NULL;
        }
    }
    step = "a selection is checked";
    if (!served(dhsa_selection_check(&selection, n_indptr, n_indices, s[B], s[HEADS], s[KV_HEADS], s[QUERIES], s[KEYS],
                                     &error)))
        return;
    const int64_t lists = s[B] * selection.heads * selection.nq;
    REQUIRE(lists + 1 == n_indptr && selection.indptr[lists] == n_indices);
    for (int64_t row = 0; row < lists; row++)
        for (int64_t i = selection.indptr[row]; i < selection.indptr[row + 1]; i++)
            REQUIRE(i >= 0 && i < n && selection.indices[i] >= 0 && selection.indices[i] < s[KEYS] &&
                    (i == selection.indptr[row] || selection.indices[i] > selection.indices[i - 1]));
    if (!one_in(256) || !place_problem(&p)) return;
    step = "a selection is used";
    if (served(dhsa_attend_sparse(&p, &selection, &error))) ran[1]++;
}

/* ---- configurations -------------------------------------------------------------------------------------------- */

static dhsa_select_config plain_config(void)
{
    dhsa_select_config c;
    memset(&c, 0, sizeof c);
    c.method = (dhsa_method_kind)below(DHSA_METHOD_ORACLE + 1);
    c.sink = below(4);
    c.local = below(6);
    c.budget = between(c.sink + c.local > 0 ? c.sink + c.local : 1, 24);
    c.floor = c.budget;
    if (one_in(3)) {
        c.mass = 0.6;
        c.floor = between(c.sink + c.local, c.budget);
    }
    c.dense_tail = one_in(2) ? 0 : below(9);
    if (one_in(3)) c.shortlist = c.budget + below(9);
    c.stride = between(1, 4);
    c.key_block = c.stride * between(1, 4);
    c.score.heads = (dhsa_heads)below(3);
    c.score.score = c.method == DHSA_METHOD_DHSA ? DHSA_SCORE_BLOCK : DHSA_SCORE_ROWS;
    c.score.pooling = (dhsa_pooling)below(2);
    c.score.query_block = c.stride * between(1, 6);
    c.score.mean_queries = between(1, c.score.query_block);
    c.score.quantized = one_in(2);
    c.score.scale = 0.5;
    return c;
}

static dhsa_boundary_config plain_cuts(void)
{
    return (dhsa_boundary_config){.kind = (dhsa_boundary_kind)below(2),
                                  .chunk_size = between(1, 5),
                                  .num_chunks = below(12),
                                  .window = between(1, 5),
                                  .theta = one_in(2) ? -INFINITY : -0.5,
                                  .nms = below(3)};
}

static void spoil_config(dhsa_select_config *c, dhsa_boundary_config *b)
{
    int64_t *const numbers[] = {&c->budget,
                                &c->floor,
                                &c->sink,
                                &c->local,
                                &c->dense_tail,
                                &c->shortlist,
                                &c->key_block,
                                &c->stride,
                                &c->score.query_block,
                                &c->score.mean_queries,
                                &c->score.window,
                                &b->chunk_size,
                                &b->num_chunks,
                                &b->window,
                                &b->nms};
    switch (below(8)) {
    case 0:
        *(one_in(2) ? &c->mass : &b->theta) = odd_number();
        break;
    case 1:
        c->method = (dhsa_method_kind)edge();
        break;
    case 2:
        *(one_in(2) ? (int *)&c->score.heads : (int *)&c->score.pooling) = (int)(one_in(2) ? below(4) : edge());
        break;
    case 3:
        *(one_in(2) ? (int *)&c->score.score : (int *)&b->kind) = (int)(one_in(2) ? below(4) : edge());
        break;
    case 4:
        *(one_in(2) ? &c->score.scale : &c->score.softcap) = odd_number();
        break;
    default:
        *numbers[below(sizeof numbers / sizeof *numbers)] = one_in(3) ? below(40) : edge();
    }
}

static void fuzz_config(void)
{
    dhsa_select_config c = plain_config();
    dhsa_boundary_config b = plain_cuts();
    for (int64_t n = one_in(6) ? 0 : between(1, 2); n > 0; n--) spoil_config(&c, &b);
    step = "a configuration is checked";
    if (!served(dhsa_config_check(&c, one_in(4) ? NULL : &b, &error))) return;
    const int64_t length = one_in(2) ? edge() : between(1, 100);
    REQUIRE(dhsa_num_chunks(&c, length, one_in(2)) >= 0);
    REQUIRE(dhsa_boundaries_capacity(&b, length) >= 0);
    if (length > 0 && length <= DHSA_MAX_LENGTH) dhsa_leaves_out(&c, between(1, length), length, below(50), 1);
    if (!one_in(256)) return;
    int64_t s[SIZES];
    dhsa_problem p = plain_problem(s);
    dhsa_stats stats;
    if (!place_problem(&p)) return;
    step = "a configuration is used";
    if (served(dhsa_prefill(&p, &b, NULL, 0, &c, &stats, &error))) {
        REQUIRE(stats.density >= 0 && stats.density <= 1);
        ran[2]++;
    }
}

/* ---- boundaries ------------------------------------------------------------------------------------------------ */

static int32_t *spoilt_edges(int64_t batch, int64_t n, int64_t length)
{
    int32_t *edges = bytes(batch * n * (int64_t)sizeof *edges);
    for (int64_t b = 0; b < batch; b++)
        for (int64_t i = 0, at = 0; i < n; i++) {
            edges[b * n + i] = (int32_t)(i == n - 1 ? length : at);
            at += between(0, length - at);
        }
    if (!one_in(3)) edges[below(batch * n)] = (int32_t)(one_in(2) ? edge() : below(length + 2) - 1);
    return edges;
}

static void fuzz_boundaries(void)
{
    int64_t s[SIZES];
    dhsa_problem p = plain_problem(s);
    dhsa_select_config c = plain_config();
    dhsa_stats stats;
    p.causal = 1;
    c.method = one_in(2) ? DHSA_METHOD_ROWS : DHSA_METHOD_DHSA;
    c.score.score = c.method == DHSA_METHOD_DHSA ? DHSA_SCORE_BLOCK : DHSA_SCORE_ROWS;
    if (c.method == DHSA_METHOD_DHSA) c.mass = 0, c.floor = c.budget;
    const int64_t n = between(2, 9);
    const int32_t *edges = spoilt_edges(s[B], n, s[KEYS]);
    if (!place_problem(&p)) return;
    step = "boundaries are used";
    if (served(dhsa_prefill(&p, NULL, edges, n, &c, &stats, &error))) ran[3]++;
}

static void fuzz_picking(void)
{
    const int64_t length = between(1, 24), n = one_in(8) ? edge() : below(12),
                  room = n < 0        ? 3
                         : n < length ? n + 3
                                      : length + 3;
    float *scores = bytes(length * (int64_t)sizeof *scores);
    fill((char *)scores, length, DHSA_F32);
    int32_t *edges = bytes(room * (int64_t)sizeof *edges);
    int64_t count = 0;
    step = "boundaries are picked";
    if (!served(dhsa_pick_boundaries(scores, length, n, one_in(4) ? odd_number() : -1, one_in(8) ? edge() : below(4),
                                     one_in(2)   ? 0
                                     : one_in(4) ? edge()
                                                 : between(1, length),
                                     edges, &count, &error)))
        return;
    REQUIRE(count >= 2 && count <= room && edges[0] == 0 && edges[count - 1] == length);
    for (int64_t i = 1; i < count; i++) REQUIRE(edges[i] > edges[i - 1]);
    ran[4]++;
}

/* ---- means from elsewhere -------------------------------------------------------------------------------------- */

static dhsa_means plain_means(int64_t kv_heads, int64_t chunks, int64_t dim, int spread)
{
    dhsa_means m = {.kv_heads = kv_heads, .chunks = chunks, .dim = dim};
    m.mean = bytes(kv_heads * chunks * dim);
    m.scale = bytes(kv_heads * chunks * (int64_t)sizeof *m.scale);
    m.state = bytes(kv_heads * chunks);
    if (spread) {
        m.spread = bytes(kv_heads * chunks * (int64_t)sizeof *m.spread);
        fill((char *)m.spread, kv_heads * chunks, DHSA_F32);
    }
    for (int64_t i = 0; i < kv_heads * chunks * dim; i++) m.mean[i] = (int8_t)next();
    for (int64_t i = 0; i < kv_heads * chunks; i++) m.state[i] = (int8_t)(one_in(30) ? edge() : one_in(8));
    fill((char *)m.scale, kv_heads * chunks, DHSA_F32);
    return m;
}

static void fuzz_means(void)
{
    int64_t s[SIZES];
    dhsa_problem p = plain_problem(s);
    if (p.q.shape[0] != 1) s[B] = 1, shapes(&p, s);
    if (!place(&p.q) || !place(&p.k)) return;
    dhsa_select_config c = plain_config();
    if (!one_in(8)) {
        c.method = one_in(4) ? DHSA_METHOD_WINDOW : DHSA_METHOD_ROWS;
        c.score.score = DHSA_SCORE_ROWS;
        c.mass = 0;
        c.floor = c.budget;
    }
    const int64_t chunks = between(1, 9), groups = (chunks + DHSA_GROUP_CHUNKS - 1) / DHSA_GROUP_CHUNKS;
    const int32_t *edges = spoilt_edges(1, chunks + 1, s[KEYS]);
    dhsa_means fine = plain_means(s[KV_HEADS], chunks, s[DIM], 0), coarse = plain_means(s[KV_HEADS], groups, s[DIM], 1);
    if (one_in(8)) *(one_in(2) ? &fine.chunks : one_in(2) ? &coarse.kv_heads : &fine.dim) = edge();
    if (one_in(2)) {
        step = "means are computed";
        if (fine.chunks > chunks) fine.chunks = chunks; /* `edges` has no length of its own */
        if (served(dhsa_chunk_means(&p.k, edges, &fine, 1, &error))) ran[5]++;
        return;
    }
    const int64_t nq = (s[QUERIES] + c.score.query_block - 1) / c.score.query_block, first = below(nq + 1),
                  blocks = between(1, nq), sets = s[HEADS], n = one_in(8) ? below(20) : sets * blocks * s[KEYS];
    int64_t *indptr = bytes((sets * blocks + 1) * (int64_t)sizeof *indptr);
    int32_t *indices = bytes(n * (int64_t)sizeof *indices);
    step = "lists are made by means";
    if (served(dhsa_select_blocks(&p.q, &p.k, edges, chunks + 1, one_in(8) ? NULL : &fine, one_in(4) ? NULL : &coarse,
                                  &c, first, blocks, indptr, indices, n, 1, &error)))
        ran[5]++;
}

/* ---- bytes of a key index -------------------------------------------------------------------------------------- */

static char *written[8]; /* by indexes of several kinds */
static int64_t written_size[8];
static int64_t written_dtype[8];

enum { INDEX_KEYS = 160, INDEX_DIM = 5, INDEX_HEADS = 2 };

static dhsa_problem index_problem(int64_t queries, int64_t keys, dhsa_dtype dtype)
{
    const int64_t s[SIZES] = {1, INDEX_HEADS, INDEX_HEADS, queries, keys, INDEX_DIM, INDEX_DIM};
    dhsa_problem p;
    memset(&p, 0, sizeof p);
    shapes(&p, s);
    p.q.dtype = p.k.dtype = p.v.dtype = p.out.dtype = dtype;
    p.scale = 0.3;
    p.causal = p.num_threads = 1;
    return p;
}

static dhsa_select_config index_config(int kind)
{
    dhsa_select_config c;
    memset(&c, 0, sizeof c);
    c.method = kind & 1 ? DHSA_METHOD_DHSA : DHSA_METHOD_ROWS;
    c.score.score = kind & 1 ? DHSA_SCORE_BLOCK : DHSA_SCORE_ROWS;
    c.budget = c.floor = 12;
    c.sink = 2;
    c.local = 4;
    c.key_block = c.stride = 1;
    c.shortlist = kind & 2 && !(kind & 1) ? 40 : 0;
    c.score.query_block = 8;
    c.score.mean_queries = 2;
    c.score.scale = 0.3;
    return c;
}

static int index_runs(dhsa_key_index *index, int kind, int64_t queries, int64_t keys)
{
    dhsa_problem p = index_problem(queries, keys, (dhsa_dtype)written_dtype[kind]);
    const dhsa_select_config c = index_config(kind);
    const dhsa_boundary_config cuts = {.kind = DHSA_BOUNDARIES_FIXED, .chunk_size = 2};
    dhsa_stats stats;
    if (!place_problem(&p)) return 0;
    return served(dhsa_prefill_indexed(&p, &cuts, NULL, 0, &c, &index, below(keys + 1), 1, &stats, &error));
}

static void write_indexes(void)
{
    for (int kind = 0; kind < 8; kind++) {
        dhsa_key_index *index = NULL;
        written_dtype[kind] = kind < 4 ? DHSA_F32 : DHSA_BF16;
        REQUIRE(dhsa_key_index_new(&index, &error) == DHSA_OK);
        REQUIRE(index_runs(index, kind, 100, INDEX_KEYS));
        written_size[kind] = dhsa_key_index_write(index, NULL);
        written[kind] = malloc((size_t)written_size[kind]);
        REQUIRE(written[kind] && dhsa_key_index_write(index, written[kind]) == written_size[kind]);
        dhsa_key_index_free(index);
        let_go();
    }
}

static void fuzz_bytes(void)
{
    const int kind = (int)below(8);
    int64_t n = written_size[kind];
    if (one_in(4)) n = one_in(2) ? below(n + 1) : n - below(17);
    char *data = bytes(n);
    memcpy(data, written[kind], (size_t)n);
    for (int64_t spoils = between(0, 3); spoils > 0 && n > 0; spoils--) {
        if (one_in(3) && n >= 96) { /* a number of the header */
            const int64_t number64 = one_in(3) ? below(200) : edge();
            memcpy(data + 8 * below(12), &number64, sizeof number64);
        } else {
            data[below(n)] = (char)next();
        }
    }
    dhsa_key_index *index = NULL;
    step = "bytes are read";
    if (!served(dhsa_key_index_read(data, n, &index, &error))) {
        REQUIRE(index == NULL);
        return;
    }
    /* What it writes is read again. Of a level without means, the kind is not kept. */
    dhsa_key_index *twin = NULL;
    REQUIRE(dhsa_key_index_write(index, NULL) == n);
    char *again = bytes(n);
    dhsa_key_index_write(index, again);
    REQUIRE(dhsa_key_index_read(again, n, &twin, &error) == DHSA_OK);
    dhsa_key_index_free(twin);
    if (one_in(4)) {
        step = "bytes are used";
        const int64_t queries = one_in(2) ? 1 : between(2, 60);
        if (index_runs(index, kind, queries, between(queries, INDEX_KEYS + 20))) ran[6]++;
    }
    dhsa_key_index_free(index);
}

/* ---- all ------------------------------------------------------------------------------------------------------- */

static const struct {
    const char *name;
    void (*run)(void);
    int share; /* of 4096; most only check, and those that always compute take a hundred times as long */
} targets[] = {{"problems", fuzz_problem, 2040},
               {"selections", fuzz_selection, 1024},
               {"configurations", fuzz_config, 960},
               {"boundaries", fuzz_boundaries, 8},
               {"picking", fuzz_picking, 48},
               {"means", fuzz_means, 8},
               {"bytes", fuzz_bytes, 8}};
enum { TARGETS = sizeof targets / sizeof *targets };

static void execute(void)
{
    int64_t choice = below(4096);
    int at = 0;
    while (choice >= targets[at].share) choice -= targets[at++].share;
    checked[at]++;
    error = (dhsa_error){DHSA_OK, ""};
    targets[at].run();
    let_go();
}

int main(int argc, char **argv)
{
    seed = argc > 1 ? strtoull(argv[1], NULL, 10) : 0;
    const double seconds = argc > 2 ? atof(argv[2]) : 1;
    const uint64_t most = argc > 3 ? strtoull(argv[3], NULL, 10) : UINT64_MAX,
                   first = argc > 4 ? strtoull(argv[4], NULL, 10) : 0;
    const time_t end = time(NULL) + (time_t)ceil(seconds);
    int tiers = 0, last = -1;
    while (dhsa_isa_detected(tiers)) tiers++;
    tell_at_death();
    write_indexes();
    for (number = first; number - first < most && ((number & 1023) || time(NULL) < end); number++) {
        state = seed * UINT64_C(0xD1342543DE82EF95) + number * UINT64_C(0xAF251AF3B0F025B5);
        next();
        /* Of its number, like everything else. Asking the CPU takes longer than most executions. */
        const int tier = (int)(number / 65536 % (uint64_t)tiers);
        if (tier != last) REQUIRE(dhsa_isa_set(dhsa_isa_detected(last = tier), &error) == DHSA_OK);
        execute();
    }
    uint64_t served_in_all = 0;
    printf("seed %" PRIu64 ": %" PRIu64 " executions (", seed, number - first);
    for (int i = 0; i < TARGETS; i++) {
        printf("%s%s %" PRIu64, i ? ", " : "", targets[i].name, checked[i]);
        served_in_all += ran[i];
    }
    printf("), of which %" PRIu64 " computed a result\n", served_in_all);
    for (int kind = 0; kind < 8; kind++) free(written[kind]);
    return 0;
}
