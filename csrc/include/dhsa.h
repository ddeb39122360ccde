/* dhsa.h: the public C interface of the DHSA core: tensors, problems, selections, the prefill pipeline.
 * Usable without Python. Every entry validates its arguments, returns a status and, on failure, fills a
 * dhsa_error whose message names the argument, what came and what was expected. Nothing is printed, nothing aborts.
 * Shapes: q [B, H, Lq, D], k and v [B, Hkv, Lk, D], H = G * Hkv; query i sits at key position i + (Lk - Lq). */
#ifndef DHSA_H
#define DHSA_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Limits. dhsa._core gives the same numbers to Python. */
#define DHSA_MAX_LENGTH                                                                                                            \
    (INT32_MAX / 2) /* queries or keys: indices are 32 bits wide, and a few sums of lengths must fit as well                       \
                     */
#define DHSA_MAX_HEAD_DIM 256
#define DHSA_MAX_THREADS 1024
#define DHSA_MAX_STRIDE 1024 /* dhsa_select_config.stride: a row of xattention holds so many queries */
/* Attention of at most so many query rows (queries times the heads that share a list) goes another way, with other bits. */
#define DHSA_DECODE_ROWS 16

typedef enum {
    DHSA_OK = 0,
    DHSA_ERR_VALUE, /* a bad argument value       -> ValueError */
    DHSA_ERR_TYPE,  /* a bad dtype                -> TypeError */
    DHSA_ERR_NOT_IMPLEMENTED /* not there (yet)            -> NotImplementedError */,
    DHSA_ERR_NO_MEMORY /* an allocation failed       -> MemoryError */
} dhsa_status;

typedef struct {
    dhsa_status status;
    char message[256];
} dhsa_error;

typedef enum { DHSA_F32 = 0, DHSA_F16 = 1, DHSA_BF16 = 2 } dhsa_dtype;

/* A borrowed 4-D view. Strides are in elements, any sign, stride[3] must be 1 (ignored when shape[3] is 1). */
typedef struct {
    void *data;
    dhsa_dtype dtype;
    int64_t shape[4];
    int64_t stride[4];
} dhsa_tensor;

/* ---- attention ---------------------------------------------------------------------------------------------- */

typedef struct {
    dhsa_tensor q, k, v, out; /* one dtype for all four; out [B, H, Lq, D] must overlap none of the inputs */
    float *lse;     /* NULL, or contiguous [B, H, Lq]: log-sum-exp of the logits, natural log, -inf where no key is seen */
    double scale;   /* at most 1e38, of either sign */
    double softcap; /* 0: none; else s = softcap * tanh(s / softcap) after scaling; 1e-30 to 1e38 */
    int64_t window; /* 0: none; else key j is visible to position p only if j > p - window */
    int causal;     /* 0: every key is visible (window must then be 0) */
    const int32_t *key_ranges; /* NULL, or contiguous [B, Lq, 2]: query i sees keys [start, stop), in place of causal and window */
    int num_threads;           /* >= 1 */
    /* 0: none; else 0 < skip < 1: tiles of keys are left out in which every probability is less than skip times the largest that
     * the row has met before (BLASST, arXiv 2512.12087). By tile and group of rows, see docs/ARCHITECTURE.md; not for few rows. */
    double skip;
    int64_t *skip_counts; /* NULL, or [2], added to where skip is not 0: products of a tile and a group of rows; those left out */
} dhsa_problem;

/* Which keys each block of `query_block` queries may attend to: CSR over (b, s, i), b-major, s < heads, i < nq.
 * heads is 1 (one list for all heads), Hkv (one a KV group) or H (one a head). Indices ascending and unique in a row.
 * Causality, window and softcap still apply per token inside a list. */
typedef struct {
    int64_t batch, heads, nq, query_block;
    const int64_t *indptr;  /* [batch * heads * nq + 1] */
    const int32_t *indices; /* [indptr[last]] */
} dhsa_selection;

