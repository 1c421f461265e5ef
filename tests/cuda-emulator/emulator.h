// Runs CUDA kernels on a CPU, one block at a time; a block's threads are coroutines.
//
// Barriers, shuffles, ldmatrix, mma.sync and cp.async do what the PTX manual says of them, and mistakes show:
// shared memory starts as NaN and ends at a page that cannot be touched; what cp.async copies lands only when it is
// waited for, and is NaN until then; unaligned or outlying addresses, lanes of a warp that do different things, and
// barriers that not all reach end the program. The order of the threads can be turned round or shuffled: a kernel
// that lacks a barrier then gives other results.
#pragma once
#include <sys/mman.h>
#include <unistd.h>
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <random>
#include <vector>
#ifndef __x86_64__
#include <ucontext.h>
#endif

struct Dim3 {
    unsigned x, y, z;
};

namespace emulator {

[[noreturn]] static void fail(const char* what) {
    fprintf(stderr, "emulator: %s\n", what);
    _exit(3);
}

// Memory that ends at a page which cannot be touched; `bytes` rounded up to 16.
struct Guarded {
    unsigned char* at = nullptr;
    size_t mapped = 0, bytes = 0;
    explicit Guarded(size_t wanted, int fill = 0xff) : bytes((wanted + 15) / 16 * 16) {
        size_t page = sysconf(_SC_PAGESIZE), whole = (bytes + page - 1) / page * page;
        mapped = whole + page;
        auto* base = (unsigned char*)mmap(nullptr, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (base == MAP_FAILED || mprotect(base + whole, page, PROT_NONE)) fail("no memory");
        at = base + whole - bytes;
        memset(at, fill, bytes);
    }
    Guarded(const Guarded&) = delete;
    ~Guarded() {
        size_t page = sysconf(_SC_PAGESIZE);
        munmap(at + bytes + page - mapped, mapped);
    }
};

struct Copy {
    void* to;
    const void* from;
    bool read;
    int group;
};

const size_t STACK = 1 << 16;

struct Thread {
#ifdef __x86_64__
    void* stack_pointer;
#else
    ucontext_t context;
#endif
    unsigned char* stack;
    bool done;
    Dim3 index;
    std::vector<Copy> pending;
    int group;
};

// What a lane brings to an operation of its warp, and where it wants the result.
struct Lane {
    u32 words[6];
    float value;
    int argument;
    const void* row;
    u32* matrices;
    float* sums;
    int* counts;
};

struct Warp {
    unsigned arrived, generation, members;
    int operation;
    Lane lanes[32];
};

struct Block {
    std::vector<Thread> threads;
    std::vector<Warp> warps;
    unsigned arrived, generation, current;
    uint64_t progress;
    unsigned char* shared;
    size_t shared_bytes;
    std::function<void()> body;
#ifdef __x86_64__
    void* scheduler;
#else
    ucontext_t scheduler;
#endif
};

static Block block;

#ifdef __x86_64__
extern "C" void emulator_switch(void** save, void* to);
asm(R"(
.text
.p2align 4
emulator_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
)");
static void to_scheduler(Thread& t) { emulator_switch(&t.stack_pointer, block.scheduler); }
static void to_thread(Thread& t) { emulator_switch(&block.scheduler, t.stack_pointer); }
#else
static void to_scheduler(Thread& t) { swapcontext(&t.context, &block.scheduler); }
static void to_thread(Thread& t) { swapcontext(&block.scheduler, &t.context); }
#endif

static void thread_main() {
    block.body();
    Thread& t = block.threads[block.current];
    t.done = true;
    block.progress++;
    to_scheduler(t);
}

static void prepare(Thread& t) {
#ifdef __x86_64__
    void** top = (void**)(t.stack + STACK);
    *--top = nullptr; // aligns the stack as after a call
    *--top = (void*)thread_main;
    for (int i = 0; i < 6; i++) *--top = nullptr;
    t.stack_pointer = top;
#else
    getcontext(&t.context);
    t.context.uc_stack.ss_sp = t.stack;
    t.context.uc_stack.ss_size = STACK;
    t.context.uc_link = nullptr;
    makecontext(&t.context, thread_main, 0);
#endif
}

static void yield() {
    unsigned me = block.current;
    to_scheduler(block.threads[me]);
}

// The last lane of a warp to arrive does the operation for all of them.
template <class Operation> static void together(int number, Operation operation) {
    Warp& w = block.warps[block.current / 32];
    if (w.arrived == 0) w.operation = number;
    else if (w.operation != number) fail("lanes of a warp do different things");
    if (++w.arrived == w.members) {
        operation(w);
        w.arrived = 0;
        w.generation++;
        block.progress++;
    } else {
        for (unsigned g = w.generation; w.generation == g;) yield();
    }
}

static Lane& lane() { return block.warps[block.current / 32].lanes[block.current % 32]; }

static void check_shared(const void* p, size_t bytes) {
    auto* at = (const unsigned char*)p;
    if (at < block.shared || at + bytes > block.shared + block.shared_bytes) fail("outside of shared memory");
    if ((uintptr_t)p % 16) fail("an address is not a multiple of 16");
}

// Orders in which the threads of a block take turns.
enum Order { FORWARD, BACKWARD, SHUFFLED };

} // namespace emulator

static Dim3 blockIdx, blockDim, gridDim;
#define threadIdx (emulator::block.threads[emulator::block.current].index)
#define KERNEL extern "C"
#define DEVICE static inline
#define __restrict__
#define __launch_bounds__(...)
#define SHARED(name) unsigned char* name = emulator::block.shared

static inline void block_barrier() {
    auto& b = emulator::block;
    if (++b.arrived == b.threads.size()) {
        b.arrived = 0;
        b.generation++;
        b.progress++;
    } else {
        for (unsigned g = b.generation; b.generation == g;) emulator::yield();
    }
}
static inline void warp_barrier() { emulator::together(1, [](emulator::Warp&) {}); }

static inline float as_float(u32 bits) {
    float f;
    memcpy(&f, &bits, 4);
    return f;
}
static inline u32 as_bits(float f) {
    u32 bits;
    memcpy(&bits, &f, 4);
    return bits;
}
static inline float widen(bf16 x) { return as_float((u32)x << 16); }
static inline bf16 narrow(float f) {
    u32 u = as_bits(f);
    return (u & 0x7fffffff) > 0x7f800000 ? 0x7fff : (u + 0x7fff + (u >> 16 & 1)) >> 16;
}
static inline float product(float a, float b) {
    volatile float p = a * b; // in no fused multiply-add
    return p;
}
static inline u32 pack(float low, float high) { return narrow(low) | (u32)narrow(high) << 16; }
static inline float exp2_fast(float x) { return exp2f(x); }
static inline float reciprocal_fast(float x) { return 1.f / x; }

static inline void copy16(void* to, const void* from, bool read) {
    emulator::check_shared(to, 16);
    if (read && (uintptr_t)from % 16) emulator::fail("an address is not a multiple of 16");
    auto& t = emulator::block.threads[emulator::block.current];
    memset(to, 0xff, 16);
    t.pending.push_back({to, from, read, t.group});
}
static inline void commit_copies() { emulator::block.threads[emulator::block.current].group++; }
template <int N> static inline void wait_copies() {
    auto& t = emulator::block.threads[emulator::block.current];
    auto landed = [&](const emulator::Copy& c) {
        if (c.group >= t.group - N) return false;
        if (c.read) memcpy(c.to, c.from, 16);
        else memset(c.to, 0, 16);
        return true;
    };
    t.pending.erase(std::remove_if(t.pending.begin(), t.pending.end(), landed), t.pending.end());
}

static inline void load_matrices_any(u32 r[4], const void* row, bool transposed) {
    emulator::check_shared(row, 16);
    auto& mine = emulator::lane();
    mine.row = row;
    mine.matrices = r;
    emulator::together(transposed ? 3 : 2, [=](emulator::Warp& w) {
        for (int l = 0; l < 32; l++)
            for (int i = 0; i < 4; i++) {
                int g = l / 4, q = l % 4;
                bf16 v[2];
                for (int j = 0; j < 2; j++)
                    v[j] = transposed ? ((const bf16*)w.lanes[8 * i + 2 * q + j].row)[g] : ((const bf16*)w.lanes[8 * i + g].row)[2 * q + j];
                w.lanes[l].matrices[i] = v[0] | (u32)v[1] << 16;
            }
    });
}
static inline void load_matrices(u32 r[4], const void* row) { load_matrices_any(r, row, false); }
static inline void load_matrices_transposed(u32 r[4], const void* row) { load_matrices_any(r, row, true); }

static inline void multiply_add(float d[4], const u32 a[4], u32 b0, u32 b1) {
    auto& mine = emulator::lane();
    for (int i = 0; i < 4; i++) mine.words[i] = a[i];
    mine.words[4] = b0;
    mine.words[5] = b1;
    mine.sums = d;
    emulator::together(4, [](emulator::Warp& w) {
        float a[16][16], b[16][8];
        for (int l = 0; l < 32; l++) {
            const u32* x = w.lanes[l].words;
            int g = l / 4, q = 2 * (l % 4);
            for (int i = 0; i < 4; i++)
                for (int j = 0; j < 2; j++) a[g + 8 * (i & 1)][q + 8 * (i / 2) + j] = widen((bf16)(x[i] >> 16 * j));
            for (int i = 0; i < 2; i++)
                for (int j = 0; j < 2; j++) b[q + 8 * i + j][g] = widen((bf16)(x[4 + i] >> 16 * j));
        }
        for (int r = 0; r < 16; r++) {
            float sum[8] = {};
            for (int k = 0; k < 16; k++)
                for (int c = 0; c < 8; c++) sum[c] += a[r][k] * b[k][c];
            for (int c = 0; c < 8; c++) w.lanes[r % 8 * 4 + c / 2].sums[r / 8 * 2 + c % 2] += sum[c];
        }
    });
}

static inline void multiply_add_bytes(int d[4], const u32 a[4], u32 b0, u32 b1) {
    auto& mine = emulator::lane();
    for (int i = 0; i < 4; i++) mine.words[i] = a[i];
    mine.words[4] = b0;
    mine.words[5] = b1;
    mine.counts = d;
    emulator::together(7, [](emulator::Warp& w) {
        int a[16][32], b[32][8];
        for (int l = 0; l < 32; l++) {
            int g = l / 4, q = l % 4;
            auto& x = w.lanes[l].words;
            for (int i = 0; i < 4; i++)
                for (int j = 0; j < 4; j++) a[g + i % 2 * 8][4 * q + j + i / 2 * 16] = (signed char)(x[i] >> 8 * j);
            for (int i = 0; i < 2; i++)
                for (int j = 0; j < 4; j++) b[4 * q + j + 16 * i][g] = (signed char)(x[4 + i] >> 8 * j);
        }
        for (int r = 0; r < 16; r++)
            for (int c = 0; c < 8; c++)
                for (int k = 0; k < 32; k++) w.lanes[r % 8 * 4 + c / 2].counts[r / 8 * 2 + c % 2] += a[r][k] * b[k][c];
    });
}

static inline float shuffle(float v, int argument, bool exclusive_or) {
    auto& mine = emulator::lane();
    mine.value = v;
    mine.argument = argument;
    emulator::together(exclusive_or ? 5 : 6, [=](emulator::Warp& w) {
        float given[32];
        for (int l = 0; l < 32; l++) given[l] = w.lanes[l].value;
        for (int l = 0; l < 32; l++) w.lanes[l].value = given[(exclusive_or ? l ^ w.lanes[l].argument : w.lanes[l].argument) & 31];
    });
    return mine.value;
}
static inline float from_lane_xor(float v, int mask) { return shuffle(v, mask, true); }
static inline float from_lane(float v, int lane) { return shuffle(v, lane, false); }

namespace emulator {

// Runs `body` once per thread.
static void launch(Dim3 grid, unsigned threads, size_t shared_bytes, Order order, std::function<void()> body) {
    if (threads % 32 || threads > 1024 || !grid.x || !grid.y || !grid.z || grid.y > 65535 || grid.z > 65535) fail("no such launch");
    Guarded shared((shared_bytes + 127) / 128 * 128 + 128);
    block.shared_bytes = shared_bytes;
    block.shared = shared.at + shared.bytes - (shared_bytes + 127) / 128 * 128;
    block.body = std::move(body);
    block.threads.resize(threads);
    static std::vector<unsigned char*> stacks;
    while (stacks.size() < threads) stacks.push_back((unsigned char*)aligned_alloc(4096, STACK));
    gridDim = grid;
    blockDim = {threads, 1, 1};
    std::vector<unsigned> turns(threads);
    for (unsigned i = 0; i < threads; i++) turns[i] = order == BACKWARD ? threads - 1 - i : i;
    std::mt19937 random(7);
    for (unsigned z = 0; z < grid.z; z++)
        for (unsigned y = 0; y < grid.y; y++)
            for (unsigned x = 0; x < grid.x; x++) {
                blockIdx = {x, y, z};
                memset(block.shared, 0xff, shared_bytes);
                block.warps.assign(threads / 32, Warp{});
                for (auto& w : block.warps) w.members = 32;
                block.arrived = block.generation = 0;
                if (order == SHUFFLED) std::shuffle(turns.begin(), turns.end(), random);
                for (unsigned i = 0; i < threads; i++) {
                    Thread& t = block.threads[i];
                    t.stack = stacks[i];
                    t.done = false;
                    t.index = {i, 0, 0};
                    t.pending.clear();
                    t.group = 0;
                    prepare(t);
                }
                for (bool live = true; live;) {
                    live = false;
                    uint64_t before = block.progress;
                    for (unsigned i : turns)
                        if (!block.threads[i].done) {
                            live = true;
                            block.current = i;
                            to_thread(block.threads[i]);
                        }
                    if (live && block.progress == before) fail("a barrier is not reached by all");
                }
            }
}

} // namespace emulator
