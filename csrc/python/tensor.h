/* tensor.h: views of arrays that come from Python. A view borrows memory from an object with the buffer protocol or
 * DLPack, without a copy, and keeps the owner of the memory alive until it is released. core/problem.c checks
 * whether shapes agree with each other. */
#ifndef DHSA_PYTHON_TENSOR_H
#define DHSA_PYTHON_TENSOR_H

#include <Python.h>

#include "dhsa.h"
#include "python/dlpack.h"

/* The state of the module: names and arguments that every call needs, created once, and types. */
typedef struct {
    PyObject *name_dlpack;      /* "__dlpack__" */
    PyObject *name_exchange;    /* "__dlpack_c_exchange_api__" */
    PyObject *no_args;          /* () */
    PyObject *versioned_kwargs; /* {"max_version": (1, 0)} */
    PyObject *key_index_type;   /* _core.Past */
    PyObject *config_type;      /* _core.Config */
} dhsa_py_state;

#define DHSA_PY_MAX_NDIM 8

typedef struct {
    PyObject *capsule;             /* DLPack through __dlpack__: it stays unused, so that its own destructor frees it */
    dl_managed_versioned *managed; /* DLPack through the C exchange interface */
    int has_buffer;
    Py_buffer buffer;

    void *data;
    dl_dtype dtype;
    int readonly;
    int ndim;
    int64_t shape[DHSA_PY_MAX_NDIM], stride[DHSA_PY_MAX_NDIM]; /* strides in elements */
} dhsa_py_view;

/* Functions that return int return 0, or -1 with a Python exception whose message begins with `name`, the argument. */

/* Opens a view. On failure there is nothing to release. A zeroed view may be released. */
int dhsa_py_view_open(const dhsa_py_state *state, PyObject *object, const char *name, dhsa_py_view *view);
void dhsa_py_view_release(dhsa_py_view *view);

/* Converts a view to one of the tensors q, k, v and out: 4 dimensions (`axes` names them in messages), fp32, fp16 or
 * bf16, last stride 1. */
int dhsa_py_view_tensor(const dhsa_py_view *view, const char *name, const char *axes, int writable,
                        dhsa_tensor *tensor);

/* Opens a view and checks that it is a C-contiguous array of `ndim` dimensions with the dtype of `code` and `bits`.
 * shape[i] < 0 or shape NULL allows any size. */
int dhsa_py_array_open(const dhsa_py_state *state, PyObject *object, const char *name, int code, int bits, int ndim,
                       const int64_t *shape, int writable, dhsa_py_view *view);

/* A new reference to the type _core.Buffer; see buffer.c. */
PyObject *dhsa_py_buffer_type(PyObject *module);

#endif
