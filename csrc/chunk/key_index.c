/* key_index.c: keys that were there in an earlier call: knows them again, and keeps their cuts and the means of their chunks, so
 * that a prompt in pieces and a decoding step do that work once a key. How keys are cut is boundaries.c's, what means are for
 * scores.c's. Decoding after arXiv 2510.24606: the prompt's chunks are kept, generated tokens are one chunk more, the current one
 * its own. */
#include "chunk/key_index.h"

#include <inttypes.h>
#include <stdatomic.h>
#include <string.h>

#include "core/arena.h"
#include "core/threads.h"

enum {
    RUN = 256, /* keys that are looked at in one task, */
    FEW = 512, /* and so many without the help of other threads */
    /* Of keys that are said to be the same, so many of the last and so many all over are looked at, */
    SAMPLE = 16,
    /* and a stretch that moves on from call to call, so that each key's turn comes within TURNS calls. Where all are no more than
     * LOOK bytes, all are looked at. */
    TURNS = 512,
    LOOK = 1 << 15
};

/* ---- knowing keys again ------------------------------------------------------------------------------------------ */

static uint64_t word(const char *at, int64_t bytes)
{
    uint64_t w = 0;
    memcpy(&w, at, (size_t)bytes);
    return w;
}

static uint64_t stir(uint64_t h, uint64_t w)
{
    h ^= w;
    return (h << 29 | h >> 35) * UINT64_C(0x9E3779B97F4A7C15);
}

/* A number made of all bytes of a key in all heads. A step of one of the four chains takes different words to different numbers,
 * so keys that differ in one word always have different fingerprints, others but for one pair in about 2^64. */
static uint64_t fingerprint_of(const dhsa_tensor *k, int64_t b, int64_t i)
{
    const int64_t bytes = k->shape[3] * dhsa_dtype_size(k->dtype);
    uint64_t h[4] = {1, 2, 3, 4};
    for (int64_t head = 0; head < k->shape[1]; head++) {
        const char *key = dhsa_row(k, b, head, i);
        int64_t at = 0;
        for (; at + 32 <= bytes; at += 32)
            for (int c = 0; c < 4; c++) h[c] = stir(h[c], word(key + at + 8 * c, 8));
        for (int c = 0; at < bytes; c++, at += 8) h[c] = stir(h[c], word(key + at, DHSA_MIN(bytes - at, 8)));
    }
    for (int c = 1; c < 4; c++) h[0] = stir(h[0], h[c] ^ h[c] >> 32);
    return h[0] ^ h[0] >> 32;
}

/* Looks at keys [from, to): notes their fingerprints, or with `first` finds the first one whose fingerprint is another than that
 * noted. */
typedef struct {
    uint64_t *fingerprints;
    const dhsa_tensor *k;
    int64_t b, from, to;
    _Atomic int64_t *first;
} key_index_look_job;

static void key_index_look_task(void *context, int64_t index, int thread)
{
    const key_index_look_job *job = context;
    const int64_t from = job->from + index * RUN, to = DHSA_MIN(from + RUN, job->to);
    (void)thread;
    for (int64_t i = from; i < to; i++) {
        if (!job->first) {
            job->fingerprints[i] = fingerprint_of(job->k, job->b, i);
        } else if (i >= atomic_load_explicit(job->first, memory_order_relaxed)) {
            return;
        } else if (fingerprint_of(job->k, job->b, i) != job->fingerprints[i]) {
            int64_t first = atomic_load(job->first);
            while (i < first && !atomic_compare_exchange_weak(job->first, &first, i)) {
            }
            return;
        }
    }
}

static void key_index_look(key_index_look_job *job, int num_threads)
{
    const int64_t n = job->to - job->from;
    if (n > 0) dhsa_parallel(dhsa_ceil_div(n, RUN), n > FEW ? num_threads : 1, key_index_look_task, job);
}

