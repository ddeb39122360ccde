/* boundaries.c: cuts keys into chunks, either of a fixed size or at the gaps with the best scores, which are picked
 * greedily with non-maximum suppression. Gap j lies between keys j and j + 1. Its score is the negative similarity of
 * the keys on its two sides (computed here) or the logit of a network (predictor.c, compact.c). The label that the
 * networks are trained on is in label/labels.c. */
#include <inttypes.h>
#include <math.h>
#include <string.h>

#include "core/arena.h"
#include "core/threads.h"
#include "chunk/chunk.h"

enum { GAPS = 64 /* gaps of one task */ };

/* ---- similarity ------------------------------------------------------------------------------------------------ */

typedef struct {
    const dhsa_kernels *kernels;
    const dhsa_tensor *k;
    int64_t window, channels, tasks; /* channels: of all KV heads; tasks: of one batch item */
    float *scores;
    char *arenas;
    int64_t arena_size;
} similarity_job;

/* The sum of a window of keys, KV heads concatenated. */
typedef struct {
    float *sum;
    float square; /* dot product of the sum with itself */
    int64_t n;
} window_sum;

/* Sums keys [from, to) into w. */
static void sum_keys(const similarity_job *job, int64_t b, int64_t from, int64_t to, window_sum *w)
{
    const int64_t heads = job->k->shape[1], dim = job->k->shape[3];
    const ptrdiff_t stride = (ptrdiff_t)dhsa_step(job->k, 2);
    for (int64_t h = 0; h < heads; h++)
        job->kernels->sum_rows(dhsa_row(job->k, b, h, from), stride, job->k->dtype, to - from, dim, w->sum + h * dim);
    w->square = job->kernels->dot(w->sum, w->sum, job->channels);
    w->n = to - from;
}

/* Cosine similarity of two means; 0 if one of them is 0. */
static float cosine(const dhsa_kernels *kernels, const window_sum *a, const window_sum *b, int64_t n)
{
    double ab = kernels->dot(a->sum, b->sum, n), aa = a->square, bb = b->square;
    /* Squares of very large or very small keys leave the range of float. */
    if (!(aa > 1e-25 && aa < 1e30 && bb > 1e-25 && bb < 1e30)) {
        ab = aa = bb = 0;
        for (int64_t i = 0; i < n; i++) {
            ab += (double)a->sum[i] * b->sum[i];
            aa += (double)a->sum[i] * a->sum[i];
            bb += (double)b->sum[i] * b->sum[i];
        }
    }
    const double na = (double)a->n, nb = (double)b->n;
    return (float)(ab / (na * nb) / fmax(sqrt(aa) / na * (sqrt(bb) / nb), 1e-12));
}

/* The number of sums in the ring. If a window is as long as a task or longer, no sum is used twice in the task. */
static int64_t ring_size(const similarity_job *job) { return job->window < GAPS ? job->window : 1; }

static void similarity_task(void *context, int64_t index, int thread)
{
    const similarity_job *job = context;
    const int64_t length = job->k->shape[2], b = index / job->tasks, first = index % job->tasks * GAPS,
                  window = job->window;
    float *scores = job->scores + b * length;
    /* The window right of gap j is the window left of gap j + window. The ring keeps its sum until then. */
    const int64_t ring = ring_size(job);
    char *arena = job->arenas + thread * job->arena_size;
    int64_t used = 0;
    window_sum *sums = dhsa_part(arena, &used, (ring + 1) * (int64_t)sizeof *sums);
    float *memory = dhsa_part(arena, &used, (ring + 1) * job->channels * (int64_t)sizeof *memory);
    for (int64_t i = 0; i <= ring; i++) sums[i].sum = memory + i * job->channels;
    for (int64_t j = first; j < DHSA_MIN(first + GAPS, length - 1); j++) {
        const int64_t from = DHSA_MAX(j - window + 1, 0), to = DHSA_MIN(j + 1 + window, length);
        window_sum *left = &sums[j % ring], *right = &sums[ring];
        if (j - window < first) sum_keys(job, b, from, j + 1, left);
        sum_keys(job, b, j + 1, to, right);
        scores[j] = -cosine(job->kernels, left, right, job->channels);
        const window_sum freed = *left;
        *left = *right;
        *right = freed;
    }
    if (index % job->tasks == job->tasks - 1) scores[length - 1] = -INFINITY;
}

static dhsa_status window_check(int64_t window, dhsa_error *error)
{
    if (window >= 1) return DHSA_OK;
    return dhsa_fail(error, DHSA_ERR_VALUE, "boundary_window: got %" PRId64 ", expected at least 1", window);
}

