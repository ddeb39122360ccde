/* entries.c: the functions of dhsa._core except those in boundaries.c. They open the arguments, release the GIL,
 * call a function of dhsa.h and return the result. The caller (functional.py) allocates output arrays. */
#include "python/entries.h"

#include <string.h>

#include "attend/attend.h"
#include "core/threads.h"
#include "python/config.h"
#include "python/key_index.h"
#include "select/span.h"

/* ---- attention ------------------------------------------------------------------------------------------------- */

/* The share of products that were left out because of the option skip. */
static double skipped(const dhsa_py_problem *p)
{
    return p->skip_counts[0] > 0 ? (double)p->skip_counts[1] / (double)p->skip_counts[0] : 0.0;
}

/* Returns the share of products left out. */
PyObject *dhsa_py_attend_dense(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
    dhsa_py_problem p;
    if (dhsa_py_count("attend_dense", nargs, 14) != 0 ||
        dhsa_py_problem_open(PyModule_GetState(module), args, &p) != 0) {
        return NULL;
    }
    dhsa_error error = {DHSA_OK, ""};
    dhsa_status status;
    Py_BEGIN_ALLOW_THREADS;
    status = dhsa_attend_dense(&p.problem, &error);
    Py_END_ALLOW_THREADS;
    dhsa_py_problem_release(&p);
    PyObject *result = dhsa_py_result(status, &error);
    if (result != NULL) {
        Py_DECREF(result);
        result = PyFloat_FromDouble(skipped(&p));
    }
    return result;
}

/* Opens and checks the arrays of a selection. The core gets their lengths from here, since C sees only pointers. */
static int open_selection(const dhsa_py_state *state, PyObject *const *args, const dhsa_problem *problem,
                          dhsa_py_view *indptr, dhsa_py_view *indices, dhsa_selection *selection)
{
    int64_t shape[3] = {0, 0, 0};
    static const char *const names[] = {"shape[0]", "shape[1]", "shape[2]"};
    PyObject *tuple = args[2];
    if (!PyTuple_Check(tuple) || PyTuple_Size(tuple) != 3) {
        PyErr_SetString(PyExc_TypeError, "shape: expected a tuple (B, heads, nq)");
        return -1;
    }
    for (int i = 0; i < 3; i++) {
        if (dhsa_py_int(PyTuple_GetItem(tuple, i), names[i], 1, INT32_MAX, &shape[i]) != 0) {
            return -1;
        }
    }
    if (dhsa_py_int(args[3], "query_block", 1, INT32_MAX, &selection->query_block) != 0 ||
        dhsa_py_array_open(state, args[0], "indptr", DL_INT, 64, 1, NULL, 0, indptr) != 0 ||
        dhsa_py_array_open(state, args[1], "indices", DL_INT, 32, 1, NULL, 0, indices) != 0) {
        return -1;
    }
    selection->batch = shape[0];
    selection->heads = shape[1];
    selection->nq = shape[2];
    selection->indptr = indptr->data;
    selection->indices = indices->data;
    dhsa_error error = {DHSA_OK, ""};
    if (dhsa_selection_check(selection, indptr->shape[0], indices->shape[0], problem->q.shape[0], problem->q.shape[1],
                             problem->k.shape[1], problem->q.shape[2], problem->k.shape[2], &error) != DHSA_OK) {
        dhsa_py_raise(&error);
        return -1;
    }
    return 0;
}

/* Returns (density, share of products left out). */
PyObject *dhsa_py_attend_sparse(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
    const dhsa_py_state *state = PyModule_GetState(module);
    dhsa_py_problem p;
    if (dhsa_py_count("attend_sparse", nargs, 18) != 0 || dhsa_py_problem_open(state, args, &p) != 0) {
        return NULL;
    }
    dhsa_py_view indptr, indices;
    memset(&indptr, 0, sizeof indptr);
    memset(&indices, 0, sizeof indices);
    dhsa_selection selection;
    double density = 1.0;
    dhsa_error error = {DHSA_OK, ""};
    PyObject *result = NULL;
    /* The problem is checked first, since a selection is checked against its shapes. */
    dhsa_status status = dhsa_problem_check(&p.problem, &error);
    if (status != DHSA_OK) {
        dhsa_py_raise(&error);
    } else if (open_selection(state, args + 14, &p.problem, &indptr, &indices, &selection) == 0) {
        Py_BEGIN_ALLOW_THREADS;
        status = dhsa_attend_checked(&p.problem, &selection, &error); /* both are checked */
        if (status == DHSA_OK)
            density = dhsa_pairs_kept(&p.problem, &selection, p.problem.k.shape[2] - p.problem.q.shape[2],
                                      p.problem.q.shape[2]) /
                      dhsa_pairs_visible(&p.problem, selection.heads);
        Py_END_ALLOW_THREADS;
        result = dhsa_py_result(status, &error);
        if (result != NULL) {
            Py_DECREF(result);
            result = Py_BuildValue("(dd)", density, skipped(&p));
        }
    }
    dhsa_py_view_release(&indptr);
    dhsa_py_view_release(&indices);
    dhsa_py_problem_release(&p);
    return result;
}

