/* buffer.c: the type _core.Buffer, plain memory with a shape and a dtype that is exported through DLPack. It carries
 * results to array libraries whose own arrays cannot be written to, and dtypes (bfloat16) that the buffer protocol
 * cannot name. */
#include <stdatomic.h>
#include <string.h>

#include "core/internal.h"
#include "python/args.h"

/* Memory shared by a Buffer and its exports. References are counted here and not by Python, since a consumer may
 * release its tensor on any thread, in any interpreter, without the GIL. */
typedef struct {
    atomic_int references;
    void *data; /* from dhsa_alloc */
} block;

static void block_release(block *b)
{
    if (b != NULL && atomic_fetch_sub(&b->references, 1) == 1) {
        dhsa_free(b->data);
        dhsa_free(b);
    }
}

typedef struct {
    PyObject_HEAD block *memory;
    dl_dtype dtype;
    int ndim;
    int64_t shape[DHSA_PY_MAX_NDIM], stride[DHSA_PY_MAX_NDIM];
} buffer_object;

/* One exported tensor, in either struct of DLPack. It owns a reference to the block. */
typedef struct {
    union {
        dl_managed plain;
        dl_managed_versioned versioned;
    } managed;
    int64_t shape[DHSA_PY_MAX_NDIM], stride[DHSA_PY_MAX_NDIM];
} export;

static PyObject *buffer_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    PyObject *shape;
    const char *dtype;
    if (kwargs != NULL && PyDict_Size(kwargs) != 0) {
        PyErr_SetString(PyExc_TypeError, "Buffer: takes no keyword arguments");
        return NULL;
    }
    if (!PyArg_ParseTuple(args, "O!s:Buffer", &PyTuple_Type, &shape, &dtype)) {
        return NULL;
    }
    static const struct {
        const char *name;
        dl_dtype dtype;
    } known[] = {{"float32", {DL_FLOAT, 32, 1}}, {"float16", {DL_FLOAT, 16, 1}}, {"bfloat16", {DL_BFLOAT, 16, 1}}};
    const dl_dtype *found = NULL;
    for (size_t i = 0; i < sizeof known / sizeof *known; i++) {
        if (strcmp(dtype, known[i].name) == 0) found = &known[i].dtype;
    }
    if (found == NULL) {
        PyErr_Format(PyExc_TypeError, "dtype: expected float32, float16 or bfloat16, got %s", dtype);
        return NULL;
    }
    const Py_ssize_t ndim = PyTuple_Size(shape);
    if (ndim > DHSA_PY_MAX_NDIM) {
        PyErr_Format(PyExc_ValueError, "shape: expected at most %d dimensions, got %zd", DHSA_PY_MAX_NDIM, ndim);
        return NULL;
    }
    allocfunc alloc = (allocfunc)PyType_GetSlot(type, Py_tp_alloc);
    buffer_object *self = (buffer_object *)alloc(type, 0);
    if (self == NULL) {
        return NULL;
    }
    self->dtype = *found;
    self->ndim = (int)ndim;
    int64_t count = 1;
    for (int i = (int)ndim - 1; i >= 0; i--) {
        self->stride[i] = count;
        if (dhsa_py_int(PyTuple_GetItem(shape, i), "shape", 1, INT64_MAX, &self->shape[i]) != 0) {
            Py_DECREF(self);
            return NULL;
        }
        if (!dhsa_mul(count, self->shape[i], &count)) {
            PyErr_SetString(PyExc_ValueError, "shape: too large");
            Py_DECREF(self);
            return NULL;
        }
    }
    self->memory = dhsa_alloc_zeroed(1, sizeof *self->memory);
    if (self->memory != NULL) {
        atomic_init(&self->memory->references, 1);
        self->memory->data = dhsa_alloc(count, found->bits / 8);
    }
    if (self->memory == NULL || self->memory->data == NULL) {
        Py_DECREF(self);
        PyErr_Format(PyExc_MemoryError, "Buffer: no memory for %lld elements of %d bytes", (long long)count,
                     found->bits / 8);
        return NULL;
    }
    return (PyObject *)self;
}

static void buffer_dealloc(PyObject *object)
{
    PyTypeObject *type = Py_TYPE(object);
    block_release(((buffer_object *)object)->memory);
    freefunc free_object = (freefunc)PyType_GetSlot(type, Py_tp_free);
    free_object(object);
    Py_DECREF(type); /* instances of a heap type own a reference to it */
}

static void delete_plain(dl_managed *managed)
{
    block_release(managed->context);
    dhsa_free(managed);
}

