/* Template (ELEM, FN, see kernels.c): the gated MLP of each expert over its tokens, weighted and summed per token.
 *
 * Each hit expert's weights are read once. First every expert's h = silu(gate · x) · (up · x), split by rows of all
 * experts; then, after a barrier, rows of the output, each thread walking down the experts in ascending order with its
 * sums in fp32: no atomics, and one order of summation whatever the batch or the number of threads. */

typedef struct {
    const ELEM *x, *gate_up, *down;
    const float *weight; /* [tokens, top_k], or NULL: one expert, all tokens, weight 1 */
    ELEM *h, *y;         /* h [pairs, inner], pairs sorted by expert, then by token */
    float *sums;         /* [threads, tokens, unit] */
    const long *hit;     /* experts with a token, ascending */
    const long *first;   /* of expert e, the first of its pairs; first[experts] = pairs */
    const long *pair;    /* token · top_k + k, by sorted position */
    long hits, tokens, hidden, inner, top_k;
    long up_unit, down_unit, next_up, next_down;
} FN(experts_job);

static void FN(expert_up)(FN(experts_job) *job, long expert, long row, long rows) {
    const ELEM *gate = job->gate_up + (expert * 2 * job->inner + row) * job->hidden;
    const ELEM *up = gate + job->inner * job->hidden;
    long end = job->first[expert + 1], steps = (rows + 1) / 2;
    for (long t = job->first[expert], n; t < end; t += n) {
        const ELEM *x[TOKENS];
        float gates[TOKENS][UNIT], ups[TOKENS][UNIT];
        n = tile_tokens(end - t);
        for (long j = 0; j < n; j++) x[j] = job->x + job->pair[t + j] / job->top_k * job->hidden;
        for (long i = 0; i < steps; i++) {
            long other = min_long(steps + i, rows - 1);
            const ELEM *w[ROWS] = {gate + i * job->hidden, gate + other * job->hidden, up + i * job->hidden,
                                   up + other * job->hidden};
            vfloat4 dot[TOKENS];
            FN(tile)(w, x, job->hidden, n, dot);
            for (long j = 0; j < n; j++) {
                gates[j][i] = dot[j][0], gates[j][other] = dot[j][1];
                ups[j][i] = dot[j][2], ups[j][other] = dot[j][3];
            }
        }
        for (long j = 0; j < n; j++) {
            ELEM *h = job->h + (t + j) * job->inner + row;
            for (long i = 0; i < rows; i++) h[i] = FN(store)(silu_f32(gates[j][i]) * ups[j][i]);
        }
    }
}

static void FN(expert_down)(FN(experts_job) *job, long row, long rows, vfloat4 *sums) {
    long steps = spread_steps(rows);
    memset(sums, 0, (size_t)(job->tokens * steps) * sizeof *sums);
    for (long e = 0; e < job->hits; e++) {
        long expert = job->hit[e], end = job->first[expert + 1];
        const ELEM *down = job->down + (expert * job->hidden + row) * job->inner;
        for (long t = job->first[expert], n; t < end; t += n) {
            const ELEM *h[TOKENS];
            n = tile_tokens(end - t);
            for (long j = 0; j < n; j++) h[j] = job->h + (t + j) * job->inner;
            for (long i = 0; i < steps; i++) {
                const ELEM *w[ROWS];
                vfloat4 dot[TOKENS];
                for (int lane = 0; lane < ROWS; lane++) w[lane] = down + spread_row(rows, i, lane) * job->inner;
                FN(tile)(w, h, job->inner, n, dot);
                for (long j = 0; j < n; j++) {
                    long pair = job->pair[t + j];
                    sums[pair / job->top_k * steps + i] += dot[j] * (job->weight ? job->weight[pair] : 1.0f);
                }
            }
        }
    }
    for (long t = 0; t < job->tokens; t++)
        for (long i = 0; i < steps; i++)
            for (int lane = 0; lane < ROWS; lane++)
                job->y[t * job->hidden + row + spread_row(rows, i, lane)] = FN(store)(sums[t * steps + i][lane]);
}

static void FN(experts_work)(void *p) {
    FN(experts_job) *job = p;
    long per_expert = (job->inner + job->up_unit - 1) / job->up_unit;
    for (long unit; (unit = team_claim(&job->next_up, 1)) < job->hits * per_expert;) {
        long row = unit % per_expert * job->up_unit;
        FN(expert_up)(job, job->hit[unit / per_expert], row, min_long(job->up_unit, job->inner - row));
    }
    team_barrier();
    vfloat4 *sums = (vfloat4 *)job->sums + team_thread() * job->tokens * (UNIT / ROWS);
    for (long row; (row = team_claim(&job->next_down, job->down_unit)) < job->hidden;)
        FN(expert_down)(job, row, min_long(job->down_unit, job->hidden - row), sums);
}

/* x [tokens, hidden], weight and expert [tokens, top_k] (or both NULL: the one expert serves every token with weight 1
 * and top_k is 1), gate_up [experts, 2 · inner, hidden], down [experts, hidden, inner], y [tokens, hidden]; contiguous.
 * An expert outside [0, experts) adds nothing. Returns 0, or 1 where memory ran out. */
int FN(experts)(const ELEM *x, const float *weight, const int64_t *expert, const ELEM *gate_up, const ELEM *down,
                ELEM *y, long tokens, long top_k, long experts, long hidden, long inner, long threads) {
    long pairs = tokens * top_k, hits = 0;
    threads = team_size(pairs * 3 * inner * hidden, threads);
    long *index = malloc((size_t)(2 * experts + 1 + pairs) * sizeof *index);
    void *sums = NULL;
    if (posix_memalign(&sums, 64, (size_t)(threads * tokens * UNIT) * sizeof(float))) sums = NULL;
    ELEM *h = malloc((size_t)(pairs * inner) * sizeof *h);
    int failed = !index || !sums || !h;
    if (!failed) {
        long *first = index, *hit = first + experts + 1, *pair = hit + experts;
        memset(first, 0, (size_t)(experts + 1) * sizeof *first);
        for (long p = 0; p < pairs; p++) {
            long e = expert ? expert[p] : 0;
            if (e >= 0 && e < experts) first[e + 1]++;
        }
        for (long e = 0; e < experts; e++) {
            if (first[e + 1]) hit[hits++] = e;
            first[e + 1] += first[e];
        }
        /* Filling moves each start to its expert's end, which is where the next one starts: move them back after. */
        for (long p = 0; p < pairs; p++) {
            long e = expert ? expert[p] : 0;
            if (e >= 0 && e < experts) pair[first[e]++] = p;
        }
        memmove(first + 1, first, (size_t)experts * sizeof *first);
        first[0] = 0;
        FN(experts_job) job = {.x = x, .gate_up = gate_up, .down = down, .weight = weight, .h = h, .y = y,
                               .sums = sums, .hit = hit, .first = first, .pair = pair, .hits = hits,
                               .tokens = tokens, .hidden = hidden, .inner = inner, .top_k = top_k,
                               .up_unit = unit_rows(2 * hidden * sizeof(ELEM), hits * inner, threads),
                               .down_unit = unit_rows(inner * sizeof(ELEM), hidden, threads)};
        team_run(FN(experts_work), &job, threads);
    }
    free(index), free(sums), free(h);
    return failed;
}
