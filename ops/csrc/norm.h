/* Template (ELEM, FN, see kernels.c): RMSNorm, with and without a residual, and the step from a fused qkv projection to
 * normalised, rotated queries and a filled cache. All of it in fp32, rounded once per result. */

/* out = x / sqrt(mean(x²) + eps) · weight; 16 partial sums, so that the loop becomes vector code in a fixed order. */
INLINE void FN(rms_norm_row)(const ELEM *x, const ELEM *weight, ELEM *out, long width, float eps) {
    float partial[16] = {0}, sum = 0;
    long i = 0;
    for (; i + 16 <= width; i += 16)
        for (int j = 0; j < 16; j++) partial[j] += FN(load)(x[i + j]) * FN(load)(x[i + j]);
    for (; i < width; i++) sum += FN(load)(x[i]) * FN(load)(x[i]);
    for (int j = 0; j < 16; j++) sum += partial[j];
    float scale = 1.0f / sqrtf(sum / (float)width + eps);
    for (i = 0; i < width; i++) out[i] = FN(store)(FN(load)(x[i]) * scale * FN(load)(weight[i]));
}

typedef struct {
    const ELEM *x, *residual, *weight;
    ELEM *out, *total;
    long rows, width, next;
    float eps;
} FN(rms_norm_job);

static void FN(rms_norm_work)(void *p) {
    FN(rms_norm_job) *job = p;
    for (long row; (row = team_claim(&job->next, 1)) < job->rows;) {
        const ELEM *x = job->x + row * job->width;
        if (job->residual) {
            const ELEM *residual = job->residual + row * job->width;
            ELEM *total = job->total + row * job->width;
            for (long i = 0; i < job->width; i++) total[i] = FN(store)(FN(load)(x[i]) + FN(load)(residual[i]));
            x = total;
        }
        FN(rms_norm_row)(x, job->weight, job->out + row * job->width, job->width, job->eps);
    }
}

/* x, out [rows, width], weight [width]; with a residual [rows, width], total = x + residual is kept and normalised. */
int FN(rms_norm)(const ELEM *x, const ELEM *residual, const ELEM *weight, ELEM *out, ELEM *total, long rows,
                 long width, float eps, long threads) {
    FN(rms_norm_job) job = {x, residual, weight, out, total, rows, width, 0, eps};
    team_run(FN(rms_norm_work), &job, team_size(rows * width * ELEMENT_WORK, threads));
    return 0;
}

typedef struct {
    const ELEM *qkv, *q_norm, *k_norm;
    const float *cos, *sin;
    ELEM *q, *k, *v;
    const int64_t *length;
    long tokens, total, heads, groups, dim, half, row_stride, head_stride, slot_stride, next;
    float eps;
} FN(rope_job);

/* Norm (where there is a weight) and rotation in the half style of one head's first 2 · half elements. */
INLINE void FN(rope_head)(const FN(rope_job) *job, const ELEM *x, const ELEM *norm, long token, ELEM *out) {
    const float *cos = job->cos + token * job->half, *sin = job->sin + token * job->half;
    if (norm)
        FN(rms_norm_row)(x, norm, out, job->dim, job->eps);
    else
        memcpy(out, x, (size_t)job->dim * sizeof(ELEM));
    for (long i = 0; i < job->half; i++) {
        float a = FN(load)(out[i]), b = FN(load)(out[i + job->half]);
        out[i] = FN(store)(a * cos[i] - b * sin[i]);
        out[i + job->half] = FN(store)(b * cos[i] + a * sin[i]);
    }
}

static void FN(rope_work)(void *p) {
    FN(rope_job) *job = p;
    for (long token; (token = team_claim(&job->next, 1)) < job->total;) {
        long row = token / job->tokens, slot = job->length[row] - job->tokens + token % job->tokens;
        const ELEM *x = job->qkv + token * (job->heads + 2 * job->groups) * job->dim;
        for (long head = 0; head < job->heads; head++, x += job->dim)
            FN(rope_head)(job, x, job->q_norm, token, job->q + (token * job->heads + head) * job->dim);
        for (long group = 0; group < job->groups; group++, x += job->dim) {
            long at = row * job->row_stride + group * job->head_stride + slot * job->slot_stride;
            FN(rope_head)(job, x, job->k_norm, token, job->k + at);
            memcpy(job->v + at, x + job->groups * job->dim, (size_t)job->dim * sizeof(ELEM));
        }
    }
}

/* qkv [rows, tokens, (heads + 2 · groups) · dim], norms [dim] or NULL, cos and sin [rows, tokens, half], caches k and v
 * by their strides in elements (equal for both), length [rows], q [rows, tokens, heads, dim].
 * Returns 1, having written nothing, where a slot lies outside [0, slots). */
int FN(rope_to_cache)(const ELEM *qkv, const ELEM *q_norm, const ELEM *k_norm, const float *cos, const float *sin,
                      ELEM *k, ELEM *v, const int64_t *length, ELEM *q, long rows, long tokens, long heads, long groups,
                      long dim, long half, long slots, long row_stride, long head_stride, long slot_stride, float eps,
                      long threads) {
    for (long row = 0; row < rows; row++)
        if (length[row] < tokens || length[row] > slots) return 1;
    FN(rope_job) job = {qkv, q_norm, k_norm, cos, sin, q, k, v, length, tokens, rows * tokens, heads, groups,
                        dim, half, row_stride, head_stride, slot_stride, 0, eps};
    team_run(FN(rope_work), &job, team_size(job.total * (heads + 2 * groups) * dim * ELEMENT_WORK, threads));
    return 0;
}
