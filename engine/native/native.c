/* Products of packed int4 and int8 weights with float activations, for CPUs.
 *
 * One file, compiled once: the part below GLM_LANES is a template that this file includes for each instruction set, and
 * the best one is chosen at run time. It is built as an optional extension and reached through ctypes (cpu.py).
 *
 * Layout. Output rows come in blocks of 32. A 32-bit word holds 8 (int4) or 4 (int8) neighbouring inputs of one row, and
 * words are stored [block][word of the row][32 rows], so a vector register holds the same inputs of 8 or 16 rows.
 *   int4: nibble i (from the low end) is input 2i, nibble i + 4 is input 2i + 1, for i = 0..3; codes 0..15
 *   int8: bytes from the low end are inputs 0, 2, 1, 3; codes are signed
 * In this order `(word >> 4i) & 0x000F000F` is a pair of neighbouring inputs as two int16, which is what the
 * multiply-add instruction for pairs wants.
 * Scales are stored [block][group][32 rows], at 4 bits [block][group][scale, minimum][32 rows], in float16 or float32:
 * weight = (code * scale + minimum) * unit.
 *
 * Arithmetic. Activations become int16 with one scale for each group of at most 128 inputs: a step of 2^-16 of the
 * group's largest value, 128 times finer than bfloat16. Pairs are multiplied and added exactly in int32, twice as fast as
 * float32, and each group's sum is scaled in float32. As integers have no order of addition, a row's result is the same
 * bits whether it comes alone (decoding) or with others (prefill, or verifying several tokens): a test holds this.
 * `exact` multiplies in float32 instead, for reference runs; `coarse` weights take activations of 8 bits (byte_part.h).
 *
 * Few rows are bound by memory and multiplied straight from the packed words. Many rows are bound by arithmetic: a block
 * is unpacked into the first-level cache and used for up to CHUNK rows, by AMX where the CPU has it (amx_part.h).
 */
#ifndef GLM_LANES

#include <math.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#define RELAX() _mm_pause()
#elif defined(__aarch64__)
#define RELAX() __asm__ volatile("yield")
#else
#define RELAX() ((void)0)
#endif

#define ROWS 32        /* output rows of a block */
#define FEW 8          /* rows for which packed words are used directly; measured, see BENCHMARKS.md */
#define FEW_WIDE 16    /* the same where there are 32 registers of 16 lanes */
#define PART 128       /* inputs that share an activation scale; int32 sums of int8 * int16 cannot overflow */
#define MOST_TILE 16   /* the largest TILE */
#define CHUNK 144      /* activation rows unpacked weights are used for; a multiple of every TILE */
#define AHEAD 4096 /* bytes of packed words that are asked for before they are needed; 1 to 16 kB measured alike */
#define EXPORT __attribute__((visibility("default")))
#define INLINE static inline __attribute__((always_inline))

typedef struct {
    const uint32_t *codes;
    const void *scales;
    const float *bias; /* [outputs] or NULL */
    int64_t outputs, inputs, group;
    int32_t bits, wide_scales; /* wide_scales: float32, else float16 */
    int32_t coarse; /* activations become 8 bits, not 16 (byte_part.h); only at 4 bits */
    float unit;
} glm_weight;

typedef struct { /* one product, prepared by the caller for the threads */
    const glm_weight *w;
    const void *source; /* the caller's activations [rows][inputs] */
    void *y;            /* [rows][outputs] */
    void *a;            /* activations as int16 pairs or float32: [part][rows / tile][pair or input][tile]; amx_part.h has bytes */
    float *steps, *sums; /* [part][rows, whole tiles]: activation scale, and the sum of the part's activations */
    int64_t rows, tile;
    int64_t wide, before; /* outputs of a row of y, and those of the weights that lie before its first one */
    int bf16, exact;
} glm_job;

/* ---- threads: a small pool that takes blocks from a counter, so a busy core slows it down and never stalls it ---- */

typedef void (*glm_task)(const glm_job *, int64_t);

#define MOST_THREADS 64
static struct {
    pthread_mutex_t call, lock; /* call: one product at a time; lock: the fields below and sleeping */
    pthread_cond_t wake;
    _Atomic uint64_t ticket; /* generation << 32 | next block */
    _Atomic int64_t finished;
    glm_task task;
    const glm_job *job;
    int64_t blocks;
    int workers, wanted, asleep;
} pool = {.call = PTHREAD_MUTEX_INITIALIZER, .lock = PTHREAD_MUTEX_INITIALIZER, .wake = PTHREAD_COND_INITIALIZER};

static void take_blocks(uint32_t generation, glm_task task, const glm_job *job, int64_t blocks) {
    for (;;) {
        uint64_t ticket = atomic_load(&pool.ticket);
        if ((uint32_t)(ticket >> 32) != generation || (int64_t)(ticket & 0xffffffffu) >= blocks) return;
        if (!atomic_compare_exchange_weak(&pool.ticket, &ticket, ticket + 1)) continue;
        task(job, (int64_t)(ticket & 0xffffffffu));
        atomic_fetch_add(&pool.finished, 1);
    }
}

