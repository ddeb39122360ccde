/* dhsa.h: the public C interface of the DHSA core: tensors, attention problems, selections and the prefill pipeline.
 * It can be used without Python. A function that can fail validates its arguments and returns a status; on failure
 * it fills a dhsa_error, whose message names the argument, what was passed and what was expected. No function prints
 * or aborts.
 * Shapes: q [B, H, Lq, D], k [B, Hkv, Lk, D], v [B, Hkv, Lk, E], out [B, H, Lq, E], H = G * Hkv; E may differ from D.
 * The position of query i is i + (Lk - Lq). */
#ifndef DHSA_H
#define DHSA_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Limits. dhsa._core exports the same values to Python. */
/* Queries or keys: an index has 32 bits, and sums of a few lengths must fit as well. */
#define DHSA_MAX_LENGTH (INT32_MAX / 2)
#define DHSA_MAX_HEAD_DIM 576  /* of queries and keys */
#define DHSA_MAX_VALUE_DIM 512 /* of values and outputs */
#define DHSA_MAX_THREADS 1024
#define DHSA_MAX_STRIDE 1024 /* dhsa_select_config.stride, the number of queries in a row of method xattention */
/* Attention of at most this many query rows (queries times the heads that share a list) takes the path of a decoding
 * step, whose results differ from those of the other path by rounding. */
#define DHSA_DECODE_ROWS 16

typedef enum {
    DHSA_OK = 0,
    DHSA_ERR_VALUE,           /* a bad argument value       -> ValueError */
    DHSA_ERR_TYPE,            /* a bad dtype                -> TypeError */
    DHSA_ERR_NOT_IMPLEMENTED, /* not supported (yet)        -> NotImplementedError */
    DHSA_ERR_NO_MEMORY        /* an allocation failed       -> MemoryError */
} dhsa_status;

typedef struct {
    dhsa_status status;
    char message[256];
} dhsa_error;

typedef enum { DHSA_F32 = 0, DHSA_F16 = 1, DHSA_BF16 = 2 } dhsa_dtype;

/* A 4-D view of memory that the caller owns. Strides are in elements and may have any sign. stride[3] must be 1, but
 * is ignored when shape[3] is 1. */
typedef struct {
    void *data;
    dhsa_dtype dtype;
    int64_t shape[4];
    int64_t stride[4];
} dhsa_tensor;

/* ---- attention ------------------------------------------------------------------------------------------------- */

/* How numbers of fp32 are multiplied, by the words of torch.set_float32_matmul_precision. HIGH: as sums of two bf16
 * numbers, without the products of the two smaller ones; MEDIUM: rounded to bf16. Sums are fp32 in all of them. */
typedef enum { DHSA_PRECISION_HIGHEST = 0, DHSA_PRECISION_HIGH, DHSA_PRECISION_MEDIUM } dhsa_precision;

typedef struct {
    dhsa_tensor q, k, v, out; /* all of one dtype; out [B, H, Lq, E] must not overlap an input */
    /* NULL, or contiguous [B, H, Lq]: the natural log of the sum of exp(logit), -inf for a query that sees no key */
    float *lse;
    double scale;   /* of either sign, at most 1e38 in magnitude */
    double softcap; /* 0: none; else 1e-30 to 1e38: s = softcap * tanh(s / softcap) after scaling */
    int64_t window; /* 0: none; else key j is visible to position p only if |j - p| < window */
    int causal;     /* 0: keys after a position are visible, too */
    /* NULL, or contiguous [B, Lq, 2]: query i sees keys [start, stop). causal is then ignored, and window must be 0. */
    const int32_t *key_ranges;
    /* NULL, or [H]: one logit for each query head, finite or -inf, that joins the softmax of every query and has no
     * value, so that the weights of the keys add up to less than 1. It is not scaled or capped. lse includes it. */
    const float *sinks;
    int num_threads; /* >= 1 */
    /* How fp32 inputs are multiplied; of no effect for other dtypes, for at most DHSA_DECODE_ROWS query rows, and for a
     * precision that dhsa_isa_precisions() does not name, whose products are those of the highest. */
    dhsa_precision precision;
    /* 0: none; else 0 < skip < 1: a tile of keys is left out for a group of query rows if every probability in it is
     * less than skip times the largest one that its row has met before (BLASST, arXiv 2512.12087). See
     * docs/architecture/attend.md. The path for at most DHSA_DECODE_ROWS query rows ignores it. */
    double skip;
    /* NULL, or [2]. If skip is not 0, the number of products of a tile and a group of rows is added to the first entry,
     * and the number of those left out to the second. */
    int64_t *skip_counts;
} dhsa_problem;

