/* means.c: the mean keys of chunks for each KV head, and whether they are finite. They are used in select/scorer.c. */
#include <inttypes.h>
#include <math.h>
#include <string.h>

#include "core/arena.h"
#include "core/threads.h"
#include "chunk/chunk.h"

enum {
    RUN = 128, /* keys of a partial sum, which reduces the rounding error of long chunks */
    GROUP = 64 /* chunks of one task */
};

int dhsa_all_finite(const dhsa_kernels *kernels, const float *x, int64_t n)
{
    /* The sum of squares may overflow although all elements are finite. Only then is each element checked. */
    if (isfinite(kernels->dot(x, x, n))) return 1;
    for (int64_t i = 0; i < n; i++)
        if (!isfinite(x[i])) return 0;
    return 1;
}

int dhsa_chunk_mean(const dhsa_kernels *kernels, const dhsa_tensor *k, int64_t b, int64_t kv_head, int64_t from,
                    int64_t to, float *mean, float *sum)
{
    const int64_t dim = k->shape[3];
    const float n = (float)(to - from);
    const ptrdiff_t stride = (ptrdiff_t)dhsa_step(k, 2);
    for (int64_t at = from; at < to; at += RUN) {
        kernels->sum_rows(dhsa_row(k, b, kv_head, at), stride, k->dtype, DHSA_MIN(RUN, to - at), dim,
                          at == from ? mean : sum);
        if (at > from) kernels->add(sum, DHSA_F32, dim, mean);
    }
    for (int64_t d = 0; d < dim; d++) mean[d] /= n; /* divided, not multiplied: see dhsa_mean_query */
    if (dhsa_all_finite(kernels, mean, dim)) return 1;
    memset(mean, 0, (size_t)dim * sizeof *mean);
    return 0;
}

float dhsa_chunk_squares(const dhsa_kernels *kernels, const dhsa_tensor *k, int64_t b, int64_t kv_head, int64_t from,
                         int64_t to, float *line)
{
    const int64_t dim = k->shape[3];
    float sum = 0;
    for (int64_t i = from; i < to; i++) {
        const void *key = dhsa_row(k, b, kv_head, i);
        if (k->dtype != DHSA_F32) kernels->load(key, k->dtype, dim, line);
        const float *x = k->dtype == DHSA_F32 ? key : line;
        sum += kernels->dot(x, x, dim);
    }
    return sum;
}

float dhsa_chunk_spread(const dhsa_kernels *kernels, const float *mean, float squares, int64_t n, int64_t dim)
{
    const float spread = (squares / (float)n - kernels->dot(mean, mean, dim)) / (float)dim;
    return n > 1 && spread > 0 && isfinite(spread) ? spread : 0;
}

void dhsa_mean_query(const dhsa_kernels *kernels, const dhsa_tensor *q, int64_t b, int64_t h, int64_t from, int64_t to,
                     float sign, float *mean)
{
    const int64_t dim = q->shape[3], stride = dhsa_step(q, 2);
    const float n = sign < 0 ? -(float)(to - from) : (float)(to - from);
    kernels->sum_rows(dhsa_row(q, b, h, from), (ptrdiff_t)stride, q->dtype, to - from, dim, mean);
    /* Divided, not multiplied by 1 / n: a mean half way between two bf16 values must be exact. */
    for (int64_t d = 0; d < dim; d++) mean[d] /= n;
    for (int64_t d = 0; sign == 0 && d < dim; d++) mean[d] *= 0.0f;
}

/* Stores a quantized mean in the type that `kind` says. */
static void store_whole(dhsa_means_kind kind, const int8_t *whole, int64_t dim, int64_t row, void *to, int32_t *bias)
{
    if (kind == DHSA_MEANS_I8) {
        int32_t sum = 0;
        for (int64_t d = 0; d < dim; d++) sum += whole[d];
        *bias = -128 * sum;
        memcpy(to, whole, (size_t)dim);
        memset((int8_t *)to + dim, 0, (size_t)(row - dim));
        return;
    }
    for (int64_t d = 0; d < dim; d++) {
        const float x = (float)whole[d]; /* 8 significant bits: exact in bf16 */
        uint32_t bits;
        memcpy(&bits, &x, sizeof bits);
        ((uint16_t *)to)[d] = (uint16_t)(bits >> 16);
    }
    memset((uint16_t *)to + dim, 0, (size_t)(row - dim) * 2);
}

