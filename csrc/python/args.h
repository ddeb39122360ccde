/* args.h: converts Python numbers, tuples and arrays to the plain structs of dhsa.h. The core checks ranges; only
 * what a conversion would lose (type, overflow, None) is checked here. Functions that return int return 0, or -1
 * with an exception that names the argument. */
#ifndef DHSA_PYTHON_ARGS_H
#define DHSA_PYTHON_ARGS_H

#include "python/tensor.h"

/* Raises TypeError, "name: expected ..., got the type of the object", and returns -1. */
int dhsa_py_wrong_type(const char *name, const char *expected, PyObject *object);
/* Checks that a function was called with exactly `want` positional arguments. */
int dhsa_py_count(const char *function, Py_ssize_t have, Py_ssize_t want);
/* Converts an int, or an object with __index__ that is no bool, with min <= value <= max. */
int dhsa_py_int(PyObject *object, const char *name, int64_t min, int64_t max, int64_t *value);
/* The same, but for None *value is `none`. */
int dhsa_py_optional_int(PyObject *object, const char *name, int64_t min, int64_t max, int64_t none, int64_t *value);
/* Converts a real number that is no bool and not NaN, and is finite unless `infinite`. */
int dhsa_py_double(PyObject *object, const char *name, int infinite, double *value);

/* Converts scale (None: 1 / sqrt(head_dim)), softcap (None: 0) and window (None: 0) of a problem or a score config. */
int dhsa_py_scaling(PyObject *scale, PyObject *softcap, PyObject *window, int64_t head_dim, double *scale_out,
                    double *softcap_out, int64_t *window_out);

int dhsa_py_threads(PyObject *object, int *threads);
/* Opens a tensor "q", "k" or "v" as [B, heads, L, D]. The view must be released. */
int dhsa_py_input(const dhsa_py_state *state, PyObject *object, const char *name, dhsa_py_view *view,
                  dhsa_tensor *tensor);

/* All that one attention call borrows. Open it, use .problem without the GIL, and release it. */
typedef struct {
    dhsa_problem problem;
    dhsa_py_view q, k, v, out, lse, key_ranges, sinks;
    int64_t skip_counts[2];
} dhsa_py_problem;

/* args: q, k, v, out, lse | None, scale, softcap, window, causal, key_ranges | None, num_threads, skip | None, sinks |
 * None, precision. */
int dhsa_py_problem_open(const dhsa_py_state *state, PyObject *const *args, dhsa_py_problem *problem);
void dhsa_py_problem_release(dhsa_py_problem *problem);

/* The weights of a boundary network, opened from a tuple: (heads, window, in_proj_weight, ..., mlp2_bias) or, for
 * the compact network, (window, project_weight, ..., head2_bias); see predictor.py. Either attention or compact
 * points into this struct, and the other is NULL. */
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

/* Raises the exception of a dhsa_error and returns NULL. */
PyObject *dhsa_py_raise(const dhsa_error *error);
/* The same with an exception of `type`. */
PyObject *dhsa_py_raise_as(PyObject *type, const dhsa_error *error);
/* Returns None if a call succeeded. Returns NULL with an exception if it failed or an interrupt is pending. */
PyObject *dhsa_py_result(dhsa_status status, const dhsa_error *error);

#endif
