#pragma once

/// Which platform this translation unit is compiled for: nvcc = cuda, any other compiler = cpu.
/// MSCCLPP_PLATFORM_NS is the namespace of platform code; both platforms are linked into one
/// binary, so kernels live in `namespace mscclpp::ep::MSCCLPP_PLATFORM_NS`. MSCCLPP_NOINLINE: a
/// function whose registers are allotted by themselves, and whose code exists once.

#if defined(__CUDACC__)

#define MSCCLPP_PLATFORM_CUDA 1
#define MSCCLPP_PLATFORM_NS cuda
#define MSCCLPP_NOINLINE __noinline__

#else

#define MSCCLPP_PLATFORM_CUDA 0
#define MSCCLPP_PLATFORM_NS cpu
#define MSCCLPP_NOINLINE __attribute__((noinline))

// The words that kernel code uses. The CPU platform never includes a CUDA header.
#ifndef __host__
#define __host__
#endif
#ifndef __device__
#define __device__
#endif
#ifndef __forceinline__
#define __forceinline__ inline
#endif
#ifndef __launch_bounds__
#define __launch_bounds__(...)
#endif

#endif
