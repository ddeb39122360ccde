/* table.c: dispatch. The tier in use is one pointer to a const table, chosen at first use and published atomically. */
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#include "core/internal.h"
#include "core/platform.h"
#include "kernels/cpu.h"
#include "kernels/kernels.h"
#include "kernels/tiers.h"

#define DHSA_TIER(name) extern const dhsa_kernels dhsa_kernels_##name;
#define DHSA_BF16_TIER(name, base, plain) extern const dhsa_pair_kernels dhsa_bf16_##name;
#include "kernels/kernels.inc"
#undef DHSA_TIER
#undef DHSA_BF16_TIER
extern const dhsa_kernels dhsa_kernels_avx512narrow; /* not a tier: the base of avx512bf16 and amx */
extern const dhsa_pair_kernels dhsa_f16_amx;         /* not a tier: added to amx if the CPU has AMX-FP16 */
/* Not tiers: products of bytes for the tables without tile registers. */
extern const dhsa_byte_kernels dhsa_bytes_avx2, dhsa_bytes_avx2vnni, dhsa_bytes_avx512, dhsa_bytes_avx512narrow;
extern const dhsa_byte_kernels dhsa_bytes_neon;

/* A tier is a table of its own, or the table of `base` with other bf16 products. */
static const struct {
    const char *name;
    const dhsa_kernels *base;
    const dhsa_pair_kernels *bf16;
    const dhsa_kernels *plain;
} tiers[] = {
#define DHSA_TIER(name) {#name, &dhsa_kernels_##name, NULL, NULL},
#define DHSA_BF16_TIER(name, base, plain) {#name, &dhsa_kernels_##base, &dhsa_bf16_##name, &dhsa_kernels_##plain},
#include "kernels/kernels.inc"
#undef DHSA_TIER
#undef DHSA_BF16_TIER
};
enum { TIERS = sizeof tiers / sizeof *tiers };

static dhsa_kernels tables[TIERS];
static dhsa_once_flag built = DHSA_ONCE_INIT;

/* The products of bytes of a tier on this CPU, or NULL. */
static const dhsa_byte_kernels *bytes_of(int tier)
{
    const dhsa_kernels *base = tiers[tier].base;
#if DHSA_X86
#if DHSA_HAVE_AVXVNNI
    if (base == &dhsa_kernels_avx2 && dhsa_cpu_has_avx_vnni()) return &dhsa_bytes_avx2vnni;
#endif
    if (base == &dhsa_kernels_avx2) return &dhsa_bytes_avx2;
    if (!dhsa_cpu_has_vnni() || strcmp(tiers[tier].name, "amx") == 0) return NULL;
    if (base == &dhsa_kernels_avx512) return &dhsa_bytes_avx512;
    if (base == &dhsa_kernels_avx512narrow) return &dhsa_bytes_avx512narrow;
#elif DHSA_ARM64
    if (base == &dhsa_kernels_neon && dhsa_cpu_has_dotprod()) return &dhsa_bytes_neon;
#else
    (void)base;
#endif
    return NULL;
}

static void build(void)
{
    for (int i = 0; i < TIERS; i++) {
        tables[i] = *tiers[i].base;
        tables[i].isa = tiers[i].name;
        tables[i].bf16 = tiers[i].bf16;
        tables[i].plain = tiers[i].plain;
        tables[i].bytes = bytes_of(i);
        tables[i].precisions = 1 << DHSA_PRECISION_HIGHEST;
        if (tiers[i].bf16) tables[i].precisions |= 1 << DHSA_PRECISION_MEDIUM;
        /* Three products by vdpbf16ps take longer than one of fp32; see docs/PERFORMANCE.md. */
        if (strcmp(tiers[i].name, "amx") == 0) tables[i].precisions |= 1 << DHSA_PRECISION_HIGH;
#if DHSA_X86 && DHSA_HAVE_AMX
        if (tiers[i].bf16 == &dhsa_bf16_amx && dhsa_cpu_has_amx_fp16()) tables[i].f16 = &dhsa_f16_amx;
#endif
    }
}

static _Atomic(const dhsa_kernels *) current;

const dhsa_kernels *dhsa_kernels_find(const char *isa)
{
    dhsa_once(&built, build);
    for (int i = 0; i < TIERS; i++)
        if (strcmp(tiers[i].name, isa) == 0) return dhsa_cpu_runs(isa) ? &tables[i] : NULL;
    return NULL;
}

/* The tier that DHSA_ISA names or, if it is not set, the best one. NULL if the named tier is not available. */
static const dhsa_kernels *choose(void)
{
    const char *wish = getenv("DHSA_ISA");
    const dhsa_kernels *best = NULL;
    if (wish && *wish) return dhsa_kernels_find(wish);
    for (int i = TIERS - 1; !best && i >= 0; i--) {
        /* CPUs with tile registers execute vdpbf16ps at half the rate of fp32. If the operating system does not
         * permit the tile registers, fp32 is therefore faster. */
        if (strcmp(tiers[i].name, "avx512bf16") == 0 && dhsa_cpu_has_amx()) continue;
        best = dhsa_kernels_find(tiers[i].name);
    }
    return best;
}

const dhsa_kernels *dhsa_kernels_current(void)
{
    const dhsa_kernels *table = atomic_load_explicit(&current, memory_order_acquire);
    if (!table) {
        /* A bad DHSA_ISA is reported by dhsa_isa_set("auto"), which the import of the Python module calls. This
         * function cannot report an error. */
        table = choose();
        if (!table) table = dhsa_kernels_find("scalar");
        /* Another thread may have set a table in the meantime, here or by dhsa_isa_set. Its choice stays. */
        const dhsa_kernels *none = NULL;
        if (!atomic_compare_exchange_strong(&current, &none, table)) table = none;
    }
    return table;
}

const char *dhsa_isa_compiled(int i) { return i >= 0 && i < TIERS ? tiers[i].name : NULL; }

const char *dhsa_isa_detected(int i)
{
    for (int at = 0; i >= 0 && at < TIERS; at++)
        if (dhsa_cpu_runs(tiers[at].name) && i-- == 0) return tiers[at].name;
    return NULL;
}

int dhsa_isa_products(void)
{
    const dhsa_kernels *kernels = dhsa_kernels_current();
    return 1 << DHSA_F32 | (kernels->f16 ? 1 << DHSA_F16 : 0) | (kernels->bf16 ? 1 << DHSA_BF16 : 0);
}

int dhsa_isa_precisions(void) { return dhsa_kernels_current()->precisions; }

const char *dhsa_isa_current(void) { return dhsa_kernels_current()->isa; }

/* The number of bytes of a name that an error shows: at most 40, without parts of a character. */
static int shown(const char *name)
{
    int n = 0;
    while (n < 40 && name[n]) n++;
    while (n > 0 && ((unsigned char)name[n] & 0xc0) == 0x80) n--;
    return n;
}

dhsa_status dhsa_isa_set(const char *name, dhsa_error *error)
{
    if (!name) return dhsa_fail(error, DHSA_ERR_VALUE, "isa: expected a name, got NULL");
    const int automatic = strcmp(name, "auto") == 0;
    const dhsa_kernels *table = automatic ? choose() : dhsa_kernels_find(name);
    if (!table) {
        const char *wish = automatic ? getenv("DHSA_ISA") : name;
        return dhsa_fail(error, DHSA_ERR_VALUE, "%s: '%.*s' is not a tier that is compiled in and that this CPU runs",
                         automatic ? "DHSA_ISA" : "isa", shown(wish), wish);
    }
    atomic_store_explicit(&current, table, memory_order_release);
    return DHSA_OK;
}
