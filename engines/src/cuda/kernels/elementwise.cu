// Everything that makes one element from elements at strides: arithmetic with broadcasting, and, as copies with other
// strides, transposing, cutting, joining and changing the element type.
#include "device.h"

#define MAX_AXES 8
// Sizes, and strides in elements; a stride of 0 repeats.
struct Axes {
    int rank, size[MAX_AXES];
    i64 out[MAX_AXES], a[MAX_AXES], b[MAX_AXES], c[MAX_AXES];
};

// Numbers of the operations; those of one argument come first.
enum { COPY, NEGATE, SQRT, RECIPROCAL, SIGMOID, APPLY_SILU, APPLY_GELU_TANH, SQUARE, ADD, SUBTRACT, MULTIPLY, DIVIDE, MAXIMUM, ADD_PRODUCT, TO_BYTE, TO_E4M3 };

// To the nearest whole number of a signed byte, ties to even.
DEVICE float to_byte(float x) { return fminf(fmaxf(rintf(x), -128.f), 127.f); }
// To the nearest value of E4M3, ties to even, 448 at most: steps of 2^-9 below 2^-6, above it of an eighth of the power
// of two. Dividing by a power of two is exact.
DEVICE float to_e4m3(float x) {
    x = fminf(fmaxf(x, -448.f), 448.f);
    u32 exponent = as_bits(x) >> 23 & 0xff;
    float step = as_float((exponent > 121 ? exponent - 3 : 118) << 23);
    return rintf(x / step) * step;
}

DEVICE float apply(int op, float a, float b, float c) {
    switch (op) {
    case NEGATE: return -a;
    case SQRT: return sqrtf(a);
    case RECIPROCAL: return 1.f / a;
    case SIGMOID: return sigmoid(a);
    case APPLY_SILU: return a * sigmoid(a);
    case APPLY_GELU_TANH: return gelu_tanh(a);
    case SQUARE: return a * a;
    case ADD: return a + b;
    case SUBTRACT: return a - b;
    case MULTIPLY: return a * b;
    case DIVIDE: return a / b;
    case MAXIMUM: return fmaxf(a, b);
    case ADD_PRODUCT: return a + b * c;
    case TO_BYTE: return to_byte(a / b);
    case TO_E4M3: return to_e4m3(a / b);
    default: return a;
    }
}

// `count` elements, the last axis fastest. Any grid of 256 threads.
KERNEL __launch_bounds__(256) void elementwise(int op, void* __restrict__ out, int out_type, const void* __restrict__ a, int a_type,
                                               const void* __restrict__ b, int b_type, const void* __restrict__ c, int c_type, u32 count,
                                               Axes axes) {
    for (u32 i = blockIdx.x * 256 + threadIdx.x; i < count; i += gridDim.x * 256) {
        i64 to = 0, at = 0, bt = 0, ct = 0;
        u32 rest = i;
        for (int axis = axes.rank - 1; axis >= 0; axis--) {
            u32 place = rest;
            if (axis) {
                rest /= axes.size[axis];
                place -= rest * axes.size[axis];
            }
            to += place * axes.out[axis];
            at += place * axes.a[axis];
            if (b) bt += place * axes.b[axis];
            if (c) ct += place * axes.c[axis];
        }
        store(out, to, out_type, apply(op, load(a, at, a_type), b ? load(b, bt, b_type) : 0.f, c ? load(c, ct, c_type) : 0.f));
    }
}