/* Forgets how the keys were cut from chunk number `chunks` on. */
static void forget_chunks(dhsa_key_index *p, int64_t chunks)
{
    if (chunks >= p->chunks) return;
    p->chunks = chunks;
    p->summed = -1;
    for (int i = 0; i < DHSA_LEVELS; i++)
        p->levels[i].done = DHSA_MIN(p->levels[i].done, i == DHSA_LEVEL_FINE ? chunks : chunks / DHSA_CHUNK_SUBGROUP);
}

/* Forgets everything about the keys from n on. */
static void forget(dhsa_key_index *p, int64_t n)
{
    int64_t chunks = p->chunks;
    p->known = DHSA_MIN(p->known, n);
    while (chunks > 0 && p->edges[chunks] > n) chunks--;
    forget_chunks(p, chunks);
    if (p->summed > n) p->summed = -1;
}

static int key_index_grow(void **memory, int64_t *room, int64_t need, int64_t used, int64_t size)
{
    if (need <= *room) return 1;
    const int64_t more = need + need / 2 + 64;
    void *bigger = dhsa_alloc(more, size);
    if (!bigger) return 0;
    if (*memory) memcpy(bigger, *memory, (size_t)(used * size));
    dhsa_free(*memory);
    *memory = bigger;
    *room = more;
    return 1;
}

static dhsa_status no_memory(dhsa_error *error, int64_t keys)
{
    return dhsa_fail(error, DHSA_ERR_NO_MEMORY, "key_indexes: no memory for the chunks of %" PRId64 " keys", keys);
}

/* The edges have room for what a step adds, also where nothing was cut yet. */
static dhsa_status make_room(dhsa_key_index *p, int64_t chunks, int64_t keys, dhsa_error *error)
{
    void *edges = p->edges;
    if (!key_index_grow(&edges, &p->edges_room, chunks + 2 * DHSA_CHUNK_GROUP, p->edges ? p->chunks + 1 : 0, sizeof *p->edges))
        return no_memory(error, keys);
    p->edges = edges;
    if (p->chunks == 0) p->edges[0] = 0;
    return DHSA_OK;
}

/* Takes note of the keys that are new; what it knew is as it was. */
static dhsa_status take_note(dhsa_key_index *p, const dhsa_tensor *k, int64_t b, int num_threads, dhsa_error *error)
{
    const int64_t length = k->shape[2];
    void *fingerprints = p->fingerprints;
    if (!key_index_grow(&fingerprints, &p->fingerprints_room, length, p->known, sizeof *p->fingerprints))
        return no_memory(error, length);
    p->fingerprints = fingerprints;
    key_index_look_job job = {p->fingerprints, k, b, p->known, length, NULL};
    key_index_look(&job, num_threads);
    p->known = length;
    return DHSA_OK;
}

/* ---- cutting ----------------------------------------------------------------------------------------------------- */

/* There are `chunks` chunks now, at least as many as there were. Means of a group of chunks that was not whole are those of a
 * longer one, and what was padding in a step is none any more. */
static void extended(dhsa_key_index *p, int64_t chunks)
{
    p->levels[DHSA_LEVEL_FINE].done = DHSA_MIN(p->levels[DHSA_LEVEL_FINE].done, p->chunks);
    p->levels[DHSA_LEVEL_COARSE].done = DHSA_MIN(p->levels[DHSA_LEVEL_COARSE].done, p->chunks / DHSA_CHUNK_SUBGROUP);
    p->chunks = chunks;
    p->summed = -1;
}

