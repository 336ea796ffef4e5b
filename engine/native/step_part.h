/* The vector half of step.h, included by native.c for each instruction set. */

GLM_TARGET INLINE VF F(load)(const void *at, int64_t i, int bf16) {
    if (!bf16) return *(const LOOSE_F *)((const float *)at + i);
    return (VF)(__builtin_convertvector(*(const LOOSE_H *)((const uint16_t *)at + i), VU) << 16);
}

/* The sums of the lanes of four vectors. */
GLM_TARGET INLINE void F(sums4)(const VF v[4], float out[4]) {
    VI even, odd, low, high, four;
#if GLM_LANES == 16
    VI eight;
#endif
    for (int i = 0; i < GLM_LANES; i++) {
        even[i] = (i & ~1) + (i & 1) * GLM_LANES;
        odd[i] = even[i] + 1;
        low[i] = (i & ~3) + (i & 1) + (i & 2) / 2 * GLM_LANES;
        high[i] = low[i] + 2;
        four[i] = i ^ 4;
#if GLM_LANES == 16
        eight[i] = i ^ 8;
#endif
    }
    VF a = __builtin_shuffle(v[0], v[1], even) + __builtin_shuffle(v[0], v[1], odd);
    VF b = __builtin_shuffle(v[2], v[3], even) + __builtin_shuffle(v[2], v[3], odd);
    VF sum = __builtin_shuffle(a, b, low) + __builtin_shuffle(a, b, high); /* lanes are 0 1 2 3 0 1 2 3 ... */
#if GLM_LANES > 4
    sum += __builtin_shuffle(sum, four);
#endif
#if GLM_LANES == 16
    sum += __builtin_shuffle(sum, eight);
#endif
    (void)four;
    memcpy(out, &sum, 16);
}

/* x times four rows of `count` numbers; count is a multiple of 16. */
GLM_TARGET INLINE void F(dots4)(const float *x, const void *const rows[4], int64_t count, int bf16, float out[4]) {
    VF sum[4] = {0};
    for (int64_t i = 0; i < count; i += GLM_LANES) {
        VF factor = *(const LOOSE_F *)(x + i);
#pragma GCC unroll 4
        for (int r = 0; r < 4; r++) sum[r] += factor * F(load)(rows[r], i, bf16);
    }
    F(sums4)(sum, out);
}

GLM_TARGET static float F(dot)(const float *x, const float *y, int64_t count) {
    VF sum[4] = {0};
    float out[4];
    int64_t i = 0;
    for (; i + 4 * GLM_LANES <= count; i += 4 * GLM_LANES)
#pragma GCC unroll 4
        for (int r = 0; r < 4; r++) sum[r] += *(const LOOSE_F *)(x + i + r * GLM_LANES) * *(const LOOSE_F *)(y + i + r * GLM_LANES);
    for (; i < count; i += GLM_LANES) sum[0] += *(const LOOSE_F *)(x + i) * *(const LOOSE_F *)(y + i);
    F(sums4)(sum, out);
    return (out[0] + out[1]) + (out[2] + out[3]);
}

GLM_TARGET INLINE VF F(either)(VI which, VF a, VF b) { return (VF)(((VI)a & which) | ((VI)b & ~which)); }

/* e to the x within 2 units of the last place for -86 <= x <= 88; what lies outside counts as that, NaN stays NaN. */
GLM_TARGET INLINE VF F(exp)(VF x) {
    VF floor = -86.0f - (VF){0}, ceiling = 88.0f - (VF){0};
    x = F(either)(x < floor, floor, x);
    x = F(either)(x > ceiling, ceiling, x);
    VF whole = x * 1.44269504f + 0x1.8p23f;
    VI power = (VI)whole << 23; /* the low bits of `whole` are the whole number */
    whole -= 0x1.8p23f;
    VF rest = x - whole * 0x1.62e4p-1f - whole * 0x1.7f7d1cp-20f;
    VF sum = 1.9875691500e-4f * rest + 1.3981999507e-3f; /* Cephes' expf */
    sum = sum * rest + 8.3334519073e-3f;
    sum = sum * rest + 4.1665795894e-2f;
    sum = sum * rest + 1.6666665459e-1f;
    sum = sum * rest + 5.0000001201e-1f;
    sum = sum * rest * rest + rest + 1.0f;
    return (VF)((VI)sum + power);
}

