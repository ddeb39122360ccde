/* finite.h: keys that hold a NaN or inf. They must reach the rows that see them, as in exact attention, so that lists take them
 * in any case. */
#ifndef DHSA_FINITE_H
#define DHSA_FINITE_H

#include "select/selector.h"

/* The selector calls these three for a method that asks for them with `has_finite`. open returns 0 if there is no memory; begin
 * looks at the keys of the batch item, in parallel. */
int dhsa_finite_open(dhsa_selector *s);
void dhsa_finite_close(dhsa_selector *s);
void dhsa_finite_begin(dhsa_selector *s);
/* The first such key of a set in [from, to); `to` if there is none. */
int64_t dhsa_finite_next(const dhsa_selector *s, int64_t set, int64_t from, int64_t to);
/* Blocks of keys that hold one below span.end: score +inf, and mass (NULL: none) 0. */
void dhsa_finite_blocks(const dhsa_selector *s, int64_t set, dhsa_span span, float *score, float *mass);

#endif