/* Cuts the keys up to `end`, from where they are not cut yet. */
static dhsa_status cut(dhsa_key_index *p, const dhsa_tensor *k, int64_t b, int64_t end, const dhsa_boundary_config *config,
                       int num_threads, dhsa_error *error)
{
    const int64_t from = p->chunks > 0 ? p->edges[p->chunks] : 0, room = dhsa_boundaries_capacity(config, end - from);
    int64_t count = 0;
    const dhsa_status roomy = make_room(p, p->chunks + room, end, error);
    if (roomy) return roomy;
    dhsa_tensor row = *k;
    row.data = dhsa_row(k, b, 0, 0);
    row.shape[0] = 1;
    const dhsa_status status = dhsa_boundaries_after(&row, from, end, config, p->edges + p->chunks, &count, num_threads, error);
    if (status) { /* its first entry is the last one that was there */
        p->edges[p->chunks] = (int32_t)from;
        return status;
    }
    extended(p, p->chunks + count - 1);
    return DHSA_OK;
}

/* Whether every step-th key of [from, to) has the fingerprint that was noted. */
static int alike(const dhsa_key_index *p, const dhsa_tensor *k, int64_t b, int64_t from, int64_t to, int64_t step)
{
    while (from < to && fingerprint_of(k, b, from) == p->fingerprints[from]) from += step;
    return from >= to;
}

/* Begins anew if these keys cannot be those that it knows; else finds how many it knows again. The first `same` are said to be
 * those of the last call. That is trusted as long as those agree that are looked at all the same. */
static int64_t recognise(dhsa_key_index *p, const dhsa_tensor *k, int64_t b, int64_t same, int num_threads)
{
    const int64_t known = DHSA_MIN(p->known, k->shape[2]);
    if (p->dtype != k->dtype || p->kv_heads != k->shape[1] || p->dim != k->shape[3]) {
        dhsa_key_index_reset(p);
        p->dtype = k->dtype;
        p->kv_heads = k->shape[1];
        p->dim = k->shape[3];
        return 0;
    }
    same = DHSA_MAX(DHSA_MIN(same, known), 0);
    const int64_t bytes = k->shape[1] * k->shape[3] * dhsa_dtype_size(k->dtype), old = same - SAMPLE;
    const int64_t stretch = DHSA_MAX(dhsa_ceil_div(same, TURNS), LOOK / bytes);
    int trusted = old > stretch;
    if (trusted) {
        const int64_t from = p->turn < old ? p->turn : 0, apart = dhsa_ceil_div(old, SAMPLE);
        p->turn = DHSA_MIN(from + stretch, old);
        trusted = alike(p, k, b, from, p->turn, 1) && alike(p, k, b, from % apart, old, apart);
    }
    _Atomic int64_t first;
    atomic_init(&first, known);
    key_index_look_job job = {p->fingerprints, k, b, trusted ? old : 0, known, &first};
    key_index_look(&job, num_threads);
    if (trusted && atomic_load(&first) < same) { /* what was said is not so: look at all */
        job.from = 0;
        key_index_look(&job, num_threads);
    }
    return atomic_load(&first);
}

dhsa_status dhsa_key_index_update(dhsa_key_index *p, const dhsa_tensor *k, int64_t b, const dhsa_boundary_config *config, int step,
                                  int64_t same, int num_threads, dhsa_error *error)
{
    const int64_t length = k->shape[2], end = length - (step != 0), again = recognise(p, k, b, same, num_threads);
    const int64_t before = p->known, chunks = p->chunks;
    dhsa_status status;
    forget(p, DHSA_MIN(again, end));
    if ((status = make_room(p, p->chunks + 1, length, error))) return status;
    /* In a step, keys that came with others in a call that was not seen here are cut as a prompt's are; those that came alone,
     * and those that took the place of such, are not. */
    const int generated = step && p->chunks > 0 && p->chunks == chunks && end <= before;
    if (!generated && (p->chunks > 0 ? p->edges[p->chunks] : 0) < end && (status = cut(p, k, b, end, config, num_threads, error)))
        return status;
    if ((status = take_note(p, k, b, num_threads, error))) return status;
    p->total = p->chunks;
    if (!step) return DHSA_OK;
    /* The rest begins a group of its own, after empty chunks, so that the others' means stay as they are. */
    const int32_t from = p->edges[p->chunks];
    while (p->total % DHSA_CHUNK_GROUP != 0) p->edges[++p->total] = from;
    p->edges[++p->total] = (int32_t)end;
    p->edges[++p->total] = (int32_t)length;
    return DHSA_OK;
}

