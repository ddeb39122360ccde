/* finite.h: keys that hold a NaN or inf. As in exact attention, they must reach all queries that see them, so they are
 * selected before all keys that are not forced. */
#ifndef DHSA_FINITE_H
#define DHSA_FINITE_H

#include "select/selector.h"

/* The selector calls these three for a method that sets `has_finite`. open returns 0 if there is no memory. begin
 * checks the keys of the current batch item, in parallel. */
int dhsa_finite_open(dhsa_selector *s);
void dhsa_finite_close(dhsa_selector *s);
void dhsa_finite_begin(dhsa_selector *s);
/* Returns the first such key in [from, to) for a head set, or `to` if there is none. */
int64_t dhsa_finite_next(const dhsa_selector *s, int64_t set, int64_t from, int64_t to);
/* Key blocks that hold such a key below span.end get the score +inf and the mass 0 (mass may be NULL). */
void dhsa_finite_blocks(const dhsa_selector *s, int64_t set, dhsa_span span, float *score, float *mass);

#endif
