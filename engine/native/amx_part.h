/* Products of many rows with AMX tiles, included by native.c; everything else is that of AVX-512 VNNI.
 *
 * An int16 activation is 256 * high + low, high a signed byte and low an unsigned one, and codes are signed bytes: two
 * products of bytes, added exactly in int32, are the very sum that pairs of int16 give. It is scaled by the same
 * function, so a row's result has the same bits (a test holds this).
 *
 * A tile has 16 rows of 64 bytes. One of activations is [16 rows][64 inputs], one of weights [16 times 4 inputs][16
 * outputs][4 inputs], one of sums [16 rows][16 outputs]. The four bytes of a packed int8 word are inputs 0 2 1 3, and the
 * low nibbles of an int4 word's bytes are inputs 0 4 1 5, the high ones 2 6 3 7. Weights stay in this order, activations
 * are put into it. Groups of at most 32 inputs fill half a tile.
 */

#include <sys/syscall.h>
#include <unistd.h>

#define AMX_TARGET                                                                                                   \
    __attribute__((target("amx-tile,amx-int8,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512vbmi,avx2,fma,f16c")))
#define AMX_ROWS 16
typedef int32_t amx_sums[4][AMX_ROWS][16]; /* high bytes times outputs 0..15 and 16..31, then low bytes */
typedef vf_avx512vnni amx_float;
typedef vi_avx512vnni amx_int;

INLINE int64_t amx_step(const glm_weight *w) { return w->group <= 32 ? 32 : 64; }

/* Inputs of a whole row with every part filled up to whole tiles. */
static int64_t amx_inputs(const glm_weight *w) {
    int64_t full = w->group / PART * PART, step = amx_step(w);
    return w->inputs / w->group * (full + round_up(w->group - full, step));
}

/* 16 rows: [part][16 rows of them all][step of inputs][high, low][row][input]. */
AMX_TARGET static void amx_prepare(const glm_job *job, int64_t tile) {
    const glm_weight *w = job->w;
    int64_t tiles = (job->rows + AMX_ROWS - 1) / AMX_ROWS, step = amx_step(w), part = 0;
    uint8_t order[64];
    for (int i = 0; i < 64; i++)
        order[i] = w->bits == 4 ? (i & ~7) | (i & 6) >> 1 | (i & 1) << 2 : (i & ~3) | (i & 2) >> 1 | (i & 1) << 1;
    __m512i low = _mm512_loadu_si512(order), high;
    low = _mm512_add_epi8(low, low);
    high = _mm512_add_epi8(low, _mm512_set1_epi8(1));
    uint8_t *a = job->a;
    for (int64_t group = 0; group < w->inputs / w->group; group++)
        for (int64_t start = 0; start < w->group; start += PART, part++) {
            int64_t count = minimum(PART, w->group - start), whole = round_up(count, step);
            uint8_t *to = a + tile * AMX_ROWS * whole * 2;
            for (int64_t r = 0; r < AMX_ROWS; r++) {
                int16_t values[PART] __attribute__((aligned(64))) = {0};
                int32_t rounded[PART];
                int64_t row = tile * AMX_ROWS + r, at = part * tiles * AMX_ROWS + row;
                round_part_avx512vnni(job, row, group * w->group + start, count, at, 32767, rounded);
                for (int64_t i = 0; i < count; i++) values[i] = (int16_t)rounded[i];
                for (int64_t i = 0; i < whole; i += step) {
                    __m512i left = _mm512_load_si512(values + i), right = _mm512_load_si512(values + (i + 32) % PART);
                    __m512i planes[2] = {_mm512_permutex2var_epi8(left, high, right), _mm512_permutex2var_epi8(left, low, right)};
                    for (int plane = 0; plane < 2; plane++) memcpy(to + (i * 2 + plane * step) * AMX_ROWS + r * step, &planes[plane], (size_t)step);
                }
            }
            a += tiles * AMX_ROWS * whole * 2;
        }
}

/* Weights of one part of a block as tiles: [four inputs][32 outputs][4 inputs]. What lies behind them meets zeros. */
AMX_TARGET INLINE void amx_unpack(const glm_weight *w, int64_t block, int64_t input, int64_t count, __m512i *out) {
    const uint32_t *codes = words_avx512vnni(w, block, input);
    __m512i nibbles = _mm512_set1_epi8(15);
    int64_t words = count / per_word(w);
    for (int64_t i = 0; i < words * 2; i++) {
        __m512i word = _mm512_loadu_si512(codes + i * 16);
        __builtin_prefetch(codes + i * 16 + AHEAD / 4);
        if (w->bits == 8) out[i] = word;
        else {
            int64_t at = i / 2 * 4 + i % 2;
            out[at] = _mm512_and_si512(word, nibbles);
            out[at + 2] = _mm512_and_si512(_mm512_srli_epi32(word, 4), nibbles);
        }
    }
}

