/* tensor.c: converts objects with the buffer protocol or DLPack to dhsa_py_view and dhsa_tensor. What this library
 * cannot read (device, dtype, lanes, rank, strides) is refused with a message that names the argument. Elements are
 * not read here. */
#include "python/tensor.h"

#include <stdio.h>
#include <string.h>

static int is_little_endian(void)
{
    const uint16_t one = 1;
    unsigned char first;
    memcpy(&first, &one, 1);
    return first == 1;
}

/* "float32", "bfloat16", "int64", ...: for messages. */
static const char *dtype_name(dl_dtype dtype, char *buffer, size_t size)
{
    static const char *const names[] = {"int", "uint", "float", "opaque", "bfloat", "complex"};
    if (dtype.code == DL_BOOL) {
        return "bool";
    }
    if (dtype.code >= sizeof names / sizeof *names) {
        snprintf(buffer, size, "an unknown dtype (DLPack code %u, %u bits)", (unsigned)dtype.code,
                 (unsigned)dtype.bits);
    } else if (dtype.lanes != 1) {
        snprintf(buffer, size, "%s%u with %u lanes", names[dtype.code], (unsigned)dtype.bits, (unsigned)dtype.lanes);
    } else {
        snprintf(buffer, size, "%s%u", names[dtype.code], (unsigned)dtype.bits);
    }
    return buffer;
}

/* Converts a format of the struct module, one character in native byte order, to a dtype. Returns 0 if the dtype is
 * not supported. */
static int parse_format(const char *format, Py_ssize_t itemsize, dl_dtype *dtype)
{
    if (format == NULL) {
        format = "B";
    }
    switch (*format) {
    case '@':
    case '=':
        format++;
        break;
    case '<':
        if (!is_little_endian() && itemsize > 1) return 0;
        format++;
        break;
    case '>':
    case '!':
        if (is_little_endian() && itemsize > 1) return 0;
        format++;
        break;
    default:
        break;
    }
    if (*format == '\0' || format[1] != '\0' || itemsize < 1 || itemsize > 16) {
        return 0;
    }
    if (strchr("efdg", *format)) {
        dtype->code = DL_FLOAT;
    } else if (strchr("bhilqn", *format)) {
        dtype->code = DL_INT;
    } else if (strchr("BHILQN", *format)) {
        dtype->code = DL_UINT;
    } else if (*format == '?') {
        dtype->code = DL_BOOL;
    } else {
        return 0;
    }
    dtype->bits = (uint8_t)(8 * itemsize);
    dtype->lanes = 1;
    return 1;
}

static int check_ndim(int ndim, const char *name)
{
    if (ndim < 0 || ndim > DHSA_PY_MAX_NDIM) {
        PyErr_Format(PyExc_ValueError, "%s: has %d dimensions, more than any argument may have", name, ndim);
        return -1;
    }
    return 0;
}

/* Replaces the pending exception of a failed export by one that names the argument. Interrupts are not replaced. */
static void rename_export_error(const char *name, const char *how)
{
    if (!PyErr_ExceptionMatches(PyExc_Exception)) {
        return;
    }
    PyObject *type, *value, *traceback;
    PyErr_Fetch(&type, &value, &traceback);
    PyErr_Format(PyErr_GivenExceptionMatches(type, PyExc_MemoryError) ? PyExc_MemoryError : PyExc_ValueError,
                 "%s: cannot be read through %s: %S", name, how, value ? value : type);
    Py_XDECREF(type);
    Py_XDECREF(value);
    Py_XDECREF(traceback);
}

