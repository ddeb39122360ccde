/* config.c: the type _core.Config: the fields of a configuration, parsed by name and checked once, when it is
 * created. dhsa_config_check decides which values are valid; only what a conversion would lose is checked here. */
#include "python/config.h"

#include <math.h>
#include <stddef.h>
#include <string.h>

typedef enum {
    FIELD_INT,
    FIELD_OPTIONAL_INT, /* None is stored as `none` */
    FIELD_NUMBER,
    FIELD_SHARE,  /* a number above 0, or None, which is stored as 0 */
    FIELD_METHOD, /* a method by its name */
    FIELD_CHOICE, /* one of `names` */
    FIELD_FLAG,
    FIELD_CHUNKS, /* an int, None or "paper" */
    FIELD_WEIGHTS
} field_kind;

/* In the order of the enums in dhsa.h. */
static const char *const heads_names[] = {"group", "all", "head", NULL};
static const char *const boundaries_names[] = {"similarity", "fixed", "predictor", NULL};
static const char *const pooling_names[] = {"mean", "mean_sqrt", NULL};

/* X(name, kind, member of dhsa_py_config, smallest int, value of None, names of choices). A floor of None becomes
 * sink + local once these are known. */
#define CONFIG_FIELDS(X)                                                                                               \
    X(method, METHOD, select.method, 0, 0, NULL)                                                                       \
    X(budget, OPTIONAL_INT, select.budget, 1, INT64_MAX, NULL)                                                         \
    X(mass, SHARE, select.mass, 0, 0, NULL)                                                                            \
    X(floor, OPTIONAL_INT, select.floor, 0, INT64_MAX, NULL)                                                           \
    X(query_block, INT, select.score.query_block, 1, 0, NULL)                                                          \
    X(sink, INT, select.sink, 0, 0, NULL)                                                                              \
    X(local, INT, select.local, 0, 0, NULL)                                                                            \
    X(dense_tail, INT, select.dense_tail, 0, 0, NULL)                                                                  \
    X(heads, CHOICE, select.score.heads, 0, 0, heads_names)                                                            \
    X(boundaries, CHOICE, boundaries.kind, 0, 0, boundaries_names)                                                     \
    X(chunk_size, INT, boundaries.chunk_size, 1, 0, NULL)                                                              \
    X(num_chunks, CHUNKS, num_chunks, 0, 0, NULL)                                                                      \
    X(boundary_window, INT, boundaries.window, 1, 0, NULL)                                                             \
    X(theta, NUMBER, boundaries.theta, 0, 0, NULL)                                                                     \
    X(nms, INT, boundaries.nms, 0, 0, NULL)                                                                            \
    X(predictor, WEIGHTS, weights, 0, 0, NULL)                                                                         \
    X(rows, INT, select.score.mean_queries, 1, 0, NULL)                                                                \
    X(quantized, FLAG, select.score.quantized, 0, 0, NULL)                                                             \
    X(shortlist, INT, select.shortlist, 0, 0, NULL)                                                                    \
    X(pooling, CHOICE, select.score.pooling, 0, 0, pooling_names)                                                      \
    X(key_block, INT, select.key_block, 1, 0, NULL)                                                                    \
    X(stride, OPTIONAL_INT, select.stride, 1, 0, NULL)

typedef struct {
    const char *name;
    field_kind kind;
    size_t offset;
    int64_t min, none;
    const char *const *names;
} field;

