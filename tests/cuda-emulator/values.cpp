// Every kernel in the emulator against sums in f64: `values [FAMILY [FAULT]]`. Shapes are random beside the edges (one
// row, odd sizes, head sizes of 48, 64 and 128); threads take turns forward, backward and shuffled, which must give the
// same bytes. Ends with a line that counts kernels and shapes and gives the worst errors. FAULT is the number of a
// fault, in a copy of the kernels into which `cuda_kernels.rs` has planted some.
static int planted = 0;
#define EMULATED
#include "kernels.cu"
#include <map>
#include <memory>
#include <string>

using emulator::Order;

static std::mt19937 RANDOM(11);
static float normal() {
    static std::normal_distribution<float> n;
    return n(RANDOM);
}
static int between(int low, int high) { return std::uniform_int_distribution<int>(low, high)(RANDOM); }
static int any_type() { return between(0, 1) ? BF16 : F32; }

// Elements on guarded pages. Results start as NaN.
struct Tensor {
    int type;
    size_t count;
    std::shared_ptr<emulator::Guarded> memory;
    Tensor(int type, size_t count) : type(type), count(count), memory(new emulator::Guarded(count * (type == BF16 ? 2 : 4))) {}
    static Tensor noise(int type, size_t count, float scale = 1.f) {
        Tensor t(type, count);
        for (size_t i = 0; i < count; i++) store(t.at(), i, type, scale * normal());
        return t;
    }
    void* at() const { return memory->at; }
    const float* floats() const { return (const float*)memory->at; }
    const bf16* halves() const { return (const bf16*)memory->at; }
    double operator[](size_t i) const { return load(memory->at, i, type); }
};

struct Record {
    int shapes = 0;
    double worst[2] = {0, 0}; // by the result's type, F32 and BF16
};
static std::map<std::string, Record> RECORDS;
static int FAILURES = 0;

// Runs a launch in every order, and holds its result against `wanted`: relative L2, and every element by the spread.
template <class Launch> static void check(const std::string& kernel, const std::string& shape, Tensor& out, const std::vector<double>& wanted, double tolerance, Launch launch) {
    std::vector<unsigned char> first;
    for (Order order : {emulator::FORWARD, emulator::BACKWARD, emulator::SHUFFLED}) {
        memset(out.at(), 0xff, out.memory->bytes);
        launch(order);
        std::vector<unsigned char> bytes((unsigned char*)out.at(), (unsigned char*)out.at() + out.memory->bytes);
        if (first.empty()) first = bytes;
        else if (first != bytes) {
            printf("FAIL %s %s: another order of threads, another result\n", kernel.c_str(), shape.c_str());
            FAILURES++;
        }
    }
    double difference = 0, size = 0, most = 0;
    for (size_t i = 0; i < wanted.size(); i++) {
        double d = wanted[i] - out[i];
        difference += d * d;
        size += wanted[i] * wanted[i];
        most = std::max(most, std::isnan(d) ? INFINITY : std::fabs(d));
    }
    double error = std::sqrt(difference / size), spread = std::sqrt(size / wanted.size());
    auto& record = RECORDS[kernel];
    record.shapes++;
    auto& worst = record.worst[out.type == BF16];
    worst = std::max(worst, error);
    if (!(error <= tolerance) || !(most <= 40 * tolerance * spread)) {
        printf("FAIL %s %s: relative error %.2e, most %.2e, allowed %.0e\n", kernel.c_str(), shape.c_str(), error, most, tolerance);
        FAILURES++;
    }
}

static double tolerance(std::initializer_list<const Tensor*> tensors, double f32 = 5e-6, double with_bf16 = 4e-3) {
    for (auto* t : tensors)
        if (t->type == BF16) return with_bf16;
    return f32;
}
static std::string sizes(std::initializer_list<int> list) {
    std::string s;
    for (int i : list) s += (s.empty() ? "" : "x") + std::to_string(i);
    return s;
}
static double gelu(double x) { return .5 * x * (1 + std::tanh(std::sqrt(2 / M_PI) * (x + .044715 * x * x * x))); }
static double silu(double x) { return x / (1 + std::exp(-x)); }
static double activated(double x, int a) { return a == GELU_TANH ? gelu(x) : a == SILU ? silu(x) : x; }
static unsigned blocks(int n, int tile) { return (n + tile - 1) / tile; }

