/* module.c: the module dhsa._core: method table, state, and multi-phase initialisation in the limited API (3.11+).
 * There is no global Python state, so that the module supports sub-interpreters and free threading, and declares
 * this where the Python headers can express it. */
#include <Python.h>

#include "python/args.h"
#include "python/config.h"
#include "python/entries.h"
#include "python/key_index.h"
#include "python/tensor.h"

#define METHOD(name, signature)                                                                                        \
    {#name, (PyCFunction)(void (*)(void))dhsa_py_##name, METH_FASTCALL,                                                \
     #name "(" signature ")\n--\n\nSee csrc/include/dhsa.h."},
static PyMethodDef methods[] = {DHSA_PY_ENTRIES(METHOD){NULL, NULL, 0, NULL}};
#undef METHOD

/* The limits of dhsa.h. */
static int add_limits(PyObject *module)
{
    static const struct {
        const char *name;
        long value;
    } limits[] = {{"MAX_LENGTH", DHSA_MAX_LENGTH},       {"MAX_HEAD_DIM", DHSA_MAX_HEAD_DIM},
                  {"MAX_VALUE_DIM", DHSA_MAX_VALUE_DIM}, {"MAX_THREADS", DHSA_MAX_THREADS},
                  {"MAX_STRIDE", DHSA_MAX_STRIDE},       {"DECODE_ROWS", DHSA_DECODE_ROWS}};
    for (size_t i = 0; i < sizeof limits / sizeof *limits; i++)
        if (PyModule_AddIntConstant(module, limits[i].name, limits[i].value) != 0) return -1;
    return 0;
}

static int module_exec(PyObject *module)
{
    dhsa_py_state *state = PyModule_GetState(module);
    state->name_dlpack = PyUnicode_InternFromString("__dlpack__");
    state->name_exchange = PyUnicode_InternFromString("__dlpack_c_exchange_api__");
    state->no_args = PyTuple_New(0);
    state->versioned_kwargs = Py_BuildValue("{s:(ii)}", "max_version", 1, 0);
    if (!state->name_dlpack || !state->name_exchange || !state->no_args || !state->versioned_kwargs) {
        return -1;
    }
    /* A DHSA_ISA that is not available makes the import fail; no other tier is used silently. */
    dhsa_error error;
    if (dhsa_isa_set("auto", &error) != DHSA_OK) {
        dhsa_py_raise_as(PyExc_ImportError, &error);
        return -1;
    }
    if (add_limits(module) != 0) return -1;
    PyObject *buffer = dhsa_py_buffer_type(module);
    const int result = buffer == NULL ? -1 : PyModule_AddObjectRef(module, "Buffer", buffer);
    Py_XDECREF(buffer);
    state->key_index_type = dhsa_py_key_index_type(module);
    state->config_type = dhsa_py_config_type(module);
    if (result != 0 || state->key_index_type == NULL || state->config_type == NULL ||
        PyModule_AddObjectRef(module, "KeyIndex", state->key_index_type) != 0 ||
        PyModule_AddObjectRef(module, "Past", state->key_index_type) != 0) { /* its former name */
        return -1;
    }
    return PyModule_AddObjectRef(module, "Config", state->config_type);
}

static int module_traverse(PyObject *module, visitproc visit, void *arg)
{
    dhsa_py_state *state = PyModule_GetState(module);
    Py_VISIT(state->versioned_kwargs);
    Py_VISIT(state->key_index_type);
    Py_VISIT(state->config_type);
    return 0;
}

static int module_clear(PyObject *module)
{
    dhsa_py_state *state = PyModule_GetState(module);
    Py_CLEAR(state->name_dlpack);
    Py_CLEAR(state->name_exchange);
    Py_CLEAR(state->no_args);
    Py_CLEAR(state->versioned_kwargs);
    Py_CLEAR(state->key_index_type);
    Py_CLEAR(state->config_type);
    return 0;
}

static void module_free(void *module) { module_clear(module); }

static PyModuleDef_Slot slots[] = {
    {Py_mod_exec, module_exec},
#ifdef Py_mod_multiple_interpreters
    {Py_mod_multiple_interpreters, Py_MOD_PER_INTERPRETER_GIL_SUPPORTED},
#endif
#ifdef Py_mod_gil
    {Py_mod_gil, Py_MOD_GIL_NOT_USED},
#endif
    {0, NULL},
};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    .m_name = "dhsa._core",
    .m_doc = "The C core of dhsa. Private: dhsa's Python functions check, allocate and call into it.",
    .m_size = sizeof(dhsa_py_state),
    .m_methods = methods,
    .m_slots = slots,
    .m_traverse = module_traverse,
    .m_clear = module_clear,
    .m_free = module_free,
};

PyMODINIT_FUNC PyInit__core(void) { return PyModuleDef_Init(&definition); }
