/* tensor.h: arrays on their way in from Python. A view borrows memory from any object with the buffer protocol or DLPack,
 * without a copy, and keeps its owner alive until released. Not here: what shapes must be of each other (core/problem.c). */
#ifndef DHSA_PYTHON_TENSOR_H
#define DHSA_PYTHON_TENSOR_H

#include <Python.h>

#include "dhsa.h"
#include "python/dlpack.h"

/* Per-module state: the names looked up on every call, interned once. */
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
    PyObject *capsule;             /* DLPack through __dlpack__: never consumed, so its own destructor frees it */
    dl_managed_versioned *managed; /* DLPack through the C exchange interface */
    int has_buffer;
    Py_buffer buffer;

    void *data;
    dl_dtype dtype;
    int readonly;
    int ndim;
    int64_t shape[DHSA_PY_MAX_NDIM], stride[DHSA_PY_MAX_NDIM]; /* strides in elements */
} dhsa_py_view;

/* All int functions: 0, or -1 with a Python exception set whose message begins with `name`, the argument. */

/* Opens a view; on failure nothing is held. A zeroed view may be released. */
int dhsa_py_view_open(const dhsa_py_state *state, PyObject *object, const char *name, dhsa_py_view *view);
void dhsa_py_view_release(dhsa_py_view *view);

/* The view as one of the tensors q, k, v, out: 4 dimensions (`axes` names them in messages), fp32 / fp16 / bf16, last stride 1. */
int dhsa_py_view_tensor(const dhsa_py_view *view, const char *name, const char *axes, int writable, dhsa_tensor *tensor);

/* Opens a view and demands a C-contiguous array of `ndim` dimensions and of one dtype; shape[i] < 0 allows any size. */
int dhsa_py_array_open(const dhsa_py_state *state, PyObject *object, const char *name, int code, int bits, int ndim,
                       const int64_t *shape, int writable, dhsa_py_view *view);

/* The type _core.Buffer, made for this module; see buffer.c. */
PyObject *dhsa_py_buffer_type(PyObject *module);

#endif
