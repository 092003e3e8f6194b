/* What the Python side hands to the compiled kernels: operations over tensors in memory. Mirrored in kernels.py. */
#ifndef BNN_RUNTIME_H
#define BNN_RUNTIME_H

#include <stdint.h>

/* Values (n, y, x, channel); strides count elements of the format: floats, bytes, 64-bit words. Where a convolution
   reads a border, the border lies in memory around (0, 0) and holds zeros. */
typedef struct {
    void *data;
    int64_t image, row, pixel;
} Tensor;

/* How an operation gets its rows of float values. */
enum {
    LOAD,           /* from a float tensor, every stride-th position, moved by `shift` channels */
    CONV_FLOAT,     /* float convolution */
    CONV_BINARY,    /* -1, 0, +1 times -1, +1 */
    CONV_CODEBOOK,  /* -1, 0, +1 times 3x3 kernels from a codebook */
    CONV_BYTES,     /* unsigned 8 bit times signed 8 bit */
    CONV_SHORTS,    /* signed 16 bit times signed 16 bit */
    CONV_DEPTHWISE, /* float, every channel on its own */
    POOL_MAX,
    POOL_SUM,
    SOURCES
};

/* What is done with each row, one after another. */
enum {
    AFFINE,      /* r * first[c] + second[c] */
    DIVIDE,      /* r / first[c] */
    ADD,         /* r + tensor */
    CLIP,        /* min(max(r, low), high) */
    PRELU,       /* r > 0 ? r : r * first[c] */
    ROUND,       /* to the nearest integer, ties to the even one */
    ROUND_AWAY,  /* to the nearest integer, ties away from zero */
    SIGN,        /* -1, 0, +1 */
    THRESHOLD,   /* r >= first[c] minus r <= second[c] */
    NEGATE_SOME, /* r * first[c], of -1 and +1 only; kept apart from AFFINE to be exact at infinity */
    STORE_FLOAT,
    STORE_SIGNS,  /* -1, 0, +1, as the binary convolution of this instruction set reads them */
    STORE_PLANES, /* -1, 0, +1, as CONV_CODEBOOK reads them: one byte each, channel by channel */
    STORE_BYTES,  /* round(r * low) - high, unsigned 8 bit */
    STORE_SHORTS, /* round(r * low), signed 16 bit */
    STEPS
};

typedef struct {
    int32_t kind;
    int32_t plane; /* STORE_PLANES: bytes between channels */
    float low, high;
    const float *first, *second;
    Tensor tensor;
} Step;

typedef struct {
    int32_t source, step_count;
    int32_t batch, height, width, channels; /* of the output */
    int32_t kernel_height, kernel_width, stride_y, stride_x, pad_top, pad_left;
    int32_t input_height, input_width;
    int32_t input_channels; /* elements of the format in one pixel */
    int32_t shift;          /* LOAD: channels; CONV_CODEBOOK: bytes between channels of the input */
    int32_t chunk;          /* CONV_BYTES: products an int16 sum holds; CONV_CODEBOOK: channels an int8 sum holds;
                               CONV_BINARY: channels, where neighbours share a word, else 0 */
    int32_t patterns;       /* CONV_CODEBOOK: size of the codebook */
    Tensor input;
    const void *weights;
    const uint8_t *codebook; /* CONV_CODEBOOK: for each pattern its three rows of three bits */
    const Step *steps;
} Operation;

/* One instruction set: how wide its tiles are, and its kernels. */
typedef struct {
    const char *name;
    int32_t float_tile;  /* output channels of a tile, by source */
    int32_t binary_tile;
    int32_t integer_tile;
    int32_t reads_nibbles; /* signs are nibbles looked up in a table; else planes of 64 bits to be counted */
    void (*row)(const Operation *, int32_t image, int32_t y, float *row, int32_t stride, void *scratch);
    void (*tile)(const Operation *, int32_t tile, float *row, int32_t stride, void *scratch);
} InstructionSet;

#define CODEBOOK_TILE 64 /* positions a codebook convolution works on at a time */

int64_t bnn_row_stride(const Operation *operation);

#endif