static void *work(void *number) {
    int mine = (int)(intptr_t)number;
    uint32_t seen = 0;
    for (;;) {
        /* The next product usually follows within some ten microseconds: look for it, but let others have the core. */
        for (int turn = 0; turn < 200; turn++) {
            if ((uint32_t)(atomic_load(&pool.ticket) >> 32) != seen) break;
            for (int i = 0; i < 16; i++) RELAX();
            if (turn % 8 == 7) sched_yield();
        }
        pthread_mutex_lock(&pool.lock);
        while ((uint32_t)(atomic_load(&pool.ticket) >> 32) == seen) {
            pool.asleep++;
            pthread_cond_wait(&pool.wake, &pool.lock);
            pool.asleep--;
        }
        seen = (uint32_t)(atomic_load(&pool.ticket) >> 32);
        glm_task task = pool.task;
        const glm_job *job = pool.job;
        int64_t blocks = mine < pool.wanted ? pool.blocks : 0;
        pthread_mutex_unlock(&pool.lock);
        take_blocks(seen, task, job, blocks);
    }
    return NULL;
}

static void run(glm_task task, const glm_job *job, int64_t blocks, int threads) {
    if (threads > MOST_THREADS) threads = MOST_THREADS;
    if (threads > blocks) threads = (int)blocks;
    if (threads <= 1 || pthread_mutex_trylock(&pool.call)) { /* another thread's product has the pool */
        for (int64_t block = 0; block < blocks; block++) task(job, block);
        return;
    }
    pthread_mutex_lock(&pool.lock);
    while (pool.workers < threads - 1) {
        pthread_t thread;
        if (pthread_create(&thread, NULL, work, (void *)(intptr_t)(pool.workers + 1))) break;
        pthread_detach(thread);
        pool.workers++;
    }
    uint32_t generation = (uint32_t)(atomic_load(&pool.ticket) >> 32) + 1;
    pool.task = task;
    pool.job = job;
    pool.blocks = blocks;
    pool.wanted = threads;
    atomic_store(&pool.finished, 0);
    atomic_store(&pool.ticket, (uint64_t)generation << 32);
    if (pool.asleep) pthread_cond_broadcast(&pool.wake);
    pthread_mutex_unlock(&pool.lock);
    take_blocks(generation, task, job, blocks);
    for (int turn = 0; atomic_load(&pool.finished) < blocks; turn++) {
        RELAX();
        if (turn % 64 == 63) sched_yield();
    }
    pthread_mutex_unlock(&pool.call);
}

/* ---- scalar pieces ---- */

INLINE float from_half(uint32_t half) {
    union { uint32_t u; float f; } value = {(half & 0x7fffu) << 13};
    value.f *= 0x1p112f; /* moves the exponent; subnormals come out right, infinities are refused when packing */
    value.u |= (half & 0x8000u) << 16;
    return value.f;
}

INLINE float from_bf16(uint16_t half) {
    union { uint32_t u; float f; } value = {(uint32_t)half << 16};
    return value.f;
}

INLINE uint16_t to_bf16(float number) {
    union { float f; uint32_t u; } value = {number};
    if ((value.u & 0x7fffffffu) > 0x7f800000u) return (uint16_t)(value.u >> 16 | 0x40); /* NaN stays NaN */
    return (uint16_t)((value.u + 0x7fffu + (value.u >> 16 & 1)) >> 16);
}

