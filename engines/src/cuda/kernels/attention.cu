// Softmax attention without the matrix of scores in memory. q, out: [batch, nq, heads, d]; k, v: [batch, nk, heads, d].
// The optional bias is f32 and is added to the scaled scores; its strides, in elements, may be 0.
#include "device.h"

struct Bias {
    const float* at;
    i64 batch, head, query, key;
};

// Queries of a block, and keys of one step.
#define TILE 64
// Below every real score; its power of two is zero.
#define NOTHING -1e30f

// Place of 16-byte chunk `c` of a row, eight rows of one ldmatrix in different banks.
template <int PITCH> DEVICE int chunk(int row, int c) { return row * PITCH + ((c ^ (row & 7)) << 3); }

template <int D, int PITCH> DEVICE void copy_rows(bf16* to, const bf16* from, int first, int rows, i64 stride) {
    for (int i = threadIdx.x; i < TILE * (D / 8); i += 128) {
        int r = i / (D / 8), c = i % (D / 8);
        bool read = first + r < rows;
        copy16(to + chunk<PITCH>(r, c), from + (read ? (i64)(first + r) * stride : 0) + c * 8, read);
    }
}

// Four warps, each with 16 queries in registers; keys and values go through shared memory, two steps of them.
template <int D, int PITCH>
DEVICE void attention(unsigned char* raw, const bf16* q, const bf16* k, const bf16* v, bf16* out, Bias bias, int nq, int nk, int heads,
                      float scale) {
    bf16 *keys = (bf16*)raw, *values = keys + 2 * TILE * PITCH;
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, head = blockIdx.y, m0 = blockIdx.x * TILE;
    i64 stride = (i64)heads * D, batch = blockIdx.z;
    q += batch * nq * stride + head * D;
    k += batch * nk * stride + head * D;
    v += batch * nk * stride + head * D;
    out += batch * nq * stride + head * D;
    const float* added = bias.at ? bias.at + batch * bias.batch + head * bias.head : 0;

    // Queries pass through the values' place.
    copy_rows<D, PITCH>(values, q, m0, nq, stride);
    commit_copies();
    wait_copies<0>();
    block_barrier();
    u32 fq[D / 16][4];
#pragma unroll
    for (int d = 0; d < D / 16; d++) load_matrices(fq[d], values + chunk<PITCH>(warp * 16 + (lane & 15), 2 * d + (lane >> 4)));
    block_barrier();

    float sums[D / 8][4], most[2] = {NOTHING, NOTHING}, total[2] = {0.f, 0.f};
    for (int i = 0; i < D / 8; i++)
        for (int e = 0; e < 4; e++) sums[i][e] = 0.f;
    int steps = (nk + TILE - 1) / TILE;
    copy_rows<D, PITCH>(keys, k, 0, nk, stride);
    copy_rows<D, PITCH>(values, v, 0, nk, stride);
    commit_copies();
    for (int step = 0; step < steps; step++) {
        if (step + 1 < steps) {
            int half = ((step + 1) & 1) * TILE * PITCH;
            copy_rows<D, PITCH>(keys + half, k, (step + 1) * TILE, nk, stride);
            copy_rows<D, PITCH>(values + half, v, (step + 1) * TILE, nk, stride);
        }
        commit_copies();
        wait_copies<1>();
        block_barrier();
        const bf16 *tk = keys + (step & 1) * TILE * PITCH, *tv = values + (step & 1) * TILE * PITCH;
        float s[8][4];
#pragma unroll
        for (int i = 0; i < 8; i++)
#pragma unroll
            for (int e = 0; e < 4; e++) s[i][e] = 0.f;
#pragma unroll
        for (int d = 0; d < D / 16; d++)
#pragma unroll
            for (int n = 0; n < 4; n++) {
                u32 r[4];
                load_matrices(r, tk + chunk<PITCH>(n * 16 + (lane & 7) + ((lane >> 4) << 3), 2 * d + ((lane >> 3) & 1)));
                multiply_add(s[2 * n], fq[d], r[0], r[1]);
                multiply_add(s[2 * n + 1], fq[d], r[2], r[3]);
            }
        float top[2] = {most[0], most[1]}, shrink[2];
#pragma unroll
        for (int i = 0; i < 8; i++)
#pragma unroll
            for (int e = 0; e < 4; e++) {
                int key = step * TILE + i * 8 + 2 * (lane & 3) + (e & 1), query = m0 + warp * 16 + lane / 4 + 8 * (e / 2);
                float x = s[i][e] * (scale * LOG2_E);
                if (added && key < nk && query < nq) x += added[query * bias.query + key * bias.key] * LOG2_E;
                s[i][e] = key < nk ? x : NOTHING;
                top[e / 2] = fmaxf(top[e / 2], s[i][e]);
            }
#pragma unroll
        for (int r = 0; r < 2; r++) {
            top[r] = fmaxf(top[r], from_lane_xor(top[r], 1));
            top[r] = fmaxf(top[r], from_lane_xor(top[r], 2));
            shrink[r] = exp2_fast(most[r] - top[r]);
            most[r] = top[r];
            total[r] *= shrink[r];
        }
#pragma unroll
        for (int i = 0; i < 8; i++)
#pragma unroll
            for (int e = 0; e < 4; e++) {
                s[i][e] = exp2_fast(s[i][e] - most[e / 2]);
                total[e / 2] += s[i][e];
            }
#pragma unroll
        for (int i = 0; i < D / 8; i++)
#pragma unroll
            for (int e = 0; e < 4; e++) sums[i][e] *= shrink[e / 2];
#pragma unroll
        for (int n = 0; n < 4; n++) {
            u32 p[4] = {pack(s[2 * n][0], s[2 * n][1]), pack(s[2 * n][2], s[2 * n][3]), pack(s[2 * n + 1][0], s[2 * n + 1][1]),
                        pack(s[2 * n + 1][2], s[2 * n + 1][3])};
#pragma unroll
            for (int d = 0; d < D / 16; d++) {
                u32 r[4];
                load_matrices_transposed(r, tv + chunk<PITCH>(n * 16 + (lane & 15), 2 * d + (lane >> 4)));
                multiply_add(sums[2 * d], p, r[0], r[1]);
                multiply_add(sums[2 * d + 1], p, r[2], r[3]);
            }
        }
        block_barrier();
    }
#pragma unroll
    for (int r = 0; r < 2; r++) {
        total[r] += from_lane_xor(total[r], 1);
        total[r] += from_lane_xor(total[r], 2);
        total[r] = 1.f / total[r];
    }
#pragma unroll
    for (int i = 0; i < D / 8; i++)
#pragma unroll
        for (int r = 0; r < 2; r++) {
            int row = m0 + warp * 16 + lane / 4 + 8 * r;
            if (row < nq)
                store_pair(out, (i64)row * stride + i * 8 + 2 * (lane & 3), BF16, sums[i][2 * r] * total[r], sums[i][2 * r + 1] * total[r]);
        }
}

