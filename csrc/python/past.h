/* past.h: the type _core.Past. */
#ifndef DHSA_PYTHON_PAST_H
#define DHSA_PYTHON_PAST_H

#include <Python.h>

#include "python/tensor.h"

/* A new reference to the type. */
PyObject *dhsa_py_past_type(PyObject *module);

/* The pasts of a tuple, taken for one call: each is busy until dhsa_py_pasts_release. */
typedef struct {
    dhsa_past **pasts; /* NULL: None was given */
    Py_ssize_t count;
    PyObject *tuple;
} dhsa_py_pasts;

/* A tuple of `want` Past objects, or None. Returns 0, or -1 with an exception. */
int dhsa_py_pasts_open(const dhsa_py_state *state, PyObject *object, int64_t want, dhsa_py_pasts *pasts);
void dhsa_py_pasts_release(dhsa_py_pasts *pasts);

#endif
