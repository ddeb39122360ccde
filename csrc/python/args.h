/* args.h: Python numbers, tuples and arrays to the plain structs of dhsa.h. Ranges that the C core checks itself are left to it;
 * here only what conversion would lose (type, overflow, None). Functions return 0, or -1 with an exception naming the argument. */
#ifndef DHSA_PYTHON_ARGS_H
#define DHSA_PYTHON_ARGS_H

#include "python/tensor.h"

/* Raises TypeError, "name: expected ..., got the object's type", and returns -1. */
int dhsa_py_wrong_type(const char *name, const char *expected, PyObject *object);
/* Exactly `want` positional arguments. */
int dhsa_py_count(const char *function, Py_ssize_t have, Py_ssize_t want);
/* An int by __index__, no bool, min <= value <= max. */
int dhsa_py_int(PyObject *object, const char *name, int64_t min, int64_t max, int64_t *value);
/* The same with None allowed, which gives `none`. */
int dhsa_py_optional_int(PyObject *object, const char *name, int64_t min, int64_t max, int64_t none, int64_t *value);
/* A real number (no bool); finite unless `infinite`; never NaN. */
int dhsa_py_double(PyObject *object, const char *name, int infinite, double *value);

/* scale (None: 1 / sqrt(head_dim)), softcap (None: 0) and window (None: 0) of a problem or a score config. */
int dhsa_py_scaling(PyObject *scale, PyObject *softcap, PyObject *window, int64_t head_dim, double *scale_out, double *softcap_out,
                    int64_t *window_out);

int dhsa_py_threads(PyObject *object, int *threads);
/* A tensor "q", "k" or "v" as [B, heads, L, D]; the view must be released. */
int dhsa_py_input(const dhsa_py_state *state, PyObject *object, const char *name, dhsa_py_view *view, dhsa_tensor *tensor);

/* Everything one attention call borrows. Zero it, open it, use .problem without the GIL, release it. */
typedef struct {
    dhsa_problem problem;
    dhsa_py_view q, k, v, out, lse, key_ranges;
    int64_t skip_counts[2];
} dhsa_py_problem;

/* args: q, k, v, out, lse | None, scale, softcap, window, causal, key_ranges | None, num_threads, skip | None. */
int dhsa_py_problem_open(const dhsa_py_state *state, PyObject *const *args, dhsa_py_problem *problem);
void dhsa_py_problem_release(dhsa_py_problem *problem);

/* The weights of a boundary network; from (heads, window, in_proj_weight, ..., mlp2_bias) or, compact, (window, project_weight,
 * ..., head2_bias), see predictor.py. One of attention and compact points here, the other is NULL. */
#define DHSA_PY_PREDICTOR_ARRAYS 11
typedef struct {
    const dhsa_predictor *attention;
    const dhsa_compact *compact;
    dhsa_predictor predictor;
    dhsa_compact small;
    dhsa_py_view arrays[DHSA_PY_PREDICTOR_ARRAYS];
} dhsa_py_predictor;

int dhsa_py_predictor_open(const dhsa_py_state *state, PyObject *tuple, dhsa_py_predictor *predictor);
void dhsa_py_predictor_release(dhsa_py_predictor *predictor);

/* Raises what a dhsa_error says, and returns NULL. */
PyObject *dhsa_py_raise(const dhsa_error *error);
/* The same as an exception of `type`. */
PyObject *dhsa_py_raise_as(PyObject *type, const dhsa_error *error);
/* None after a good call, NULL after a bad one or a pending interrupt. */
PyObject *dhsa_py_result(dhsa_status status, const dhsa_error *error);

#endif
