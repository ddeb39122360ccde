/* test_threads.c: what platform.h promises, on any system: locks exclude, conditions wake, what is done once is done
 * once, memory is aligned; and the pool: every task runs once, for several callers at the same time. Prints the number
 * of checks; exits with 1 at the first check that fails. Needs core/ only, so that it can be cross-compiled and
 * emulated. */
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/internal.h"
#include "core/platform.h"
#include "core/threads.h"

enum { STARTED = 4, ROUNDS = 2000, JOBS = 300, TASKS = 37 };

static int checks;

static void require(int good, const char *what, int line)
{
    checks++;
    if (good) return;
    printf("line %d: %s\n", line, what);
    fflush(stdout);
    exit(1);
}
#define REQUIRE(condition) require(condition, #condition, __LINE__)

static dhsa_mutex lock = DHSA_MUTEX_INIT;
static dhsa_condition ended = DHSA_CONDITION_INIT;
static int64_t counted, done; /* guarded by the lock */

static dhsa_once_flag flag = DHSA_ONCE_INIT;
static atomic_int prepared;
static void prepare(void) { atomic_fetch_add(&prepared, 1); }

static void finish(void)
{
    dhsa_mutex_lock(&lock);
    done++;
    dhsa_condition_signal(&ended);
    dhsa_mutex_unlock(&lock);
}

static dhsa_thread_result count(void *argument)
{
    dhsa_once(&flag, prepare);
    for (int i = 0; i < ROUNDS; i++) {
        if (i % 2) {
            dhsa_mutex_lock(&lock);
        } else {
            while (!dhsa_mutex_try(&lock)) continue;
        }
        counted += *(int *)argument;
        dhsa_mutex_unlock(&lock);
    }
    finish();
    return 0;
}

typedef struct {
    atomic_int runs[TASKS], threads[DHSA_MAX_THREADS];
} job;

static void task(void *context, int64_t index, int thread)
{
    job *j = context;
    if (atomic_fetch_add(&j->threads[thread], 1) != 0) abort(); /* two calls with one number at the same time */
    atomic_fetch_add(&j->runs[index], 1);
    atomic_fetch_sub(&j->threads[thread], 1);
}

static atomic_int wrong;

static dhsa_thread_result jobs(void *argument)
{
    job *j = argument;
    for (int i = 0; i < JOBS; i++) {
        memset(j, 0, sizeof *j);
        const int64_t tasks = i % (TASKS + 1);
        dhsa_parallel(tasks, 1 + i % 5, task, j);
        for (int64_t at = 0; at < TASKS; at++)
            if (atomic_load(&j->runs[at]) != (at < tasks)) atomic_fetch_add(&wrong, 1);
    }
    finish();
    return 0;
}

/* Starts STARTED threads and waits until all have finished. */
static void in_threads(dhsa_thread_result (*work)(void *), char *arguments, size_t step)
{
    done = 0;
    for (size_t i = 0; i < STARTED; i++) REQUIRE(dhsa_thread_start(work, arguments + i * step) == 0);
    dhsa_mutex_lock(&lock);
    while (done < STARTED) dhsa_condition_wait(&ended, &lock);
    dhsa_mutex_unlock(&lock);
}

int main(void)
{
    int steps[STARTED] = {1, 2, 3, 4};
    static job held[STARTED];
    dhsa_mutex own;
    dhsa_mutex_init(&own);
    REQUIRE(dhsa_mutex_try(&own));
    REQUIRE(!dhsa_mutex_try(&own));
    dhsa_mutex_unlock(&own);
    REQUIRE(dhsa_mutex_try(&own));
    in_threads(count, (char *)steps, sizeof *steps);
    REQUIRE(counted == ROUNDS * (1 + 2 + 3 + 4));
    REQUIRE(atomic_load(&prepared) == 1);
    in_threads(jobs, (char *)held, sizeof *held);
    REQUIRE(atomic_load(&wrong) == 0);
    for (int64_t bytes = 1; bytes < 1 << 20; bytes = bytes * 5 + 3) {
        char *memory = dhsa_alloc_zeroed(1, bytes);
        REQUIRE(memory && (uintptr_t)memory % DHSA_ALIGN == 0 && memory[0] == 0 && memory[bytes - 1] == 0);
        memset(memory, 1, (size_t)bytes);
        dhsa_free(memory);
    }
    dhsa_free(NULL);
    REQUIRE(dhsa_alloc(INT64_MAX, 2) == NULL);
    REQUIRE(dhsa_cpu_count() >= 1);
    double before = dhsa_now();
    for (int i = 0; i < 1000; i++) {
        const double now = dhsa_now();
        REQUIRE(now >= before && now < before + 60);
        before = now;
    }
    printf("%d checks\n", checks);
    return 0;
}