/* Returns (path, density, select_seconds, attend_seconds, skipped). boundaries: int32 [B, n] to use, or None. */
PyObject *dhsa_py_prefill(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
    const dhsa_py_state *state = PyModule_GetState(module);
    dhsa_py_problem p;
    const dhsa_py_config *config;
    if (dhsa_py_count("prefill", nargs, 19) != 0 || (config = dhsa_py_config_of(state, args[14])) == NULL ||
        dhsa_py_problem_open(state, args, &p) != 0) {
        return NULL;
    }
    dhsa_py_key_indexes key_indexes;
    int64_t same = 0, keep_means = 0;
    dhsa_py_view boundaries;
    memset(&boundaries, 0, sizeof boundaries);
    PyObject *result = NULL;
    const int64_t shape[2] = {p.problem.k.shape[0], -1};
    if ((args[15] == Py_None ||
         dhsa_py_array_open(state, args[15], "boundaries", DL_INT, 32, 2, shape, 0, &boundaries) == 0) &&
        dhsa_py_int(args[17], "same", 0, INT64_MAX, &same) == 0 &&
        dhsa_py_int(args[18], "keep_means", 0, 1, &keep_means) == 0 &&
        dhsa_py_key_indexes_open(state, args[16], p.problem.k.shape[0], &key_indexes) == 0) {
        const dhsa_boundary_config cuts = dhsa_py_config_cuts(config, p.problem.k.shape[2]);
        dhsa_error error = {DHSA_OK, ""};
        dhsa_stats stats = {DHSA_PATH_DENSE, 0.0, 0.0, 1.0};
        dhsa_status status;
        Py_BEGIN_ALLOW_THREADS;
        const int64_t n_boundaries = boundaries.data ? boundaries.shape[1] : 0;
        status = key_indexes.items
                     ? dhsa_prefill_indexed(&p.problem, &cuts, boundaries.data, n_boundaries, &config->select,
                                            key_indexes.items, same, (int)keep_means, &stats, &error)
                     : dhsa_prefill(&p.problem, &cuts, boundaries.data, n_boundaries, &config->select, &stats, &error);
        Py_END_ALLOW_THREADS;
        dhsa_py_key_indexes_release(&key_indexes);
        result = dhsa_py_result(status, &error);
        if (result != NULL) {
            Py_DECREF(result);
            result = Py_BuildValue("(idddd)", (int)stats.path, stats.density, stats.select_seconds,
                                   stats.attend_seconds, skipped(&p));
        }
    }
    dhsa_py_view_release(&boundaries);
    dhsa_py_problem_release(&p);
    return result;
}

/* ---- scores and selection -------------------------------------------------------------------------------------- */

/* Arguments that chunk_scores, select_plan and select have in common. */
typedef struct {
    dhsa_py_view q_view, k_view, boundaries, indptr, output;
    dhsa_tensor q, k;
} select_args;

static void select_args_release(select_args *a)
{
    dhsa_py_view_release(&a->q_view);
    dhsa_py_view_release(&a->k_view);
    dhsa_py_view_release(&a->boundaries);
    dhsa_py_view_release(&a->indptr);
    dhsa_py_view_release(&a->output);
}

/* Opens q and k (args[0], args[1]) and, unless it is NULL, boundaries [B, n]. */
static int select_args_open(const dhsa_py_state *state, PyObject *const *args, PyObject *boundaries, select_args *a)
{
    memset(a, 0, sizeof *a);
    if (dhsa_py_input(state, args[0], "q", &a->q_view, &a->q) == 0 &&
        dhsa_py_input(state, args[1], "k", &a->k_view, &a->k) == 0) {
        const int64_t shape[2] = {a->k.shape[0], -1};
        if (boundaries == NULL ||
            dhsa_py_array_open(state, boundaries, "boundaries", DL_INT, 32, 2, shape, 0, &a->boundaries) == 0) {
            return 0;
        }
    }
    select_args_release(a);
    return -1;
}

