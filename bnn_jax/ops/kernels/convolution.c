/* Convolution and its two gradients in float32 on the CPU, for XLA's foreign function interface. Layouts are NHWC and
   HWIO. Sums are added in an order that depends on nothing but the shapes: not on the number of threads. */

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#ifdef __x86_64__
#include <immintrin.h>
#endif

#include "xla/ffi/api/c_api.h"

#define INLINE static inline __attribute__((always_inline))
#ifdef __clang__
#define UNROLL _Pragma("unroll")
#else
#define UNROLL _Pragma("GCC unroll 16")
#endif
#define JOIN(a, b) a##b

/* Calls TILE(n) with n, which is at most `widest`, as a constant, so that its sums stay in registers. */
#define CASE(n) \
    case n: TILE(n); break;
#define UP_TO_6 CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6)
#define UP_TO_12 UP_TO_6 CASE(7) CASE(8) CASE(9) CASE(10) CASE(11) CASE(12)

/* Products that a call of a kernel adds to each sum: `rows` rows of `run` neighbouring values of the input. */
typedef struct {
    int64_t rows, run, row_step, position_step;
    int first; /* whether sums start at 0, not at what the output holds */
} Chunk;

/* Positions that a call of a kernel sums over; distances in floats. */
typedef struct {
    int64_t images, rows, columns, image_step, row_step, position_step; /* of the input */
    int64_t cotangent_image, cotangent_row, cotangent_step;
} Block;

typedef struct {
    const char *name;
    int64_t lanes;
    void (*position_row)(const Chunk *, const float *in, const float *weights, float *out, int64_t positions,
                         int64_t out_step, int64_t channels);
    void (*kernel_run)(const Block *, const float *in, const float *cotangent, float *out, int64_t run,
                       int64_t channels);
} InstructionSet;

/* For operands that are -1, 0 and 1: bytes of the input, plus 1, times bytes of the weights. */
typedef struct {
    int64_t lanes;
    void (*row)(const Chunk *, const uint8_t *in, const int8_t *weights, const float *scales, const int32_t *offsets,
                float *out, int64_t positions, int64_t out_step, int64_t channels);
    int (*to_bytes)(const float *values, int64_t count, uint8_t *bytes);
} TernarySet;

/* ---- the kernels for each instruction set ---- */

#define VECTOR_BYTES 16
#define WIDEST 6
#define EACH_CASE UP_TO_6
#define NAME(x) JOIN(plain_, x)
#define NAME_TEXT "plain"
#include "convolution.inc"
#undef VECTOR_BYTES
#undef WIDEST
#undef EACH_CASE
#undef NAME
#undef NAME_TEXT

/* The 64-byte kernels without their instructions: nobody's choice, but it can be tried on machines that lack these. */
#define VECTOR_BYTES 64
#define WIDEST 12
#define EACH_CASE UP_TO_12
#define NAME(x) JOIN(wide_, x)
#define NAME_TEXT "wide"
#include "convolution.inc"
#undef VECTOR_BYTES
#undef WIDEST
#undef EACH_CASE
#undef NAME
#undef NAME_TEXT

#ifdef __x86_64__
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif
#define VECTOR_BYTES 32
#define WIDEST 6
#define EACH_CASE UP_TO_6
#define NAME(x) JOIN(avx2_, x)
#define NAME_TEXT "avx2"
#include "convolution.inc"
/* Sums of pairs in 16 bits: no more than 4 is added to one at a time. */
#define DOT(sums, x, w) _mm256_add_epi16((__m256i)(sums), _mm256_maddubs_epi16((__m256i)(x), (__m256i)(w)))
#define TOTAL(sums) _mm256_madd_epi16((__m256i)(sums), _mm256_set1_epi16(1))
#include "ternary.inc"
#undef DOT
#undef TOTAL
#undef VECTOR_BYTES
#undef WIDEST
#undef EACH_CASE
#undef NAME
#undef NAME_TEXT
#ifdef __clang__
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("avx2,fma,avx512f"))), apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx2,fma,avx512f")
#endif
#define VECTOR_BYTES 64
#define WIDEST 12
#define EACH_CASE UP_TO_12
#define NAME(x) JOIN(avx512_, x)
#define NAME_TEXT "avx512"
#include "convolution.inc"
#ifdef __clang__
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("avx2,fma,avx512f,avx512bw,avx512vnni"))), apply_to = function)
#else
#pragma GCC target("avx512bw,avx512vnni")
#endif
#define DOT(sums, x, w) _mm512_dpbusd_epi32((__m512i)(sums), (__m512i)(x), (__m512i)(w))
#define TOTAL(sums) (sums)
#include "ternary.inc"
#undef DOT
#undef TOTAL
#undef VECTOR_BYTES
#undef WIDEST
#undef EACH_CASE
#undef NAME
#undef NAME_TEXT
#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif

static const InstructionSet *const sets[] = {
#ifdef __x86_64__
    &avx512_set,
    &avx2_set,
#endif
    &plain_set,
    &wide_set,
};
#define SETS ((int64_t)(sizeof sets / sizeof *sets))

static int is_available(const InstructionSet *set) {
#ifdef __x86_64__
    __builtin_cpu_init();
    if (set == &avx512_set) return __builtin_cpu_supports("avx512f");
    if (set == &avx2_set) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
    return 1;
}

/* The name of an instruction set of this machine, best first; empty for one that it cannot run, NULL beyond the last. */
const char *bnn_convolution_set(int64_t index) {
    return index < 0 || index >= SETS ? NULL : is_available(sets[index]) ? sets[index]->name : "";
}

/* What multiplies bytes beside a set, or NULL. */
static const TernarySet *ternary_of(const InstructionSet *set) {
#ifdef __x86_64__
    if (set == &avx512_set && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vnni"))
        return &avx512_ternary_set;
    if (set == &avx512_set || set == &avx2_set) return &avx2_ternary_set;
#endif
    return NULL;
}

/* The set of that number, or the best one for a negative number. */
static const InstructionSet *chosen_set(int64_t index) {
    if (index >= 0) return index < SETS && is_available(sets[index]) ? sets[index] : NULL;
    for (index = 0; !is_available(sets[index]); index++) continue;
    return sets[index];
}

/* ---- loops on XLA's threads ---- */

typedef void Body(const void *data, int64_t unit, float *scratch);

/* A loop whose units are taken by whichever thread is free. It is freed by the last thread that has looked at it. */
typedef struct {
    Body *body;
    const void *data;
    int64_t units;
    size_t scratch_bytes;
    atomic_llong taken, finished;
    atomic_int users, failed;
} Loop;

static void *allocate(size_t bytes) { return aligned_alloc(64, (bytes + 127) / 64 * 64); }

static void leave(Loop *loop) {
    if (atomic_fetch_sub(&loop->users, 1) == 1) free(loop);
}

static void take_units(Loop *loop) {
    float *scratch = NULL;
    for (int64_t unit; (unit = atomic_fetch_add(&loop->taken, 1)) < loop->units;) {
        if (!scratch) scratch = allocate(loop->scratch_bytes);
        if (scratch)
            loop->body(loop->data, unit, scratch);
        else
            atomic_store(&loop->failed, 1);
        atomic_fetch_add(&loop->finished, 1);
    }
    free(scratch);
}

static void help(void *data) {
    take_units(data);
    leave(data);
}

static void ignore(const XLA_FFI_Api *api, XLA_FFI_Error *error) {
    XLA_FFI_Error_Destroy_Args arguments = {XLA_FFI_Error_Destroy_Args_STRUCT_SIZE, NULL, error};
    if (error) api->XLA_FFI_Error_Destroy(&arguments);
}

/* Runs body(data, unit) for every unit. This thread works too and waits only for units that others have begun, so a pool
   without a free thread does no harm. Returns 0, or -1 where memory is missing. */
static int run_loop(const XLA_FFI_CallFrame *frame, Body *body, const void *data, int64_t units, size_t scratch_bytes) {
    int64_t threads = 1;
    XLA_FFI_ThreadPool_NumThreads_Args count = {XLA_FFI_ThreadPool_NumThreads_Args_STRUCT_SIZE, NULL, frame->ctx,
                                                &threads};
    ignore(frame->api, frame->api->XLA_FFI_ThreadPool_NumThreads(&count));
    Loop *loop = malloc(sizeof *loop);
    if (!loop) return -1;
    *loop = (Loop){.body = body, .data = data, .units = units, .scratch_bytes = scratch_bytes};
    atomic_store(&loop->users, 1);
    for (int64_t helpers = (threads < units ? threads : units) - 1; helpers > 0; helpers--) {
        XLA_FFI_ThreadPool_Schedule_Args task = {XLA_FFI_ThreadPool_Schedule_Args_STRUCT_SIZE, NULL, frame->ctx, help,
                                                 loop};
        atomic_fetch_add(&loop->users, 1);
        XLA_FFI_Error *error = frame->api->XLA_FFI_ThreadPool_Schedule(&task);
        if (error) {
            ignore(frame->api, error);
            leave(loop);
            break;
        }
    }
    take_units(loop);
    while (atomic_load(&loop->finished) < units) sched_yield();
    const int failed = atomic_load(&loop->failed);
    leave(loop);
    return failed ? -1 : 0;
}

/* ---- weights, packed by tiles of output channels: (tiles, rows, run, tile) ---- */

INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

/* Channels of a tile with `left` channels from its first one on: in memory, where some may be unused. */
INLINE int64_t tile_width(int64_t lanes, int64_t left) { return left > lanes ? 2 * lanes : lanes; }

static int64_t tiles_of(int64_t lanes, int64_t channels) { return (channels + 2 * lanes - 1) / (2 * lanes); }

static int64_t padded_channels(const InstructionSet *set, int64_t channels) {
    const int64_t before = (tiles_of(set->lanes, channels) - 1) * 2 * set->lanes;
    return before + tile_width(set->lanes, channels - before);
}

/* ---- a pass: output positions as sums over a window of the input; forward, and each part of the input's gradient ---- */

typedef struct {
    const InstructionSet *set;
    int64_t batch, height, width, channels; /* input */
    int64_t taps_y, taps_x, stride_y, stride_x, pad_top, pad_left;
    int64_t rows, columns, features;                /* positions and channels computed */
    int64_t out_image, out_row, out_column;         /* distances in the output */
    int64_t kernel_step_y, kernel_step_x, kernel_step_in, kernel_step_out; /* where the weights are read */
    const float *in, *kernel;
    float *out, *packed;
    int64_t block_images, block_rows; /* of a unit */
} Pass;

#define BLOCK_FLOATS 16384 /* of the input, copied with its border: 64 KiB, so that it stays near the core */
#define BLOCK_POSITIONS 64 /* at least, even if they need more than that: for fewer the weights are read too often */
#define CHUNK 320          /* products of a chunk: with two vectors each, its weights stay in the first cache */

static void pack_tile(const void *data, int64_t tile, float *scratch) {
    (void)scratch;
    const Pass *pass = data;
    const int64_t first = tile * 2 * pass->set->lanes, width = tile_width(pass->set->lanes, pass->features - first);
    const int64_t used = smaller(width, pass->features - first);
    float *to = pass->packed + first * pass->taps_y * pass->taps_x * pass->channels;
    for (int64_t y = 0; y < pass->taps_y; y++)
        for (int64_t x = 0; x < pass->taps_x; x++)
            for (int64_t c = 0; c < pass->channels; c++, to += width) {
                const float *from = pass->kernel + y * pass->kernel_step_y + x * pass->kernel_step_x +
                                    c * pass->kernel_step_in + first * pass->kernel_step_out;
                for (int64_t o = 0; o < used; o++) to[o] = from[o * pass->kernel_step_out];
                for (int64_t o = used; o < width; o++) to[o] = 0;
            }
}

/* Copies rows of an image with zeros around it: (rows, columns, channels), from row `top` and column `left` on. */
static void copy_rows(const float *image, int64_t height, int64_t width, int64_t channels, int64_t top, int64_t left,
                      int64_t rows, int64_t columns, float *to) {
    const int64_t before = smaller(larger(-left, 0), columns);
    const int64_t inside = larger(smaller(width - larger(left, 0), columns - before), 0);
    for (int64_t y = top; y < top + rows; y++, to += columns * channels) {
        if (y < 0 || y >= height) {
            memset(to, 0, sizeof(float) * columns * channels);
            continue;
        }
        memset(to, 0, sizeof(float) * before * channels);
        memcpy(to + before * channels, image + (y * width + larger(left, 0)) * channels,
               sizeof(float) * inside * channels);
        memset(to + (before + inside) * channels, 0, sizeof(float) * (columns - before - inside) * channels);
    }
}

static int64_t window(int64_t positions, int64_t stride, int64_t taps) { return (positions - 1) * stride + taps; }

static int64_t blocks_of(int64_t size, int64_t block) { return (size + block - 1) / block; }

/* Some rows of some images. */
typedef struct {
    int64_t first, images, top, rows; /* of the output */
    int64_t in_rows, columns;         /* of the input, with their border */
} Unit;

static int64_t units_of(const Pass *pass) {
    return blocks_of(pass->batch, pass->block_images) * blocks_of(pass->rows, pass->block_rows);
}

/* Floats of the input that the largest unit copies. */
static int64_t unit_floats(const Pass *pass) {
    return pass->block_images * window(pass->block_rows, pass->stride_y, pass->taps_y) *
           window(pass->columns, pass->stride_x, pass->taps_x) * pass->channels;
}

static Unit unit_of(const Pass *pass, int64_t unit) {
    const int64_t blocks = blocks_of(pass->rows, pass->block_rows);
    const int64_t first = unit / blocks * pass->block_images, top = unit % blocks * pass->block_rows;
    const int64_t rows = smaller(pass->block_rows, pass->rows - top);
    return (Unit){.first = first, .images = smaller(pass->block_images, pass->batch - first), .top = top, .rows = rows,
                  .in_rows = window(rows, pass->stride_y, pass->taps_y),
                  .columns = window(pass->columns, pass->stride_x, pass->taps_x)};
}

/* Copies what the unit needs of its i-th image. */
static void copy_unit(const Pass *pass, const Unit *unit, int64_t i, float *to) {
    copy_rows(pass->in + (unit->first + i) * pass->height * pass->width * pass->channels, pass->height, pass->width,
              pass->channels, unit->top * pass->stride_y - pass->pad_top, -pass->pad_left, unit->in_rows, unit->columns,
              to);
}

static void pass_unit(const void *data, int64_t unit, float *scratch) {
    const Pass *pass = data;
    const Unit part = unit_of(pass, unit);
    const int64_t row = part.columns * pass->channels, run = pass->taps_x * pass->channels;
    for (int64_t i = 0; i < part.images; i++) copy_unit(pass, &part, i, scratch + i * part.in_rows * row);
    Chunk chunk = {.row_step = row, .position_step = pass->stride_x * pass->channels};
    for (int64_t o = 0; o < pass->features; o += 2 * pass->set->lanes) {
        const int64_t wide = tile_width(pass->set->lanes, pass->features - o), channels = smaller(wide, pass->features - o);
        const float *weights = pass->packed + o * pass->taps_y * run;
        for (int64_t ky = 0; ky < pass->taps_y; ky += chunk.rows) {
            chunk.rows = smaller(larger(CHUNK / run, 1), pass->taps_y - ky);
            for (int64_t k = 0; k < run; k += chunk.run, weights += chunk.rows * chunk.run * wide) {
                chunk.run = run <= CHUNK ? run : smaller(CHUNK, run - k);
                chunk.first = ky == 0 && k == 0;
                for (int64_t i = 0; i < part.images; i++)
                    for (int64_t y = 0; y < part.rows; y++)
                        pass->set->position_row(
                            &chunk, scratch + (i * part.in_rows + y * pass->stride_y + ky) * row + k, weights,
                            pass->out + (part.first + i) * pass->out_image + (part.top + y) * pass->out_row + o,
                            pass->columns, pass->out_column, channels);
            }
        }
    }
}

/* Chooses how much a unit works on. */
static void divide(Pass *pass) {
    const int64_t columns = window(pass->columns, pass->stride_x, pass->taps_x) * pass->channels;
    const int64_t fit = (BLOCK_FLOATS / columns - pass->taps_y) / pass->stride_y + 1;
    pass->block_rows = smaller(larger(fit, blocks_of(BLOCK_POSITIONS, pass->columns)), pass->rows);
    pass->block_images = larger(BLOCK_POSITIONS / (pass->rows * pass->columns), 1);
}

static int run_pass(const XLA_FFI_CallFrame *frame, Pass *pass) {
    divide(pass);
    pass->packed = allocate(sizeof(float) * pass->taps_y * pass->taps_x * pass->channels *
                            padded_channels(pass->set, pass->features));
    if (!pass->packed) return -1;
    int result = run_loop(frame, pack_tile, pass, tiles_of(pass->set->lanes, pass->features), 0);
    if (result == 0) result = run_loop(frame, pass_unit, pass, units_of(pass), sizeof(float) * unit_floats(pass));
    free(pass->packed);
    return result;
}

/* ---- the pass of a layer whose operands are -1, 0 and 1, but for a scale of each output channel ---- */

typedef struct {
    const Pass *pass;
    const TernarySet *set;
    int64_t groups; /* of four neighbouring values of a row of the window; the last one's weights may be 0 */
    int8_t *weights; /* (tiles, rows, groups, tile, 4) */
    float *scales;
    int32_t *offsets;
    atomic_int *differs; /* whether an operand was found to have other values */
} TernaryPass;

/* Weights of one tile; its channels beyond the last one are 0. */
static void pack_ternary_tile(const void *data, int64_t tile, float *scratch) {
    (void)scratch;
    const TernaryPass *own = data;
    const Pass *pass = own->pass;
    const int64_t run = pass->taps_x * pass->channels, first = tile * 2 * own->set->lanes;
    const int64_t width = tile_width(own->set->lanes, pass->features - first);
    const int64_t used = smaller(width, pass->features - first);
    int8_t *to = own->weights + first * pass->taps_y * own->groups * 4;
    float *scales = own->scales + first;
    int32_t *offsets = own->offsets + first;
    memset(to, 0, width * pass->taps_y * own->groups * 4);
    memset(scales, 0, sizeof *scales * width);
    memset(offsets, 0, sizeof *offsets * width);
    for (int64_t k = 0; k < pass->taps_y * run; k++) {
        int8_t *at = to + (k / run * own->groups + k % run / 4) * width * 4 + k % run % 4;
        const float *weights = pass->kernel + k * pass->features + first;
        for (int64_t o = 0; o < used; o++) {
            const float size = weights[o] < 0 ? -weights[o] : weights[o];
            if (scales[o] == 0) scales[o] = size;
            if (size != 0 && size != scales[o]) {
                atomic_store(own->differs, 1);
                return;
            }
            at[o * 4] = (int8_t)((weights[o] > 0) - (weights[o] < 0));
            offsets[o] += at[o * 4];
        }
    }
}

static void ternary_unit(const void *data, int64_t unit, float *scratch) {
    const TernaryPass *own = data;
    if (atomic_load(own->differs)) return;
    const Pass *pass = own->pass;
    const Unit part = unit_of(pass, unit);
    const int64_t row = part.columns * pass->channels, image_bytes = part.in_rows * row;
    float *values = scratch;
    uint8_t *bytes = (uint8_t *)(scratch + image_bytes);
    for (int64_t i = 0; i < part.images; i++) {
        copy_unit(pass, &part, i, values);
        if (!own->set->to_bytes(values, image_bytes, bytes + i * image_bytes)) {
            atomic_store(own->differs, 1);
            return;
        }
    }
    memset(bytes + part.images * image_bytes, 0, 4); /* the last group may reach beyond */
    const Chunk chunk = {.rows = pass->taps_y, .run = own->groups * 4, .row_step = row,
                         .position_step = pass->stride_x * pass->channels};
    for (int64_t o = 0; o < pass->features; o += 2 * own->set->lanes)
        for (int64_t i = 0; i < part.images; i++)
            for (int64_t y = 0; y < part.rows; y++)
                own->set->row(&chunk, bytes + i * image_bytes + y * pass->stride_y * row,
                              own->weights + o * pass->taps_y * own->groups * 4, own->scales + o, own->offsets + o,
                              pass->out + (part.first + i) * pass->out_image + (part.top + y) * pass->out_row + o,
                              pass->columns, pass->out_column, smaller(2 * own->set->lanes, pass->features - o));
}

#define TRIED 64          /* values of the input that say whether it is worth trying */
#define MOST_GROUPS 8191  /* that a sum in 16 bits can hold */

/* Returns 1 where the operands have other values, and nothing is done; else as run_loop. */
static int run_ternary_pass(const XLA_FFI_CallFrame *frame, Pass *pass) {
    divide(pass);
    atomic_int differs = 0;
    TernaryPass own = {.pass = pass, .set = ternary_of(pass->set), .differs = &differs,
                       .groups = (pass->taps_x * pass->channels + 3) / 4};
    uint8_t tried[TRIED];
    const int64_t values = pass->batch * pass->height * pass->width * pass->channels;
    if (!own.set || pass->taps_y * own.groups > MOST_GROUPS) return 1;
    if (!own.set->to_bytes(pass->in, smaller(values, TRIED), tried)) return 1;
    const int64_t tiles = tiles_of(own.set->lanes, pass->features);
    const int64_t features = tiles * 2 * own.set->lanes;
    own.weights = allocate((pass->taps_y * own.groups * 4 + sizeof *own.scales + sizeof *own.offsets) * features);
    if (!own.weights) return -1;
    own.scales = (float *)(own.weights + pass->taps_y * own.groups * 4 * features);
    own.offsets = (int32_t *)(own.scales + features);
    int result = run_loop(frame, pack_ternary_tile, &own, tiles, 0);
    const int64_t floats = unit_floats(pass) / pass->block_images;
    if (result == 0 && !atomic_load(&differs))
        result = run_loop(frame, ternary_unit, &own, units_of(pass),
                          sizeof(float) * floats + pass->block_images * floats + 4);
    free(own.weights);
    return result != 0 ? result : atomic_load(&differs);
}

/* ---- the calls ---- */

/* A convolution: (batch, height, width, channels) -> (batch, rows, columns, features). */
typedef struct {
    const InstructionSet *set;
    int64_t batch, height, width, channels, rows, columns, features, taps_y, taps_x;
    int64_t stride_y, stride_x, pad_top, pad_left;
} Convolution;

static int forward(const XLA_FFI_CallFrame *frame, const Convolution *c, const float *x, const float *kernel, float *y) {
    Pass pass = {.set = c->set, .batch = c->batch, .height = c->height, .width = c->width, .channels = c->channels,
                 .taps_y = c->taps_y, .taps_x = c->taps_x, .stride_y = c->stride_y, .stride_x = c->stride_x,
                 .pad_top = c->pad_top, .pad_left = c->pad_left,
                 .rows = c->rows, .columns = c->columns, .features = c->features,
                 .out_image = c->rows * c->columns * c->features, .out_row = c->columns * c->features,
                 .out_column = c->features,
                 .kernel_step_y = c->taps_x * c->channels * c->features, .kernel_step_x = c->channels * c->features,
                 .kernel_step_in = c->features, .kernel_step_out = 1, .in = x, .kernel = kernel, .out = y};
    const int result = run_ternary_pass(frame, &pass);
    return result == 1 ? run_pass(frame, &pass) : result;
}

/* Along one axis, the input's positions first, first + stride, ... and the kernel's taps that meet them, backwards. */
typedef struct {
    int64_t positions, taps, last_tap, pad;
} Part;

static Part part_of(int64_t first, int64_t size, int64_t stride, int64_t taps, int64_t pad) {
    const int64_t tap = (first + pad) % stride, count = tap < taps ? (taps - tap + stride - 1) / stride : 0;
    return (Part){(size - first + stride - 1) / stride, count, tap + (count - 1) * stride,
                  count - 1 - (first + pad - tap) / stride};
}

/* dx[i] sums dy[(i + pad - k) / stride] * kernel[k] over the taps k that divide: for the positions i with the same
   remainder this is a convolution of dy of stride 1 with every stride-th tap, turned around. */
static int input_gradient(const XLA_FFI_CallFrame *frame, const Convolution *c, const float *dy, const float *kernel,
                          float *dx) {
    if (c->stride_y > c->taps_y || c->stride_x > c->taps_x) /* positions that meet no tap */
        memset(dx, 0, sizeof(float) * c->batch * c->height * c->width * c->channels);
    for (int64_t y = 0; y < smaller(c->stride_y, c->height); y++)
        for (int64_t x = 0; x < smaller(c->stride_x, c->width); x++) {
            const Part down = part_of(y, c->height, c->stride_y, c->taps_y, c->pad_top);
            const Part along = part_of(x, c->width, c->stride_x, c->taps_x, c->pad_left);
            if (down.taps == 0 || along.taps == 0) continue;
            const int64_t step_x = c->channels * c->features, step_y = c->taps_x * step_x;
            Pass pass = {.set = c->set, .batch = c->batch, .height = c->rows, .width = c->columns,
                         .channels = c->features, .taps_y = down.taps, .taps_x = along.taps, .stride_y = 1,
                         .stride_x = 1, .pad_top = down.pad, .pad_left = along.pad, .rows = down.positions,
                         .columns = along.positions, .features = c->channels,
                         .out_image = c->height * c->width * c->channels,
                         .out_row = c->stride_y * c->width * c->channels, .out_column = c->stride_x * c->channels,
                         .kernel_step_y = -c->stride_y * step_y, .kernel_step_x = -c->stride_x * step_x,
                         .kernel_step_in = 1, .kernel_step_out = c->features, .in = dy,
                         .kernel = kernel + down.last_tap * step_y + along.last_tap * step_x,
                         .out = dx + (y * c->width + x) * c->channels};
            if (run_pass(frame, &pass) != 0) return -1;
        }
    return 0;
}

/* Gradient of the kernel: images are divided into blocks, output channels into groups of tiles. Each block sums for
   itself, then the sums of the blocks are added one after another. How many there are follows from the shapes. */
typedef struct {
    const Convolution *c;
    const float *x, *cotangent;
    float *out, *sums; /* (blocks, packed kernel) */
    int64_t blocks, groups, tiles, floats;
    int64_t images, rows; /* copied at a time */
} KernelPass;

#define UNITS 16               /* into which the work is divided, at least where there are as many images */
#define SUMS_BYTES (4ll << 20) /* of all blocks together */
#define POSITIONS 128          /* that are summed over at a time, so that they stay in the first cache */
#define COPIED_FLOATS 65536    /* of the input, with its border */

/* Adds some rows of some images to the sums of the tiles from..to. Only one image may have more rows than fit. */
static void add_rows(const KernelPass *pass, int64_t from, int64_t to, const float *x, const float *dy, int64_t images,
                     int64_t rows, float *sums, float *copied) {
    const Convolution *c = pass->c;
    const int64_t width = window(c->columns, c->stride_x, c->taps_x) * c->channels, run = c->taps_x * c->channels;
    const int64_t at_once = larger(POSITIONS / c->columns, 1);
    for (int64_t top = 0; top < rows; top += at_once)
        for (int64_t tile = from; tile < to; tile++) {
            const int64_t o = tile * 2 * c->set->lanes, wide = tile_width(c->set->lanes, c->features - o);
            const int64_t channels = smaller(wide, c->features - o), now = smaller(at_once, rows - top);
            const float *at = dy + top * c->columns * c->features + o;
            if (wide != c->features) {
                for (int64_t p = 0; p < images * now * c->columns; p++) {
                    memcpy(copied + p * wide, at + p * c->features, sizeof(float) * channels);
                    memset(copied + p * wide + channels, 0, sizeof(float) * (wide - channels));
                }
                at = copied;
            }
            const Block block = {.images = images, .rows = now, .columns = c->columns,
                                 .image_step = window(rows, c->stride_y, c->taps_y) * width,
                                 .row_step = c->stride_y * width, .position_step = c->stride_x * c->channels,
                                 .cotangent_image = now * c->columns * wide, .cotangent_row = c->columns * wide,
                                 .cotangent_step = wide};
            for (int64_t ky = 0; ky < c->taps_y; ky++)
                c->set->kernel_run(&block, x + (top * c->stride_y + ky) * width, at,
                                   sums + (o * c->taps_y + ky * wide) * run, run, wide);
        }
}

static void kernel_unit(const void *data, int64_t unit, float *scratch) {
    const KernelPass *pass = data;
    const Convolution *c = pass->c;
    const int64_t block = unit / pass->groups, group = unit % pass->groups;
    const int64_t from = pass->tiles * group / pass->groups, to = pass->tiles * (group + 1) / pass->groups;
    const int64_t columns = window(c->columns, c->stride_x, c->taps_x);
    float *sums = pass->sums + block * pass->floats;
    const int64_t taps = c->taps_y * c->taps_x * c->channels, lanes = 2 * c->set->lanes;
    const int64_t start = from * lanes * taps, end = to == pass->tiles ? pass->floats : to * lanes * taps;
    memset(sums + start, 0, sizeof(float) * (end - start));
    float *copied = scratch + pass->images * window(pass->rows, c->stride_y, c->taps_y) * columns * c->channels;
    const int64_t last = c->batch * (block + 1) / pass->blocks;
    for (int64_t image = c->batch * block / pass->blocks, images; image < last; image += images) {
        images = smaller(pass->images, last - image);
        for (int64_t top = 0; top < c->rows; top += pass->rows) {
            const int64_t rows = smaller(pass->rows, c->rows - top), in_rows = window(rows, c->stride_y, c->taps_y);
            for (int64_t i = 0; i < images; i++)
                copy_rows(pass->x + (image + i) * c->height * c->width * c->channels, c->height, c->width, c->channels,
                          top * c->stride_y - c->pad_top, -c->pad_left, in_rows, columns,
                          scratch + i * in_rows * columns * c->channels);
            add_rows(pass, from, to, scratch, pass->cotangent + (image * c->rows + top) * c->columns * c->features,
                     images, rows, sums, copied);
        }
    }
}

/* Adds the sums of the blocks of one tile, and puts them where they belong. */
static void add_blocks(const void *data, int64_t tile, float *scratch) {
    (void)scratch;
    const KernelPass *pass = data;
    const Convolution *c = pass->c;
    const int64_t o = tile * 2 * c->set->lanes, wide = tile_width(c->set->lanes, c->features - o);
    const int64_t taps = c->taps_y * c->taps_x * c->channels, channels = smaller(wide, c->features - o);
    for (int64_t k = 0; k < taps; k++) {
        float *to = pass->out + k * c->features + o;
        const float *from = pass->sums + o * taps + k * wide;
        memcpy(to, from, sizeof(float) * channels);
        for (int64_t block = 1; block < pass->blocks; block++)
            for (int64_t i = 0; i < channels; i++) to[i] += from[block * pass->floats + i];
    }
}

static int kernel_gradient(const XLA_FFI_CallFrame *frame, const Convolution *c, const float *x, const float *cotangent,
                           float *out) {
    KernelPass pass = {.c = c, .x = x, .cotangent = cotangent, .out = out};
    pass.tiles = tiles_of(c->set->lanes, c->features);
    pass.floats = c->taps_y * c->taps_x * c->channels * padded_channels(c->set, c->features);
    const int64_t bytes = sizeof(float) * pass.floats;
    pass.blocks = larger(smaller(smaller(SUMS_BYTES / bytes, UNITS), c->batch), 1);
    pass.groups = smaller((UNITS + pass.blocks - 1) / pass.blocks, pass.tiles);
    const int64_t columns = window(c->columns, c->stride_x, c->taps_x) * c->channels;
    pass.rows = smaller(larger((COPIED_FLOATS / columns - c->taps_y) / c->stride_y + 1, 1), c->rows);
    const int64_t in_rows = window(pass.rows, c->stride_y, c->taps_y);
    const int64_t fit = smaller(POSITIONS / (c->rows * c->columns), COPIED_FLOATS / (in_rows * columns));
    pass.images = pass.rows < c->rows ? 1 : larger(smaller(fit, c->batch), 1);
    pass.sums = allocate(bytes * pass.blocks);
    if (!pass.sums) return -1;
    const int64_t copied = larger(POSITIONS, c->columns) * 2 * c->set->lanes;
    int result = run_loop(frame, kernel_unit, &pass, pass.blocks * pass.groups,
                          sizeof(float) * (pass.images * in_rows * columns + copied));
    if (result == 0) result = run_loop(frame, add_blocks, &pass, pass.tiles, 0);
    free(pass.sums);
    return result;
}

/* ---- XLA's side ---- */

typedef int Call(const XLA_FFI_CallFrame *, const Convolution *, const float *, const float *, float *);

static XLA_FFI_Error *error_of(const XLA_FFI_CallFrame *frame, const char *message, XLA_FFI_Error_Code code) {
    XLA_FFI_Error_Create_Args arguments = {XLA_FFI_Error_Create_Args_STRUCT_SIZE, NULL, message, code};
    return frame->api->XLA_FFI_Error_Create(&arguments);
}

/* Tells XLA which version of the interface this was compiled with, if that is what it asks for. */
static int is_question(const XLA_FFI_CallFrame *frame) {
    if (!frame->extension_start || frame->extension_start->type != XLA_FFI_Extension_Metadata) return 0;
    XLA_FFI_Metadata *metadata = ((XLA_FFI_Metadata_Extension *)frame->extension_start)->metadata;
    metadata->api_version.major_version = XLA_FFI_API_MAJOR;
    metadata->api_version.minor_version = XLA_FFI_API_MINOR;
    return 1;
}

/* Integer attributes in the order of their names, which is XLA's. */
enum { INSTRUCTION_SET, PAD_LEFT, PAD_TOP, STRIDE_X, STRIDE_Y, ATTRIBUTES };

/* Calls a convolution; x, y and kernel say which operand (0, 1) or result (2) these are. */
static XLA_FFI_Error *call(XLA_FFI_CallFrame *frame, Call *function, int x, int kernel, int y) {
    if (is_question(frame)) return NULL;
    if (frame->args.size != 2 || frame->rets.size != 1 || frame->attrs.size != ATTRIBUTES)
        return error_of(frame, "convolution: two operands, one result, five integers", XLA_FFI_Error_Code_INVALID_ARGUMENT);
    const XLA_FFI_Buffer *buffers[3] = {frame->args.args[0], frame->args.args[1], frame->rets.rets[0]};
    for (int i = 0; i < 3; i++) {
        int fits = buffers[i]->dtype == XLA_FFI_DataType_F32 && buffers[i]->rank == 4;
        for (int axis = 0; fits && axis < 4; axis++) fits = buffers[i]->dims[axis] > 0;
        if (!fits)
            return error_of(frame, "convolution: arrays are float32 of rank 4", XLA_FFI_Error_Code_INVALID_ARGUMENT);
    }
    int64_t numbers[ATTRIBUTES];
    for (int i = 0; i < ATTRIBUTES; i++) {
        const XLA_FFI_Scalar *scalar = frame->attrs.attrs[i];
        if (frame->attrs.types[i] != XLA_FFI_AttrType_SCALAR || scalar->dtype != XLA_FFI_DataType_S64)
            return error_of(frame, "convolution: numbers are int64", XLA_FFI_Error_Code_INVALID_ARGUMENT);
        numbers[i] = *(const int64_t *)scalar->value;
    }
    const int64_t *in = buffers[x]->dims, *taps = buffers[kernel]->dims, *out = buffers[y]->dims;
    const Convolution convolution = {
        .set = chosen_set(numbers[INSTRUCTION_SET]), .batch = in[0], .height = in[1], .width = in[2],
        .channels = in[3], .rows = out[1], .columns = out[2], .features = out[3], .taps_y = taps[0], .taps_x = taps[1],
        .stride_y = numbers[STRIDE_Y], .stride_x = numbers[STRIDE_X],
        .pad_top = numbers[PAD_TOP], .pad_left = numbers[PAD_LEFT]};
    if (in[0] != out[0] || taps[2] != in[3] || taps[3] != out[3] || !convolution.set)
        return error_of(frame, "convolution: shapes or instruction set", XLA_FFI_Error_Code_INVALID_ARGUMENT);
    if (function(frame, &convolution, buffers[0]->data, buffers[1]->data, buffers[2]->data) != 0)
        return error_of(frame, "convolution: no memory", XLA_FFI_Error_Code_RESOURCE_EXHAUSTED);
    return NULL;
}

XLA_FFI_Error *bnn_convolution(XLA_FFI_CallFrame *frame) { return call(frame, forward, 0, 1, 2); }

XLA_FFI_Error *bnn_convolution_input_gradient(XLA_FFI_CallFrame *frame) { return call(frame, input_gradient, 2, 1, 0); }

XLA_FFI_Error *bnn_convolution_kernel_gradient(XLA_FFI_CallFrame *frame) { return call(frame, kernel_gradient, 0, 2, 1); }