static void check_gemm_bf16(int m, int n, int k, int batch, int activation, int out_type, bool with_bias, bool shared_b) {
    auto a = Tensor::noise(BF16, (size_t)batch * m * k), b = Tensor::noise(BF16, (size_t)(shared_b ? 1 : batch) * k * n, 1 / std::sqrt(k));
    auto bias = Tensor::noise(F32, n);
    float scale = activation == SILU ? 1.f : .7f;
    Tensor out(out_type, (size_t)batch * m * n);
    std::vector<double> wanted(out.count);
    for (int z = 0; z < batch; z++)
        for (int i = 0; i < m; i++)
            for (int j = 0; j < n; j++) {
                double sum = with_bias ? bias[j] : 0;
                for (int l = 0; l < k; l++) sum += scale * a[((size_t)z * m + i) * k + l] * b[((size_t)(shared_b ? 0 : z) * k + l) * n + j];
                wanted[((size_t)z * m + i) * n + j] = activated(sum, activation);
            }
    auto bias_at = with_bias ? bias.floats() : nullptr;
    i64 sa = (i64)m * k, sb = shared_b ? 0 : (i64)k * n;
    double allowed = out_type == BF16 ? 3e-3 : 5e-6;
    check("gemm_bf16_128", sizes({batch, m, n, k}), out, wanted, allowed, [&](Order order) {
        emulator::launch({blocks(n, 128), blocks(m, 128), (unsigned)batch}, 256, 49152, order,
                         [&] { gemm_bf16_128(a.halves(), b.halves(), bias_at, out.at(), out_type, m, n, k, sa, sb, activation, scale); });
    });
    check("gemm_bf16_64", sizes({batch, m, n, k}), out, wanted, allowed, [&](Order order) {
        emulator::launch({blocks(n, 64), blocks(m, 64), (unsigned)batch}, 128, 24576, order,
                         [&] { gemm_bf16_64(a.halves(), b.halves(), bias_at, out.at(), out_type, m, n, k, sa, sb, activation, scale); });
    });
}

static void check_gemm_any(int outer, int inner, int m, int n, int k, bool a_turned, bool b_turned, int activation) {
    int z = outer * inner;
    auto a = Tensor::noise(any_type(), (size_t)z * m * k), b = Tensor::noise(any_type(), (size_t)inner * k * n, 1 / std::sqrt(k));
    auto bias = Tensor::noise(F32, n);
    Tensor out(any_type(), (size_t)z * m * n);
    Operand as = {(i64)inner * m * k, (i64)m * k, a_turned ? 1 : k, a_turned ? m : 1};
    Operand bs = {0, (i64)k * n, b_turned ? 1 : n, b_turned ? k : 1}; // the outer axis repeats
    std::vector<double> wanted(out.count);
    for (int y = 0; y < z; y++)
        for (int i = 0; i < m; i++)
            for (int j = 0; j < n; j++) {
                double sum = bias[j];
                for (int l = 0; l < k; l++) sum += a[(size_t)y * m * k + i * as.row + l * as.col] * b[(size_t)(y % inner) * k * n + l * bs.row + j * bs.col];
                wanted[((size_t)y * m + i) * n + j] = activated(sum, activation);
            }
    check("gemm_any", sizes({outer, inner, m, n, k}), out, wanted, tolerance({&out}), [&](Order order) {
        emulator::launch({blocks(n, 64), blocks(m, 64), (unsigned)z}, 256, 8704, order, [&] {
            gemm_any(a.at(), a.type, as, b.at(), b.type, bs, bias.floats(), out.at(), out.type, m, n, k, inner, activation);
        });
    });
}

