/* key_index.c: recognises the keys of earlier calls and keeps their cuts and the means of their chunks, so that a
 * prompt in pieces and decoding steps do this work once per key. Keys are cut in boundaries.c; the means are used in
 * select/scorer.c. Decoding follows arXiv 2510.24606: the chunks of the prompt are kept, the generated tokens are one
 * more chunk, and the current token is a chunk of its own. */
#include "chunk/key_index.h"

#include <inttypes.h>
#include <stdatomic.h>
#include <string.h>

#include "core/arena.h"
#include "core/threads.h"

enum {
    RUN = 256, /* keys of one task */
    FEW = 512, /* up to this many keys are handled by one thread */
    /* Of the keys that the caller says are the same, these are checked: the last SAMPLE, SAMPLE spread over the others,
     * and a stretch that moves on from call to call, so that each key is checked within TURNS calls. */
    SAMPLE = 16,
    TURNS = 512,
    CHECKED_BYTES = 1 << 15 /* keys that take no more bytes than this are all checked */
};

/* ---- recognising keys ------------------------------------------------------------------------------------------ */

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

/* A 64-bit hash of all bytes of a key in all KV heads. A step of one of the four chains maps different words to
 * different values, so keys that differ in one word always have different fingerprints. Keys that differ in more words
 * have the same one with a probability of about 2^-64. */
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

/* Computes the fingerprints of keys [from, to). With `first` NULL they are stored; otherwise *first is lowered to the
 * first key whose fingerprint differs from the stored one. */
typedef struct {
    uint64_t *fingerprints;
    const dhsa_tensor *k;
    int64_t b, from, to;
    _Atomic int64_t *first;
} fingerprint_job;