void dhsa_mean_store(const dhsa_kernels *kernels, dhsa_means_kind kind, const float *mean, int64_t dim, int64_t row,
                     void *to, float *scale, int32_t *bias)
{
    if (kind == DHSA_MEANS_F32) {
        memcpy(to, mean, (size_t)dim * sizeof *mean);
        return;
    }
    int8_t whole[DHSA_MAX_HEAD_DIM];
    *scale = kernels->quantize(mean, dim, whole);
    store_whole(kind, whole, dim, row, to, bias);
}

/* Writes a stored mean, which is not in the layout of squares, as entry `at` of `means`, which is. */
static void put_square(void *means, const uint16_t *line, int64_t row, int64_t at)
{
    for (int64_t d = 0; d < row; d += DHSA_PAIR_STEP)
        memcpy((uint16_t *)means + dhsa_square(at, d, row), line + d, DHSA_PAIR_STEP * 2);
}

void dhsa_mean_put(const dhsa_kernels *kernels, const dhsa_chunks *chunks, const float *mean, int64_t dim, void *means,
                   float *scale, int32_t *bias, int64_t at)
{
    const int64_t row = chunks->row;
    uint16_t line[DHSA_MAX_HEAD_DIM];
    void *to = (char *)means + at * row * dhsa_means_size(chunks->kind);
    const int quantized = chunks->kind != DHSA_MEANS_F32, bytes = chunks->kind == DHSA_MEANS_I8;
    if (chunks->squares) to = line;
    dhsa_mean_store(kernels, chunks->kind, mean, dim, row, to, quantized ? scale + at : NULL, bytes ? bias + at : NULL);
    if (chunks->squares) put_square(means, line, row, at);
}

void dhsa_chunks_plan(dhsa_chunks *chunks, dhsa_means_kind kind, int squares, int spreads, int64_t capacity,
                      int64_t dim)
{
    static const int64_t step[DHSA_MEANS_KINDS] = {1, DHSA_PAIR_STEP, 4};
    *chunks = (dhsa_chunks){.kind = kind, .squares = squares, .spreads = spreads};
    chunks->pitch = dhsa_round_up(capacity, 16); /* a whole number of squares */
    chunks->row = dhsa_round_up(dim, step[kind]);
}

int dhsa_chunks_open(dhsa_chunks *chunks, dhsa_means_kind kind, int squares, int spreads, int64_t kv_heads,
                     int64_t capacity, int64_t dim)
{
    const int64_t spare = kind == DHSA_MEANS_BF16 ? DHSA_PAIR_STEP : 0; /* read past the end by bf16 products */
    int64_t cells;
    dhsa_chunks_plan(chunks, kind, squares, spreads, capacity, dim);
    if (!dhsa_mul(kv_heads, chunks->pitch, &cells)) cells = INT64_MAX - spare;
    if (!(chunks->state = dhsa_alloc(cells, 1))) return 0;
    if (kind != DHSA_MEANS_F32 && !(chunks->scale = dhsa_alloc(cells, sizeof *chunks->scale))) return 0;
    if (kind == DHSA_MEANS_I8 && !(chunks->bias = dhsa_alloc(cells, sizeof *chunks->bias))) return 0;
    if (spreads && !(chunks->spread = dhsa_alloc(cells, sizeof *chunks->spread))) return 0;
    chunks->means = dhsa_alloc(cells + spare, chunks->row * dhsa_means_size(kind));
    return chunks->means != NULL;
}

void dhsa_chunks_close(dhsa_chunks *chunks)
{
    dhsa_free(chunks->means);
    dhsa_free(chunks->scale);
    dhsa_free(chunks->bias);
    dhsa_free(chunks->spread);
    dhsa_free(chunks->state);
    chunks->means = NULL;
    chunks->scale = NULL;
    chunks->bias = NULL;
    chunks->spread = NULL;
    chunks->state = NULL;
}

