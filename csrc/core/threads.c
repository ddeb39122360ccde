/* threads.c: the thread pool. Workers are made once, sleep each on a condition variable of its own between jobs, so that a job
 * wakes those that it takes and no others, and are forgotten by a
 * forked child, which makes its own when it needs them. It schedules; it knows nothing of the work. */
#include "core/threads.h"

#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stddef.h>

#include "core/internal.h"

static struct {
    pthread_mutex_t owner;                          /* held by the caller whose job runs; others find it taken and work alone */
    pthread_mutex_t lock;                           /* guards the rest but `next` */
    pthread_cond_t start[DHSA_MAX_THREADS], finish; /* start[t]: of worker t, made with it */
    uint64_t job;                                   /* number of the job last posted */
    int wanted;                                     /* workers the job takes, threads 1..wanted */
    int active;                                     /* of those, not yet done */
    int alive;                                      /* workers made so far */
    dhsa_task task;
    void *context;
    int64_t count;
    _Atomic int64_t next;
} pool = {.owner = PTHREAD_MUTEX_INITIALIZER, .lock = PTHREAD_MUTEX_INITIALIZER, .finish = PTHREAD_COND_INITIALIZER};

static pthread_once_t once = PTHREAD_ONCE_INIT;

/* fork() copies only the calling thread: the child's pool has no workers and its locks may be held by threads that
 * do not exist there. Start it afresh. */
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

/* Makes workers up to `wanted`; called with both locks held. Signals stay with the threads that Python made. */
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
