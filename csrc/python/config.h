/* config.h: the type _core.Config: a configuration that has been parsed and checked. */
#ifndef DHSA_PYTHON_CONFIG_H
#define DHSA_PYTHON_CONFIG_H

#include "python/args.h"

typedef struct {
    PyObject_HEAD dhsa_select_config select; /* scale is 1; scale, softcap and window of a layer belong to a call */
    dhsa_boundary_config boundaries;         /* num_chunks is 0; see the next member */
    int64_t num_chunks;                      /* a number, or one of the two constants below */
    dhsa_py_predictor predictor;             /* views of the arrays in weights */
    PyObject *weights;                       /* the tuple of weights; NULL: none */
} dhsa_py_config;

enum { DHSA_PY_CHUNKS_BEST = -1, DHSA_PY_CHUNKS_PAPER = -2 }; /* depends on the length; see dhsa_num_chunks */

/* A new reference to the type. */
PyObject *dhsa_py_config_type(PyObject *module);
/* The argument `config`, or NULL with an exception if it is of another type. */
const dhsa_py_config *dhsa_py_config_of(const dhsa_py_state *state, PyObject *object);
/* How `length` keys are cut, with num_chunks set. */
dhsa_boundary_config dhsa_py_config_cuts(const dhsa_py_config *config, int64_t length);

#endif