// Attention of bf16 by the kernel for this head size, or of any type by the general one.
static void check_attention(int batch, int nq, int nk, int heads, int d, bool tensor_cores, bool with_bias) {
    auto type = [&] { return tensor_cores ? BF16 : any_type(); };
    auto q = Tensor::noise(type(), (size_t)batch * nq * heads * d), k = Tensor::noise(type(), (size_t)batch * nk * heads * d);
    auto v = Tensor::noise(type(), k.count), added = Tensor::noise(F32, (size_t)nq * nk);
    // Masked as a one-way mask is, but for one key that every query sees.
    for (size_t i = 0; i < added.count; i++)
        if (i % nk && between(0, 2) == 0) store(added.at(), i, F32, -1e9f);
    Tensor out(type(), q.count);
    float scale = 1 / std::sqrt((float)d);
    std::vector<double> wanted(out.count), s(nk);
    for (int b = 0; b < batch; b++)
        for (int h = 0; h < heads; h++)
            for (int i = 0; i < nq; i++) {
                double most = -INFINITY, total = 0;
                size_t row = ((size_t)(b * nq + i) * heads + h) * d;
                for (int j = 0; j < nk; j++) {
                    double dot = 0;
                    for (int e = 0; e < d; e++) dot += q[row + e] * k[((size_t)(b * nk + j) * heads + h) * d + e];
                    s[j] = dot * scale + (with_bias ? added[(size_t)i * nk + j] : 0);
                    most = std::max(most, s[j]);
                }
                for (auto& x : s) total += x = std::exp(x - most);
                for (int j = 0; j < nk; j++)
                    for (int e = 0; e < d; e++) wanted[row + e] += s[j] / total * v[((size_t)(b * nk + j) * heads + h) * d + e];
            }
    Bias bias = {with_bias ? added.floats() : nullptr, 0, 0, nk, 1};
    std::string name = tensor_cores ? "attention_bf16_" + std::to_string(d) : "attention_any";
    check(name, sizes({batch, nq, nk, heads, d}), out, wanted, tensor_cores ? 4e-3 : tolerance({&out}), [&](Order order) {
        if (!tensor_cores)
            return emulator::launch({blocks(nq, 4), (unsigned)heads, (unsigned)batch}, 128, 16 * d, order, [&] {
                attention_any(q.at(), q.type, k.at(), k.type, v.at(), v.type, out.at(), out.type, bias, nq, nk, heads, d, scale);
            });
        auto kernel = d == 48 ? attention_bf16_48 : d == 64 ? attention_bf16_64 : attention_bf16_128;
        emulator::launch({blocks(nq, 64), (unsigned)heads, (unsigned)batch}, 128, d == 128 ? 65536 : 32768, order,
                         [&] { kernel(q.halves(), k.halves(), v.halves(), (bf16*)out.at(), bias, nq, nk, heads, scale); });
    });
}

static void check_norm(int rows, int width, int per_row, bool centred, bool affine, bool modulated) {
    auto x = Tensor::noise(any_type(), (size_t)rows * width), w = Tensor::noise(F32, width), b = Tensor::noise(F32, width);
    size_t groups = (rows + per_row - 1) / per_row;
    auto scale = Tensor::noise(F32, groups * width), shift = Tensor::noise(F32, groups * width);
    Tensor out(any_type(), x.count);
    std::vector<double> wanted(out.count);
    for (int r = 0; r < rows; r++) {
        double mean = 0, square = 0;
        if (centred)
            for (int i = 0; i < width; i++) mean += x[(size_t)r * width + i] / width;
        for (int i = 0; i < width; i++) square += std::pow(x[(size_t)r * width + i] - mean, 2) / width;
        for (int i = 0; i < width; i++) {
            double y = (x[(size_t)r * width + i] - mean) / std::sqrt(square + 1e-6);
            size_t of = (size_t)(r / per_row) * width + i;
            if (affine) y = y * w[i] + b[i];
            wanted[(size_t)r * width + i] = modulated ? y * (1 + scale[of]) + shift[of] : y;
        }
    }
    check("norm_rows", sizes({rows, width, per_row}), out, wanted, tolerance({&out}), [&](Order order) {
        emulator::launch({blocks(rows, 4), 1, 1}, 128, 0, order, [&] {
            norm_rows(x.at(), x.type, out.at(), out.type, rows, width, 1e-6f, centred, affine ? w.floats() : nullptr, affine ? b.floats() : nullptr,
                      modulated ? scale.floats() : nullptr, modulated ? shift.floats() : nullptr, per_row);
        });
    });
}

static void check_softmax(int rows, int width, float scale) {
    auto x = Tensor::noise(any_type(), (size_t)rows * width, 3 / scale);
    Tensor out(any_type(), x.count);
    std::vector<double> wanted(out.count);
    for (int r = 0; r < rows; r++) {
        double total = 0;
        for (int i = 0; i < width; i++) total += std::exp(x[(size_t)r * width + i] * scale);
        for (int i = 0; i < width; i++) wanted[(size_t)r * width + i] = std::exp(x[(size_t)r * width + i] * scale) / total;
    }
    check("softmax_rows", sizes({rows, width}), out, wanted, tolerance({&out}), [&](Order order) {
        emulator::launch({blocks(rows, 4), 1, 1}, 128, 0, order, [&] { softmax_rows(x.at(), x.type, out.at(), out.type, rows, width, scale); });
    });
}