GLM_TARGET static void F(rms_norm)(const float *x, const float *weight, int64_t size, float eps, float *out) {
    float scale = 1 / __builtin_sqrtf(F(dot)(x, x, size) / (float)size + eps);
    for (int64_t i = 0; i < size; i += GLM_LANES)
        *(LOOSE_F *)(out + i) = *(const LOOSE_F *)(x + i) * scale * *(const LOOSE_F *)(weight + i);
}

/* Row `token` of an embedding. */
GLM_TARGET static void F(step_row)(const glm_product *embedding, int64_t token, float *out) {
    const glm_weight *w = &embedding->w;
    if (w->codes) {
        glm_rows(w, &token, 1, out);
        return;
    }
    const char *row = (const char *)embedding->dense + token * w->inputs * (embedding->dense_bf16 ? 2 : 4);
    for (int64_t i = 0; i < w->inputs; i += GLM_LANES) *(LOOSE_F *)(out + i) = F(load)(row, i, embedding->dense_bf16);
}

/* One row of a cache: `width` numbers, as it stores them. Those of 8 bits are what torch makes of them (attention.py). */
GLM_TARGET INLINE void F(put)(const glm_cache *cache, char *to, const float *from, int64_t width) {
    if (cache->type == CACHE_FLOAT32) memcpy(to, from, (size_t)width * 4);
    else if (cache->type == CACHE_BFLOAT16)
        for (int64_t i = 0; i < width; i++) ((uint16_t *)to)[i] = to_bf16(from[i]);
    else {
        float most = 0, fault = 0; /* fault: NaN where some number is none, or infinite */
        for (int64_t i = 0; i < width; i++) {
            float size = __builtin_fabsf(from[i]);
            most = size > most ? size : most;
            fault += from[i] - from[i];
        }
        float scale = most / 127, step = scale > 1e-30f ? scale : 1e-30f;
        for (int64_t i = 0; i < width; i += GLM_LANES) {
            VF whole = *(const LOOSE_F *)(from + i) / step + 0x1.8p23f; /* the low bits of it are the whole number */
            *(LOOSE_B *)(to + i) = __builtin_convertvector((VI)whole, LOOSE_B);
        }
        scale += fault;
        memcpy(to + width, &scale, 4);
    }
}

/* Queries and keys of a row are rotated to their position; key and value go into its cache. */
GLM_TARGET static void F(turn)(glm_step *step, const glm_stage *stage, int64_t row) {
    const glm_network *net = step->row[row].net;
    const glm_layer *layer = &net->layer[stage->number];
    const glm_cache *cache = step->row[row].cache;
    const float *cosines = step->cosines + row * net->rotated, *sines = step->sines + row * net->rotated;
    int64_t width = net->head_dim, rotated = net->heads + net->kv_heads;
    int64_t stride = net->interleaved ? 2 : 1, apart = net->interleaved ? 1 : width / 2;
    float *qkv = step->qkv + row * (net->heads + 2 * net->kv_heads) * width;
    for (int64_t h = 0; h < rotated; h++) {
        float *head = qkv + h * width;
        const float *norm = h < net->heads ? layer->query_norm : layer->key_norm;
        if (norm) F(rms_norm)(head, norm, width, net->eps, head);
        for (int64_t i = 0; i < net->rotated; i++) {
            float a = head[i * stride], b = head[i * stride + apart];
            head[i * stride] = a * cosines[i] - b * sines[i];
            head[i * stride + apart] = b * cosines[i] + a * sines[i];
        }
    }
    for (int64_t h = 0; h < 2 * net->kv_heads; h++) {
        const float *from = qkv + (net->heads + h) * width;
        char *to = h < net->kv_heads ? cache->keys[stage->number] : cache->values[stage->number];
        F(put)(cache, to + (h % net->kv_heads * cache->capacity + cache->length) * row_bytes(cache, width), from, width);
    }
}

