/* Template (ELEM, FN, see kernels.c): causal grouped-query attention over a cache, for one token or for many.
 *
 * A piece of work is one key/value head of one row and a block of its tokens: the queries of all heads of the group,
 * so each key and value is read once for them. The slots are walked in chunks of CHUNK from the row's start; every
 * chunk has its own softmax, and chunks are merged in order. Where there are fewer pieces than threads, the chunks of a
 * piece are shared out and merged afterwards: the same numbers in the same order. So a result depends neither on the
 * batch, nor on the padding, nor on the number of threads, nor on how a prompt was cut. */

typedef struct {
    const ELEM *q, *k, *v;
    ELEM *out;
    const int64_t *start, *length;
    long rows, tokens, groups, per_group, dim, slots, row_stride, head_stride, slot_stride;
    float scale;
    long block, blocks;   /* tokens per piece, pieces per row and group */
    long pieces, chunks;  /* chunks 1: each piece walks its own; else the chunks are shared out */
    long part;            /* floats of a part */
    float *parts;         /* [pieces, chunks] parts where chunks are shared out */
    float *scratch;       /* per thread: scores [queries, CHUNK] and two parts */
    long next, next_merge;
} FN(attention_job);

typedef struct {
    long row, group, token, tokens, queries; /* first and number of its tokens; queries = tokens · per_group */
    long begin, end;                         /* the slots that any of them sees */
    long first_end;                          /* end of the slots that the first token sees */
} FN(piece);

/* Late blocks see most slots: they come first, so that no thread is left with a long one at the end. */
static FN(piece) FN(piece_at)(const FN(attention_job) *job, long index) {
    FN(piece) p;
    long heads = job->rows * job->groups;
    p.row = index % heads / job->groups;
    p.group = index % job->groups;
    p.token = (job->blocks - 1 - index / heads) * job->block;
    p.tokens = min_long(job->block, job->tokens - p.token);
    p.queries = p.tokens * job->per_group;
    p.begin = max_long(job->start[p.row], 0);
    p.first_end = job->length[p.row] - job->tokens + p.token + 1;
    p.end = min_long(p.first_end + p.tokens - 1, job->slots);
    return p;
}

static long FN(query_at)(const FN(attention_job) *job, const FN(piece) *p, long r) {
    long token = p->row * job->tokens + p->token + r / job->per_group;
    return ((token * job->groups + p->group) * job->per_group + r % job->per_group) * job->dim;
}

/* out[query] = Σ_slot weight[query][slot] · v[slot], for `packs` packs of 2 · LANES elements of a head. */
INLINE void FN(values_of)(const ELEM *v, long stride, long slots, float *const *weight, float *const *out, long width,
                          const int queries, const int packs) {
    vpair sum[VALUE_QUERIES][VALUE_PACKS];
    ELEM rest[2 * LANES] = {0};
    UNROLL for (int q = 0; q < queries; q++) UNROLL for (int k = 0; k < packs; k++) sum[q][k] = (vpair){{0}, {0}};
    for (long s = 0; s < slots; s++, v += stride) {
        UNROLL for (int k = 0; k < packs; k++) {
            /* A head's last elements may not fill a pack; `width` is then less than the only pack's. */
            const ELEM *p = v + k * 2 * LANES;
            if (width < 2 * LANES) p = memcpy(rest, p, (size_t)width * sizeof(ELEM));
            vpair x = FN(unpack)(p);
            UNROLL for (int q = 0; q < queries; q++) {
                sum[q][k].even += weight[q][s] * x.even;
                sum[q][k].odd += weight[q][s] * x.odd;
            }
        }
    }
    UNROLL for (int q = 0; q < queries; q++) UNROLL for (int k = 0; k < packs; k++) {
        float row[2 * LANES];
        FN(repack)(row, sum[q][k]);
        memcpy(out[q] + k * 2 * LANES, row, (size_t)min_long(width, 2 * LANES) * sizeof(float));
    }
}

static void FN(values)(const ELEM *v, long stride, long slots, float *const *weight, float *const *out, long dim,
                       const int queries) {
    float *at[VALUE_QUERIES];
    for (long d = 0, width; d < dim; d += width) {
        for (int q = 0; q < queries; q++) at[q] = out[q] + d;
        width = dim - d >= 2 * LANES * VALUE_PACKS ? 2 * LANES * VALUE_PACKS : min_long(dim - d, 2 * LANES);
        if (width == 2 * LANES * VALUE_PACKS && queries == VALUE_QUERIES)
            FN(values_of)(v + d, stride, slots, weight, at, 2 * LANES, VALUE_QUERIES, VALUE_PACKS);
        else if (width == 2 * LANES * VALUE_PACKS)
            FN(values_of)(v + d, stride, slots, weight, at, 2 * LANES, 1, VALUE_PACKS);
        else if (queries == VALUE_QUERIES)
            FN(values_of)(v + d, stride, slots, weight, at, width, VALUE_QUERIES, 1);
        else
            FN(values_of)(v + d, stride, slots, weight, at, width, 1, 1);
    }
}

