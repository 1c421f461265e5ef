// Matrix products with bias and activation.
#pragma once
#include "device.h"

// Depth of one stage, and how many stages of copies are under way.
#define BK 32
#define STAGES 3

// Place of 16-byte chunk `c` of a row of 4 chunks: eight rows of one ldmatrix lie in different banks.
DEVICE int swizzle4(int row, int c) { return row * BK + ((c ^ ((row >> 1) & 3)) << 3); }
// The same for rows of 8 chunks or more.
template <int WIDTH> DEVICE int swizzle8(int row, int c) { return row * WIDTH + ((c ^ (row & 7)) << 3); }

template <int BM, int BN, int THREADS>
DEVICE void copy_stage(bf16* sa, bf16* sb, const bf16* a, const bf16* b, int m0, int n0, int k0, int m, int n, int k) {
    for (int i = threadIdx.x; i < BM * BK / 8; i += THREADS) {
        int r = i / (BK / 8), c = i % (BK / 8);
        bool read = m0 + r < m && k0 + 8 * c < k;
        copy16(sa + swizzle4(r, c), read ? a + (i64)(m0 + r) * k + k0 + 8 * c : a, read);
    }
    for (int i = threadIdx.x; i < BK * BN / 8; i += THREADS) {
        int r = i / (BN / 8), c = i % (BN / 8);
        bool read = k0 + r < k && n0 + 8 * c < n;
        copy16(sb + swizzle8<BN>(r, c), read ? b + (i64)(k0 + r) * n + n0 + 8 * c : b, read);
    }
}

// sums += a[WM, BK] b[BK, WN] of one stage in shared memory: rows of `a` from `wm`, columns of `b` from `wn`.
template <int BM, int BN, int WM, int WN>
DEVICE void multiply_stage(float (*sums)[WN / 8][4], const bf16* sa, int wm, int wn, int lane) {
    const bf16* sb = sa + BM * BK;
#pragma unroll
    for (int kk = 0; kk < BK; kk += 16) {
        u32 fa[WM / 16][4], fb[WN / 16][4];
#pragma unroll
        for (int i = 0; i < WM / 16; i++) load_matrices(fa[i], sa + swizzle4(wm + 16 * i + (lane & 15), kk / 8 + (lane >> 4)));
#pragma unroll
        for (int j = 0; j < WN / 16; j++)
            load_matrices_transposed(fb[j], sb + swizzle8<BN>(kk + (lane & 15), (wn + 16 * j) / 8 + (lane >> 4)));
#pragma unroll
        for (int i = 0; i < WM / 16; i++)
#pragma unroll
            for (int j = 0; j < WN / 16; j++) {
                multiply_add(sums[i][2 * j], fa[i], fb[j][0], fb[j][1]);
                multiply_add(sums[i][2 * j + 1], fa[i], fb[j][2], fb[j][3]);
            }
    }
}

// out[m, n] = activation(scale a[m, k] b[k, n] + bias[n]) for every z; bf16 operands on the tensor cores, sums in f32.
// A block makes BM x BN, each of its warps WM x WN. k and n are multiples of 8. Strides between z are in elements.
template <int BM, int BN, int WM, int WN>
DEVICE void gemm(unsigned char* raw, const bf16* a, const bf16* b, const float* bias, void* out, int out_type, int m,
                 int n, int k, i64 a_stride, i64 b_stride, int activation, float scale) {
    const int THREADS = 32 * (BM / WM) * (BN / WN), STAGE = (BM + BN) * BK;
    bf16* stages = (bf16*)raw;
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    int m0 = blockIdx.y * BM, n0 = blockIdx.x * BN, wm = warp / (BN / WN) * WM, wn = warp % (BN / WN) * WN;
    a += blockIdx.z * a_stride;
    b += blockIdx.z * b_stride;
    float sums[WM / 16][WN / 8][4];
    for (int i = 0; i < WM / 16; i++)
        for (int j = 0; j < WN / 8; j++)
            for (int e = 0; e < 4; e++) sums[i][j][e] = 0.f;
    int steps = (k + BK - 1) / BK;
#pragma unroll 1
    for (int s = 0; s < STAGES - 1; s++) {
        if (s < steps) copy_stage<BM, BN, THREADS>(stages + s * STAGE, stages + s * STAGE + BM * BK, a, b, m0, n0, s * BK, m, n, k);
        commit_copies();
    }
    for (int step = 0; step < steps; step++) {
        wait_copies<STAGES - 2>();
        block_barrier();
        int next = step + STAGES - 1;
        if (next < steps) {
            bf16* to = stages + next % STAGES * STAGE;
            copy_stage<BM, BN, THREADS>(to, to + BM * BK, a, b, m0, n0, next * BK, m, n, k);
        }
        commit_copies();
        multiply_stage<BM, BN, WM, WN>(sums, stages + step % STAGES * STAGE, wm, wn, lane);
    }
    i64 base = (i64)blockIdx.z * m * n;
#pragma unroll
    for (int j = 0; j < WN / 8; j++) {
        int col = n0 + wn + 8 * j + 2 * (lane & 3);
        if (col >= n) continue;
        float first = bias ? bias[col] : 0.f, second = bias ? bias[col + 1] : 0.f;
#pragma unroll
        for (int i = 0; i < WM / 16; i++)
#pragma unroll
            for (int r = 0; r < 2; r++) {
                int row = m0 + wm + 16 * i + lane / 4 + 8 * r;
                if (row < m)
                    store_pair(out, base + (i64)row * n + col, out_type, activate(sums[i][j][2 * r] * scale + first, activation),
                               activate(sums[i][j][2 * r + 1] * scale + second, activation));
            }
    }
}