static void check_reduce(int outer, int size, int inner, bool root) {
    auto x = Tensor::noise(any_type(), (size_t)outer * size * inner);
    Tensor out(any_type(), (size_t)outer * inner);
    std::vector<double> wanted(out.count);
    for (int o = 0; o < outer; o++)
        for (int i = 0; i < inner; i++) {
            double sum = 0;
            for (int s = 0; s < size; s++) {
                double v = x[((size_t)o * size + s) * inner + i];
                sum += root ? v * v : v;
            }
            wanted[(size_t)o * inner + i] = root ? std::sqrt(sum) : sum / size;
        }
    // A mean may cancel: its f32 error is that of its summands.
    check("reduce_axis", sizes({outer, size, inner}), out, wanted, tolerance({&out}, 1e-5), [&](Order order) {
        emulator::launch({blocks(outer * inner, inner < 32 ? 4 : 128), 1, 1}, 128, 0, order,
                         [&] { reduce_axis(x.at(), x.type, out.at(), out.type, outer, size, inner, root); });
    });
}

static void check_norm_channels(int n, int channels, int pixels, bool with_silu) {
    auto x = Tensor::noise(any_type(), (size_t)n * channels * pixels), gamma = Tensor::noise(F32, channels);
    Tensor out(any_type(), x.count);
    if (n > 1)
        for (int c = 0; c < channels; c++) store(x.at(), (size_t)c * pixels, x.type, 0); // a pixel without a length
    std::vector<double> wanted(out.count);
    for (int i = 0; i < n; i++)
        for (int p = 0; p < pixels; p++) {
            double sum = 0;
            auto at = [&](int c) { return ((size_t)i * channels + c) * pixels + p; };
            for (int c = 0; c < channels; c++) sum += x[at(c)] * x[at(c)];
            for (int c = 0; c < channels; c++) {
                double y = x[at(c)] / std::max(std::sqrt(sum), 1e-12) * gamma[c];
                wanted[at(c)] = with_silu ? silu(y) : y;
            }
        }
    check("norm_channels", sizes({n, channels, pixels}), out, wanted, tolerance({&out}), [&](Order order) {
        emulator::launch({blocks(pixels, 32), (unsigned)n, 1}, 128, 512, order,
                         [&] { norm_channels(x.at(), x.type, gamma.floats(), out.at(), out.type, channels, pixels, 1e-12f, with_silu); });
    });
}

// A convolution by all kernels that do it. `apart` is the distance between pictures in channels: less than there are,
// where windows over time overlap.
static void check_conv(int n, int channels, int apart, int made, int height, int width, int side, int stride, int pad, int pad_end, int shift, bool with_bias) {
    int h = height << shift, w = width << shift, oh = (h + pad + pad_end - side) / stride + 1, ow = (w + pad + pad_end - side) / stride + 1;
    int depth = channels * side * side, pixels = oh * ow;
    bool tensor_cores = depth % 8 == 0 && (side == 1 || side == 3);
    int type = tensor_cores ? BF16 : any_type();
    i64 picture = (i64)apart * height * width;
    auto x = Tensor::noise(type, (n - 1) * picture + (size_t)channels * height * width);
    auto weights = Tensor::noise(tensor_cores ? BF16 : any_type(), (size_t)made * depth, 1 / std::sqrt(depth)), bias = Tensor::noise(F32, made);
    Tensor out(any_type(), (size_t)n * made * pixels);
    std::vector<double> wanted(out.count);
    for (int i = 0; i < n; i++)
        for (int m = 0; m < made; m++)
            for (int p = 0; p < pixels; p++) {
                double sum = with_bias ? bias[m] : 0;
                for (int c = 0; c < channels; c++)
                    for (int ky = 0; ky < side; ky++)
                        for (int kx = 0; kx < side; kx++) {
                            int y = p / ow * stride + ky - pad, xx = p % ow * stride + kx - pad;
                            if (y < 0 || y >= h || xx < 0 || xx >= w) continue;
                            sum += weights[((size_t)m * channels + c) * side * side + ky * side + kx] *
                                   x[i * picture + ((size_t)c * height + (y >> shift)) * width + (xx >> shift)];
                        }
                wanted[((size_t)i * made + m) * pixels + p] = sum;
            }
    Conv c = {picture, channels, h, w, made, oh, ow, side, side, stride, stride, pad, pad, shift};
    auto bias_at = with_bias ? bias.floats() : nullptr;
    std::string shape = sizes({n, channels, height, width, made, side, stride, shift});
    check("conv_any", shape, out, wanted, tolerance({&out}), [&](Order order) {
        emulator::launch({blocks(pixels, 64), blocks(made, 64), (unsigned)n}, 256, 8704, order,
                         [&] { conv_any(x.at(), x.type, weights.at(), weights.type, bias_at, out.at(), out.type, c); });
    });
    if (!tensor_cores) return;
    std::string name = side == 1 ? "conv_bf16_1x1_" : "conv_bf16_3x3_";
    for (int tile : {128, 64}) {
        auto kernel = side == 1 ? (tile == 128 ? conv_bf16_1x1_128 : conv_bf16_1x1_64) : tile == 128 ? conv_bf16_3x3_128 : conv_bf16_3x3_64;
        check(name + std::to_string(tile), shape, out, wanted, tolerance({&out}), [&](Order order) {
            emulator::launch({blocks(pixels, tile), blocks(made, tile), (unsigned)n}, tile * 2, tile * 256, order,
                             [&] { kernel(x.halves(), weights.halves(), bias_at, out.at(), out.type, c); });
        });
    }
}

