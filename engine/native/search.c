/* The search for scales of packed weights that int4.py and int8.py describe, and have in torch as well.
 *
 * One file, compiled once: the part below LANES is a template that this file includes for each width of vectors; the
 * widest that the CPU has is taken. It works on the caller's thread, as Python shares the groups out.
 *
 * Four bits: a vector register holds the same input of LANES groups, so every group is searched at once and nothing is
 * summed across a register. Eight bits: a group is a row of any length, and a register holds neighbouring inputs.
 */
#ifndef LANES

#include <stdint.h>
#include <stdlib.h>

#define EXPORT __attribute__((visibility("default")))
#define INLINE static inline __attribute__((always_inline))
#define LONGEST 128 /* inputs of a four-bit group */

typedef struct {
    const void *values; /* [groups][group] */
    float *scale, *low, *error; /* [groups]; the error is NaN where a value is no finite number or too large */
    uint8_t *codes;     /* [groups][group]; at eight bits they are signed */
    int64_t groups, group;
    int kind;           /* of the values: 0 float32, 1 float16, 2 bfloat16 */
    int lanes;          /* at most so many in a register; 0: as many as the CPU has */
    int integer_zero, symmetric, fast; /* integer_zero: the zero point is an integer, as in compressed-tensors */
} glm_search;

/* Shares of a group's range that are tried, as cuts at its low and high end; cutting makes the steps between finer. */
static const float cuts[][2] = {{0, 0}, {-.025f, -.025f}, {.02f, .02f}, {.04f, .04f}, {.06f, .06f}};
#define CUTS ((int)(sizeof cuts / sizeof *cuts))
#define ROUNDS 2 /* a choice, then what fits its codes best */
/* Of a row's largest weight at eight bits: from a little more down, as long as it does not get much worse. */
#define FIRST_SHARE 1.02f
#define SHARE_STEP 0.005f
#define HOPELESS 1.5f

INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

#define PASTE_(a, b) a##_##b
#define PASTE(a, b) PASTE_(a, b)
#define F(name) PASTE(name, LANES)

#define LANES 4
#define TARGET
#include "search.c"
#undef LANES
#undef TARGET

#if defined(__x86_64__)
#define LANES 8
#define TARGET __attribute__((target("avx2,fma")))
#include "search.c"
#undef LANES
#undef TARGET

#define LANES 16
#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma")))
#include "search.c"
#undef LANES
#undef TARGET
#endif

