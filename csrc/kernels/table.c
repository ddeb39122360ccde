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

/* The tier that DHSA_ISA names, else the best. NULL if it names one that is not to be had. */
static const dhsa_kernels *choose(void)
{
    const char *wish = getenv("DHSA_ISA");
    const dhsa_kernels *best = NULL;
    if (wish && *wish) return dhsa_kernels_find(wish);
    for (int i = TIERS - 1; !best && i >= 0; i--) best = dhsa_kernels_find(compiled[i]->isa);
    return best;
}

const dhsa_kernels *dhsa_kernels_current(void)
{
    const dhsa_kernels *table = atomic_load_explicit(&current, memory_order_acquire);
    if (!table) {
        /* A bad DHSA_ISA is an error of dhsa_isa_set("auto"), which Python's import calls; here there is nobody to tell. */
        table = choose();
        if (!table) table = dhsa_kernels_find("scalar");
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
    const int automatic = strcmp(name, "auto") == 0;
    const dhsa_kernels *table = automatic ? choose() : dhsa_kernels_find(name);
    if (!table)
        return dhsa_fail(error, DHSA_ERR_VALUE, "%s: '%.40s' is not a tier that is compiled in and that this CPU runs",
                         automatic ? "DHSA_ISA" : "isa", automatic ? getenv("DHSA_ISA") : name);
    atomic_store_explicit(&current, table, memory_order_release);
    return DHSA_OK;
}
