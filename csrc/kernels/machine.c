/* machine.c: the peak rates of arithmetic and of memory reads of the machine, with which benchmarks compare. */
#include <stdatomic.h>

#include "core/internal.h"
#include "core/threads.h"
#include "kernels/kernels.h"

enum { PEAK_LOOPS = 400000, PEAK_ROUNDS = 3 };

typedef struct {
    const dhsa_kernels *kernels;
    _Atomic int arrived;
    int threads;
    double start[DHSA_MAX_THREADS], end[DHSA_MAX_THREADS], work[DHSA_MAX_THREADS];
} peak_job;

static void peak_task(void *context, int64_t index, int thread)
{
    peak_job *p = context;
    (void)thread;
    /* All threads start at the same time; otherwise a core could run one after another and be counted twice. The
     * wait is limited, since this thread runs all tasks alone if another call uses the pool. */
    const double patience = dhsa_now() + 50e-3;
    atomic_fetch_add(&p->arrived, 1);
    while (atomic_load(&p->arrived) < p->threads && dhsa_now() < patience) continue;
    p->start[index] = dhsa_now();
    p->work[index] = p->kernels->fma_work(PEAK_LOOPS);
    p->end[index] = dhsa_now();
}

double dhsa_fma_peak(int num_threads)
{
    const int n = DHSA_MIN(DHSA_MAX(num_threads, 1), DHSA_MAX_THREADS);
    const dhsa_kernels *kernels = dhsa_kernels_current();
    double best = 0;
    /* The best round counts: an interruption makes a round slower, never faster. */
    for (int round = 0; round < PEAK_ROUNDS; round++) {
        peak_job p = {.kernels = kernels->plain ? kernels->plain : kernels, .threads = n};
        dhsa_parallel(n, n, peak_task, &p);
        double first = p.start[0], last = p.end[0], work = 0;
        for (int i = 0; i < n; i++) {
            first = DHSA_MIN(first, p.start[i]);
            last = DHSA_MAX(last, p.end[i]);
            work += p.work[i];
        }
        best = DHSA_MAX(best, work / (last - first) * 1e-9);
    }
    return best;
}

enum {
    READ_PIECE = 1 << 16, /* elements that a thread reads at a time: 256 KiB */
    READ_LINE = 1 << 10   /* elements copied at a time, to a buffer that stays in L1 */
};

typedef struct {
    const dhsa_kernels *kernels;
    const float *data;
    int64_t n;
} read_job;

static void read_task(void *context, int64_t index, int thread)
{
    const read_job *r = context;
    const int64_t end = DHSA_MIN((index + 1) * READ_PIECE, r->n);
    float line[READ_LINE];
    (void)thread;
    for (int64_t at = index * READ_PIECE; at < end; at += READ_LINE)
        r->kernels->load(r->data + at, DHSA_F32, DHSA_MIN(READ_LINE, end - at), line);
}

double dhsa_read_bandwidth(const void *data, int64_t bytes, int num_threads)
{
    if (!data || bytes < 4) return 0;
    read_job r = {.kernels = dhsa_kernels_current(), .data = data, .n = bytes / 4};
    const double start = dhsa_now();
    dhsa_parallel(dhsa_ceil_div(r.n, READ_PIECE), num_threads, read_task, &r);
    return (double)bytes / (dhsa_now() - start) * 1e-9;
}
