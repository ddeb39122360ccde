/* faults.c: failures on demand, for tests. Empty in any build without DHSA_FAULTS. */
#include "core/faults.h"

#ifdef DHSA_FAULTS
#include <stdatomic.h>

/* Atomic each, since threads allocate at the same time; they are set while nothing else runs. */
static struct {
    _Atomic int64_t first, asked, failed;
} faults[DHSA_FAULT_KINDS];
static atomic_int lasting;
static _Atomic int64_t held;

dhsa_fault_counts dhsa_faults_set(const int64_t *first, int last)
{
    dhsa_fault_counts counts;
    for (int kind = 0; kind < DHSA_FAULT_KINDS; kind++) {
        atomic_store(&faults[kind].first, first[kind]);
        counts.asked[kind] = atomic_exchange(&faults[kind].asked, 0);
        counts.failed[kind] = atomic_exchange(&faults[kind].failed, 0);
    }
    atomic_store(&lasting, last);
    counts.held = atomic_load(&held);
    return counts;
}

int dhsa_fault(dhsa_fault_kind kind)
{
    const int64_t number = atomic_fetch_add(&faults[kind].asked, 1) + 1, first = atomic_load(&faults[kind].first);
    const int fails = first > 0 && (number == first || (number > first && atomic_load(&lasting)));
    if (fails) atomic_fetch_add(&faults[kind].failed, 1);
    return fails;
}

void dhsa_fault_hold(int pieces) { atomic_fetch_add(&held, pieces); }
#endif
