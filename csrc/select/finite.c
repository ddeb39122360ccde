/* finite.c: finds the keys that hold a NaN or inf, once for each batch item. finite.h says how they are selected. */
#include "select/finite.h"

#include <math.h>
#include <string.h>

#include "chunk/chunk.h"
#include "core/threads.h"

enum { KEYS = 1024 /* keys of one task */ };

int dhsa_finite_open(dhsa_selector *s)
{
    s->flag_rows = DHSA_MIN(s->head_sets, s->k->shape[1]);
    s->flags = dhsa_alloc(s->flag_rows, s->k->shape[2]);
    return s->flags != NULL;
}

void dhsa_finite_close(dhsa_selector *s) { dhsa_free(s->flags); }

static int finite_is_bad(const dhsa_selector *s, int64_t kv_head, int64_t key)
{
    const void *row = dhsa_row(s->k, s->b, kv_head, key);
    float line[DHSA_MAX_HEAD_DIM];
    if (s->k->dtype != DHSA_F32) {
        s->kernels->load(row, s->k->dtype, s->k->shape[3], line);
        row = line;
    }
    return !dhsa_all_finite(s->kernels, row, s->k->shape[3]);
}

static void finite_task(void *context, int64_t index, int thread)
{
    const dhsa_selector *s = context;
    const int64_t k_len = s->k->shape[2], pieces = dhsa_ceil_div(k_len, KEYS), row = index / pieces,
                  from = index % pieces * KEYS;
    const int64_t heads = s->k->shape[1] / s->flag_rows;
    (void)thread;
    for (int64_t j = from; j < DHSA_MIN(from + KEYS, k_len); j++) {
        int bad = 0;
        for (int64_t h = row * heads; h < (row + 1) * heads; h++) bad |= finite_is_bad(s, h, j);
        s->flags[row * k_len + j] = (unsigned char)bad;
    }
}

void dhsa_finite_begin(dhsa_selector *s)
{
    dhsa_parallel(s->flag_rows * dhsa_ceil_div(s->k->shape[2], KEYS), s->num_threads, finite_task, s);
}

int64_t dhsa_finite_next(const dhsa_selector *s, int64_t set, int64_t from, int64_t to)
{
    const unsigned char *row = s->flags + set * s->flag_rows / s->head_sets * s->k->shape[2];
    const unsigned char *found = from < to ? memchr(row + from, 1, (size_t)(to - from)) : NULL;
    return found ? found - row : to;
}

void dhsa_finite_blocks(const dhsa_selector *s, int64_t set, dhsa_span span, float *score, float *mass)
{
    const int64_t key_block = s->config->key_block;
    for (int64_t j = span.lo / key_block * key_block; (j = dhsa_finite_next(s, set, j, span.end)) < span.end;) {
        const int64_t block = j / key_block;
        score[block] = INFINITY;
        if (mass) mass[block] = 0;
        j = (block + 1) * key_block;
    }
}
