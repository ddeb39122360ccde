/* args.c: converts Python numbers, tuples and arrays to the structs of dhsa.h, and dhsa_error to Python exceptions.
 * The core checks ranges; only what a conversion would lose is checked here. */
#include "python/args.h"

#include <math.h>
#include <string.h>

#include "core/threads.h"

int dhsa_py_wrong_type(const char *name, const char *expected, PyObject *object)
{
    PyObject *type = PyObject_GetAttrString((PyObject *)Py_TYPE(object), "__name__");
    if (type != NULL) {
        PyErr_Format(PyExc_TypeError, "%s: expected %s, got %S", name, expected, type);
        Py_DECREF(type);
    }
    return -1;
}

int dhsa_py_int(PyObject *object, const char *name, int64_t min, int64_t max, int64_t *value)
{
    if (PyBool_Check(object) || !PyIndex_Check(object)) {
        return dhsa_py_wrong_type(name, "an int", object);
    }
    PyObject *integer = PyNumber_Index(object);
    if (integer == NULL) {
        return -1;
    }
    int overflow = 0;
    const long long number = PyLong_AsLongLongAndOverflow(integer, &overflow);
    int result = 0;
    if (number == -1 && !overflow && PyErr_Occurred()) {
        result = -1;
    } else if (overflow || number < min || number > max) {
        if (max == INT64_MAX && overflow <= 0) {
            PyErr_Format(PyExc_ValueError, "%s: expected at least %lld, got %S", name, (long long)min, integer);
        } else {
            PyErr_Format(PyExc_ValueError, "%s: expected %lld to %lld, got %S", name, (long long)min, (long long)max,
                         integer);
        }
        result = -1;
    } else {
        *value = number;
    }
    Py_DECREF(integer);
    return result;
}

int dhsa_py_optional_int(PyObject *object, const char *name, int64_t min, int64_t max, int64_t none, int64_t *value)
{
    if (object == Py_None) {
        *value = none;
        return 0;
    }
    return dhsa_py_int(object, name, min, max, value);
}

int dhsa_py_double(PyObject *object, const char *name, int infinite, double *value)
{
    if (PyBool_Check(object) || PyUnicode_Check(object) || PyBytes_Check(object)) {
        return dhsa_py_wrong_type(name, "a number", object);
    }
    const double number = PyFloat_AsDouble(object);
    if (number == -1.0 && PyErr_Occurred()) {
        if (PyErr_ExceptionMatches(PyExc_TypeError)) {
            PyErr_Clear();
            return dhsa_py_wrong_type(name, "a number", object);
        }
        if (PyErr_ExceptionMatches(PyExc_OverflowError)) {
            PyErr_Clear();
            PyErr_Format(PyExc_ValueError, "%s: %S does not fit a float", name, object);
        }
        return -1;
    }
    if (isnan(number) || (!infinite && isinf(number))) {
        PyErr_Format(PyExc_ValueError, "%s: expected a %snumber, got %S", name, infinite ? "" : "finite ", object);
        return -1;
    }
    *value = number;
    return 0;
}

int dhsa_py_scaling(PyObject *scale, PyObject *softcap, PyObject *window, int64_t head_dim, double *scale_out,
                    double *softcap_out, int64_t *window_out)
{
    if (scale == Py_None) {
        *scale_out = head_dim > 0 ? 1.0 / sqrt((double)head_dim) : 1.0; /* an empty head_dim is refused later */
    } else if (dhsa_py_double(scale, "scale", 0, scale_out) != 0) {
        return -1;
    }
    *softcap_out = 0.0;
    if (softcap != Py_None) {
        if (dhsa_py_double(softcap, "softcap", 0, softcap_out) != 0) {
            return -1;
        }
        if (*softcap_out <= 0.0) {
            PyErr_Format(PyExc_ValueError, "softcap: expected None or a number above 0, got %S", softcap);
            return -1;
        }
    }
    return dhsa_py_optional_int(window, "window", 1, INT64_MAX, 0, window_out);
}

static int open_tensor(const dhsa_py_state *state, PyObject *object, const char *name, const char *axes, int writable,
                       dhsa_py_view *view, dhsa_tensor *tensor)
{
    return dhsa_py_view_open(state, object, name, view) == 0 &&
                   dhsa_py_view_tensor(view, name, axes, writable, tensor) == 0
               ? 0
               : -1;
}