/* The part that the slots [begin, begin + n) give to the piece's queries. */
static void FN(attend_chunk)(const FN(attention_job) *job, const FN(piece) *p, long begin, float *score, float *part) {
    long n = min_long(CHUNK, p->end - begin), padded = (n + 15) / 16 * 16, steps = spread_steps(n);
    long head = p->row * job->row_stride + p->group * job->head_stride + begin * job->slot_stride;
    const ELEM *k = job->k + head, *v = job->v + head;
    for (long r = 0, count; r < p->queries; r += count) {
        const ELEM *q[TOKENS];
        count = tile_tokens(p->queries - r);
        for (long j = 0; j < count; j++) q[j] = job->q + FN(query_at)(job, p, r + j);
        for (long i = 0; i < steps; i++) {
            const ELEM *w[ROWS];
            vfloat4 dot[TOKENS];
            for (int lane = 0; lane < ROWS; lane++) w[lane] = k + spread_row(n, i, lane) * job->slot_stride;
            FN(tile)(w, q, job->dim, count, dot);
            for (long j = 0; j < count; j++)
                for (int lane = 0; lane < ROWS; lane++) score[(r + j) * CHUNK + spread_row(n, i, lane)] = dot[j][lane];
        }
    }
    for (long r = 0; r < p->queries; r++) {
        long seen = max_long(0, min_long(n, p->first_end + r / job->per_group - begin));
        softmax_chunk(score + r * CHUNK, seen, padded, job->scale, part + r, part + p->queries + r);
    }
    for (long r = 0, count; r < p->queries; r += count) {
        float *weight[VALUE_QUERIES], *out[VALUE_QUERIES];
        count = p->queries - r >= VALUE_QUERIES ? VALUE_QUERIES : 1;
        for (long j = 0; j < count; j++) {
            weight[j] = score + (r + j) * CHUNK;
            out[j] = part + 2 * p->queries + (r + j) * job->dim;
        }
        FN(values)(v, job->slot_stride, n, weight, out, job->dim, (int)count);
    }
}

static void FN(finish_piece)(const FN(attention_job) *job, const FN(piece) *p, const float *part) {
    for (long r = 0; r < p->queries; r++) {
        ELEM *out = job->out + FN(query_at)(job, p, r);
        float sum = part[p->queries + r];
        const float *value = part + 2 * p->queries + r * job->dim;
        for (long d = 0; d < job->dim; d++) out[d] = FN(store)(sum == 0 ? 0 : value[d] / sum);
    }
}

static void FN(attention_work)(void *context) {
    FN(attention_job) *job = context;
    long scores = job->block * job->per_group * CHUNK;
    float *score = job->scratch + team_thread() * (scores + 2 * job->part);
    float *whole = score + scores, *added = whole + job->part;
    for (long unit; (unit = team_claim(&job->next, 1)) < job->pieces * job->chunks;) {
        FN(piece) p = FN(piece_at)(job, unit / job->chunks);
        long begin = p.begin + unit % job->chunks * CHUNK;
        if (job->chunks > 1) {
            if (begin < p.end) FN(attend_chunk)(job, &p, begin, score, job->parts + unit * job->part);
            continue;
        }
        empty_part(whole, p.queries, job->dim);
        for (; begin < p.end; begin += CHUNK) {
            FN(attend_chunk)(job, &p, begin, score, added);
            merge_parts(whole, added, p.queries, job->dim);
        }
        FN(finish_piece)(job, &p, whole);
    }
    if (job->chunks == 1) return;
    team_barrier();
    for (long piece; (piece = team_claim(&job->next_merge, 1)) < job->pieces;) {
        FN(piece) p = FN(piece_at)(job, piece);
        empty_part(whole, p.queries, job->dim);
        for (long c = 0; p.begin + c * CHUNK < p.end; c++)
            merge_parts(whole, job->parts + (piece * job->chunks + c) * job->part, p.queries, job->dim);
        FN(finish_piece)(job, &p, whole);
    }
}

/* q and out [rows, tokens, groups · per_group, dim] contiguous, k and v [rows, groups, slots, dim] by their strides in
 * elements (equal for both, dim contiguous), start and length [rows]. Returns 1 where memory ran out. */
int FN(attention)(const ELEM *q, const ELEM *k, const ELEM *v, ELEM *out, const int64_t *start, const int64_t *length,
                  long rows, long tokens, long groups, long per_group, long dim, long slots, long row_stride,
                  long head_stride, long slot_stride, float scale, long threads) {
    FN(attention_job) job = {.q = q, .k = k, .v = v, .out = out, .start = start, .length = length, .rows = rows,
                             .tokens = tokens, .groups = groups, .per_group = per_group, .dim = dim, .slots = slots,
                             .row_stride = row_stride, .head_stride = head_stride, .slot_stride = slot_stride,
                             .scale = scale, .chunks = 1};
    job.block = min_long(tokens, max_long(1, BLOCK_QUERIES / per_group));
    job.blocks = (tokens + job.block - 1) / job.block;
    job.pieces = rows * groups * job.blocks;
    job.part = job.block * per_group * (2 + dim);
    long longest = 0, seen = 0;
    for (long r = 0; r < rows; r++) {
        long n = max_long(0, min_long(length[r], slots) - max_long(start[r], 0));
        longest = max_long(longest, n);
        seen += n;
    }
    threads = team_size(seen * tokens * groups * per_group * dim * 2, threads);
    if (job.pieces < threads) job.chunks = max_long(1, (longest + CHUNK - 1) / CHUNK);
    long per_thread = job.block * per_group * CHUNK + 2 * job.part;
    long shared = job.chunks > 1 ? job.pieces * job.chunks * job.part : 0;
    job.scratch = malloc((size_t)(threads * per_thread + shared) * sizeof(float));
    if (!job.scratch) return 1;
    job.parts = job.scratch + threads * per_thread;
    team_run(FN(attention_work), &job, threads);
    free(job.scratch);
    return 0;
}