static dhsa_status similarity_scores(const dhsa_tensor *k, int64_t window, float *scores, int num_threads,
                                     dhsa_error *error)
{
    const int64_t channels = k->shape[1] * k->shape[3], length = k->shape[2];
    similarity_job job = {
        dhsa_kernels_current(), k, DHSA_MIN(window, length), channels, dhsa_ceil_div(length, GAPS), scores, NULL, 0};
    num_threads = (int)DHSA_MIN(num_threads, k->shape[0] * job.tasks);
    const int64_t held = ring_size(&job) + 1;
    dhsa_part(NULL, &job.arena_size, held * (int64_t)sizeof(window_sum));
    dhsa_part(NULL, &job.arena_size, held * channels * (int64_t)sizeof(float));
    job.arenas = dhsa_alloc(job.arena_size, num_threads);
    if (!job.arenas)
        return dhsa_fail(error, DHSA_ERR_NO_MEMORY, "boundaries: no memory for %" PRId64 " channels a thread",
                         held * channels);
    dhsa_parallel(k->shape[0] * job.tasks, num_threads, similarity_task, &job);
    dhsa_free(job.arenas);
    return DHSA_OK;
}

dhsa_status dhsa_similarity_scores(const dhsa_tensor *k, int64_t window, float *scores, int num_threads,
                                   dhsa_error *error)
{
    dhsa_status status;
    if ((status = dhsa_tensor_check(k, "k", error)) || (status = dhsa_threads_check(num_threads, error)) ||
        (status = dhsa_check_pointer(scores, "scores", error)) || (status = window_check(window, error)))
        return status;
    return similarity_scores(k, window, scores, num_threads, error);
}

/* ---- picking --------------------------------------------------------------------------------------------------- */

/* A stable sort by the high 32 bits, ascending: least significant digit first, 8 bits a pass. The number of passes is
 * even, so the result is in `items`. */
static void radix_sort(uint64_t *items, uint64_t *other, int64_t n)
{
    for (int shift = 32; shift < 64; shift += 8) {
        int64_t starts[257] = {0};
        for (int64_t i = 0; i < n; i++) starts[(items[i] >> shift & 255) + 1]++;
        for (int d = 0; d < 256; d++) starts[d + 1] += starts[d];
        for (int64_t i = 0; i < n; i++) other[starts[items[i] >> shift & 255]++] = items[i];
        uint64_t *swap = items;
        items = other;
        other = swap;
    }
}

/* Accepts a gap and excludes all gaps at most nms away from it. state: 0 open, 1 excluded, 2 accepted. */
static void accept(unsigned char *state, int64_t length, int64_t gap, int64_t nms)
{
    const int64_t from = DHSA_MAX(gap - nms, 0), to = DHSA_MIN(gap + nms + 1, length);
    /* Accepted gaps are more than nms apart, so none is overwritten, and all calls together write O(length) bytes. */
    memset(state + from, 1, (size_t)(to - from));
    state[gap] = 2;
}

static dhsa_status pick(const float *scores, int64_t length, int64_t n, double theta, int64_t nms, int64_t instruction,
                        int32_t *boundaries, int64_t *count, dhsa_error *error)
{
    const int64_t last = DHSA_MIN(length - 1, instruction > 0 ? length - instruction : length - 1);
    uint64_t *items = dhsa_alloc(length, (int64_t)sizeof *items), *other = dhsa_alloc(length, (int64_t)sizeof *other);
    unsigned char *state = dhsa_alloc(length, 1);
    dhsa_status status = DHSA_OK;
    int64_t eligible = 0, accepted = 0;
    if (!items || !other || !state) {
        status = dhsa_fail(error, DHSA_ERR_NO_MEMORY, "boundaries: no memory to sort %" PRId64 " gaps", length);
        goto cleanup;
    }
    memset(state, 0, (size_t)length);
    nms = DHSA_MIN(nms, length);
    if (last < length - 1) {
        accept(state, length, last, nms);
        accepted = 1;
    }
    for (int64_t j = 0; j < last; j++) {
        const float score = scores[j] + 0.0f; /* -0 becomes +0 */
        uint32_t u;
        if (!((double)score > theta)) continue; /* excludes NaN too */
        memcpy(&u, &score, sizeof u);
        u = u & 0x80000000u ? u : ~u & 0x7fffffffu; /* u ascends as the score descends */
        items[eligible++] = (uint64_t)u << 32 | (uint64_t)j;
    }
    radix_sort(items, other, eligible);
    for (int64_t i = 0; i < eligible && accepted < n; i++) {
        const int64_t gap = (int64_t)(items[i] & 0xffffffffu);
        if (state[gap] != 0) continue;
        accept(state, length, gap, nms);
        accepted++;
    }
    int64_t at = 0;
    boundaries[at++] = 0;
    for (int64_t j = 0; j < length - 1; j++)
        if (state[j] == 2) boundaries[at++] = (int32_t)(j + 1);
    boundaries[at++] = (int32_t)length;
    *count = at;
cleanup:
    dhsa_free(items);
    dhsa_free(other);
    dhsa_free(state);
    return status;
}

