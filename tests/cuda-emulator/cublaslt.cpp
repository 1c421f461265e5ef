// A fake of cuBLASLt over the emulated driver beside it: tests see which products an engine leaves to the library, and
// how it describes them. What is described otherwise than the library's manual allows is refused, and operands must
// lie in the device's memory. Sums are made in double precision. Built by g++:
//
//     g++ -O2 -std=c++17 -shared -fPIC -fvisibility=hidden -o libcublasLt.so.13 cublaslt.cpp
//
// A file `products` beside the library may hold lines `fail NAME` (that call answers with EXECUTION_FAILED),
// `algorithms 0` (there are none), `confused 1` (attributes read back otherwise).
#include <dlfcn.h>
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <fstream>
#include <functional>
#include <map>
#include <string>
#include <vector>

#define API(type) extern "C" __attribute__((visibility("default"))) type
enum { OK, NOT_INITIALIZED = 1, INVALID_VALUE = 7, EXECUTION_FAILED = 13, NOT_SUPPORTED = 15 };
enum { FLOAT = 0, BFLOAT16 = 14, COMPUTE_FLOAT = 68 };
enum { GELU = 32, BIAS = 4, PLAIN = 1 };

namespace {

const size_t WORKSPACE = 4096;
const uint64_t KNOWN = 0x5a5a;

struct Fake {
    std::string folder, fail;
    int algorithms = 1, confused = 0;
    int (*queue)(void*, const std::function<void()>*) = nullptr;
    int (*has)(uint64_t, size_t) = nullptr;
    uint64_t products = 0;
    Fake() {
        Dl_info info;
        if (!dladdr((void*)&WORKSPACE, &info)) return;
        std::string path = info.dli_fname;
        folder = path.substr(0, path.rfind('/') + 1);
        std::ifstream file(folder + "products");
        for (std::string key; file >> key;) {
            if (key == "fail") file >> fail;
            else if (key == "algorithms") file >> algorithms;
            else if (key == "confused") file >> confused;
        }
    }
} fake;

struct Operation {
    int compute, scale;
    uint32_t epilogue = PLAIN;
    uint64_t bias = 0;
    int bias_type = -1;
};
struct Layout {
    int type;
    uint64_t rows, columns;
    int64_t leading;
    size_t bytes() const { return ((columns - 1) * leading + rows) * (type == BFLOAT16 ? 2 : 4); }
};
struct Preference {
    uint64_t workspace = 0;
    uint32_t reductions = ~0u;
};
struct Algorithm {
    uint64_t words[8];
};
struct Heuristic {
    Algorithm algorithm;
    size_t workspace;
    int state;
    float waves;
    int reserved[4];
};

double load(const void* at, size_t i, int type) {
    if (type == FLOAT) return ((const float*)at)[i];
    uint32_t bits = (uint32_t)((const uint16_t*)at)[i] << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}
void store(void* at, size_t i, int type, double value) {
    float single = (float)value;
    if (type == FLOAT) {
        ((float*)at)[i] = single;
        return;
    }
    uint32_t bits;
    memcpy(&bits, &single, 4);
    ((uint16_t*)at)[i] = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

// Whether the manual's table of types and epilogues has this product.
bool supported(const Operation& o, const Layout& a, const Layout& b, const Layout& d) {
    bool epilogue = o.epilogue == PLAIN || o.epilogue == BIAS || o.epilogue == GELU || o.epilogue == (BIAS | GELU);
    bool bias = !(o.epilogue & BIAS) || (o.bias && o.bias % 16 == 0 && o.bias_type == d.type);
    bool types = o.compute == COMPUTE_FLOAT && o.scale == FLOAT && a.type == BFLOAT16 && b.type == BFLOAT16 && (d.type == FLOAT || d.type == BFLOAT16);
    bool sizes = a.rows == d.rows && a.columns == b.rows && b.columns == d.columns && a.rows && a.columns && b.columns;
    bool leading = a.leading >= (int64_t)a.rows && b.leading >= (int64_t)b.rows && d.leading >= (int64_t)d.rows;
    // Tensor cores want rows of sixteen bytes.
    return epilogue && bias && types && sizes && leading && a.leading % 8 == 0 && b.leading % 8 == 0 && d.leading % 8 == 0;
}

template <class T> int read(const T& field, void* to, size_t size, size_t* written) {
    if (size != sizeof(T)) return INVALID_VALUE;
    memcpy(to, &field, size);
    if (fake.confused) *(unsigned char*)to ^= 1;
    if (written) *written = size;
    return OK;
}

} // namespace

#define FAILS(name) \
    if (fake.fail == name) return EXECUTION_FAILED;

// Products that were queued since the last time it was asked.
API(uint64_t) fakeProducts() {
    uint64_t count = fake.products;
    fake.products = 0;
    return count;
}
API(size_t) cublasLtGetVersion() { return 130100; }
API(const char*) cublasLtGetStatusName(int code) {
    return code == INVALID_VALUE ? "CUBLAS_STATUS_INVALID_VALUE" : code == NOT_SUPPORTED ? "CUBLAS_STATUS_NOT_SUPPORTED" : code == NOT_INITIALIZED ? "CUBLAS_STATUS_NOT_INITIALIZED" : "CUBLAS_STATUS_EXECUTION_FAILED";
}
API(int) cublasLtCreate(void** handle) {
    FAILS("cublasLtCreate")
    void* driver = dlopen((fake.folder + "libcuda.so.1").c_str(), RTLD_NOW | RTLD_NOLOAD);
    if (!driver) return NOT_INITIALIZED;
    fake.queue = (decltype(fake.queue))dlsym(driver, "emulatorQueue");
    fake.has = (decltype(fake.has))dlsym(driver, "emulatorHas");
    *handle = &fake;
    return fake.queue && fake.has ? OK : NOT_INITIALIZED;
}
API(int) cublasLtDestroy(void* handle) { return handle == &fake ? OK : NOT_INITIALIZED; }
API(int) cublasLtMatmulDescCreate(void** made, int compute, int scale) {
    auto* o = new Operation;
    o->compute = compute;
    o->scale = scale;
    *made = o;
    return OK;
}
API(int) cublasLtMatmulDescDestroy(void* o) {
    delete (Operation*)o;
    return OK;
}
API(int) cublasLtMatmulDescSetAttribute(void* operation, int attribute, const void* from, size_t size) {
    auto* o = (Operation*)operation;
    if (size != (attribute == 8 ? 8u : 4u)) return INVALID_VALUE;
    if (attribute == 7) memcpy(&o->epilogue, from, size);
    else if (attribute == 8) memcpy(&o->bias, from, size);
    else if (attribute == 26) memcpy(&o->bias_type, from, size);
    else return INVALID_VALUE;
    return OK;
}
API(int) cublasLtMatmulDescGetAttribute(void* operation, int attribute, void* to, size_t size, size_t* written) {
    auto* o = (Operation*)operation;
    switch (attribute) {
    case 0: return read(o->compute, to, size, written);
    case 1: return read(o->scale, to, size, written);
    case 7: return read(o->epilogue, to, size, written);
    case 8: return read(o->bias, to, size, written);
    case 26: return read(o->bias_type, to, size, written);
    default: return INVALID_VALUE;
    }
}
API(int) cublasLtMatrixLayoutCreate(void** made, int type, uint64_t rows, uint64_t columns, int64_t leading) {
    *made = new Layout{type, rows, columns, leading};
    return OK;
}
API(int) cublasLtMatrixLayoutDestroy(void* layout) {
    delete (Layout*)layout;
    return OK;
}
API(int) cublasLtMatrixLayoutGetAttribute(void* layout, int attribute, void* to, size_t size, size_t* written) {
    auto* l = (Layout*)layout;
    switch (attribute) {
    case 0: return read(l->type, to, size, written);
    case 2: return read(l->rows, to, size, written);
    case 3: return read(l->columns, to, size, written);
    case 4: return read(l->leading, to, size, written);
    default: return INVALID_VALUE;
    }
}
API(int) cublasLtMatmulPreferenceCreate(void** made) {
    *made = new Preference;
    return OK;
}
API(int) cublasLtMatmulPreferenceDestroy(void* preference) {
    delete (Preference*)preference;
    return OK;
}
API(int) cublasLtMatmulPreferenceSetAttribute(void* preference, int attribute, const void* from, size_t size) {
    auto* p = (Preference*)preference;
    if (attribute == 1 && size == 8) memcpy(&p->workspace, from, size);
    else if (attribute == 3 && size == 4) memcpy(&p->reductions, from, size);
    else return INVALID_VALUE;
    return OK;
}
API(int) cublasLtMatmulAlgoGetHeuristic(void* handle, void* operation, void* a, void* b, void* c, void* d, void* preference, int wanted, Heuristic* results, int* count) {
    FAILS("cublasLtMatmulAlgoGetHeuristic")
    auto* p = (Preference*)preference;
    *count = 0;
    if (handle != &fake || wanted < 1 || c != d) return INVALID_VALUE;
    if (!supported(*(Operation*)operation, *(Layout*)a, *(Layout*)b, *(Layout*)d) || !fake.algorithms || p->workspace < WORKSPACE) return NOT_SUPPORTED;
    if (p->reductions != 0) return NOT_SUPPORTED; // sums over a split depth have no fixed order
    memset(results, 0, sizeof *results);
    results->algorithm.words[0] = KNOWN;
    results->workspace = WORKSPACE;
    *count = 1;
    return OK;
}
API(int) cublasLtMatmul(void* handle, void* operation, const float* alpha, const void* a, void* a_layout, const void* b, void* b_layout, const float* beta, const void* c, void* c_layout,
                        void* d, void* d_layout, const Algorithm* algorithm, void* workspace, size_t workspace_bytes, void* stream) {
    FAILS("cublasLtMatmul")
    Operation o = *(Operation*)operation;
    Layout la = *(Layout*)a_layout, lb = *(Layout*)b_layout, ld = *(Layout*)d_layout;
    if (handle != &fake || c != d || c_layout != d_layout || algorithm->words[0] != KNOWN || *alpha != 1 || *beta != 0) return INVALID_VALUE;
    if (!supported(o, la, lb, ld)) return NOT_SUPPORTED;
    auto device = [](const void* at, size_t bytes) { return (uint64_t)at % 16 == 0 && fake.has((uint64_t)at, bytes); };
    size_t bias_bytes = la.rows * (o.bias_type == BFLOAT16 ? 2 : 4);
    bool there = device(a, la.bytes()) && device(b, lb.bytes()) && device(d, ld.bytes()) && device(workspace, workspace_bytes) && workspace_bytes >= WORKSPACE &&
                 (!(o.epilogue & BIAS) || fake.has(o.bias, bias_bytes));
    if (!there) return INVALID_VALUE;
    fake.products++;
    std::function<void()> work = [=] {
        memset(workspace, 0xff, workspace_bytes); // nothing that lives may lie there
        std::vector<double> sums(ld.rows);
        for (size_t j = 0; j < ld.columns; j++) {
            std::fill(sums.begin(), sums.end(), 0);
            for (size_t l = 0; l < la.columns; l++) {
                double x = load(b, j * lb.leading + l, lb.type);
                for (size_t i = 0; i < ld.rows; i++) sums[i] += load(a, l * la.leading + i, la.type) * x;
            }
            for (size_t i = 0; i < ld.rows; i++) {
                double y = sums[i] + (o.epilogue & BIAS ? load((void*)o.bias, i, o.bias_type) : 0);
                if (o.epilogue & GELU) y = .5 * y * (1 + std::tanh(std::sqrt(2 / M_PI) * (y + .044715 * y * y * y)));
                store(d, j * ld.leading + i, ld.type, y);
            }
        }
    };
    return fake.queue(stream, &work) == OK ? OK : EXECUTION_FAILED;
}
