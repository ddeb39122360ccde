/* entries.h: the functions of dhsa._core, for the method table in module.c. */
#ifndef DHSA_PYTHON_ENTRIES_H
#define DHSA_PYTHON_ENTRIES_H

#include <Python.h>

#ifdef DHSA_FAULTS
#define DHSA_PY_FAULTS(X) X(faults, "$module, allocation, thread, lasting, /")
#else
#define DHSA_PY_FAULTS(X)
#endif

/* X(name, signature): one function of the module, called with positional arguments only. inspect reads the
 * signature. */
#define DHSA_PY_ENTRIES(X)                                                                                             \
    X(attend_dense, "$module, q, k, v, out, lse, scale, softcap, window, causal, key_ranges, num_threads, skip, "      \
                    "sinks, precision, /")                                                                             \
    X(attend_sparse, "$module, q, k, v, out, lse, scale, softcap, window, causal, key_ranges, num_threads, skip, "     \
                     "sinks, precision, indptr, indices, "                                                             \
                     "shape, query_block, /")                                                                          \
    X(prefill, "$module, q, k, v, out, lse, scale, softcap, window, causal, key_ranges, num_threads, skip, sinks, "    \
               "precision, config, "                                                                                   \
               "boundaries, key_indexes, same, keep_means, /")                                                         \
    X(similarity_scores, "$module, k, window, scores, num_threads, /")                                                 \
    X(predictor_logits, "$module, predictor, k, logits, num_threads, /")                                               \
    X(pick_boundaries, "$module, scores, n, theta, nms, instruction, boundaries, /")                                   \
    X(boundaries_capacity, "$module, config, length, /")                                                               \
    X(boundaries, "$module, k, config, boundaries, counts, num_threads, /")                                            \
    X(attention_ratios, "$module, q, k, window, sliding_window, scale, softcap, ratios, num_threads, /")               \
    X(chunk_scores, "$module, q, k, boundaries, config, scale, softcap, window, causal, scores, num_threads, /")       \
    X(select_plan, "$module, q, k, config, scale, softcap, window, causal, indptr, /")                                 \
    X(select, "$module, q, k, boundaries, config, scale, softcap, window, causal, indptr, indices, num_threads, /")    \
    X(chunk_means, "$module, k, edges, means, num_threads, /")                                                         \
    X(select_blocks,                                                                                                   \
      "$module, q, k, boundaries, chunks, groups, config, scale, softcap, window, first, blocks, indptr, indices, "    \
      "num_threads, /")                                                                                                \
    X(isa_set, "$module, name, /")                                                                                     \
    X(isa_current, "$module")                                                                                          \
    X(build_info, "$module")                                                                                           \
    X(cpu_count, "$module")                                                                                            \
    X(fma_peak, "$module, num_threads, /")                                                                             \
    X(read_bandwidth, "$module, array, num_threads, /")                                                                \
    DHSA_PY_FAULTS(X)

#define DHSA_PY_DECLARE(name, signature)                                                                               \
    PyObject *dhsa_py_##name(PyObject *module, PyObject *const *args, Py_ssize_t nargs);
DHSA_PY_ENTRIES(DHSA_PY_DECLARE)
#undef DHSA_PY_DECLARE

#endif
