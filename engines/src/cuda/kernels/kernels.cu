// All kernels, as they are compiled.
#include "gemm.cu"
#include "conv.cu"
#include "attention.cu"
#include "rows.cu"
#include "elementwise.cu"