static int score_scaling(PyObject *const *args, const select_args *a, dhsa_score_config *config)
{
    /* The block products of the paper are not scaled, so there None means 1. */
    const int64_t head_dim = config->score == DHSA_SCORE_BLOCK ? 1 : a->q.shape[3];
    const int causal = PyObject_IsTrue(args[3]);
    config->bidirectional = !causal;
    return causal < 0 ? -1
                      : dhsa_py_scaling(args[0], args[1], args[2], head_dim, &config->scale, &config->softcap,
                                        &config->window);
}

PyObject *dhsa_py_chunk_scores(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
    const dhsa_py_state *state = PyModule_GetState(module);
    select_args a;
    int threads = 0;
    PyObject *result = NULL;
    const dhsa_py_config *parsed;
    if (dhsa_py_count("chunk_scores", nargs, 10) != 0 || (parsed = dhsa_py_config_of(state, args[3])) == NULL ||
        dhsa_py_threads(args[9], &threads) != 0 || select_args_open(state, args, args[2], &a) != 0) {
        return NULL;
    }
    dhsa_score_config config = parsed->select.score;
    const int64_t length = a.q.shape[2], block = config.query_block;
    const int64_t shape[4] = {a.q.shape[0], dhsa_head_sets(&config, &a.q, &a.k), length / block + (length % block != 0),
                              a.boundaries.shape[1] - 1};
    if (a.boundaries.shape[1] < 2) {
        PyErr_SetString(PyExc_ValueError, "boundaries: expected at least the two entries 0 and Lk");
    } else if (score_scaling(args + 4, &a, &config) == 0 &&
               dhsa_py_array_open(state, args[8], "scores", DL_FLOAT, 32, 4, shape, 1, &a.output) == 0) {
        dhsa_error error = {DHSA_OK, ""};
        dhsa_status status;
        Py_BEGIN_ALLOW_THREADS;
        status = dhsa_chunk_scores(&a.q, &a.k, a.boundaries.data, a.boundaries.shape[1], &config, a.output.data,
                                   threads, &error);
        Py_END_ALLOW_THREADS;
        result = dhsa_py_result(status, &error);
    }
    select_args_release(&a);
    return result;
}

/* Opens indptr and checks its length: B * S * nq + 1. */
static int open_indptr(const dhsa_py_state *state, PyObject *object, int writable, const dhsa_score_config *config,
                       select_args *a)
{
    if (dhsa_py_array_open(state, object, "indptr", DL_INT, 64, 1, NULL, writable, &a->indptr) != 0) {
        return -1;
    }
    const int64_t length = a->q.shape[2], block = config->query_block;
    const int64_t nq = length / block + (length % block != 0);
    const int64_t factors[3] = {a->q.shape[0], dhsa_head_sets(config, &a->q, &a->k), nq};
    int64_t rows = a->indptr.shape[0] - 1; /* divided by each factor, since a product of them could overflow */
    for (int i = 0; i < 3; i++) {
        if (factors[i] < 1 || rows % factors[i] != 0) {
            rows = -1;
            break;
        }
        rows /= factors[i];
    }
    if (rows != 1) {
        PyErr_Format(PyExc_ValueError, "indptr: expected B * heads * nq + 1 entries, got %lld",
                     (long long)a->indptr.shape[0]);
        return -1;
    }
    return 0;
}

PyObject *dhsa_py_select_plan(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
    const dhsa_py_state *state = PyModule_GetState(module);
    select_args a;
    PyObject *result = NULL;
    const dhsa_py_config *parsed;
    if (dhsa_py_count("select_plan", nargs, 8) != 0 || (parsed = dhsa_py_config_of(state, args[2])) == NULL ||
        select_args_open(state, args, NULL, &a) != 0) {
        return NULL;
    }
    dhsa_select_config config = parsed->select;
    if (score_scaling(args + 3, &a, &config.score) == 0 && open_indptr(state, args[7], 1, &config.score, &a) == 0) {
        dhsa_error error = {DHSA_OK, ""};
        dhsa_status status;
        Py_BEGIN_ALLOW_THREADS;
        status = dhsa_select_plan(&a.q, &a.k, &config, a.indptr.data, &error);
        Py_END_ALLOW_THREADS;
        result = dhsa_py_result(status, &error);
    }
    select_args_release(&a);
    return result;
}

