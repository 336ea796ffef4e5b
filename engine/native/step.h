/* One token of each of up to MOST_ROWS sequences through a whole decoder in one call: what torch would do in a dozen
 * small operations a layer.
 *
 * A step is a list of stages. The blocks of a stage (32 outputs of a product for all rows, a stretch of one row's context
 * for one key head) go to whichever thread asks next; who finishes the last one does the small work that the next stage
 * starts from (a norm, the rotation, SiLU, rounding activations) and opens it. So there is one meeting of the threads for
 * each stage, nothing is allocated, and no number depends on how many threads there are. Of SEVERAL rows that work is a
 * stage of its own, with a block for each row.
 *
 * Nor does a row's number depend on the rows beside it. Integer products have no order of addition (native.c); all that
 * is float32 is done row by row, by the same instructions whether there is one row or sixteen. A test holds this.
 *
 * Each row has a network of its own: of the same base, whose matrices are read once for all rows, and whatever its
 * adapters make of it (low-rank halves, factors, trained norms).
 *
 * Everything between the products is float32. Keys and values go to the caller's cache in its own type.
 */

#define STRETCH 128     /* positions of the context that are attended to in one block */
#define QUERIES 16      /* query heads of one key head that read it together */
#define LARGEST_HEAD 256
#define MOST_ROWS 16    /* sequences that advance together */
#define SEVERAL 4       /* rows whose small work is worth a meeting of its own */
#define MOST_PRODUCTS 3 /* that read one input: queries, keys, values */

typedef struct glm_product { /* y = (x * W + bias) * gain + offset + (x * down) * up */
    glm_weight w;        /* without codes the weights are dense, and only outputs, inputs and bias hold */
    const void *dense;   /* [outputs][inputs] */
    const float *gain, *offset; /* [outputs] or NULL */
    const float *down, *up;     /* [rank][inputs], [block of 32 outputs][rank][32] */
    int64_t rank;
    int32_t dense_bf16;
} glm_product;

typedef struct {
    const float *input_norm, *second_norm; /* [hidden] */
    const float *attention_norm, *feed_forward_norm; /* [hidden] or NULL: of what is added to x */
    const float *query_norm, *key_norm;    /* [head_dim] or NULL */
    const glm_product *qkv, *o_proj, *gate_up, *down_proj;
    int64_t qkv_count, gate_up_count; /* how many products lie side by side: queries, keys, values; gate, up */
} glm_layer;

typedef struct {
    const glm_layer *layer;
    const glm_product *embedding, *head; /* embedding: a matrix whose rows are looked up, or NULL */
    const float *last_norm, *frequencies; /* frequencies [rotated]: radians a position */
    int64_t layers, hidden, heads, kv_heads, head_dim, ffn;
    int64_t rotated;    /* pairs of a head that are rotated */
    int64_t rank;       /* numbers between low-rank halves in a stage, at most: glm_step_rank */
    int32_t interleaved; /* a pair is (2i, 2i + 1), else (i, i + head_dim / 2) */
    int32_t coarse;      /* some weights are, so all products are those of few rows (byte_part.h) */
    float eps;
} glm_network;

typedef enum { CACHE_FLOAT32, CACHE_BFLOAT16, CACHE_INT8 } glm_cache_type;

typedef struct {
    void *const *keys, *const *values; /* [layers], each [kv_heads][capacity] rows */
    int64_t capacity, length;
    int32_t type; /* a row is head_dim numbers of it; behind those of CACHE_INT8 stands their scale, a float32 */
} glm_cache;

INLINE int64_t row_bytes(const glm_cache *cache, int64_t head_dim) {
    return cache->type == CACHE_FLOAT32 ? 4 * head_dim : cache->type == CACHE_BFLOAT16 ? 2 * head_dim : head_dim + 4;
}