int dhsa_chunks_parts(const dhsa_chunks *chunks, int64_t head, dhsa_chunks_part *part)
{
    const int64_t at = head * chunks->pitch, row = chunks->row * dhsa_means_size(chunks->kind);
    int n = 0;
    part[n++] = (dhsa_chunks_part){(char *)chunks->state + at, 1};
    part[n++] = (dhsa_chunks_part){(char *)chunks->means + at * row, row};
    if (chunks->scale) part[n++] = (dhsa_chunks_part){(char *)(chunks->scale + at), sizeof *chunks->scale};
    if (chunks->bias) part[n++] = (dhsa_chunks_part){(char *)(chunks->bias + at), sizeof *chunks->bias};
    if (chunks->spread) part[n++] = (dhsa_chunks_part){(char *)(chunks->spread + at), sizeof *chunks->spread};
    return n;
}

int dhsa_chunks_grow(dhsa_chunks *chunks, int64_t kv_heads, int64_t capacity, int64_t dim, int64_t used, int copy)
{
    dhsa_chunks old = *chunks;
    if (!dhsa_chunks_open(chunks, old.kind, old.squares, old.spreads, kv_heads, capacity, dim)) {
        dhsa_chunks_close(chunks);
        *chunks = old;
        return 0;
    }
    used = dhsa_round_up(used, 16); /* a square holds 16 means */
    for (int64_t h = 0; h < kv_heads; h++) {
        dhsa_chunks_part from[DHSA_CHUNKS_PARTS], to[DHSA_CHUNKS_PARTS];
        const int parts = dhsa_chunks_parts(&old, h, from);
        dhsa_chunks_parts(chunks, h, to);
        for (int i = 0; i < parts; i++) memcpy(to[i].at, from[i].at, (size_t)(used * to[i].size));
    }
    if (!copy) dhsa_chunks_close(&old);
    return 1;
}

typedef struct {
    const dhsa_kernels *kernels;
    const dhsa_tensor *k;
    dhsa_chunks *chunks;
    char *scratch;
    int64_t stride, b, first, groups;
} means_job;

/* Writes the mean of keys [from, to) of a KV head to line [dim], and their spread, unless it is NULL; returns the state
 * of the chunk. line has room for 3 * dim. */
static unsigned char mean_of(const dhsa_kernels *kernels, const dhsa_tensor *k, int64_t b, int64_t head, int64_t from,
                             int64_t to, float *line, float *spread)
{
    const int64_t dim = k->shape[3];
    unsigned char state = DHSA_CHUNK_EMPTY;
    if (from == to)
        memset(line, 0, (size_t)dim * sizeof *line);
    else
        state = dhsa_chunk_mean(kernels, k, b, head, from, to, line, line + dim) ? DHSA_CHUNK_GOOD : DHSA_CHUNK_BAD;
    if (spread) {
        const float squares =
            state == DHSA_CHUNK_GOOD ? dhsa_chunk_squares(kernels, k, b, head, from, to, line + 2 * dim) : 0;
        *spread = dhsa_chunk_spread(kernels, line, squares, DHSA_MAX(to - from, 1), dim);
    }
    return state;
}

static void means_task(void *context, int64_t index, int thread)
{
    const means_job *job = context;
    dhsa_chunks *chunks = job->chunks;
    const int64_t head = index / job->groups, first = job->first + index % job->groups * GROUP;
    const int64_t last = DHSA_MIN(first + GROUP, chunks->chunks), dim = job->k->shape[3];
    float *mean = (float *)(job->scratch + thread * job->stride);
    dhsa_whole(mean, 3 * dim * (int64_t)sizeof *mean);
    for (int64_t c = first; c < last; c++) {
        const int64_t at = head * chunks->pitch + c;
        chunks->state[at] = mean_of(job->kernels, job->k, job->b, head, chunks->edges[c], chunks->edges[c + 1], mean,
                                    chunks->spread ? chunks->spread + at : NULL);
        dhsa_mean_put(job->kernels, chunks, mean, dim, chunks->means, chunks->scale, chunks->bias, at);
    }
}

void dhsa_chunks_fill(const dhsa_kernels *kernels, const dhsa_tensor *k, int64_t b, dhsa_chunks *chunks, int64_t first,
                      char *scratch, int64_t stride, int num_threads)
{
    means_job job = {kernels, k, chunks, scratch, stride, b, first, dhsa_ceil_div(chunks->chunks - first, GROUP)};
    if (job.groups > 0) dhsa_parallel(k->shape[1] * job.groups, num_threads, means_task, &job);
    dhsa_chunks_look(chunks, k->shape[1]);
}

