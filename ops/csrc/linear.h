/* Template (ELEM, FN, see kernels.c): y = x · wᵀ + bias, and the router, whose logits stay in fp32. */

typedef struct {
    const ELEM *x, *w, *bias;
    ELEM *y;
    float *logits; /* instead of y where it is given: nothing is rounded */
    long tokens, in, out, unit, next;
} FN(linear_job);

static void FN(linear_unit)(const FN(linear_job) *job, long row, long rows) {
    const ELEM *weights = job->w + row * job->in;
    for (long t = 0, n; t < job->tokens; t += n) {
        const ELEM *x[TOKENS];
        float dots[TOKENS][UNIT];
        n = tile_tokens(job->tokens - t);
        for (long j = 0; j < n; j++) x[j] = job->x + (t + j) * job->in;
        for (long i = 0; i < spread_steps(rows); i++) {
            const ELEM *w[ROWS];
            vfloat4 dot[TOKENS];
            for (int lane = 0; lane < ROWS; lane++) w[lane] = weights + spread_row(rows, i, lane) * job->in;
            FN(tile)(w, x, job->in, n, dot);
            for (long j = 0; j < n; j++)
                for (int lane = 0; lane < ROWS; lane++) dots[j][spread_row(rows, i, lane)] = dot[j][lane];
        }
        for (long j = 0; j < n; j++) {
            long at = (t + j) * job->out + row;
            for (long i = 0; job->bias && i < rows; i++) dots[j][i] += FN(load)(job->bias[row + i]);
            if (job->logits) memcpy(job->logits + at, dots[j], (size_t)rows * sizeof(float));
            for (long i = 0; job->y && i < rows; i++) job->y[at + i] = FN(store)(dots[j][i]);
        }
    }
}

static void FN(linear_work)(void *p) {
    FN(linear_job) *job = p;
    for (long row; (row = team_claim(&job->next, job->unit)) < job->out;)
        FN(linear_unit)(job, row, min_long(job->unit, job->out - row));
}

/* x [tokens, in], w [out, in], bias [out] or NULL, y [tokens, out]; all contiguous. */
int FN(linear)(const ELEM *x, const ELEM *w, const ELEM *bias, ELEM *y, long tokens, long in, long out, long threads) {
    threads = team_size(tokens * in * out, threads);
    FN(linear_job) job = {x, w, bias, y, NULL, tokens, in, out, unit_rows(in * sizeof(ELEM), out, threads), 0};
    team_run(FN(linear_work), &job, threads);
    return 0;
}

/* x [tokens, hidden], w [experts, hidden], bias [experts] or NULL, weight and expert [tokens, top_k].
 * Products of two bf16 numbers are exact in fp32, so the bf16 tile loses nothing here. Returns 1 where memory ran out. */
int FN(moe_gate)(const ELEM *x, const ELEM *w, const float *bias, float *weight, int64_t *expert, long tokens,
                 long hidden, long experts, long top_k, long groups, long kept, long normalise, float scaling,
                 long threads) {
    float *scores = malloc((size_t)(2 * tokens * experts + tokens * groups) * sizeof *scores);
    if (!scores) return 1;
    FN(linear_job) job = {x, w, NULL, NULL, scores, tokens, hidden, experts, ROWS, 0};
    team_run(FN(linear_work), &job, team_size(tokens * hidden * experts, threads));
    gate_job gate = {scores, scores + tokens * experts, scores + 2 * tokens * experts, bias, weight, expert, tokens,
                     experts, top_k, groups, kept, normalise, 0, scaling};
    team_run(gate_work, &gate, team_size(tokens * experts * top_k, threads));
    free(scores);
    return 0;
}
