/* A team of threads over the OpenMP runtime that torch itself has loaded: a second runtime would bring a second pool of
 * spinning threads to the same cores. Its entry points are handed over by address (`team_init`), so nothing is linked,
 * and any compiler will do. Work is claimed piece by piece: a thread that starts late or is interrupted does less. */
#ifndef TEAM_H
#define TEAM_H

typedef void (*team_work)(void *job);

static void (*runtime_parallel)(team_work work, void *job, unsigned threads, unsigned flags);
static void (*runtime_barrier)(void);
static int (*runtime_thread)(void);

/* Addresses of `GOMP_parallel`, `GOMP_barrier` and `omp_get_thread_num`; without this call all work is done alone. */
void team_init(void *parallel, void *barrier, void *thread) {
    memcpy(&runtime_parallel, &parallel, sizeof parallel);
    memcpy(&runtime_barrier, &barrier, sizeof barrier);
    memcpy(&runtime_thread, &thread, sizeof thread);
}

static void team_run(team_work work, void *job, long threads) {
    if (threads > 1 && runtime_parallel)
        runtime_parallel(work, job, (unsigned)threads, 0);
    else
        work(job);
}

/* All threads of the team have done what stands before it. Outside a team the runtime returns at once. */
static void team_barrier(void) {
    if (runtime_barrier) runtime_barrier();
}

static int team_thread(void) { return runtime_thread ? runtime_thread() : 0; }

/* The first of the next `step` pieces of work; `next` is the job's counter, starting at 0. */
static long team_claim(long *next, long step) { return __atomic_fetch_add(next, step, __ATOMIC_RELAXED); }

#endif