PyObject *dhsa_py_select(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
    const dhsa_py_state *state = PyModule_GetState(module);
    select_args a;
    int threads = 0;
    PyObject *result = NULL;
    const dhsa_py_config *parsed;
    if (dhsa_py_count("select", nargs, 11) != 0 || (parsed = dhsa_py_config_of(state, args[3])) == NULL ||
        dhsa_py_threads(args[10], &threads) != 0 ||
        select_args_open(state, args, args[2] == Py_None ? NULL : args[2], &a) != 0) {
        return NULL;
    }
    dhsa_select_config config = parsed->select;
    if (score_scaling(args + 4, &a, &config.score) == 0 && open_indptr(state, args[8], 1, &config.score, &a) == 0) {
        int64_t *indptr = a.indptr.data;
        const int64_t total[1] = {indptr[a.indptr.shape[0] - 1]};
        if (dhsa_py_array_open(state, args[9], "indices", DL_INT, 32, 1, total, 1, &a.output) == 0) {
            dhsa_error error = {DHSA_OK, ""};
            dhsa_status status;
            Py_BEGIN_ALLOW_THREADS;
            status = dhsa_select(&a.q, &a.k, a.boundaries.data, a.boundaries.data ? a.boundaries.shape[1] : 0, &config,
                                 indptr, a.output.data, threads, &error);
            Py_END_ALLOW_THREADS;
            result = dhsa_py_result(status, &error);
        }
    }
    select_args_release(&a);
    return result;
}

/* ---- selection by means that other processes computed ------------------------------------------------------------ */

/* The arrays of dhsa_means: mean, scale, spread or None, state. */
typedef struct {
    dhsa_py_view mean, scale, spread, state;
    dhsa_means means;
} means_args;

static void means_args_release(means_args *a)
{
    dhsa_py_view_release(&a->mean);
    dhsa_py_view_release(&a->scale);
    dhsa_py_view_release(&a->spread);
    dhsa_py_view_release(&a->state);
}

/* Opens a tuple of arrays; None leaves everything NULL. */
static int means_args_open(const dhsa_py_state *state, PyObject *tuple, const char *name, int writable, means_args *a)
{
    memset(a, 0, sizeof *a);
    if (tuple == Py_None) {
        return 0;
    }
    if (!PyTuple_Check(tuple) || PyTuple_Size(tuple) != 4) {
        PyErr_Format(PyExc_TypeError, "%s: expected a tuple (mean, scale, spread or None, state)", name);
        return -1;
    }
    PyObject *const spread = PyTuple_GetItem(tuple, 2);
    if (dhsa_py_array_open(state, PyTuple_GetItem(tuple, 0), name, DL_INT, 8, 3, NULL, writable, &a->mean) == 0 &&
        dhsa_py_array_open(state, PyTuple_GetItem(tuple, 1), name, DL_FLOAT, 32, 2, a->mean.shape, writable,
                           &a->scale) == 0 &&
        (spread == Py_None ||
         dhsa_py_array_open(state, spread, name, DL_FLOAT, 32, 2, a->mean.shape, writable, &a->spread) == 0) &&
        dhsa_py_array_open(state, PyTuple_GetItem(tuple, 3), name, DL_INT, 8, 2, a->mean.shape, writable, &a->state) ==
            0) {
        a->means = (dhsa_means){.kv_heads = a->mean.shape[0],
                                .chunks = a->mean.shape[1],
                                .dim = a->mean.shape[2],
                                .mean = a->mean.data,
                                .scale = a->scale.data,
                                .spread = a->spread.data,
                                .state = a->state.data};
        return 0;
    }
    means_args_release(a);
    return -1;
}

PyObject *dhsa_py_chunk_means(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
    const dhsa_py_state *state = PyModule_GetState(module);
    dhsa_py_view k_view, edges;
    dhsa_tensor k;
    means_args means;
    int threads = 0;
    PyObject *result = NULL;
    memset(&edges, 0, sizeof edges);
    if (dhsa_py_count("chunk_means", nargs, 4) != 0 || dhsa_py_threads(args[3], &threads) != 0 ||
        dhsa_py_input(state, args[0], "k", &k_view, &k) != 0) {
        return NULL;
    }
    if (means_args_open(state, args[2], "means", 1, &means) == 0) {
        const int64_t shape[1] = {means.means.chunks + 1};
        if (dhsa_py_array_open(state, args[1], "edges", DL_INT, 32, 1, shape, 0, &edges) == 0) {
            dhsa_error error = {DHSA_OK, ""};
            dhsa_status status;
            Py_BEGIN_ALLOW_THREADS;
            status = dhsa_chunk_means(&k, edges.data, &means.means, threads, &error);
            Py_END_ALLOW_THREADS;
            result = dhsa_py_result(status, &error);
        }
        means_args_release(&means);
    }
    dhsa_py_view_release(&edges);
    dhsa_py_view_release(&k_view);
    return result;
}