/* Exact attention: dense, causal or sliding window. */
dhsa_status dhsa_attend_dense(const dhsa_problem *problem, dhsa_error *error);
/* Attention over a selection. The selection is validated in full (see dhsa_selection_check) before any of it is used. */
dhsa_status dhsa_attend_sparse(const dhsa_problem *problem, const dhsa_selection *selection, dhsa_error *error);

/* Checks everything a kernel relies on; every function that takes a problem or a selection calls these first, once. n_indices is
 * the length of `indices`; -1: as many as indptr ends with. */
dhsa_status dhsa_problem_check(const dhsa_problem *problem, dhsa_error *error);
dhsa_status dhsa_selection_check(const dhsa_selection *selection, int64_t n_indptr, int64_t n_indices, int64_t batch,
                                 int64_t q_heads, int64_t kv_heads, int64_t q_len, int64_t k_len, dhsa_error *error);

/* ---- boundaries --------------------------------------------------------------------------------------------- */

/* The paper's boundary network (BoundarySimilarityAttn), weights borrowed, fp32, contiguous, torch layouts. */
typedef struct {
    int64_t channels, heads, hidden;      /* C = Hkv * D */
    int64_t window;                       /* w: a gap sees 2w tokens */
    const float *in_proj_weight;          /* [3C, C] */
    const float *in_proj_bias;            /* [3C] */
    const float *out_proj_weight;         /* [C, C] */
    const float *out_proj_bias;           /* [C] */
    const float *norm_weight, *norm_bias; /* [C] */
    const float *gate_weight;             /* [C], or NULL: mean pooling */
    const float *mlp0_weight;             /* [hidden, 4C + 1] */
    const float *mlp0_bias;               /* [hidden] */
    const float *mlp2_weight;             /* [hidden] */
    float mlp2_bias;
} dhsa_predictor;

/* The compact boundary network, this project's: see chunk/compact.c. Weights alike. */
typedef struct {
    int64_t channels, width, pooled, hidden; /* C, R, M, N */
    int64_t window;
    const float *project_weight; /* [R, C] */
    const float *project_bias;   /* [R] */
    const float *token_weight;   /* [M, 2R] */
    const float *token_bias;     /* [M] */
    const float *head0_weight;   /* [N, 3M] */
    const float *head0_bias;     /* [N] */
    const float *head2_weight;   /* [N] */
    float head2_bias;
} dhsa_compact;

typedef enum { DHSA_BOUNDARIES_SIMILARITY = 0, DHSA_BOUNDARIES_FIXED, DHSA_BOUNDARIES_PREDICTOR } dhsa_boundary_kind;
typedef enum { DHSA_SCORE_ROWS = 0, DHSA_SCORE_BLOCK } dhsa_score_kind;
typedef enum { DHSA_POOL_MEAN = 0, DHSA_POOL_MEAN_SQRT } dhsa_pooling;
typedef enum { DHSA_HEADS_GROUP = 0, DHSA_HEADS_ALL, DHSA_HEADS_HEAD } dhsa_heads;

typedef struct {
    dhsa_boundary_kind kind;
    int64_t chunk_size;              /* fixed */
    int64_t num_chunks;              /* similarity, predictor: n, the most gaps to pick */
    int64_t window;                  /* w of the similarity score */
    double theta;                    /* a gap's score must exceed it; -INFINITY: any */
    int64_t nms;                     /* an accepted gap lies more than this away from all accepted so far */
    const dhsa_predictor *predictor; /* predictor: one of the two, the other NULL */
    const dhsa_compact *compact;
} dhsa_boundary_config;

/* Scores of gap j (between keys j and j + 1) of one batch item: minus the cosine of the mean key of the w tokens up to j
 * and of the w after it (fewer at the ends), KV heads concatenated. scores [B, Lk]; the last one, no gap, is -inf. */
dhsa_status dhsa_similarity_scores(const dhsa_tensor *k, int64_t window, float *scores, int num_threads, dhsa_error *error);
/* logits [B, Lk] of the predictor; the first w - 1 and last w gaps are -100. */
dhsa_status dhsa_predictor_logits(const dhsa_predictor *predictor, const dhsa_tensor *k, float *logits, int num_threads,
                                  dhsa_error *error);
