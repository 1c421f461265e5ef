// Convolutions of pictures [n, channels, height, width], as products of the weights [made, channels * kernel] and of
// windows that are gathered on the way. A convolution over time is one over frames joined on the channels: frame i of
// its input may begin inside of frame i - 1, `picture` elements after it.
#include "device.h"

struct Conv {
    i64 picture;
    // Height and width as they are read: `shift` halves the coordinates, so that each pixel is read as a square of them.
    int channels, height, width, made, out_height, out_width, kernel_height, kernel_width, stride_y, stride_x, pad_y, pad_x, shift;
};

// Where the pixel of a window lies, or -1 outside of the picture. `depth` counts channels and places of the kernel.
template <int SIDE> DEVICE int window_place(const Conv& c, int depth, int y0, int x0) {
    int height = SIDE ? SIDE : c.kernel_height, width = SIDE ? SIDE : c.kernel_width;
    int channel = depth / (height * width), rest = depth - channel * (height * width);
    int y = y0 + rest / width, x = x0 + rest % width;
    if (y < 0 || y >= c.height || x < 0 || x >= c.width) return -1;
    return (channel * (c.height >> c.shift) + (y >> c.shift)) * (c.width >> c.shift) + (x >> c.shift);
}

// out[n, made, pixels] = weights[made, depth] windows[depth, pixels] + bias[made] of bf16 on the tensor cores, sums in
// f32, for square kernels of SIDE. A block makes BM channels of BN pixels, each of its warps WM x WN. The depth is a
// multiple of 8. Weights are copied one stage ahead, windows pass through registers meanwhile.
template <int SIDE, int BM, int BN, int WM, int WN>
DEVICE void conv(unsigned char* raw, const bf16* x, const bf16* weights, const float* bias, void* out, int out_type, Conv c) {
    const int THREADS = 32 * (BM / WM) * (BN / WN), STAGE = (BM + BN) * BK, ROWS = THREADS / (BN / 2), MINE = BK / ROWS;
    bf16* stages = (bf16*)raw;
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, depth = c.channels * SIDE * SIDE, pixels = c.out_height * c.out_width;
    int m0 = blockIdx.y * BM, n0 = blockIdx.x * BN, wm = warp / (BN / WN) * WM, wn = warp % (BN / WN) * WN;
    x += blockIdx.z * c.picture;
    // This thread gathers two neighbouring pixels of every ROWS-th row.
    int pair = threadIdx.x % (BN / 2), first_row = threadIdx.x / (BN / 2), y0[2], x0[2];
    for (int e = 0; e < 2; e++) {
        int pixel = n0 + 2 * pair + e;
        // Far outside of every picture where there is no such pixel.
        y0[e] = pixel < pixels ? pixel / c.out_width * c.stride_y - c.pad_y : -(1 << 20);
        x0[e] = pixel % c.out_width * c.stride_x - c.pad_x;
    }
    u32 held[MINE];
    auto fetch = [&](int step) {
#pragma unroll
        for (int i = 0; i < MINE; i++) {
            int at = step * BK + first_row + ROWS * i;
            u32 both = 0;
#pragma unroll
            for (int e = 0; e < 2; e++) {
                int place = at < depth ? window_place<SIDE>(c, at, y0[e], x0[e]) : -1;
                if (place >= 0) both |= (u32)x[place] << 16 * e;
            }
            held[i] = both;
        }
    };
    auto put = [&](int step) {
        bf16* to = stages + step % 2 * STAGE + BM * BK;
#pragma unroll
        for (int i = 0; i < MINE; i++) *(u32*)(to + swizzle8<BN>(first_row + ROWS * i, pair / 4) + pair % 4 * 2) = held[i];
    };
    auto copy_weights = [&](int step) {
        for (int i = threadIdx.x; i < BM * BK / 8; i += THREADS) {
            int r = i / (BK / 8), at = step * BK + i % (BK / 8) * 8;
            bool read = m0 + r < c.made && at < depth;
            copy16(stages + step % 2 * STAGE + swizzle4(r, i % (BK / 8)), read ? weights + (i64)(m0 + r) * depth + at : weights, read);
        }
        commit_copies();
    };
    float sums[WM / 16][WN / 8][4];
    for (int i = 0; i < WM / 16; i++)
        for (int j = 0; j < WN / 8; j++)
            for (int e = 0; e < 4; e++) sums[i][j][e] = 0.f;
    int steps = (depth + BK - 1) / BK;
    copy_weights(0);
    fetch(0);
    put(0);
    for (int step = 0; step < steps; step++) {
        wait_copies<0>();
        block_barrier();
        if (step + 1 < steps) {
            copy_weights(step + 1);
            fetch(step + 1);
        }
        multiply_stage<BM, BN, WM, WN>(sums, stages + step % 2 * STAGE, wm, wn, lane);
        if (step + 1 < steps) put(step + 1);
    }
#pragma unroll
    for (int i = 0; i < WM / 16; i++)
#pragma unroll
        for (int r = 0; r < 2; r++) {
            int row = m0 + wm + 16 * i + lane / 4 + 8 * r;
            if (row >= c.made) continue;
            float added = bias ? bias[row] : 0.f;
            i64 base = ((i64)blockIdx.z * c.made + row) * pixels;
#pragma unroll
            for (int j = 0; j < WN / 8; j++) {
                int col = n0 + wn + 8 * j + 2 * (lane & 3);
                float first = sums[i][j][2 * r] + added, second = sums[i][j][2 * r + 1] + added;
                if (pixels % 2 == 0 && col < pixels) {
                    store_pair(out, base + col, out_type, first, second);
                } else {
                    if (col < pixels) store(out, base + col, out_type, first);
                    if (col + 1 < pixels) store(out, base + col + 1, out_type, second);
                }
            }
        }
}