/* `count` rows of a cached head from row `at` as float32; narrow ones are widened into `room`. */
GLM_TARGET INLINE const float *F(cached)(const glm_cache *cache, const void *rows, int64_t at, int64_t count, int64_t width,
                                         float *room) {
    const char *from = (const char *)rows + at * row_bytes(cache, width);
    if (cache->type == CACHE_FLOAT32) return (const float *)from;
    if (cache->type == CACHE_BFLOAT16)
        for (int64_t i = 0; i < count * width; i += GLM_LANES) *(LOOSE_F *)(room + i) = F(load)(from, i, 1);
    else
        for (int64_t p = 0; p < count; p++, from += width + 4) {
            float scale;
            memcpy(&scale, from + width, 4);
            for (int64_t i = 0; i < width; i += GLM_LANES)
                *(LOOSE_F *)(room + p * width + i) = TO_FLOAT(GLM_BYTES(from + i)) * scale;
        }
    return room;
}

#define NEAR 32 /* positions whose keys, or values, the first-level cache holds */

/* Ask for `count` rows of the cache before they are needed. */
INLINE void F(fetch)(const glm_cache *cache, const void *rows, int64_t at, int64_t count, int64_t width) {
    int64_t size = row_bytes(cache, width);
    for (int64_t i = 0; i < count * size; i += 64) __builtin_prefetch((const char *)rows + at * size + i);
}

/* Ask for the first keys that are attended to behind those of this key head. */
GLM_TARGET INLINE void F(fetch_next)(const glm_step *step, const glm_stage *stage, int64_t row, int64_t kv_head) {
    const glm_network *net = step->net;
    if (++kv_head == net->kv_heads) kv_head = 0, row++;
    if (row == step->rows) return;
    const glm_cache *cache = step->row[row].cache;
    F(fetch)(cache, cache->keys[stage->number], kv_head * cache->capacity, minimum(NEAR, step->total[row]), net->head_dim);
}

/* out [width] (+)= the sum of factors[p] * rows[p][width]. */
GLM_TARGET INLINE void F(weigh)(const float *factors, const float *rows, int64_t count, int64_t width, int vectors, float *out) {
    VF sum[8];
#pragma GCC unroll 8
    for (int v = 0; v < vectors; v++) sum[v] = *(const LOOSE_F *)(out + v * GLM_LANES);
    for (int64_t p = 0; p < count; p++)
#pragma GCC unroll 8
        for (int v = 0; v < vectors; v++) sum[v] += factors[p] * *(const LOOSE_F *)(rows + p * width + v * GLM_LANES);
#pragma GCC unroll 8
    for (int v = 0; v < vectors; v++) *(LOOSE_F *)(out + v * GLM_LANES) = sum[v];
}

