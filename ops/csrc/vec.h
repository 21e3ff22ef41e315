/* Vectors, number formats and the functions of them that the kernels share: plain C with GCC vector extensions, which
 * become AVX2, AVX-512 or NEON by the compiler's own choice, and one fast path: the bf16 dot product of AVX512-BF16. */
#ifndef VEC_H
#define VEC_H

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 8")

#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX2__)
#define LANES 8
#else
#define LANES 4
#endif

typedef uint16_t bf16;
typedef float vfloat __attribute__((vector_size(4 * LANES)));
typedef uint32_t vuint __attribute__((vector_size(4 * LANES)));
typedef float vfloat4 __attribute__((vector_size(16)));

INLINE float bits_to_float(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

INLINE uint32_t float_to_bits(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

INLINE float load_bf16(bf16 x) { return bits_to_float((uint32_t)x << 16); }

/* Round to nearest, ties to even; NaN stays NaN. */
INLINE bf16 store_bf16(float x) {
    uint32_t bits = float_to_bits(x);
    uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return (bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : (bf16)rounded;
}

INLINE float load_f32(float x) { return x; }
INLINE float store_f32(float x) { return x; }

/* What one step of a dot product takes: a `pair` holds 2 · LANES bf16 numbers, a `vfloat` LANES floats. The portable
 * pair is unpacked by one shift and one mask into its even and its odd numbers, so no lane has to move. */
#define STEP_bf16 (2 * LANES)
#define STEP_f32 LANES
typedef struct {
    vfloat even, odd;
} vpair;

INLINE vpair unpack_bf16(const bf16 *p) {
    vuint both;
    memcpy(&both, p, sizeof both);
    return (vpair){(vfloat)(both << 16), (vfloat)(both & 0xffff0000u)};
}

INLINE vpair unpack_f32(const float *p) {
    vpair x;
    memcpy(&x, p, sizeof x);
    return x;
}

/* The 2 · LANES floats of a pair, back in the order in which they were unpacked. */
INLINE void repack_bf16(float *out, vpair x) {
    for (int i = 0; i < LANES; i++) out[2 * i] = x.even[i], out[2 * i + 1] = x.odd[i];
}
INLINE void repack_f32(float *out, vpair x) { memcpy(out, &x, sizeof x); }

#if defined(__AVX512BF16__)
typedef __m512bh pack_bf16;
INLINE pack_bf16 pack_load_bf16(const bf16 *p) { return (__m512bh)_mm512_loadu_si512(p); }
INLINE vfloat dot_bf16(vfloat sum, pack_bf16 a, pack_bf16 b) {
    return (vfloat)_mm512_dpbf16_ps((__m512)sum, a, b);
}
#else
typedef vpair pack_bf16;
INLINE pack_bf16 pack_load_bf16(const bf16 *p) { return unpack_bf16(p); }
INLINE vfloat dot_bf16(vfloat sum, pack_bf16 a, pack_bf16 b) {
    sum += a.even * b.even;
    sum += a.odd * b.odd;
    return sum;
}
#endif

typedef vfloat pack_f32;
INLINE pack_f32 pack_load_f32(const float *p) {
    vfloat x;
    memcpy(&x, p, sizeof x);
    return x;
}
INLINE vfloat dot_f32(vfloat sum, pack_f32 a, pack_f32 b) {
    sum += a * b;
    return sum;
}

/* The four sums over lanes of a, b, c, d. Lane i always meets lane i + n/2 first, whatever else is computed. */
INLINE vfloat4 sum_lanes(vfloat a, vfloat b, vfloat c, vfloat d) {
#if LANES == 16
    __m512 A = (__m512)a, B = (__m512)b, C = (__m512)c, D = (__m512)d;
    __m512 ab = _mm512_add_ps(_mm512_shuffle_f32x4(A, B, 0x44), _mm512_shuffle_f32x4(A, B, 0xee));
    __m512 cd = _mm512_add_ps(_mm512_shuffle_f32x4(C, D, 0x44), _mm512_shuffle_f32x4(C, D, 0xee));
    __m512 all = _mm512_add_ps(_mm512_shuffle_f32x4(ab, cd, 0x88), _mm512_shuffle_f32x4(ab, cd, 0xdd));
    all = _mm512_add_ps(all, _mm512_permute_ps(all, 0x4e));
    all = _mm512_add_ps(all, _mm512_permute_ps(all, 0xb1));
    const __m512i first = _mm512_set_epi32(0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 12, 8, 4, 0);
    return (vfloat4)_mm512_castps512_ps128(_mm512_permutexvar_ps(first, all));
#else
    vfloat in[4] = {a, b, c, d};
    vfloat4 folded[4], out;
    for (int i = 0; i < 4; i++) {
        vfloat4 part[LANES / 4];
        memcpy(part, &in[i], sizeof in[i]);
#if LANES == 8
        folded[i] = part[0] + part[1];
#else
        folded[i] = part[0];
#endif
    }
#if defined(__SSE3__)
    out = (vfloat4)_mm_hadd_ps(_mm_hadd_ps((__m128)folded[0], (__m128)folded[1]),
                               _mm_hadd_ps((__m128)folded[2], (__m128)folded[3]));
#elif defined(__aarch64__)
    out = (vfloat4)vpaddq_f32(vpaddq_f32((float32x4_t)folded[0], (float32x4_t)folded[1]),
                              vpaddq_f32((float32x4_t)folded[2], (float32x4_t)folded[3]));
#else
    for (int i = 0; i < 4; i++) out[i] = (folded[i][0] + folded[i][1]) + (folded[i][2] + folded[i][3]);
#endif
    return out;
#endif
}

/* e^x within 1 ulp for normal results, correctly 0, inf and NaN at the ends. x = n·ln 2 + r with |r| <= ln 2 / 2;
 * ln 2 in two parts (Cody and Waite) keeps r exact; e^r is its Taylor polynomial of degree 7, whose remainder
 * r^8/8! is below 2^-27. Branch-free, so that loops over it become vector code. */
INLINE float exp_f32(float x) {
    x = x > 89.0f ? 89.0f : x;
    x = x < -104.0f ? -104.0f : x;
    const float shift = 12582912.0f; /* 1.5 · 2^23: adding it rounds to an integer and leaves that in the low bits */
    float shifted = x * 1.44269504f + shift;
    float n = shifted - shift;
    float r = x - n * 0.693359375f + n * 2.12194440e-4f;
    float p = 1.0f / 5040.0f;
    p = p * r + 1.0f / 720.0f;
    p = p * r + 1.0f / 120.0f;
    p = p * r + 1.0f / 24.0f;
    p = p * r + 1.0f / 6.0f;
    p = p * r + 0.5f;
    p = p * r * r + r;
    /* 2^n in two factors, since n itself may lie outside the exponents of normal numbers. */
    int32_t whole = (int32_t)(float_to_bits(shifted) - float_to_bits(shift));
    int32_t half = whole >> 1;
    float high = bits_to_float((uint32_t)(half + 127) << 23);
    float low = bits_to_float((uint32_t)(whole - half + 127) << 23);
    return (p + 1.0f) * high * low;
}

INLINE float sigmoid_f32(float x) { return 1.0f / (1.0f + exp_f32(-x)); }
INLINE float silu_f32(float x) { return x / (1.0f + exp_f32(-x)); }

INLINE long min_long(long a, long b) { return a < b ? a : b; }
INLINE long max_long(long a, long b) { return a > b ? a : b; }

#endif