// Grid: pixels / 128, made / 128, n; 256 threads, 32 KiB. Or, for few channels or pixels: pixels / 64, made / 64, n; 128
// threads, 16 KiB.
#define CONV(SIDE, BM, BN, WM, WN)                                                                                                  \
    KERNEL __launch_bounds__(32 * (BM / WM) * (BN / WN)) void conv_bf16_##SIDE##x##SIDE##_##BM(                                     \
        const bf16* __restrict__ x, const bf16* __restrict__ weights, const float* __restrict__ bias, void* __restrict__ out,       \
        int out_type, Conv c) {                                                                                                     \
        SHARED(raw);                                                                                                                \
        conv<SIDE, BM, BN, WM, WN>(raw, x, weights, bias, out, out_type, c);                                                        \
    }
CONV(1, 128, 128, 64, 32)
CONV(1, 64, 64, 32, 32)
CONV(3, 128, 128, 64, 32)
CONV(3, 64, 64, 32, 32)

// The same in f32, any types, kernels and depths. Grid: pixels / 64, made / 64, n. 256 threads, 8704 bytes.
KERNEL __launch_bounds__(256) void conv_any(const void* __restrict__ x, int x_type, const void* __restrict__ weights, int weights_type,
                                            const float* __restrict__ bias, void* __restrict__ out, int out_type, Conv c) {
    SHARED(raw);
    const int TILE_SIDE = 64, DEPTH = 16, PITCH = TILE_SIDE + 4;
    float *sa = (float*)raw, *sb = sa + DEPTH * PITCH;
    int t = threadIdx.x, m0 = blockIdx.y * TILE_SIDE, n0 = blockIdx.x * TILE_SIDE, pixels = c.out_height * c.out_width;
    int depth = c.channels * c.kernel_height * c.kernel_width, row = t / 16 * 4, col = t % 16 * 4;
    // This thread gathers one pixel of every fourth row.
    int pixel = n0 + t % TILE_SIDE, y0 = pixel / c.out_width * c.stride_y - c.pad_y, x0 = pixel % c.out_width * c.stride_x - c.pad_x;
    float sums[4][4];
    for (int i = 0; i < 4; i++)
        for (int j = 0; j < 4; j++) sums[i][j] = 0.f;
    for (int k0 = 0; k0 < depth; k0 += DEPTH) {
        for (int i = t; i < TILE_SIDE * DEPTH; i += 256) {
            int r = i / DEPTH, d = i % DEPTH;
            bool in = m0 + r < c.made && k0 + d < depth;
            sa[d * PITCH + r] = in ? load(weights, (i64)(m0 + r) * depth + k0 + d, weights_type) : 0.f;
        }
        for (int d = t / TILE_SIDE; d < DEPTH; d += 256 / TILE_SIDE) {
            int place = pixel < pixels && k0 + d < depth ? window_place<0>(c, k0 + d, y0, x0) : -1;
            sb[d * PITCH + t % TILE_SIDE] = place >= 0 ? load(x, blockIdx.z * c.picture + place, x_type) : 0.f;
        }
        block_barrier();
#pragma unroll 4
        for (int d = 0; d < DEPTH; d++) {
            float a[4], b[4];
#pragma unroll
            for (int i = 0; i < 4; i++) a[i] = sa[d * PITCH + row + i], b[i] = sb[d * PITCH + col + i];
#pragma unroll
            for (int i = 0; i < 4; i++)
#pragma unroll
                for (int j = 0; j < 4; j++) sums[i][j] += a[i] * b[j];
        }
        block_barrier();
    }
    for (int i = 0; i < 4; i++)
        for (int j = 0; j < 4; j++)
            if (m0 + row + i < c.made && n0 + col + j < pixels)
                store(out, ((i64)blockIdx.z * c.made + m0 + row + i) * pixels + n0 + col + j, out_type,
                      sums[i][j] + (bias ? bias[m0 + row + i] : 0.f));
}
