/* finite.c: finds keys that hold a NaN or inf, once for each batch row. What becomes of them is said in finite.h. */
#include "select/finite.h"

#include <math.h>
#include <string.h>

#include "chunk/chunk.h"
#include "core/threads.h"

enum { KEYS = 1024 }; /* of a task */

int dhsa_finite_open(dhsa_finite *f, const dhsa_selector *s)
{
    f->rows = DHSA_MIN(s->sets, s->k->shape[1]);
    f->bad = dhsa_alloc(f->rows, s->k->shape[2]);
    return f->bad != NULL;
}

void dhsa_finite_close(dhsa_finite *f) { dhsa_free(f->bad); }

typedef struct {
    const dhsa_finite *f;
    const dhsa_selector *s;
    int64_t groups;
} job;

static int is_bad(const dhsa_selector *s, int64_t kv_head, int64_t key)
{
    const void *row = dhsa_row(s->k, s->b, kv_head, key);
    float line[256];
    if (s->k->dtype != DHSA_F32) {
        s->kernels->load(row, s->k->dtype, s->k->shape[3], line);
        row = line;
    }
    return !dhsa_all_finite(s->kernels, row, s->k->shape[3]);
}

static void look(void *context, int64_t index, int thread)
{
    const job *w = context;
    const dhsa_selector *s = w->s;
    const int64_t k_len = s->k->shape[2], row = index / w->groups, from = index % w->groups * KEYS;
    const int64_t heads = s->k->shape[1] / w->f->rows;
    (void)thread;
    for (int64_t j = from; j < DHSA_MIN(from + KEYS, k_len); j++) {
        int bad = 0;
        for (int64_t h = row * heads; h < (row + 1) * heads; h++) bad |= is_bad(s, h, j);
        w->f->bad[row * k_len + j] = (unsigned char)bad;
    }
}

void dhsa_finite_begin(const dhsa_finite *f, const dhsa_selector *s)
{
    job w = {f, s, dhsa_ceil_div(s->k->shape[2], KEYS)};
    dhsa_parallel(f->rows * w.groups, s->num_threads, look, &w);
}

int64_t dhsa_finite_next(const dhsa_finite *f, const dhsa_selector *s, int64_t set, int64_t from, int64_t to)
{
    const unsigned char *row = f->bad + set * f->rows / s->sets * s->k->shape[2];
    const unsigned char *found = from < to ? memchr(row + from, 1, (size_t)(to - from)) : NULL;
    return found ? found - row : to;
}

void dhsa_finite_blocks(const dhsa_finite *f, const dhsa_selector *s, int64_t set, dhsa_span span, float *score, float *mass)
{
    const int64_t key_block = s->config->key_block;
    for (int64_t j = span.lo / key_block * key_block; (j = dhsa_finite_next(f, s, set, j, span.end)) < span.end;) {
        const int64_t unit = j / key_block;
        score[unit] = INFINITY;
        if (mass) mass[unit] = 0;
        j = (unit + 1) * key_block;
    }
}
