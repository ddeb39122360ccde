/* threads.h: the core's own pool. Tasks are claimed one at a time off a shared counter, in rising order; idle workers sleep.
 * A task must write only its own outputs, so that results do not depend on how many threads ran. */
#ifndef DHSA_THREADS_H
#define DHSA_THREADS_H

#include <stdint.h>

#include "dhsa.h"

/* task(context, index, thread): 0 <= thread < num_threads, no two calls with one `thread` at the same time. */
typedef void (*dhsa_task)(void *context, int64_t index, int thread);

/* Runs `count` tasks on up to num_threads threads, the calling one among them, and returns when all are done. If the pool
 * is in use by another caller, or threads cannot be made, the calling thread does all of it alone: same result. */
void dhsa_parallel(int64_t count, int num_threads, dhsa_task task, void *context);

#endif
