/* key_index.c: the type _core.KeyIndex, a Python object that owns a dhsa_key_index: what is kept about the keys of a
 * sequence from call to call. The work is done in chunk/key_index.c. */
#include "python/key_index.h"

#include <stdatomic.h>

#include "core/internal.h"
#include "python/args.h"

typedef struct {
    PyObject_HEAD dhsa_key_index *index;
    atomic_int busy; /* 1 while a call uses it without the GIL */
} key_index_object;

static PyObject *key_index_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    if (PyTuple_Size(args) != 0 || (kwargs != NULL && PyDict_Size(kwargs) != 0)) {
        PyErr_SetString(PyExc_TypeError, "KeyIndex: takes no arguments");
        return NULL;
    }
    allocfunc alloc = (allocfunc)PyType_GetSlot(type, Py_tp_alloc);
    key_index_object *self = (key_index_object *)alloc(type, 0);
    if (self == NULL) {
        return NULL;
    }
    atomic_init(&self->busy, 0);
    dhsa_error error = {DHSA_OK, ""};
    if (dhsa_key_index_new(&self->index, &error) != DHSA_OK) {
        self->index = NULL;
        Py_DECREF(self);
        return dhsa_py_raise(&error);
    }
    return (PyObject *)self;
}

static void key_index_dealloc(PyObject *object)
{
    PyTypeObject *type = Py_TYPE(object);
    dhsa_key_index_free(((key_index_object *)object)->index); /* never busy, since a call holds a reference */
    freefunc free_object = (freefunc)PyType_GetSlot(type, Py_tp_free);
    free_object(object);
    Py_DECREF(type);
}

static int key_index_acquire(key_index_object *self)
{
    int free = 0;
    if (atomic_compare_exchange_strong(&self->busy, &free, 1)) {
        return 0;
    }
    PyErr_SetString(PyExc_RuntimeError, "key_indexes: in use by another call");
    return -1;
}

static PyObject *key_index_boundaries(PyObject *object, void *unused)
{
    (void)unused;
    key_index_object *self = (key_index_object *)object;
    if (key_index_acquire(self) != 0) {
        return NULL;
    }
    const int64_t count = dhsa_key_index_boundaries(self->index, NULL);
    int32_t *entries = dhsa_alloc(count, sizeof *entries);
    PyObject *list = NULL;
    if (entries != NULL) {
        list = PyList_New(0);
    } else {
        PyErr_Format(PyExc_MemoryError, "key_indexes: no memory for %lld boundaries", (long long)count);
    }
    if (list != NULL) {
        dhsa_key_index_boundaries(self->index, entries);
    }
    for (int64_t i = 0; list != NULL && i < count; i++) {
        PyObject *entry = PyLong_FromLong(entries[i]);
        if (entry == NULL || PyList_Append(list, entry) != 0) {
            Py_CLEAR(list);
        }
        Py_XDECREF(entry);
    }
    dhsa_free(entries);
    atomic_store(&self->busy, 0);
    return list;
}

static PyObject *key_index_nbytes(PyObject *object, void *unused)
{
    (void)unused;
    key_index_object *self = (key_index_object *)object;
    if (key_index_acquire(self) != 0) {
        return NULL;
    }
    const int64_t bytes = dhsa_key_index_bytes(self->index);
    atomic_store(&self->busy, 0);
    return PyLong_FromLongLong(bytes);
}

static PyObject *key_index_to_bytes(PyObject *object, PyObject *unused)
{
    (void)unused;
    key_index_object *self = (key_index_object *)object;
    if (key_index_acquire(self) != 0) {
        return NULL;
    }
    PyObject *bytes = PyBytes_FromStringAndSize(NULL, (Py_ssize_t)dhsa_key_index_write(self->index, NULL));
    if (bytes != NULL) {
        dhsa_key_index_write(self->index, PyBytes_AsString(bytes));
    }
    atomic_store(&self->busy, 0);
    return bytes;
}

/* A new object that owns `index`. Frees it and returns NULL if there is no memory. */
static PyObject *key_index_wrap(PyTypeObject *type, dhsa_key_index *index)
{
    allocfunc alloc = (allocfunc)PyType_GetSlot(type, Py_tp_alloc);
    key_index_object *self = (key_index_object *)alloc(type, 0);
    if (self == NULL) {
        dhsa_key_index_free(index);
        return NULL;
    }
    atomic_init(&self->busy, 0);
    self->index = index;
    return (PyObject *)self;
}