PyObject *dhsa_py_select_blocks(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
    const dhsa_py_state *state = PyModule_GetState(module);
    select_args a;
    means_args chunks, groups;
    int threads = 0;
    int64_t first = 0, blocks = 0;
    PyObject *result = NULL;
    const dhsa_py_config *parsed;
    if (dhsa_py_count("select_blocks", nargs, 14) != 0 || (parsed = dhsa_py_config_of(state, args[5])) == NULL ||
        dhsa_py_threads(args[13], &threads) != 0 || dhsa_py_int(args[9], "first", 0, INT32_MAX, &first) != 0 ||
        dhsa_py_int(args[10], "blocks", 1, INT32_MAX, &blocks) != 0 ||
        select_args_open(state, args, args[2] == Py_None ? NULL : args[2], &a) != 0) {
        return NULL;
    }
    dhsa_select_config config = parsed->select;
    const int64_t head_dim = a.q.shape[3];
    if (means_args_open(state, args[3], "chunks", 0, &chunks) == 0) {
        if (means_args_open(state, args[4], "groups", 0, &groups) == 0) {
            const int64_t shape[1] = {dhsa_head_sets(&config.score, &a.q, &a.k) * blocks + 1};
            if (dhsa_py_scaling(args[6], args[7], args[8], head_dim, &config.score.scale, &config.score.softcap,
                                &config.score.window) == 0 &&
                dhsa_py_array_open(state, args[11], "indptr", DL_INT, 64, 1, shape, 1, &a.indptr) == 0 &&
                dhsa_py_array_open(state, args[12], "indices", DL_INT, 32, 1, NULL, 1, &a.output) == 0) {
                dhsa_error error = {DHSA_OK, ""};
                dhsa_status status;
                Py_BEGIN_ALLOW_THREADS;
                status = dhsa_select_blocks(
                    &a.q, &a.k, a.boundaries.data, a.boundaries.data ? a.boundaries.shape[1] : 0,
                    chunks.means.mean ? &chunks.means : NULL, groups.means.mean ? &groups.means : NULL, &config, first,
                    blocks, a.indptr.data, a.output.data, a.output.shape[0], threads, &error);
                Py_END_ALLOW_THREADS;
                result = dhsa_py_result(status, &error);
            }
            means_args_release(&groups);
        }
        means_args_release(&chunks);
    }
    select_args_release(&a);
    return result;
}

/* ---- machine --------------------------------------------------------------------------------------------------- */

PyObject *dhsa_py_isa_set(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
    (void)module;
    if (dhsa_py_count("isa_set", nargs, 1) != 0) {
        return NULL;
    }
    if (!PyUnicode_Check(args[0])) {
        PyErr_SetString(PyExc_TypeError, "name: expected a str");
        return NULL;
    }
    Py_ssize_t bytes;
    const char *name = PyUnicode_AsUTF8AndSize(args[0], &bytes);
    if (name == NULL && !PyErr_ExceptionMatches(PyExc_UnicodeError)) {
        return NULL;
    }
    /* The core reads up to a NUL, and a lone surrogate has no UTF-8 form. No tier has a name with either. */
    if (name == NULL || strlen(name) != (size_t)bytes) {
        PyErr_Clear();
        PyErr_Format(PyExc_ValueError, "isa: %R is not a tier that is compiled in and that this CPU runs", args[0]);
        return NULL;
    }
    dhsa_error error = {DHSA_OK, ""};
    return dhsa_py_result(dhsa_isa_set(name, &error), &error);
}

PyObject *dhsa_py_isa_current(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
    (void)module;
    (void)args;
    return dhsa_py_count("isa_current", nargs, 0) != 0 ? NULL : PyUnicode_FromString(dhsa_isa_current());
}

static PyObject *name_list(const char *(*get)(int))
{
    PyObject *list = PyList_New(0);
    for (int i = 0; list != NULL && get(i) != NULL; i++) {
        PyObject *name = PyUnicode_FromString(get(i));
        if (name == NULL || PyList_Append(list, name) != 0) {
            Py_CLEAR(list);
        }
        Py_XDECREF(name);
    }
    return list;
}

