/* threads.c: the thread pool. Workers are created when they are first needed, and kept. Between jobs each worker
 * waits on its own condition variable, so that a job wakes only the workers that it uses. A forked child starts
 * without workers and creates its own when it needs them. The pool only schedules tasks, whatever they compute. */
#include "core/threads.h"

#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stddef.h>

#include "core/internal.h"

static struct {
    pthread_mutex_t owner; /* held by the caller whose job runs; another caller does not wait for it and works alone */
    pthread_mutex_t lock;  /* guards all members below except `next` */
    pthread_cond_t start[DHSA_MAX_THREADS], finish; /* start[t]: wakes worker t, and is created with it */
    uint64_t job;                                   /* number of the job posted last */
    int wanted;                                     /* workers that the job uses: threads 1..wanted */
    int active;                                     /* those of them that are not done yet */
    int alive;                                      /* workers created so far */
    dhsa_task task;
    void *context;
    int64_t count;
    _Atomic int64_t next;
} pool = {.owner = PTHREAD_MUTEX_INITIALIZER, .lock = PTHREAD_MUTEX_INITIALIZER, .finish = PTHREAD_COND_INITIALIZER};

static pthread_once_t once = PTHREAD_ONCE_INIT;

/* fork() copies only the calling thread. The pool of the child has no workers, and its locks may be held by threads
 * that do not exist there, so everything is initialised again. */
static void forked(void)
{
    pthread_mutex_init(&pool.owner, NULL);
    pthread_mutex_init(&pool.lock, NULL);
    pthread_cond_init(&pool.finish, NULL);
    pool.alive = pool.wanted = pool.active = 0;
    pool.job = 0;
}

static void prepare(void) { pthread_atfork(NULL, NULL, forked); }

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

static void *work(void *arg)
{
    const worker_start begin = *(worker_start *)arg;
    dhsa_free(arg);
    uint64_t seen = begin.seen;
    pthread_mutex_lock(&pool.lock);
    for (;;) {
        while (pool.job == seen || pool.wanted < begin.thread) {
            seen = pool.job;
            pthread_cond_wait(&pool.start[begin.thread], &pool.lock);
        }
        seen = pool.job;
        pthread_mutex_unlock(&pool.lock);
        drain(begin.thread);
        pthread_mutex_lock(&pool.lock);
        if (--pool.active == 0) pthread_cond_signal(&pool.finish);
    }
    return NULL;
}

/* Creates workers until there are `wanted`. Both locks must be held. Workers block all signals, so that signals go
 * to the threads of Python. */
static void pool_grow(int wanted)
{
    sigset_t all, old;
    sigfillset(&all);
    pthread_attr_t attr;
    if (pool.alive >= wanted || pthread_attr_init(&attr) != 0) return;
    pthread_attr_setdetachstate(&attr, PTHREAD_CREATE_DETACHED);
    pthread_sigmask(SIG_SETMASK, &all, &old);
    while (pool.alive < wanted) {
        pthread_t id;
        worker_start *begin = dhsa_alloc(1, sizeof *begin);
        if (!begin) break;
        begin->thread = pool.alive + 1;
        begin->seen = pool.job;
        if (pthread_cond_init(&pool.start[begin->thread], NULL) != 0) {
            dhsa_free(begin);
            break;
        }
        if (pthread_create(&id, &attr, work, begin) != 0) {
            dhsa_free(begin);
            break;
        }
        pool.alive++;
    }
    pthread_sigmask(SIG_SETMASK, &old, NULL);
    pthread_attr_destroy(&attr);
}

void dhsa_parallel(int64_t count, int num_threads, dhsa_task task, void *context)
{
    if (num_threads > DHSA_MAX_THREADS) num_threads = DHSA_MAX_THREADS;
    if (count < num_threads) num_threads = (int)count;
    pthread_once(&once, prepare);
    if (num_threads <= 1 || pthread_mutex_trylock(&pool.owner) != 0) {
        for (int64_t i = 0; i < count; i++) task(context, i, 0);
        return;
    }
    pthread_mutex_lock(&pool.lock);
    pool_grow(num_threads - 1);
    pool.wanted = DHSA_MIN(num_threads - 1, pool.alive);
    pool.active = pool.wanted;
    pool.task = task;
    pool.context = context;
    pool.count = count;
    atomic_store(&pool.next, 0);
    pool.job++;
    for (int thread = 1; thread <= pool.wanted; thread++) pthread_cond_signal(&pool.start[thread]);
    pthread_mutex_unlock(&pool.lock);

    drain(0);

    pthread_mutex_lock(&pool.lock);
    while (pool.active > 0) pthread_cond_wait(&pool.finish, &pool.lock);
    pthread_mutex_unlock(&pool.lock);
    pthread_mutex_unlock(&pool.owner);
}
