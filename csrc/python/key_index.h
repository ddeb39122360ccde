/* key_index.h: the type _core.KeyIndex. */
#ifndef DHSA_PYTHON_KEY_INDEX_H
#define DHSA_PYTHON_KEY_INDEX_H

#include <Python.h>

#include "python/tensor.h"

/* A new reference to the type. */
PyObject *dhsa_py_key_index_type(PyObject *module);

/* The key indexes of a tuple, acquired for one call: each is busy until dhsa_py_key_indexes_release. */
typedef struct {
    dhsa_key_index **items; /* NULL: None was given */
    Py_ssize_t count;
    PyObject *tuple;
} dhsa_py_key_indexes;

/* Opens a tuple of `want` KeyIndex objects, or None. Returns 0, or -1 with an exception. */
int dhsa_py_key_indexes_open(const dhsa_py_state *state, PyObject *object, int64_t want,
                             dhsa_py_key_indexes *key_indexes);
void dhsa_py_key_indexes_release(dhsa_py_key_indexes *key_indexes);

#endif
