/* cpu.c: detects what the CPU supports (cpuid) and which registers the operating system saves (xgetbv). A register
 * that is not saved on a context switch must not be used, even if the CPU has it. */
#include "kernels/cpu.h"

#include <string.h>

#if defined(__x86_64__) || defined(_M_X64)
#include <cpuid.h>
#include <stdint.h>

static uint64_t saved_by_os(void)
{
    uint32_t low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (uint64_t)high << 32 | low;
}

#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>

/* On Linux a process must request the tile registers, since they enlarge the state that is saved on a context
 * switch. */
static int tiles_granted(void)
{
    enum { ARCH_REQ_XCOMP_PERM = 0x1023, TILE_DATA = 18 };
    return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, TILE_DATA) == 0;
}
#else
static int tiles_granted(void) { return 0; }
#endif

int dhsa_cpu_runs(const char *isa)
{
    enum { FMA = 1 << 12, OSXSAVE = 1 << 27, AVX = 1 << 28, F16C = 1 << 29 };          /* leaf 1, ecx */
    enum { AVX2 = 1 << 5, AVX512F = 1 << 16, AVX512DQ = 1 << 17, AVX512BW = 1 << 30 }; /* leaf 7, ebx */
    enum { AMX_BF16 = 1 << 22, AMX_TILE = 1 << 24 };                                   /* leaf 7, edx */
    enum { AVX512_BF16 = 1 << 5 };                                                     /* leaf 7.1, eax */
    const uint32_t avx512vl = UINT32_C(1) << 31, ymm_state = 0x06, zmm_state = 0xe6, tile_state = 0x60000;
    uint32_t a, b, c, d, a1, b1, c1, d1;
    if (strcmp(isa, "scalar") == 0) return 1;
    if (!__get_cpuid(1, &a, &b, &c, &d)) return 0;
    const uint32_t base = FMA | OSXSAVE | AVX | F16C;
    if ((c & base) != base || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return 0;
    const uint64_t os = saved_by_os();
    const int avx2 = (b & AVX2) && (os & ymm_state) == ymm_state;
    if (strcmp(isa, "avx2") == 0) return avx2;
    const uint32_t wide = (uint32_t)AVX512F | AVX512DQ | AVX512BW | avx512vl;
    const int avx512 = avx2 && (b & wide) == wide && (os & zmm_state) == zmm_state;
    if (strcmp(isa, "avx512") == 0) return avx512;
    const int bf16 = avx512 && __get_cpuid_count(7, 1, &a1, &b1, &c1, &d1) && (a1 & AVX512_BF16);
    if (strcmp(isa, "avx512bf16") == 0) return bf16;
    const uint32_t tiles = AMX_BF16 | AMX_TILE;
    if (strcmp(isa, "amx") == 0)
        return bf16 && (d & tiles) == tiles && (os & tile_state) == tile_state && tiles_granted();
    return 0;
}

int dhsa_cpu_has_amx_fp16(void)
{
    uint32_t a, b, c, d;
    return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 21 & 1);
}

int dhsa_cpu_has_amx(void)
{
    uint32_t a, b, c, d;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d >> 24 & 1);
}

int dhsa_cpu_has_vnni(void)
{
    uint32_t a, b, c, d;
    return dhsa_cpu_runs("avx512") && __get_cpuid_count(7, 0, &a, &b, &c, &d) && (c >> 11 & 1);
}

int dhsa_cpu_has_avx_vnni(void)
{
    uint32_t a, b, c, d;
    return dhsa_cpu_runs("avx2") && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 4 & 1);
}

int dhsa_cpu_has_dotprod(void) { return 0; }

#else

#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>

int dhsa_cpu_has_dotprod(void)
{
    enum { ASIMDDP = 1 << 20 };
    return (getauxval(AT_HWCAP) & ASIMDDP) != 0;
}
#elif defined(__ARM_FEATURE_DOTPROD)
int dhsa_cpu_has_dotprod(void) { return 1; } /* the compiler was told that the CPU has them */
#else
int dhsa_cpu_has_dotprod(void) { return 0; }
#endif

int dhsa_cpu_has_avx_vnni(void) { return 0; }

int dhsa_cpu_has_vnni(void) { return 0; }
int dhsa_cpu_has_amx_fp16(void) { return 0; }
int dhsa_cpu_has_amx(void) { return 0; }

int dhsa_cpu_runs(const char *isa)
{
    if (strcmp(isa, "scalar") == 0) return 1;
#if defined(__aarch64__)
    if (strcmp(isa, "neon") == 0) return 1; /* part of every AArch64 */
#endif
    return 0;
}

#endif