dhsa_status dhsa_key_index_assign(dhsa_key_index *p, const dhsa_tensor *k, int64_t b, const int32_t *boundaries, int64_t n,
                                  int64_t same, int num_threads, dhsa_error *error)
{
    const int64_t length = k->shape[2];
    dhsa_status status;
    forget(p, recognise(p, k, b, same, num_threads));
    while (n > 2 && boundaries[n - 2] == length) n--;
    int64_t stay = 0;
    while (stay < p->chunks && stay < n - 1 && p->edges[stay + 1] == boundaries[stay + 1]) stay++;
    forget_chunks(p, stay);
    if ((status = make_room(p, n, length, error))) return status;
    memcpy(p->edges, boundaries, (size_t)n * sizeof *boundaries);
    extended(p, n - 1);
    status = take_note(p, k, b, num_threads, error);
    p->total = p->chunks;
    return status;
}

/* ---- means ------------------------------------------------------------------------------------------------------- */

/* The mean of n keys out of their sum, as number `at` of a head. */
static void put(const dhsa_kernels *kernels, dhsa_chunks *c, int64_t head, int64_t at, const float *sum, int64_t n, int64_t dim,
                float *mean)
{
    unsigned char *state = c->state + head * c->pitch + at;
    for (int64_t d = 0; d < dim; d++) mean[d] = n > 0 ? sum[d] / (float)n : 0.0f;
    *state = n == 0 ? DHSA_CHUNK_EMPTY : DHSA_CHUNK_GOOD;
    if (!dhsa_all_finite(kernels, mean, dim)) {
        *state = DHSA_CHUNK_BAD;
        memset(mean, 0, (size_t)dim * sizeof *mean);
    }
    dhsa_mean_put(kernels, c, mean, dim, c->means, head * c->pitch + at);
}

/* A step's last chunks: of the fine level the generated keys and the current one, of the coarse level both as one. The sum of what
 * was generated is carried on, or a long answer would be read again for each of its tokens. */
static void put_last(dhsa_key_index *p, int level, const dhsa_kernels *kernels, const dhsa_tensor *k, int64_t b, int64_t at,
                     dhsa_chunks *c, float *scratch)
{
    const int64_t from = p->edges[p->chunks], end = k->shape[2] - 1, dim = p->dim;
    if (p->summed < 0 || p->summed < from) {
        memset(p->sum, 0, (size_t)(p->kv_heads * dim) * sizeof *p->sum);
        p->summed = from;
    }
    for (int64_t h = 0; h < p->kv_heads; h++) {
        float *sum = p->sum + h * dim;
        for (int64_t i = p->summed; i < end; i++) kernels->add(dhsa_row(k, b, h, i), k->dtype, dim, sum);
        if (level == DHSA_LEVEL_FINE) {
            put(kernels, c, h, at, sum, end - from, dim, scratch);
            memset(scratch + dim, 0, (size_t)dim * sizeof *scratch);
            kernels->add(dhsa_row(k, b, h, end), k->dtype, dim, scratch + dim);
            put(kernels, c, h, at + 1, scratch + dim, 1, dim, scratch);
        } else {
            memcpy(scratch + dim, sum, (size_t)dim * sizeof *scratch);
            kernels->add(dhsa_row(k, b, h, end), k->dtype, dim, scratch + dim);
            put(kernels, c, h, at, scratch + dim, end + 1 - from, dim, scratch);
        }
    }
    p->summed = DHSA_MAX(p->summed, end);
}