static dhsa_status picking_check(int64_t n, double theta, int64_t nms, dhsa_error *error)
{
    if (n < 0) return dhsa_fail(error, DHSA_ERR_VALUE, "num_chunks: got %" PRId64 ", expected at least 0", n);
    if (isnan(theta)) return dhsa_fail(error, DHSA_ERR_VALUE, "theta: is NaN");
    if (nms < 0) return dhsa_fail(error, DHSA_ERR_VALUE, "nms: got %" PRId64 ", expected at least 0", nms);
    return DHSA_OK;
}

dhsa_status dhsa_pick_boundaries(const float *scores, int64_t length, int64_t n, double theta, int64_t nms,
                                 int64_t instruction, int32_t *boundaries, int64_t *count, dhsa_error *error)
{
    dhsa_status status;
    if ((status = picking_check(n, theta, nms, error)) || (status = dhsa_check_pointer(scores, "scores", error)) ||
        (status = dhsa_check_pointer(boundaries, "boundaries", error)) ||
        (status = dhsa_check_pointer(count, "count", error)))
        return status;
    if (length < 1 || length > DHSA_MAX_LENGTH)
        return dhsa_fail(error, DHSA_ERR_VALUE, "scores: length is %" PRId64 ", expected 1 to %d", length,
                         DHSA_MAX_LENGTH);
    if (instruction < 0 || instruction > length)
        return dhsa_fail(error, DHSA_ERR_VALUE, "instruction: got %" PRId64 ", expected 1 to the length of %" PRId64,
                         instruction, length);
    return pick(scores, length, n, theta, nms, instruction, boundaries, count, error);
}

/* ---- a batch --------------------------------------------------------------------------------------------------- */

int64_t dhsa_boundaries_capacity(const dhsa_boundary_config *config, int64_t length)
{
    if (!config || length < 1 || length > DHSA_MAX_LENGTH) return 0;
    if (config->kind == DHSA_BOUNDARIES_FIXED)
        return dhsa_ceil_div(length, DHSA_MIN(DHSA_MAX(config->chunk_size, 1), length)) + 1;
    /* Accepted gaps are more than nms apart, and there are length - 1 gaps. */
    const int64_t apart = DHSA_MIN(DHSA_MAX(config->nms, 0), length) + 1;
    return DHSA_MIN(DHSA_MAX(config->num_chunks, 0), dhsa_ceil_div(length - 1, apart)) + 2;
}

static void fixed_row(int64_t size, int64_t length, int32_t *row, int64_t *count)
{
    int64_t at = 0;
    for (int64_t j = 0; j < length; j += size) row[at++] = (int32_t)j;
    row[at++] = (int32_t)length;
    *count = at;
}

int64_t dhsa_num_chunks(const dhsa_select_config *config, int64_t length, int paper)
{
    enum { PAPER_GAPS = 8, MOST_SHORT_CHUNKS = 8192 };
    if (!config || length < 1 || length > INT32_MAX / 2) return 0;
    if (paper) return length / DHSA_MAX(config->score.query_block, 1) * PAPER_GAPS;
    /* The bf16 means of chunks of 4 keys take an eighth of the bytes of fp32 keys, a quarter of those of bf16 keys.
     * So no more chunks of this length are made than 32K keys need. */
    return DHSA_MAX(length / 8, config->method == DHSA_METHOD_ROWS ? DHSA_MIN(length / 4, MOST_SHORT_CHUNKS) : 0);
}