static PyObject *key_index_from_bytes(PyObject *type, PyObject *bytes)
{
    Py_buffer view;
    if (PyObject_GetBuffer(bytes, &view, PyBUF_SIMPLE) != 0) {
        PyErr_Clear();
        dhsa_py_wrong_type("bytes", "a contiguous buffer of bytes", bytes);
        return NULL;
    }
    dhsa_error error = {DHSA_OK, ""};
    dhsa_key_index *index = NULL;
    const dhsa_status status = dhsa_key_index_read(view.buf, (int64_t)view.len, &index, &error);
    PyBuffer_Release(&view);
    return status != DHSA_OK ? dhsa_py_raise(&error) : key_index_wrap((PyTypeObject *)type, index);
}

/* __copy__ and __deepcopy__ are the same, since the object holds nothing that two copies could share. */
static PyObject *key_index_twin(PyObject *object, PyObject *unused)
{
    (void)unused;
    key_index_object *self = (key_index_object *)object;
    PyTypeObject *type = Py_TYPE(object);
    if (key_index_acquire(self) != 0) {
        return NULL;
    }
    dhsa_error error = {DHSA_OK, ""};
    dhsa_key_index *twin = NULL;
    const dhsa_status status = dhsa_key_index_copy(self->index, &twin, &error);
    atomic_store(&self->busy, 0);
    if (status != DHSA_OK) {
        return dhsa_py_raise(&error);
    }
    return key_index_wrap(type, twin);
}

static PyObject *key_index_reduce(PyObject *object, PyObject *unused)
{
    (void)object;
    (void)unused;
    PyErr_SetString(PyExc_TypeError,
                    "KeyIndex: cannot be pickled; a new one learns what it needs from the keys it is first given");
    return NULL;
}

PyObject *dhsa_py_key_index_type(PyObject *module)
{
    static PyMethodDef methods[] = {
        {"__copy__", key_index_twin, METH_NOARGS, "An independent copy."},
        {"__deepcopy__", key_index_twin, METH_O, "An independent copy."},
        {"__reduce__", key_index_reduce, METH_NOARGS, "Raises TypeError."},
        {"to_bytes", key_index_to_bytes, METH_NOARGS, "What it holds, for a file."},
        {"from_bytes", key_index_from_bytes, METH_O | METH_CLASS,
         "The one that to_bytes wrote; ValueError for other bytes."},
        {NULL, NULL, 0, NULL},
    };
    static PyGetSetDef getters[] = {
        {"boundaries", key_index_boundaries, NULL,
         "The boundaries of the last call, as a list, with the empty chunks of a decoding step.", NULL},
        {"nbytes", key_index_nbytes, NULL, "Memory held, in bytes.", NULL},
        {NULL, NULL, NULL, NULL, NULL},
    };
    static PyType_Slot slots[] = {
        {Py_tp_new, key_index_new},
        {Py_tp_dealloc, key_index_dealloc},
        {Py_tp_methods, methods},
        {Py_tp_getset, getters},
        {Py_tp_doc, "KeyIndex(): what is kept from call to call about the keys of one sequence in one layer."},
        {0, NULL},
    };
    static PyType_Spec spec = {
        .name = "dhsa._core.KeyIndex",
        .basicsize = sizeof(key_index_object),
        .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE,
        .slots = slots,
    };
    return PyType_FromModuleAndSpec(module, &spec, NULL);
}

int dhsa_py_key_indexes_open(const dhsa_py_state *state, PyObject *object, int64_t want, dhsa_py_key_indexes *p)
{
    *p = (dhsa_py_key_indexes){NULL, 0, NULL};
    if (object == Py_None) {
        return 0;
    }
    if (!PyTuple_Check(object) || PyTuple_Size(object) != want) {
        PyErr_Format(PyExc_ValueError, "key_indexes: expected a tuple of %lld, one a batch item, or None",
                     (long long)want);
        return -1;
    }
    p->items = dhsa_alloc(want, sizeof *p->items);
    if (p->items == NULL) {
        PyErr_Format(PyExc_MemoryError, "key_indexes: no memory for a batch of %lld", (long long)want);
        return -1;
    }
    p->tuple = Py_NewRef(object);
    for (; p->count < want; p->count++) {
        PyObject *item = PyTuple_GetItem(object, p->count);
        if (!PyObject_TypeCheck(item, (PyTypeObject *)state->key_index_type)) {
            PyErr_SetString(PyExc_TypeError, "key_indexes: expected objects of type KeyIndex");
        } else if (key_index_acquire((key_index_object *)item) == 0) { /* an object given twice is busy by then */
            p->items[p->count] = ((key_index_object *)item)->index;
            continue;
        }
        dhsa_py_key_indexes_release(p);
        return -1;
    }
    return 0;
}

void dhsa_py_key_indexes_release(dhsa_py_key_indexes *p)
{
    for (Py_ssize_t i = 0; i < p->count; i++) {
        atomic_store(&((key_index_object *)PyTuple_GetItem(p->tuple, i))->busy, 0);
    }
    dhsa_free(p->items);
    Py_XDECREF(p->tuple);
    *p = (dhsa_py_key_indexes){NULL, 0, NULL};
}