typedef struct { /* the next token of one sequence */
    const glm_network *net; /* rows differ in norms and in what adapters add; weights and measures are the same */
    const glm_cache *cache;
    const float *embedded; /* [hidden]: what the token looks like, or NULL: it is looked up */
    int64_t token, position;
} glm_row;

typedef enum { NOTHING, QKV, ATTEND, O_PROJ, GATE_UP, DOWN, HEAD, LOW, EACH_ROW } glm_kind;

typedef struct glm_stage {
    glm_kind begin, work; /* what is made for it before; what its blocks do */
    glm_kind kind;        /* of its products: where a row's network has them */
    float *y; /* [rows][width]: where products write; added to what is there if `add` */
    int64_t number, count, blocks; /* layer, products */
    int64_t width, rank; /* of a row: outputs of all products, and numbers between their low-rank halves, at most */
    int add;
} glm_stage;

typedef struct glm_step {
    const glm_network *net;
    const glm_row *row;
    glm_stage *stages;
    int64_t stage_count, rows;
    int64_t total[MOST_ROWS];             /* positions that a row attends to, the new one with them */
    int64_t stretch_before[MOST_ROWS + 1]; /* stretches of the rows before it */
    int chunk_for; /* threads */
    int64_t tile;  /* activation rows that lie together for `multiply` */
    glm_task prepare, multiply;
    _Atomic uint64_t ticket; /* stage << 32 | next block */
    _Atomic int64_t finished;
    /* [rows] of what a stage reads and writes; partial, most and sums: [stretches of all rows][heads] */
    float *x, *branch, *source, *qkv, *gate_up, *low, *partial, *most, *sums, *cosines, *sines;
    glm_job rounded[MOST_PRODUCTS]; /* room for rounded activations: one for each size of group in a stage */
    glm_job jobs[MOST_PRODUCTS];    /* the products of a stage, with the room that they share; w NULL: dense */
    int is_first[MOST_PRODUCTS];    /* whether a job is the one that fills its room */
    void (*begin)(struct glm_step *, const glm_stage *);
    void (*work)(struct glm_step *, const glm_stage *, int64_t);
} glm_step;

/* The products of a stage as one row's network has them. */
INLINE const glm_product *products_of(const glm_step *step, const glm_stage *stage, int64_t row) {
    const glm_network *net = step->row[row].net;
    if (stage->kind == HEAD) return net->head;
    const glm_layer *layer = &net->layer[stage->number];
    return stage->kind == QKV ? layer->qkv : stage->kind == O_PROJ ? layer->o_proj :
           stage->kind == GATE_UP ? layer->gate_up : layer->down_proj;
}

/* Whether a row has not the network of the row before it. */
INLINE int has_other_net(const glm_step *step, int64_t row) { return step->row[row].net != step->row[row - 1].net; }

static void open_stage(glm_step *step, int64_t number) {
    if (number < step->stage_count) step->begin(step, &step->stages[number]);
    atomic_store(&step->finished, 0);
    atomic_store(&step->ticket, (uint64_t)number << 32);
}

/* One thread's part in the token: take blocks until there are no more stages. */
static void take_part(const glm_job *job, int64_t number) {
    glm_step *step = (glm_step *)job->source;
    (void)number;
    for (int turn = 1;; turn++) {
        uint64_t ticket = atomic_load(&step->ticket);
        int64_t at = (int64_t)(ticket >> 32);
        if (at >= step->stage_count) return;
        const glm_stage *stage = &step->stages[at];
        int64_t blocks = stage->blocks, first = (int64_t)(ticket & 0xffffffffu);
        int64_t some = step->chunk_for > 1 ? blocks / (4 * step->chunk_for) : blocks;
        if (some < 1) some = 1;
        if (first >= blocks) { /* the others are still at it */
            RELAX();
            if (turn % 64 == 0) sched_yield();
            continue;
        }
        if (!atomic_compare_exchange_weak(&step->ticket, &ticket, ticket + (uint64_t)some)) continue;
        int64_t end = minimum(first + some, blocks);
        for (int64_t block = first; block < end; block++) step->work(step, stage, block);
        if (atomic_fetch_add(&step->finished, end - first) + end - first == blocks) open_stage(step, at + 1);
    }
}