/* The same of the compact network; a gap whose window holds a key that makes it infinite or NaN is NaN. */
dhsa_status dhsa_compact_logits(const dhsa_compact *compact, const dhsa_tensor *k, float *logits, int num_threads,
                                dhsa_error *error);
/* Greedy picking: score > theta, best first (ties: lower index first), more than nms apart, at most n.
 * instruction > 0: gap L - instruction is taken first and gaps at or after it are skipped. boundaries has room for
 * min(n, L) + 3 entries; *count receives how many were written: 0, ..., L. */
dhsa_status dhsa_pick_boundaries(const float *scores, int64_t length, int64_t n, double theta, int64_t nms, int64_t instruction,
                                 int32_t *boundaries, int64_t *count, dhsa_error *error);
/* The most entries a row of dhsa_boundaries can have; 0 where config is NULL or there is no such length. */
int64_t dhsa_boundaries_capacity(const dhsa_boundary_config *config, int64_t length);
/* boundaries [B, capacity], rows padded with Lk; counts [B] (entries that are not padding). */
dhsa_status dhsa_boundaries(const dhsa_tensor *k, const dhsa_boundary_config *config, int32_t *boundaries, int64_t capacity,
                            int64_t *counts, int num_threads, dhsa_error *error);
/* The training label: ratios [L] of one head-mean attention matrix attn [L, L] (row stride in elements).
 * sliding_window 0: none. */
dhsa_status dhsa_boundary_ratios(const float *attn, int64_t row_stride, int64_t length, int64_t window, int64_t sliding_window,
                                 double *ratios, int num_threads, dhsa_error *error);
/* The same, ratios [B, L], straight from q and k in memory linear in L: of the head-mean of softmax(softcap(scale * q.k)),
 * causal, within the sliding window. Lq = Lk; window (w) at most 64; logits that are not finite are an error. */
dhsa_status dhsa_attention_ratios(const dhsa_tensor *q, const dhsa_tensor *k, int64_t window, int64_t sliding_window, double scale,
                                  double softcap, double *ratios, int num_threads, dhsa_error *error);

/* ---- scores and selection ----------------------------------------------------------------------------------- */

typedef struct {
    dhsa_score_kind score;
    dhsa_pooling pooling; /* block score only */
    dhsa_heads heads;
    int64_t query_block;
    int64_t mean_queries; /* rows score: mean queries a full block is reduced to, 1..query_block */
    int rounded;          /* rows score: mean queries and mean keys are rounded to bf16, as in selection by the method of rows */
    double scale;         /* rows: of the logits; block: of the products (1: the paper's) */
    double softcap;       /* of the logits, or of the block's products; 0: none */
    int64_t window;       /* 0: none */
} dhsa_score_config;

/* scores [B, S, nq, C], S = 1, Hkv or H by config->heads; boundaries [B, n_boundaries] int32 padded with Lk, C = n_boundaries - 1.
 * A chunk with no candidate key (above the block's end, under the window, or empty padding) scores -inf.
 * block: the mean query of the head set's heads against the mean key of its KV heads. rows: sums squared probabilities over rows
 * and heads of it: a chunk counts as often as it has keys, and its score is that of one of them. */
dhsa_status dhsa_chunk_scores(const dhsa_tensor *q, const dhsa_tensor *k, const int32_t *boundaries, int64_t n_boundaries,
                              const dhsa_score_config *config, float *scores, int num_threads, dhsa_error *error);

/* How keys are found. All of them share what follows: forced keys, budget, exact blocks. */
typedef enum {
    DHSA_METHOD_ROWS = 0,       /* chunks, row scores: this project's */
    DHSA_METHOD_DHSA,           /* chunks, the paper's block score */
    DHSA_METHOD_WINDOW,         /* sinks and the most recent keys: StreamingLLM */
    DHSA_METHOD_BLOCK,          /* means of fixed blocks */
    DHSA_METHOD_VERTICAL_SLASH, /* columns and diagonals: MInference */
    DHSA_METHOD_XATTENTION,     /* sums along antidiagonals: XAttention */
    DHSA_METHOD_PROXY,          /* proxy heads: ProxyAttn */
    DHSA_METHOD_HISA,           /* blocks, then keys inside */
    DHSA_METHOD_POWER,          /* blocks at distances of powers of two: PowerAttention */
    DHSA_METHOD_ORACLE          /* from the exact scores, for study */
} dhsa_method_kind;