/* ---- means for others ------------------------------------------------------------------------------------------ */

typedef struct {
    const dhsa_kernels *kernels;
    const dhsa_tensor *k;
    const int32_t *edges;
    const dhsa_means *means;
    int64_t groups;
} export_job;

static void export_task(void *context, int64_t index, int thread)
{
    const export_job *job = context;
    const dhsa_means *means = job->means;
    const int64_t head = index / job->groups, first = index % job->groups * GROUP;
    float line[3 * DHSA_MAX_HEAD_DIM];
    (void)thread;
    for (int64_t c = first; c < DHSA_MIN(first + GROUP, means->chunks); c++) {
        const int64_t at = head * means->chunks + c;
        means->state[at] = (int8_t)mean_of(job->kernels, job->k, 0, head, job->edges[c], job->edges[c + 1], line,
                                           means->spread ? means->spread + at : NULL);
        means->scale[at] = job->kernels->quantize(line, means->dim, means->mean + at * means->dim);
    }
}

dhsa_status dhsa_chunk_means(const dhsa_tensor *k, const int32_t *edges, const dhsa_means *means, int num_threads,
                             dhsa_error *error)
{
    dhsa_status status;
    if ((status = dhsa_tensor_check(k, "k", error)) || (status = dhsa_check_pointer(edges, "edges", error)) ||
        (status = dhsa_check_pointer(means, "means", error)) || (status = dhsa_threads_check(num_threads, error)))
        return status;
    if (k->shape[0] != 1) return dhsa_fail(error, DHSA_ERR_VALUE, "k: batch is %" PRId64 ", expected 1", k->shape[0]);
    if (means->kv_heads != k->shape[1] || means->dim != k->shape[3] || means->chunks < 1 || !means->mean ||
        !means->scale || !means->state)
        return dhsa_fail(error, DHSA_ERR_VALUE, "means: expected room for chunks of %" PRId64 " heads of %" PRId64,
                         k->shape[1], k->shape[3]);
    for (int64_t c = 0; c <= means->chunks; c++)
        if (edges[c] < (c ? edges[c - 1] : 0) || edges[c] > k->shape[2])
            return dhsa_fail(error, DHSA_ERR_VALUE,
                             "edges: entry %" PRId64 " is %d, expected numbers up to %" PRId64 " that do not decrease",
                             c, (int)edges[c], k->shape[2]);
    export_job job = {dhsa_kernels_current(), k, edges, means, dhsa_ceil_div(means->chunks, GROUP)};
    dhsa_parallel(k->shape[1] * job.groups, num_threads, export_task, &job);
    return DHSA_OK;
}

void dhsa_chunks_take(dhsa_chunks *chunks, const dhsa_means *means)
{
    const int64_t dim = means->dim, row = chunks->row;
    uint16_t line[DHSA_MAX_HEAD_DIM];
    for (int64_t h = 0; h < means->kv_heads; h++)
        for (int64_t c = 0; c < means->chunks; c++) {
            const int64_t from = h * means->chunks + c, at = h * chunks->pitch + c;
            void *to =
                chunks->squares ? (void *)line : (char *)chunks->means + at * row * dhsa_means_size(chunks->kind);
            store_whole(chunks->kind, means->mean + from * dim, dim, row, to, chunks->bias ? chunks->bias + at : NULL);
            if (chunks->squares) put_square(chunks->means, line, row, at);
            chunks->scale[at] = means->scale[from];
            chunks->state[at] = (unsigned char)means->state[from];
            if (chunks->spread) chunks->spread[at] = means->spread[from];
        }
    dhsa_chunks_look(chunks, means->kv_heads);
}

void dhsa_chunks_look(dhsa_chunks *chunks, int64_t kv_heads)
{
    chunks->odd = 0;
    for (int64_t h = 0; h < kv_heads; h++) {
        const unsigned char *state = chunks->state + h * chunks->pitch;
        unsigned char worst = DHSA_CHUNK_GOOD;
        for (int64_t c = 0; c < chunks->chunks; c++) worst = DHSA_MAX(worst, state[c]);
        chunks->odd |= worst != DHSA_CHUNK_GOOD;
    }
}
