/* threads.c: the thread pool. Workers are created when they are first needed, and kept. Between jobs each worker
 * waits on its own condition variable, so that a job wakes only the workers that it uses. A forked child starts
 * without workers and creates its own when it needs them. The pool only schedules tasks, whatever they compute. */
#include "core/threads.h"

#include <stdatomic.h>
#include <stddef.h>

#include "core/faults.h"
#include "core/internal.h"
#include "core/platform.h"

static struct {
    dhsa_mutex owner; /* held by the caller whose job runs; another caller does not wait for it and works alone */
    dhsa_mutex lock;  /* guards all members below except `next` */
    dhsa_condition start[DHSA_MAX_THREADS], finish; /* start[t]: wakes worker t */
    uint64_t job;                                   /* number of the job posted last */
    int wanted;                                     /* workers that the job uses: threads 1..wanted */
    int active;                                     /* those of them that are not done yet */
    int alive;                                      /* workers created so far */
    int ready;                                      /* conditions initialised so far, start[1..ready] */
    dhsa_task task;
    void *context;
    int64_t count;
    _Atomic int64_t next;
} pool = {.owner = DHSA_MUTEX_INIT, .lock = DHSA_MUTEX_INIT, .finish = DHSA_CONDITION_INIT};

static dhsa_once_flag once = DHSA_ONCE_INIT;

/* fork() copies only the calling thread. The pool of the child has no workers, and its locks may be held by threads
 * that do not exist there, so everything is initialised again. */
static void forked(void)
{
    dhsa_mutex_init(&pool.owner);
    dhsa_mutex_init(&pool.lock);
    dhsa_condition_init(&pool.finish);
    pool.alive = pool.wanted = pool.active = pool.ready = 0;
    pool.job = 0;
}

static void prepare(void) { dhsa_after_fork(forked); }

static void drain(int thread)
{
    dhsa_task task = pool.task;
    void *context = pool.context;
    const int64_t count = pool.count;
    for (;;) {
        const int64_t i = atomic_fetch_add_explicit(&pool.next, 1, memory_order_relaxed);
        if (i >= count) return;
        task(context, i, thread);
    }
}

typedef struct {
    int thread;
    uint64_t seen;
} worker_start;

static dhsa_thread_result work(void *arg)
{
    const worker_start begin = *(worker_start *)arg;
    dhsa_free(arg);
    uint64_t seen = begin.seen;
    dhsa_mutex_lock(&pool.lock);
    for (;;) {
        while (pool.job == seen || pool.wanted < begin.thread) {
            seen = pool.job;
            dhsa_condition_wait(&pool.start[begin.thread], &pool.lock);
        }
        seen = pool.job;
        dhsa_mutex_unlock(&pool.lock);
        drain(begin.thread);
        dhsa_mutex_lock(&pool.lock);
        if (--pool.active == 0) dhsa_condition_signal(&pool.finish);
    }
    return 0;
}

/* Creates workers until there are `wanted`. Both locks must be held. */
static void pool_grow(int wanted)
{
    while (pool.alive < wanted) {
        worker_start *begin = dhsa_alloc(1, sizeof *begin);
        if (!begin) return;
        begin->thread = pool.alive + 1;
        begin->seen = pool.job;
        /* A condition that was initialised for a thread that could not be started is there for the next attempt. */
        if (pool.ready < begin->thread && dhsa_condition_init(&pool.start[begin->thread]) == 0) pool.ready++;
        if (pool.ready < begin->thread || dhsa_fault(DHSA_FAULT_THREAD) || dhsa_thread_start(work, begin) != 0) {
            dhsa_free(begin);
            return;
        }
        pool.alive++;
    }
}

void dhsa_parallel(int64_t count, int num_threads, dhsa_task task, void *context)
{
    if (num_threads > DHSA_MAX_THREADS) num_threads = DHSA_MAX_THREADS;
    if (count < num_threads) num_threads = (int)count;
    dhsa_once(&once, prepare);
    if (num_threads <= 1 || !dhsa_mutex_try(&pool.owner)) {
        for (int64_t i = 0; i < count; i++) task(context, i, 0);
        return;
    }
    dhsa_mutex_lock(&pool.lock);
    pool_grow(num_threads - 1);
    pool.wanted = DHSA_MIN(num_threads - 1, pool.alive);
    pool.active = pool.wanted;
    pool.task = task;
    pool.context = context;
    pool.count = count;
    atomic_store(&pool.next, 0);
    pool.job++;
    for (int thread = 1; thread <= pool.wanted; thread++) dhsa_condition_signal(&pool.start[thread]);
    dhsa_mutex_unlock(&pool.lock);

    drain(0);

    dhsa_mutex_lock(&pool.lock);
    while (pool.active > 0) dhsa_condition_wait(&pool.finish, &pool.lock);
    dhsa_mutex_unlock(&pool.lock);
    dhsa_mutex_unlock(&pool.owner);
}