#if defined(__clang__)
#define COMPILER "clang " __clang_version__
#elif defined(__GNUC__)
#define COMPILER "gcc " __VERSION__
#else
#define COMPILER "unknown"
#endif

/* Returns a list of the names whose bits are set. */
static PyObject *names_of_bits(int bits, const char *const *names, int n)
{
    PyObject *list = PyList_New(0);
    for (int i = 0; list != NULL && i < n; i++) {
        PyObject *name = bits >> i & 1 ? PyUnicode_FromString(names[i]) : NULL;
        if (PyErr_Occurred() || (name != NULL && PyList_Append(list, name) != 0)) {
            Py_CLEAR(list);
        }
        Py_XDECREF(name);
    }
    return list;
}

#ifdef Py_LIMITED_API
#define LIMITED_API "3.11"
#else
#define LIMITED_API NULL
#endif

PyObject *dhsa_py_build_info(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
    (void)module;
    (void)args;
    if (dhsa_py_count("build_info", nargs, 0) != 0) {
        return NULL;
    }
    static const char *const dtypes[] = {[DHSA_F32] = "float32", [DHSA_F16] = "float16", [DHSA_BF16] = "bfloat16"};
    static const char *const precisions[] = {
        [DHSA_PRECISION_HIGHEST] = "highest", [DHSA_PRECISION_HIGH] = "high", [DHSA_PRECISION_MEDIUM] = "medium"};
    PyObject *compiled = name_list(dhsa_isa_compiled), *detected = name_list(dhsa_isa_detected),
             *products = names_of_bits(dhsa_isa_products(), dtypes, 3),
             *faster = names_of_bits(dhsa_isa_precisions(), precisions, 3);
    PyObject *result = NULL;
    if (compiled != NULL && detected != NULL && products != NULL && faster != NULL) {
        result = Py_BuildValue("{s:s,s:l,s:z,s:O,s:O,s:s,s:O,s:O,s:i}", "compiler", COMPILER, "c_standard",
                               (long)__STDC_VERSION__, "limited_api", LIMITED_API, "isa_compiled", compiled,
                               "isa_detected", detected, "isa", dhsa_isa_current(), "products", products,
                               "float32_precisions", faster, "cpu_count", dhsa_cpu_count());
    }
    Py_XDECREF(compiled);
    Py_XDECREF(detected);
    Py_XDECREF(products);
    Py_XDECREF(faster);
    return result;
}

PyObject *dhsa_py_cpu_count(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
    (void)module;
    (void)args;
    return dhsa_py_count("cpu_count", nargs, 0) != 0 ? NULL : PyLong_FromLong(dhsa_cpu_count());
}

PyObject *dhsa_py_fma_peak(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
    (void)module;
    int threads = 0;
    if (dhsa_py_count("fma_peak", nargs, 1) != 0 || dhsa_py_threads(args[0], &threads) != 0) {
        return NULL;
    }
    double peak;
    Py_BEGIN_ALLOW_THREADS;
    peak = dhsa_fma_peak(threads);
    Py_END_ALLOW_THREADS;
    return PyFloat_FromDouble(peak);
}

PyObject *dhsa_py_read_bandwidth(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
    int threads = 0;
    dhsa_py_view view;
    if (dhsa_py_count("read_bandwidth", nargs, 2) != 0 || dhsa_py_threads(args[1], &threads) != 0 ||
        dhsa_py_view_open(PyModule_GetState(module), args[0], "array", &view) != 0) {
        return NULL;
    }
    int64_t bytes = view.dtype.bits / 8; /* of the inner dimensions found to be contiguous, whose memory exists */
    int contiguous = 1;
    for (int i = view.ndim - 1; i >= 0 && contiguous; i--) {
        contiguous = view.shape[i] == 1 || view.stride[i] == bytes / (view.dtype.bits / 8);
        contiguous = contiguous && dhsa_mul(bytes, view.shape[i], &bytes);
    }
    PyObject *result = NULL;
    if (!contiguous || bytes < 4 || (uintptr_t)view.data % 4 != 0) {
        PyErr_SetString(PyExc_ValueError, "array: expected contiguous memory of at least 4 bytes, aligned to 4");
    } else {
        double rate;
        Py_BEGIN_ALLOW_THREADS;
        rate = dhsa_read_bandwidth(view.data, bytes, threads);
        Py_END_ALLOW_THREADS;
        result = PyFloat_FromDouble(rate);
    }
    dhsa_py_view_release(&view);
    return result;
}