dhsa_status dhsa_boundary_config_check(const dhsa_boundary_config *config, dhsa_error *error)
{
    dhsa_status status = dhsa_check_pointer(config, "boundaries", error);
    if (status) return status;
    if (config->kind == DHSA_BOUNDARIES_PREDICTOR) {
        if (config->predictor && config->compact)
            return dhsa_fail(error, DHSA_ERR_VALUE, "predictor: expected one network, got one of each kind");
        if (config->predictor && (status = dhsa_predictor_check(config->predictor, error))) return status;
        if (config->compact && (status = dhsa_compact_check(config->compact, error))) return status;
        return picking_check(config->num_chunks, config->theta, config->nms, error);
    }
    if (config->kind == DHSA_BOUNDARIES_SIMILARITY) {
        status = window_check(config->window, error);
        return status ? status : picking_check(config->num_chunks, config->theta, config->nms, error);
    }
    if (config->kind != DHSA_BOUNDARIES_FIXED)
        return dhsa_fail(error, DHSA_ERR_VALUE, "boundaries: unknown kind %d", (int)config->kind);
    if (config->chunk_size < 1)
        return dhsa_fail(error, DHSA_ERR_VALUE, "chunk_size: got %" PRId64 ", expected at least 1", config->chunk_size);
    return DHSA_OK;
}

dhsa_status dhsa_boundary_config_fits(const dhsa_boundary_config *config, const dhsa_tensor *k, dhsa_error *error)
{
    if (config->kind != DHSA_BOUNDARIES_PREDICTOR) return DHSA_OK;
    if (!config->predictor && !config->compact)
        return dhsa_fail(error, DHSA_ERR_VALUE, "predictor: boundaries come from a predictor, but there is none");
    return dhsa_predictor_width(config->compact ? config->compact->channels : config->predictor->channels, k, error);
}

/* The number of tokens on each side of a gap that its score depends on. */
static int64_t window_of(const dhsa_boundary_config *c)
{
    if (c->kind == DHSA_BOUNDARIES_PREDICTOR) return c->compact ? c->compact->window : c->predictor->window;
    return c->kind == DHSA_BOUNDARIES_SIMILARITY ? c->window : 0;
}

/* Writes scores [B, Lk]. Gaps without a full window, which a network cannot score, get -inf: they are never picked. */
static dhsa_status score_gaps(const dhsa_tensor *k, const dhsa_boundary_config *c, float *scores, int num_threads,
                              dhsa_error *error)
{
    const int64_t batch = k->shape[0], length = k->shape[2], window = window_of(c);
    if (c->kind == DHSA_BOUNDARIES_SIMILARITY) return similarity_scores(k, window, scores, num_threads, error);
    const dhsa_status status = c->compact ? dhsa_compact_logits_checked(c->compact, k, scores, num_threads, error)
                                          : dhsa_predictor_logits_checked(c->predictor, k, scores, num_threads, error);
    for (int64_t b = 0; b < batch && !status; b++)
        for (int64_t j = 0; j < length; j++)
            if (j < window - 1 || j >= length - window) scores[b * length + j] = -INFINITY;
    return status;
}

typedef struct {
    const dhsa_boundary_config *config;
    float *scores;
    int64_t length, capacity;
    int32_t *boundaries;
    int64_t *counts;
    dhsa_error *errors; /* [batch] */
} boundaries_job;

static void boundaries_task(void *context, int64_t b, int thread)
{
    const boundaries_job *job = context;
    const dhsa_boundary_config *c = job->config;
    int32_t *row = job->boundaries + b * job->capacity;
    (void)thread;
    job->errors[b].status = DHSA_OK;
    if (c->kind == DHSA_BOUNDARIES_FIXED)
        fixed_row(DHSA_MIN(c->chunk_size, job->length), job->length, row, job->counts + b);
    else if (pick(job->scores + b * job->length, job->length, c->num_chunks, c->theta, c->nms, 0, row, job->counts + b,
                  job->errors + b))
        return;
    for (int64_t at = job->counts[b]; at < job->capacity; at++) row[at] = (int32_t)job->length;
}

dhsa_status dhsa_boundaries(const dhsa_tensor *k, const dhsa_boundary_config *config, int32_t *boundaries,
                            int64_t capacity, int64_t *counts, int num_threads, dhsa_error *error)
{
    dhsa_status status;
    if ((status = dhsa_tensor_check(k, "k", error)) || (status = dhsa_threads_check(num_threads, error)) ||
        (status = dhsa_boundary_config_check(config, error)) ||
        (status = dhsa_boundary_config_fits(config, k, error)) ||
        (status = dhsa_check_pointer(boundaries, "boundaries", error)) ||
        (status = dhsa_check_pointer(counts, "counts", error)))
        return status;
    if (capacity < dhsa_boundaries_capacity(config, k->shape[2]))
        return dhsa_fail(error, DHSA_ERR_VALUE, "capacity: got %" PRId64 ", expected at least %" PRId64, capacity,
                         dhsa_boundaries_capacity(config, k->shape[2]));
    return dhsa_boundaries_checked(k, config, boundaries, capacity, counts, num_threads, error);
}

