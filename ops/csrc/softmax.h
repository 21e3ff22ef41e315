/* The parts of a softmax-weighted sum that is made chunk by chunk. A part holds, for each of its queries, the maximum
 * score, the sum of the exponentials and the weighted values: [queries], [queries], [queries, dim] floats. */
#ifndef SOFTMAX_H
#define SOFTMAX_H

/* Turn `seen` scores into exp(scale · score - maximum), and what follows up to n (a multiple of 16) into 0. */
static void softmax_chunk(float *score, long seen, long n, float scale, float *maximum, float *sum) {
    float most[16], total[16] = {0};
    for (int j = 0; j < 16; j++) most[j] = -INFINITY;
    for (long i = 0; i < seen; i++) score[i] *= scale;
    for (long i = seen; i < n; i++) score[i] = -INFINITY;
    for (long i = 0; i < n; i += 16)
        for (int j = 0; j < 16; j++) most[j] = score[i + j] > most[j] ? score[i + j] : most[j];
    float top = most[0];
    for (int j = 1; j < 16; j++) top = most[j] > top ? most[j] : top;
    *maximum = top;
    *sum = 0;
    if (seen == 0) memset(score, 0, (size_t)n * sizeof *score);
    if (seen == 0) return;
    for (long i = 0; i < n; i++) score[i] = exp_f32(score[i] - top);
    for (long i = 0; i < n; i += 16)
        for (int j = 0; j < 16; j++) total[j] += score[i + j];
    for (int j = 0; j < 16; j++) *sum += total[j];
}

/* Add a later chunk's part to what the earlier ones gave. */
static void merge_parts(float *into, const float *from, long queries, long dim) {
    for (long r = 0; r < queries; r++) {
        float *value = into + 2 * queries + r * dim;
        const float *added = from + 2 * queries + r * dim;
        if (from[queries + r] == 0) continue;
        float top = into[r] > from[r] ? into[r] : from[r];
        /* exp(-inf) = 0 drops what an empty `into` holds. */
        float old = exp_f32(into[r] - top), new = exp_f32(from[r] - top);
        into[r] = top;
        into[queries + r] = into[queries + r] * old + from[queries + r] * new;
        for (long d = 0; d < dim; d++) value[d] = value[d] * old + added[d] * new;
    }
}

static void empty_part(float *part, long queries, long dim) {
    memset(part, 0, (size_t)(queries * (2 + dim)) * sizeof *part);
    for (long r = 0; r < queries; r++) part[r] = -INFINITY;
}

#endif
