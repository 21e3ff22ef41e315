/* The CPU kernels of ops/cpu.py: one translation unit, each template once for bf16 and once for fp32.
 *
 * Shapes are those of ops/reference.py. Sizes are checked in Python; no kernel reads past what it was given. */
#include "vec.h"

#include "team.h"

/* A tile's rows and tokens: as many sums as the registers hold beside what is being multiplied. */
#define ROWS 4
#if defined(__AVX512BF16__)
#define TOKENS 6
#elif LANES == 8
#define TOKENS 2
#else
#define TOKENS 4
#endif

/* Rows of weights per claimed piece of work: enough bytes for long streams (256 KiB read a fifth faster than 64 KiB on
 * Zen 4), but never so many that a thread is left without work. */
#define UNIT 64
#define UNIT_BYTES (256 << 10)
#define UNITS_PER_THREAD 8

static long unit_rows(long row_bytes, long rows, long threads) {
    long unit = min_long(UNIT_BYTES / row_bytes, rows / (threads * UNITS_PER_THREAD)) / ROWS * ROWS;
    return max_long(2 * ROWS, min_long(unit, UNIT));
}

/* The rows of a unit are walked as ROWS streams: step i takes rows i, steps + i, 2 · steps + i ... The last stream may
 * be short; it then takes the last row again, which costs nothing and gives the same number. */
static long spread_steps(long rows) { return (rows + ROWS - 1) / ROWS; }
static long spread_row(long rows, long i, int lane) { return min_long(lane * spread_steps(rows) + i, rows - 1); }

/* How many of the remaining tokens the next tile takes: tiles of nearly equal size. */
static long tile_tokens(long left) {
    long tiles = (left + TOKENS - 1) / TOKENS;
    return (left + tiles - 1) / tiles;
}

/* Below this many multiplications per thread, waking a thread costs more than it brings. */
#define THREAD_WORK (128 << 10)

static long team_size(long work, long threads) {
    return max_long(1, min_long(threads, work / THREAD_WORK));
}

/* Norms, rotation and routing do several operations per element that a matrix product does not. */
#define ELEMENT_WORK 8

/* Attention: slots per softmax, queries per piece, and the register tile of the weighted sum of values. */
#define CHUNK 256
#define BLOCK_QUERIES 64
#define VALUE_QUERIES 2
#if LANES == 8
#define VALUE_PACKS 2
#else
#define VALUE_PACKS 4
#endif

#include "gate.h"
#include "softmax.h"

#define ELEM bf16
#define FN(name) name##_bf16
#include "tile.h"

#include "attention.h"
#include "experts.h"
#include "linear.h"
#include "norm.h"
#undef ELEM
#undef FN

#define ELEM float
#define FN(name) name##_f32
#include "tile.h"

#include "attention.h"
#include "experts.h"
#include "linear.h"
#include "norm.h"
#undef ELEM
#undef FN