INLINE int64_t most_of(int64_t a, int64_t b) { return a > b ? a : b; }

/* Add a stage, and before it one for what it starts from where there are so many rows. */
static int64_t add_stage(glm_stage *stages, int64_t at, glm_stage stage, int64_t each_row) {
    if (each_row) {
        stages[at] = stage;
        stages[at].work = EACH_ROW;
        stages[at++].blocks = each_row;
        stage.begin = NOTHING;
    }
    stages[at++] = stage;
    return at;
}

static int64_t rank_of(const glm_product *products, int64_t count) {
    int64_t rank = 0;
    for (int64_t i = 0; i < count; i++) rank += products[i].rank;
    return rank;
}

/* Add a stage of products, and before it one for the low-rank halves that they need. */
static int64_t add_products(const glm_step *step, int64_t at, glm_kind kind, int64_t number, int64_t count,
                            int64_t each_row, float *y, int add) {
    glm_stage *stages = step->stages, stage = {.begin = kind, .work = LOW, .kind = kind, .y = y, .number = number,
                                               .count = count, .add = add};
    const glm_product *products = products_of(step, &stage, 0);
    for (int64_t r = 0; r < step->rows; r++)
        if (!r || has_other_net(step, r))
            stage.rank = most_of(stage.rank, rank_of(products_of(step, &stage, r), count));
    for (int64_t i = 0; i < count; i++) stage.width += products[i].w.outputs;
    stage.blocks = stage.rank * step->rows;
    if (stage.blocks) {
        at = add_stage(stages, at, stage, each_row);
        stage.begin = NOTHING;
        each_row = 0;
    }
    stage.work = kind;
    stage.blocks = 0;
    for (int64_t i = 0; i < count; i++) stage.blocks += (products[i].w.outputs + ROWS - 1) / ROWS;
    return add_stage(stages, at, stage, each_row);
}

/* Divides `room`, or only counts it while `room` is NULL. */
static void *slice(char *room, size_t *used, int64_t bytes) {
    void *found = room ? room + *used : NULL;
    *used += (size_t)(bytes + 63) / 64 * 64;
    return found;
}

/* Bytes of one row's rounded activations, however a kernel lays them out: parts may be filled up to 64 inputs. */
static int64_t rounded_bytes(const glm_product *products, int64_t count, int64_t rows) {
    int64_t most = 0;
    for (int64_t i = 0; i < count; i++) {
        const glm_weight *w = &products[i].w;
        if (!w->codes) continue;
        most = most_of(most, rows > FEW ? w->inputs / w->group * round_up(w->group, 64) : w->inputs);
    }
    return most * 2;
}