/* Up to QUERIES query heads of one key head over one stretch of a row's context: sums that `gather` puts together. */
GLM_TARGET static void F(attend)(glm_step *step, const glm_stage *stage, int64_t row, int64_t kv_head, int64_t stretch,
                                 int64_t first, int64_t queries) {
    const glm_network *net = step->net;
    const glm_cache *cache = step->row[row].cache;
    int64_t width = net->head_dim, start = stretch * STRETCH, count = minimum(STRETCH, step->total[row] - start);
    int64_t part = (step->stretch_before[row] + stretch) * net->heads + first;
    const float *query = step->qkv + (row * (net->heads + 2 * net->kv_heads) + first) * width;
    float scores[QUERIES][STRETCH], room[NEAR * LARGEST_HEAD], scale = 1 / __builtin_sqrtf((float)width);
    int64_t base = kv_head * cache->capacity + start;
    const void *all_keys = cache->keys[stage->number], *all_values = cache->values[stage->number];
    for (int64_t at = 0; at < count; at += NEAR) {
        int64_t here = minimum(NEAR, count - at), next = minimum(NEAR, count - at - here);
        if (next) F(fetch)(cache, all_keys, base + at + here, next, width);
        else F(fetch)(cache, all_values, base, minimum(NEAR, count), width);
        const float *keys = F(cached)(cache, all_keys, base + at, here, width, room);
        for (int64_t q = 0; q < queries; q++)
            for (int64_t p = 0; p < here; p += 4) {
                const void *rows[4];
                float found[4];
                for (int64_t r = 0; r < 4; r++) rows[r] = keys + minimum(p + r, here - 1) * width;
                F(dots4)(query + q * width, rows, width, 0, found);
                memcpy(&scores[q][at + p], found, sizeof found); /* what is written beyond the end is not read */
            }
    }
    for (int64_t q = 0; q < queries; q++) {
        int64_t at = part + q;
        float most = scores[q][0], sum = 0;
        for (int64_t p = 1; p < count; p++) most = scores[q][p] > most ? scores[q][p] : most;
        for (int64_t p = count; p % GLM_LANES; p++) scores[q][p] = -__builtin_inff();
        VF sums = {0};
        for (int64_t p = 0; p < count; p += GLM_LANES) {
            VF weights = F(exp)((*(const LOOSE_F *)&scores[q][p] - most) * scale);
            if (p + GLM_LANES > count)
                for (int64_t i = count - p; i < GLM_LANES; i++) weights[i] = 0;
            sums += weights;
            *(LOOSE_F *)&scores[q][p] = weights;
        }
        for (int i = 0; i < GLM_LANES; i++) sum += sums[i];
        step->most[at] = most * scale;
        step->sums[at] = sum;
        memset(step->partial + at * width, 0, (size_t)width * 4);
    }
    for (int64_t at = 0; at < count; at += NEAR) {
        int64_t here = minimum(NEAR, count - at), next = minimum(NEAR, count - at - here);
        if (next) F(fetch)(cache, all_values, base + at + here, next, width);
        else if (start + count < step->total[row])
            F(fetch)(cache, all_keys, base + count, minimum(NEAR, step->total[row] - start - count), width);
        else F(fetch_next)(step, stage, row, kv_head);
        const float *values = F(cached)(cache, all_values, base + at, here, width, room);
        for (int64_t q = 0; q < queries; q++) {
            float *out = step->partial + (part + q) * width;
            int64_t i = 0;
            for (; i + 8 * GLM_LANES <= width; i += 8 * GLM_LANES) F(weigh)(&scores[q][at], values + i, here, width, 8, out + i);
            for (; i + 4 * GLM_LANES <= width; i += 4 * GLM_LANES) F(weigh)(&scores[q][at], values + i, here, width, 4, out + i);
            for (; i < width; i += GLM_LANES) F(weigh)(&scores[q][at], values + i, here, width, 1, out + i);
        }
    }
}

/* The stretches of a row's context, each with its own largest score, as one attention: into `source`. */
GLM_TARGET static void F(gather)(glm_step *step, int64_t row) {
    const glm_network *net = step->net;
    int64_t stretches = step->stretch_before[row + 1] - step->stretch_before[row], width = net->head_dim;
    int64_t part = step->stretch_before[row] * net->heads;
    for (int64_t h = 0; h < net->heads; h++) {
        const float *mosts = step->most + part + h;
        float most = mosts[0], sum = 0, *out = step->source + (row * net->heads + h) * width;
        for (int64_t s = 1; s < stretches; s++) most = mosts[s * net->heads] > most ? mosts[s * net->heads] : most;
        memset(out, 0, (size_t)width * 4);
        for (int64_t s = 0; s < stretches; s++) {
            int64_t at = part + s * net->heads + h;
            float share = F(exp)(step->most[at] - most - (VF){0})[0];
            sum += step->sums[at] * share;
            for (int64_t i = 0; i < width; i += GLM_LANES)
                *(LOOSE_F *)(out + i) += *(const LOOSE_F *)(step->partial + at * width + i) * share;
        }
        for (int64_t i = 0; i < width; i += GLM_LANES) *(LOOSE_F *)(out + i) /= sum;
    }
}

