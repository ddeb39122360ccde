/* ratios.c: the label that a boundary predictor is trained on, from one dense attention matrix. Nothing here is used
 * when a model runs. Source: arXiv 2510.24606 (attention-based boundary label). */
#include <inttypes.h>

#include "core/arena.h"
#include "core/threads.h"
#include "kernels/kernels.h"

enum { GAPS = 128 /* gaps of one task */ };

typedef struct {
    const float *attn;
    int64_t stride, length, window, sliding, tasks;
    double *ratios;
    char *arenas;
    int64_t arena_size;
} boundary_ratio_job;

static int64_t tile_columns(const boundary_ratio_job *job) { return DHSA_MIN(GAPS + 2 * job->window, job->length); }

static double column_sum(const double *columns, int64_t from, int64_t to)
{
    double sum = 0;
    for (int64_t c = from; c < to; c++) sum += columns[c];
    return sum;
}

/* Gaps [first, last): one sweep over the rows, from the last one up, keeps a running sum of each column. When row j + w
 * has been added, the sums hold exactly the rows that gap j needs. So the matrix is read once per task, not once per
 * gap. */
static void boundary_ratio_task(void *context, int64_t index, int thread)
{
    const boundary_ratio_job *job = context;
    const int64_t w = job->window, L = job->length, first = 2 * w - 1 + index * GAPS, last = DHSA_MIN(first + GAPS, L - 2 * w);
    const int64_t base = first - w + 1, columns = last - 1 + w + 1 - base; /* columns base .. last - 1 + w */
    int64_t used = 0;
    double *sums = dhsa_part(job->arenas + thread * job->arena_size, &used, tile_columns(job) * (int64_t)sizeof *sums);
    /* With a sliding window W, gap j needs rows below j + w + W. No gap of the task needs rows from `stop` on. */
    const int64_t stop = job->sliding && job->sliding < L - (last - 1 + w) ? last - 1 + w + job->sliding : L;
    for (int64_t c = 0; c < columns; c++) sums[c] = 0;
    for (int64_t i = stop - 1; i >= first + w; i--) {
        const float *row = job->attn + i * job->stride + base;
        for (int64_t c = 0; c < columns; c++) sums[c] += row[c];
        if (job->sliding && job->sliding < L - i) {
            /* Attention probabilities are of similar size, so subtracting a row again leaves no error that matters. */
            const int64_t out = i + job->sliding;
            if (out < stop)
                for (int64_t c = 0; c < columns; c++) sums[c] -= job->attn[out * job->stride + base + c];
        }
        const int64_t j = i - w;
        if (j >= last) continue;
        const double past = column_sum(sums, j - w + 1 - base, j + 1 - base),
                     future = column_sum(sums, j + 1 - base, j + w + 1 - base);
        job->ratios[j] = (DHSA_MAX(past, future) + 1e-6) / (DHSA_MIN(past, future) + 1e-6);
    }
}

dhsa_status dhsa_boundary_ratios(const float *attn, int64_t row_stride, int64_t length, int64_t window, int64_t sliding_window,
                                 double *ratios, int num_threads, dhsa_error *error)
{
    dhsa_status status;
    int64_t reach;
    if ((status = dhsa_threads_check(num_threads, error)) || (status = dhsa_check_pointer(attn, "attn", error)) ||
        (status = dhsa_check_pointer(ratios, "ratios", error)))
        return status;
    if (length < 1 || length > DHSA_MAX_LENGTH)
        return dhsa_fail(error, DHSA_ERR_VALUE, "attn: length is %" PRId64 ", expected 1 to %d", length, DHSA_MAX_LENGTH);
    if (row_stride < -INT64_MAX || !dhsa_mul(row_stride < 0 ? -row_stride : row_stride, length, &reach) || reach > INT64_MAX / 16)
        return dhsa_fail(error, DHSA_ERR_VALUE, "attn: its stride reaches further than can be addressed");
    if (window < 1) return dhsa_fail(error, DHSA_ERR_VALUE, "window: got %" PRId64 ", expected at least 1", window);
    if (sliding_window < 0)
        return dhsa_fail(error, DHSA_ERR_VALUE, "sliding_window: got %" PRId64 ", expected at least 1", sliding_window);
    for (int64_t j = 0; j < length; j++) ratios[j] = 0;
    window = DHSA_MIN(window, length); /* no gap has this many keys on both sides */
    const int64_t gaps = length - 2 * window - (2 * window - 1);
    if (gaps <= 0) return DHSA_OK;
    boundary_ratio_job job = {attn, row_stride, length, window, sliding_window, dhsa_ceil_div(gaps, GAPS), ratios, NULL, 0};
    num_threads = (int)DHSA_MIN(num_threads, job.tasks);
    dhsa_part(NULL, &job.arena_size, tile_columns(&job) * (int64_t)sizeof(double));
    job.arenas = dhsa_alloc(job.arena_size, num_threads);
    if (!job.arenas) return dhsa_fail(error, DHSA_ERR_NO_MEMORY, "boundary_ratios: no memory for column sums");
    dhsa_parallel(job.tasks, num_threads, boundary_ratio_task, &job);
    dhsa_free(job.arenas);
    return DHSA_OK;
}