/* net: of any row. rank: the largest of all rows' networks. */
static size_t lay_out(glm_step *step, const glm_network *net, int64_t rank, int64_t rows, int64_t stretches, void *room) {
    int64_t rounded = rounded_bytes(net->head, 1, rows);
    int64_t widest = most_of(most_of(net->hidden, net->ffn), net->heads * net->head_dim);
    int64_t whole = rows > 4 ? rows + MOST_TILE - 1 : rows; /* rows of whole tiles, at most, or those that `few` adds */
    for (int64_t i = 0; i < net->layers; i++) {
        const glm_layer *layer = &net->layer[i];
        const glm_product *products[] = {layer->qkv, layer->o_proj, layer->gate_up, layer->down_proj};
        int64_t counts[] = {layer->qkv_count, 1, layer->gate_up_count, 1};
        for (int stage = 0; stage < 4; stage++) rounded = most_of(rounded, rounded_bytes(products[stage], counts[stage], rows));
    }
    size_t used = 0;
    step->stages = slice(room, &used, (net->layers * 14 + 3) * (int64_t)sizeof(glm_stage));
    step->x = slice(room, &used, rows * net->hidden * 4);
    step->branch = slice(room, &used, rows * net->hidden * 4);
    step->source = slice(room, &used, rows * widest * 4);
    step->qkv = slice(room, &used, rows * (net->heads + 2 * net->kv_heads) * net->head_dim * 4);
    step->gate_up = slice(room, &used, rows * 2 * net->ffn * 4);
    step->low = slice(room, &used, rows * rank * 4);
    step->partial = slice(room, &used, stretches * net->heads * net->head_dim * 4);
    step->most = slice(room, &used, stretches * net->heads * 4);
    step->sums = slice(room, &used, stretches * net->heads * 4);
    step->cosines = slice(room, &used, rows * net->rotated * 4);
    step->sines = slice(room, &used, rows * net->rotated * 4);
    for (int i = 0; i < MOST_PRODUCTS; i++) {
        step->rounded[i].a = slice(room, &used, whole * rounded);
        step->rounded[i].steps = slice(room, &used, whole * widest); /* a group has at least 4 inputs */
        step->rounded[i].sums = slice(room, &used, whole * widest);
    }
    return used;
}

/* What glm_network says as `rank`: counted once. */
EXPORT int64_t glm_step_rank(const glm_network *net) {
    int64_t rank = rank_of(net->head, 1);
    for (int64_t i = 0; i < net->layers; i++) {
        const glm_layer *layer = &net->layer[i];
        rank = most_of(rank, rank_of(layer->qkv, layer->qkv_count));
        rank = most_of(rank, rank_of(layer->o_proj, 1));
        rank = most_of(rank, rank_of(layer->gate_up, layer->gate_up_count));
        rank = most_of(rank, rank_of(layer->down_proj, 1));
    }
    return rank;
}

/* Bytes of the room that glm_step_run wants, 64-byte aligned, for so many rows that attend to so many stretches in all.
 * net: of any row. rank: the largest of all rows' networks. */
EXPORT int64_t glm_step_room(const glm_network *net, int64_t rank, int64_t rows, int64_t stretches) {
    glm_step step;
    return (int64_t)lay_out(&step, net, rank, rows, stretches, NULL);
}

/* Stretches that a row attends to whose cache holds `length` positions. */
EXPORT int64_t glm_step_stretches(int64_t length) { return (length + 1 + STRETCH - 1) / STRETCH; }

/* One token of each row, behind what its cache holds: keys and values into the cache, logits [rows][vocabulary] out. With
 * `logits` NULL only the first `layers` layers are computed, for measuring. The caller has checked that there is room in
 * the caches, that they are of as many sequences, that there are 1 to MOST_ROWS rows, and that all of their networks
 * multiply by the same weights. */