#define CONFIG_FIELD(name, kind, member, min, none, names)                                                             \
    {#name, FIELD_##kind, offsetof(dhsa_py_config, member), min, none, names},
static const field fields[] = {CONFIG_FIELDS(CONFIG_FIELD)};
#define CONFIG_PLACE(name, ...) PLACE_##name,
enum { CONFIG_FIELDS(CONFIG_PLACE) FIELDS };

_Static_assert(sizeof(dhsa_method_kind) == sizeof(int) && sizeof(dhsa_heads) == sizeof(int) &&
                   sizeof(dhsa_boundary_kind) == sizeof(int) && sizeof(dhsa_pooling) == sizeof(int),
               "fields of choice are read and written as int");

static const char *choice_name(const field *f, int i)
{
    return f->kind == FIELD_METHOD ? dhsa_method_name(i) : f->names[i];
}

static int parse_choice(const field *f, PyObject *value, int *choice)
{
    if (!PyUnicode_Check(value)) {
        return dhsa_py_wrong_type(f->name, "a str", value);
    }
    for (int i = 0; choice_name(f, i) != NULL; i++) {
        if (PyUnicode_CompareWithASCIIString(value, choice_name(f, i)) == 0) {
            *choice = i;
            return 0;
        }
    }
    PyObject *expected = PyUnicode_FromFormat("'%s'", choice_name(f, 0));
    for (int i = 1; expected != NULL && choice_name(f, i) != NULL; i++) {
        PyObject *longer = PyUnicode_FromFormat("%U, '%s'", expected, choice_name(f, i));
        Py_DECREF(expected);
        expected = longer;
    }
    if (expected != NULL) {
        PyErr_Format(PyExc_ValueError, "%s: expected one of %U, got %R", f->name, expected, value);
        Py_DECREF(expected);
    }
    return -1;
}

static int parse_field(const field *f, PyObject *value, dhsa_py_config *self)
{
    void *to = (char *)self + f->offset;
    int choice = 0;
    switch (f->kind) {
    case FIELD_INT:
        return dhsa_py_int(value, f->name, f->min, INT64_MAX, to);
    case FIELD_OPTIONAL_INT:
        return dhsa_py_optional_int(value, f->name, f->min, INT64_MAX, f->none, to);
    case FIELD_NUMBER:
        return dhsa_py_double(value, f->name, 1, to);
    case FIELD_SHARE:
        if (value == Py_None) {
            *(double *)to = 0;
            return 0;
        }
        if (dhsa_py_double(value, f->name, 0, to) != 0) {
            return -1;
        }
        if (*(double *)to <= 0) { /* in the core 0 means none */
            PyErr_Format(PyExc_ValueError, "%s: expected None or a number above 0, at most 1, got %S", f->name, value);
            return -1;
        }
        return 0;
    case FIELD_CHOICE:
    case FIELD_METHOD:
        if (parse_choice(f, value, &choice) != 0) {
            return -1;
        }
        memcpy(to, &choice, sizeof choice);
        return 0;
    case FIELD_FLAG:
        if (!PyBool_Check(value)) {
            return dhsa_py_wrong_type(f->name, "a bool", value);
        }
        *(int *)to = value == Py_True;
        return 0;
    case FIELD_CHUNKS:
        if (PyUnicode_Check(value)) {
            if (PyUnicode_CompareWithASCIIString(value, "paper") != 0) {
                PyErr_Format(PyExc_ValueError, "%s: expected an int, 'paper' or None, got %R", f->name, value);
                return -1;
            }
            *(int64_t *)to = DHSA_PY_CHUNKS_PAPER;
            return 0;
        }
        return dhsa_py_optional_int(value, f->name, 0, INT64_MAX, DHSA_PY_CHUNKS_BEST, to);
    case FIELD_WEIGHTS:
        if (value != Py_None) {
            *(PyObject **)to = Py_NewRef(value);
        }
        return 0;
    }
    return 0;
}

static const field *find_field(PyObject *name)
{
    for (int i = 0; i < FIELDS; i++) {
        if (PyUnicode_CompareWithASCIIString(name, fields[i].name) == 0) {
            return &fields[i];
        }
    }
    PyErr_Format(PyExc_TypeError, "Config has no field %R", name);
    return NULL;
}

static int fill(dhsa_py_config *self, const dhsa_py_state *state, PyObject *kwargs)
{
    PyObject *key, *value;
    Py_ssize_t at = 0;
    while (kwargs != NULL && PyDict_Next(kwargs, &at, &key, &value)) {
        const field *f = find_field(key);
        if (f == NULL || parse_field(f, value, self) != 0) {
            return -1;
        }
    }
    dhsa_select_config *select = &self->select;
    select->score.score = select->method == DHSA_METHOD_DHSA ? DHSA_SCORE_BLOCK : DHSA_SCORE_ROWS;
    if (self->weights != NULL) {
        if (dhsa_py_predictor_open(state, self->weights, &self->predictor) != 0) {
            return -1;
        }
        self->boundaries.predictor = self->predictor.attention;
        self->boundaries.compact = self->predictor.compact;
    }
    dhsa_error error = {DHSA_OK, ""};
    const int64_t forced = select->sink > INT64_MAX - select->local ? INT64_MAX : select->sink + select->local;
    select->floor = select->floor == INT64_MAX ? forced : select->floor;
    if (dhsa_config_check(select, &self->boundaries, &error) != DHSA_OK) {
        dhsa_py_raise(&error);
        return -1;
    }
    return 0;
}

static PyObject *config_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    if (PyTuple_Size(args) != 0) {
        PyErr_SetString(PyExc_TypeError, "Config: takes keyword arguments only");
        return NULL;
    }
    const dhsa_py_state *state = PyType_GetModuleState(type);
    allocfunc alloc = (allocfunc)PyType_GetSlot(type, Py_tp_alloc);
    dhsa_py_config *self = state == NULL ? NULL : (dhsa_py_config *)alloc(type, 0); /* zeroed */
    if (self == NULL) {
        return NULL;
    }
    self->select.budget = self->select.floor = INT64_MAX;
    self->select.key_block = 128;
    self->select.score.query_block = 64;
    self->select.score.mean_queries = 1;
    self->select.score.scale = 1;
    self->boundaries.chunk_size = 8;
    self->boundaries.window = 4;
    self->boundaries.theta = -INFINITY;
    self->num_chunks = DHSA_PY_CHUNKS_BEST;
    if (fill(self, state, kwargs) != 0) {
        Py_DECREF(self);
        return NULL;
    }
    return (PyObject *)self;
}

