/* threads.h: the thread pool of the core. Threads take tasks one at a time from a shared counter, in ascending
 * order; idle workers sleep. A task must write only its own outputs, so that results do not depend on the number of
 * threads. */
#ifndef DHSA_THREADS_H
#define DHSA_THREADS_H

#include <stdint.h>

#include "dhsa.h"

/* task(context, index, thread), 0 <= thread < num_threads. No two calls with the same `thread` run at the same time. */
typedef void (*dhsa_task)(void *context, int64_t index, int thread);

/* Runs `count` tasks on up to num_threads threads, one of which is the calling thread, and returns when all are
 * done. If another caller uses the pool, or threads cannot be created, the calling thread runs all tasks; the result
 * is the same. */
void dhsa_parallel(int64_t count, int num_threads, dhsa_task task, void *context);

#endif