dhsa_status dhsa_boundaries_checked(const dhsa_tensor *k, const dhsa_boundary_config *config, int32_t *boundaries,
                                    int64_t capacity, int64_t *counts, int num_threads, dhsa_error *error)
{
    dhsa_status status = DHSA_OK;
    const int64_t batch = k->shape[0], length = k->shape[2];
    boundaries_job job = {config, NULL, length, capacity, boundaries, counts, NULL};
    job.errors = dhsa_alloc(batch, sizeof *job.errors);
    job.scores = config->kind == DHSA_BOUNDARIES_FIXED ? NULL : dhsa_alloc(batch, length * (int64_t)sizeof *job.scores);
    if (!job.errors || (!job.scores && config->kind != DHSA_BOUNDARIES_FIXED)) {
        status =
            dhsa_fail(error, DHSA_ERR_NO_MEMORY, "boundaries: no memory for the scores of %" PRId64 " gaps", length);
        goto cleanup;
    }
    if (job.scores && (status = score_gaps(k, config, job.scores, num_threads, error))) goto cleanup;
    dhsa_parallel(batch, num_threads, boundaries_task, &job);
    for (int64_t b = 0; b < batch && !status; b++)
        if (job.errors[b].status) status = dhsa_fail(error, job.errors[b].status, "%s", job.errors[b].message);
cleanup:
    dhsa_free(job.errors);
    dhsa_free(job.scores);
    return status;
}

/* ---- keys that follow keys already cut ------------------------------------------------------------------------- */

int64_t dhsa_boundaries_share(const dhsa_boundary_config *config, int64_t from, int64_t to)
{
    const int64_t all = DHSA_MIN(DHSA_MAX(config->num_chunks, 0), to);
    return dhsa_ceil_div(all * (to - from), to);
}

dhsa_status dhsa_boundaries_after(const dhsa_tensor *k, int64_t from, int64_t to, const dhsa_boundary_config *config,
                                  int32_t *boundaries, int64_t *count, int num_threads, dhsa_error *error)
{
    dhsa_status status = DHSA_OK;
    const int64_t length = to - from, before = DHSA_MIN(window_of(config), from), seen = before + length;
    if (config->kind == DHSA_BOUNDARIES_FIXED) {
        fixed_row(DHSA_MIN(config->chunk_size, length), length, boundaries, count);
    } else {
        /* The part includes a full window before `from`, so the gaps get the scores that they have among all keys. */
        dhsa_tensor part = *k;
        part.data = dhsa_row(k, 0, 0, from - before);
        part.shape[2] = seen;
        float *scores = dhsa_alloc(seen, sizeof *scores);
        if (!scores)
            return dhsa_fail(error, DHSA_ERR_NO_MEMORY, "boundaries: no memory for the scores of %" PRId64 " gaps",
                             seen);
        if (!(status = score_gaps(&part, config, scores, num_threads, error))) {
            /* The gap before the first of these keys is a boundary already, which excludes the next nms gaps. */
            for (int64_t j = 0; from > 0 && j < DHSA_MIN(config->nms, length); j++) scores[before + j] = -INFINITY;
            status = pick(scores + before, length, dhsa_boundaries_share(config, from, to), config->theta, config->nms,
                          0, boundaries, count, error);
        }
        dhsa_free(scores);
    }
    for (int64_t i = 0; i < *count && !status; i++) boundaries[i] += (int32_t)from;
    return status;
}

dhsa_status dhsa_boundaries_check(const int32_t *boundaries, int64_t batch, int64_t n, int64_t length,
                                  dhsa_error *error)
{
    if (!boundaries || n < 2)
        return dhsa_fail(error, DHSA_ERR_VALUE, "boundaries: expected at least the two entries 0 and %" PRId64, length);
    for (int64_t b = 0; b < batch; b++) {
        const int32_t *row = boundaries + b * n;
        if (row[0] != 0)
            return dhsa_fail(error, DHSA_ERR_VALUE, "boundaries: row %" PRId64 " begins with %d, expected 0", b,
                             row[0]);
        for (int64_t c = 1; c < n; c++)
            if (row[c] < row[c - 1])
                return dhsa_fail(error, DHSA_ERR_VALUE,
                                 "boundaries: row %" PRId64 " falls from %d to %d at entry %" PRId64, b, row[c - 1],
                                 row[c], c);
        if (row[n - 1] != length)
            return dhsa_fail(error, DHSA_ERR_VALUE,
                             "boundaries: row %" PRId64 " ends with %d, expected the number of keys, %" PRId64, b,
                             row[n - 1], length);
    }
    return DHSA_OK;
}
