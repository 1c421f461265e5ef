// All kernels, as they are compiled.
#include "gemm.cu"
#include "gemm8.cu"
#include "conv.cu"
#include "attention.cu"
#include "rows.cu"
#include "elementwise.cu"
#include "sampler.cu"
