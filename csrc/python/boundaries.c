/* boundaries.c: the functions of dhsa._core that cut keys into chunks, and those that compute labels for boundary
 * predictors. All others are in entries.c. */
#include <string.h>

#include "python/config.h"
#include "python/entries.h"

PyObject *dhsa_py_similarity_scores(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
    const dhsa_py_state *state = PyModule_GetState(module);
    dhsa_py_view k, scores;
    dhsa_tensor tensor;
    int64_t window = 0;
    int threads = 0;
    PyObject *result = NULL;
    memset(&scores, 0, sizeof scores);
    memset(&k, 0, sizeof k);
    if (dhsa_py_count("similarity_scores", nargs, 4) != 0 || dhsa_py_input(state, args[0], "k", &k, &tensor) != 0 ||
        dhsa_py_int(args[1], "window", 1, INT64_MAX, &window) != 0 || dhsa_py_threads(args[3], &threads) != 0) {
        goto done;
    }
    const int64_t shape[2] = {tensor.shape[0], tensor.shape[2]};
    if (dhsa_py_array_open(state, args[2], "scores", DL_FLOAT, 32, 2, shape, 1, &scores) == 0) {
        dhsa_error error = {DHSA_OK, ""};
        dhsa_status status;
        Py_BEGIN_ALLOW_THREADS;
        status = dhsa_similarity_scores(&tensor, window, scores.data, threads, &error);
        Py_END_ALLOW_THREADS;
        result = dhsa_py_result(status, &error);
    }
done:
    dhsa_py_view_release(&k);
    dhsa_py_view_release(&scores);
    return result;
}

PyObject *dhsa_py_predictor_logits(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
    const dhsa_py_state *state = PyModule_GetState(module);
    dhsa_py_predictor predictor;
    dhsa_py_view k, logits;
    dhsa_tensor tensor;
    int threads = 0;
    PyObject *result = NULL;
    memset(&k, 0, sizeof k);
    memset(&logits, 0, sizeof logits);
    if (dhsa_py_count("predictor_logits", nargs, 4) != 0 || dhsa_py_predictor_open(state, args[0], &predictor) != 0) {
        return NULL;
    }
    if (dhsa_py_input(state, args[1], "k", &k, &tensor) == 0 && dhsa_py_threads(args[3], &threads) == 0) {
        const int64_t shape[2] = {tensor.shape[0], tensor.shape[2]};
        if (dhsa_py_array_open(state, args[2], "logits", DL_FLOAT, 32, 2, shape, 1, &logits) == 0) {
            dhsa_error error = {DHSA_OK, ""};
            dhsa_status status;
            Py_BEGIN_ALLOW_THREADS;
            status = predictor.compact != NULL
                         ? dhsa_compact_logits(predictor.compact, &tensor, logits.data, threads, &error)
                         : dhsa_predictor_logits(predictor.attention, &tensor, logits.data, threads, &error);
            Py_END_ALLOW_THREADS;
            result = dhsa_py_result(status, &error);
        }
    }
    dhsa_py_view_release(&k);
    dhsa_py_view_release(&logits);
    dhsa_py_predictor_release(&predictor);
    return result;
}

/* Returns the number of entries written to `boundaries`. */
PyObject *dhsa_py_pick_boundaries(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
    const dhsa_py_state *state = PyModule_GetState(module);
    dhsa_py_view scores, boundaries;
    int64_t n = 0, nms = 0, instruction = 0, count = 0;
    double theta = 0.0;
    PyObject *result = NULL;
    memset(&scores, 0, sizeof scores);
    memset(&boundaries, 0, sizeof boundaries);
    if (dhsa_py_count("pick_boundaries", nargs, 6) != 0 || dhsa_py_int(args[1], "n", 0, INT64_MAX, &n) != 0 ||
        dhsa_py_double(args[2], "theta", 1, &theta) != 0 || dhsa_py_int(args[3], "nms", 0, INT64_MAX, &nms) != 0 ||
        dhsa_py_optional_int(args[4], "instruction", 1, INT64_MAX, 0, &instruction) != 0 ||
        dhsa_py_array_open(state, args[0], "scores", DL_FLOAT, 32, 1, NULL, 0, &scores) != 0) {
        return NULL;
    }
    const int64_t length = scores.shape[0];
    const int64_t room[1] = {(n < length ? n : length) + 3};
    if (dhsa_py_array_open(state, args[5], "boundaries", DL_INT, 32, 1, room, 1, &boundaries) == 0) {
        dhsa_error error = {DHSA_OK, ""};
        dhsa_status status;
        Py_BEGIN_ALLOW_THREADS;
        status = dhsa_pick_boundaries(scores.data, length, n, theta, nms, instruction, boundaries.data, &count, &error);
        Py_END_ALLOW_THREADS;
        result = dhsa_py_result(status, &error);
        if (result != NULL) {
            Py_DECREF(result);
            result = PyLong_FromLongLong(count);
        }
    }
    dhsa_py_view_release(&scores);
    dhsa_py_view_release(&boundaries);
    return result;
}