static void config_dealloc(PyObject *object)
{
    dhsa_py_config *self = (dhsa_py_config *)object;
    PyTypeObject *type = Py_TYPE(object);
    dhsa_py_predictor_release(&self->predictor);
    Py_XDECREF(self->weights);
    freefunc free_object = (freefunc)PyType_GetSlot(type, Py_tp_free);
    free_object(object);
    Py_DECREF(type);
}

static PyObject *get_field(PyObject *object, void *closure)
{
    const field *f = closure;
    const void *from = (const char *)object + f->offset;
    int64_t number;
    double share;
    int choice;
    switch (f->kind) {
    case FIELD_INT:
    case FIELD_OPTIONAL_INT:
        number = *(const int64_t *)from;
        return f->kind == FIELD_OPTIONAL_INT && number == f->none ? Py_NewRef(Py_None) : PyLong_FromLongLong(number);
    case FIELD_NUMBER:
        return PyFloat_FromDouble(*(const double *)from);
    case FIELD_SHARE:
        share = *(const double *)from;
        return share > 0 ? PyFloat_FromDouble(share) : Py_NewRef(Py_None);
    case FIELD_CHOICE:
    case FIELD_METHOD:
        memcpy(&choice, from, sizeof choice);
        return PyUnicode_FromString(choice_name(f, choice));
    case FIELD_FLAG:
        return PyBool_FromLong(*(const int *)from);
    case FIELD_CHUNKS:
        number = *(const int64_t *)from;
        return number == DHSA_PY_CHUNKS_PAPER  ? PyUnicode_FromString("paper")
               : number == DHSA_PY_CHUNKS_BEST ? Py_NewRef(Py_None)
                                               : PyLong_FromLongLong(number);
    case FIELD_WEIGHTS:
        return Py_NewRef(*(PyObject *const *)from != NULL ? *(PyObject *const *)from : Py_None);
    }
    return NULL; /* not reached */
}

static PyObject *get_exact(PyObject *object, void *unused)
{
    (void)unused;
    const dhsa_select_config *select = &((const dhsa_py_config *)object)->select;
    return PyBool_FromLong(select->budget == INT64_MAX && select->mass == 0);
}

static PyObject *get_exact_up_to(PyObject *object, void *unused)
{
    (void)unused;
    const dhsa_select_config *select = &((const dhsa_py_config *)object)->select;
    return PyLong_FromLongLong(select->mass > 0 ? select->floor : select->budget);
}

