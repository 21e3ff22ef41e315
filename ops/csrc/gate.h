/* From router logits to chosen experts and their weights, in fp32. Ties go to the lowest index. */
#ifndef GATE_H
#define GATE_H

typedef struct {
    float *score, *biased; /* [tokens, experts]; score holds the logits at first */
    float *group;          /* [tokens, groups] */
    const float *bias;     /* [experts] or NULL */
    float *weight;         /* [tokens, top_k] */
    int64_t *expert;       /* [tokens, top_k] */
    long tokens, experts, top_k, groups, kept, normalise, next;
    float scaling;
} gate_job;

/* The sum of the two largest of n numbers, of the one where n is 1. */
static float best_two(const float *x, long n) {
    float first = x[0], second = -INFINITY;
    for (long i = 1; i < n; i++) {
        second = x[i] > first ? first : x[i] > second ? x[i] : second;
        first = x[i] > first ? x[i] : first;
    }
    return n > 1 ? first + second : first;
}

/* Index of the first largest of n numbers. */
static long best_index(const float *x, long n) {
    long best = 0;
    for (long i = 1; i < n; i++) best = x[i] > x[best] ? i : best;
    return best;
}

/* Leave only the experts of the `kept` best groups in the running. */
static void keep_groups(const gate_job *job, float *biased, float *group) {
    long size = job->experts / job->groups;
    for (long g = 0; g < job->groups; g++) group[g] = best_two(biased + g * size, size);
    for (long k = 0; k < job->kept; k++) group[best_index(group, job->groups)] = -INFINITY;
    for (long g = 0; g < job->groups; g++)
        for (long e = g * size; group[g] != -INFINITY && e < (g + 1) * size; e++) biased[e] = -INFINITY;
}

static void gate_token(const gate_job *job, long token) {
    float *score = job->score + token * job->experts, *biased = job->biased + token * job->experts, sum = 1e-20f;
    float *weight = job->weight + token * job->top_k;
    int64_t *expert = job->expert + token * job->top_k;
    for (long e = 0; e < job->experts; e++) {
        score[e] = sigmoid_f32(score[e]);
        biased[e] = job->bias ? score[e] + job->bias[e] : score[e];
    }
    if (job->groups > 1) keep_groups(job, biased, job->group + token * job->groups);
    for (long k = 0; k < job->top_k; k++) {
        expert[k] = best_index(biased, job->experts);
        biased[expert[k]] = -INFINITY;
        weight[k] = score[expert[k]];
        sum += weight[k];
    }
    for (long k = 0; k < job->top_k; k++)
        weight[k] = (job->normalise && job->top_k > 1 ? weight[k] / sum : weight[k]) * job->scaling;
}

static void gate_work(void *p) {
    gate_job *job = p;
    for (long token; (token = team_claim(&job->next, 1)) < job->tokens;) gate_token(job, token);
}

#endif
