/* vnni_tpl.h: products of bytes by vpdpbusd, which multiplies four neighbouring unsigned bytes of one input by four
 * signed bytes of the other and adds the products to a 32-bit sum, in each of 16 lanes. vnni.c defines V_PER, the
 * number of vectors in a row of a panel, and K_BYTES, the name of the table. */
#define K_BYTES_GLUE2(a, b) a##_##b
#define K_BYTES_GLUE(a, b) K_BYTES_GLUE2(a, b)
#define K_BYTES_NAME(op) K_BYTES_GLUE(op, K_BYTES)
#define K_BYTES_LANES (16 * V_PER)

static void K_BYTES_NAME(pack_panel)(const int8_t *const *rows, int n, int dim, uint8_t *dst)
{
    for (int d = 0; d < dim; d += 4, dst += 4 * K_BYTES_LANES) {
        const size_t there = (size_t)(dim - d < 4 ? dim - d : 4);
        for (int r = 0; r < K_BYTES_LANES; r++) {
            uint32_t word = 0;
            if (r < n) memcpy(&word, rows[r] + d, there);
            word ^= UINT32_C(0x80808080); /* adds 128 to each byte */
            memcpy(dst + 4 * r, &word, sizeof word);
        }
    }
}

/* The products of `keys` keys and `per` vectors of the panel. Both are constants after inlining. */
static inline __attribute__((always_inline)) void K_BYTES_NAME(tile)(const uint8_t *q, const int8_t *k, ptrdiff_t pitch,
                                                                     const int32_t *bias, float *s, const int keys,
                                                                     const int per)
{
    __m512i acc[BYTES_KEYS][V_PER];
#pragma GCC unroll 8
    for (int i = 0; i < keys; i++)
#pragma GCC unroll 4
        for (int u = 0; u < per; u++) acc[i][u] = _mm512_set1_epi32(bias[i]);
    for (ptrdiff_t d = 0; d < pitch; d += 4, q += 4 * K_BYTES_LANES) {
        __m512i x[V_PER];
#pragma GCC unroll 4
        for (int u = 0; u < per; u++) x[u] = _mm512_loadu_si512(q + 64 * u);
#pragma GCC unroll 8
        for (int i = 0; i < keys; i++)
#pragma GCC unroll 4
            for (int u = 0; u < per; u++) add_bytes(&acc[i][u], x[u], k + i * pitch + d);
    }
#pragma GCC unroll 8
    for (int i = 0; i < keys; i++)
#pragma GCC unroll 4
        for (int u = 0; u < per; u++) _mm512_storeu_ps(s + i * K_BYTES_LANES + 16 * u, _mm512_cvtepi32_ps(acc[i][u]));
}

static inline __attribute__((always_inline)) void K_BYTES_NAME(qk_of)(const uint8_t *q, const int8_t *k,
                                                                      const int32_t *bias, int n, int dim, float *s,
                                                                      dhsa_ahead *ahead, const int per)
{
    const ptrdiff_t pitch = (dim + 3) / 4 * 4;
    int j = 0;
    for (; j + BYTES_KEYS <= n; j += BYTES_KEYS) {
        K_BYTES_NAME(tile)(q, k + j * pitch, pitch, bias + j, s + (ptrdiff_t)j * K_BYTES_LANES, BYTES_KEYS, per);
        dhsa_ask(ahead, BYTES_KEYS * dim);
    }
    for (; j < n; j++) K_BYTES_NAME(tile)(q, k + j * pitch, pitch, bias + j, s + (ptrdiff_t)j * K_BYTES_LANES, 1, per);
}

static void K_BYTES_NAME(qk)(const uint8_t *q, const int8_t *k, const int32_t *bias, int n, int dim, int rows, float *s,
                             dhsa_ahead *ahead)
{
    if (rows <= 16)
        K_BYTES_NAME(qk_of)(q, k, bias, n, dim, s, ahead, 1);
    else if (rows <= 32 || V_PER == 2)
        K_BYTES_NAME(qk_of)(q, k, bias, n, dim, s, ahead, 2);
    else
        K_BYTES_NAME(qk_of)(q, k, bias, n, dim, s, ahead, V_PER);
}

const dhsa_byte_kernels K_BYTES_NAME(dhsa_bytes) = {K_BYTES_NAME(pack_panel), K_BYTES_NAME(qk)};

#undef K_BYTES_GLUE2
#undef K_BYTES_GLUE
#undef K_BYTES_NAME
#undef K_BYTES_LANES
