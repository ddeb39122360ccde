/* cpu.h: which tiers this CPU, under this operating system, can run. */
#ifndef DHSA_CPU_H
#define DHSA_CPU_H

/* 1 if the tier of that name may be used here. */
int dhsa_cpu_runs(const char *isa);

#endif
