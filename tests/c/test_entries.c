/* test_entries.c: checks the functions of dhsa.h without Python: bad arguments are refused with an error that names
 * them, and nothing is changed; the first use of a tier does not undo the choice of another thread. Prints the number
 * of checks; exits with 1 at the first check that fails. Built and run by tests/test_entries.py. */
#include <math.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "dhsa.h"

enum { H = 2, L = 96, D = 16, ROWS = 3 };

static float q[H * L * D], k[H * L * D], v[H * L * D], out[H * L * D], twins[2 * H * L * D], scores[L];
static int checks;
static dhsa_error error;

static void require(int good, const char *what, int line)
{
    checks++;
    if (good) return;
    printf("line %d: %s: status %d, \"%s\"\n", line, what, (int)error.status, error.message);
    exit(1);
}

#define REFUSED(call, text)                                                                                                        \
    do {                                                                                                                           \
        error = (dhsa_error){DHSA_OK, ""};                                                                                         \
        require((call) != DHSA_OK && strstr(error.message, text), #call, __LINE__);                                                \
    } while (0)
#define SERVED(call)                                                                                                               \
    do {                                                                                                                           \
        error = (dhsa_error){DHSA_OK, ""};                                                                                         \
        require((call) == DHSA_OK, #call, __LINE__);                                                                               \
    } while (0)

static dhsa_tensor tensor(float *data) { return (dhsa_tensor){data, DHSA_F32, {1, H, L, D}, {H * L * D, L * D, D, 1}}; }

static dhsa_problem problem(void)
{
    dhsa_problem p = {.q = tensor(q), .k = tensor(k), .v = tensor(v), .out = tensor(out)};
    p.scale = 0.25;
    p.causal = p.num_threads = 1;
    return p;
}

static dhsa_boundary_config cuts(void)
{
    return (dhsa_boundary_config){.kind = DHSA_BOUNDARIES_SIMILARITY, .num_chunks = 12, .window = 4, .theta = -INFINITY, .nms = 2};
}

static dhsa_select_config choice(void)
{
    dhsa_select_config c = {.method = DHSA_METHOD_ROWS, .budget = 16, .sink = 2, .local = 4, .key_block = 1};
    c.score = (dhsa_score_config){.query_block = 8, .mean_queries = 4, .scale = 0.25};
    return c;
}

static void boundaries(void)
{
    const dhsa_tensor keys = tensor(k);
    dhsa_boundary_config c = cuts();
    int32_t edges[L + 3];
    int64_t counts[1];
    const int64_t room = L + 3;
    SERVED(dhsa_boundaries(&keys, &c, edges, room, counts, 1, &error));
    REFUSED(dhsa_boundaries(NULL, &c, edges, room, counts, 1, &error), "k: ");
    REFUSED(dhsa_boundaries(&keys, NULL, edges, room, counts, 1, &error), "boundaries: ");
    REFUSED(dhsa_boundaries(&keys, &c, NULL, room, counts, 1, &error), "boundaries: ");
    REFUSED(dhsa_boundaries(&keys, &c, edges, room, NULL, 1, &error), "counts: ");
    REFUSED(dhsa_boundaries(&keys, &c, edges, 2, counts, 1, &error), "capacity: ");
    c.kind = DHSA_BOUNDARIES_PREDICTOR;
    REFUSED(dhsa_boundaries(&keys, &c, edges, room, counts, 1, &error), "predictor: ");
    const dhsa_predictor attention = {.channels = H * D, .heads = 1, .hidden = 4, .window = 2};
    const dhsa_compact compact = {.channels = H * D, .width = 4, .pooled = 4, .hidden = 4, .window = 2};
    c.predictor = &attention;
    REFUSED(dhsa_boundaries(&keys, &c, edges, room, counts, 1, &error), "predictor: weights are missing");
    c.compact = &compact;
    REFUSED(dhsa_boundaries(&keys, &c, edges, room, counts, 1, &error), "predictor: expected one");
    c.predictor = NULL;
    REFUSED(dhsa_boundaries(&keys, &c, edges, room, counts, 1, &error), "predictor: weights are missing");
    c.kind = (dhsa_boundary_kind)7;
    REFUSED(dhsa_boundaries(&keys, &c, edges, room, counts, 1, &error), "boundaries: unknown kind 7");
    REFUSED(dhsa_similarity_scores(&keys, 4, NULL, 1, &error), "scores: ");
    REFUSED(dhsa_similarity_scores(&keys, 0, scores, 1, &error), "boundary_window: ");
    REFUSED(dhsa_predictor_logits(NULL, &keys, scores, 1, &error), "predictor: ");
    REFUSED(dhsa_compact_logits(NULL, &keys, scores, 1, &error), "predictor: ");
    REFUSED(dhsa_pick_boundaries(NULL, L, 4, 0, 1, 0, edges, counts, &error), "scores: ");
    REFUSED(dhsa_pick_boundaries(scores, L, 4, 0, 1, 0, NULL, counts, &error), "boundaries: ");
    REFUSED(dhsa_pick_boundaries(scores, L, 4, 0, 1, 0, edges, NULL, &error), "count: ");
    double ratios[L];
    REFUSED(dhsa_attention_ratios(&keys, &keys, 2, 0, 0.25, 0, NULL, 1, &error), "ratios: ");
    c.kind = DHSA_BOUNDARIES_FIXED;
    c.chunk_size = 7;
    require(dhsa_boundaries_capacity(&c, 15) == 4, "edges of 15 keys in chunks of 7", __LINE__);
    require(dhsa_boundaries_capacity(NULL, 15) == 0, "no config, no room", __LINE__);
    require(dhsa_boundaries_capacity(&c, 0) == 0 && dhsa_boundaries_capacity(&c, -1) == 0, "no keys, no room", __LINE__);
    require(dhsa_boundaries_capacity(&c, INT64_MAX) == 0, "more keys than there may be, no room", __LINE__);
}

static void selections(void)
{
    dhsa_problem p = problem();
    const int64_t indptr[ROWS + 1] = {0, 2, 4, 6};
    const int32_t indices[] = {0, 1, 0, 40, 0, 80};
    dhsa_selection s = {1, 1, ROWS, 32, indptr, indices};
    SERVED(dhsa_attend_sparse(&p, &s, &error));
    REFUSED(dhsa_attend_sparse(NULL, &s, &error), "problem: ");
    REFUSED(dhsa_attend_dense(NULL, &error), "problem: ");
    REFUSED(dhsa_attend_sparse(&p, NULL, &error), "selection: ");
    /* Shapes whose product is larger than the number of entries of indptr. */
    s.batch = (int64_t)1 << 40;
    REFUSED(dhsa_attend_sparse(&p, &s, &error), "selection: made for batch");
    s.batch = -3;
    REFUSED(dhsa_attend_sparse(&p, &s, &error), "selection: made for batch");
    s.batch = INT64_MAX;
    REFUSED(dhsa_attend_sparse(&p, &s, &error), "selection: made for batch");
    s.batch = 1;
    s.heads = (int64_t)1 << 40;
    REFUSED(dhsa_attend_sparse(&p, &s, &error), "selection: has lists");
    s.heads = 1;
    s.nq = INT64_MAX / 2;
    REFUSED(dhsa_attend_sparse(&p, &s, &error), "selection: has");
    s.nq = ROWS;
    s.indptr = NULL;
    REFUSED(dhsa_attend_sparse(&p, &s, &error), "indptr: ");
    const int64_t none[ROWS + 1] = {0};
    s.indptr = none;
    s.indices = NULL;
    SERVED(dhsa_attend_sparse(&p, &s, &error)); /* lists without keys need no memory */
    const int64_t rising[ROWS + 1] = {0, 2, 1, 6};
    s.indptr = rising;
    s.indices = indices;
    REFUSED(dhsa_attend_sparse(&p, &s, &error), "indptr: falls");
    const int32_t outside[] = {0, 1, 0, 40, 0, L};
    s.indptr = indptr;
    s.indices = outside;
    REFUSED(dhsa_attend_sparse(&p, &s, &error), "indices: entry 5");

    /* With strides of 0 there can be more heads than an int can count, without the memory for them. */
    p.q.shape[1] = p.out.shape[1] = ((int64_t)1 << 31) + 2;
    p.q.shape[2] = p.out.shape[2] = 1;
    p.q.shape[3] = p.out.shape[3] = p.k.shape[3] = p.v.shape[3] = 1;
    p.q.stride[1] = 0;
    p.out.stride[1] = 1;
    p.q.data = (void *)((intptr_t)1 << 46); /* away from out; never read */
    REFUSED(dhsa_problem_check(&p, &error), "q: 2147483650 heads");
}

static void selecting(void)
{
    const dhsa_tensor x = tensor(q), y = tensor(k);
    dhsa_select_config c = choice();
    int64_t indptr[H * L + 1];
    int32_t edges[] = {0, L}, *indices = malloc(sizeof *indices * H * L * L);
    REFUSED(dhsa_select_plan(&x, &y, NULL, indptr, &error), "config: ");
    REFUSED(dhsa_select_plan(&x, NULL, &c, indptr, &error), "k: ");
    REFUSED(dhsa_select_plan(&x, &y, &c, NULL, &error), "indptr: ");
    SERVED(dhsa_select_plan(&x, &y, &c, indptr, &error));
    REFUSED(dhsa_select(&x, &y, edges, 2, &c, NULL, indices, 1, &error), "indptr: ");
    REFUSED(dhsa_select(&x, &y, edges, 2, &c, indptr, NULL, 1, &error), "indices: ");
    REFUSED(dhsa_select(&x, &y, NULL, 2, &c, indptr, indices, 1, &error), "boundaries: ");
    SERVED(dhsa_select(&x, &y, edges, 2, &c, indptr, indices, 1, &error));
    REFUSED(dhsa_chunk_scores(&x, &y, edges, 2, NULL, scores, 1, &error), "config: ");
    REFUSED(dhsa_chunk_scores(&x, &y, edges, 2, &c.score, NULL, 1, &error), "scores: ");
    REFUSED(dhsa_chunk_scores(&x, &y, edges, INT64_MIN, &c.score, scores, 1, &error), "boundaries: ");
    free(indices);
}

/* Checks of a config by itself, and that dhsa_leaves_out agrees with what dhsa_prefill does. */
static void configs(void)
{
    dhsa_problem p = problem();
    dhsa_boundary_config b = cuts();
    dhsa_select_config c = choice();
    dhsa_stats stats;
    SERVED(dhsa_config_check(&c, NULL, &error));
    SERVED(dhsa_config_check(&c, &b, &error));
    REFUSED(dhsa_config_check(NULL, &b, &error), "config: ");
    b.window = 0;
    REFUSED(dhsa_config_check(&c, &b, &error), "boundary_window: ");
    c.budget = 5;
    REFUSED(dhsa_config_check(&c, NULL, &error), "budget: 5 keys do not hold the 2 of sink and 4 of local");
    REFUSED(dhsa_prefill(&p, &b, NULL, 0, &c, &stats, &error), "budget: ");
    c = choice();
    c.score.query_block = 0;
    REFUSED(dhsa_prefill(&p, &b, NULL, 0, &c, &stats, &error), "query_block: ");
    require(!dhsa_leaves_out(&c, L, L, 0, 1) && !dhsa_leaves_out(NULL, L, L, 0, 1), "no config, no answer", __LINE__);
    b = cuts();
    c = choice();
    for (int64_t budget = 6; budget <= L; budget += 15)
        for (int64_t tail = 0; tail <= L; tail += 24)
            for (int mode = 0; mode < 4; mode++) {
                c.budget = budget;
                c.dense_tail = tail;
                p.causal = mode % 2;
                p.window = mode < 2 ? 0 : 20;
                SERVED(dhsa_prefill(&p, &b, NULL, 0, &c, &stats, &error));
                require((stats.path == DHSA_PATH_SPARSE) == dhsa_leaves_out(&c, L, L, p.window, p.causal), "what a call does",
                        __LINE__);
            }
    require(strcmp(dhsa_method_name(DHSA_METHOD_ORACLE), "oracle") == 0, "the name of a method", __LINE__);
    require(!dhsa_method_name((dhsa_method_kind)99), "no such method", __LINE__);
    require(dhsa_num_chunks(&c, 800, 0) == 200 && dhsa_num_chunks(&c, 803, 1) == 800, "gaps", __LINE__);
    require(dhsa_num_chunks(NULL, 800, 0) == 0 && dhsa_num_chunks(&c, -1, 0) == 0, "no config, no gaps", __LINE__);
}

static void pipeline(void)
{
    dhsa_problem p = problem();
    dhsa_boundary_config b = cuts();
    dhsa_select_config c = choice();
    dhsa_stats stats;
    dhsa_key_index *index = NULL, *twin = NULL, *key_indexes[1];
    REFUSED(dhsa_key_index_new(NULL, &error), "key_index: ");
    REFUSED(dhsa_key_index_copy(NULL, &twin, &error), "key_index: ");
    SERVED(dhsa_key_index_new(&index, &error));
    key_indexes[0] = index;
    SERVED(dhsa_prefill_indexed(&p, &b, NULL, 0, &c, key_indexes, 0, 1, &stats, &error));
    require(stats.path == DHSA_PATH_SPARSE, "a sparse call", __LINE__);
    const int64_t edges = dhsa_key_index_boundaries(index, NULL), bytes = dhsa_key_index_bytes(index);
    require(edges > 2, "cuts that a call left", __LINE__);
    REFUSED(dhsa_prefill(&p, NULL, NULL, 0, &c, &stats, &error), "boundaries: ");
    REFUSED(dhsa_prefill(&p, &b, NULL, 0, NULL, &stats, &error), "select: ");
    REFUSED(dhsa_prefill(&p, &b, NULL, 0, &c, NULL, &error), "stats: ");
    REFUSED(dhsa_prefill(NULL, &b, NULL, 0, &c, &stats, &error), "problem: ");
    REFUSED(dhsa_prefill_indexed(&p, &b, NULL, 0, &c, NULL, 0, 1, &stats, &error), "key_indexes: ");
    REFUSED(dhsa_prefill_indexed(&p, &b, NULL, 0, &c, key_indexes, -1, 1, &stats, &error), "same: ");
    key_indexes[0] = NULL;
    REFUSED(dhsa_prefill_indexed(&p, &b, NULL, 0, &c, key_indexes, 0, 1, &stats, &error), "key_indexes: ");
    key_indexes[0] = index;
    /* Refused arguments leave the key indexes unchanged. */
    b.kind = DHSA_BOUNDARIES_PREDICTOR;
    REFUSED(dhsa_prefill_indexed(&p, &b, NULL, 0, &c, key_indexes, 0, 0, &stats, &error), "predictor: ");
    b = cuts();
    b.window = 0;
    REFUSED(dhsa_prefill_indexed(&p, &b, NULL, 0, &c, key_indexes, 0, 0, &stats, &error), "boundary_window: ");
    b = cuts();
    b.nms = -1;
    REFUSED(dhsa_prefill_indexed(&p, &b, NULL, 0, &c, key_indexes, 0, 0, &stats, &error), "nms: ");
    require(dhsa_key_index_boundaries(index, NULL) == edges && dhsa_key_index_bytes(index) == bytes, "key_indexes stay", __LINE__);
    b = cuts();
    /* A key index serves one batch item, never two. */
    dhsa_problem two = p;
    two.q.shape[0] = two.k.shape[0] = two.v.shape[0] = two.out.shape[0] = 2;
    two.q.stride[0] = two.k.stride[0] = two.v.stride[0] = 0;
    two.out.data = twins;
    dhsa_key_index *both[] = {index, index};
    REFUSED(dhsa_prefill_indexed(&two, &b, NULL, 0, &c, both, 0, 0, &stats, &error), "key_indexes: ");
    require(dhsa_key_index_boundaries(index, NULL) == edges && dhsa_key_index_bytes(index) == bytes, "it stays", __LINE__);
    SERVED(dhsa_key_index_copy(index, &twin, &error));
    both[1] = twin;
    SERVED(dhsa_prefill_indexed(&two, &b, NULL, 0, &c, both, 0, 1, &stats, &error));
    dhsa_key_index_free(twin);
    dhsa_key_index_free(index);
    /* NULL is an empty key index. */
    dhsa_key_index_free(NULL);
    dhsa_key_index_reset(NULL);
    dhsa_key_index_drop_means(NULL);
    require(dhsa_key_index_boundaries(NULL, NULL) == 0 && dhsa_key_index_bytes(NULL) == 0, "of no index", __LINE__);
}

/* ---- tiers -------------------------------------------------------------------------------------------------------------- */

static pthread_barrier_t barrier;

static void *first_use(void *unused)
{
    pthread_barrier_wait(&barrier);
    dhsa_isa_current();
    return unused;
}

/* Runs in a process that has used no tier yet: a tier that one thread sets during the first use by another must
 * stay. */
static void race(void)
{
    pthread_t thread;
    pthread_barrier_init(&barrier, NULL, 2);
    if (pthread_create(&thread, NULL, first_use, NULL) != 0) _exit(2);
    pthread_barrier_wait(&barrier);
    const dhsa_status status = dhsa_isa_set("scalar", NULL);
    pthread_join(thread, NULL);
    _exit(status != DHSA_OK || strcmp(dhsa_isa_current(), "scalar") != 0);
}

static void tiers(void)
{
    for (int i = 0; i < 400; i++) {
        const pid_t child = fork();
        if (child == 0) race();
        int status = 1;
        require(child > 0 && waitpid(child, &status, 0) == child && status == 0, "a tier that was set stays", __LINE__);
    }
    REFUSED(dhsa_isa_set(NULL, &error), "isa: ");
    require(dhsa_read_bandwidth(NULL, 64, 1) == 0 && dhsa_read_bandwidth(q, -64, 1) == 0, "nothing to read", __LINE__);
    char name[64] = "a";
    for (int i = 0; i < 30; i++) strcat(name, "\xc3\xa9");
    REFUSED(dhsa_isa_set(name, &error), "\xc3\xa9' is not a tier"); /* not cut within a UTF-8 character */
}

int main(void)
{
    tiers(); /* first, since the others use a tier */
    for (int i = 0; i < H * L * D; i++) {
        q[i] = (float)(i * 37 % 101) / 101 - 0.5f;
        k[i] = (float)(i * 53 % 103) / 103 - 0.5f;
        v[i] = (float)(i * 71 % 107) / 107 - 0.5f;
    }
    boundaries();
    selections();
    selecting();
    configs();
    pipeline();
    printf("%d checks\n", checks);
    return 0;
}