PyObject *dhsa_py_boundaries_capacity(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
    int64_t length = 0;
    if (dhsa_py_count("boundaries_capacity", nargs, 2) != 0 ||
        dhsa_py_int(args[1], "length", 1, INT32_MAX, &length) != 0) {
        return NULL;
    }
    const dhsa_py_config *config = dhsa_py_config_of(PyModule_GetState(module), args[0]);
    if (config == NULL) {
        return NULL;
    }
    const dhsa_boundary_config cuts = dhsa_py_config_cuts(config, length);
    return PyLong_FromLongLong(dhsa_boundaries_capacity(&cuts, length));
}

PyObject *dhsa_py_boundaries(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
    const dhsa_py_state *state = PyModule_GetState(module);
    dhsa_py_view k, boundaries, counts;
    dhsa_tensor tensor;
    int threads = 0;
    PyObject *result = NULL;
    memset(&k, 0, sizeof k);
    memset(&boundaries, 0, sizeof boundaries);
    memset(&counts, 0, sizeof counts);
    if (dhsa_py_count("boundaries", nargs, 5) != 0) {
        return NULL;
    }
    const dhsa_py_config *config = dhsa_py_config_of(state, args[1]);
    if (config == NULL) {
        return NULL;
    }
    if (dhsa_py_input(state, args[0], "k", &k, &tensor) == 0 && dhsa_py_threads(args[4], &threads) == 0) {
        const int64_t shape[2] = {tensor.shape[0], -1};
        if (dhsa_py_array_open(state, args[2], "boundaries", DL_INT, 32, 2, shape, 1, &boundaries) == 0 &&
            dhsa_py_array_open(state, args[3], "counts", DL_INT, 64, 1, shape, 1, &counts) == 0) {
            const dhsa_boundary_config cuts = dhsa_py_config_cuts(config, tensor.shape[2]);
            dhsa_error error = {DHSA_OK, ""};
            dhsa_status status;
            Py_BEGIN_ALLOW_THREADS;
            status =
                dhsa_boundaries(&tensor, &cuts, boundaries.data, boundaries.shape[1], counts.data, threads, &error);
            Py_END_ALLOW_THREADS;
            result = dhsa_py_result(status, &error);
        }
    }
    dhsa_py_view_release(&k);
    dhsa_py_view_release(&boundaries);
    dhsa_py_view_release(&counts);
    return result;
}

PyObject *dhsa_py_attention_ratios(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
    const dhsa_py_state *state = PyModule_GetState(module);
    dhsa_py_view q, k, ratios;
    dhsa_tensor q_tensor, k_tensor;
    int64_t window = 0, sliding = 0;
    double scale = 0, softcap = 0;
    int threads = 0;
    PyObject *result = NULL;
    memset(&q, 0, sizeof q);
    memset(&k, 0, sizeof k);
    memset(&ratios, 0, sizeof ratios);
    if (dhsa_py_count("attention_ratios", nargs, 8) != 0 ||
        dhsa_py_int(args[2], "window", 1, INT64_MAX, &window) != 0 || dhsa_py_threads(args[7], &threads) != 0) {
        return NULL;
    }
    if (dhsa_py_input(state, args[0], "q", &q, &q_tensor) == 0 &&
        dhsa_py_input(state, args[1], "k", &k, &k_tensor) == 0) {
        const int64_t shape[2] = {q_tensor.shape[0], q_tensor.shape[2]};
        int64_t unused = 0;
        if (dhsa_py_scaling(args[4], args[5], Py_None, q_tensor.shape[3], &scale, &softcap, &unused) == 0 &&
            dhsa_py_optional_int(args[3], "sliding_window", 1, INT64_MAX, 0, &sliding) == 0 &&
            dhsa_py_array_open(state, args[6], "ratios", DL_FLOAT, 64, 2, shape, 1, &ratios) == 0) {
            dhsa_error error = {DHSA_OK, ""};
            dhsa_status status;
            Py_BEGIN_ALLOW_THREADS;
            status = dhsa_attention_ratios(&q_tensor, &k_tensor, window, sliding, scale, softcap, ratios.data, threads,
                                           &error);
            Py_END_ALLOW_THREADS;
            result = dhsa_py_result(status, &error);
        }
    }
    dhsa_py_view_release(&q);
    dhsa_py_view_release(&k);
    dhsa_py_view_release(&ratios);
    return result;
}