static void check_rotate(int batch, int tokens, int heads, int d) {
    auto x = Tensor::noise(any_type(), (size_t)batch * tokens * heads * d);
    Tensor cos(F32, (size_t)tokens * d / 2), sin(F32, cos.count), out(any_type(), x.count);
    for (size_t i = 0; i < cos.count; i++) {
        float angle = 3 * normal();
        store(cos.at(), i, F32, std::cos(angle));
        store(sin.at(), i, F32, std::sin(angle));
    }
    std::vector<double> wanted(out.count);
    for (size_t row = 0; row < (size_t)batch * tokens; row++)
        for (int h = 0; h < heads; h++)
            for (int j = 0; j < d / 2; j++) {
                size_t at = (row * heads + h) * d + j, t = row % tokens * (d / 2) + j;
                wanted[at] = x[at] * cos[t] - x[at + d / 2] * sin[t];
                wanted[at + d / 2] = x[at + d / 2] * cos[t] + x[at] * sin[t];
            }
    check("rotate_heads", sizes({batch, tokens, heads, d}), out, wanted, tolerance({&out}), [&](Order order) {
        emulator::launch({(unsigned)(batch * tokens), 1, 1}, 128, 0, order,
                         [&] { rotate_heads(x.at(), x.type, cos.floats(), sin.floats(), out.at(), out.type, tokens, heads, d); });
    });
}

static void check_gather(int rows, int width, int stride, int count) {
    auto table = Tensor::noise(any_type(), (size_t)rows * stride);
    Tensor index(I32, count), out(any_type(), (size_t)count * width);
    std::vector<double> wanted;
    for (int i = 0; i < count; i++) {
        int row = between(-rows, rows - 1);
        ((int*)index.at())[i] = row;
        for (int j = 0; j < width; j++) wanted.push_back(table[(size_t)(row < 0 ? row + rows : row) * stride + j]);
    }
    check("gather_rows", sizes({rows, width, stride, count}), out, wanted, tolerance({&out}), [&](Order order) {
        emulator::launch({(unsigned)count, 1, 1}, 128, 0, order,
                         [&] { gather_rows(table.at(), table.type, (const int*)index.at(), out.at(), out.type, rows, width, stride); });
    });
}

// As the hardware rounds a quotient in f32 first.
static double nearest_byte(double quotient) { return std::min(127., std::max(-128., (double)std::nearbyint((float)quotient))); }
// By search over all codes of one sign, ties to the even code.
static double nearest_e4m3(double quotient) {
    double size = std::fabs((float)quotient), best = 0, least = INFINITY;
    for (int code = 0; code < 0x7f; code++) {
        int exponent = code >> 3, mantissa = code & 7;
        double value = exponent ? std::ldexp(8 + mantissa, exponent - 10) : std::ldexp(mantissa, -9), apart = std::fabs(value - size);
        if (apart < least || (apart == least && code % 2 == 0)) best = value, least = apart;
    }
    return std::copysign(best, quotient);
}

