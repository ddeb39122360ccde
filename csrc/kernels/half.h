/* half.h: conversion of fp16 and bf16 to fp32 and back in plain C, with rounding to nearest even. Tiers without
 * instructions for it use these functions, and the tests compare the other tiers with them. */
#ifndef DHSA_HALF_H
#define DHSA_HALF_H

#include <stdint.h>
#include <string.h>

static inline float dhsa_float(uint32_t bits)
{
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

static inline uint32_t dhsa_bits(float x)
{
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

static inline float dhsa_from_bf16(uint16_t h) { return dhsa_float((uint32_t)h << 16); }

static inline uint16_t dhsa_to_bf16(float x)
{
    const uint32_t u = dhsa_bits(x);
    if ((u & 0x7fffffffu) > 0x7f800000u) return (uint16_t)(u >> 16 | 0x40); /* a NaN stays a NaN */
    return (uint16_t)((u + 0x7fff + (u >> 16 & 1)) >> 16);
}

static inline float dhsa_from_f16(uint16_t h)
{
    const uint32_t sign = (uint32_t)(h & 0x8000) << 16, magnitude = h & 0x7fff;
    if (magnitude >= 0x7c00) return dhsa_float(sign | 0x7f800000u | (magnitude & 0x3ff) << 13);
    if (magnitude >= 0x400) return dhsa_float(sign | ((magnitude << 13) + (112u << 23)));
    /* Subnormal: an integer times 2^-24, exact in fp32. */
    return dhsa_float(sign | dhsa_bits((float)magnitude * 0x1p-24f));
}

static inline uint16_t dhsa_to_f16(float x)
{
    const uint32_t u = dhsa_bits(x), sign = u >> 16 & 0x8000, a = u & 0x7fffffffu;
    if (a > 0x7f800000u) return (uint16_t)(sign | 0x7e00);
    if (a >= 0x477ff000u) return (uint16_t)(sign | 0x7c00); /* 65520 and above round to infinity */
    if (a >= 0x38800000u) return (uint16_t)(sign | ((a + 0xfff + (a >> 13 & 1)) - (112u << 23)) >> 13);
    /* Below 2^-14: after adding 0.5, the low bits are the integer of the subnormal, rounded. */
    return (uint16_t)(sign | (dhsa_bits(dhsa_float(a) + 0.5f) - 0x3f000000u));
}

#endif