static int lanes(int most) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (most == 0) most = 16;
    if (most >= 16 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
        return 16;
    if (most >= 8 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return 8;
#endif
    return 4;
}

/* Returns 0, or 1 for a group size it does not take. */
EXPORT int glm_search4(const glm_search *search) {
    int width = lanes(search->lanes);
    if (search->group > LONGEST || search->group < 1) return 1;
    for (int64_t first = 0; first < search->groups; first += width) {
#if defined(__x86_64__)
        if (width == 16) search4_16(search, first);
        else if (width == 8) search4_8(search, first);
        else
#endif
            search4_4(search, first);
    }
    return 0;
}

/* Returns 0, or 1 without memory for one row. */
EXPORT int glm_search8(const glm_search *search) {
    int width = lanes(search->lanes);
    int64_t whole = (search->group + width - 1) / width * width;
    void *row;
    if (posix_memalign(&row, 64, (size_t)whole * sizeof(float))) return 1;
    for (int64_t group = 0; group < search->groups; group++) {
#if defined(__x86_64__)
        if (width == 16) search8_16(search, group, whole, row);
        else if (width == 8) search8_8(search, group, whole, row);
        else
#endif
            search8_4(search, group, whole, row);
    }
    free(row);
    return 0;
}

#else /* ---- the template ---- */

#define VF F(vf)
#define VI F(vi)
typedef float VF __attribute__((vector_size(LANES * 4)));
typedef int32_t VI __attribute__((vector_size(LANES * 4)));
#define ALL(number) ((number) - (VF){0})
#define WHERE(mask, yes, no) ((VF)(((VI)(yes) & (mask)) | ((VI)(no) & ~(mask))))
#define SMALLER(a, b) WHERE((a) < (b), a, b)
#define LARGER(a, b) WHERE((a) > (b), a, b)
#define ROUNDED(v) (((v) + 0x1.8p23f) - 0x1.8p23f) /* to the nearest whole number */
#define SIZE(v) ((VF)((VI)(v) & 0x7fffffff))

/* `count` values of any kind, from `at` on, as float32. A float16 that is no number comes out above 65504. */
TARGET INLINE void F(load)(const glm_search *s, int64_t at, int64_t count, float *out) {
    const uint16_t *halves = (const uint16_t *)s->values + at;
    if (s->kind == 0)
        for (int64_t i = 0; i < count; i++) out[i] = ((const float *)s->values)[at + i];
    else
        for (int64_t i = 0; i < count; i++) {
            uint32_t bits = halves[i];
            union { uint32_t u; float f; } value = {s->kind == 2 ? bits << 16 : (bits & 0x7fffu) << 13};
            if (s->kind == 1) value.f *= 0x1p112f, value.u |= (bits & 0x8000u) << 16;
            out[i] = value.f;
        }
}

TARGET INLINE VF F(half_rounded)(VF number) { /* to the nearest float16, which is how scales are stored */
    VF small = (number + 0x1.8p-1f) - 0x1.8p-1f; /* below 2^-14 steps are 2^-24 */
    VI bits = (VI)number;
    bits = (bits + 0xfff + (bits >> 13 & 1)) & ~0x1fff;
    return WHERE(SIZE(number) < 0x1p-14f, small, (VF)bits);
}

typedef struct { /* the best that each group was offered */
    VF scale, low, error;
} F(choice);

typedef struct { /* what the codes of one offer come to, weighted */
    VF codes, squares, products;
} F(sums);

TARGET INLINE VF F(code_of)(VF value, VF inverse, VF low) {
    VF code = (value - low) * inverse;
    code = LARGER(code, ALL(0));
    return ROUNDED(SMALLER(code, ALL(15)));
}

/* Take a choice where it is better. */
TARGET INLINE F(sums) F(offer)(const VF *values, const VF *weights, int64_t group, VF scale, VF low, F(choice) *best) {
    VI usable = scale > 0;
    VF error = {0}, inverse = 1 / WHERE(usable, scale, ALL(1));
    F(sums) sums = {0};
    for (int64_t i = 0; i < group; i++) {
        VF code = F(code_of)(values[i], inverse, low), off = code * scale + (low - values[i]), weighted = weights[i] * code;
        error += weights[i] * off * off;
        sums.codes += weighted;
        sums.squares += weighted * code;
        sums.products += weighted * values[i];
    }
    VI better = usable & (error < best->error);
    best->error = WHERE(better, error, best->error);
    best->scale = WHERE(better, scale, best->scale);
    best->low = WHERE(better, low, best->low);
    return sums;
}

TARGET static void F(search4)(const glm_search *s, int64_t first) {
    VF values[LONGEST], weights[LONGEST], low = ALL(__builtin_inff()), high = -low, mean = {0}, total = {0}, moment = {0};
    int64_t group = s->group, count = least(LANES, s->groups - first);
    for (int lane = 0; lane < LANES; lane++) { /* lanes without a group repeat the first */
        float line[LONGEST];
        F(load)(s, (first + (lane < count ? lane : 0)) * group, group, line);
        for (int64_t i = 0; i < group; i++) ((float *)values)[i * LANES + lane] = line[i];
    }
    for (int64_t i = 0; i < group; i++) {
        low = SMALLER(values[i], low);
        high = LARGER(values[i], high);
        mean += values[i] * values[i];
    }
    mean /= (float)group;
    VF size = LARGER(high, -low);
    VI sound = (mean < 3e38f) & (size < (s->kind == 1 ? 65505.0f : 3e38f)) & ((high - low) < 15 * 65504.0f);
    for (int lane = 0; lane < LANES; lane++) mean[lane] = __builtin_sqrtf(mean[lane]);
    for (int64_t i = 0; i < group; i++) {
        weights[i] = SIZE(values[i]) + mean;
        total += weights[i];
        moment += weights[i] * values[i];
    }
    if (s->integer_zero) low = SMALLER(low, ALL(0)), high = LARGER(high, ALL(0)); /* zero is a code */
    if (s->symmetric) high = LARGER(high, -low), low = -high;
    VF range = high - low;
    F(choice) best = {ALL(1), s->integer_zero ? ALL(0) : F(half_rounded)(low), ALL(__builtin_inff())};
    int shifts = s->integer_zero && !s->symmetric && !s->fast ? 1 : 0;
    for (int cut = 0; cut < (s->fast ? 1 : CUTS); cut++)
        for (int shift = -shifts; shift <= shifts; shift++) {
            float left = 1 - cuts[cut][0] - cuts[cut][1];
            VF scale = F(half_rounded)(range * (left / 15)), point = {0}, start;
            if (s->integer_zero) {
                point = ROUNDED(-low * (1 - 2 * cuts[cut][0]) / WHERE(scale > 0, scale, ALL(1))) + (float)shift;
                point = SMALLER(LARGER(point, ALL(0)), ALL(15));
                if (s->symmetric) point = ALL(8);
                start = -point * scale;
            } else {
                start = F(half_rounded)(low + range * cuts[cut][0]);
            }
            for (int round = 0; round < (s->fast ? 1 : ROUNDS); round++) {
                F(sums) sums = F(offer)(values, weights, group, scale, start, &best);
                VF fitted, moved = start;
                if (s->integer_zero) { /* codes - point times the values, over codes - point squared */
                    VF squares = sums.squares - 2 * point * sums.codes + point * point * total;
                    fitted = (sums.products - point * moment) / squares;
                } else {
                    VF determinant = total * sums.squares - sums.codes * sums.codes;
                    fitted = (total * sums.products - moment * sums.codes) / determinant;
                    moved = (sums.squares * moment - sums.codes * sums.products) / determinant;
                }
                VI good = (fitted > 0) & (fitted < 2 * scale); /* else one code only, or nothing to divide by */
                scale = WHERE(good, F(half_rounded)(fitted), ALL(0));
                start = s->integer_zero ? -point * scale : WHERE(good, F(half_rounded)(moved), start);
            }
        }
    VF inverse = 1 / best.scale;
    best.error = WHERE(best.error < __builtin_inff(), best.error, ALL(0));
    best.error = WHERE(sound, best.error, ALL(__builtin_nanf("")));
    for (int64_t i = 0; i < group; i++) values[i] = F(code_of)(values[i], inverse, best.low);
    for (int lane = 0; lane < count; lane++) {
        s->scale[first + lane] = best.scale[lane];
        s->low[first + lane] = best.low[lane];
        s->error[first + lane] = best.error[lane];
        uint8_t *codes = s->codes + (first + lane) * group;
        for (int64_t i = 0; i < group; i++) codes[i] = (uint8_t)((const float *)values)[i * LANES + lane];
    }
}

/* One row; `whole` is its length in whole registers, `row` room for it. */
TARGET static void F(search8)(const glm_search *s, int64_t group, int64_t whole, float *row) {
    VF *values = (VF *)row, most = {0}, mean = {0};
    F(load)(s, group * s->group, s->group, row);
    for (int64_t i = s->group; i < whole; i++) row[i] = 0;
    for (int64_t i = 0; i < whole / LANES; i++) most = LARGER(SIZE(values[i]), most), mean += values[i] * values[i];
    float largest = 0, squares = 0;
    for (int lane = 0; lane < LANES; lane++) {
        largest = most[lane] > largest ? most[lane] : largest;
        squares += mean[lane];
    }
    int sound = squares < 3e38f && largest < (s->kind == 1 ? 65505.0f : 127 * 65504.0f);
    float best = __builtin_inff(), chosen = 1;
    for (float share = s->fast ? 1 : FIRST_SHARE; sound && share > 0.3f; share -= SHARE_STEP) {
        float scale = F(half_rounded)(ALL(largest * share / 127))[0], inverse = 1 / scale, total = 0;
        if (!(scale > 0)) break;
        VF error = {0};
        for (int64_t i = 0; i < whole / LANES && !s->fast; i++) {
            VF steps = values[i] * inverse, code = ROUNDED(steps);
            code = SMALLER(LARGER(code, ALL(-127)), ALL(127)) - steps;
            error += code * code;
        }
        for (int lane = 0; lane < LANES; lane++) total += error[lane];
        total *= scale * scale;
        if (total < best) best = total, chosen = scale;
        if (s->fast || (share < 1 && total > HOPELESS * best)) break;
    }
    s->scale[group] = chosen;
    s->error[group] = sound ? best < __builtin_inff() ? best : 0 : __builtin_nanf("");
    VF inverse = ALL(1 / chosen);
    for (int64_t i = 0; i < whole / LANES; i++) {
        VF code = ROUNDED(values[i] * inverse);
        values[i] = SMALLER(LARGER(code, ALL(-127)), ALL(127));
    }
    int8_t *codes = (int8_t *)s->codes + group * s->group;
    for (int64_t i = 0; i < s->group; i++) codes[i] = (int8_t)row[i];
}

#undef VF
#undef VI
#undef ALL
#undef WHERE
#undef SMALLER
#undef LARGER
#undef ROUNDED
#undef SIZE
#endif