static int open_buffer(PyObject *object, const char *name, dhsa_py_view *view)
{
    if (PyObject_GetBuffer(object, &view->buffer, PyBUF_RECORDS_RO) != 0) {
        rename_export_error(name, "the buffer protocol");
        return -1;
    }
    view->has_buffer = 1;
    const Py_buffer *b = &view->buffer;
    if (check_ndim(b->ndim, name) != 0) {
        return -1;
    }
    if (!parse_format(b->format, b->itemsize, &view->dtype)) {
        PyErr_Format(PyExc_TypeError, "%s: unsupported dtype (buffer format '%s'); byte order must be the machine's",
                     name, b->format ? b->format : "B");
        return -1;
    }
    view->data = b->buf;
    view->readonly = b->readonly;
    view->ndim = b->ndim;
    int64_t contiguous = 1;
    for (int i = b->ndim - 1; i >= 0; i--) {
        view->shape[i] = b->shape[i];
        if (b->strides == NULL) { /* ctypes gives no strides for C-contiguous memory */
            view->stride[i] = contiguous;
            if (b->shape[i] > 0) {
                contiguous = contiguous > INT64_MAX / b->shape[i] ? INT64_MAX : contiguous * b->shape[i];
            }
            continue;
        }
        /* A stride of a dimension of size 0 or 1 is never used, and NumPy may have any value there. */
        if (b->shape[i] > 1 && b->strides[i] % b->itemsize != 0) {
            PyErr_Format(PyExc_ValueError, "%s: stride %zd of dimension %d is not a multiple of the element size %zd",
                         name, b->strides[i], i, b->itemsize);
            return -1;
        }
        view->stride[i] = b->strides[i] / b->itemsize;
    }
    return 0;
}

static int read_dl_tensor(const dl_tensor *t, const char *name, dhsa_py_view *view)
{
    if (t->device.type != DL_CPU) {
        PyErr_Format(PyExc_ValueError, "%s: expected a tensor on the CPU, got DLPack device type %d", name,
                     (int)t->device.type);
        return -1;
    }
    if (check_ndim(t->ndim, name) != 0) {
        return -1;
    }
    view->data = t->data ? (char *)t->data + t->byte_offset : NULL;
    view->dtype = t->dtype;
    view->ndim = t->ndim;
    int64_t contiguous = 1;
    for (int i = t->ndim - 1; i >= 0; i--) {
        view->shape[i] = t->shape[i];
        view->stride[i] = t->strides ? t->strides[i] : contiguous;
        if (!t->strides && t->shape[i] > 0) {
            contiguous = contiguous > INT64_MAX / t->shape[i] ? INT64_MAX : contiguous * t->shape[i];
        }
    }
    return 0;
}

static int read_versioned(const dl_managed_versioned *managed, const char *name, dhsa_py_view *view)
{
    if (managed->version.major != 1) {
        PyErr_Format(PyExc_ValueError, "%s: has DLPack version %u, expected 1", name, (unsigned)managed->version.major);
        return -1;
    }
    view->readonly = (managed->flags & DL_READ_ONLY) != 0;
    return read_dl_tensor(&managed->tensor, name, view);
}

/* The faster way, through the C exchange interface. Returns 1 if opened, 0 if the type does not offer it, -1 on
 * error. */
static int open_exchange(const dhsa_py_state *state, PyObject *object, const char *name, dhsa_py_view *view)
{
    PyObject *capsule = PyObject_GetAttr((PyObject *)Py_TYPE(object), state->name_exchange);
    if (capsule == NULL) {
        if (!PyErr_ExceptionMatches(PyExc_AttributeError)) {
            return -1;
        }
        PyErr_Clear();
        return 0;
    }
    const dl_exchange *api = NULL;
    if (PyCapsule_IsValid(capsule, "dlpack_exchange_api")) {
        api = PyCapsule_GetPointer(capsule, "dlpack_exchange_api");
    }
    Py_DECREF(capsule); /* by its definition the interface lives as long as its library */
    while (api != NULL && api->version.major > 1) {
        api = api->previous;
    }
    if (api == NULL || api->version.major != 1 || api->from_object == NULL) {
        return 0;
    }
    if (api->from_object(object, &view->managed) != 0) {
        view->managed = NULL;
        if (!PyErr_Occurred()) {
            PyErr_SetString(PyExc_BufferError, "refused without a reason");
        }
        rename_export_error(name, "DLPack");
        return -1;
    }
    return read_versioned(view->managed, name, view) == 0 ? 1 : -1;
}

