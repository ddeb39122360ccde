/* table.c: dispatch. The tier in use is one pointer to a const table, chosen at first use and published atomically. */
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#include "core/internal.h"
#include "kernels/cpu.h"
#include "kernels/kernels.h"

#define DHSA_TIER(name) extern const dhsa_kernels dhsa_kernels_##name;
#include "kernels/kernels.inc"
#undef DHSA_TIER

static const dhsa_kernels *const compiled[] = {
#define DHSA_TIER(name) &dhsa_kernels_##name,
#include "kernels/kernels.inc"
#undef DHSA_TIER
};
enum { TIERS = sizeof compiled / sizeof *compiled };

static _Atomic(const dhsa_kernels *) current;

const dhsa_kernels *dhsa_kernels_find(const char *isa)
{
    for (int i = 0; i < TIERS; i++)
        if (strcmp(compiled[i]->isa, isa) == 0) return dhsa_cpu_runs(isa) ? compiled[i] : NULL;
    return NULL;
}

/* The best tier, or the one that DHSA_ISA names where this CPU runs it. */
static const dhsa_kernels *choose(void)
{
    const char *wish = getenv("DHSA_ISA");
    const dhsa_kernels *best = wish && *wish ? dhsa_kernels_find(wish) : NULL;
    for (int i = TIERS - 1; !best && i >= 0; i--) best = dhsa_kernels_find(compiled[i]->isa);
    return best;
}

const dhsa_kernels *dhsa_kernels_current(void)
{
    const dhsa_kernels *table = atomic_load_explicit(&current, memory_order_acquire);
    if (!table) {
        table = choose();
        atomic_store_explicit(&current, table, memory_order_release);
    }
    return table;
}

const char *dhsa_isa_compiled(int i) { return i >= 0 && i < TIERS ? compiled[i]->isa : NULL; }

const char *dhsa_isa_detected(int i)
{
    for (int at = 0; i >= 0 && at < TIERS; at++)
        if (dhsa_cpu_runs(compiled[at]->isa) && i-- == 0) return compiled[at]->isa;
    return NULL;
}

const char *dhsa_isa_current(void) { return dhsa_kernels_current()->isa; }

dhsa_status dhsa_isa_set(const char *name, dhsa_error *error)
{
    const dhsa_kernels *table = strcmp(name, "auto") == 0 ? choose() : dhsa_kernels_find(name);
    if (!table) return dhsa_fail(error, DHSA_ERR_VALUE, "isa: '%.40s' is not compiled in or this CPU does not run it", name);
    atomic_store_explicit(&current, table, memory_order_release);
    return DHSA_OK;
}
