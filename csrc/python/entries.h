/* entries.h: the functions of dhsa._core, for the method table in module.c. */
#ifndef DHSA_PYTHON_ENTRIES_H
#define DHSA_PYTHON_ENTRIES_H

#include <Python.h>

/* X(name, signature): one function of the module, called with positional arguments only. */
#define DHSA_PY_ENTRIES(X)                                                                                                         \
    X(attend_dense, "q, k, v, out, lse, scale, softcap, window, causal, key_ranges, num_threads")                                  \
    X(attend_sparse,                                                                                                               \
      "q, k, v, out, lse, scale, softcap, window, causal, key_ranges, num_threads, indptr, indices, shape, query_block")           \
    X(prefill, "q, k, v, out, lse, scale, softcap, window, causal, key_ranges, num_threads, boundary_config, select_config")       \
    X(similarity_scores, "k, window, scores, num_threads")                                                                         \
    X(predictor_logits, "predictor, k, logits, num_threads")                                                                       \
    X(pick_boundaries, "scores, n, theta, nms, instruction, boundaries")                                                           \
    X(boundaries_capacity, "boundary_config, length")                                                                              \
    X(boundaries, "k, boundary_config, boundaries, counts, num_threads")                                                           \
    X(boundary_ratios, "attn, window, sliding_window, ratios, num_threads")                                                        \
    X(chunk_scores, "q, k, boundaries, score_config, scale, softcap, window, scores, num_threads")                                 \
    X(select_plan, "q, k, select_config, scale, softcap, window, indptr")                                                          \
    X(select, "q, k, boundaries, select_config, scale, softcap, window, indptr, indices, num_threads")                             \
    X(isa_set, "name")                                                                                                             \
    X(isa_current, "")                                                                                                             \
    X(build_info, "")                                                                                                              \
    X(cpu_count, "")                                                                                                               \
    X(fma_peak, "num_threads")

#define DHSA_PY_DECLARE(name, signature) PyObject *dhsa_py_##name(PyObject *module, PyObject *const *args, Py_ssize_t nargs);
DHSA_PY_ENTRIES(DHSA_PY_DECLARE)
#undef DHSA_PY_DECLARE

#endif