static void delete_versioned(dl_managed_versioned *managed)
{
    block_release(managed->context);
    dhsa_free(managed);
}

/* Runs when a capsule is destroyed. A consumer that took the tensor has renamed the capsule. */
static void capsule_destructor(PyObject *capsule)
{
    if (PyCapsule_IsValid(capsule, "dltensor")) {
        dl_managed *managed = PyCapsule_GetPointer(capsule, "dltensor");
        managed->deleter(managed);
    } else if (PyCapsule_IsValid(capsule, "dltensor_versioned")) {
        dl_managed_versioned *managed = PyCapsule_GetPointer(capsule, "dltensor_versioned");
        managed->deleter(managed);
    }
}

static PyObject *buffer_dlpack(PyObject *object, PyObject *args, PyObject *kwargs)
{
    static char *keywords[] = {"stream", "max_version", "dl_device", "copy", NULL};
    PyObject *stream = Py_None, *max_version = Py_None, *device = Py_None, *copy = Py_None;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "|$OOOO:__dlpack__", keywords, &stream, &max_version, &device,
                                     &copy)) {
        return NULL;
    }
    if (stream != Py_None || copy == Py_True) {
        PyErr_SetString(PyExc_BufferError, "__dlpack__: neither streams nor copies are supported");
        return NULL;
    }
    if (device != Py_None) {
        int type = 0, id = 0;
        if (!PyTuple_Check(device) || !PyArg_ParseTuple(device, "ii", &type, &id)) {
            if (!PyErr_Occurred()) PyErr_SetString(PyExc_TypeError, "dl_device: expected a tuple (type, id)");
            return NULL;
        }
        if (type != DL_CPU) {
            PyErr_SetString(PyExc_BufferError, "dl_device: this memory is on the CPU");
            return NULL;
        }
    }
    int major = 0, minor = 0;
    if (max_version != Py_None &&
        (!PyTuple_Check(max_version) || !PyArg_ParseTuple(max_version, "ii", &major, &minor))) {
        if (!PyErr_Occurred()) PyErr_SetString(PyExc_TypeError, "max_version: expected a tuple (major, minor)");
        return NULL;
    }
    buffer_object *self = (buffer_object *)object;
    export *e = dhsa_alloc_zeroed(1, sizeof *e);
    if (e == NULL) {
        PyErr_SetString(PyExc_MemoryError, "Buffer: no memory for an export");
        return NULL;
    }
    memcpy(e->shape, self->shape, sizeof e->shape);
    memcpy(e->stride, self->stride, sizeof e->stride);
    const dl_tensor tensor = {self->memory->data, {DL_CPU, 0}, self->ndim, self->dtype, e->shape, e->stride, 0};
    const int versioned = major >= 1;
    if (versioned) {
        e->managed.versioned = (dl_managed_versioned){{1, 0}, self->memory, delete_versioned, 0, tensor};
    } else {
        e->managed.plain = (dl_managed){tensor, self->memory, delete_plain};
    }
    PyObject *capsule = PyCapsule_New(&e->managed, versioned ? "dltensor_versioned" : "dltensor", capsule_destructor);
    if (capsule == NULL) {
        dhsa_free(e);
        return NULL;
    }
    atomic_fetch_add(&self->memory->references, 1); /* released by the deleter */
    return capsule;
}

static PyObject *buffer_dlpack_device(PyObject *object, PyObject *unused)
{
    (void)object;
    (void)unused;
    return Py_BuildValue("(ii)", DL_CPU, 0);
}

PyObject *dhsa_py_buffer_type(PyObject *module)
{
    static PyMethodDef methods[] = {
        {"__dlpack__", (PyCFunction)(void (*)(void))buffer_dlpack, METH_VARARGS | METH_KEYWORDS,
         "The memory as a DLPack capsule."},
        {"__dlpack_device__", buffer_dlpack_device, METH_NOARGS, "(1, 0): the CPU."},
        {NULL, NULL, 0, NULL},
    };
    static PyType_Slot slots[] = {
        {Py_tp_new, buffer_new},
        {Py_tp_dealloc, buffer_dealloc},
        {Py_tp_methods, methods},
        {Py_tp_doc, "Buffer(shape, dtype, /): uninitialised memory, readable and writable through DLPack."},
        {0, NULL},
    };
    static PyType_Spec spec = {
        .name = "dhsa._core.Buffer",
        .basicsize = sizeof(buffer_object),
        .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE,
        .slots = slots,
    };
    return PyType_FromModuleAndSpec(module, &spec, NULL);
}
