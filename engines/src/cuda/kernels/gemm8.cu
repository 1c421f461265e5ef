// Matrix products of signed bytes on the tensor cores, with a scale for each column.
#include "gemm.cu"

// Bytes of depth of one stage: as many as of bf16.
#define BK8 64

// Place of 16-byte chunk `c` of a row of 4 chunks, in bytes.
DEVICE int swizzle_bytes(int row, int c) { return row * BK8 + ((c ^ ((row >> 1) & 3)) << 4); }

template <int ROWS, int THREADS> DEVICE void copy_bytes(signed char* to, const signed char* from, int row0, int k0, int rows, int k) {
    for (int i = threadIdx.x; i < ROWS * BK8 / 16; i += THREADS) {
        int r = i / (BK8 / 16), c = i % (BK8 / 16);
        bool read = row0 + r < rows && k0 + 16 * c < k;
        copy16(to + swizzle_bytes(r, c), read ? from + (i64)(row0 + r) * k + k0 + 16 * c : from, read);
    }
}

// out[m, n] = activation(scale scales[n] (a[m, k] b[n, k]) + bias[n]); sums are exact. k is a multiple of 16, n is even.
template <int BM, int BN, int WM, int WN>
DEVICE void gemm8(unsigned char* raw, const signed char* a, const signed char* b, const float* scales, float scale, const float* bias, void* out,
                  int out_type, int m, int n, int k, int activation) {
    const int THREADS = 32 * (BM / WM) * (BN / WN), STAGE = (BM + BN) * BK8;
    signed char* stages = (signed char*)raw;
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    int m0 = blockIdx.y * BM, n0 = blockIdx.x * BN, wm = warp / (BN / WN) * WM, wn = warp % (BN / WN) * WN;
    int sums[WM / 16][WN / 8][4];
    for (int i = 0; i < WM / 16; i++)
        for (int j = 0; j < WN / 8; j++)
            for (int e = 0; e < 4; e++) sums[i][j][e] = 0;
    int steps = (k + BK8 - 1) / BK8;
    auto copy = [&](int step) {
        signed char* to = stages + step % STAGES * STAGE;
        copy_bytes<BM, THREADS>(to, a, m0, step * BK8, m, k);
        copy_bytes<BN, THREADS>(to + BM * BK8, b, n0, step * BK8, n, k);
    };
#pragma unroll 1
    for (int s = 0; s < STAGES - 1; s++) {
        if (s < steps) copy(s);
        commit_copies();
    }
    for (int step = 0; step < steps; step++) {
        wait_copies<STAGES - 2>();
        block_barrier();
        if (step + STAGES - 1 < steps) copy(step + STAGES - 1);
        commit_copies();
        const signed char *sa = stages + step % STAGES * STAGE, *sb = sa + BM * BK8;
#pragma unroll
        for (int c = 0; c < BK8 / 16; c += 2) {
            u32 fa[WM / 16][4], fb[WN / 16][4];
#pragma unroll
            for (int i = 0; i < WM / 16; i++) load_matrices(fa[i], sa + swizzle_bytes(wm + 16 * i + (lane & 15), c + (lane >> 4)));
#pragma unroll
            for (int j = 0; j < WN / 16; j++) load_matrices(fb[j], sb + swizzle_bytes(wn + 16 * j + (lane & 15), c + (lane >> 4)));
#pragma unroll
            for (int i = 0; i < WM / 16; i++)
#pragma unroll
                for (int j = 0; j < WN / 16; j++) {
                    multiply_add_bytes(sums[i][2 * j], fa[i], fb[j][0], fb[j][2]);
                    multiply_add_bytes(sums[i][2 * j + 1], fa[i], fb[j][1], fb[j][3]);
                }
        }
    }
#pragma unroll
    for (int j = 0; j < WN / 8; j++) {
        int col = n0 + wn + 8 * j + 2 * (lane & 3);
        if (col >= n) continue;
        float s0 = scale * scales[col], s1 = scale * scales[col + 1], first = bias ? bias[col] : 0.f, second = bias ? bias[col + 1] : 0.f;
#pragma unroll
        for (int i = 0; i < WM / 16; i++)
#pragma unroll
            for (int r = 0; r < 2; r++) {
                int row = m0 + wm + 16 * i + lane / 4 + 8 * r;
                if (row < m)
                    store_pair(out, (i64)row * n + col, out_type, activate(sums[i][j][2 * r] * s0 + first, activation),
                               activate(sums[i][j][2 * r + 1] * s1 + second, activation));
            }
    }
}

// Grid: n / 128, m / 128. 256 threads, 48 KiB.
KERNEL __launch_bounds__(256) void gemm_int8_128(const signed char* __restrict__ a, const signed char* __restrict__ b, const float* __restrict__ scales,
                                                 float scale, const float* __restrict__ bias, void* __restrict__ out, int out_type, int m, int n,
                                                 int k, int activation) {
    SHARED(raw);
    gemm8<128, 128, 64, 32>(raw, a, b, scales, scale, bias, out, out_type, m, n, k, activation);
}

// For few rows or columns. Grid: n / 64, m / 64. 128 threads, 24 KiB.
KERNEL __launch_bounds__(128) void gemm_int8_64(const signed char* __restrict__ a, const signed char* __restrict__ b, const float* __restrict__ scales,
                                                float scale, const float* __restrict__ bias, void* __restrict__ out, int out_type, int m, int n,
                                                int k, int activation) {
    SHARED(raw);
    gemm8<64, 64, 32, 32>(raw, a, b, scales, scale, bias, out, out_type, m, n, k, activation);
}