static void fingerprint_task(void *context, int64_t index, int thread)
{
    const fingerprint_job *job = context;
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

static void fingerprint_keys(fingerprint_job *job, int num_threads)
{
    const int64_t n = job->to - job->from;
    if (n > 0) dhsa_parallel(dhsa_ceil_div(n, RUN), n > FEW ? num_threads : 1, fingerprint_task, job);
}

/* Drops the cuts and means from chunk number `chunks` on. */
static void forget_chunks(dhsa_key_index *p, int64_t chunks)
{
    if (chunks >= p->chunks) return;
    p->chunks = chunks;
    p->summed = -1;
    for (int i = 0; i < DHSA_LEVELS; i++)
        p->levels[i].done = DHSA_MIN(p->levels[i].done, i == DHSA_LEVEL_FINE ? chunks : chunks / DHSA_CHUNK_GROUP);
}

/* Drops everything about the keys from n on. */
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

/* Makes room for the edges of `chunks` chunks and of those that a decoding step adds, also if nothing is cut yet. */
static dhsa_status make_room(dhsa_key_index *p, int64_t chunks, int64_t keys, dhsa_error *error)
{
    void *edges = p->edges;
    if (!key_index_grow(&edges, &p->edges_room, chunks + 2 * DHSA_CHUNK_GROUP, p->edges ? p->chunks + 1 : 0,
                        sizeof *p->edges))
        return no_memory(error, keys);
    p->edges = edges;
    if (p->chunks == 0) p->edges[0] = 0;
    return DHSA_OK;
}

/* Stores the fingerprints of the keys that are new; those of known keys stay unchanged. */
static dhsa_status store_fingerprints(dhsa_key_index *p, const dhsa_tensor *k, int64_t b, int num_threads,
                                      dhsa_error *error)
{
    const int64_t length = k->shape[2];
    void *fingerprints = p->fingerprints;
    if (!key_index_grow(&fingerprints, &p->fingerprints_room, length, p->known, sizeof *p->fingerprints))
        return no_memory(error, length);
    p->fingerprints = fingerprints;
    fingerprint_job job = {p->fingerprints, k, b, p->known, length, NULL};
    fingerprint_keys(&job, num_threads);
    p->known = length;
    return DHSA_OK;
}

/* ---- cutting --------------------------------------------------------------------------------------------------- */

/* Sets the number of chunks, which is not less than before. Some means are no longer valid: a coarse chunk that was not
 * whole has become longer, and the empty chunks that padded a decoding step are replaced. */
static void set_chunk_count(dhsa_key_index *p, int64_t chunks)
{
    p->levels[DHSA_LEVEL_FINE].done = DHSA_MIN(p->levels[DHSA_LEVEL_FINE].done, p->chunks);
    p->levels[DHSA_LEVEL_COARSE].done = DHSA_MIN(p->levels[DHSA_LEVEL_COARSE].done, p->chunks / DHSA_CHUNK_GROUP);
    p->chunks = chunks;
    p->summed = -1;
}

/* Cuts the keys below `end` that are not cut yet. */
static dhsa_status cut(dhsa_key_index *p, const dhsa_tensor *k, int64_t b, int64_t end,
                       const dhsa_boundary_config *config, int num_threads, dhsa_error *error)
{
    const int64_t from = p->chunks > 0 ? p->edges[p->chunks] : 0, room = dhsa_boundaries_capacity(config, end - from);
    int64_t count = 0;
    const dhsa_status roomy = make_room(p, p->chunks + room, end, error);
    if (roomy) return roomy;
    dhsa_tensor row = *k;
    row.data = dhsa_row(k, b, 0, 0);
    row.shape[0] = 1;
    const dhsa_status status =
        dhsa_boundaries_after(&row, from, end, config, p->edges + p->chunks, &count, num_threads, error);
    if (status) { /* restores the edge where the new ones begin */
        p->edges[p->chunks] = (int32_t)from;
        return status;
    }
    set_chunk_count(p, p->chunks + count - 1);
    return DHSA_OK;
}

/* Whether every step-th key of [from, to) has the fingerprint that is stored. */
static int fingerprints_match(const dhsa_key_index *p, const dhsa_tensor *k, int64_t b, int64_t from, int64_t to,
                              int64_t step)
{
    while (from < to && fingerprint_of(k, b, from) == p->fingerprints[from]) from += step;
    return from >= to;
}

/* Returns how many of the first keys are recognised by their fingerprints. If dtype or shape differ from those of the
 * last call, the index is emptied. The caller says that the first `same` keys are those of the last call. If the sample
 * of them that is checked agrees, the others are not compared. */
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
    const int64_t stretch = DHSA_MAX(dhsa_ceil_div(same, TURNS), CHECKED_BYTES / bytes);
    int trusted = old > stretch;
    if (trusted) {
        const int64_t from = p->turn < old ? p->turn : 0, apart = dhsa_ceil_div(old, SAMPLE);
        p->turn = DHSA_MIN(from + stretch, old);
        trusted =
            fingerprints_match(p, k, b, from, p->turn, 1) && fingerprints_match(p, k, b, from % apart, old, apart);
    }
    _Atomic int64_t first;
    atomic_init(&first, known);
    fingerprint_job job = {p->fingerprints, k, b, trusted ? old : 0, known, &first};
    fingerprint_keys(&job, num_threads);
    if (trusted && atomic_load(&first) < same) { /* the caller was wrong: compare all keys */
        job.from = 0;
        fingerprint_keys(&job, num_threads);
    }
    return atomic_load(&first);
}

dhsa_status dhsa_key_index_update(dhsa_key_index *p, const dhsa_tensor *k, int64_t b,
                                  const dhsa_boundary_config *config, int step, int64_t same, int num_threads,
                                  dhsa_error *error)
{
    const int64_t length = k->shape[2], end = length - (step != 0), recognised = recognise(p, k, b, same, num_threads);
    const int64_t before = p->known, chunks = p->chunks;
    dhsa_status status;
    forget(p, DHSA_MIN(recognised, end));
    if ((status = make_room(p, p->chunks + 1, length, error))) return status;
    /* In a decoding step, keys that came together in a call that did not use this index are cut like those of a prompt.
     * Keys that came one at a time, and keys that replaced such keys, are not. */
    const int generated = step && p->chunks > 0 && p->chunks == chunks && end <= before;
    if (!generated && (p->chunks > 0 ? p->edges[p->chunks] : 0) < end &&
        (status = cut(p, k, b, end, config, num_threads, error)))
        return status;
    if ((status = store_fingerprints(p, k, b, num_threads, error))) return status;
    p->total = p->chunks;
    if (!step) return DHSA_OK;
    /* The other keys begin a group of their own, after empty chunks, so that the means of earlier groups stay valid. */
    const int32_t from = p->edges[p->chunks];
    while (p->total % DHSA_CHUNK_GROUP != 0) p->edges[++p->total] = from;
    p->edges[++p->total] = (int32_t)end;
    p->edges[++p->total] = (int32_t)length;
    return DHSA_OK;
}