EXPORT void glm_step_run(const glm_row *row, int64_t rows, void *room, float *logits, int64_t layers, int threads) {
    const glm_network *net = row[0].net;
    int64_t rank = 0;
    const glm_kernels *kernels = atomic_load(&chosen);
    const glm_kernels *products = kernels_for(kernels, net->coarse ? 1 : rows);
    int few = rows <= products->few_rows || net->coarse;
    glm_step step = {.net = net, .row = row, .rows = rows, .chunk_for = threads, .begin = kernels->step_begin,
                     .work = kernels->step_work, .prepare = products->prepare,
                     .multiply = few ? products->few : products->many, .tile = few ? 1 : products->tile};
    for (int64_t r = 0; r < rows; r++) {
        rank = most_of(rank, row[r].net->rank);
        step.total[r] = row[r].cache->length + 1;
        step.stretch_before[r + 1] = step.stretch_before[r] + glm_step_stretches(row[r].cache->length);
    }
    int64_t stretches = step.stretch_before[rows];
    lay_out(&step, net, rank, rows, stretches, room);
    for (int64_t r = 0; r < rows; r++) {
        float *x = step.x + r * net->hidden;
        if (row[r].embedded) memcpy(x, row[r].embedded, (size_t)net->hidden * 4);
        else kernels->step_row(row[r].net->embedding, row[r].token, x);
        for (int64_t i = 0; i < net->rotated; i++) {
            float angle = (float)row[r].position * net->frequencies[i];
            step.cosines[r * net->rotated + i] = cosf(angle);
            step.sines[r * net->rotated + i] = sinf(angle);
        }
    }
    int64_t at = 0, each_row = few && threads > 1 && rows >= SEVERAL ? rows : 0;
    for (int64_t i = 0; i < layers; i++) {
        const glm_layer *layer = &net->layer[i];
        float *attended = layer->attention_norm ? step.branch : step.x, *fed = layer->feed_forward_norm ? step.branch : step.x;
        at = add_products(&step, at, QKV, i, layer->qkv_count, each_row, step.qkv, 0);
        at = add_stage(step.stages, at, (glm_stage){.begin = ATTEND, .work = ATTEND, .number = i,
                                                    .blocks = net->kv_heads * stretches}, each_row);
        at = add_products(&step, at, O_PROJ, i, 1, each_row, attended, attended == step.x);
        at = add_products(&step, at, GATE_UP, i, layer->gate_up_count, each_row, step.gate_up, 0);
        at = add_products(&step, at, DOWN, i, 1, each_row, fed, fed == step.x);
    }
    if (logits) at = add_products(&step, at, HEAD, layers, 1, each_row, logits, 0);
    step.stage_count = at;
    open_stage(&step, 0);
    glm_job job = {.source = &step};
    run(take_part, &job, threads, threads);
}

/* Room of a row's attention alone, or only its bytes while `room` is NULL. */
static size_t lay_out_attention(glm_step *step, int64_t heads, int64_t head_dim, int64_t stretches, void *room) {
    size_t used = 0;
    step->partial = slice(room, &used, stretches * heads * head_dim * 4);
    step->most = slice(room, &used, stretches * heads * 4);
    step->sums = slice(room, &used, stretches * heads * 4);
    return used;
}

/* Bytes of the room that glm_attend wants. */
EXPORT int64_t glm_attend_room(int64_t heads, int64_t head_dim, int64_t length) {
    glm_step step;
    return (int64_t)lay_out_attention(&step, heads, head_dim, glm_step_stretches(length - 1), NULL);
}

/* The attention of one row alone, over all `length` positions of a cache of one layer: query and out
 * [heads][head_dim]. head_dim is a multiple of 16, LARGEST_HEAD at most. */
EXPORT void glm_attend(const glm_cache *cache, const float *query, float *out, int64_t heads, int64_t kv_heads,
                       int64_t head_dim, void *room, int threads) {
    const glm_kernels *kernels = atomic_load(&chosen);
    glm_layer layer = {0};
    glm_network net = {.layer = &layer, .layers = 1, .heads = heads, .kv_heads = kv_heads, .head_dim = head_dim};
    glm_row row = {.net = &net, .cache = cache};
    int64_t stretches = glm_step_stretches(cache->length - 1);
    glm_stage attend = {.work = ATTEND, .blocks = kv_heads * stretches}, gather = {.begin = O_PROJ, .work = O_PROJ};
    glm_step step = {.net = &net, .row = &row, .rows = 1, .stages = &attend, .stage_count = 1, .chunk_for = threads,
                     .tile = 1, .total = {cache->length}, .stretch_before = {0, stretches}, .qkv = (float *)query,
                     .source = out, .begin = kernels->step_begin, .work = kernels->step_work};
    lay_out_attention(&step, heads, head_dim, stretches, room);
    glm_job job = {.source = &step};
    run(take_part, &job, threads, threads);
    kernels->step_begin(&step, &gather);
}
