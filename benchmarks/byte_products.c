/* Products of int4 weights with activations of 16 and of 8 bits, by processor time, beside what a core gives at most.
 *
 *     gcc -O3 -std=gnu11 -Wno-psabi -pthread benchmarks/byte_products.c -o /tmp/byte_products -lm && /tmp/byte_products [TURNS]
 *
 * The compiled part itself is included, so both multiply the same packed words in the same process, in turn; the best of
 * TURNS (100), one thread, hot: the weights stay in the caches where they fit. Rounding the activations is counted.
 */
#include "../engine/native/native.c"

#include <stdio.h>
#include <time.h>

#define HERE __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")))

static double seconds(void) { /* of this thread on a processor */
    struct timespec now;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

/* What the core gives at most: independent sums in registers, nothing read. Billions of instructions a second. */
#define PEAK(name, operation)                                                                         \
    HERE static double name(void) {                                                                   \
        double best = 1e9;                                                                            \
        for (int turn = 0; turn < 20; turn++) {                                                       \
            __m512i sum[16], a = _mm512_set1_epi32(turn), b = _mm512_set1_epi32(1);                   \
            for (int i = 0; i < 16; i++) sum[i] = _mm512_set1_epi32(i);                               \
            double started = seconds();                                                               \
            for (int64_t n = 0; n < 1000000; n++)                                                     \
                _Pragma("GCC unroll 16") for (int i = 0; i < 16; i++) {                               \
                    sum[i] = operation(sum[i], a, b);                                                 \
                    __asm__ volatile("" : "+v"(sum[i]));                                              \
                }                                                                                     \
            double took = seconds() - started;                                                        \
            if (took < best) best = took;                                                             \
        }                                                                                             \
        return 16e6 / best / 1e9;                                                                     \
    }
PEAK(peak_words, _mm512_dpwssd_epi32)
PEAK(peak_bytes, _mm512_dpbusd_epi32)

static uint32_t dice = 1;
static uint32_t roll(void) { return dice = dice * 1664525u + 1013904223u; }

int main(int count, char **given) {
    int64_t turns = count > 1 ? atoll(given[1]) : 100;
    if (!glm_choose("avx512vnni")) return puts("this processor has no AVX-512 VNNI"), 1;
    double words = peak_words(), bytes = peak_bytes();
    printf("most that a core gives: %.2f billion vpdpwssd a second (%.0f GOP/s), %.2f billion vpdpbusd (%.0f GOP/s)\n",
           words, words * 64, bytes, bytes * 128);
    const int64_t shapes[][3] = {{1536, 576, 32}, {4096, 4096, 32}, {4096, 4096, 64}, {4096, 4096, 128}};
    const int64_t rows[] = {1, 2, 4, 8, 12, 16, 128};
    for (size_t s = 0; s < sizeof shapes / sizeof *shapes; s++) {
        glm_weight w = {.outputs = shapes[s][0], .inputs = shapes[s][1], .group = shapes[s][2], .bits = 4, .unit = 1};
        int64_t size = w.outputs * w.inputs / 8, scales = w.outputs * w.inputs / w.group * 2;
        uint32_t *codes = aligned_alloc(64, (size_t)(size * 4 + AHEAD));
        uint16_t *halves = malloc((size_t)scales * 2);
        for (int64_t i = 0; i < size; i++) codes[i] = roll() ^ roll() >> 16;
        for (int64_t i = 0; i < scales; i++) halves[i] = (uint16_t)(0x2000 + (roll() >> 20)); /* 0.008 to 0.03 */
        w.codes = codes, w.scales = halves;
        float *x = malloc((size_t)(128 * w.inputs) * 4), *y = malloc((size_t)(128 * w.outputs) * 4);
        for (int64_t i = 0; i < 128 * w.inputs; i++) x[i] = (float)(int32_t)roll() * 0x1p-31f;
        for (size_t n = 0; n < sizeof rows / sizeof *rows; n++) {
            double best[2] = {1e9, 1e9}, work = 2e-9 * (double)(rows[n] * w.outputs * w.inputs);
            int64_t some = turns * 16 / (16 + rows[n]) + 1;
            for (int64_t turn = 0; turn < 2 * some; turn++) {
                w.coarse = turn % 2;
                double started = seconds();
                glm_linear(&w, x, y, rows[n], 0, 0, 1);
                double took = seconds() - started;
                if (took < best[turn % 2]) best[turn % 2] = took;
            }
            printf("%5lld x %lld g%-3lld %3lld rows: 16 bits %8.1f us (%4.0f GOP/s), 8 bits %8.1f us (%4.0f GOP/s), %.2f times as fast\n",
                   (long long)w.outputs, (long long)w.inputs, (long long)w.group, (long long)rows[n], best[0] * 1e6,
                   work / best[0], best[1] * 1e6, work / best[1], best[0] / best[1]);
            fflush(stdout);
        }
        free(codes), free(halves), free(x), free(y);
    }
    return 0;
}