dhsa_status dhsa_key_index_means(dhsa_key_index *p, int level, dhsa_means_kind kind, const dhsa_kernels *kernels,
                                 const dhsa_tensor *k, int64_t b, const int32_t *edges, int64_t count, dhsa_chunks *chunks,
                                 char *arenas, int64_t stride, int num_threads, dhsa_error *error)
{
    dhsa_level *l = &p->levels[level];
    const int squares = kind != DHSA_MEANS_F32 && kernels->bf16 != NULL;
    if (l->open && (l->chunks.kind != kind || l->chunks.squares != squares)) {
        dhsa_chunks_close(&l->chunks);
        l->open = 0;
    }
    if (!l->open) {
        l->done = 0;
        l->open = dhsa_chunks_open(&l->chunks, kind, squares, p->kv_heads, count + count / 4 + 2 * DHSA_CHUNK_GROUP, p->dim);
        if (!l->open) {
            dhsa_chunks_close(&l->chunks);
            return no_memory(error, k->shape[2]);
        }
    } else if (count > l->chunks.pitch &&
               !dhsa_chunks_grow(&l->chunks, p->kv_heads, count + count / 4 + 2 * DHSA_CHUNK_GROUP, p->dim, l->done, 0)) {
        return no_memory(error, k->shape[2]);
    }
    if (!p->sum && !(p->sum = dhsa_alloc(p->kv_heads, p->dim * (int64_t)sizeof *p->sum))) return no_memory(error, k->shape[2]);
    const int64_t last = p->total == p->chunks ? 0 : level == DHSA_LEVEL_FINE ? 2 : 1; /* chunks that are a step's */
    l->chunks.edges = edges;
    l->chunks.chunks = count - last;
    dhsa_chunks_fill(kernels, k, b, &l->chunks, l->done, arenas, stride, num_threads);
    /* Of a coarse chunk that is not whole, more may come. */
    l->done = level == DHSA_LEVEL_FINE || last > 0 ? count - last : p->chunks / DHSA_CHUNK_SUBGROUP;
    if (last > 0) dhsa_whole(arenas, 2 * p->dim * (int64_t)sizeof(float));
    if (last > 0) put_last(p, level, kernels, k, b, count - last, &l->chunks, (float *)arenas);
    l->chunks.chunks = count;
    dhsa_chunks_look(&l->chunks, p->kv_heads);
    *chunks = l->chunks;
    return DHSA_OK;
}

/* ---- its life ---------------------------------------------------------------------------------------------------- */

dhsa_status dhsa_key_index_new(dhsa_key_index **index, dhsa_error *error)
{
    const dhsa_status status = dhsa_check_pointer(index, "key_index", error);
    if (status) return status;
    *index = dhsa_alloc_zeroed(1, sizeof **index);
    if (!*index) return no_memory(error, 0);
    (*index)->summed = -1;
    return DHSA_OK;
}

void dhsa_key_index_drop_means(dhsa_key_index *p)
{
    for (int i = 0; p && i < DHSA_LEVELS; i++) {
        if (p->levels[i].open) dhsa_chunks_close(&p->levels[i].chunks);
        p->levels[i].open = 0;
    }
}

void dhsa_key_index_reset(dhsa_key_index *p)
{
    if (!p) return;
    dhsa_key_index_drop_means(p);
    dhsa_free(p->fingerprints);
    dhsa_free(p->edges);
    dhsa_free(p->sum);
    memset(p, 0, sizeof *p);
    p->summed = -1;
}

static void *copy_of(const void *memory, int64_t room, int64_t used, int64_t size)
{
    void *copy = memory ? dhsa_alloc(room, size) : NULL;
    if (copy) memcpy(copy, memory, (size_t)(used * size));
    return copy;
}