/* The keys that each block of `query_block` queries may attend to, in CSR form. The rows are (b, s, i) with b
 * slowest, s < heads and i < nq. heads is 1 (one list for all heads), Hkv (one for each KV group) or H (one for each
 * head). The indices of a row are ascending and unique. Causality, window and softcap apply to each token of a list. */
typedef struct {
    int64_t batch, heads, nq, query_block;
    const int64_t *indptr;  /* [batch * heads * nq + 1] */
    const int32_t *indices; /* [indptr[last]] */
} dhsa_selection;

/* Exact attention: dense, causal or sliding window. */
dhsa_status dhsa_attend_dense(const dhsa_problem *problem, dhsa_error *error);
/* Attention over a selection, which is validated completely (see dhsa_selection_check) before any of it is used. */
dhsa_status dhsa_attend_sparse(const dhsa_problem *problem, const dhsa_selection *selection, dhsa_error *error);

/* Check everything that the kernels rely on. A function that takes a problem or a selection calls these first, once.
 * n_indptr is the length of `indptr`. n_indices is the length of `indices`; -1: it is the last entry of `indptr`. */
dhsa_status dhsa_problem_check(const dhsa_problem *problem, dhsa_error *error);
dhsa_status dhsa_selection_check(const dhsa_selection *selection, int64_t n_indptr, int64_t n_indices, int64_t batch,
                                 int64_t q_heads, int64_t kv_heads, int64_t q_len, int64_t k_len, dhsa_error *error);

/* ---- boundaries ------------------------------------------------------------------------------------------------ */

/* The boundary network of the paper (BoundarySimilarityAttn). The caller owns the weights, which are fp32 and
 * contiguous, in the layouts of torch. */
typedef struct {
    int64_t channels, heads, hidden;      /* C = Hkv * D */
    int64_t window;                       /* w: the 2w tokens around a gap are read */
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

/* The compact boundary network of this project; see chunk/compact.c. The weights are stored as in dhsa_predictor. */
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
    int64_t chunk_size;              /* fixed: keys of a chunk */
    int64_t num_chunks;              /* similarity, predictor: n, the largest number of gaps to pick */
    int64_t window;                  /* similarity: w, the number of keys on each side of a gap */
    double theta;                    /* a gap is picked only if its score exceeds this; -INFINITY: any score */
    int64_t nms;                     /* a gap is picked only if it is more than this far from those picked before it */
    const dhsa_predictor *predictor; /* predictor: one of the two networks; the other is NULL */
    const dhsa_compact *compact;
} dhsa_boundary_config;

/* The similarity score of each gap. Gap j is between keys j and j + 1. Its score is minus the cosine of the mean of
 * the w keys up to j and the mean of the w keys after it (fewer at the ends), with the KV heads concatenated. scores
 * [B, Lk]; the last entry, which is no gap, is -inf. */
dhsa_status dhsa_similarity_scores(const dhsa_tensor *k, int64_t window, float *scores, int num_threads,
                                   dhsa_error *error);
/* The logits [B, Lk] of the predictor. The first w - 1 and the last w entries are -100. */
dhsa_status dhsa_predictor_logits(const dhsa_predictor *predictor, const dhsa_tensor *k, float *logits, int num_threads,
                                  dhsa_error *error);
/* The same for the compact network. A logit is NaN if a key in the window of its gap makes it infinite or NaN. */
dhsa_status dhsa_compact_logits(const dhsa_compact *compact, const dhsa_tensor *k, float *logits, int num_threads,
                                dhsa_error *error);
/* Picks at most n gaps greedily: those with score > theta, from the highest score down (ties: lower index first),
 * each more than nms away from those picked before it. instruction > 0: gap L - instruction is picked first, and
 * gaps at or after it are skipped. boundaries has room for min(n, L) + 3 entries and is set to 0, ..., L; *count
 * receives the number of entries. */
dhsa_status dhsa_pick_boundaries(const float *scores, int64_t length, int64_t n, double theta, int64_t nms,
                                 int64_t instruction, int32_t *boundaries, int64_t *count, dhsa_error *error);
/* The largest number of entries in a row of dhsa_boundaries; 0 if config is NULL or the length is not supported. */
int64_t dhsa_boundaries_capacity(const dhsa_boundary_config *config, int64_t length);
/* boundaries [B, capacity], rows padded with Lk; counts [B]: the number of entries without padding. */
dhsa_status dhsa_boundaries(const dhsa_tensor *k, const dhsa_boundary_config *config, int32_t *boundaries,
                            int64_t capacity, int64_t *counts, int num_threads, dhsa_error *error);
