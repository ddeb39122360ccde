/* internal.h: small helpers that all folders use: errors, overflow-checked sizes, memory, dtypes, checks of tensors. */
#ifndef DHSA_INTERNAL_H
#define DHSA_INTERNAL_H

#include <stdint.h>
#include <stdlib.h>

#include "dhsa.h"

#define DHSA_ALIGN 64 /* bytes: the size of a cache line and of the widest vector */
#define DHSA_MIN(a, b) ((a) < (b) ? (a) : (b))
#define DHSA_MAX(a, b) ((a) > (b) ? (a) : (b))

/* Fills *error, unless it is NULL, with a message formatted as by printf, and returns the status. */
#if defined(__GNUC__)
__attribute__((format(printf, 3, 4)))
#endif
dhsa_status dhsa_fail(dhsa_error *error, dhsa_status status, const char *format, ...);

/* *out = a * b for two sizes. Returns 0 and does not change *out if one is negative or the product overflows. */
static inline int dhsa_mul(int64_t a, int64_t b, int64_t *out)
{
    if (a < 0 || b < 0 || (b != 0 && a > INT64_MAX / b)) return 0;
    *out = a * b;
    return 1;
}

/* Allocates count * size bytes, aligned to DHSA_ALIGN and not initialised. Returns NULL if there is no memory or the
 * product overflows. The memory is freed by dhsa_free. */
void *dhsa_alloc(int64_t count, int64_t size);
/* The same with all bytes 0. */
void *dhsa_alloc_zeroed(int64_t count, int64_t size);
void dhsa_free(void *p);

static inline int64_t dhsa_dtype_size(dhsa_dtype t) { return t == DHSA_F32 ? 4 : 2; }
static inline int64_t dhsa_ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
static inline int64_t dhsa_round_up(int64_t a, int64_t b) { return (a + b - 1) / b * b; }

/* Bytes from an index of an axis to the next. The stride of an axis of one index may be any number. */
static inline int64_t dhsa_step(const dhsa_tensor *t, int axis)
{
    return t->shape[axis] > 1 ? t->stride[axis] * dhsa_dtype_size(t->dtype) : 0;
}

/* The address of row [b, h, i, :] of a tensor. */
static inline void *dhsa_row(const dhsa_tensor *t, int64_t b, int64_t h, int64_t i)
{
    return (char *)t->data + (b * t->stride[0] + h * t->stride[1] + i * t->stride[2]) * dhsa_dtype_size(t->dtype);
}

/* Returns an error that names the argument if a required pointer is NULL. In problem.c. */
dhsa_status dhsa_check_pointer(const void *pointer, const char *name, dhsa_error *error);
/* Checks one tensor by itself: its sizes (at least 1), strides and dtype. Messages begin with `name`. In problem.c. */
dhsa_status dhsa_tensor_check(const dhsa_tensor *t, const char *name, dhsa_error *error);
/* Checks q and k against each other: batch, head counts, head_dim and dtype. In problem.c. */
dhsa_status dhsa_qk_check(const dhsa_tensor *q, const dhsa_tensor *k, dhsa_error *error);
/* Checks that scale and softcap (0: none) are in the range that fp32 arithmetic can use. In problem.c. */
dhsa_status dhsa_scaling_check(double scale, double softcap, dhsa_error *error);
/* Checks that num_threads is 1 to DHSA_MAX_THREADS. In problem.c. */
dhsa_status dhsa_threads_check(int num_threads, dhsa_error *error);
/* The number of (query, key) pairs that causality and the window leave visible to `heads` head sets, where the last
 * query has the position of the last key, and the number of them that a selection keeps, which is for q_len queries
 * from position `first` on. The density is the second number divided by the first. In selection.c. */
double dhsa_pairs_visible(const dhsa_problem *p, int64_t heads);
double dhsa_pairs_kept(const dhsa_problem *p, const dhsa_selection *s, int64_t first, int64_t q_len);
/* Seconds of a monotonic clock. In platform_posix.c and platform_windows.c. */
double dhsa_now(void);

#endif