dhsa_status dhsa_key_index_copy(const dhsa_key_index *p, dhsa_key_index **twin, dhsa_error *error)
{
    dhsa_status status;
    if ((status = dhsa_check_pointer(p, "key_index", error)) || (status = dhsa_key_index_new(twin, error))) return status;
    dhsa_key_index *t = *twin;
    *t = *p;
    /* The sum is made again from the keys. */
    t->sum = NULL;
    t->summed = -1;
    t->fingerprints = copy_of(p->fingerprints, p->fingerprints_room, p->known, sizeof *p->fingerprints);
    t->edges = copy_of(p->edges, p->edges_room, p->total + 1, sizeof *p->edges);
    int good = (t->fingerprints || !p->fingerprints) && (t->edges || !p->edges);
    for (int i = 0; i < DHSA_LEVELS; i++) {
        dhsa_level *l = &t->levels[i];
        if (!good) l->open = 0;
        if (l->open && !dhsa_chunks_grow(&l->chunks, p->kv_heads, l->chunks.pitch, p->dim, l->done, 1)) good = l->open = 0;
    }
    if (good) return DHSA_OK;
    dhsa_key_index_free(t);
    *twin = NULL;
    return no_memory(error, p->known);
}

void dhsa_key_index_free(dhsa_key_index *p)
{
    dhsa_key_index_reset(p);
    dhsa_free(p);
}

int64_t dhsa_key_index_boundaries(const dhsa_key_index *p, int32_t *boundaries)
{
    const int64_t count = p && p->total > 0 ? p->total + 1 : 0;
    if (boundaries && count > 0) memcpy(boundaries, p->edges, (size_t)count * sizeof *boundaries);
    return count;
}

int64_t dhsa_key_index_bytes(const dhsa_key_index *p)
{
    if (!p) return 0;
    int64_t bytes = p->fingerprints_room * (int64_t)sizeof *p->fingerprints + p->edges_room * (int64_t)sizeof *p->edges +
                    (p->sum ? p->kv_heads * p->dim * (int64_t)sizeof *p->sum : 0);
    for (int i = 0; i < DHSA_LEVELS; i++) {
        const dhsa_chunks *c = &p->levels[i].chunks;
        if (p->levels[i].open) bytes += p->kv_heads * c->pitch * (c->row * (c->kind == DHSA_MEANS_F32 ? 4 : 2) + 1);
    }
    return bytes;
}

/* ---- as bytes ---------------------------------------------------------------------------------------------------- */

/* A header of so many int64, in this order; then the fingerprints, the edges, and for each level and KV head the states and the
 * means of the first `done` chunks, as they lie in memory. All of the machine's byte order. */
enum { HEAD_MAGIC = 0, HEAD_DTYPE, HEAD_KV_HEADS, HEAD_DIM, HEAD_KNOWN, HEAD_CHUNKS, HEAD_LEVELS, HEAD_SIZE = 6 + 3 * DHSA_LEVELS };
static const int64_t HEAD_VALUE = INT64_C(0x3149585945414844); /* its last character is the version of this layout */

static void put_bytes(char *to, int64_t *at, const void *from, int64_t size)
{
    if (to && size > 0) memcpy(to + *at, from, (size_t)size);
    *at += size;
}

int64_t dhsa_key_index_write(const dhsa_key_index *p, char *bytes)
{
    if (!p) return 0;
    int64_t head[HEAD_SIZE] = {HEAD_VALUE, p->dtype, p->kv_heads, p->dim, p->known, p->chunks}, at = 0;
    for (int i = 0; i < DHSA_LEVELS; i++) {
        const dhsa_level *l = &p->levels[i];
        const int64_t most = i == DHSA_LEVEL_FINE ? p->chunks : p->chunks / DHSA_CHUNK_SUBGROUP;
        int64_t *of = head + HEAD_LEVELS + 3 * i;
        if (!l->open) continue;
        of[0] = l->chunks.kind;
        of[1] = l->chunks.squares;
        of[2] = DHSA_MIN(l->done, most) / DHSA_CHUNK_GROUP * DHSA_CHUNK_GROUP; /* whole squares; the rest is soon made again */
    }
    put_bytes(bytes, &at, head, sizeof head);
    put_bytes(bytes, &at, p->fingerprints, p->known * (int64_t)sizeof *p->fingerprints);
    put_bytes(bytes, &at, p->edges, (p->chunks > 0 ? p->chunks + 1 : 0) * (int64_t)sizeof *p->edges);
    for (int i = 0; i < DHSA_LEVELS; i++) {
        const dhsa_chunks *c = &p->levels[i].chunks;
        const int64_t done = head[HEAD_LEVELS + 3 * i + 2], row = c->row * (c->kind == DHSA_MEANS_F32 ? 4 : 2);
        for (int64_t h = 0; done > 0 && h < p->kv_heads; h++) {
            put_bytes(bytes, &at, c->state + h * c->pitch, done);
            put_bytes(bytes, &at, (const char *)c->means + h * c->pitch * row, done * row);
        }
    }
    return at;
}

