/* cpu.h: which tiers this CPU, under this operating system, can run. */
#ifndef DHSA_CPU_H
#define DHSA_CPU_H

/* 1 if the tier of that name may be used here. */
int dhsa_cpu_runs(const char *isa);
/* Beside what a tier needs. AMX_FP16: tile registers multiply fp16. AMX: they exist, whether the system grants them or not. */
int dhsa_cpu_has_amx_fp16(void);
int dhsa_cpu_has_amx(void);

#endif
