// The same kernels for the CPU platform: the host compiler reads what nvcc reads.
#include "internode.cu"
