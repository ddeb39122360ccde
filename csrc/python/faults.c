/* faults.c: the function faults of dhsa._core, in a build with DHSA_FAULTS only: lets allocations and starts of threads
 * of the core fail, for tests. */
#ifdef DHSA_FAULTS
#include "core/faults.h"

#include "python/args.h"
#include "python/entries.h"

/* From now on, allocation number `allocation` and start of a thread number `thread` fail, counted from 1; 0: none.
 * lasting: all later ones fail, too. Returns what was counted before: (pieces of memory held; since the last call:
 * allocations asked for, threads asked for, how many of both failed). */
PyObject *dhsa_py_faults(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
    (void)module;
    int64_t first[DHSA_FAULT_KINDS] = {0, 0};
    if (dhsa_py_count("faults", nargs, 3) != 0 ||
        dhsa_py_int(args[0], "allocation", 0, INT64_MAX, &first[DHSA_FAULT_ALLOCATION]) != 0 ||
        dhsa_py_int(args[1], "thread", 0, INT64_MAX, &first[DHSA_FAULT_THREAD]) != 0) {
        return NULL;
    }
    const int lasting = PyObject_IsTrue(args[2]);
    if (lasting < 0) {
        return NULL;
    }
    const dhsa_fault_counts counts = dhsa_faults_set(first, lasting);
    return Py_BuildValue("(LLLL)", (long long)counts.held, (long long)counts.asked[DHSA_FAULT_ALLOCATION],
                         (long long)counts.asked[DHSA_FAULT_THREAD],
                         (long long)(counts.failed[DHSA_FAULT_ALLOCATION] + counts.failed[DHSA_FAULT_THREAD]));
}
#endif