dhsa_status dhsa_key_index_assign(dhsa_key_index *p, const dhsa_tensor *k, int64_t b, const int32_t *boundaries,
                                  int64_t n, int64_t same, int num_threads, dhsa_error *error)
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
    set_chunk_count(p, n - 1);
    status = store_fingerprints(p, k, b, num_threads, error);
    p->total = p->chunks;
    return status;
}

/* ---- means ----------------------------------------------------------------------------------------------------- */

/* Writes the mean of n keys, given their sum and the sum of their squares, as mean number `at` of a KV head. */
static void put(const dhsa_kernels *kernels, dhsa_chunks *c, int64_t head, int64_t at, const float *sum, float squares,
                int64_t n, int64_t dim, float *mean)
{
    unsigned char *state = c->state + head * c->pitch + at;
    for (int64_t d = 0; d < dim; d++) mean[d] = n > 0 ? sum[d] / (float)n : 0.0f;
    *state = n == 0 ? DHSA_CHUNK_EMPTY : DHSA_CHUNK_GOOD;
    if (!dhsa_all_finite(kernels, mean, dim)) {
        *state = DHSA_CHUNK_BAD;
        memset(mean, 0, (size_t)dim * sizeof *mean);
    }
    dhsa_mean_put(kernels, c, mean, dim, c->means, c->scale, c->bias, head * c->pitch + at);
    if (c->spread)
        c->spread[head * c->pitch + at] =
            *state == DHSA_CHUNK_GOOD ? dhsa_chunk_spread(kernels, mean, squares, n, dim) : 0;
}

/* Writes the means of the last chunks of a decoding step: at the fine level the generated keys and the current key, at
 * the coarse level both as one chunk. The sum of the generated keys is kept between steps; otherwise each step would
 * read all of them again. */
static void put_last(dhsa_key_index *p, int level, const dhsa_kernels *kernels, const dhsa_tensor *k, int64_t b,
                     int64_t at, dhsa_chunks *c, float *scratch)
{
    const int64_t from = p->edges[p->chunks], end = k->shape[2] - 1, dim = p->dim;
    if (p->summed < 0 || p->summed < from) {
        memset(p->sum, 0, (size_t)(p->kv_heads * (dim + 1)) * sizeof *p->sum);
        p->summed = from;
    }
    for (int64_t h = 0; h < p->kv_heads; h++) {
        float *sum = p->sum + h * (dim + 1), *squares = sum + dim;
        for (int64_t i = p->summed; i < end; i++) kernels->add(dhsa_row(k, b, h, i), k->dtype, dim, sum);
        *squares += dhsa_chunk_squares(kernels, k, b, h, p->summed, end, scratch);
        if (level == DHSA_LEVEL_FINE) {
            put(kernels, c, h, at, sum, *squares, end - from, dim, scratch);
            memset(scratch + dim, 0, (size_t)dim * sizeof *scratch);
            kernels->add(dhsa_row(k, b, h, end), k->dtype, dim, scratch + dim);
            put(kernels, c, h, at + 1, scratch + dim, 0, 1, dim, scratch);
        } else {
            memcpy(scratch + dim, sum, (size_t)dim * sizeof *scratch);
            kernels->add(dhsa_row(k, b, h, end), k->dtype, dim, scratch + dim);
            const float last = dhsa_chunk_squares(kernels, k, b, h, end, end + 1, scratch);
            put(kernels, c, h, at, scratch + dim, *squares + last, end + 1 - from, dim, scratch);
        }
    }
    p->summed = DHSA_MAX(p->summed, end);
}