/* What a stage starts from, of one row: its inputs in `source`, in float32 and, where rows lie alone, rounded. */
GLM_TARGET static void F(begin_row)(glm_step *step, const glm_stage *stage, int64_t row) {
    const glm_network *net = step->row[row].net;
    const glm_layer *layer = &net->layer[stage->number]; /* of the head: one behind the last */
    float *x = step->x + row * net->hidden, *source = step->source + row * net->hidden;
    const float *gates = step->gate_up + row * 2 * net->ffn;
    const float *closing = NULL; /* the norm with which `branch` is added to x before anything else */
    if (stage->begin == GATE_UP) closing = layer->attention_norm;
    else if ((stage->begin == QKV || stage->begin == HEAD) && stage->number) closing = layer[-1].feed_forward_norm;
    if (closing) {
        F(rms_norm)(step->branch + row * net->hidden, closing, net->hidden, net->eps, source);
        for (int64_t i = 0; i < net->hidden; i++) x[i] += source[i];
    }
    switch (stage->begin) {
    case QKV: F(rms_norm)(x, layer->input_norm, net->hidden, net->eps, source); break;
    case GATE_UP: F(rms_norm)(x, layer->second_norm, net->hidden, net->eps, source); break;
    case HEAD: F(rms_norm)(x, net->last_norm, net->hidden, net->eps, source); break;
    case O_PROJ: F(gather)(step, row); break;
    case ATTEND: F(turn)(step, stage, row); break;
    default: /* DOWN */
        for (int64_t i = 0; i < net->ffn; i += GLM_LANES) {
            VF gate = *(const LOOSE_F *)(gates + i), up = *(const LOOSE_F *)(gates + net->ffn + i);
            *(LOOSE_F *)(step->source + row * net->ffn + i) = gate / (1.0f + F(exp)(-gate)) * up;
        }
    }
    for (int64_t i = 0; i < stage->count && step->tile == 1; i++)
        if (step->jobs[i].w && step->is_first[i]) step->prepare(&step->jobs[i], row);
}

/* What a stage starts from: the products' room, and the rows' inputs if they are not a stage of their own. */
GLM_TARGET static void F(step_begin)(glm_step *step, const glm_stage *stage) {
    if (stage->begin == NOTHING) return;
    const glm_product *products = products_of(step, stage, 0);
    for (int64_t i = 0; i < stage->count; i++) {
        const glm_weight *w = &products[i].w;
        step->jobs[i].w = NULL;
        if (!w->codes) continue;
        int64_t same = 0;
        for (; same < i; same++) {
            const glm_weight *other = &products[same].w;
            if (other->codes && other->group == w->group && other->bits == w->bits && other->coarse == w->coarse) break;
        }
        const glm_job *room = &step->rounded[same];
        step->jobs[i] = (glm_job){.w = w, .source = step->source, .a = room->a, .steps = room->steps, .sums = room->sums,
                                  .rows = step->rows, .tile = step->tile, .wide = ROWS};
        step->is_first[i] = same == i;
    }
    if (stage->work == EACH_ROW) return;
    for (int64_t row = 0; row < step->rows; row++) F(begin_row)(step, stage, row);
    for (int64_t i = 0; i < stage->count && step->tile > 1; i++)
        if (step->jobs[i].w && step->is_first[i])
            for (int64_t tile = 0; tile < (step->rows + step->tile - 1) / step->tile; tile++) step->prepare(&step->jobs[i], tile);
}

/* 32 outputs of a product of dense weights, for one row, with bias. Bound by the reading of weights: other rows find
 * them in the cache. */
GLM_TARGET static void F(dense)(const float *source, const glm_product *product, int64_t first, float *values) {
    const glm_weight *w = &product->w;
    const char *weights = product->dense;
    int64_t bytes = w->inputs * (product->dense_bf16 ? 2 : 4), count = minimum(ROWS, w->outputs - first);
    for (int64_t r = 0; r < count; r += 4) {
        const void *rows[4];
        for (int64_t i = 0; i < 4; i++) rows[i] = weights + minimum(first + r + i, w->outputs - 1) * bytes;
        if (product->dense_bf16) F(dots4)(source, rows, w->inputs, 1, values + r);
        else F(dots4)(source, rows, w->inputs, 0, values + r);
    }
    if (w->bias)
        for (int64_t i = 0; i < count; i++) values[i] += w->bias[first + i];
}

