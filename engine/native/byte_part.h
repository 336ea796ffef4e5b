/* Products of packed int4 weights with activations of 8 bits, included by native.c for each instruction set.
 *
 * For weights that are `coarse`, which nobody gets without asking: a step of activations is 1/254 of what the largest of
 * their part allows, 256 times coarser than int16 and what llama.cpp multiplies with. In exchange one instruction takes
 * four inputs instead of two, and a word is taken apart by three operations instead of seven.
 *
 * The low nibbles of a word's bytes are inputs 0 4 1 5, the high ones 2 6 3 7: codes stay in this order, activations are
 * put into it, [part][row][input]. Sums are of integers here too, and a row is scaled by the same instructions however
 * many are multiplied beside it: its bits are its own. All rows, of prompts too, go this way: a part of the weights is
 * taken apart again for every 8 of them, which costs less than the wider sums of `many`.
 */

#ifndef GLM_QUADS /* sum + four unsigned codes times four signed bytes */
#define GLM_QUADS(sum, a, b)                                                                                  \
    ((sum) + ((a) & 255) * ((b) << 24 >> 24) + ((a) >> 8 & 255) * ((b) << 16 >> 24) +                         \
     ((a) >> 16 & 255) * ((b) << 8 >> 24) + ((a) >> 24 & 255) * ((b) >> 24))
#endif

/* `count` rounded activations, whole words of 8, as bytes. */
GLM_TARGET INLINE void F(to_bytes)(const int32_t *whole, int64_t count, int8_t *bytes) {
    for (int64_t i = 0; i < count; i += 8) {
        static const int8_t order[8] = {0, 4, 1, 5, 2, 6, 3, 7};
        for (int at = 0; at < 8; at++) bytes[i + at] = (int8_t)whole[i + order[at]];
    }
}

/* `count` activation rows times `vectors` vectors of output rows, over one part of a group. */
GLM_TARGET INLINE void F(byte_part)(const glm_job *job, int64_t block, int64_t group, int64_t start, int64_t inputs,
                                    int64_t first, int count, int vector, int vectors, VF out[][VECTORS]) {
    const glm_weight *w = job->w;
    int64_t input = group * w->group + start, part = group * parts_of_group(w) + start / PART;
    const uint32_t *codes = F(words)(w, block, input) + vector * GLM_LANES;
    const int32_t *a = (const int32_t *)((const int8_t *)job->a + input * job->rows + first * inputs);
    const float *steps = job->steps + part * job->rows + first, *sums = job->sums + part * job->rows + first;
    VI sum[8][4] = {0};
    for (int64_t at = 0; at < inputs / 8; at++) {
        VI low[4], high[4];
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) {
            __builtin_prefetch(codes + at * ROWS + v * GLM_LANES + AHEAD / 4);
            VU word = *(const LOOSE_U *)(codes + at * ROWS + v * GLM_LANES);
            low[v] = (VI)(word & 0x0f0f0f0fu);
            high[v] = (VI)(word >> 4 & 0x0f0f0f0fu);
        }
#pragma GCC unroll 8
        for (int r = 0; r < count; r++) {
            VI left = a[r * (inputs / 4) + at * 2] - (VI){0}, right = a[r * (inputs / 4) + at * 2 + 1] - (VI){0};
#pragma GCC unroll 4
            for (int v = 0; v < vectors; v++) {
                sum[r][v] = GLM_QUADS(sum[r][v], low[v], left);
                sum[r][v] = GLM_QUADS(sum[r][v], high[v], right);
            }
        }
    }
#pragma GCC unroll 4
    for (int v = 0; v < vectors; v++) {
        VF scale = F(scales)(w, block, group, 0, vector + v), low = F(scales)(w, block, group, 1, vector + v);
#pragma GCC unroll 8
        for (int r = 0; r < count; r++) { /* one product for each addition: nothing is left to choose for the compiler */
            VF scaled = TO_FLOAT(sum[r][v]) * steps[r];
            out[r][vector + v] += scaled * scale;
            out[r][vector + v] += low * sums[r];
        }
    }
}

#define BYTE_PARTS(rows_, vectors_, length)                        \
    for (int64_t group = 0; group < w->inputs / w->group; group++) \
        for (int64_t start = 0; start < w->group; start += PART)   \
            for (int v = 0; v < VECTORS; v += (vectors_))          \
    F(byte_part)(job, block, group, start, length, first, rows_, v, vectors_, out)

/* A function for so many rows: the compiler knows the usual lengths of a part, so sums stay in registers. */
#define BYTE_ROWS(name, rows_, vectors_)                                                                          \
    GLM_TARGET static __attribute__((noinline)) void F(name)(const glm_job *job, int64_t block, int64_t first) {  \
        const glm_weight *w = job->w;                                                                             \
        VF out[rows_][VECTORS] = {0};                                                                             \
        switch (w->group % PART ? w->group : PART) {                                                              \
        case 32: BYTE_PARTS(rows_, vectors_, 32); break;                                                          \
        case 64: BYTE_PARTS(rows_, vectors_, 64); break;                                                          \
        case PART: BYTE_PARTS(rows_, vectors_, PART); break;                                                      \
        default: BYTE_PARTS(rows_, vectors_, minimum(PART, w->group - start)); break;                             \
        }                                                                                                         \
        for (int64_t r = 0; r < minimum(rows_, job->rows - first); r++)                                           \
            for (int v = 0; v < VECTORS; v++) F(store)(job, first + r, block * ROWS + v * GLM_LANES, out[r][v]);  \
    }
BYTE_ROWS(bytes1, 1, (VECTORS < 4 ? VECTORS : 4))
BYTE_ROWS(bytes2, 2, 2)
BYTE_ROWS(bytes3, 3, 2)
BYTE_ROWS(bytes4, 4, 2)
#if GLM_LANES == 16 /* 32 registers; a row that is not there is multiplied and not stored */
BYTE_ROWS(bytes6, 6, 2)
BYTE_ROWS(bytes8, 8, 2)
#endif

GLM_TARGET static void F(few_bytes)(const glm_job *job, int64_t block) {
    for (int64_t first = 0; first < job->rows;) {
        int64_t left = job->rows - first, count = minimum(4, left);
#if GLM_LANES == 16
        if (left > 4) count = left > 6 ? 8 : 6;
        if (count == 8) F(bytes8)(job, block, first);
        else if (count == 6) F(bytes6)(job, block, first);
        else
#endif
        if (count == 4) F(bytes4)(job, block, first);
        else if (count == 3) F(bytes3)(job, block, first);
        else if (count == 2) F(bytes2)(job, block, first);
        else F(bytes1)(job, block, first);
        first += minimum(count, left);
    }
}

#undef BYTE_PARTS
#undef BYTE_ROWS