dhsa_status dhsa_key_index_means(dhsa_key_index *p, int level, dhsa_means_kind kind, const dhsa_kernels *kernels,
                                 const dhsa_tensor *k, int64_t b, const int32_t *edges, int64_t count,
                                 dhsa_chunks *chunks, char *arenas, int64_t stride, int num_threads, dhsa_error *error)
{
    dhsa_level *l = &p->levels[level];
    const int squares = kind == DHSA_MEANS_BF16 && kernels->bf16 != NULL;
    if (l->open && (l->chunks.kind != kind || l->chunks.squares != squares)) {
        dhsa_chunks_close(&l->chunks);
        l->open = 0;
    }
    if (!l->open) {
        l->done = 0;
        l->open = dhsa_chunks_open(&l->chunks, kind, squares, level == DHSA_LEVEL_COARSE, p->kv_heads,
                                   count + count / 4 + 2 * DHSA_CHUNK_GROUP, p->dim);
        if (!l->open) {
            dhsa_chunks_close(&l->chunks);
            return no_memory(error, k->shape[2]);
        }
    } else if (count > l->chunks.pitch &&
               !dhsa_chunks_grow(&l->chunks, p->kv_heads, count + count / 4 + 2 * DHSA_CHUNK_GROUP, p->dim, l->done,
                                 0)) {
        return no_memory(error, k->shape[2]);
    }
    if (!p->sum && !(p->sum = dhsa_alloc(p->kv_heads, (p->dim + 1) * (int64_t)sizeof *p->sum)))
        return no_memory(error, k->shape[2]);
    const int64_t last = p->total == p->chunks ? 0 : level == DHSA_LEVEL_FINE ? 2 : 1; /* chunks of a decoding step */
    l->chunks.edges = edges;
    l->chunks.chunks = count - last;
    dhsa_chunks_fill(kernels, k, b, &l->chunks, l->done, arenas, stride, num_threads);
    /* A coarse chunk that is not whole may grow, so its mean is not final. */
    l->done = level == DHSA_LEVEL_FINE || last > 0 ? count - last : p->chunks / DHSA_CHUNK_GROUP;
    if (last > 0) dhsa_whole(arenas, 3 * p->dim * (int64_t)sizeof(float));
    if (last > 0) put_last(p, level, kernels, k, b, count - last, &l->chunks, (float *)arenas);
    l->chunks.chunks = count;
    dhsa_chunks_look(&l->chunks, p->kv_heads);
    *chunks = l->chunks;
    return DHSA_OK;
}

/* ---- creation, copies, release --------------------------------------------------------------------------------- */

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
    if ((status = dhsa_check_pointer(p, "key_index", error)) || (status = dhsa_key_index_new(twin, error)))
        return status;
    dhsa_key_index *t = *twin;
    *t = *p;
    /* The sum is not copied: it is computed again from the keys. */
    t->sum = NULL;
    t->summed = -1;
    t->fingerprints = copy_of(p->fingerprints, p->fingerprints_room, p->known, sizeof *p->fingerprints);
    t->edges = copy_of(p->edges, p->edges_room, p->total + 1, sizeof *p->edges);
    int good = (t->fingerprints || !p->fingerprints) && (t->edges || !p->edges);
    for (int i = 0; i < DHSA_LEVELS; i++) {
        dhsa_level *l = &t->levels[i];
        if (!good) l->open = 0;
        if (l->open && !dhsa_chunks_grow(&l->chunks, p->kv_heads, l->chunks.pitch, p->dim, l->done, 1))
            good = l->open = 0;
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
    int64_t bytes = p->fingerprints_room * (int64_t)sizeof *p->fingerprints +
                    p->edges_room * (int64_t)sizeof *p->edges +
                    (p->sum ? p->kv_heads * (p->dim + 1) * (int64_t)sizeof *p->sum : 0);
    for (int i = 0; i < DHSA_LEVELS; i++) {
        const dhsa_chunks *c = &p->levels[i].chunks;
        dhsa_chunks_part part[DHSA_CHUNKS_PARTS];
        const int parts = p->levels[i].open ? dhsa_chunks_parts(c, 0, part) : 0;
        for (int j = 0; j < parts; j++) bytes += p->kv_heads * c->pitch * part[j].size;
    }
    return bytes;
}