/* 16 rows times 32 outputs over one part, into tiles 0 to 3. */
AMX_TARGET INLINE void amx_multiply(const uint8_t *a, const __m512i *weights, int64_t count, int64_t step) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t i = 0; i < count; i += step) {
        _tile_loadd(4, a + i * 2 * AMX_ROWS, step);
        _tile_loadd(5, a + (i * 2 + step) * AMX_ROWS, step);
        _tile_loadd(6, weights + i / 2, 128);
        _tile_loadd(7, weights + i / 2 + 1, 128);
        _tile_dpbssd(0, 4, 6);
        _tile_dpbusd(2, 5, 6);
        _tile_dpbssd(1, 4, 7);
        _tile_dpbusd(3, 5, 7);
    }
}

AMX_TARGET INLINE void amx_store(amx_sums sums) {
    _tile_stored(0, sums[0], 64);
    _tile_stored(1, sums[1], 64);
    _tile_stored(2, sums[2], 64);
    _tile_stored(3, sums[3], 64);
}

/* The sums of one part, scaled and added to `out` [16 rows][32]. */
AMX_TARGET INLINE void amx_scale(const glm_job *job, int64_t block, int64_t group, int64_t first, amx_sums sums, amx_float out[][2]) {
    const glm_weight *w = job->w;
    amx_float scale[2], low[2] = {0};
    for (int v = 0; v < 2; v++) {
        scale[v] = scales_avx512vnni(w, block, group, 0, v);
        if (w->bits == 4) low[v] = scales_avx512vnni(w, block, group, 1, v);
    }
#pragma GCC unroll 4
    for (int r = 0; r < AMX_ROWS; r++)
#pragma GCC unroll 2
        for (int v = 0; v < 2; v++) {
            amx_int sum = (*(amx_int *)sums[v][r] << 8) + *(amx_int *)sums[2 + v][r];
            out[r][v] += scaled_avx512vnni(sum, scale[v], low[v], job->steps[first + r], job->sums[first + r]);
        }
}

AMX_TARGET static void amx_many(const glm_job *job, int64_t block) {
    const glm_weight *w = job->w;
    int64_t tiles = (job->rows + AMX_ROWS - 1) / AMX_ROWS, step = amx_step(w), part = 0;
    struct { uint8_t palette, start, zero[14]; uint16_t bytes[16]; uint8_t rows[16]; } shape = {.palette = 1};
    amx_float out[CHUNK][2];
    amx_sums sums __attribute__((aligned(64)));
    __m512i weights[PART / 2];
    struct { int64_t group, first; amx_float (*out)[2]; } before = {0}; /* scaled while the next tiles are multiplied */
    for (int i = 0; i < 8; i++) {
        shape.bytes[i] = i == 4 || i == 5 ? (uint16_t)step : 64;
        shape.rows[i] = i < 6 ? AMX_ROWS : (uint8_t)(step / 4);
    }
    memset(out, 0, (size_t)(tiles * AMX_ROWS) * sizeof *out);
    memset(weights, 0, sizeof weights);
    _tile_loadconfig(&shape);
    const uint8_t *a = job->a;
    for (int64_t group = 0; group < w->inputs / w->group; group++)
        for (int64_t start = 0; start < w->group; start += PART, part++) {
            int64_t count = minimum(PART, w->group - start), whole = round_up(count, step);
            amx_unpack(w, block, group * w->group + start, count, weights);
            __asm__ volatile("" ::: "memory"); /* the compiler does not know what tiles read */
            for (int64_t tile = 0; tile < tiles; tile++, a += AMX_ROWS * whole * 2) {
                amx_multiply(a, weights, whole, step);
                if (before.out) amx_scale(job, block, before.group, before.first, sums, before.out);
                amx_store(sums);
                before.group = group;
                before.first = (part * tiles + tile) * AMX_ROWS;
                before.out = out + tile * AMX_ROWS;
            }
        }
    amx_scale(job, block, before.group, before.first, sums, before.out);
    _tile_release();
    for (int64_t row = 0; row < job->rows; row++)
        for (int v = 0; v < 2; v++) store_avx512vnni(job, row, block * ROWS + v * 16, out[row][v]);
}

/* Linux keeps the registers of tiles for processes that ask for them. */
static int amx_allowed(void) {
    uint32_t a, b, c, d, low, high;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d >> 24 & 3) != 3) return 0;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c >> 27 & 1)) return 0; /* xgetbv */
    __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (low >> 17 & 3) == 3 && !syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* tile data */);
}

static const glm_kernels kernels_avx512amx = {
    "avx512amx", AMX_ROWS, FEW, amx_prepare, few_avx512vnni, amx_many, step_begin_avx512vnni, step_work_avx512vnni,
    step_row_avx512vnni, &kernels_avx512vnni, amx_inputs,
};
