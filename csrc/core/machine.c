/* machine.c: what the machine offers: how many CPUs this process may use, and the peaks of arithmetic and of reading that
 * benchmarks are held against. */
#include <sched.h>
#include <unistd.h>

#include "core/internal.h"
#include "core/threads.h"

int dhsa_cpu_count(void)
{
#ifdef __linux__
    cpu_set_t set;
    CPU_ZERO(&set);
    if (sched_getaffinity(0, sizeof set, &set) == 0) return DHSA_MAX(1, CPU_COUNT(&set));
#endif
    const long n = sysconf(_SC_NPROCESSORS_ONLN);
    return n < 1 ? 1 : (int)n;
}

typedef struct {
    const dhsa_kernels *kernels;
    double rate[DHSA_MAX_THREADS];
} peak;

static void measure(void *context, int64_t index, int thread)
{
    peak *p = context;
    (void)thread;
    p->rate[index] = p->kernels->fma_peak();
}

double dhsa_fma_peak(int num_threads)
{
    peak p = {.kernels = dhsa_kernels_current()};
    const int n = DHSA_MIN(DHSA_MAX(num_threads, 1), DHSA_MAX_THREADS);
    double sum = 0;
    dhsa_parallel(n, n, measure, &p);
    for (int i = 0; i < n; i++) sum += p.rate[i];
    return sum;
}

enum { READ_PIECE = 1 << 16 }; /* numbers that a thread reads at a time: 256 KiB */

typedef struct {
    const dhsa_kernels *kernels;
    const float *data;
    int64_t n;
} reading;

static void read_piece(void *context, int64_t index, int thread)
{
    const reading *r = context;
    (void)thread;
    /* The result is used, so that the loop is not optimised away. */
    volatile float keep = r->kernels->read(r->data + index * READ_PIECE, DHSA_MIN(READ_PIECE, r->n - index * READ_PIECE));
    (void)keep;
}

double dhsa_read_bandwidth(const void *data, int64_t bytes, int num_threads)
{
    reading r = {.kernels = dhsa_kernels_current(), .data = data, .n = bytes / 4};
    const double start = dhsa_now();
    dhsa_parallel(dhsa_ceil_div(r.n, READ_PIECE), num_threads, read_piece, &r);
    return (double)bytes / (dhsa_now() - start) * 1e-9;
}