int dhsa_py_problem_open(const dhsa_py_state *state, PyObject *const *args, dhsa_py_problem *p)
{
    memset(p, 0, sizeof *p);
    dhsa_problem *problem = &p->problem;
    int64_t threads = 0, precision = 0;
    int causal = 1;
    if (open_tensor(state, args[0], "q", "[B, H, Lq, D]", 0, &p->q, &problem->q) != 0 ||
        open_tensor(state, args[1], "k", "[B, Hkv, Lk, D]", 0, &p->k, &problem->k) != 0 ||
        open_tensor(state, args[2], "v", "[B, Hkv, Lk, E]", 0, &p->v, &problem->v) != 0 ||
        open_tensor(state, args[3], "out", "[B, H, Lq, E]", 1, &p->out, &problem->out) != 0) {
        goto fail;
    }
    if (args[4] != Py_None) {
        if (dhsa_py_array_open(state, args[4], "lse", DL_FLOAT, 32, 3, problem->q.shape, 1, &p->lse) != 0) {
            goto fail;
        }
        problem->lse = p->lse.data;
    }
    if (dhsa_py_scaling(args[5], args[6], args[7], problem->q.shape[3], &problem->scale, &problem->softcap,
                        &problem->window) != 0) {
        goto fail;
    }
    causal = PyObject_IsTrue(args[8]);
    if (causal < 0) {
        goto fail;
    }
    problem->causal = causal;
    if (args[9] != Py_None) {
        const int64_t shape[3] = {problem->q.shape[0], problem->q.shape[2], 2};
        if (dhsa_py_array_open(state, args[9], "key_ranges", DL_INT, 32, 3, shape, 0, &p->key_ranges) != 0) {
            goto fail;
        }
        problem->key_ranges = p->key_ranges.data;
    }
    if (dhsa_py_int(args[10], "num_threads", 1, DHSA_MAX_THREADS, &threads) != 0) {
        goto fail;
    }
    problem->num_threads = (int)threads;
    if (args[11] != Py_None) {
        if (dhsa_py_double(args[11], "skip", 0, &problem->skip) != 0) {
            goto fail;
        }
        if (problem->skip == 0) {
            PyErr_SetString(PyExc_ValueError, "skip: got 0, expected a number above 0 and below 1");
            goto fail;
        }
        problem->skip_counts = p->skip_counts;
    }
    if (args[12] != Py_None) {
        if (dhsa_py_array_open(state, args[12], "sinks", DL_FLOAT, 32, 1, &problem->q.shape[1], 0, &p->sinks) != 0) {
            goto fail;
        }
        problem->sinks = p->sinks.data;
    }
    if (dhsa_py_int(args[13], "precision", 0, DHSA_PRECISION_MEDIUM, &precision) != 0) {
        goto fail;
    }
    problem->precision = (dhsa_precision)precision;
    return 0;
fail:
    dhsa_py_problem_release(p);
    return -1;
}

void dhsa_py_problem_release(dhsa_py_problem *p)
{
    dhsa_py_view *const views[] = {&p->q, &p->k, &p->v, &p->out, &p->lse, &p->key_ranges, &p->sinks};
    for (size_t i = 0; i < sizeof views / sizeof *views; i++) {
        dhsa_py_view_release(views[i]);
    }
}

/* Checks that an object is a tuple of `size` items. Only Python files of this package make such tuples, so the
 * message is for their authors. */
static int check_tuple(PyObject *tuple, const char *name, Py_ssize_t size)
{
    if (!PyTuple_Check(tuple)) {
        return dhsa_py_wrong_type(name, "a tuple", tuple);
    }
    if (PyTuple_Size(tuple) != size) {
        PyErr_Format(PyExc_TypeError, "%s: expected a tuple of %zd items, got %zd", name, size, PyTuple_Size(tuple));
        return -1;
    }
    return 0;
}

/* One of a network's weights. */
typedef struct {
    const char *name;
    int ndim;
    const float **data; /* where its address goes; NULL: nowhere */
} weight;

