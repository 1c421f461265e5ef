// A `libcuda` whose one device is the emulator: what loads and calls the driver is tested on machines without a GPU.
// Built by g++ from the same kernels as the PTX:
//
//     g++ -O2 -std=c++17 -shared -fPIC -fvisibility=hidden -I engines/src/cuda/kernels -o libcuda.so.1 driver.cpp
//
// A file `device` beside the library may hold lines `memory BYTES`, `held BYTES` (by another program), `version 12060`,
// `devices 0`, `fail NAME` (that call answers with CUDA_ERROR_UNKNOWN), `lose COUNT` (the device is lost at that launch).
#define EMULATED
#include "kernels.cu"
#include <dlfcn.h>
#include <chrono>
#include <fstream>
#include <map>
#include <mutex>
#include <string>

#define API extern "C" __attribute__((visibility("default"))) int
enum { OK, INVALID_VALUE, OUT_OF_MEMORY, NOT_INITIALIZED, NO_DEVICE = 100, INVALID_CONTEXT = 201, INVALID_PTX = 218, NOT_FOUND = 500, LAUNCH_FAILED = 719, UNKNOWN = 999 };

namespace {

int place;

struct Settings {
    size_t memory = 1ull << 31, held = 0;
    int version = 12060, devices = 1, lose = 0;
    std::string fail;
    Settings() {
        Dl_info info;
        if (!dladdr((void*)&place, &info)) return;
        std::string path = info.dli_fname;
        std::ifstream file(path.substr(0, path.rfind('/') + 1) + "device");
        for (std::string key; file >> key;) {
            if (key == "memory") file >> memory;
            else if (key == "held") file >> held;
            else if (key == "lose") file >> lose;
            else if (key == "version") file >> version;
            else if (key == "devices") file >> devices;
            else if (key == "fail") file >> fail;
        }
    }
} settings;

struct Kernel {
    std::string name;
    std::vector<size_t> sizes;
    std::function<void(void**)> call;
    size_t shared_most = 49152;
};
template <class... A, size_t... I> void apply_to(void (*f)(A...), void** p, std::index_sequence<I...>) { f(*(std::remove_cv_t<A>*)p[I]...); }
template <class... A> Kernel kernel(const char* name, void (*f)(A...)) {
    return {name, {sizeof(A)...}, [f](void** p) { apply_to(f, p, std::index_sequence_for<A...>{}); }};
}
#define KNOWN(name) kernel(#name, name)
std::vector<Kernel> kernels = {KNOWN(gemm_bf16_128), KNOWN(gemm_bf16_64), KNOWN(gemm_any), KNOWN(gemm_int8_128), KNOWN(gemm_int8_64), KNOWN(conv_bf16_1x1_128), KNOWN(conv_bf16_1x1_64),
                               KNOWN(conv_bf16_3x3_128), KNOWN(conv_bf16_3x3_64), KNOWN(conv_any), KNOWN(attention_bf16_48), KNOWN(attention_bf16_64),
                               KNOWN(attention_bf16_128), KNOWN(attention_any), KNOWN(norm_rows), KNOWN(softmax_rows), KNOWN(reduce_axis), KNOWN(norm_channels),
                               KNOWN(rotate_heads), KNOWN(gather_rows), KNOWN(elementwise), KNOWN(sampler_step)};

struct Graph {
    std::vector<std::function<void()>> work;
};
struct Stream {
    Graph* capturing = nullptr;
};
struct Event {
    std::chrono::steady_clock::time_point at;
};

std::recursive_mutex lock;
std::map<uint64_t, size_t> allocated;
std::string module_text;
bool initialized = false;
thread_local bool current = false;
int launches = 0;
bool lost = false;
uint64_t copies[2]; // to the device, from it

size_t used() {
    size_t sum = settings.held;
    for (auto& [_, bytes] : allocated) sum += bytes;
    return sum;
}
bool inside(uint64_t at, size_t bytes) {
    auto next = allocated.upper_bound(at);
    if (next == allocated.begin()) return false;
    auto& [from, size] = *--next;
    return at + bytes <= from + size;
}
int queue(void* stream, std::function<void()> work) {
    if (!stream) return INVALID_VALUE; // the default stream is not used
    if (auto* graph = ((Stream*)stream)->capturing) graph->work.push_back(std::move(work));
    else work();
    return OK;
}

} // namespace

#define ENTER(name)                                           \
    std::lock_guard<std::recursive_mutex> held(lock);         \
    if (settings.fail == name) return UNKNOWN;                \
    if (!initialized) return NOT_INITIALIZED;
#define ENTER_CONTEXT(name) \
    ENTER(name)             \
    if (!current) return INVALID_CONTEXT;     \
    if (lost) return LAUNCH_FAILED;

