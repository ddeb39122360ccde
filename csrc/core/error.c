/* error.c: errors, aligned memory and the clock, which all other files may use. Nothing here computes attention. */
#include "core/internal.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <time.h>

dhsa_status dhsa_fail(dhsa_error *error, dhsa_status status, const char *format, ...)
{
    if (error) {
        va_list args;
        va_start(args, format);
        vsnprintf(error->message, sizeof error->message, format, args);
        va_end(args);
        error->status = status;
    }
    return status;
}

void *dhsa_alloc(int64_t count, int64_t size)
{
    int64_t bytes;
    if (!dhsa_mul(count, size, &bytes) || bytes > INT64_MAX - DHSA_ALIGN || (uint64_t)bytes > SIZE_MAX - DHSA_ALIGN)
        return NULL;
    void *p = NULL;
    /* At least one cache line, so that an empty array also has a valid, distinct address. */
    return posix_memalign(&p, DHSA_ALIGN, (size_t)dhsa_round_up(DHSA_MAX(bytes, 1), DHSA_ALIGN)) == 0 ? p : NULL;
}

void *dhsa_alloc_zeroed(int64_t count, int64_t size)
{
    void *p = dhsa_alloc(count, size);
    return p ? memset(p, 0, (size_t)(count * size)) : NULL;
}

void dhsa_free(void *p) { free(p); }

double dhsa_now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}