// Grid: nq / 64, heads, batch. 128 threads; 32 KiB for heads of 48 and 64, 64 KiB for 128.
#define ATTENTION(D, PITCH)                                                                                                          \
    KERNEL __launch_bounds__(128) void attention_bf16_##D(const bf16* __restrict__ q, const bf16* __restrict__ k,                    \
                                                          const bf16* __restrict__ v, bf16* __restrict__ out, Bias bias, int nq,     \
                                                          int nk, int heads, float scale) {                                          \
        SHARED(raw);                                                                                                                 \
        attention<D, PITCH>(raw, q, k, v, out, bias, nq, nk, heads, scale);                                                          \
    }
ATTENTION(48, 64)
ATTENTION(64, 64)
ATTENTION(128, 128)

// The same in f32 for heads of up to 256, any types: one warp a query. Grid: nq / 4, heads, batch. 128 threads,
// 16 d bytes.
KERNEL __launch_bounds__(128) void attention_any(const void* __restrict__ q, int q_type, const void* __restrict__ k, int k_type,
                                                 const void* __restrict__ v, int v_type, void* __restrict__ out, int out_type, Bias bias,
                                                 int nq, int nk, int heads, int d, float scale) {
    SHARED(raw);
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, head = blockIdx.y, query = blockIdx.x * 4 + warp;
    bool on = query < nq;
    i64 stride = (i64)heads * d, batch = blockIdx.z, q0 = (batch * nq + (on ? query : 0)) * stride + head * d;
    i64 k0 = batch * nk * stride + head * d;
    const float* added = bias.at ? bias.at + batch * bias.batch + head * bias.head + (on ? query : 0) * bias.query : 0;
    float* mine = (float*)raw + warp * d;
    for (int i = lane; i < d; i += 32) mine[i] = load(q, q0 + i, q_type);
    warp_barrier();
    float sums[8], most = NOTHING, total = 0.f;
    for (int c = 0; c < 8; c++) sums[c] = 0.f;
    for (int first = 0; first < nk; first += 32) {
        int key = first + lane;
        float s = NOTHING;
        if (key < nk) {
            s = 0.f;
            for (int i = 0; i < d; i++) s += mine[i] * load(k, k0 + key * stride + i, k_type);
            s = s * scale + (added ? added[key * bias.key] : 0.f);
        }
        float top = fmaxf(most, warp_max(s)), shrink = exponential(most - top), p = exponential(s - top);
        most = top;
        total = total * shrink + warp_sum(p);
        for (int c = 0; c < 8; c++) sums[c] *= shrink;
        int keys = nk - first < 32 ? nk - first : 32;
        for (int i = 0; i < keys; i++) {
            float weight = from_lane(p, i);
#pragma unroll
            for (int c = 0; c < 8; c++) {
                int at = lane + 32 * c;
                if (at < d) sums[c] += weight * load(v, k0 + (first + i) * stride + at, v_type);
            }
        }
    }
    if (!on) return;
#pragma unroll
    for (int c = 0; c < 8; c++) {
        int at = lane + 32 * c;
        if (at < d) store(out, q0 + at, out_type, sums[c] / total);
    }
}