/* What a row's adapters make of 32 of its outputs: (values * gain + offset + low * up), into y. */
GLM_TARGET static __attribute__((noinline)) void F(finish)(const glm_product *product, int64_t first, const float *low, int add,
                                                           float *values, float *y) {
    int64_t count = minimum(ROWS, product->w.outputs - first);
    const float *up = product->up + first * product->rank;
    if (product->gain)
        for (int64_t i = 0; i < count; i++) values[i] *= product->gain[first + i];
    if (product->offset)
        for (int64_t i = 0; i < count; i++) values[i] += product->offset[first + i];
    for (int64_t r = 0; r < product->rank; r++)
        for (int64_t i = 0; i < ROWS; i += GLM_LANES)
            *(LOOSE_F *)(values + i) += low[r] * *(const LOOSE_F *)(up + r * ROWS + i);
    if (add)
        for (int64_t i = 0; i < count; i++) y[i] += values[i];
    else memcpy(y, values, (size_t)count * 4);
}

/* Block `block` of the products of a stage: 32 outputs of one of them, for all rows. */
GLM_TARGET static void F(product)(glm_step *step, const glm_stage *stage, int64_t block) {
    const glm_product *products = products_of(step, stage, 0);
    int64_t number = 0, before = 0;
    while (block >= (products[number].w.outputs + ROWS - 1) / ROWS) {
        const glm_product *passed = &products[number++];
        block -= (passed->w.outputs + ROWS - 1) / ROWS;
        before += passed->w.outputs;
    }
    const glm_product *product = &products[number];
    int64_t first = block * ROWS, inputs = product->w.inputs;
    float values[MOST_ROWS][ROWS] __attribute__((aligned(64)));
    for (int64_t row = 0; row < step->rows && stage->rank; row++) { /* needed behind the product, and nothing guesses that */
        if (row && !has_other_net(step, row)) continue;
        const glm_product *own = &products_of(step, stage, row)[number];
        const float *up = own->up + first * own->rank;
        for (int64_t r = 0; r < own->rank; r++) {
            __builtin_prefetch(up + r * ROWS);
            __builtin_prefetch(up + r * ROWS + ROWS / 2);
        }
    }
    if (product->w.outputs - first < ROWS) memset(values, 0, (size_t)step->rows * sizeof *values);
    if (product->w.codes) {
        glm_job job = step->jobs[number];
        job.y = values;
        job.before = first;
        step->multiply(&job, block);
    } else
        for (int64_t row = 0; row < step->rows; row++) F(dense)(step->source + row * inputs, product, first, values[row]);
    int64_t low = rank_of(products, number);
    for (int64_t row = 0; row < step->rows; row++) {
        if (row && has_other_net(step, row)) {
            products = products_of(step, stage, row);
            low = rank_of(products, number);
        }
        F(finish)(products + number, first, step->low + row * stage->rank + low, stage->add, values[row],
                  stage->y + row * stage->width + before + first);
    }
}

GLM_TARGET static void F(step_work)(glm_step *step, const glm_stage *stage, int64_t block) {
    const glm_network *net = step->net;
    if (stage->work == ATTEND) {
        int64_t row = 0, heads = net->kv_heads, group = net->heads / heads;
        while (block >= heads * step->stretch_before[row + 1]) row++;
        block -= heads * step->stretch_before[row];
        int64_t stretches = step->stretch_before[row + 1] - step->stretch_before[row]; /* a thread that goes on reads on */
        int64_t kv_head = block / stretches, stretch = block % stretches;
        for (int64_t q = 0; q < group; q += QUERIES)
            F(attend)(step, stage, row, kv_head, stretch, kv_head * group + q, minimum(QUERIES, group - q));
    } else if (stage->work == LOW) {
        int64_t inner = block / step->rows, row = block % step->rows; /* rows of the same adapters share what is read */
        const glm_product *product = products_of(step, stage, row);
        int64_t at = inner;
        if (inner >= rank_of(product, stage->count)) return; /* others' adapters have larger ranks */
        while (inner >= product->rank) inner -= product++->rank;
        const char *next = (const char *)(product->down + (inner + 1) * product->w.inputs);
        if (row == 0 || has_other_net(step, row))
            for (int64_t i = 0; i < product->w.inputs * 4; i += 64) __builtin_prefetch(next + i);
        const float *down = product->down + inner * product->w.inputs;
        step->low[row * stage->rank + at] = F(dot)(step->source + row * product->w.inputs, down, product->w.inputs);
    } else if (stage->work == EACH_ROW) F(begin_row)(step, stage, block);
    else F(product)(step, stage, block);
}