/* ---- as bytes -------------------------------------------------------------------------------------------------- */

/* A header of so many int64, in this order; then the fingerprints, the edges, and for each level and KV head the parts
 * (dhsa_chunks_parts) of the first `done` chunks, as they lie in memory. All of the machine's byte order. */
enum { SQUARE = 16 }; /* means of a square, which are written as a whole */
enum {
    HEAD_MAGIC = 0,
    HEAD_DTYPE,
    HEAD_KV_HEADS,
    HEAD_DIM,
    HEAD_KNOWN,
    HEAD_CHUNKS,
    HEAD_LEVELS,
    HEAD_SIZE = 6 + 3 * DHSA_LEVELS
};
static const int64_t HEAD_VALUE = INT64_C(0x3249585945414844); /* its last character is the version of this layout */

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
        const int64_t most = i == DHSA_LEVEL_FINE ? p->chunks : p->chunks / DHSA_CHUNK_GROUP;
        int64_t *of = head + HEAD_LEVELS + 3 * i;
        if (!l->open) continue;
        of[0] = l->chunks.kind;
        of[1] = l->chunks.squares;
        of[2] = DHSA_MIN(l->done, most) / SQUARE * SQUARE; /* the rest is soon made again */
    }
    put_bytes(bytes, &at, head, sizeof head);
    put_bytes(bytes, &at, p->fingerprints, p->known * (int64_t)sizeof *p->fingerprints);
    put_bytes(bytes, &at, p->edges, (p->chunks > 0 ? p->chunks + 1 : 0) * (int64_t)sizeof *p->edges);
    for (int i = 0; i < DHSA_LEVELS; i++) {
        const dhsa_chunks *c = &p->levels[i].chunks;
        const int64_t done = head[HEAD_LEVELS + 3 * i + 2];
        for (int64_t h = 0; done > 0 && h < p->kv_heads; h++) {
            dhsa_chunks_part part[DHSA_CHUNKS_PARTS];
            const int parts = dhsa_chunks_parts(c, h, part);
            for (int j = 0; j < parts; j++) put_bytes(bytes, &at, part[j].at, done * part[j].size);
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

/* Whether n floats are finite and, where they are factors, not negative. */
static int floats_fit(const void *floats, int64_t n, int factors)
{
    const uint32_t *bits = floats;
    int bad = 0; /* no way out of the loop, so that a compiler makes vectors of it */
    for (int64_t i = 0; i < n; i++) bad |= (bits[i] & 0x7F800000u) == 0x7F800000u || (factors && bits[i] >> 31);
    return !bad;
}

/* Whether the means of the first `done` chunks of a KV head are what dhsa_mean_store writes. */
static int means_fit(const dhsa_chunks *c, int64_t head, int64_t done)
{
    const int64_t at = head * c->pitch, n = done * c->row;
    int bad = 0;
    if (c->spread && !floats_fit(c->spread + at, done, 1)) return 0;
    if (c->kind == DHSA_MEANS_F32) return floats_fit((const float *)c->means + at * c->row, n, 0);
    if (!floats_fit(c->scale + at, done, 1)) return 0;
    if (c->kind == DHSA_MEANS_BF16) { /* whole numbers up to 127 */
        const uint16_t *mean = (const uint16_t *)c->means + at * c->row;
        for (int64_t i = 0; i < n; i++) {
            const uint32_t bits = (uint32_t)mean[i] << 16;
            float x;
            memcpy(&x, &bits, sizeof x);
            bad |= !(x >= -127.0f && x <= 127.0f) || (float)(int32_t)x != x;
        }
        return !bad;
    }
    for (int64_t i = 0; i < done; i++) {
        const int8_t *mean = (const int8_t *)c->means + (at + i) * c->row;
        int32_t sum = 0;
        for (int64_t d = 0; d < c->row; d++) {
            sum += mean[d];
            bad |= mean[d] == INT8_MIN;
        }
        bad |= c->bias[at + i] != -128 * sum;
    }
    return !bad;
}

/* Fills a level by its part of the header. 1: good; 0: the bytes are not what it can be; -1: no memory. */
static int take_level(dhsa_key_index *p, int level, const int64_t *of, const char *bytes, int64_t n, int64_t *at)
{
    dhsa_level *l = &p->levels[level];
    const int64_t chunks_of = level == DHSA_LEVEL_FINE ? 1 : DHSA_CHUNK_GROUP, done = of[2];
    if (done == 0) return of[0] >= 0 && of[0] < DHSA_MEANS_KINDS;
    if (of[0] < 0 || of[0] >= DHSA_MEANS_KINDS || of[1] < 0 || of[1] > (of[0] == DHSA_MEANS_BF16) || done < 0 ||
        done > p->chunks / chunks_of || done % SQUARE != 0)
        return 0;
    dhsa_chunks plan;
    int64_t cells, need;
    dhsa_chunks_plan(&plan, (dhsa_means_kind)of[0], (int)of[1], level == DHSA_LEVEL_COARSE, done, p->dim);
    const int64_t row = plan.row * dhsa_means_size(plan.kind);
    /* Looked at before memory is asked for, so that this is in proportion to the bytes that are there. */
    if (!dhsa_mul(p->kv_heads, done, &cells) || !dhsa_mul(cells, row + 1, &need) || need > n - *at) return 0;
    l->open = dhsa_chunks_open(&l->chunks, plan.kind, plan.squares, plan.spreads, p->kv_heads,
                               done + done / 4 + 2 * DHSA_CHUNK_GROUP, p->dim);
    if (!l->open) {
        dhsa_chunks_close(&l->chunks);
        return -1;
    }
    l->done = done;
    for (int64_t h = 0; h < p->kv_heads; h++) {
        const unsigned char *state = l->chunks.state + h * l->chunks.pitch;
        dhsa_chunks_part part[DHSA_CHUNKS_PARTS];
        const int parts = dhsa_chunks_parts(&l->chunks, h, part);
        for (int i = 0; i < parts; i++)
            if (!take_bytes(part[i].at, bytes, n, at, done, part[i].size)) return 0;
        if (!means_fit(&l->chunks, h, done)) return 0;
        for (int64_t c = 0; c < done; c++)
            if (!state_fits(state[c], p->edges[c * chunks_of], p->edges[(c + 1) * chunks_of])) return 0;
    }
    return 1;
}

dhsa_status dhsa_key_index_read(const char *bytes, int64_t n, dhsa_key_index **index, dhsa_error *error)
{
    int64_t head[HEAD_SIZE], at = 0;
    dhsa_status status;
    if ((status = dhsa_check_pointer(bytes, "bytes", error)) || (status = dhsa_key_index_new(index, error)))
        return status;
    dhsa_key_index *p = *index;
    int good =
        take_bytes(head, bytes, n, &at, HEAD_SIZE, sizeof *head) && head[HEAD_MAGIC] == HEAD_VALUE &&
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
                   take_bytes(edges, bytes, n, &at, edge_count, sizeof *p->edges) &&
                   (edge_count == 0 || p->edges[0] == 0);
        p->known = good > 0 ? head[HEAD_KNOWN] : 0;
        p->chunks = p->total = good > 0 ? head[HEAD_CHUNKS] : 0;
    }
    for (int64_t c = 0; good > 0 && c < p->chunks; c++) good = p->edges[c] <= p->edges[c + 1];
    if (good > 0 && p->chunks > 0) good = p->edges[p->chunks] <= p->known;
    for (int i = 0; good > 0 && i < DHSA_LEVELS; i++)
        good = take_level(p, i, head + HEAD_LEVELS + 3 * i, bytes, n, &at);
    if (good > 0 && at == n) return DHSA_OK;
    dhsa_key_index_free(p);
    *index = NULL;
    if (good < 0) return no_memory(error, head[HEAD_KNOWN]);
    return dhsa_fail(error, DHSA_ERR_VALUE, "bytes: these %" PRId64 " are no key index that this version has written",
                     n);
}