INLINE int64_t minimum(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t round_up(int64_t size, int64_t unit) { return (size + unit - 1) / unit * unit; }
INLINE int64_t planes(const glm_weight *w) { return w->bits == 4 ? 2 : 1; }
INLINE int64_t per_word(const glm_weight *w) { return w->bits == 4 ? 8 : 4; }
/* Groups longer than PART are multiplied in parts. */
INLINE int64_t parts_of_group(const glm_weight *w) { return (w->group + PART - 1) / PART; }

INLINE int position(int bits, int input) { /* where an input of a word lies, in bits from the low end */
    return bits == 4 ? 4 * (input / 2 + 4 * (input & 1)) : 8 * (input / 2 + 2 * (input & 1));
}

static float code_at(const glm_weight *w, int64_t row, int64_t input) {
    int64_t words = w->inputs / per_word(w);
    uint32_t word = w->codes[(row / ROWS * words + input / per_word(w)) * ROWS + row % ROWS];
    int shift = position(w->bits, (int)(input % per_word(w)));
    return w->bits == 4 ? (float)(word >> shift & 15) : (float)(int8_t)(word >> shift & 255);
}

static float scale_at(const glm_weight *w, int64_t row, int64_t group, int plane) {
    int64_t at = ((row / ROWS * (w->inputs / w->group) + group) * planes(w) + plane) * ROWS + row % ROWS;
    return w->wide_scales ? ((const float *)w->scales)[at] : from_half(((const uint16_t *)w->scales)[at]);
}

/* Dequantised rows ids[count] -> out [count][inputs] float32. The ids were checked by the caller. */
EXPORT void glm_rows(const glm_weight *w, const int64_t *ids, int64_t count, float *out) {
    for (int64_t i = 0; i < count; i++)
        for (int64_t group = 0; group < w->inputs / w->group; group++) {
            float scale = scale_at(w, ids[i], group, 0), low = w->bits == 4 ? scale_at(w, ids[i], group, 1) : 0;
            for (int64_t input = group * w->group; input < (group + 1) * w->group; input++)
                out[i * w->inputs + input] = (code_at(w, ids[i], input) * scale + low) * w->unit;
        }
}

struct glm_step;
struct glm_stage;
struct glm_product;

typedef struct glm_kernels {
    const char *name;
    int tile, few_rows; /* activation rows that lie together in `many`; up to how many rows `few` is taken */
    glm_task prepare, few, many;
    void (*step_begin)(struct glm_step *, const struct glm_stage *);
    void (*step_work)(struct glm_step *, const struct glm_stage *, int64_t);
    void (*step_row)(const struct glm_product *, int64_t, float *);
    const struct glm_kernels *plain;          /* for up to FEW rows and exact products, or NULL: this one */
    int64_t (*filled)(const glm_weight *);    /* inputs of a prepared row, or NULL: those of the weights */
} glm_kernels;

static _Atomic(const glm_kernels *) chosen;

/* The kernels that multiply so many rows. */
INLINE const glm_kernels *kernels_for(const glm_kernels *kernels, int64_t rows) {
    return rows <= FEW && kernels->plain ? kernels->plain : kernels;
}

#include "step.h"

#define PASTE_(a, b) a##_##b
#define PASTE(a, b) PASTE_(a, b)
#define F(name) PASTE(name, GLM_NAME)

#define GLM_NAME portable
#define GLM_LANES 4
#define GLM_TILE 4
#define GLM_TARGET
#include "native.c"
#undef GLM_NAME
#undef GLM_LANES
#undef GLM_TILE
#undef GLM_TARGET

#if defined(__x86_64__)
#define GLM_NAME avx2
#define GLM_LANES 8
#define GLM_TILE 6
#define GLM_TARGET __attribute__((target("avx2,fma,f16c")))
#define GLM_HALVES(at) ((VF)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(at))))
#define GLM_BYTES(at) ((VI)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)(at))))
#define GLM_PAIRS(sum, a, b) ((sum) + (VI)_mm256_madd_epi16((__m256i)(a), (__m256i)(b)))
#define GLM_QUADS(sum, a, b) GLM_PAIRS(sum, _mm256_maddubs_epi16((__m256i)(a), (__m256i)(b)), _mm256_set1_epi16(1))
#include "native.c"
#undef GLM_NAME
#undef GLM_LANES
#undef GLM_TILE
#undef GLM_TARGET
#undef GLM_PAIRS
#undef GLM_QUADS
#undef GLM_HALVES
#undef GLM_BYTES

#define GLM_NAME avx512
#define GLM_LANES 16
#define GLM_TILE 12
#define GLM_TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")))
#define GLM_HALVES(at) ((VF)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(at))))
#define GLM_BYTES(at) ((VI)_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)(at))))
#define GLM_PAIRS(sum, a, b) ((sum) + (VI)_mm512_madd_epi16((__m512i)(a), (__m512i)(b)))
#define GLM_QUADS(sum, a, b) GLM_PAIRS(sum, _mm512_maddubs_epi16((__m512i)(a), (__m512i)(b)), _mm512_set1_epi16(1))
#include "native.c"
#undef GLM_NAME
#undef GLM_TARGET
#undef GLM_PAIRS
#undef GLM_QUADS

#define GLM_NAME avx512vnni
#define GLM_TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")))
#define GLM_PAIRS(sum, a, b) ((VI)_mm512_dpwssd_epi32((__m512i)(sum), (__m512i)(a), (__m512i)(b)))
#define GLM_QUADS(sum, a, b) ((VI)_mm512_dpbusd_epi32((__m512i)(sum), (__m512i)(a), (__m512i)(b)))
#include "native.c"
#undef GLM_NAME
#undef GLM_LANES
#undef GLM_TILE
#undef GLM_TARGET
#undef GLM_PAIRS
#undef GLM_QUADS
#undef GLM_HALVES
#undef GLM_BYTES

/* GCC 11 and clang 12 brought AMX; -DGLM_NO_AMX is for compilers that say so and have it not. */
#if defined(__linux__) && !defined(GLM_NO_AMX) && (defined(__clang__) ? __clang_major__ >= 12 : __GNUC__ >= 11)
#define GLM_AMX
#include "amx_part.h"
#endif
#endif

/* ---- what Python calls ---- */

static int usable(const glm_kernels *kernels) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (kernels == &kernels_avx2) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    if (kernels != &kernels_portable && !(__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                                          __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")))
        return 0;
    if (kernels == &kernels_avx512vnni) return __builtin_cpu_supports("avx512vnni");
#if defined(GLM_AMX)
    if (kernels == &kernels_avx512amx)
        return __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vbmi") && amx_allowed();
#endif
#endif
    return 1;
}

static const glm_kernels *const table[] = {
#if defined(GLM_AMX)
    &kernels_avx512amx,
#endif
#if defined(__x86_64__)
    &kernels_avx512vnni, &kernels_avx512, &kernels_avx2,
#endif
    &kernels_portable,
};

/* Choose an instruction set by name, or the best one (NULL). Returns its name, or NULL if this CPU has it not. */
EXPORT const char *glm_choose(const char *name) {
    for (size_t i = 0; i < sizeof table / sizeof *table; i++)
        if ((!name || !strcmp(name, table[i]->name)) && usable(table[i])) {
            atomic_store(&chosen, table[i]);
            return table[i]->name;
        }
    return NULL;
}

#ifndef GLM_SOURCES
#define GLM_SOURCES "unknown"
#endif
/* What this was built from (setup.py): Python refuses a library whose structs and functions may be others than it knows. */
EXPORT const char *glm_sources(void) { return GLM_SOURCES; }

/* y [rows][outputs] = x [rows][inputs] * weights + bias. Both float32 or both bfloat16. Returns 0, or 1 without memory. */
EXPORT int glm_linear(const glm_weight *w, const void *x, void *y, int64_t rows, int bf16, int exact, int threads) {
    const glm_kernels *kernels = kernels_for(atomic_load(&chosen), exact || w->coarse ? 1 : rows);
    int few = (rows <= kernels->few_rows || w->coarse) && !exact;
    glm_job job = {.w = w, .bf16 = bf16, .exact = exact, .tile = few ? 1 : kernels->tile, .wide = w->outputs};
    int64_t blocks = (w->outputs + ROWS - 1) / ROWS, parts = w->inputs / w->group * parts_of_group(w);
    int64_t most = minimum(rows, CHUNK), wide = (most + job.tile - 1) / job.tile * job.tile;
    int64_t inputs = kernels->filled ? kernels->filled(w) : w->inputs;
    size_t values = (size_t)(wide * inputs) * (exact ? 4 : 2), room = values + (size_t)(2 * parts * wide) * 4 + 64;
    if (few) room += 4 * PART * 2; /* `some12` reads up to three rows more than there are, of a last part */
    if (!rows) return 0;
    if (posix_memalign(&job.a, 64, room)) return 1;
    job.steps = (float *)((char *)job.a + (values + 63) / 64 * 64);
    job.sums = job.steps + parts * wide;
    for (int64_t done = 0; done < rows; done += job.rows) {
        job.rows = minimum(rows - done, most);
        job.source = (const char *)x + done * w->inputs * (bf16 ? 2 : 4);
        job.y = (char *)y + done * w->outputs * (bf16 ? 2 : 4);
        run(kernels->prepare, &job, (job.rows + job.tile - 1) / job.tile, rows <= MOST_ROWS && few ? 1 : threads);
        run(few ? kernels->few : kernels->many, &job, blocks, threads);
    }
    free(job.a);
    return 0;
}

static void pack_block(const glm_job *job, int64_t block) {
    const glm_weight *w = job->w;
    const uint8_t *codes = job->source;
    int64_t count = per_word(w), words = w->inputs / count;
    uint32_t *out = (uint32_t *)job->y + block * words * ROWS, mask = w->bits == 4 ? 15 : 255;
    for (int64_t row = 0; row < ROWS; row++) {
        const uint8_t *from = codes + (block * ROWS + row) * w->inputs;
        for (int64_t at = 0; at < words; at++) {
            uint32_t word = 0;
            if (block * ROWS + row < w->outputs)
                for (int i = 0; i < count; i++) word |= (from[at * count + i] & mask) << position(w->bits, i);
            out[at * ROWS + row] = word;
        }
    }
}

/* Codes [outputs][inputs], one a byte, into the layout above; `w` gives the measures, out has whole blocks. */
EXPORT void glm_pack(const glm_weight *w, const uint8_t *codes, uint32_t *out, int threads) {
    glm_job job = {.w = w, .source = codes, .y = out};
    run(pack_block, &job, (w->outputs + ROWS - 1) / ROWS, threads);
}

#else /* ---- the template: vectors of GLM_LANES output rows, tiles of GLM_TILE activation rows ---- */

#define VECTORS (ROWS / GLM_LANES)
#define VI F(vi)
#define VU F(vu)
#define VF F(vf)
#define VS F(vs)
typedef int32_t VI __attribute__((vector_size(GLM_LANES * 4), may_alias));
typedef uint32_t VU __attribute__((vector_size(GLM_LANES * 4), may_alias));
typedef float VF __attribute__((vector_size(GLM_LANES * 4), may_alias));
typedef int16_t VS __attribute__((vector_size(GLM_LANES * 4), may_alias));
/* The same in memory that others aligned. */
#define LOOSE_I F(loose_i)
#define LOOSE_U F(loose_u)
#define LOOSE_F F(loose_f)
#define LOOSE_H F(loose_h)
#define LOOSE_B F(loose_b)
typedef VI LOOSE_I __attribute__((aligned(4)));
typedef VU LOOSE_U __attribute__((aligned(4)));
typedef VF LOOSE_F __attribute__((aligned(4)));
typedef uint16_t LOOSE_H __attribute__((vector_size(GLM_LANES * 2), aligned(2), may_alias));
typedef int8_t LOOSE_B __attribute__((vector_size(GLM_LANES), aligned(1), may_alias));
#define TO_FLOAT(v) __builtin_convertvector((VI)(v), VF)

#ifndef GLM_BYTES /* LANES bytes as whole numbers: GCC 12 would take them one by one */
#define GLM_BYTES(at) __builtin_convertvector(*(const LOOSE_B *)(at), VI)
#endif

#ifndef GLM_PAIRS
#define GLM_PAIRS(sum, a, b) ((sum) + ((a) << 16 >> 16) * ((b) << 16 >> 16) + ((a) >> 16) * ((b) >> 16))
#endif

/* Scales (plane 0) or minima (plane 1) of LANES rows of a block. */
GLM_TARGET INLINE VF F(scales)(const glm_weight *w, int64_t block, int64_t group, int plane, int vector) {
    int64_t at = ((block * (w->inputs / w->group) + group) * planes(w) + plane) * ROWS + vector * GLM_LANES;
    if (w->wide_scales) return *(const LOOSE_F *)((const float *)w->scales + at);
#ifdef GLM_HALVES
    return GLM_HALVES((const uint16_t *)w->scales + at);
#else
    VU half = __builtin_convertvector(*(const LOOSE_H *)((const uint16_t *)w->scales + at), VU);
    VF value = (VF)((half & 0x7fffu) << 13) * 0x1p112f;
    return (VF)((VU)value | (half & 0x8000u) << 16);
#endif
}

INLINE const uint32_t *F(words)(const glm_weight *w, int64_t block, int64_t input) {
    return w->codes + (block * (w->inputs / per_word(w)) + input / per_word(w)) * ROWS;
}

/* Pair i of a word (i < 4 for int4, i < 2 for int8) as two int16. */
GLM_TARGET INLINE VI F(pair)(VU word, int i, int bits) {
    if (bits == 4) return (VI)(word >> 4 * i & 0x000f000fu);
    return (VI)(i ? (VS)word >> 8 : (VS)((VU)word << 8) >> 8);
}

/* The sum of one part of a group, scaled: the one place where integers become numbers. */
GLM_TARGET INLINE VF F(scaled)(VI sum, VF scale, VF low, float step, float total) {
    return TO_FLOAT(sum) * (scale * step) + low * total;
}

/* Store LANES outputs of one activation row, with bias, in the caller's dtype. */
GLM_TARGET INLINE void F(store)(const glm_job *job, int64_t row, int64_t output, VF value) {
    const glm_weight *w = job->w;
    int64_t count = minimum(GLM_LANES, w->outputs - output), at = row * job->wide + output - job->before;
    if (count <= 0) return;
    value *= w->unit;
    if (count == GLM_LANES) {
        if (w->bias) value += *(const LOOSE_F *)(w->bias + output);
        if (!job->bf16) {
            *(LOOSE_F *)((float *)job->y + at) = value;
            return;
        }
        VU bits = (VU)value, odd = (bits + 0x7fffu + (bits >> 16 & 1)) >> 16; /* to_bf16 */
        VU nan = (VU)((bits & 0x7fffffffu) > 0x7f800000u);
        *(LOOSE_H *)((uint16_t *)job->y + at) = __builtin_convertvector((odd & ~nan) | ((bits >> 16 | 0x40) & nan), LOOSE_H);
        return;
    }
    for (int64_t i = 0; i < count; i++) {
        float number = value[i] + (w->bias ? w->bias[output + i] : 0);
        if (job->bf16) ((uint16_t *)job->y)[at + i] = to_bf16(number);
        else ((float *)job->y)[at + i] = number;
    }
}

/* `count` inputs of a row from `first` on, as float32; rows that are not there are zeros. */
GLM_TARGET INLINE void F(read_part)(const glm_job *job, int64_t row, int64_t first, int64_t count, float *values) {
    int64_t at = row * job->w->inputs + first;
    if (row >= job->rows) memset(values, 0, (size_t)count * 4);
    else if (job->bf16)
        for (int64_t i = 0; i < count; i++) values[i] = from_bf16(((const uint16_t *)job->source)[at + i]);
    else memcpy(values, (const float *)job->source + at, (size_t)count * 4);
}

/* The same as whole numbers up to `top`, with their scale and sum at `at`. */
GLM_TARGET INLINE void F(round_part)(const glm_job *job, int64_t row, int64_t first, int64_t count, int64_t at, int32_t top,
                                     int32_t *whole) {
    float values[PART];
    int32_t most = 0, total = 0;
    VI sizes = {0}, sum = {0};
    int64_t end = round_up(count, GLM_LANES);
    F(read_part)(job, row, first, count, values);
    for (int64_t i = count; i < end; i++) values[i] = 0;
    for (int64_t i = 0; i < end; i += GLM_LANES) { /* without its sign a float orders like an integer */
        VI size = *(const LOOSE_I *)(values + i) & 0x7fffffff;
        VI larger = size > sizes;
        sizes = (size & larger) | (sizes & ~larger);
    }
    for (int i = 0; i < GLM_LANES; i++) most = sizes[i] > most ? sizes[i] : most;
    float largest;
    memcpy(&largest, &most, 4);
    float inverse = largest > 0x1p-100f ? (float)top / largest : 0;
    for (int64_t i = 0; i < end; i += GLM_LANES) {
        VF near = *(const LOOSE_F *)(values + i) * inverse + 0x1.8p23f; /* rounds to a whole number */
        VI number = (VI)near - 0x4b400000;
        *(LOOSE_I *)(whole + i) = number;
        sum += number;
    }
    for (int i = 0; i < GLM_LANES; i++) total += sum[i];
    /* NaN and infinity must come out as NaN, not as a plausible number. */
    job->steps[at] = most < 0x7f800000 ? largest / (float)top : __builtin_nanf("");
    job->sums[at] = (float)total * job->steps[at];
}

#include "byte_part.h"

/* One tile of activations: int16 pairs with a scale for each part of a group, or float32. */
GLM_TARGET static void F(prepare)(const glm_job *job, int64_t tile) {
    const glm_weight *w = job->w;
    int64_t tiles = (job->rows + job->tile - 1) / job->tile, part = 0;
    for (int64_t group = 0; group < w->inputs / w->group; group++)
        for (int64_t start = 0; start < w->group; start += PART, part++) {
            int64_t count = minimum(PART, w->group - start), first = group * w->group + start;
            /* What lies before: all tiles of the earlier parts, then the earlier tiles of this one. */
            int64_t before = (first * tiles + count * tile) * job->tile;
            for (int64_t r = 0; r < job->tile; r++) {
                int64_t row = tile * job->tile + r;
                int32_t whole[PART];
                if (job->exact) {
                    float values[PART];
                    F(read_part)(job, row, first, count, values);
                    for (int64_t i = 0; i < count; i++) ((float *)job->a)[before + i * job->tile + r] = values[i];
                    continue;
                }
                F(round_part)(job, row, first, count, part * tiles * job->tile + row, w->coarse ? 127 : 32767, whole);
                if (w->coarse) {
                    F(to_bytes)(whole, count, (int8_t *)job->a + before);
                    continue;
                }
                int16_t *a = (int16_t *)job->a + before;
                if (job->tile == 1)
                    for (int64_t i = 0; i < count; i++) a[i] = (int16_t)whole[i];
                else
                    for (int64_t i = 0; i < count; i += 2) {
                        a[i * job->tile + 2 * r] = (int16_t)whole[i];
                        a[i * job->tile + 2 * r + 1] = (int16_t)whole[i + 1];
                    }
            }
        }
}

/* `count` activation rows times `vectors` vectors of output rows, over one part of a group. */
GLM_TARGET INLINE void F(few_part)(const glm_job *job, int64_t block, int64_t group, int64_t start, int64_t inputs,
                                   int64_t first, int count, int vector, int vectors, int bits, VF out[][VECTORS]) {
    const glm_weight *w = job->w;
    int64_t input = group * w->group + start, part = group * parts_of_group(w) + start / PART;
    int64_t pairs = inputs / 2, per = bits == 4 ? 4 : 2;
    const uint32_t *codes = F(words)(w, block, input) + vector * GLM_LANES;
    const int32_t *a = (const int32_t *)job->a + input * job->rows / 2 + first * pairs;
    VI sum[4][8] = {0};
    for (int64_t at = 0; at < pairs / per; at++) {
        VU word[8];
        /* Caches guess badly where pages are small and blocks short; what lies beyond the end costs nothing. */
        for (int v = 0; v < vectors; v++) {
            __builtin_prefetch(codes + at * ROWS + v * GLM_LANES + AHEAD / 4);
            word[v] = *(const LOOSE_U *)(codes + at * ROWS + v * GLM_LANES);
        }
#pragma GCC unroll 4
        for (int i = 0; i < per; i++)
#pragma GCC unroll 4
            for (int r = 0; r < count; r++) {
                VI factor = a[r * pairs + at * per + i] - (VI){0};
#pragma GCC unroll 8
                for (int v = 0; v < vectors; v++) sum[r][v] = GLM_PAIRS(sum[r][v], factor, F(pair)(word[v], i, bits));
            }
    }
#pragma GCC unroll 8
    for (int v = 0; v < vectors; v++) {
        VF scale = F(scales)(w, block, group, 0, vector + v);
        VF low = bits == 4 ? F(scales)(w, block, group, 1, vector + v) : (VF){0};
#pragma GCC unroll 4
        for (int r = 0; r < count; r++) {
            int64_t row = part * job->rows + first + r;
            out[r][vector + v] += F(scaled)(sum[r][v], scale, low, job->steps[row], job->sums[row]);
        }
    }
}

/* Registers hold the sums of four vectors for one row, or of two vectors for two to four rows. */
#define FEW_ROWS(count, vectors, bits)                                                                         \
    for (int64_t group = 0; group < w->inputs / w->group; group++)                                             \
        for (int64_t start = 0; start < w->group; start += PART)                                               \
            for (int v = 0; v < VECTORS; v += (vectors) < VECTORS ? (vectors) : VECTORS)                       \
    F(few_part)(job, block, group, start, minimum(PART, w->group - start), first, count, v,                    \
                (vectors) < VECTORS ? (vectors) : VECTORS, bits, out)

#if GLM_LANES == 16
/* The same for 4, 6, 8 or 12 rows and two vectors, over a part of 32, 64 or 128 inputs: as the compiler knows both, the sums
 * stay in registers and rows lie at fixed distances. Rows that are not there are multiplied and not stored. */
GLM_TARGET INLINE void F(some_part)(const glm_job *job, int64_t block, int64_t group, int64_t start, int64_t inputs,
                                    int64_t first, int count, int bits, VF out[][VECTORS]) {
    const glm_weight *w = job->w;
    int64_t input = group * w->group + start, part = group * parts_of_group(w) + start / PART;
    int64_t pairs = inputs / 2, per = bits == 4 ? 4 : 2;
    const uint32_t *codes = F(words)(w, block, input);
    const int32_t *a = (const int32_t *)job->a + input * job->rows / 2 + first * pairs;
    const float *steps = job->steps + part * job->rows + first, *sums = job->sums + part * job->rows + first;
    VI sum[12][VECTORS] = {0};
    for (int64_t at = 0; at < pairs / per; at++) {
        VU word[VECTORS];
        for (int v = 0; v < VECTORS; v++) {
            __builtin_prefetch(codes + at * ROWS + v * GLM_LANES + AHEAD / 4);
            word[v] = *(const LOOSE_U *)(codes + at * ROWS + v * GLM_LANES);
        }
#pragma GCC unroll 4
        for (int i = 0; i < per; i++) {
            VI left = F(pair)(word[0], i, bits), right = F(pair)(word[1], i, bits);
#pragma GCC unroll 12
            for (int r = 0; r < count; r++) {
                VI factor = a[r * pairs + at * per + i] - (VI){0};
                sum[r][0] = GLM_PAIRS(sum[r][0], factor, left);
                sum[r][1] = GLM_PAIRS(sum[r][1], factor, right);
            }
        }
    }
    VF scale[VECTORS], low[VECTORS] = {0};
    for (int v = 0; v < VECTORS; v++) {
        scale[v] = F(scales)(w, block, group, 0, v);
        if (bits == 4) low[v] = F(scales)(w, block, group, 1, v);
    }
#pragma GCC unroll 12
    for (int r = 0; r < count; r++)
#pragma GCC unroll 2
        for (int v = 0; v < VECTORS; v++) out[r][v] += F(scaled)(sum[r][v], scale[v], low[v], steps[r], sums[r]);
}

#define SOME_ROWS(rows, bits, length)                              \
    for (int64_t group = 0; group < w->inputs / w->group; group++) \
        for (int64_t start = 0; start < w->group; start += PART)   \
    F(some_part)(job, block, group, start, length, first, rows, bits, out)

#define SOME(name, rows_)                                                                                           \
    GLM_TARGET static __attribute__((noinline)) void F(name)(const glm_job *job, int64_t block, int64_t first) {    \
        const glm_weight *w = job->w;                                                                               \
        VF out[rows_][VECTORS] = {0};                                                                               \
        switch (minimum(w->group, PART) + w->bits) {                                                                \
        case 32 + 4: SOME_ROWS(rows_, 4, 32); break;                                                                \
        case 64 + 4: SOME_ROWS(rows_, 4, 64); break;                                                                \
        case PART + 4: SOME_ROWS(rows_, 4, PART); break;                                                            \
        case 32 + 8: SOME_ROWS(rows_, 8, 32); break;                                                                \
        case 64 + 8: SOME_ROWS(rows_, 8, 64); break;                                                                \
        default: SOME_ROWS(rows_, 8, PART); break;                                                                  \
        }                                                                                                           \
        for (int64_t r = 0; r < minimum(rows_, job->rows - first); r++)                                             \
            for (int v = 0; v < VECTORS; v++) F(store)(job, first + r, block * ROWS + v * GLM_LANES, out[r][v]);    \
    }
SOME(some4, 4)
SOME(some6, 6)
SOME(some8, 8)
SOME(some12, 12)

/* Whether every part has as many inputs, and some_part knows how many. */
INLINE int F(is_even)(const glm_weight *w) { return w->group == 32 || w->group == 64 || w->group % PART == 0; }
#endif

GLM_TARGET static void F(few)(const glm_job *job, int64_t block) {
    const glm_weight *w = job->w;
    int64_t first = 0;
    if (w->coarse) {
        F(few_bytes)(job, block);
        return;
    }
#if GLM_LANES == 16
    while (job->rows - first > 3 && F(is_even)(w)) {
        int64_t left = job->rows - first;
        int64_t count = left <= 4 ? 4 : left <= 6 ? 6 : left > 8 && left <= 12 ? 12 : 8;
        (count == 4 ? F(some4) : count == 6 ? F(some6) : count == 8 ? F(some8) : F(some12))(job, block, first);
        first += minimum(count, left);
    }
#endif
    while (first < job->rows) {
        VF out[4][VECTORS] = {0};
        int64_t count = minimum(4, job->rows - first);
        switch (count * 10 + w->bits) {
        case 14: FEW_ROWS(1, 4, 4); break;
        case 24: FEW_ROWS(2, 2, 4); break;
        case 34: FEW_ROWS(3, 2, 4); break;
        case 44: FEW_ROWS(4, 2, 4); break;
        case 18: FEW_ROWS(1, 4, 8); break;
        case 28: FEW_ROWS(2, 2, 8); break;
        case 38: FEW_ROWS(3, 2, 8); break;
        default: FEW_ROWS(4, 2, 8); break;
        }
        for (int64_t r = 0; r < count; r++)
            for (int v = 0; v < VECTORS; v++) F(store)(job, first + r, block * ROWS + v * GLM_LANES, out[r][v]);
        first += count;
    }
}

/* Unpack one part of a block: pairs of int16 [pair][32 rows], or weights in float32 [input][32 rows]. */
GLM_TARGET INLINE void F(unpack)(const glm_weight *w, int64_t block, int64_t input, int64_t count, int bits, VI *pairs) {
    const uint32_t *codes = F(words)(w, block, input);
    int64_t per = bits == 4 ? 4 : 2;
    for (int64_t at = 0; at < count / 2 / per; at++)
        for (int v = 0; v < VECTORS; v++) {
            VU word = *(const LOOSE_U *)(codes + at * ROWS + v * GLM_LANES);
            for (int i = 0; i < per; i++) pairs[(at * per + i) * VECTORS + v] = F(pair)(word, i, bits);
        }
}

GLM_TARGET INLINE void F(unpack_float)(const glm_weight *w, int64_t block, int64_t input, int64_t count, int bits,
                                       VF *weights) {
    const uint32_t *codes = F(words)(w, block, input);
    int64_t width = bits == 4 ? 8 : 4, group = input / w->group;
    for (int v = 0; v < VECTORS; v++) {
        VF scale = F(scales)(w, block, group, 0, v), low = bits == 4 ? F(scales)(w, block, group, 1, v) : (VF){0};
        for (int64_t at = 0; at < count / width; at++) {
            VU word = *(const LOOSE_U *)(codes + at * ROWS + v * GLM_LANES);
            for (int i = 0; i < width; i++) {
                int shift = position(bits, i);
                VF code = bits == 4 ? TO_FLOAT(word >> shift & 15u) : TO_FLOAT((VI)(word << (24 - shift)) >> 24);
                weights[(at * width + i) * VECTORS + v] = code * scale + low;
            }
        }
    }
}

/* The first `rows` activation rows of a tile, a constant, times two vectors of outputs. */
GLM_TARGET INLINE void F(tile_pairs)(const int32_t *a, const VI *pairs, int64_t count, const float *steps, const float *sums,
                                     const VF scale[2], const VF low[2], VF out[][VECTORS], int rows) {
    VI sum[GLM_TILE][2] = {0};
    for (int64_t i = 0; i < count; i++) {
        VI left = pairs[i * VECTORS], right = pairs[i * VECTORS + 1];
#pragma GCC unroll 16
        for (int r = 0; r < rows; r++) {
            VI factor = a[i * GLM_TILE + r] - (VI){0};
            sum[r][0] = GLM_PAIRS(sum[r][0], factor, left);
            sum[r][1] = GLM_PAIRS(sum[r][1], factor, right);
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < rows; r++) {
        out[r][0] += F(scaled)(sum[r][0], scale[0], low[0], steps[r], sums[r]);
        out[r][1] += F(scaled)(sum[r][1], scale[1], low[1], steps[r], sums[r]);
    }
}

GLM_TARGET INLINE void F(tile_float)(const float *a, const VF *weights, int64_t count, VF out[][VECTORS], int rows) {
    VF sum[GLM_TILE][2] = {0};
    for (int64_t i = 0; i < count; i++) {
        VF left = weights[i * VECTORS], right = weights[i * VECTORS + 1];
#pragma GCC unroll 16
        for (int r = 0; r < rows; r++) {
            VF factor = a[i * GLM_TILE + r] - (VF){0};
            sum[r][0] += factor * left;
            sum[r][1] += factor * right;
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < rows; r++) {
        out[r][0] += sum[r][0];
        out[r][1] += sum[r][1];
    }
}

/* Calls `tile` with the arguments and as many rows, in thirds of a tile, as hold the `left` ones of it. */
#define TILE_ROWS(tile, left, ...)                                                                                            \
    do {                                                                                                                      \
        if ((left) <= GLM_TILE / 3) tile(__VA_ARGS__, GLM_TILE / 3);                                                          \
        else if ((left) <= 2 * GLM_TILE / 3) tile(__VA_ARGS__, 2 * GLM_TILE / 3);                                             \
        else tile(__VA_ARGS__, GLM_TILE);                                                                                     \
    } while (0)

GLM_TARGET INLINE void F(many_part)(const glm_job *job, int64_t block, int64_t input, int64_t count, int64_t part, int bits,
                                    VF out[][VECTORS]) {
    const glm_weight *w = job->w;
    VF weights[PART * VECTORS]; /* 16 kB: the first-level cache holds it, or half of it as pairs */
    int64_t tiles = (job->rows + GLM_TILE - 1) / GLM_TILE, before = input * tiles * GLM_TILE, group = input / w->group;
    if (job->exact) {
        const float *a = (const float *)job->a + before;
        F(unpack_float)(w, block, input, count, bits, weights);
        for (int v = 0; v < VECTORS; v += 2)
            for (int64_t tile = 0; tile < tiles; tile++)
                TILE_ROWS(F(tile_float), job->rows - tile * GLM_TILE, a + tile * count * GLM_TILE, weights + v, count,
                          (VF(*)[VECTORS]) & out[tile * GLM_TILE][v]);
        return;
    }
    const int32_t *a = (const int32_t *)job->a + before / 2;
    const float *steps = job->steps + part * tiles * GLM_TILE, *sums = job->sums + part * tiles * GLM_TILE;
    F(unpack)(w, block, input, count, bits, (VI *)weights);
    for (int v = 0; v < VECTORS; v += 2) {
        VF scale[2] = {F(scales)(w, block, group, 0, v), F(scales)(w, block, group, 0, v + 1)}, low[2] = {0};
        if (bits == 4) low[0] = F(scales)(w, block, group, 1, v), low[1] = F(scales)(w, block, group, 1, v + 1);
        for (int64_t tile = 0; tile < tiles; tile++)
            TILE_ROWS(F(tile_pairs), job->rows - tile * GLM_TILE, a + tile * count / 2 * GLM_TILE, (const VI *)weights + v,
                      count / 2, steps + tile * GLM_TILE, sums + tile * GLM_TILE, scale, low,
                      (VF(*)[VECTORS]) & out[tile * GLM_TILE][v]);
    }
}

GLM_TARGET static void F(many)(const glm_job *job, int64_t block) {
    const glm_weight *w = job->w;
    VF out[CHUNK][VECTORS];
    int64_t part = 0, tiles = (job->rows + GLM_TILE - 1) / GLM_TILE;
    memset(out, 0, (size_t)(tiles * GLM_TILE) * sizeof *out);
    for (int64_t group = 0; group < w->inputs / w->group; group++)
        for (int64_t start = 0; start < w->group; start += PART, part++) {
            int64_t count = minimum(PART, w->group - start), input = group * w->group + start;
            if (w->bits == 4) F(many_part)(job, block, input, count, part, 4, out);
            else F(many_part)(job, block, input, count, part, 8, out);
        }
    for (int64_t row = 0; row < job->rows; row++)
        for (int v = 0; v < VECTORS; v++) F(store)(job, row, block * ROWS + v * GLM_LANES, out[row][v]);
}

#include "step_part.h"

#define STRING_(x) #x
#define STRING(x) STRING_(x)
static const glm_kernels F(kernels) = {STRING(GLM_NAME), GLM_TILE, GLM_LANES == 16 ? FEW_WIDE : FEW, F(prepare), F(few), F(many),
                                       F(step_begin), F(step_work), F(step_row), NULL, NULL};

#undef STRING_
#undef STRING
#undef VECTORS
#undef VI
#undef VU
#undef VF
#undef VS
#undef LOOSE_I
#undef LOOSE_U
#undef LOOSE_F
#undef LOOSE_H
#undef LOOSE_B
#undef TO_FLOAT
#undef FEW_ROWS
#undef SOME_ROWS
#undef SOME
#undef TILE_ROWS
#if GLM_LANES == 4
#undef GLM_BYTES
#undef GLM_PAIRS
#undef GLM_QUADS
#endif
#endif