/* Copies `count` things of `size` bytes from *at on, if they are there. */
static int take_bytes(void *to, const char *bytes, int64_t n, int64_t *at, int64_t count, int64_t size)
{
    int64_t need;
    if (!dhsa_mul(count, size, &need) || need > n - *at) return 0;
    if (need > 0) memcpy(to, bytes + *at, (size_t)need);
    *at += need;
    return 1;
}

/* Whether the means of a chunk of these keys can have this state. */
static int state_fits(int state, int32_t from, int32_t to)
{
    return from == to ? state == DHSA_CHUNK_EMPTY : state == DHSA_CHUNK_GOOD || state == DHSA_CHUNK_BAD;
}

static int means_finite(const void *means, int64_t n, dhsa_means_kind kind)
{
    const uint32_t *wide = means;
    const uint16_t *narrow = means;
    int bad = 0; /* no way out of the loops, so that a compiler makes vectors of them */
    for (int64_t i = 0; kind == DHSA_MEANS_F32 && i < n; i++) bad |= (wide[i] & 0x7F800000u) == 0x7F800000u;
    for (int64_t i = 0; kind != DHSA_MEANS_F32 && i < n; i++) bad |= (narrow[i] & 0x7F80u) == 0x7F80u;
    return !bad;
}

/* Fills a level by its part of the header. 1: good; 0: the bytes are not what it can be; -1: no memory. */
static int take_level(dhsa_key_index *p, int level, const int64_t *of, const char *bytes, int64_t n, int64_t *at)
{
    dhsa_level *l = &p->levels[level];
    const int64_t chunks_of = level == DHSA_LEVEL_FINE ? 1 : DHSA_CHUNK_SUBGROUP, done = of[2];
    if (done == 0) return of[0] >= 0 && of[0] <= DHSA_MEANS_BF16;
    if ((of[0] != DHSA_MEANS_F32 && of[0] != DHSA_MEANS_BF16) || of[1] < 0 || of[1] > (of[0] == DHSA_MEANS_BF16) || done < 0 ||
        done > p->chunks / chunks_of || done % DHSA_CHUNK_GROUP != 0)
        return 0;
    dhsa_chunks plan;
    int64_t cells, need;
    dhsa_chunks_plan(&plan, (dhsa_means_kind)of[0], (int)of[1], done, p->dim);
    const int64_t size = plan.kind == DHSA_MEANS_F32 ? 4 : 2, row = plan.row * size;
    /* Looked at before memory is asked for, so that this is in proportion to the bytes that are there. */
    if (!dhsa_mul(p->kv_heads, done, &cells) || !dhsa_mul(cells, row + 1, &need) || need > n - *at) return 0;
    l->open = dhsa_chunks_open(&l->chunks, plan.kind, plan.squares, p->kv_heads, done + done / 4 + 2 * DHSA_CHUNK_GROUP, p->dim);
    if (!l->open) {
        dhsa_chunks_close(&l->chunks);
        return -1;
    }
    l->done = done;
    for (int64_t h = 0; h < p->kv_heads; h++) {
        unsigned char *state = l->chunks.state + h * l->chunks.pitch;
        char *means = (char *)l->chunks.means + h * l->chunks.pitch * row;
        if (!take_bytes(state, bytes, n, at, done, 1) || !take_bytes(means, bytes, n, at, done, row) ||
            !means_finite(means, done * plan.row, plan.kind))
            return 0;
        for (int64_t c = 0; c < done; c++)
            if (!state_fits(state[c], p->edges[c * chunks_of], p->edges[(c + 1) * chunks_of])) return 0;
    }
    return 1;
}