// Grid: n / 128, m / 128, z. 256 threads, 48 KiB.
KERNEL __launch_bounds__(256) void gemm_bf16_128(const bf16* __restrict__ a, const bf16* __restrict__ b, const float* __restrict__ bias,
                                                 void* __restrict__ out, int out_type, int m, int n, int k, i64 a_stride, i64 b_stride,
                                                 int activation, float scale) {
    SHARED(raw);
    gemm<128, 128, 64, 32>(raw, a, b, bias, out, out_type, m, n, k, a_stride, b_stride, activation, scale);
}

// For few rows or columns. Grid: n / 64, m / 64, z. 128 threads, 24 KiB.
KERNEL __launch_bounds__(128) void gemm_bf16_64(const bf16* __restrict__ a, const bf16* __restrict__ b, const float* __restrict__ bias,
                                                void* __restrict__ out, int out_type, int m, int n, int k, i64 a_stride, i64 b_stride,
                                                int activation, float scale) {
    SHARED(raw);
    gemm<64, 64, 32, 32>(raw, a, b, bias, out, out_type, m, n, k, a_stride, b_stride, activation, scale);
}

// Where the elements of an operand of `gemm_any` lie: strides of the two outer axes, rows and columns, in elements.
struct Operand {
    i64 outer, inner, row, col;
};

// out[z, m, n] = activation(a[z, m, k] b[z, k, n] + bias[n]) in f32, any sizes, types and strides; z counts `inner`
// fastest. Grid: n / 64, m / 64, z. 256 threads, 8704 bytes.
KERNEL __launch_bounds__(256) void gemm_any(const void* __restrict__ a, int a_type, Operand as, const void* __restrict__ b, int b_type,
                                            Operand bs, const float* __restrict__ bias, void* __restrict__ out, int out_type, int m, int n,
                                            int k, int inner, int activation) {
    SHARED(raw);
    const int TILE = 64, DEPTH = 16, PITCH = TILE + 4;
    float* sa = (float*)raw;
    float* sb = sa + DEPTH * PITCH;
    int t = threadIdx.x, m0 = blockIdx.y * TILE, n0 = blockIdx.x * TILE, z0 = blockIdx.z / inner, z1 = blockIdx.z % inner;
    i64 a0 = z0 * as.outer + z1 * as.inner, b0 = z0 * bs.outer + z1 * bs.inner;
    int row = t / 16 * 4, col = t % 16 * 4;
    float sums[4][4];
    for (int i = 0; i < 4; i++)
        for (int j = 0; j < 4; j++) sums[i][j] = 0.f;
    for (int k0 = 0; k0 < k; k0 += DEPTH) {
        for (int i = t; i < TILE * DEPTH; i += 256) {
            int r = i / DEPTH, c = i % DEPTH;
            bool in = m0 + r < m && k0 + c < k;
            sa[c * PITCH + r] = in ? load(a, a0 + (m0 + r) * as.row + (k0 + c) * as.col, a_type) : 0.f;
        }
        for (int i = t; i < DEPTH * TILE; i += 256) {
            int r = i / TILE, c = i % TILE;
            bool in = k0 + r < k && n0 + c < n;
            sb[r * PITCH + c] = in ? load(b, b0 + (k0 + r) * bs.row + (n0 + c) * bs.col, b_type) : 0.f;
        }
        block_barrier();
#pragma unroll
        for (int d = 0; d < DEPTH; d++) {
            float x[4], y[4];
#pragma unroll
            for (int i = 0; i < 4; i++) x[i] = sa[d * PITCH + row + i], y[i] = sb[d * PITCH + col + i];
#pragma unroll
            for (int i = 0; i < 4; i++)
#pragma unroll
                for (int j = 0; j < 4; j++) sums[i][j] += x[i] * y[j];
        }
        block_barrier();
    }
    for (int i = 0; i < 4; i++)
        for (int j = 0; j < 4; j++) {
            int r = m0 + row + i, c = n0 + col + j;
            if (r < m && c < n)
                store(out, ((i64)blockIdx.z * m + r) * n + c, out_type, activate(sums[i][j] + (bias ? bias[c] : 0.f), activation));
        }
}