// An operation over random axes with random strides: axes in another order, and some that repeat.
static void check_elementwise(int op, std::vector<int> size) {
    int rank = size.size(), arguments = op == ADD_PRODUCT ? 3 : op >= ADD ? 2 : 1;
    size_t count = 1;
    for (int s : size) count *= s;
    Axes axes = {};
    axes.rank = rank;
    for (int i = 0; i < rank; i++) axes.size[i] = size[i];
    auto strides = [&](i64* to, bool may_repeat) {
        std::vector<int> order(rank);
        for (int i = 0; i < rank; i++) order[i] = i;
        std::shuffle(order.begin(), order.end(), RANDOM);
        i64 step = 1;
        for (int axis : order) {
            bool repeat = may_repeat && between(0, 3) == 0;
            to[axis] = repeat ? 0 : step;
            if (!repeat) step *= size[axis];
        }
    };
    strides(axes.out, false);
    i64* of[3] = {axes.a, axes.b, axes.c};
    std::vector<Tensor> given;
    for (int i = 0; i < 3; i++) {
        if (i < arguments) strides(of[i], true);
        auto t = Tensor::noise(any_type(), count);
        if (op == SQRT || op == DIVIDE || op == RECIPROCAL)
            for (size_t e = 0; e < count; e++) store(t.at(), e, t.type, .1f + std::fabs(t[e]));
        // Quotients of a few hundred: some within the range of bytes and of E4M3, some past it. Or small ones, around the
        // least binade of E4M3.
        float by = op == TO_E4M3 && rank == 1 ? 3000.f : 1.f;
        if (op >= TO_BYTE && i == 1)
            for (size_t e = 0; e < count; e++) store(t.at(), e, t.type, by * (.003f + .02f * std::fabs(t[e])));
        given.push_back(t);
    }
    Tensor out(op == TO_BYTE ? I8 : any_type(), count);
    std::vector<double> wanted(count);
    for (size_t i = 0; i < count; i++) {
        size_t rest = i, at[4] = {};
        for (int axis = rank - 1; axis >= 0; axis--) {
            int place = rest % size[axis];
            rest /= size[axis];
            at[3] += place * axes.out[axis];
            for (int g = 0; g < arguments; g++) at[g] += place * of[g][axis];
        }
        double a = given[0][at[0]], b = given[1][at[1]], c = given[2][at[2]];
        const std::map<int, double> values = {{COPY, a}, {NEGATE, -a}, {SQRT, std::sqrt(a)}, {RECIPROCAL, 1 / a}, {SIGMOID, 1 / (1 + std::exp(-a))}, {APPLY_SILU, silu(a)}, {APPLY_GELU_TANH, gelu(a)}, {SQUARE, a * a}, {ADD, a + b}, {SUBTRACT, a - b}, {MULTIPLY, a * b}, {DIVIDE, a / b}, {MAXIMUM, std::max(a, b)}, {ADD_PRODUCT, a + b * c}, {TO_BYTE, nearest_byte(a / b)}, {TO_E4M3, nearest_e4m3(a / b)}};
        wanted[at[3]] = values.at(op);
    }
    std::string shape = "op " + std::to_string(op);
    for (int s : size) shape += " " + std::to_string(s);
    check("elementwise", shape, out, wanted, tolerance({&out}), [&](Order order) {
        emulator::launch({(unsigned)between(1, 3), 1, 1}, 256, 0, order, [&] {
            elementwise(op, out.at(), out.type, given[0].at(), given[0].type, arguments > 1 ? given[1].at() : nullptr, given[1].type,
                        arguments > 2 ? given[2].at() : nullptr, given[2].type, count, axes);
        });
    });
}

static void check_gemm8(int m, int n, int k, int activation, int out_type, bool with_bias) {
    Tensor a(I8, (size_t)m * k), b(I8, (size_t)n * k);
    for (auto* t : {&a, &b})
        for (size_t i = 0; i < t->count; i++) store(t->at(), i, I8, between(-128, 127));
    auto bias = Tensor::noise(F32, n), scales = Tensor::noise(F32, n);
    float scale = 1e-4f;
    Tensor out(out_type, (size_t)m * n);
    std::vector<double> wanted(out.count);
    for (int i = 0; i < m; i++)
        for (int j = 0; j < n; j++) {
            int sum = 0;
            for (int l = 0; l < k; l++) sum += (int)a[(size_t)i * k + l] * (int)b[(size_t)j * k + l];
            wanted[(size_t)i * n + j] = activated((double)scale * scales[j] * sum + (with_bias ? bias[j] : 0), activation);
        }
    auto bias_at = with_bias ? bias.floats() : nullptr;
    auto bytes = [](const Tensor& t) { return (const signed char*)t.at(); };
    double allowed = out_type == BF16 ? 3e-3 : 2e-6;
    check("gemm_int8_128", sizes({m, n, k}), out, wanted, allowed, [&](Order order) {
        emulator::launch({blocks(n, 128), blocks(m, 128), 1}, 256, 49152, order,
                         [&] { gemm_int8_128(bytes(a), bytes(b), scales.floats(), scale, bias_at, out.at(), out_type, m, n, k, activation); });
    });
    check("gemm_int8_64", sizes({m, n, k}), out, wanted, allowed, [&](Order order) {
        emulator::launch({blocks(n, 64), blocks(m, 64), 1}, 128, 24576, order,
                         [&] { gemm_int8_64(bytes(a), bytes(b), scales.floats(), scale, bias_at, out.at(), out_type, m, n, k, activation); });
    });
}

