/* Inference of low-bit networks on the CPU: kernels for several instruction sets, chosen at run time, and the loop that
   runs a list of operations on one or several threads. */

#include "runtime.h"

#include <math.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))
#ifdef __clang__
#define UNROLL _Pragma("unroll")
#else
#define UNROLL _Pragma("GCC unroll 16")
#endif
#define JOIN(a, b) a##b

#if defined(__x86_64__)
#define X86 1
#include <immintrin.h>
#ifdef __clang__
#define BEGIN_TARGET(options) _Pragma("clang attribute push(__attribute__((target(" options "))), apply_to=function)")
#define END_TARGET _Pragma("clang attribute pop")
#endif
#endif

/* Four values of -1, 0 or +1 are stored as twice the number whose digits to base 3 they are, so that eight times the
   byte is the place of their row in the table: 4 plus the sum of products with four weights, bit i of the weights'
   number being the sign of the i-th. */
static uint8_t nibble_table[81 * 16] __attribute__((aligned(64)));

/* That byte by signs (low half) and zeros (high half) of the four values. */
static uint8_t code_of_nibbles[256];

static void fill_tables(void) {
    for (int nibbles = 0; nibbles < 256; nibbles++) {
        int number = 0;
        for (int i = 3; i >= 0; i--) {
            const int zero = nibbles >> (4 + i) & 1, positive = nibbles >> i & 1;
            number = 3 * number + (zero ? 1 : 2 * positive);
        }
        code_of_nibbles[nibbles] = (uint8_t)(2 * number);
    }
    for (int number = 0; number < 81; number++)
        for (int way = 0; way < 16; way++) {
            int sum = 4, rest = number;
            for (int i = 0; i < 4; i++, rest /= 3) sum += (rest % 3 - 1) * (way >> i & 1 ? 1 : -1);
            nibble_table[16 * number + way] = (uint8_t)sum;
        }
}

/* (channels, 64) 16-bit sums -> (64, stride) floats. Eight by eight, so that neither side is walked across. */
static void transpose_sums(const int16_t *sums, int channels, float *row, int64_t stride) {
    for (int o = 0; o < channels; o += 8)
        for (int x = 0; x < CODEBOOK_TILE; x += 8)
            for (int i = 0; i < 8; i++) {
                float *out = row + (x + i) * stride + o;
                const int16_t *in = sums + (int64_t)o * CODEBOOK_TILE + x + i;
                for (int j = 0; j < 8; j++) out[j] = in[j * CODEBOOK_TILE];
            }
}

/* ---- plain C, for every machine ---- */

#define VECTOR_BYTES 16
#define READS_NIBBLES 0
#define NAME(x) JOIN(plain_, x)
#define NAME_TEXT "plain"
#include "kernels.inc"
#undef VECTOR_BYTES
#undef READS_NIBBLES
#undef NAME
#undef NAME_TEXT

#ifdef WIDE
/* The 64-byte kernels without their instructions, so that their layouts can be tried on machines that lack these. */
#define VECTOR_BYTES 64
#define READS_NIBBLES 0
#define NAME(x) JOIN(wide_, x)
#define NAME_TEXT "wide"
#include "kernels.inc"
#undef VECTOR_BYTES
#undef READS_NIBBLES
#undef NAME
#undef NAME_TEXT
#endif

#ifdef X86
#ifdef __clang__
BEGIN_TARGET("avx2,fma,bmi2,popcnt")
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,bmi2,popcnt")
#endif
#define VECTOR_BYTES 32
#define READS_NIBBLES 1
#define NAME(x) JOIN(avx2_, x)
#define NAME_TEXT "avx2"
#include "kernels.inc"
#undef VECTOR_BYTES
#undef READS_NIBBLES
#undef NAME
#undef NAME_TEXT
#ifdef __clang__
END_TARGET
#else
#pragma GCC pop_options
#endif

#ifdef __clang__
BEGIN_TARGET("avx2,fma,bmi2,popcnt,avx512f,avx512bw,avx512vl,avx512dq,avx512vpopcntdq,avx512vnni")
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,bmi2,popcnt,avx512f,avx512bw,avx512vl,avx512dq,avx512vpopcntdq,avx512vnni")
#endif
#define VECTOR_BYTES 64
#define READS_NIBBLES 0
#define NAME(x) JOIN(avx512_, x)
#define NAME_TEXT "avx512"
#define COUNT_WORDS(x) ((avx512_words)_mm512_popcnt_epi64((__m512i)(x)))
#define DOT_BYTES(sum, x, w) ((avx512_ints)_mm512_dpbusd_epi32((__m512i)(sum), (__m512i)(x), (__m512i)(w)))
#define DOT_SHORTS(sum, x, w) ((sum) + (avx512_ints)_mm512_madd_epi16((__m512i)(x), (__m512i)(w)))
#include "kernels.inc"
#undef COUNT_WORDS
#undef DOT_BYTES
#undef DOT_SHORTS
#undef VECTOR_BYTES
#undef READS_NIBBLES
#undef NAME
#undef NAME_TEXT
#ifdef __clang__
END_TARGET
#else
#pragma GCC pop_options
#endif
#endif

/* ---- choice of the instruction set ---- */