static int open_dlpack(const dhsa_py_state *state, PyObject *method, const char *name, dhsa_py_view *view)
{
    PyObject *capsule = PyObject_Call(method, state->no_args, state->versioned_kwargs);
    if (capsule == NULL && PyErr_ExceptionMatches(PyExc_TypeError)) {
        PyErr_Clear(); /* an exporter older than DLPack 1.0 does not accept max_version */
        capsule = PyObject_Call(method, state->no_args, NULL);
    }
    if (capsule == NULL) {
        rename_export_error(name, "DLPack");
        return -1;
    }
    view->capsule = capsule;
    if (PyCapsule_IsValid(capsule, "dltensor_versioned")) {
        return read_versioned(PyCapsule_GetPointer(capsule, "dltensor_versioned"), name, view);
    }
    if (PyCapsule_IsValid(capsule, "dltensor")) {
        const dl_managed *managed = PyCapsule_GetPointer(capsule, "dltensor");
        return read_dl_tensor(&managed->tensor, name, view);
    }
    PyErr_Format(PyExc_TypeError, "%s: __dlpack__() gave no unused DLPack capsule", name);
    return -1;
}

int dhsa_py_view_open(const dhsa_py_state *state, PyObject *object, const char *name, dhsa_py_view *view)
{
    memset(view, 0, sizeof *view);
    int result = open_exchange(state, object, name, view);
    if (result == 0) {
        PyObject *method = NULL;
        if (PyObject_CheckBuffer(object)) {
            result = open_buffer(object, name, view);
            /* Some arrays have a buffer but cannot describe their dtype in it (bfloat16); DLPack can. */
            if (result != 0 && !view->has_buffer && PyErr_ExceptionMatches(PyExc_ValueError)) {
                PyObject *type, *value, *traceback;
                PyErr_Fetch(&type, &value, &traceback); /* no attribute may be read while an exception is set */
                method = PyObject_GetAttr(object, state->name_dlpack);
                if (method == NULL && PyErr_ExceptionMatches(PyExc_AttributeError)) {
                    PyErr_Restore(type, value, traceback); /* it cannot be read in another way; this error says why */
                } else {
                    Py_XDECREF(type);
                    Py_XDECREF(value);
                    Py_XDECREF(traceback);
                    result = method ? open_dlpack(state, method, name, view) : -1;
                }
            }
        } else if ((method = PyObject_GetAttr(object, state->name_dlpack)) != NULL) {
            result = open_dlpack(state, method, name, view);
        } else {
            result = -1;
            if (PyErr_ExceptionMatches(PyExc_AttributeError)) {
                PyErr_Clear();
                PyObject *type = PyObject_GetAttrString((PyObject *)Py_TYPE(object), "__name__");
                if (type != NULL) {
                    PyErr_Format(PyExc_TypeError, "%s: expected an array (NumPy, torch or DLPack), got %S", name, type);
                    Py_DECREF(type);
                }
            }
        }
        Py_XDECREF(method);
    } else {
        result = result == 1 ? 0 : -1;
    }
    int elements = 1;
    for (int i = 0; result == 0 && i < view->ndim; i++) {
        elements &= view->shape[i] != 0;
        if (view->shape[i] < 0) {
            PyErr_Format(PyExc_ValueError, "%s: dimension %d has size %lld", name, i, (long long)view->shape[i]);
            result = -1;
        }
    }
    if (result == 0 && view->data == NULL && elements) {
        PyErr_Format(PyExc_ValueError, "%s: has no data", name);
        result = -1;
    }
    if (result == 0 && view->dtype.lanes != 1) {
        PyErr_Format(PyExc_TypeError, "%s: expected a dtype of 1 lane, got %d", name, (int)view->dtype.lanes);
        result = -1;
    }
    if (result == 0 && (view->dtype.bits == 0 || view->dtype.bits % 8 != 0)) {
        PyErr_Format(PyExc_TypeError, "%s: expected whole bytes, got a dtype of %d bits", name, (int)view->dtype.bits);
        result = -1;
    }
    int alignment = view->dtype.bits / 8;
    if (result == 0 && (alignment & (alignment - 1)) == 0 && (uintptr_t)view->data % (uintptr_t)alignment != 0) {
        PyErr_Format(PyExc_ValueError, "%s: its memory is not aligned to its elements of %d bytes", name, alignment);
        result = -1;
    }
    if (result != 0) {
        dhsa_py_view_release(view);
    }
    return result;
}