/* The training label: ratios [B, L], computed from q and k in memory linear in L. The attention matrix is the mean over
 * heads of softmax(softcap(scale * q.k)), causal and within the sliding window (0: none). Lq = Lk; window (w) is at
 * most
 * 64. A logit that is not finite is an error. */
dhsa_status dhsa_attention_ratios(const dhsa_tensor *q, const dhsa_tensor *k, int64_t window, int64_t sliding_window,
                                  double scale, double softcap, double *ratios, int num_threads, dhsa_error *error);

/* ---- scores and selection -------------------------------------------------------------------------------------- */

typedef struct {
    dhsa_score_kind score;
    dhsa_pooling pooling; /* block score only */
    dhsa_heads heads;
    int64_t query_block;
    int64_t mean_queries; /* rows score: number of mean queries of a full block, 1..query_block */
    int quantized;        /* rows score: mean queries and mean keys are quantized, as method rows does */
    double scale;         /* factor of the logits (rows) or of the products (block; the paper: 1) */
    double softcap;       /* softcap of the logits (rows) or of the products (block); 0: none */
    int64_t window;       /* 0: none */
    int bidirectional;    /* 0: causal; else a block may choose keys on both sides of it. */
} dhsa_score_config;

/* scores [B, S, nq, C], where config->heads determines S = 1, Hkv or H; boundaries [B, n_boundaries] int32, padded
 * with Lk, and C = n_boundaries - 1. The score is -inf for a chunk without a candidate key: one after the block, one
 * before its window, or padding. The block score is the product of the mean query over the heads of a head set and
 * the mean key over its KV heads. The rows score sums squared probabilities over the rows and heads of a head set. A
 * chunk counts in the softmax once for each of its keys, and its score is that of one of its keys. */
dhsa_status dhsa_chunk_scores(const dhsa_tensor *q, const dhsa_tensor *k, const int32_t *boundaries,
                              int64_t n_boundaries, const dhsa_score_config *config, float *scores, int num_threads,
                              dhsa_error *error);

/* How keys are selected. Forced keys, the budget and exact blocks are common to all methods. */
typedef enum {
    DHSA_METHOD_ROWS = 0,       /* chunks and row scores: the method of this project */
    DHSA_METHOD_DHSA,           /* chunks and the block score of the paper */
    DHSA_METHOD_WINDOW,         /* sinks and the most recent keys: StreamingLLM */
    DHSA_METHOD_BLOCK,          /* means of fixed blocks */
    DHSA_METHOD_VERTICAL_SLASH, /* columns and diagonals: MInference */
    DHSA_METHOD_XATTENTION,     /* sums along antidiagonals: XAttention */
    DHSA_METHOD_PROXY,          /* proxy heads: ProxyAttn */
    DHSA_METHOD_HISA,           /* blocks, then keys inside these: HISA */
    DHSA_METHOD_POWER,          /* blocks at distances of powers of two: PowerAttention */
    DHSA_METHOD_ORACLE          /* by the exact attention probabilities, for study */
} dhsa_method_kind;

typedef struct {
    dhsa_method_kind method;
    int64_t budget;      /* largest number of keys that a block sees, forced ones included */
    double mass;         /* 0: none; else the share of a block's estimated attention mass that its keys must hold */
    int64_t floor;       /* with a mass: smallest number of keys, sink + local to budget */
    int64_t sink, local; /* forced keys: the first ones and the most recent ones */
    int64_t dense_tail;  /* blocks that hold one of the last dense_tail queries see every candidate */
    int64_t shortlist;   /* rows: keys left to be scored after a coarse scoring, at least the budget; 0: all */
    int64_t key_block;   /* keys of a block, for methods of fixed blocks; at least 1 */
    int64_t stride;      /* xattention, proxy */
    /* score.score is block for method dhsa and rows for all others. Methods without mean queries ignore
     * score.mean_queries. */
    dhsa_score_config score;
} dhsa_select_config;

/* The name of a method, "rows" for DHSA_METHOD_ROWS; NULL if `kind` is not a method. */
const char *dhsa_method_name(dhsa_method_kind kind);
/* Whether a method cuts keys into chunks. Other methods take no boundaries. */
int dhsa_method_has_chunks(dhsa_method_kind kind);
/* The default of num_chunks, the number of gaps to pick, for `length` keys: the number that measured best or, if
 * paper is not 0, that of the paper. The first depends on the method, the second on query_block. 0 if config is NULL
 * or the length is not supported. */
