/* chunks.c: mean keys of chunks, per KV head, and which of them are finite. What they are compared with is scores.c's. */
#include <math.h>
#include <string.h>

#include "core/threads.h"
#include "select/select.h"

enum {
    RUN = 128, /* keys summed on their own before they join the total: long chunks round less */
    GROUP = 64 /* chunks of a task */
};

int dhsa_all_finite(const dhsa_kernels *kernels, const float *x, int64_t n)
{
    /* The square overflows long before the number does: only then look at each. */
    if (isfinite(kernels->dot(x, x, n))) return 1;
    for (int64_t i = 0; i < n; i++)
        if (!isfinite(x[i])) return 0;
    return 1;
}

int dhsa_chunk_mean(const dhsa_kernels *kernels, const dhsa_tensor *k, int64_t b, int64_t kv_head, int64_t from, int64_t to,
                    float *mean, float *sum)
{
    const int64_t dim = k->shape[3];
    const float factor = 1.0f / (float)(to - from);
    for (int64_t at = from; at < to; at += RUN) {
        const int64_t end = DHSA_MIN(at + RUN, to);
        float *into = at == from ? mean : sum;
        kernels->load(dhsa_row(k, b, kv_head, at), k->dtype, dim, into);
        for (int64_t j = at + 1; j < end; j++) kernels->add(dhsa_row(k, b, kv_head, j), k->dtype, dim, into);
        if (into == sum) kernels->add(sum, DHSA_F32, dim, mean);
    }
    for (int64_t d = 0; d < dim; d++) mean[d] *= factor;
    if (dhsa_all_finite(kernels, mean, dim)) return 1;
    memset(mean, 0, (size_t)dim * sizeof *mean);
    return 0;
}

typedef struct {
    const dhsa_kernels *kernels;
    const dhsa_tensor *k;
    dhsa_chunks *chunks;
    float *scratch;
    int64_t b, groups;
} fill_job;

static void fill_group(void *context, int64_t index, int thread)
{
    const fill_job *job = context;
    dhsa_chunks *chunks = job->chunks;
    const int64_t head = index / job->groups, first = index % job->groups * GROUP, dim = job->k->shape[3];
    const int64_t last = DHSA_MIN(first + GROUP, chunks->chunks);
    for (int64_t c = first; c < last; c++) {
        float *mean = chunks->means + (head * chunks->chunks + c) * dim;
        unsigned char *state = chunks->state + head * chunks->chunks + c;
        const int64_t from = chunks->edges[c], to = chunks->edges[c + 1];
        if (from == to) {
            memset(mean, 0, (size_t)dim * sizeof *mean);
            *state = DHSA_CHUNK_EMPTY;
        } else {
            const int finite = dhsa_chunk_mean(job->kernels, job->k, job->b, head, from, to, mean, job->scratch + thread * dim);
            *state = finite ? DHSA_CHUNK_GOOD : DHSA_CHUNK_BAD;
        }
    }
}

void dhsa_chunks_fill(const dhsa_kernels *kernels, const dhsa_tensor *k, int64_t b, dhsa_chunks *chunks, float *scratch,
                      int num_threads)
{
    fill_job job = {kernels, k, chunks, scratch, b, dhsa_ceil_div(chunks->chunks, GROUP)};
    dhsa_parallel(k->shape[1] * job.groups, num_threads, fill_group, &job);
}
