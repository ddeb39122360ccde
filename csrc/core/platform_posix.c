/* platform_posix.c: platform.h for Linux, macOS and other systems with POSIX threads. */
#if !defined(_WIN32)
#include "core/platform.h"

#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>
#ifdef __linux__
#include <sched.h>
#endif

#include "core/internal.h"

void dhsa_mutex_init(dhsa_mutex *mutex) { pthread_mutex_init(mutex, NULL); }
void dhsa_mutex_lock(dhsa_mutex *mutex) { pthread_mutex_lock(mutex); }
int dhsa_mutex_try(dhsa_mutex *mutex) { return pthread_mutex_trylock(mutex) == 0; }
void dhsa_mutex_unlock(dhsa_mutex *mutex) { pthread_mutex_unlock(mutex); }

int dhsa_condition_init(dhsa_condition *condition) { return pthread_cond_init(condition, NULL) == 0 ? 0 : -1; }
void dhsa_condition_wait(dhsa_condition *condition, dhsa_mutex *mutex) { pthread_cond_wait(condition, mutex); }
void dhsa_condition_signal(dhsa_condition *condition) { pthread_cond_signal(condition); }

void dhsa_once(dhsa_once_flag *flag, void (*prepare)(void)) { pthread_once(flag, prepare); }
void dhsa_after_fork(void (*handler)(void)) { pthread_atfork(NULL, NULL, handler); }

int dhsa_thread_start(dhsa_thread_result (*work)(void *argument), void *argument)
{
    pthread_t id;
    pthread_attr_t attr;
    sigset_t all, old;
    if (pthread_attr_init(&attr) != 0) return -1;
    sigfillset(&all);
    pthread_attr_setdetachstate(&attr, PTHREAD_CREATE_DETACHED);
    pthread_sigmask(SIG_SETMASK, &all, &old); /* a thread inherits the mask of the one that creates it */
    const int failed = pthread_create(&id, &attr, work, argument) != 0;
    pthread_sigmask(SIG_SETMASK, &old, NULL);
    pthread_attr_destroy(&attr);
    return failed ? -1 : 0;
}

void *dhsa_platform_alloc(size_t align, size_t size)
{
    void *memory = NULL;
    return posix_memalign(&memory, align, size) == 0 ? memory : NULL;
}

void dhsa_platform_free(void *memory) { free(memory); }

double dhsa_now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

int dhsa_cpu_count(void)
{
#ifdef __linux__
    /* The Linux kernel refuses a CPU set smaller than its own, which has up to 8,192 CPUs; cpu_set_t has 1,024. On the
     * stack, so that the answer does not depend on whether there is memory. */
    cpu_set_t set[64];
    memset(set, 0, sizeof set);
    const int count = sched_getaffinity(0, sizeof set, set) == 0 ? CPU_COUNT_S(sizeof set, set) : 0;
    if (count) return count;
#endif
    const long n = sysconf(_SC_NPROCESSORS_ONLN);
    return n < 1 ? 1 : (int)n;
}
#endif
