/* config.h: the type _core.Config: a configuration that has been parsed and checked. */
#ifndef DHSA_PYTHON_CONFIG_H
#define DHSA_PYTHON_CONFIG_H

#include "python/args.h"

typedef struct {
    PyObject_HEAD dhsa_select_config select; /* scale 1; the layer's scale, softcap and window belong to a call */
    dhsa_boundary_config boundaries;         /* num_chunks 0, see below */
    int64_t num_chunks;                      /* a number, or one of the two below */
    dhsa_py_predictor predictor;             /* borrows from weights */
    PyObject *weights;                       /* the tuple, NULL: none */
} dhsa_py_config;

enum { DHSA_PY_CHUNKS_BEST = -1, DHSA_PY_CHUNKS_PAPER = -2 }; /* by length, as dhsa_num_chunks says */

/* A new reference to the type. */
PyObject *dhsa_py_config_type(PyObject *module);
/* The argument `config`; NULL, with an exception, if it is of another type. */
const dhsa_py_config *dhsa_py_config_of(const dhsa_py_state *state, PyObject *object);
/* How `length` keys are cut. */
dhsa_boundary_config dhsa_py_config_cuts(const dhsa_py_config *config, int64_t length);

#endif