// One step; everything that it writes is looked at, one result after the other.
static void check_sampler(int has, bool guided, int first, int frames, int channels, int pixels) {
    Factors f{has, .6f, -.2f, .9f, -.1f, .3f, .4f, .8f, -.15f, .25f, 3.f};
    Sample s{frames, channels, pixels, first + frames + between(0, 2), first};
    size_t count = (size_t)frames * channels * pixels, pass = (size_t)channels * s.pass_frames * pixels;
    const int times = 2 * between(1, 300);
    auto noise = [](size_t n) { return Tensor::noise(F32, n); };
    Tensor predicted[2] = {Tensor::noise(any_type(), pass), Tensor::noise(any_type(), pass)}, next[2] = {noise(times), noise(times)};
    // x, m1, m2, previous; latents and timesteps of both branches
    std::vector<Tensor> before = {noise(count), noise(count), noise(count), noise(count), noise(pass), noise(pass), noise(times), noise(times)};
    std::vector<std::vector<double>> after;
    for (auto& t : before) {
        std::vector<double> values;
        for (size_t i = 0; i < t.count; i++) values.push_back(t[i]);
        after.push_back(values);
    }
    for (size_t i = 0; i < count; i++) {
        int pixel = i % pixels, channel = i / pixels % channels, frame = i / pixels / channels, in = first + frame;
        size_t at = ((size_t)channel * s.pass_frames + in) * pixels + pixel;
        double x = before[0][i], m1 = before[1][i], m2 = before[2][i], y = x;
        auto velocity = [&](int branch) {
            double p = in < 0 ? 0 : predicted[branch][at];
            return has & CLEAN_PREDICTED ? (x - p) / f.sigma : p;
        };
        double v = velocity(0);
        if (guided) v = velocity(1) + f.guidance * (v - velocity(1));
        double m = x - f.sigma * v;
        if (has & EULER) y = x + f.by * v;
        else {
            if (has & CORRECT) y = f.keep * before[3][i] + f.k * (m1 + (has & BACK ? f.back * (m2 - m1) : 0) + f.last * (m - m1));
            after[3][i] = y;
            y = has & PREDICT ? f.next_keep * y + f.next_k * (m + (has & SLOPE ? f.slope * (m1 - m) : 0)) : m;
            after[2][i] = m1;
        }
        after[1][i] = m;
        after[0][i] = y;
        if (frame) after[4][at] = y;
        if (frame && guided) after[5][at] = y;
    }
    for (int i = 0; i < times; i++) {
        after[6][i] = next[0][i];
        if (guided) after[7][i] = next[1][i];
    }
    for (size_t looked_at = 0; looked_at < before.size(); looked_at++) {
        std::vector<Tensor> now;
        for (auto& t : before) now.emplace_back(F32, t.count);
        check("sampler_step", "has " + std::to_string(has) + " " + sizes({frames, channels, pixels}), now[looked_at], after[looked_at], 5e-6, [&](Order order) {
            for (size_t i = 0; i < now.size(); i++) memcpy(now[i].at(), before[i].at(), 4 * now[i].count);
            auto at = [&](int i) { return (float*)now[i].at(); };
            emulator::launch({(unsigned)between(1, 3), 1, 1}, 256, 0, order, [&] {
                sampler_step(predicted[0].at(), predicted[0].type, guided ? predicted[1].at() : nullptr, predicted[1].type, at(0), at(1), at(2), at(3), at(4),
                             guided ? at(5) : nullptr, next[0].floats(), guided ? next[1].floats() : nullptr, at(6), guided ? at(7) : nullptr, times, s, f);
            });
        });
    }
    RECORDS["sampler_step"].shapes -= before.size() - 1; // one shape, looked at in many places
}