void dhsa_py_view_release(dhsa_py_view *view)
{
    /* Deleters may run Python code, so a pending exception is saved and restored. */
    PyObject *type, *value, *traceback;
    PyErr_Fetch(&type, &value, &traceback);
    if (view->has_buffer) {
        PyBuffer_Release(&view->buffer);
    }
    if (view->managed != NULL && view->managed->deleter != NULL) {
        view->managed->deleter(view->managed);
    }
    Py_XDECREF(view->capsule);
    memset(view, 0, sizeof *view);
    PyErr_Restore(type, value, traceback);
}

int dhsa_py_view_tensor(const dhsa_py_view *view, const char *name, const char *axes, int writable, dhsa_tensor *tensor)
{
    if (view->ndim != 4) {
        PyErr_Format(PyExc_ValueError, "%s: expected 4 dimensions %s, got %d", name, axes, view->ndim);
        return -1;
    }
    if (view->dtype.code == DL_FLOAT && view->dtype.bits == 32) {
        tensor->dtype = DHSA_F32;
    } else if (view->dtype.code == DL_FLOAT && view->dtype.bits == 16) {
        tensor->dtype = DHSA_F16;
    } else if (view->dtype.code == DL_BFLOAT && view->dtype.bits == 16) {
        tensor->dtype = DHSA_BF16;
    } else {
        char buffer[80];
        PyErr_Format(PyExc_TypeError, "%s: expected float32, float16 or bfloat16, got %s", name,
                     dtype_name(view->dtype, buffer, sizeof buffer));
        return -1;
    }
    if (view->shape[3] > 1 && view->stride[3] != 1) {
        PyErr_Format(PyExc_ValueError, "%s: the last dimension must be contiguous (stride 1), got stride %lld", name,
                     (long long)view->stride[3]);
        return -1;
    }
    if (writable && view->readonly) {
        PyErr_Format(PyExc_ValueError, "%s: is read-only", name);
        return -1;
    }
    tensor->data = view->data;
    for (int i = 0; i < 4; i++) {
        tensor->shape[i] = view->shape[i];
        tensor->stride[i] = view->stride[i];
    }
    tensor->stride[3] = 1;
    return 0;
}

int dhsa_py_array_open(const dhsa_py_state *state, PyObject *object, const char *name, int code, int bits, int ndim,
                       const int64_t *shape, int writable, dhsa_py_view *view)
{
    if (dhsa_py_view_open(state, object, name, view) != 0) {
        return -1;
    }
    char have[80], want[80];
    if (view->dtype.code != code || view->dtype.bits != bits) {
        const dl_dtype wanted = {(uint8_t)code, (uint8_t)bits, 1};
        PyErr_Format(PyExc_TypeError, "%s: expected %s, got %s", name, dtype_name(wanted, want, sizeof want),
                     dtype_name(view->dtype, have, sizeof have));
        goto fail;
    }
    if (view->ndim != ndim) {
        PyErr_Format(PyExc_ValueError, "%s: expected %d dimension(s), got %d", name, ndim, view->ndim);
        goto fail;
    }
    int64_t contiguous = 1;
    for (int i = ndim - 1; i >= 0; i--) {
        if (shape != NULL && shape[i] >= 0 && view->shape[i] != shape[i]) {
            PyErr_Format(PyExc_ValueError, "%s: expected size %lld in dimension %d, got %lld", name,
                         (long long)shape[i], i, (long long)view->shape[i]);
            goto fail;
        }
        if (view->shape[i] > 1 && view->stride[i] != contiguous) {
            PyErr_Format(PyExc_ValueError, "%s: must be C-contiguous", name);
            goto fail;
        }
        contiguous *= view->shape[i]; /* the memory exists, so the product fits */
    }
    if (writable && view->readonly) {
        PyErr_Format(PyExc_ValueError, "%s: is read-only", name);
        goto fail;
    }
    return 0;
fail:
    dhsa_py_view_release(view);
    return -1;
}