int64_t dhsa_num_chunks(const dhsa_select_config *config, int64_t length, int paper);
/* Checks a config as far as it does not depend on the arrays of a call. boundary_config NULL: keys are not cut. A
 * function that takes a config calls this first. scale, softcap, window and whether a network fits the keys are
 * checked in a call. */
dhsa_status dhsa_config_check(const dhsa_select_config *select, const dhsa_boundary_config *boundary_config,
                              dhsa_error *error);
/* Whether attention of the last q_len of k_len positions leaves out a visible key in some block. window (0: none) and
 * causal are used in place of those of config. This is the rule that dhsa_prefill follows, and takes constant time.
 * config must have been checked. */
int dhsa_leaves_out(const dhsa_select_config *config, int64_t q_len, int64_t k_len, int64_t window, int causal);
/* Selection takes two calls. dhsa_select_plan writes to indptr [B * S * nq + 1] the room that the lists need, which
 * depends on shapes only. The caller then allocates indptr[last] indices and calls dhsa_select, which writes the
 * lists and updates indptr: with a mass, lists may be shorter than planned; else indptr does not change. boundaries
 * may be NULL for methods without chunks. */
dhsa_status dhsa_select_plan(const dhsa_tensor *q, const dhsa_tensor *k, const dhsa_select_config *config,
                             int64_t *indptr, dhsa_error *error);
dhsa_status dhsa_select(const dhsa_tensor *q, const dhsa_tensor *k, const int32_t *boundaries, int64_t n_boundaries,
                        const dhsa_select_config *config, int64_t *indptr, int32_t *indices, int num_threads,
                        dhsa_error *error);

/* Means of chunks of one batch item, quantized as selection by row scores uses them: whole numbers up to 127, times a
 * factor. Instruction sets do not differ in them, so that machines can exchange them. */
typedef struct {
    int64_t kv_heads, chunks, dim;
    int8_t *mean;  /* [kv_heads, chunks, dim] */
    float *scale;  /* [kv_heads, chunks] */
    float *spread; /* [kv_heads, chunks], of groups of DHSA_GROUP_CHUNKS chunks; NULL for chunks */
    int8_t *state; /* [kv_heads, chunks]: 0, 1 (the mean is not finite) or 2 (the chunk is empty) */
} dhsa_means;
#define DHSA_GROUP_CHUNKS 4
/* Computes the means of keys [edges[c], edges[c + 1]) of k, which has a batch of one. edges [means->chunks + 1] do not
 * decrease; keys outside of them are not read. */
dhsa_status dhsa_chunk_means(const dhsa_tensor *k, const int32_t *edges, const dhsa_means *means, int num_threads,
                             dhsa_error *error);
/* dhsa_select for query blocks [first, first + blocks) of a batch of one, by means that the caller has: for method
 * rows those of all chunks and, if there are more keys than config->shortlist, of their groups, else NULL. Of q only
 * these blocks are read, and of k only the keys of the group in which a block ends, up to its end; the memory of the
 * others need not be filled. Means of chunks that no block sees are not used. The method must be rows, window or
 * power. indptr [heads * blocks + 1] is written; n_indices is the length of indices, which must be sufficient. */
dhsa_status dhsa_select_blocks(const dhsa_tensor *q, const dhsa_tensor *k, const int32_t *boundaries,
                               int64_t n_boundaries, const dhsa_means *chunks, const dhsa_means *groups,
                               const dhsa_select_config *config, int64_t first, int64_t blocks, int64_t *indptr,
                               int32_t *indices, int64_t n_indices, int num_threads, dhsa_error *error);

/* ---- keys from call to call ------------------------------------------------------------------------------------ */

/* What is kept from call to call about the keys of one sequence in one layer: how they were cut, the means of their
 * chunks, and a fingerprint of each key, by which a later call recognises it. If a key has changed, everything about
 * it and all later keys is discarded. Two calls must not use one index at the same time. For the functions below
 * that do not return a status, an index of NULL is an empty one. */
typedef struct dhsa_key_index dhsa_key_index;

dhsa_status dhsa_key_index_new(dhsa_key_index **index, dhsa_error *error);
void dhsa_key_index_free(dhsa_key_index *index);
void dhsa_key_index_reset(dhsa_key_index *index);
/* Creates an independent copy. */
dhsa_status dhsa_key_index_copy(const dhsa_key_index *index, dhsa_key_index **twin, dhsa_error *error);
/* Frees the means, which take most of the memory. The next call that needs them computes them again. */
void dhsa_key_index_drop_means(dhsa_key_index *index);
/* Writes the boundaries of the last call to `boundaries`, unless it is NULL, and returns the number of entries. They
 * include the empty chunks of a decoding step. */
