/* bytes_tpl.h: products of rows and keys of 8 bits by instructions that multiply the neighbouring numbers of a 32-bit
 * word of one input by those of the other and add the products to a 32-bit sum, in each word of a vector. Before
 * inclusion, the file of a tier defines
 *   K_BYTES (name of the table), W_LEN (words of a vector), V_PER (vectors in a row of a panel)
 *   BYTES_KEYS (keys of a register tile), BYTES_OF (bytes of a number: 1, or 2 where bytes are widened)
 *   BYTES_UNSIGNED (1: the numbers of a panel are unsigned bytes)
 *   vw: w_set1(int32_t), w_load, w_store(float *, vw), which converts
 *   w_add(vw *sum, vw x, const void *k): adds the products of x and the word at k, the same for all words of x */
#include <string.h>

#include "kernels/kernels.h"
#include "kernels/names.h"

#define K_BYTES_NAME(op) K_GLUE(op, K_BYTES)
#define K_BYTES_LANES (W_LEN * V_PER)
#define K_BYTES_WORD (4 / BYTES_OF) /* numbers of a word */

static void K_BYTES_NAME(pack_panel)(const int8_t *const *rows, int n, int dim, void *dst)
{
    const int padded = (dim + 3) / 4 * 4;
    char *to = dst;
    for (int d = 0; d < padded; d += K_BYTES_WORD, to += 4 * K_BYTES_LANES) {
        const int there = dim - d < K_BYTES_WORD ? dim - d : K_BYTES_WORD;
        for (int r = 0; r < K_BYTES_LANES; r++) {
            uint32_t word = 0;
#if BYTES_OF == 1
            if (r < n) memcpy(&word, rows[r] + d, (size_t)there);
            if (BYTES_UNSIGNED) word ^= UINT32_C(0x80808080); /* adds 128 to each byte */
#else
            if (r < n && there > 0) word = (uint16_t)rows[r][d];
            if (r < n && there > 1) word |= (uint32_t)(uint16_t)rows[r][d + 1] << 16;
#endif
            memcpy(to + 4 * r, &word, sizeof word);
        }
    }
}

/* The products of `keys` keys, `pitch` bytes each, and `per` vectors of the panel. keys and per are constants after
 * inlining. */
K_INLINE void K_BYTES_NAME(tile)(const char *q, const char *k, ptrdiff_t pitch, const int32_t *bias, float *s,
                                 const int keys, const int per)
{
    vw acc[BYTES_KEYS][V_PER];
#pragma GCC unroll 8
    for (int i = 0; i < keys; i++)
#pragma GCC unroll 4
        for (int u = 0; u < per; u++) acc[i][u] = w_set1(BYTES_UNSIGNED ? bias[i] : 0);
    for (ptrdiff_t d = 0; d < pitch; d += 4, q += 4 * K_BYTES_LANES) {
        vw x[V_PER];
#pragma GCC unroll 4
        for (int u = 0; u < per; u++) x[u] = w_load(q + 4 * W_LEN * u);
#pragma GCC unroll 8
        for (int i = 0; i < keys; i++)
#pragma GCC unroll 4
            for (int u = 0; u < per; u++) w_add(&acc[i][u], x[u], k + i * pitch + d);
    }
#pragma GCC unroll 8
    for (int i = 0; i < keys; i++)
#pragma GCC unroll 4
        for (int u = 0; u < per; u++) w_store(s + i * K_BYTES_LANES + W_LEN * u, acc[i][u]);
}

K_INLINE void K_BYTES_NAME(qk_of)(const char *q, const char *k, const int32_t *bias, int n, int dim, float *s,
                                  dhsa_ahead *ahead, const int per)
{
    const ptrdiff_t pitch = (dim + 3) / 4 * 4 * BYTES_OF;
    int j = 0;
    for (; j + BYTES_KEYS <= n; j += BYTES_KEYS) {
        K_BYTES_NAME(tile)(q, k + j * pitch, pitch, bias + j, s + (ptrdiff_t)j * K_BYTES_LANES, BYTES_KEYS, per);
        dhsa_ask(ahead, BYTES_KEYS * dim);
    }
    for (; j < n; j++) K_BYTES_NAME(tile)(q, k + j * pitch, pitch, bias + j, s + (ptrdiff_t)j * K_BYTES_LANES, 1, per);
}

static void K_BYTES_NAME(qk)(const void *q, const void *k, const int32_t *bias, int n, int dim, int rows, float *s,
                             dhsa_ahead *ahead)
{
    K_FOR_VECTORS(rows, W_LEN, K_BYTES_NAME(qk_of), q, k, bias, n, dim, s, ahead);
}

const dhsa_byte_kernels K_BYTES_NAME(dhsa_bytes) = {BYTES_OF, BYTES_UNSIGNED ? 128 : 0, K_BYTES_NAME(pack_panel),
                                                    K_BYTES_NAME(qk)};

#undef K_BYTES_NAME
#undef K_BYTES_LANES
#undef K_BYTES_WORD