/* shape: -1 where any size will do. */
static int weight_open(const dhsa_py_state *state, PyObject *object, const weight *w, const int64_t *shape,
                       dhsa_py_view *view)
{
    if (dhsa_py_array_open(state, object, w->name, DL_FLOAT, 32, w->ndim, shape, 0, view) != 0) {
        return -1;
    }
    if (w->data != NULL) {
        *w->data = view->data;
    }
    return 0;
}

/* Sizes are taken from the weights: width and channels from the rows and columns of the first, pooled and hidden
 * from the rows of the third and the fifth. */
static int compact_open(const dhsa_py_state *state, PyObject *tuple, dhsa_py_predictor *p)
{
    dhsa_compact *w = &p->small;
    const weight weights[] = {{"project.weight", 2, &w->project_weight}, {"project.bias", 1, &w->project_bias},
                              {"token.weight", 2, &w->token_weight},     {"token.bias", 1, &w->token_bias},
                              {"head.0.weight", 2, &w->head0_weight},    {"head.0.bias", 1, &w->head0_bias},
                              {"head.2.weight", 2, &w->head2_weight},    {"head.2.bias", 1, NULL}};
    if (dhsa_py_int(PyTuple_GetItem(tuple, 0), "window", 1, INT32_MAX, &w->window) != 0) {
        return -1;
    }
    for (int i = 0; i < 8; i++) {
        const int64_t r = w->width, m = w->pooled, n = w->hidden;
        const int64_t shapes[8][2] = {{-1, -1}, {r, 0}, {-1, 2 * r}, {m, 0}, {-1, 3 * m}, {n, 0}, {1, n}, {1, 0}};
        if (weight_open(state, PyTuple_GetItem(tuple, 1 + i), &weights[i], shapes[i], &p->arrays[i]) != 0) {
            dhsa_py_predictor_release(p);
            return -1;
        }
        if (i == 0) {
            w->width = p->arrays[0].shape[0];
            w->channels = p->arrays[0].shape[1];
        } else if (i == 2) {
            w->pooled = p->arrays[2].shape[0];
        } else if (i == 4) {
            w->hidden = p->arrays[4].shape[0];
        }
    }
    memcpy(&w->head2_bias, p->arrays[7].data, sizeof w->head2_bias);
    p->compact = w;
    return 0;
}

int dhsa_py_predictor_open(const dhsa_py_state *state, PyObject *tuple, dhsa_py_predictor *p)
{
    memset(p, 0, sizeof *p);
    if (PyTuple_Check(tuple) && PyTuple_Size(tuple) == 9) {
        return compact_open(state, tuple, p);
    }
    dhsa_predictor *w = &p->predictor;
    if (check_tuple(tuple, "predictor", 2 + DHSA_PY_PREDICTOR_ARRAYS) != 0 ||
        dhsa_py_int(PyTuple_GetItem(tuple, 0), "heads", 1, INT32_MAX, &w->heads) != 0 ||
        dhsa_py_int(PyTuple_GetItem(tuple, 1), "window", 1, INT32_MAX, &w->window) != 0) {
        return -1;
    }
    /* The gate may be None. Channels are known after the first, hidden after the eighth, by the -1 below. */
    const weight weights[DHSA_PY_PREDICTOR_ARRAYS] = {{"enc.mha.in_proj_weight", 2, &w->in_proj_weight},
                                                      {"enc.mha.in_proj_bias", 1, &w->in_proj_bias},
                                                      {"enc.mha.out_proj.weight", 2, &w->out_proj_weight},
                                                      {"enc.mha.out_proj.bias", 1, &w->out_proj_bias},
                                                      {"enc.norm.weight", 1, &w->norm_weight},
                                                      {"enc.norm.bias", 1, &w->norm_bias},
                                                      {"pool.gate.weight", 2, &w->gate_weight},
                                                      {"mlp.0.weight", 2, &w->mlp0_weight},
                                                      {"mlp.0.bias", 1, &w->mlp0_bias},
                                                      {"mlp.2.weight", 2, &w->mlp2_weight},
                                                      {"mlp.2.bias", 1, NULL}};
    for (int i = 0; i < DHSA_PY_PREDICTOR_ARRAYS; i++) {
        PyObject *item = PyTuple_GetItem(tuple, 2 + i);
        if (i == 6 && item == Py_None) {
            continue;
        }
        const int64_t c = w->channels, n = w->hidden;
        const int64_t shapes[DHSA_PY_PREDICTOR_ARRAYS][2] = {{-1, -1}, {3 * c, 0},      {c, c}, {c, 0}, {c, 0}, {c, 0},
                                                             {1, c},   {-1, 4 * c + 1}, {n, 0}, {1, n}, {1, 0}};
        if (weight_open(state, item, &weights[i], shapes[i], &p->arrays[i]) != 0) {
            goto fail;
        }
        if (i == 0) {
            w->channels = p->arrays[0].shape[1];
            if (w->channels < 1 || w->channels > INT32_MAX || p->arrays[0].shape[0] != 3 * w->channels) {
                PyErr_Format(PyExc_ValueError, "%s: expected [3C, C], got [%lld, %lld]", weights[0].name,
                             (long long)p->arrays[0].shape[0], (long long)p->arrays[0].shape[1]);
                goto fail;
            }
        } else if (i == 7) {
            w->hidden = p->arrays[7].shape[0];
            if (w->hidden < 1) {
                PyErr_Format(PyExc_ValueError, "%s: has no rows", weights[7].name);
                goto fail;
            }
        }
    }
    memcpy(&w->mlp2_bias, p->arrays[10].data, sizeof w->mlp2_bias);
    p->attention = w;
    return 0;
fail:
    dhsa_py_predictor_release(p);
    return -1;
}

