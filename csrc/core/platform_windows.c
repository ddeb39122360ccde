/* platform_windows.c: platform.h for Windows 10 and later. */
#if defined(_WIN32)
#include "core/platform.h"

#define WIN32_LEAN_AND_MEAN
#define NOMINMAX
#include <malloc.h>
#include <process.h>
#include <windows.h>

#include "core/internal.h"

_Static_assert(sizeof(dhsa_mutex) == sizeof(SRWLOCK), "a lock is one pointer");
_Static_assert(sizeof(dhsa_condition) == sizeof(CONDITION_VARIABLE), "a condition variable is one pointer");
_Static_assert(sizeof(dhsa_once_flag) == sizeof(INIT_ONCE), "a flag of what is done once is one pointer");

static SRWLOCK *lock_of(dhsa_mutex *mutex) { return (SRWLOCK *)&mutex->state; }
static CONDITION_VARIABLE *variable_of(dhsa_condition *condition) { return (CONDITION_VARIABLE *)&condition->state; }

void dhsa_mutex_init(dhsa_mutex *mutex) { InitializeSRWLock(lock_of(mutex)); }
void dhsa_mutex_lock(dhsa_mutex *mutex) { AcquireSRWLockExclusive(lock_of(mutex)); }
int dhsa_mutex_try(dhsa_mutex *mutex) { return TryAcquireSRWLockExclusive(lock_of(mutex)) != 0; }
void dhsa_mutex_unlock(dhsa_mutex *mutex) { ReleaseSRWLockExclusive(lock_of(mutex)); }

int dhsa_condition_init(dhsa_condition *condition)
{
    InitializeConditionVariable(variable_of(condition));
    return 0;
}

void dhsa_condition_wait(dhsa_condition *condition, dhsa_mutex *mutex)
{
    SleepConditionVariableSRW(variable_of(condition), lock_of(mutex), INFINITE, 0);
}

void dhsa_condition_signal(dhsa_condition *condition) { WakeConditionVariable(variable_of(condition)); }

typedef struct {
    void (*prepare)(void);
} once_call;

static BOOL CALLBACK once(INIT_ONCE *flag, void *call, void **context)
{
    (void)flag;
    (void)context;
    ((once_call *)call)->prepare();
    return TRUE;
}

void dhsa_once(dhsa_once_flag *flag, void (*prepare)(void))
{
    InitOnceExecuteOnce((INIT_ONCE *)&flag->state, once, &(once_call){prepare}, NULL);
}

void dhsa_after_fork(void (*handler)(void)) { (void)handler; }

int dhsa_thread_start(dhsa_thread_result (*work)(void *argument), void *argument)
{
    /* Not CreateThread: the C library then prepares what it keeps for each thread. */
    const uintptr_t thread = _beginthreadex(NULL, 0, work, argument, 0, NULL);
    if (thread == 0) return -1;
    CloseHandle((HANDLE)thread); /* the thread runs on */
    return 0;
}

void *dhsa_platform_alloc(size_t align, size_t size) { return _aligned_malloc(size, align); }
void dhsa_platform_free(void *memory) { _aligned_free(memory); }

double dhsa_now(void)
{
    LARGE_INTEGER ticks, frequency;
    QueryPerformanceFrequency(&frequency);
    QueryPerformanceCounter(&ticks);
    return (double)ticks.QuadPart / (double)frequency.QuadPart;
}

/* Windows divides more than 64 CPUs into groups. A process that runs in one of them, as all do before Windows 11, may
 * use the CPUs of its affinity mask; one that runs in several has no such mask, and may use all of theirs. */
int dhsa_cpu_count(void)
{
    USHORT groups[64], n = sizeof groups / sizeof *groups;
    if (!GetProcessGroupAffinity(GetCurrentProcess(), &n, groups)) n = 0;
    DWORD count = 0;
    if (n > 1) {
        for (USHORT i = 0; i < n; i++) count += GetActiveProcessorCount(groups[i]);
    } else {
        DWORD_PTR process, system;
        if (GetProcessAffinityMask(GetCurrentProcess(), &process, &system))
            count = (DWORD)__builtin_popcountll(process);
    }
    return count < 1 ? 1 : (int)count;
}
#endif
