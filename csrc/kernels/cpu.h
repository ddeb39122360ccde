/* cpu.h: which tiers this CPU can run under this operating system. */
#ifndef DHSA_CPU_H
#define DHSA_CPU_H

/* 1 if the tier of this name can run. */
int dhsa_cpu_runs(const char *isa);
/* Features that are not needed for a tier. amx_fp16: tile registers can multiply fp16. amx: the CPU has tile
 * registers, whether or not the operating system permits their use. */
int dhsa_cpu_has_amx_fp16(void);
int dhsa_cpu_has_vnni(void);     /* AVX512-VNNI, with all that tier "avx512" needs */
int dhsa_cpu_has_avx_vnni(void); /* AVX-VNNI, with all that tier "avx2" needs */
int dhsa_cpu_has_dotprod(void);  /* the dot products of bytes of 64-bit Arm */
int dhsa_cpu_has_amx(void);

#endif
