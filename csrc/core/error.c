/* error.c: errors and aligned memory, which all other files may use. Nothing here computes attention. */
#include "core/faults.h"
#include "core/internal.h"
#include "core/platform.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

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
    if (dhsa_fault(DHSA_FAULT_ALLOCATION)) return NULL;
    /* At least one cache line, so that an empty array also has a valid, distinct address. */
    void *p = dhsa_platform_alloc(DHSA_ALIGN, (size_t)dhsa_round_up(DHSA_MAX(bytes, 1), DHSA_ALIGN));
    if (p) dhsa_fault_hold(1);
    return p;
}

void *dhsa_alloc_zeroed(int64_t count, int64_t size)
{
    void *p = dhsa_alloc(count, size);
    return p ? memset(p, 0, (size_t)(count * size)) : NULL;
}

void dhsa_free(void *p)
{
    if (p) dhsa_fault_hold(-1);
    dhsa_platform_free(p);
}