int64_t dhsa_key_index_boundaries(const dhsa_key_index *index, int32_t *boundaries);
/* The memory of an index, in bytes. */
int64_t dhsa_key_index_bytes(const dhsa_key_index *index);
/* Writes it into bytes (NULL: nothing), for a file; returns how many there are. */
int64_t dhsa_key_index_write(const dhsa_key_index *index, char *bytes);
/* A new index of n bytes that dhsa_key_index_write wrote on a machine of this byte order. Any others are refused. */
dhsa_status dhsa_key_index_read(const char *bytes, int64_t n, dhsa_key_index **index, dhsa_error *error);

/* ---- the pipeline ---------------------------------------------------------------------------------------------- */

typedef enum { DHSA_PATH_DENSE = 0, DHSA_PATH_WINDOW, DHSA_PATH_SPARSE } dhsa_path;

typedef struct {
    dhsa_path path;        /* the path that was taken */
    double select_seconds; /* time of boundaries, scores and lists */
    double attend_seconds;
    double density; /* (query, key) pairs attended / pairs visible under causality and window; 1 if exact */
} dhsa_stats;

/* Computes boundaries, scores, selection and attention. Attention is exact if no block sees more keys than the
 * budget. problem must be without key_ranges, and causal unless the method is rows, block or window. scale, softcap,
 * window and bidirectional of the score config are taken from the problem, but a block score is not scaled, which does
 * not change the order. boundaries: NULL, or [B, n_boundaries] as dhsa_boundaries writes them, by which methods with
 * chunks cut. */
dhsa_status dhsa_prefill(const dhsa_problem *problem, const dhsa_boundary_config *boundary_config,
                         const int32_t *boundaries, int64_t n_boundaries, const dhsa_select_config *select,
                         dhsa_stats *stats, dhsa_error *error);

/* The same for a method with chunks, with a key index for each batch item: key_indexes [B], all distinct. Keys that
 * an index knows are not cut and averaged again, however many queries there are. The caller asserts that the first
 * `same` keys are those of the last call. If these are many, only some of them are compared with the index, others
 * in each call; all keys after them are compared. keep_means 0: the means are freed at the end. A call with a single
 * query is a decoding step: keys are selected for it alone and dense_tail is ignored; the keys of earlier steps form
 * one chunk and the key of this step another. A call that leaves no key out, or whose arguments are refused, does
 * not change the indexes. A call that fails later empties them. */
dhsa_status dhsa_prefill_indexed(const dhsa_problem *problem, const dhsa_boundary_config *boundary_config,
                                 const int32_t *boundaries, int64_t n_boundaries, const dhsa_select_config *select,
                                 dhsa_key_index *const *key_indexes, int64_t same, int keep_means, dhsa_stats *stats,
                                 dhsa_error *error);

/* ---- machine --------------------------------------------------------------------------------------------------- */

/* The number of CPUs that this process may run on. */
int dhsa_cpu_count(void);
/* Names of instruction set tiers, lowest first: those compiled in, and those that this CPU under this operating
 * system can run. NULL past the end. dhsa_isa_current: the tier in use. */
const char *dhsa_isa_compiled(int i);
const char *dhsa_isa_detected(int i);
const char *dhsa_isa_current(void);
/* The dtypes that the tier in use multiplies without conversion to fp32, as a sum of 1 << dhsa_dtype. fp32 is always
 * one of them. */
int dhsa_isa_products(void);
/* A bit 1 << precision for each dhsa_precision by which the tier in use multiplies fp32 faster than by the highest, and
 * for the highest. */
int dhsa_isa_precisions(void);
/* Sets the tier for the whole process. Fails if the name is unknown or this CPU cannot run the tier. name "auto":
 * the tier that DHSA_ISA names, else the best one. */
dhsa_status dhsa_isa_set(const char *name, dhsa_error *error);
/* Measures the fp32 FMA peak of the tier in use, in GFLOP/s, summed over num_threads threads. For benchmarks. */
double dhsa_fma_peak(int num_threads);
/* Measures the rate in GB/s at which num_threads threads read `bytes` bytes (aligned to 4) once. For benchmarks. 0
 * if data is NULL or there are fewer than 4 bytes. */
double dhsa_read_bandwidth(const void *data, int64_t bytes, int num_threads);

#ifdef __cplusplus
}
#endif
#endif
