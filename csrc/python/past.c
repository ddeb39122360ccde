/* past.c: the type _core.Past: what is kept of a sequence's keys from call to call, owned by Python. The work is chunk/past.c's.
 */
#include "python/past.h"

#include <stdatomic.h>

#include "core/internal.h"
#include "python/args.h"

typedef struct {
    PyObject_HEAD dhsa_past *past;
    atomic_int busy; /* a call works on it, without the GIL */
} past_object;

static PyObject *past_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    if (PyTuple_Size(args) != 0 || (kwargs != NULL && PyDict_Size(kwargs) != 0)) {
        PyErr_SetString(PyExc_TypeError, "Past: takes no arguments");
        return NULL;
    }
    allocfunc alloc = (allocfunc)PyType_GetSlot(type, Py_tp_alloc);
    past_object *self = (past_object *)alloc(type, 0);
    if (self == NULL) {
        return NULL;
    }
    atomic_init(&self->busy, 0);
    dhsa_error error = {DHSA_OK, ""};
    if (dhsa_past_new(&self->past, &error) != DHSA_OK) {
        self->past = NULL;
        Py_DECREF(self);
        return dhsa_py_raise(&error);
    }
    return (PyObject *)self;
}

static void past_dealloc(PyObject *object)
{
    PyTypeObject *type = Py_TYPE(object);
    dhsa_past_free(((past_object *)object)->past); /* never busy: a call holds a reference */
    freefunc free_object = (freefunc)PyType_GetSlot(type, Py_tp_free);
    free_object(object);
    Py_DECREF(type);
}

static int take(past_object *self)
{
    int free = 0;
    if (atomic_compare_exchange_strong(&self->busy, &free, 1)) {
        return 0;
    }
    PyErr_SetString(PyExc_RuntimeError, "past: in use by another call");
    return -1;
}

static PyObject *past_boundaries(PyObject *object, void *unused)
{
    (void)unused;
    past_object *self = (past_object *)object;
    if (take(self) != 0) {
        return NULL;
    }
    const int64_t count = dhsa_past_boundaries(self->past, NULL);
    int32_t *entries = dhsa_alloc(count, sizeof *entries);
    PyObject *list = NULL;
    if (entries != NULL) {
        list = PyList_New(0);
    } else {
        PyErr_Format(PyExc_MemoryError, "past: no memory for %lld boundaries", (long long)count);
    }
    if (list != NULL) {
        dhsa_past_boundaries(self->past, entries);
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

static PyObject *past_nbytes(PyObject *object, void *unused)
{
    (void)unused;
    past_object *self = (past_object *)object;
    if (take(self) != 0) {
        return NULL;
    }
    const int64_t bytes = dhsa_past_bytes(self->past);
    atomic_store(&self->busy, 0);
    return PyLong_FromLongLong(bytes);
}

/* __copy__ and __deepcopy__: it holds nothing that two could share. */
static PyObject *past_twin(PyObject *object, PyObject *unused)
{
    (void)unused;
    past_object *self = (past_object *)object;
    PyTypeObject *type = Py_TYPE(object);
    if (take(self) != 0) {
        return NULL;
    }
    dhsa_error error = {DHSA_OK, ""};
    dhsa_past *twin = NULL;
    const dhsa_status status = dhsa_past_copy(self->past, &twin, &error);
    atomic_store(&self->busy, 0);
    if (status != DHSA_OK) {
        return dhsa_py_raise(&error);
    }
    allocfunc alloc = (allocfunc)PyType_GetSlot(type, Py_tp_alloc);
    past_object *copy = (past_object *)alloc(type, 0);
    if (copy == NULL) {
        dhsa_past_free(twin);
        return NULL;
    }
    atomic_init(&copy->busy, 0);
    copy->past = twin;
    return (PyObject *)copy;
}

static PyObject *past_reduce(PyObject *object, PyObject *unused)
{
    (void)object;
    (void)unused;
    PyErr_SetString(PyExc_TypeError, "Past: cannot be pickled; a new one learns what it needs from the keys it is first given");
    return NULL;
}

PyObject *dhsa_py_past_type(PyObject *module)
{
    static PyMethodDef methods[] = {
        {"__copy__", past_twin, METH_NOARGS, "A twin that goes its own way from here."},
        {"__deepcopy__", past_twin, METH_O, "A twin that goes its own way from here."},
        {"__reduce__", past_reduce, METH_NOARGS, "Raises TypeError."},
        {NULL, NULL, 0, NULL},
    };
    static PyGetSetDef getters[] = {
        {"boundaries", past_boundaries, NULL, "The cuts after the last call, as a list; empty chunks of a decoding step included.",
         NULL},
        {"nbytes", past_nbytes, NULL, "Memory held, in bytes.", NULL},
        {NULL, NULL, NULL, NULL, NULL},
    };
    static PyType_Slot slots[] = {
        {Py_tp_new, past_new},
        {Py_tp_dealloc, past_dealloc},
        {Py_tp_methods, methods},
        {Py_tp_getset, getters},
        {Py_tp_doc, "Past(): what is kept of one sequence's keys in one layer from call to call."},
        {0, NULL},
    };
    static PyType_Spec spec = {
        .name = "dhsa._core.Past",
        .basicsize = sizeof(past_object),
        .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE,
        .slots = slots,
    };
    return PyType_FromModuleAndSpec(module, &spec, NULL);
}

int dhsa_py_pasts_open(const dhsa_py_state *state, PyObject *object, int64_t want, dhsa_py_pasts *p)
{
    *p = (dhsa_py_pasts){NULL, 0, NULL};
    if (object == Py_None) {
        return 0;
    }
    if (!PyTuple_Check(object) || PyTuple_Size(object) != want) {
        PyErr_Format(PyExc_ValueError, "past: expected a tuple of %lld, one a batch row, or None", (long long)want);
        return -1;
    }
    p->pasts = dhsa_alloc(want, sizeof *p->pasts);
    if (p->pasts == NULL) {
        PyErr_Format(PyExc_MemoryError, "past: no memory for a batch of %lld", (long long)want);
        return -1;
    }
    p->tuple = Py_NewRef(object);
    for (; p->count < want; p->count++) {
        PyObject *item = PyTuple_GetItem(object, p->count);
        if (!PyObject_TypeCheck(item, (PyTypeObject *)state->past_type)) {
            PyErr_SetString(PyExc_TypeError, "past: expected objects of type Past");
        } else if (take((past_object *)item) == 0) { /* an object that is there twice is busy the second time */
            p->pasts[p->count] = ((past_object *)item)->past;
            continue;
        }
        dhsa_py_pasts_release(p);
        return -1;
    }
    return 0;
}

void dhsa_py_pasts_release(dhsa_py_pasts *p)
{
    for (Py_ssize_t i = 0; i < p->count; i++) {
        atomic_store(&((past_object *)PyTuple_GetItem(p->tuple, i))->busy, 0);
    }
    dhsa_free(p->pasts);
    Py_XDECREF(p->tuple);
    *p = (dhsa_py_pasts){NULL, 0, NULL};
}
