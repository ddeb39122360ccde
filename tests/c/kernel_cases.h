/* kernel_cases.h: what programs that compare the kernels of a tier with expected numbers share: random numbers, buffers
 * that end at a guard page, so that a read or write past them always crashes, and the comparison. */
#ifndef DHSA_TESTS_KERNEL_CASES_H
#define DHSA_TESTS_KERNEL_CASES_H

#include <math.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "core/internal.h"
#include "kernels/kernels.h"
#include "kernels/cpu.h"
#include "kernels/half.h"
#include "kernels/tiers.h"

static const dhsa_kernels *ref, *kn;
static int failures, checks;
static uint64_t state = 88172645463325252u;

static float uniform(void)
{
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return (float)(state >> 40) * 0x1p-23f - 1.0f;
}

/* What guarded() mapped since the last forget(). A process may only have a limited number of mappings. */
static struct {
    void *base;
    size_t bytes;
} made[8192];
static int n_made;

static void forget(void)
{
    while (n_made > 0) {
        n_made--;
        munmap(made[n_made].base, made[n_made].bytes);
    }
}

/* Returns memory that ends where an unreadable page begins. */
static void *guarded(size_t bytes)
{
    const size_t page = (size_t)sysconf(_SC_PAGESIZE), pages = (bytes + page - 1) / page + 1;
    char *base = mmap(NULL, pages * page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (n_made == sizeof made / sizeof *made || base == MAP_FAILED ||
        mprotect(base + (pages - 1) * page, page, PROT_NONE) != 0) {
        perror("guarded");
        _exit(2);
    }
    made[n_made].base = base;
    made[n_made++].bytes = pages * page;
    return base + (pages - 1) * page - bytes;
}

static float *floats(size_t n) { return guarded(n * sizeof(float)); }

static float *random_floats(size_t n)
{
    float *x = floats(n);
    for (size_t i = 0; i < n; i++) x[i] = uniform();
    return x;
}

static void near(const char *what, int a, int b, float got, float want, float tolerance)
{
    checks++;
    if ((isnan(got) && isnan(want)) || got == want || fabsf(got - want) <= tolerance) return;
    if (failures++ < 20)
        printf("%s %s (%d, %d): got %.9g, want %.9g, tolerance %.3g\n", kn->isa, what, a, b, got, want, tolerance);
}

/* Random rows of one dtype and pointers to them. */
static inline const void **random_rows(int n, int dim, int dtype)
{
    const void **rows = guarded((size_t)n * sizeof *rows);
    for (int r = 0; r < n; r++) {
        if (dtype == DHSA_F32) {
            rows[r] = random_floats((size_t)dim);
        } else {
            uint16_t *half = guarded((size_t)dim * 2);
            for (int d = 0; d < dim; d++)
                half[d] = dtype == DHSA_F16 ? dhsa_to_f16(uniform()) : dhsa_to_bf16(uniform());
            rows[r] = half;
        }
    }
    return rows;
}

/* Runs `cases` with kn set to each tier that this CPU supports, and returns what main() does. */
static int of_every_tier(void (*cases)(void))
{
    ref = dhsa_kernels_find("scalar");
    for (int tier = 0; dhsa_isa_detected(tier); tier++) {
        kn = dhsa_kernels_find(dhsa_isa_detected(tier));
        checks = 0;
        cases();
        forget();
        printf("%s: %d comparisons\n", kn->isa, checks);
    }
    printf("%d differences\n", failures);
    return failures != 0;
}

#endif