// Copies that were queued, each way, since the last time it was asked.
API emulatorCopies(uint64_t* counts) {
    std::lock_guard<std::recursive_mutex> held(lock);
    for (int i : {0, 1}) {
        counts[i] = copies[i];
        copies[i] = 0;
    }
    return OK;
}
// For libraries that stand in for NVIDIA's: work on a stream in its order, captured where the stream captures; and
// whether memory belongs to the device.
API emulatorQueue(void* stream, const std::function<void()>* work) {
    std::lock_guard<std::recursive_mutex> held(lock);
    return queue(stream, *work);
}
API emulatorHas(uint64_t at, size_t bytes) {
    std::lock_guard<std::recursive_mutex> held(lock);
    return inside(at, bytes);
}
API cuInit(unsigned) {
    if (settings.fail == "cuInit") return UNKNOWN;
    initialized = true;
    return settings.devices ? OK : NO_DEVICE;
}
API cuDriverGetVersion(int* version) {
    *version = settings.version;
    return OK;
}
API cuGetErrorName(int code, const char** name) {
    *name = code == OUT_OF_MEMORY ? "CUDA_ERROR_OUT_OF_MEMORY" : code == INVALID_CONTEXT ? "CUDA_ERROR_INVALID_CONTEXT" : code == NOT_FOUND ? "CUDA_ERROR_NOT_FOUND" : code == LAUNCH_FAILED ? "CUDA_ERROR_LAUNCH_FAILED" : "CUDA_ERROR_UNKNOWN";
    return OK;
}
API cuDeviceGetCount(int* count) {
    ENTER("cuDeviceGetCount")
    *count = settings.devices;
    return OK;
}
API cuDeviceGet(int* device, int ordinal) {
    ENTER("cuDeviceGet")
    *device = ordinal;
    return ordinal < settings.devices ? OK : INVALID_VALUE;
}
API cuDeviceGetName(char* name, int size, int) {
    ENTER("cuDeviceGetName")
    snprintf(name, size, "emulator on a CPU, for tests");
    return OK;
}
API cuDeviceGetAttribute(int* value, int attribute, int) {
    ENTER("cuDeviceGetAttribute")
    *value = attribute == 75 ? 8 : attribute == 76 ? 0 : attribute == 16 ? 1 : 0;
    return OK;
}
API cuDeviceTotalMem_v2(size_t* bytes, int) {
    ENTER("cuDeviceTotalMem_v2")
    *bytes = settings.memory;
    return OK;
}
API cuDevicePrimaryCtxRetain(void** context, int) {
    ENTER("cuDevicePrimaryCtxRetain")
    *context = &settings;
    return OK;
}
API cuDevicePrimaryCtxRelease_v2(int) {
    ENTER("cuDevicePrimaryCtxRelease_v2")
    return OK;
}
API cuCtxSetCurrent(void* context) {
    ENTER("cuCtxSetCurrent")
    current = context == &settings;
    return OK;
}
API cuMemGetInfo_v2(size_t* free, size_t* total) {
    ENTER_CONTEXT("cuMemGetInfo_v2")
    *total = settings.memory;
    *free = settings.memory - std::min(settings.memory, used());
    return OK;
}
API cuMemAlloc_v2(uint64_t* address, size_t bytes) {
    ENTER_CONTEXT("cuMemAlloc_v2")
    if (!bytes) return INVALID_VALUE;
    if (used() + bytes > settings.memory) return OUT_OF_MEMORY;
    void* at = aligned_alloc(256, (bytes + 255) / 256 * 256);
    memset(at, 0xff, bytes); // what nobody wrote is NaN
    allocated[*address = (uint64_t)at] = bytes;
    return OK;
}
API cuMemFree_v2(uint64_t address) {
    ENTER_CONTEXT("cuMemFree_v2")
    if (!allocated.erase(address)) return INVALID_VALUE;
    free((void*)address);
    return OK;
}
API cuMemHostAlloc(void** at, size_t bytes, unsigned) {
    ENTER_CONTEXT("cuMemHostAlloc")
    *at = malloc(bytes);
    return OK;
}
API cuMemFreeHost(void* at) {
    ENTER_CONTEXT("cuMemFreeHost")
    free(at);
    return OK;
}
API cuMemcpyHtoDAsync_v2(uint64_t to, const void* from, size_t bytes, void* stream) {
    ENTER_CONTEXT("cuMemcpyHtoDAsync_v2")
    if (!inside(to, bytes)) return INVALID_VALUE;
    copies[0]++;
    return queue(stream, [=] { memcpy((void*)to, from, bytes); });
}
API cuMemcpyDtoHAsync_v2(void* to, uint64_t from, size_t bytes, void* stream) {
    ENTER_CONTEXT("cuMemcpyDtoHAsync_v2")
    if (!inside(from, bytes)) return INVALID_VALUE;
    copies[1]++;
    return queue(stream, [=] { memcpy(to, (void*)from, bytes); });
}
API cuStreamCreate(void** stream, unsigned) {
    ENTER_CONTEXT("cuStreamCreate")
    *stream = new Stream;
    return OK;
}
API cuStreamDestroy_v2(void* stream) {
    ENTER_CONTEXT("cuStreamDestroy_v2")
    delete (Stream*)stream;
    return OK;
}
API cuStreamSynchronize(void* stream) {
    ENTER_CONTEXT("cuStreamSynchronize")
    return ((Stream*)stream)->capturing ? INVALID_VALUE : OK;
}
API cuStreamBeginCapture_v2(void* stream, int) {
    ENTER_CONTEXT("cuStreamBeginCapture_v2")
    auto* s = (Stream*)stream;
    if (s->capturing) return INVALID_VALUE;
    s->capturing = new Graph;
    return OK;
}
API cuStreamEndCapture(void* stream, void** graph) {
    ENTER_CONTEXT("cuStreamEndCapture")
    auto* s = (Stream*)stream;
    if (!s->capturing) return INVALID_VALUE;
    *graph = s->capturing;
    s->capturing = nullptr;
    return OK;
}
API cuGraphInstantiateWithFlags(void** exec, void* graph, uint64_t) {
    ENTER_CONTEXT("cuGraphInstantiateWithFlags")
    *exec = new Graph(*(Graph*)graph);
    return OK;
}
API cuGraphLaunch(void* exec, void* stream) {
    ENTER_CONTEXT("cuGraphLaunch")
    return queue(stream, [=] {
        for (auto& work : ((Graph*)exec)->work) work();
    });
}
API cuGraphDestroy(void* graph) {
    ENTER_CONTEXT("cuGraphDestroy")
    delete (Graph*)graph;
    return OK;
}
API cuGraphExecDestroy(void* exec) { return cuGraphDestroy(exec); }
API cuModuleLoadData(void** module, const void* image) {
    ENTER_CONTEXT("cuModuleLoadData")
    module_text = (const char*)image;
    if (module_text.find(".version 8.5") == std::string::npos || module_text.find(".target sm_80") == std::string::npos) return INVALID_PTX;
    *module = &module_text;
    return OK;
}
API cuModuleGetFunction(void** function, void*, const char* name) {
    ENTER_CONTEXT("cuModuleGetFunction")
    if (module_text.find(std::string(".entry ") + name + "(") == std::string::npos) return NOT_FOUND;
    for (auto& k : kernels)
        if (k.name == name) {
            *function = &k;
            return OK;
        }
    return NOT_FOUND;
}
API cuFuncSetAttribute(void* function, int attribute, int value) {
    ENTER_CONTEXT("cuFuncSetAttribute")
    if (attribute != 8 || value > 101376) return INVALID_VALUE; // 99 KiB: the least of the chips
    ((Kernel*)function)->shared_most = value;
    return OK;
}
API cuLaunchKernel(void* function, unsigned x, unsigned y, unsigned z, unsigned threads, unsigned bx, unsigned bz, unsigned shared, void* stream,
                   void** parameters, void** extra) {
    ENTER_CONTEXT("cuLaunchKernel")
    if (settings.lose && ++launches >= settings.lose) {
        lost = true;
        return LAUNCH_FAILED;
    }
    auto* k = (Kernel*)function;
    if (bx != 1 || bz != 1 || extra || shared > k->shared_most) return INVALID_VALUE;
    // Parameters are copied now; their memory is the caller's.
    std::vector<std::vector<uint64_t>> copies;
    for (size_t i = 0; i < k->sizes.size(); i++) {
        std::vector<uint64_t> words((k->sizes[i] + 7) / 8);
        memcpy(words.data(), parameters[i], k->sizes[i]);
        copies.push_back(std::move(words));
    }
    return queue(stream, [=]() mutable {
        std::vector<void*> pointers;
        for (auto& words : copies) pointers.push_back(words.data());
        emulator::launch({x, y, z}, threads, shared, emulator::FORWARD, [&] { k->call(pointers.data()); });
    });
}
API cuEventCreate(void** event, unsigned) {
    ENTER_CONTEXT("cuEventCreate")
    *event = new Event;
    return OK;
}
API cuEventRecord(void* event, void*) {
    ENTER_CONTEXT("cuEventRecord")
    ((Event*)event)->at = std::chrono::steady_clock::now();
    return OK;
}
API cuEventSynchronize(void*) {
    ENTER_CONTEXT("cuEventSynchronize")
    return OK;
}
API cuEventElapsedTime(float* millis, void* from, void* to) {
    ENTER_CONTEXT("cuEventElapsedTime")
    *millis = std::chrono::duration<float, std::milli>(((Event*)to)->at - ((Event*)from)->at).count();
    return OK;
}
API cuEventDestroy_v2(void* event) {
    ENTER_CONTEXT("cuEventDestroy_v2")
    delete (Event*)event;
    return OK;
}
