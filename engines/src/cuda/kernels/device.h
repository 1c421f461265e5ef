// What the kernels are written in: PTX on a GPU, functions of the emulator (tests/cuda-emulator) on a CPU.
// NVRTC needs no CUDA headers for this. Element types are passed as numbers, so that one kernel serves all of them.
#pragma once
typedef unsigned short bf16; // bits
typedef unsigned int u32;
typedef long long i64;

#define F32 0
#define BF16 1
#define I32 2
#define I8 3

#ifdef EMULATED
#include "emulator.h"
#else
#define KERNEL extern "C" __global__
#define DEVICE __device__ __forceinline__
#define SHARED(name) extern __shared__ __align__(128) unsigned char name[]

DEVICE u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

// Starts copying 16 bytes to shared memory; zeros where `from` is not to be read.
DEVICE void copy16(void* to, const void* from, bool read) {
    int bytes = read ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(bytes)
                 : "memory");
}
DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most N of this thread's groups of copies are under way.
template <int N> DEVICE void wait_copies() { asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory"); }

// Four matrices of 8x8 bf16; lane l gives the address of row l % 8 of matrix l / 8.
DEVICE void load_matrices(u32 r[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(row)) : "memory");
}
DEVICE void load_matrices_transposed(u32 r[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(row)) : "memory");
}
// d[16x8] += a[16x16] b[16x8] on the tensor cores.
DEVICE void multiply_add(float d[4], const u32 a[4], u32 b0, u32 b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
// d[16x8] += a[16x32] b[32x8] of signed bytes on the tensor cores.
DEVICE void multiply_add_bytes(int d[4], const u32 a[4], u32 b0, u32 b1) {
    asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
                 : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
DEVICE u32 pack(float low, float high) {
    u32 r;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
    return r;
}
DEVICE bf16 narrow(float x) {
    bf16 r;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(r) : "f"(x));
    return r;
}
DEVICE float widen(bf16 x) { return __uint_as_float((u32)x << 16); }
DEVICE float as_float(u32 bits) { return __uint_as_float(bits); }
DEVICE u32 as_bits(float x) { return __float_as_uint(x); }
// a b, rounded before it is added to anything.
DEVICE float product(float a, float b) { return __fmul_rn(a, b); }
// 2^x, to about two units in the last place.
DEVICE float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
// 1 / x, to one unit in the last place.
DEVICE float reciprocal_fast(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
DEVICE float from_lane_xor(float v, int mask) { return __shfl_xor_sync(0xffffffffu, v, mask); }
DEVICE float from_lane(float v, int lane) { return __shfl_sync(0xffffffffu, v, lane); }
DEVICE void block_barrier() { __syncthreads(); }
DEVICE void warp_barrier() { __syncwarp(); }
#endif

DEVICE float load(const void* p, i64 at, int type) {
    if (type == I8) return ((const signed char*)p)[at];
    return type == BF16 ? widen(((const bf16*)p)[at]) : type == F32 ? ((const float*)p)[at] : (float)((const int*)p)[at];
}
DEVICE void store(void* p, i64 at, int type, float value) {
    if (type == BF16) ((bf16*)p)[at] = narrow(value);
    else if (type == I8) ((signed char*)p)[at] = (signed char)value;
    else ((float*)p)[at] = value;
}
// Two neighbours at an even place.
DEVICE void store_pair(void* p, i64 at, int type, float first, float second) {
    if (type == BF16) {
        *(u32*)((bf16*)p + at) = pack(first, second);
    } else {
        ((float*)p)[at] = first;
        ((float*)p)[at + 1] = second;
    }
}
// Sum over the warp, the same bits in every lane.
DEVICE float warp_sum(float x) {
    for (int mask = 16; mask; mask /= 2) x += from_lane_xor(x, mask);
    return x;
}
DEVICE float warp_max(float x) {
    for (int mask = 16; mask; mask /= 2) x = fmaxf(x, from_lane_xor(x, mask));
    return x;
}
#define LOG2_E 1.4426950408889634f
DEVICE float exponential(float x) { return exp2_fast(x * LOG2_E); }
DEVICE float sigmoid(float x) { return reciprocal_fast(1.f + exponential(-x)); }
// 0.5 x (1 + tanh(u)) is x sigmoid(2 u).
DEVICE float gelu_tanh(float x) { return x * sigmoid(1.5957691216057308f * (x + 0.044715f * x * x * x)); }

// What a matrix product does to its result after adding the bias.
#define NO_ACTIVATION 0
#define GELU_TANH 1
#define SILU 2
DEVICE float activate(float x, int activation) {
    if (activation == NO_ACTIVATION) return x;
    return x * sigmoid(activation == GELU_TANH ? 1.5957691216057308f * (x + 0.044715f * x * x * x) : x);
}