typedef struct {
    dhsa_method_kind method;
    int64_t budget; /* keys a block may see, forced ones counted; with a mass: at most */
    double mass;    /* 0: none; else the share of a block's estimated attention mass that its keys are to hold */
    int64_t floor;  /* with a mass: the least keys, sink + local to budget */
    int64_t sink, local;
    int64_t dense_tail;      /* blocks that hold one of the last dense_tail queries see every candidate */
    int64_t shortlist;       /* rows: keys that a coarse look leaves to be scored, at least the budget; 0: no coarse look */
    int64_t key_block;       /* keys of a block, for methods of fixed blocks; at least 1 */
    int64_t stride;          /* xattention, proxy */
    dhsa_score_config score; /* score: block goes with method dhsa and only with it; rows for methods without chunks: ignored */
} dhsa_select_config;

/* The name of a method, "rows" for DHSA_METHOD_ROWS; NULL for a number that has none. */
const char *dhsa_method_name(dhsa_method_kind kind);
/* Whether a method cuts keys into chunks: others take no boundaries. */
int dhsa_method_has_chunks(dhsa_method_kind kind);
/* The number of gaps to pick among `length` keys that measured best, or with paper not 0 the paper's: a num_chunks for those who
 * give none. It depends on the method or on query_block; 0 where config is NULL or there is no such length. */
int64_t dhsa_num_chunks(const dhsa_select_config *config, int64_t length, int paper);
/* All that a config has to fulfil whatever the arrays of a call are; boundaries NULL: nothing is cut. Every function that takes a
 * config calls it first. (scale, softcap, window and whether a network fits the keys belong to the call.) */
dhsa_status dhsa_config_check(const dhsa_select_config *select, const dhsa_boundary_config *boundary_config, dhsa_error *error);
/* Whether causal attention of the last q_len of k_len positions leaves a visible key out in some block, under this window (0: none)
 * in place of the config's: the rule that dhsa_prefill follows, in constant time. config must have been checked. */
int dhsa_leaves_out(const dhsa_select_config *config, int64_t q_len, int64_t k_len, int64_t window);
/* indptr [B * S * nq + 1], the room that lists need, depends on shapes only; call plan first, allocate indptr[last] indices, then
 * select, which writes to indptr where the lists really lie: shorter ones if a mass is given, else the same. boundaries may be NULL
 * for methods without chunks. */
dhsa_status dhsa_select_plan(const dhsa_tensor *q, const dhsa_tensor *k, const dhsa_select_config *config, int64_t *indptr,
                             dhsa_error *error);
dhsa_status dhsa_select(const dhsa_tensor *q, const dhsa_tensor *k, const int32_t *boundaries, int64_t n_boundaries,
                        const dhsa_select_config *config, int64_t *indptr, int32_t *indices, int num_threads, dhsa_error *error);

/* ---- keys from call to call --------------------------------------------------------------------------------------- */

/* What is kept of the keys of one sequence in one layer: how they were cut, the means of their chunks, and a fingerprint of each by
 * which a later call knows it again. Keys that changed are noticed and forgotten with all that follow. Not for two calls at once.
 * Where functions below return nothing or a number, an index of NULL is an empty one. */
typedef struct dhsa_key_index dhsa_key_index;

dhsa_status dhsa_key_index_new(dhsa_key_index **index, dhsa_error *error);
void dhsa_key_index_free(dhsa_key_index *index);
void dhsa_key_index_reset(dhsa_key_index *index);
/* A twin that goes its own way from here. */
dhsa_status dhsa_key_index_copy(const dhsa_key_index *index, dhsa_key_index **twin, dhsa_error *error);
/* Lets go of the means, the bulk of it; the next call that wants them makes them again. */
void dhsa_key_index_drop_means(dhsa_key_index *index);
/* The cuts after the last call, empty chunks of a decoding step included, into boundaries (NULL: none); returns how many entries.
 */
