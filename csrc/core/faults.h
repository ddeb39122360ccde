/* faults.h: in a build with DHSA_FAULTS, which only tests use, an allocation or the start of a thread fails on demand,
 * and the pieces of memory that are held are counted. In any other build there is no such code. */
#ifndef DHSA_FAULTS_H
#define DHSA_FAULTS_H

#include <stdint.h>

typedef enum { DHSA_FAULT_ALLOCATION = 0, DHSA_FAULT_THREAD, DHSA_FAULT_KINDS } dhsa_fault_kind;

#ifdef DHSA_FAULTS
typedef struct {
    int64_t asked[DHSA_FAULT_KINDS], failed[DHSA_FAULT_KINDS]; /* since they were last set */
    int64_t held;                                              /* pieces of memory allocated and not freed */
} dhsa_fault_counts;

/* Returns what was counted so far. From now on the first[kind]-th request of each kind fails, the next one being the
 * first; 0: none does. lasting: all later ones fail, too. */
dhsa_fault_counts dhsa_faults_set(const int64_t *first, int lasting);
/* Counts a request; 1 if it is to fail. */
int dhsa_fault(dhsa_fault_kind kind);
/* Counts memory that was allocated (1) or freed (-1). */
void dhsa_fault_hold(int pieces);
#else
static inline int dhsa_fault(dhsa_fault_kind kind) { return (void)kind, 0; }
static inline void dhsa_fault_hold(int pieces) { (void)pieces; }
#endif

#endif