dhsa_status dhsa_key_index_read(const char *bytes, int64_t n, dhsa_key_index **index, dhsa_error *error)
{
    int64_t head[HEAD_SIZE], at = 0;
    dhsa_status status;
    if ((status = dhsa_check_pointer(bytes, "bytes", error)) || (status = dhsa_key_index_new(index, error))) return status;
    dhsa_key_index *p = *index;
    int good = take_bytes(head, bytes, n, &at, HEAD_SIZE, sizeof *head) && head[HEAD_MAGIC] == HEAD_VALUE &&
               head[HEAD_KNOWN] >= 0 && head[HEAD_KNOWN] <= DHSA_MAX_LENGTH && head[HEAD_CHUNKS] >= 0 &&
               head[HEAD_CHUNKS] <= DHSA_MAX_LENGTH && head[HEAD_DTYPE] >= 0 && head[HEAD_DTYPE] <= DHSA_BF16 &&
               head[HEAD_KV_HEADS] >= 0 && head[HEAD_KV_HEADS] <= INT32_MAX && head[HEAD_DIM] >= 0 &&
               head[HEAD_DIM] <= DHSA_MAX_HEAD_DIM &&
               head[HEAD_KNOWN] * (int64_t)sizeof *p->fingerprints + head[HEAD_CHUNKS] * (int64_t)sizeof *p->edges <= n - at;
    if (good) {
        p->dtype = (dhsa_dtype)head[HEAD_DTYPE];
        p->kv_heads = head[HEAD_KV_HEADS];
        p->dim = head[HEAD_DIM];
        void *fingerprints = NULL, *edges = NULL;
        const int64_t edge_count = head[HEAD_CHUNKS] > 0 ? head[HEAD_CHUNKS] + 1 : 0;
        good = key_index_grow(&fingerprints, &p->fingerprints_room, head[HEAD_KNOWN], 0, sizeof *p->fingerprints) &&
                       key_index_grow(&edges, &p->edges_room, edge_count, 0, sizeof *p->edges)
                   ? 1
                   : -1;
        p->fingerprints = fingerprints;
        p->edges = edges;
        if (good > 0)
            good = take_bytes(fingerprints, bytes, n, &at, head[HEAD_KNOWN], sizeof *p->fingerprints) &&
                   take_bytes(edges, bytes, n, &at, edge_count, sizeof *p->edges) && (edge_count == 0 || p->edges[0] == 0);
        p->known = good > 0 ? head[HEAD_KNOWN] : 0;
        p->chunks = p->total = good > 0 ? head[HEAD_CHUNKS] : 0;
    }
    for (int64_t c = 0; good > 0 && c < p->chunks; c++) good = p->edges[c] <= p->edges[c + 1];
    if (good > 0 && p->chunks > 0) good = p->edges[p->chunks] <= p->known;
    for (int i = 0; good > 0 && i < DHSA_LEVELS; i++) good = take_level(p, i, head + HEAD_LEVELS + 3 * i, bytes, n, &at);
    if (good > 0 && at == n) return DHSA_OK;
    dhsa_key_index_free(p);
    *index = NULL;
    if (good < 0) return no_memory(error, head[HEAD_KNOWN]);
    return dhsa_fail(error, DHSA_ERR_VALUE, "bytes: these %" PRId64 " are no key index that this version has written", n);
}