int64_t dhsa_key_index_boundaries(const dhsa_key_index *index, int32_t *boundaries);
/* Memory held, in bytes. */
int64_t dhsa_key_index_bytes(const dhsa_key_index *index);
/* Writes it into bytes (NULL: nothing), for a file; returns how many there are. */
int64_t dhsa_key_index_write(const dhsa_key_index *index, char *bytes);
/* A new index of n bytes that dhsa_key_index_write wrote on a machine of this byte order. Any others are refused. */
dhsa_status dhsa_key_index_read(const char *bytes, int64_t n, dhsa_key_index **index, dhsa_error *error);

/* ---- the pipeline ------------------------------------------------------------------------------------------- */

typedef enum { DHSA_PATH_DENSE = 0, DHSA_PATH_WINDOW, DHSA_PATH_SPARSE } dhsa_path;

typedef struct {
    dhsa_path path;        /* what really ran */
    double select_seconds; /* boundaries, scores and lists */
    double attend_seconds;
    double density; /* (query, key) pairs attended / pairs visible under causality and window; 1 for exact paths */
} dhsa_stats;

/* boundaries -> scores -> selection -> attention. Runs exact when no block's visible span exceeds the budget.
 * problem must be causal, without key_ranges. The score config's scale, softcap and window are taken from the problem
 * (a block score is not scaled: the order is the same). boundaries: NULL, or [B, n_boundaries] as dhsa_boundaries writes them,
 * which are used in place of cutting, for methods of chunks. */
dhsa_status dhsa_prefill(const dhsa_problem *problem, const dhsa_boundary_config *boundary_config, const int32_t *boundaries,
                         int64_t n_boundaries, const dhsa_select_config *select, dhsa_stats *stats, dhsa_error *error);

/* The same with a key index for each batch item, key_indexes [B], all distinct, for a method with chunks: keys that they know are
 * not cut and averaged again, whatever number of queries comes with new ones. The first `same` keys are said to be those of the
 * last call: where they are many, some of them are looked at, others in each call, and all that come after. keep_means 0: the means
 * are freed again. With a single query it is a decoding step: its keys are chosen for it alone (dense_tail is ignored), keys that
 * came by such steps are one chunk and its own another. A call that is exact in any case, or whose arguments are refused, leaves
 * the key indexes as they were; one that fails later empties them. */
dhsa_status dhsa_prefill_indexed(const dhsa_problem *problem, const dhsa_boundary_config *boundary_config,
                                 const int32_t *boundaries, int64_t n_boundaries, const dhsa_select_config *select,
                                 dhsa_key_index *const *key_indexes, int64_t same, int keep_means, dhsa_stats *stats,
                                 dhsa_error *error);

/* ---- machine ------------------------------------------------------------------------------------------------ */

/* CPUs this process may run on. */
int dhsa_cpu_count(void);
/* Instruction set tiers, lowest first: compiled in, and usable on this CPU under this OS. NULL past the end. */
const char *dhsa_isa_compiled(int i);
const char *dhsa_isa_detected(int i);
const char *dhsa_isa_current(void);
/* dtypes that the tier in use multiplies as they are (1 << dhsa_dtype each): fp32, and what it does not convert to it. */
int dhsa_isa_products(void);
/* Lowers (or raises back) the tier for the whole process; fails if the name is unknown or this CPU cannot run it.
 * name "auto": the best detected, or what DHSA_ISA says. */
dhsa_status dhsa_isa_set(const char *name, dhsa_error *error);
/* Measured fp32 FMA peak of the current tier, GFLOP/s summed over num_threads; for benchmarks. */
double dhsa_fma_peak(int num_threads);
/* GB/s at which num_threads threads read `bytes` bytes (aligned to 4) once from end to end; for benchmarks. 0 where there are
 * none. */
double dhsa_read_bandwidth(const void *data, int64_t bytes, int num_threads);

#ifdef __cplusplus
}
#endif
#endif