/* The set of that number, best first, or NULL beyond the last. */
const InstructionSet *bnn_instruction_set(int index) {
#ifdef WIDE
    static const InstructionSet *const sets[] = {&plain_set, &wide_set};
#elif defined(X86)
    static const InstructionSet *const sets[] = {&avx512_set, &avx2_set, &plain_set};
#else
    static const InstructionSet *const sets[] = {&plain_set};
#endif
    return index < (int)(sizeof sets / sizeof *sets) ? sets[index] : NULL;
}

/* Whether this machine can run it. */
int bnn_is_available(const InstructionSet *set) {
#ifdef X86
    __builtin_cpu_init();
    if (set == &avx512_set)
        return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
               __builtin_cpu_supports("avx512vpopcntdq") && __builtin_cpu_supports("avx512vnni");
    if (set == &avx2_set)
        return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
#endif
    return set != NULL;
}

/* Sizes of the structures, so that the Python side can check that it mirrors them. */
int32_t bnn_size(int which) { return which == 0 ? sizeof(Operation) : which == 1 ? sizeof(Step) : sizeof(InstructionSet); }

void bnn_start(void) { fill_tables(); }

/* ---- running a list of operations ---- */

typedef struct {
    const InstructionSet *set;
    const Operation *operations;
    int count, threads;
    size_t row_bytes, scratch_bytes;
    atomic_int ready, arrived;
} Run;

typedef struct {
    Run *run;
    int index;
    char *memory;
} Worker;

/* Floats between neighbouring positions of a row: a whole number of tiles of every kernel. */
int64_t bnn_row_stride(const Operation *op) { return (op->channels + 63) / 64 * 64; }

static int64_t units_of(const Operation *op) {
    if (op->source != CONV_CODEBOOK) return (int64_t)op->batch * op->height;
    return (op->batch * op->input.image + CODEBOOK_TILE - 1) / CODEBOOK_TILE;
}

static size_t row_bytes_of(const Operation *op) {
    const int64_t positions = op->source == CONV_CODEBOOK ? CODEBOOK_TILE : op->width + 1;
    return sizeof(float) * positions * bnn_row_stride(op);
}

static size_t scratch_bytes_of(const Operation *op) {
    if (op->source == CONV_BINARY && op->chunk)
        return (size_t)16 * op->kernel_height * op->kernel_width * op->width * op->stride_x;
    if (op->source != CONV_CODEBOOK) return 0;
    return CODEBOOK_TILE * (sizeof(int16_t) * bnn_row_stride(op) + (size_t)op->chunk * op->patterns);
}

/* Waits until all threads have finished an operation. */
static void meet(Run *run, int target) {
    atomic_fetch_add(&run->arrived, 1);
    for (int spins = 0; atomic_load(&run->arrived) < target; spins++)
        if (spins > 2000) sched_yield();
}

static void *work(void *argument) {
    const Worker *worker = argument;
    Run *run = worker->run;
    while (!atomic_load(&run->ready)) sched_yield();
    float *row = (float *)worker->memory;
    void *scratch = worker->memory + run->row_bytes;
    for (int i = 0; i < run->count; i++) {
        const Operation *op = run->operations + i;
        const int64_t units = units_of(op), stride = bnn_row_stride(op);
        const int64_t from = units * worker->index / run->threads, to = units * (worker->index + 1) / run->threads;
        for (int64_t unit = from; unit < to; unit++)
            if (op->source == CONV_CODEBOOK)
                run->set->tile(op, (int32_t)unit, row, (int32_t)stride, scratch);
            else
                run->set->row(op, (int32_t)(unit / op->height), (int32_t)(unit % op->height), row, (int32_t)stride,
                              scratch);
        if (run->threads > 1) meet(run, (i + 1) * run->threads);
    }
    return NULL;
}

/* Runs the operations one after another, each divided over the threads. Returns 0, or -1 where memory is missing. */
int bnn_run(const InstructionSet *set, const Operation *operations, int count, int threads) {
    Run run = {.set = set, .operations = operations, .count = count, .threads = threads < 1 ? 1 : threads};
    for (int i = 0; i < count; i++) {
        const size_t row = row_bytes_of(operations + i), scratch = scratch_bytes_of(operations + i);
        run.row_bytes = row > run.row_bytes ? row : run.row_bytes;
        run.scratch_bytes = scratch > run.scratch_bytes ? scratch : run.scratch_bytes;
    }
    run.row_bytes = (run.row_bytes + 63) / 64 * 64;
    const size_t each = (run.row_bytes + run.scratch_bytes + 4095) / 4096 * 4096;
    char *memory = aligned_alloc(4096, each * run.threads);
    Worker *workers = malloc(sizeof(Worker) * run.threads);
    pthread_t *others = malloc(sizeof(pthread_t) * run.threads);
    int result = memory && workers && others ? 0 : -1;
    if (result == 0) {
        memset(memory, 0, each * run.threads);
        int started = 1;
        for (; started < run.threads; started++) {
            workers[started] = (Worker){&run, started, memory + each * started};
            if (pthread_create(others + started, NULL, work, workers + started) != 0) break;
        }
        /* The work is divided over those that could be started. */
        run.threads = started;
        atomic_store(&run.ready, 1);
        workers[0] = (Worker){&run, 0, memory};
        work(workers);
        for (int i = 1; i < started; i++) pthread_join(others[i], NULL);
    }
    free(memory);
    free(workers);
    free(others);
    return result;
}