int main(int argc, char** argv) {
    std::string only = argc > 1 ? argv[1] : "";
    planted = argc > 2 ? atoi(argv[2]) : 0;
    auto wanted = [&](const char* name) { return only.empty() || only == name; };
    if (wanted("gemm")) {
        check_gemm_bf16(1, 8, 8, 1, NO_ACTIVATION, F32, false, true);
        check_gemm_bf16(129, 136, 40, 1, GELU_TANH, BF16, true, true);
        check_gemm_bf16(70, 64, 200, 2, SILU, F32, true, false);
        for (int i = 0; i < 4; i++)
            check_gemm_bf16(between(1, 150), 8 * between(1, 20), 8 * between(1, 20), between(1, 2), between(0, 2), any_type(), between(0, 1), between(0, 1));
    }
    if (wanted("gemm8")) {
        check_gemm8(1, 2, 16, NO_ACTIVATION, F32, false);
        check_gemm8(129, 136, 208, GELU_TANH, BF16, true);
        check_gemm8(70, 66, 64, SILU, F32, true);
        for (int i = 0; i < 5; i++)
            check_gemm8(between(1, 150), 2 * between(1, 80), 16 * between(1, 20), between(0, 2), any_type(), between(0, 1));
    }
    if (wanted("sampler"))
        for (int has : {(int)EULER, (int)PREDICT, CORRECT | PREDICT | SLOPE, CORRECT | BACK | PREDICT | SLOPE, CORRECT | BACK})
            for (int clean : {0, (int)CLEAN_PREDICTED})
                for (int guided : {0, 1}) check_sampler(has | clean, guided, between(-1, 3), between(2, 5), between(1, 9), between(1, 30));
    if (wanted("gemm_any")) {
        check_gemm_any(1, 1, 1, 1, 1, false, false, NO_ACTIVATION);
        for (int i = 0; i < 8; i++)
            check_gemm_any(between(1, 2), between(1, 3), between(1, 90), between(1, 90), between(1, 70), between(0, 1), between(0, 1), between(0, 2));
    }
    if (wanted("conv")) {
        check_conv(1, 8, 8, 1, 1, 1, 1, 1, 0, 0, 0, false);
        check_conv(2, 24, 8, 70, 5, 7, 3, 1, 1, 1, 0, true); // frames over time, odd pixels
        check_conv(1, 16, 16, 12, 9, 10, 3, 2, 0, 1, 0, true); // halved
        check_conv(2, 8, 8, 130, 4, 6, 3, 1, 1, 1, 1, true); // doubled first
        check_conv(1, 5, 5, 3, 6, 5, 4, 3, 2, 1, 0, true); // no kernel of its own
        for (int i = 0; i < 6; i++) {
            int channels = i < 4 ? 8 * between(1, 9) : between(1, 20), side = i & 1 ? 3 : 1;
            check_conv(between(1, 2), channels, channels, between(1, 140), between(2, 13), between(2, 13), side, between(1, 2), side / 2, side / 2, between(0, 1), between(0, 1));
        }
    }
    if (wanted("attention"))
        for (int d : {48, 64, 128}) {
            check_attention(1, 1, 1, 1, d, true, false);
            check_attention(1, 64, 64, 2, d, true, true);
            check_attention(2, between(1, 100), between(1, 200), 2, d, true, false);
            check_attention(1, between(1, 80), between(65, 200), 1, d, true, true);
        }
    if (wanted("attention_any")) {
        check_attention(1, 1, 1, 1, 2, false, false);
        for (int d : {12, 48, 64, 128, 256}) check_attention(between(1, 2), between(1, 30), between(1, 80), between(1, 3), d, false, between(0, 1));
    }
    if (wanted("rows"))
        for (int i = 0; i < 10; i++) {
            int rows = i ? between(1, 20) : 1;
            check_norm(rows, between(i ? 2 : 33, 200), between(1, 7), i & 1, i & 2, i & 4);
            check_softmax(rows, i ? between(1, 150) : 1, i & 1 ? 1 : .25f);
            check_reduce(between(1, 5), i ? between(1, 100) : 1, i < 6 ? between(1, 9) : between(32, 90), i & 1);
            check_norm_channels(between(1, 3), i ? between(1, 70) : 1, i ? between(1, 90) : 1, i & 1);
            check_rotate(between(1, 2), between(1, 9), between(1, 4), 2 * between(1, 64));
            int width = between(1, 200);
            check_gather(between(1, 20), width, width + between(0, 30), rows);
        }
    if (wanted("elementwise"))
        for (int op = COPY; op <= TO_E4M3; op++) {
            check_elementwise(op, {1});
            check_elementwise(op, {between(1, 900)});
            check_elementwise(op, {between(1, 9), between(1, 9), between(1, 9)});
            check_elementwise(op, {2, 1, 3, between(1, 3), 2, between(1, 3), 2, 3});
        }
    Record all;
    for (auto& [name, record] : RECORDS) {
        printf("%-20s %3d shapes, worst relative error %.1e in f32, %.1e in bf16\n", name.c_str(), record.shapes, record.worst[F32], record.worst[BF16]);
        all.shapes += record.shapes;
        for (int type : {F32, BF16}) all.worst[type] = std::max(all.worst[type], record.worst[type]);
    }
    printf("%zu kernels, %d shapes, worst relative error %.1e in f32, %.1e in bf16, %d failures\n", RECORDS.size(), all.shapes, all.worst[F32], all.worst[BF16], FAILURES);
    return FAILURES > 0;
}