static PyObject *config_leaves_out(PyObject *object, PyObject *const *args, Py_ssize_t nargs)
{
    const dhsa_py_config *self = (const dhsa_py_config *)object;
    int64_t q_len = 0, k_len = 0, window = 0;
    if (dhsa_py_count("leaves_out", nargs, 4) != 0 || dhsa_py_int(args[0], "q_len", 0, INT32_MAX / 2, &q_len) != 0 ||
        dhsa_py_int(args[1], "k_len", 0, INT32_MAX / 2, &k_len) != 0 ||
        dhsa_py_optional_int(args[2], "window", 1, INT64_MAX, 0, &window) != 0) {
        return NULL;
    }
    const int causal = PyObject_IsTrue(args[3]);
    return causal < 0 ? NULL : PyBool_FromLong(dhsa_leaves_out(&self->select, q_len, k_len, window, causal));
}

static PyObject *config_num_gaps(PyObject *object, PyObject *length)
{
    int64_t keys = 0;
    if (dhsa_py_int(length, "length", 1, INT32_MAX / 2, &keys) != 0) {
        return NULL;
    }
    return PyLong_FromLongLong(dhsa_py_config_cuts((const dhsa_py_config *)object, keys).num_chunks);
}

static PyObject *config_reduce(PyObject *object, PyObject *unused)
{
    (void)object;
    (void)unused;
    PyErr_SetString(PyExc_TypeError,
                    "Config: cannot be pickled by itself; pickle the dhsa.Config, which creates it again");
    return NULL;
}

PyObject *dhsa_py_config_type(PyObject *module)
{
    static PyMethodDef methods[] = {
        {"leaves_out", (PyCFunction)(void (*)(void))config_leaves_out, METH_FASTCALL,
         "leaves_out($self, q_len, k_len, window, causal, /)\n--\n\nWhether attention of the last q_len of k_len "
         "positions "
         "leaves out a visible key. window: None for no sliding window."},
        {"num_gaps", config_num_gaps, METH_O,
         "num_gaps($self, length, /)\n--\n\nThe largest number of gaps at which `length` keys are cut, if boundaries "
         "are not "
         "fixed."},
        {"__reduce__", config_reduce, METH_NOARGS, "Raises TypeError."},
        {NULL, NULL, 0, NULL},
    };
#define CONFIG_GETTER(name, ...) {#name, get_field, NULL, "As in dhsa.Config.", (void *)&fields[PLACE_##name]},
    static PyGetSetDef getters[] = {
        CONFIG_FIELDS(CONFIG_GETTER){"exact", get_exact, NULL,
                                     "Whether no key is ever left out: there is neither a budget nor a mass.", NULL},
        {"exact_up_to", get_exact_up_to, NULL,
         "A block with at most this many visible keys sees all of them: the budget or, with a mass, the floor.", NULL},
        {NULL, NULL, NULL, NULL, NULL},
    };
    static PyType_Slot slots[] = {
        {Py_tp_new, config_new},
        {Py_tp_dealloc, config_dealloc},
        {Py_tp_methods, methods},
        {Py_tp_getset, getters},
        {Py_tp_doc, "Config(*, method, budget, ...): the fields of a configuration, checked; see config.c."},
        {0, NULL},
    };
    static PyType_Spec spec = {
        .name = "dhsa._core.Config",
        .basicsize = sizeof(dhsa_py_config),
        .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE,
        .slots = slots,
    };
    return PyType_FromModuleAndSpec(module, &spec, NULL);
}

const dhsa_py_config *dhsa_py_config_of(const dhsa_py_state *state, PyObject *object)
{
    if (!PyObject_TypeCheck(object, (PyTypeObject *)state->config_type)) {
        dhsa_py_wrong_type("config", "a _core.Config", object);
        return NULL;
    }
    return (const dhsa_py_config *)object;
}

dhsa_boundary_config dhsa_py_config_cuts(const dhsa_py_config *config, int64_t length)
{
    dhsa_boundary_config cuts = config->boundaries;
    cuts.num_chunks = config->num_chunks >= 0
                          ? config->num_chunks
                          : dhsa_num_chunks(&config->select, length, config->num_chunks == DHSA_PY_CHUNKS_PAPER);
    return cuts;
}
