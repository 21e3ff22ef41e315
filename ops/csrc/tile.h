/* Template (ELEM, FN, see kernels.c): dot products of ROWS weight rows with up to TOKENS token rows, in registers.
 *
 * The sum for one (row, token) is made in the same order whatever stands beside it in the tile, so a token's result does
 * not depend on the batch. The four rows should be far apart and each be followed in memory by the row of the next
 * call: four long sequential streams. Neighbouring rows side by side halved the bandwidth (measured on Zen 4: 12 GB/s
 * against 24 on one thread). */

#define SUM_TILE(n) FN(tile_of)(w, x, width, n, out)

INLINE void FN(tile_of)(const ELEM *const *w, const ELEM *const *x, long width, const int tokens, vfloat4 *out) {
    vfloat sum[TOKENS][ROWS];
    UNROLL for (int t = 0; t < tokens; t++) UNROLL for (int r = 0; r < ROWS; r++) sum[t][r] = (vfloat){0};
    long i = 0;
    for (; i + FN(STEP) <= width; i += FN(STEP)) {
        FN(pack) x_pack[TOKENS];
        UNROLL for (int t = 0; t < tokens; t++) x_pack[t] = FN(pack_load)(x[t] + i);
        UNROLL for (int r = 0; r < ROWS; r++) {
            FN(pack) w_pack = FN(pack_load)(w[r] + i);
            UNROLL for (int t = 0; t < tokens; t++) sum[t][r] = FN(dot)(sum[t][r], w_pack, x_pack[t]);
        }
    }
    if (i < width) {
        /* The rest through zero-padded copies: nothing is read past the end of a row. */
        ELEM w_rest[ROWS][FN(STEP)] = {{0}}, x_rest[TOKENS][FN(STEP)] = {{0}};
        for (int r = 0; r < ROWS; r++) memcpy(w_rest[r], w[r] + i, (size_t)(width - i) * sizeof(ELEM));
        for (int t = 0; t < tokens; t++) memcpy(x_rest[t], x[t] + i, (size_t)(width - i) * sizeof(ELEM));
        UNROLL for (int t = 0; t < tokens; t++) UNROLL for (int r = 0; r < ROWS; r++) sum[t][r] =
            FN(dot)(sum[t][r], FN(pack_load)(w_rest[r]), FN(pack_load)(x_rest[t]));
    }
    UNROLL for (int t = 0; t < tokens; t++) out[t] = sum_lanes(sum[t][0], sum[t][1], sum[t][2], sum[t][3]);
}

/* out[t][r] = x[t] · w[r] for ROWS rows and 1 to TOKENS tokens, all of `width` elements. */
static void FN(tile)(const ELEM *const *w, const ELEM *const *x, long width, long tokens, vfloat4 *out) {
    switch (tokens) {
    case 1: SUM_TILE(1); break;
#if TOKENS >= 4
    case 2: SUM_TILE(2); break;
    case 3: SUM_TILE(3); break;
#endif
#if TOKENS == 6
    case 4: SUM_TILE(4); break;
    case 5: SUM_TILE(5); break;
#endif
    default: SUM_TILE(TOKENS);
    }
}

#undef SUM_TILE
