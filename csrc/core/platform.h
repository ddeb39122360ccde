/* platform.h: what the core asks of the operating system: locks, threads, aligned memory, a clock and the number of
 * CPUs. platform_posix.c implements it for Linux and macOS, platform_windows.c for Windows; each is empty elsewhere. No
 * other file of the core includes headers of an operating system, but for kernels/cpu.c. */
#ifndef DHSA_PLATFORM_H
#define DHSA_PLATFORM_H

#include <stddef.h>

#if defined(_WIN32)
/* SRWLOCK, CONDITION_VARIABLE and INIT_ONCE, each of which is one pointer that is NULL at first. windows.h, which
 * defines many other names, is thereby included in one file only. */
typedef struct {
    void *state;
} dhsa_mutex, dhsa_condition, dhsa_once_flag;
typedef unsigned dhsa_thread_result;
#define DHSA_MUTEX_INIT {NULL}
#define DHSA_CONDITION_INIT {NULL}
#define DHSA_ONCE_INIT {NULL}
#else
#include <pthread.h>
typedef pthread_mutex_t dhsa_mutex;
typedef pthread_cond_t dhsa_condition;
typedef pthread_once_t dhsa_once_flag;
typedef void *dhsa_thread_result;
#define DHSA_MUTEX_INIT PTHREAD_MUTEX_INITIALIZER
#define DHSA_CONDITION_INIT PTHREAD_COND_INITIALIZER
#define DHSA_ONCE_INIT PTHREAD_ONCE_INIT
#endif

void dhsa_mutex_init(dhsa_mutex *mutex);
void dhsa_mutex_lock(dhsa_mutex *mutex);
int dhsa_mutex_try(dhsa_mutex *mutex); /* 1 if the mutex is now held, 0 if another thread holds it */
void dhsa_mutex_unlock(dhsa_mutex *mutex);

int dhsa_condition_init(dhsa_condition *condition); /* 0, or -1 if the system refuses */
/* Releases the mutex, sleeps and takes the mutex again. It may return without a signal. */
void dhsa_condition_wait(dhsa_condition *condition, dhsa_mutex *mutex);
void dhsa_condition_signal(dhsa_condition *condition); /* wakes one thread */

/* Calls prepare() once, whichever thread comes first; the others wait until it returns. */
void dhsa_once(dhsa_once_flag *flag, void (*prepare)(void));

/* Starts a thread that runs work(argument), whose result nobody asks for, and ends then. It receives no signals, which
 * are for Python's threads. Returns 0, or -1 if the system refuses. */
int dhsa_thread_start(dhsa_thread_result (*work)(void *argument), void *argument);

/* Calls handler() in the child of each fork() from now on. Windows has no fork. */
void dhsa_after_fork(void (*handler)(void));

/* Memory aligned to `align` bytes, a power of two, or NULL; size is a multiple of align. */
void *dhsa_platform_alloc(size_t align, size_t size);
void dhsa_platform_free(void *memory);

/* dhsa_now of internal.h and dhsa_cpu_count of dhsa.h are implemented here, too. */

#endif
