/* tiers.h: which tiers this compiler and target can build. */
#ifndef DHSA_TIERS_H
#define DHSA_TIERS_H

#if defined(__x86_64__) || defined(_M_X64)
#define DHSA_X86 1
#else
#define DHSA_X86 0
#endif
#if defined(__aarch64__)
#define DHSA_ARM64 1
#else
#define DHSA_ARM64 0
#endif

/* GCC 10 and Clang 9 support AVX512-BF16, GCC 11 and Clang 12 the tile registers. Only Linux grants those to a
 * process that requests them. */
#if defined(__clang__)
#define DHSA_HAVE_AVX512BF16 (__clang_major__ >= 9)
#define DHSA_HAVE_AMX_COMPILER (__clang_major__ >= 12)
#elif defined(__GNUC__)
#define DHSA_HAVE_AVX512BF16 (__GNUC__ >= 10)
#define DHSA_HAVE_AMX_COMPILER (__GNUC__ >= 11)
#else
#define DHSA_HAVE_AVX512BF16 0
#define DHSA_HAVE_AMX_COMPILER 0
#endif
#if DHSA_HAVE_AMX_COMPILER && defined(__linux__)
#define DHSA_HAVE_AMX 1
#else
#define DHSA_HAVE_AMX 0
#endif

#define DHSA_HAVE_AVXVNNI DHSA_HAVE_AMX_COMPILER /* the same compilers support AVX-VNNI */

/* The instruction sets that the files of a tier are compiled for; see target_begin.h. */
#define DHSA_TARGET_AVX2 "avx2,fma,f16c"
#define DHSA_TARGET_AVXVNNI DHSA_TARGET_AVX2 ",avxvnni"
#define DHSA_TARGET_AVX512 "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"
#define DHSA_TARGET_AVX512BF16 "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16"
#define DHSA_TARGET_VNNI DHSA_TARGET_AVX512 ",avx512vnni"
/* GCC inlines dot products only into functions for the architecture that its header names. */
#if defined(__clang__)
#define DHSA_TARGET_DOTPROD "dotprod"
#else
#define DHSA_TARGET_DOTPROD "arch=armv8.2-a+dotprod"
#endif
#define DHSA_TARGET_AMX DHSA_TARGET_AVX512BF16 ",amx-tile,amx-bf16"

#endif
