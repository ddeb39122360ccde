/* internal.h: small helpers that every room uses: errors, overflow-checked sizes, memory, dtypes, checks of tensors. */
#ifndef DHSA_INTERNAL_H
#define DHSA_INTERNAL_H

#include <stdint.h>
#include <stdlib.h>

#include "dhsa.h"

#define DHSA_ALIGN 64 /* bytes: a cache line, and the widest vector */
#define DHSA_MIN(a, b) ((a) < (b) ? (a) : (b))
#define DHSA_MAX(a, b) ((a) > (b) ? (a) : (b))

/* Fills *error (may be NULL) printf-style and returns the status. */
#if defined(__GNUC__)
__attribute__((format(printf, 3, 4)))
#endif
dhsa_status dhsa_fail(dhsa_error *error, dhsa_status status, const char *format, ...);

/* Product of two non-negative sizes; returns 0 and leaves *out alone on overflow. */
static inline int dhsa_mul(int64_t a, int64_t b, int64_t *out)
{
    if (a < 0 || b < 0 || (b != 0 && a > INT64_MAX / b)) return 0;
    *out = a * b;
    return 1;
}

/* DHSA_ALIGN-aligned memory of count * size bytes, not cleared; NULL when out of memory or on overflow. Freed by dhsa_free. */
void *dhsa_alloc(int64_t count, int64_t size);
/* The same, all bytes 0. */
void *dhsa_alloc_zeroed(int64_t count, int64_t size);
void dhsa_free(void *p);

static inline int64_t dhsa_dtype_size(dhsa_dtype t) { return t == DHSA_F32 ? 4 : 2; }
static inline int64_t dhsa_ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
static inline int64_t dhsa_round_up(int64_t a, int64_t b) { return (a + b - 1) / b * b; }

/* Address of row [b, h, i, :] of a tensor. */
static inline void *dhsa_row(const dhsa_tensor *t, int64_t b, int64_t h, int64_t i)
{
    return (char *)t->data + (b * t->stride[0] + h * t->stride[1] + i * t->stride[2]) * dhsa_dtype_size(t->dtype);
}

/* An error that names the argument if a pointer that an entry needs is NULL. problem.c */
dhsa_status dhsa_check_pointer(const void *pointer, const char *name, dhsa_error *error);
/* Checks one input tensor on its own: rank-4 sizes >= 1, strides, dtype; `name` goes into the message. problem.c */
dhsa_status dhsa_tensor_check(const dhsa_tensor *t, const char *name, dhsa_error *error);
/* Checks q and k against each other (batch, head counts, lengths, head_dim, dtype). problem.c */
dhsa_status dhsa_qk_check(const dhsa_tensor *q, const dhsa_tensor *k, dhsa_error *error);
/* scale and softcap (0: none) within what fp32 arithmetic can use. problem.c */
dhsa_status dhsa_scaling_check(double scale, double softcap, dhsa_error *error);
/* num_threads in 1 .. DHSA_MAX_THREADS. problem.c */
dhsa_status dhsa_threads_check(int num_threads, dhsa_error *error);
/* (query, key) pairs visible to `heads` head sets under causality and window, queries and keys ending together, and those of
 * them that a selection keeps. Their quotient is the density. selection.c */
double dhsa_pairs_visible(const dhsa_problem *p, int64_t heads);
double dhsa_pairs_kept(const dhsa_problem *p, const dhsa_selection *s);
/* Seconds on a monotonic clock. error.c */
double dhsa_now(void);

#endif
