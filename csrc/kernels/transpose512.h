/* transpose512.h: a square of 16 x 16 32-bit words, for the files that have AVX-512 (included under their target). */
#ifndef DHSA_TRANSPOSE512_H
#define DHSA_TRANSPOSE512_H

#include <immintrin.h>

/* Interleave neighbours, then pairs; then quarters of vectors four and eight apart. */
static inline void dhsa_transpose512(__m512 *x)
{
    __m512 a[16], b[16];
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2) {
        a[i] = _mm512_unpacklo_ps(x[i], x[i + 1]);
        a[i + 1] = _mm512_unpackhi_ps(x[i], x[i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4)
#pragma GCC unroll 2
        for (int h = 0; h < 2; h++) {
            b[i + 2 * h] = _mm512_shuffle_ps(a[i + h], a[i + 2 + h], 0x44);
            b[i + 2 * h + 1] = _mm512_shuffle_ps(a[i + h], a[i + 2 + h], 0xee);
        }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        const __m512 even = _mm512_shuffle_f32x4(b[i], b[i + 4], 0x88), odd = _mm512_shuffle_f32x4(b[i], b[i + 4], 0xdd);
        const __m512 even2 = _mm512_shuffle_f32x4(b[i + 8], b[i + 12], 0x88),
                     odd2 = _mm512_shuffle_f32x4(b[i + 8], b[i + 12], 0xdd);
        x[i] = _mm512_shuffle_f32x4(even, even2, 0x88);
        x[i + 8] = _mm512_shuffle_f32x4(even, even2, 0xdd);
        x[i + 4] = _mm512_shuffle_f32x4(odd, odd2, 0x88);
        x[i + 12] = _mm512_shuffle_f32x4(odd, odd2, 0xdd);
    }
}

#endif
