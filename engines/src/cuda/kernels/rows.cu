// Kernels over rows and channels: norms, softmax, means, rotation, rows of a table. Blocks have 128 threads; where
// nothing else is said, a warp makes a row.
#include "device.h"

// y = x / rms(x) or, where `centred`, (x - mean) / deviation; then times `weight`, plus `bias` (each [width]), then
// times (1 + scale) plus shift, [rows / per_row, width]; all of which may be null. Grid: rows / 4.
KERNEL __launch_bounds__(128) void norm_rows(const void* __restrict__ x, int x_type, void* __restrict__ out, int out_type, int rows, int width,
                                        float eps, int centred, const float* __restrict__ weight, const float* __restrict__ bias,
                                        const float* __restrict__ scale, const float* __restrict__ shift, int per_row) {
    int row = blockIdx.x * 4 + threadIdx.x / 32, lane = threadIdx.x % 32;
    bool on = row < rows;
    i64 at = (i64)(on ? row : 0) * width;
    float mean = 0.f, square = 0.f;
    if (centred) {
        for (int i = lane; i < width; i += 32) mean += load(x, at + i, x_type);
        mean = warp_sum(mean) / width;
    }
    for (int i = lane; i < width; i += 32) {
        float d = load(x, at + i, x_type) - mean;
        square += d * d;
    }
    float inverse = 1.f / sqrtf(warp_sum(square) / width + eps);
    if (!on) return;
    i64 of = (i64)(row / per_row) * width;
    for (int i = lane; i < width; i += 32) {
        float y = (load(x, at + i, x_type) - mean) * inverse;
        if (weight) y *= weight[i];
        if (bias) y += bias[i];
        if (scale) y = y * (1.f + scale[of + i]) + shift[of + i];
        store(out, at + i, out_type, y);
    }
}

// Softmax of each row, its elements times `scale` first, which is positive. Grid: rows / 4.
KERNEL __launch_bounds__(128) void softmax_rows(const void* __restrict__ x, int x_type, void* __restrict__ out, int out_type, int rows, int width,
                                           float scale) {
    int row = blockIdx.x * 4 + threadIdx.x / 32, lane = threadIdx.x % 32;
    bool on = row < rows;
    i64 at = (i64)(on ? row : 0) * width;
    float most = -3.4e38f, total = 0.f;
    for (int i = lane; i < width; i += 32) most = fmaxf(most, load(x, at + i, x_type));
    most = warp_max(most);
    for (int i = lane; i < width; i += 32) total += exponential((load(x, at + i, x_type) - most) * scale);
    total = 1.f / warp_sum(total);
    if (!on) return;
    for (int i = lane; i < width; i += 32) store(out, at + i, out_type, exponential((load(x, at + i, x_type) - most) * scale) * total);
}

// out[outer, inner] from x[outer, size, inner]: the mean over the middle axis, or the root of the sum of squares. A warp
// makes one result; where `inner` is 32 or more, a thread does, so that a warp reads neighbours. Grid: outer * inner
// / 4, or / 128.
KERNEL __launch_bounds__(128) void reduce_axis(const void* __restrict__ x, int x_type, void* __restrict__ out, int out_type, int outer, int size,
                                          int inner, int root_of_squares) {
    int lanes = inner < 32 ? 32 : 1, lane = threadIdx.x % lanes;
    i64 one = (i64)blockIdx.x * (128 / lanes) + threadIdx.x / lanes, count = (i64)outer * inner;
    bool on = one < count;
    i64 at = on ? one / inner * size * inner + one % inner : 0;
    float sum = 0.f;
    for (int i = lane; i < size; i += lanes) {
        float v = load(x, at + (i64)i * inner, x_type);
        sum += root_of_squares ? v * v : v;
    }
    if (lanes == 32) sum = warp_sum(sum);
    if (on && lane == 0) store(out, one, out_type, root_of_squares ? sqrtf(sum) : sum / size);
}

// y = gamma[c] x / |x|, the length of x[n, c, pixels] over its channels, at least `least`; then y sigmoid(y) where
// `with_silu`. Threads of a warp have neighbouring pixels, each of the four warps every fourth channel. Grid: pixels /
// 32, n. 512 bytes.
KERNEL __launch_bounds__(128) void norm_channels(const void* __restrict__ x, int x_type, const float* __restrict__ gamma, void* __restrict__ out,
                                            int out_type, int channels, int pixels, float least, int with_silu) {
    SHARED(raw);
    float* sums = (float*)raw;
    int pixel = blockIdx.x * 32 + threadIdx.x % 32, warp = threadIdx.x / 32;
    bool on = pixel < pixels;
    i64 at = (i64)blockIdx.y * channels * pixels + (on ? pixel : 0);
    float sum = 0.f;
    for (int c = warp; c < channels; c += 4) {
        float v = load(x, at + (i64)c * pixels, x_type);
        sum += v * v;
    }
    sums[threadIdx.x] = sum;
    block_barrier();
    sum = 0.f;
    for (int i = 0; i < 4; i++) sum += sums[32 * i + threadIdx.x % 32];
    float inverse = 1.f / fmaxf(sqrtf(sum), least);
    if (!on) return;
    for (int c = warp; c < channels; c += 4) {
        float y = load(x, at + (i64)c * pixels, x_type) * inverse * gamma[c];
        store(out, at + (i64)c * pixels, out_type, with_silu ? y * sigmoid(y) : y);
    }
}

// Rotates channels j and j + d / 2 of each head of x[batch, tokens, heads, d] by the angle of cos, sin[tokens, d / 2].
// Grid: batch * tokens.
KERNEL __launch_bounds__(128) void rotate_heads(const void* __restrict__ x, int x_type, const float* __restrict__ cos, const float* __restrict__ sin,
                                          void* __restrict__ out, int out_type, int tokens, int heads, int d) {
    int half = d / 2;
    i64 row = blockIdx.x, table = row % tokens * half;
    for (int i = threadIdx.x; i < heads * half; i += 128) {
        i64 at = (row * heads + i / half) * d + i % half;
        float a = load(x, at, x_type), b = load(x, at + half, x_type), c = cos[table + i % half], s = sin[table + i % half];
        store(out, at, out_type, a * c - b * s);
        store(out, at + half, out_type, b * c + a * s);
    }
}

// out[i] = table[index[i]], rows of `width`, `stride` elements apart in the table; a negative index counts from the
// end, one outside makes NaN. Grid: count.
KERNEL __launch_bounds__(128) void gather_rows(const void* __restrict__ table, int table_type, const int* __restrict__ index, void* __restrict__ out,
                                          int out_type, int rows, int width, i64 stride) {
    i64 to = (i64)blockIdx.x * width;
    int row = index[blockIdx.x];
    if (row < 0) row += rows;
    bool inside = row >= 0 && row < rows;
    for (int i = threadIdx.x; i < width; i += 128)
        store(out, to + i, out_type, inside ? load(table, row * stride + i, table_type) : 0.f / 0.f);
}
