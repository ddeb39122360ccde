/* test_memory.c: for every method, lets each allocation of a selection fail once. The call must return an error and
 * leave nothing allocated. Built with -Wl,--wrap=posix_memalign,--wrap=free: the allocator of the core calls these
 * functions. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "dhsa.h"

enum { H = 4, HKV = 2, LQ = 200, LK = 300, D = 8, BLOCK = 32, BUDGET = 96 };

static int64_t asked, fails_at, held;

int __real_posix_memalign(void **p, size_t align, size_t size);
int __wrap_posix_memalign(void **p, size_t align, size_t size);
void __real_free(void *p);
void __wrap_free(void *p);

int __wrap_posix_memalign(void **p, size_t align, size_t size)
{
    if (asked++ == fails_at) return 12; /* ENOMEM */
    held++;
    return __real_posix_memalign(p, align, size);
}

void __wrap_free(void *p)
{
    if (p) held--;
    __real_free(p);
}

static float q[H * LQ * D], k[HKV * LK * D];

static dhsa_tensor tensor(float *data, int64_t heads, int64_t length)
{
    return (dhsa_tensor){data, DHSA_F32, {1, heads, length, D}, {heads * length * D, length * D, D, 1}};
}

/* Lets allocation 0 fail, then allocation 1, and so on until a call succeeds. Returns how many failed. */
static int tries(dhsa_method_kind method, double mass, int64_t *indptr, int32_t *indices)
{
    const dhsa_tensor x = tensor(q, H, LQ), y = tensor(k, HKV, LK);
    const int chunks = dhsa_method_has_chunks(method);
    int32_t edges[LK / 10 + 1];
    for (int i = 0; i <= LK / 10; i++) edges[i] = 10 * i;
    dhsa_select_config c = {
        .method = method, .budget = BUDGET, .mass = mass, .floor = mass > 0 ? 48 : 0, .sink = 4, .local = 16};
    c.shortlist = method == DHSA_METHOD_ROWS && mass == 0 ? 128 : 0;
    c.key_block = 16;
    c.stride = 4;
    c.score.query_block = BLOCK;
    c.score.mean_queries = 8;
    c.score.scale = 0.5;
    c.score.score = method == DHSA_METHOD_DHSA ? DHSA_SCORE_BLOCK : DHSA_SCORE_ROWS;
    for (int failed = 0;; failed++) {
        dhsa_error error;
        asked = 0, fails_at = -1, held = 0;
        if (dhsa_select_plan(&x, &y, &c, indptr, &error)) {
            printf("method %d: %s\n", (int)method, error.message);
            return -1;
        }
        asked = 0, fails_at = failed, held = 0;
        const dhsa_status status =
            dhsa_select(&x, &y, chunks ? edges : NULL, chunks ? LK / 10 + 1 : 0, &c, indptr, indices, 1, &error);
        const int done = asked <= failed;
        if (held != 0 || status != (done ? DHSA_OK : DHSA_ERR_NO_MEMORY)) {
            printf("method %d, allocation %d: status %d, %lld pieces left\n", (int)method, failed, (int)status,
                   (long long)held);
            return -1;
        }
        if (done) return failed;
    }
}

int main(void)
{
    static int64_t indptr[H * LQ + 1];
    static int32_t indices[H * LQ * LK];
    for (int i = 0; i < H * LQ * D; i++) q[i] = sinf((float)i);
    for (int i = 0; i < HKV * LK * D; i++) k[i] = cosf((float)i * 1.7f);
    for (int method = DHSA_METHOD_ROWS; method <= DHSA_METHOD_ORACLE; method++)
        for (int massive = 0; massive < 2; massive++) {
            const int without = method == DHSA_METHOD_DHSA || method == DHSA_METHOD_WINDOW ||
                                method == DHSA_METHOD_VERTICAL_SLASH || method == DHSA_METHOD_POWER; /* have no mass */
            if (massive && without) continue;
            const int count = tries((dhsa_method_kind)method, massive ? 0.7 : 0, indptr, indices);
            if (count < 0) return 1;
            printf("%d ", count);
        }
    printf("allocations failed in turn\n");
    return 0;
}