void dhsa_py_predictor_release(dhsa_py_predictor *p)
{
    for (int i = 0; i < DHSA_PY_PREDICTOR_ARRAYS; i++) {
        dhsa_py_view_release(&p->arrays[i]);
    }
}

PyObject *dhsa_py_raise_as(PyObject *type, const dhsa_error *error)
{
    /* The message may contain a value from the environment, which may hold any bytes. */
    PyObject *message = PyUnicode_DecodeUTF8(error->message, (Py_ssize_t)strlen(error->message), "backslashreplace");
    if (message != NULL) {
        PyErr_SetObject(type, message);
        Py_DECREF(message);
    }
    return NULL;
}

PyObject *dhsa_py_raise(const dhsa_error *error)
{
    PyObject *type = PyExc_RuntimeError;
    switch (error->status) {
    case DHSA_OK:
        break;
    case DHSA_ERR_VALUE:
        type = PyExc_ValueError;
        break;
    case DHSA_ERR_TYPE:
        type = PyExc_TypeError;
        break;
    case DHSA_ERR_NOT_IMPLEMENTED:
        type = PyExc_NotImplementedError;
        break;
    case DHSA_ERR_NO_MEMORY:
        type = PyExc_MemoryError;
        break;
    }
    return dhsa_py_raise_as(type, error);
}

PyObject *dhsa_py_result(dhsa_status status, const dhsa_error *error)
{
    if (status != DHSA_OK) {
        return dhsa_py_raise(error);
    }
    /* The core does not stop midway. A Ctrl-C that arrived during the call raises its exception here. */
    if (PyErr_CheckSignals() != 0) {
        return NULL;
    }
    Py_RETURN_NONE;
}

int dhsa_py_count(const char *function, Py_ssize_t have, Py_ssize_t want)
{
    if (have != want) {
        PyErr_Format(PyExc_TypeError, "%s: expected %zd positional arguments, got %zd", function, want, have);
        return -1;
    }
    return 0;
}

int dhsa_py_threads(PyObject *object, int *threads)
{
    int64_t value = 0;
    if (dhsa_py_int(object, "num_threads", 1, DHSA_MAX_THREADS, &value) != 0) {
        return -1;
    }
    *threads = (int)value;
    return 0;
}

int dhsa_py_input(const dhsa_py_state *state, PyObject *object, const char *name, dhsa_py_view *view,
                  dhsa_tensor *tensor)
{
    const char *axes = *name == 'q' ? "[B, H, Lq, D]" : "[B, Hkv, Lk, D]";
    return dhsa_py_view_open(state, object, name, view) == 0 && dhsa_py_view_tensor(view, name, axes, 0, tensor) == 0
               ? 0
               : -1;
}
