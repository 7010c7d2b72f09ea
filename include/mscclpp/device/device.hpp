#pragma once

/// The one header kernels include: thread indices, warp and block collectives, atomics, bulk
/// copies, conversions and bounded waits, in namespace mscclpp::device. docs/device.md is the
/// manual.

#include <mscclpp/device/atomic.hpp>
#include <mscclpp/device/convert.hpp>
#include <mscclpp/device/copy.hpp>
#include <mscclpp/device/line.hpp>
#include <mscclpp/device/platform.hpp>
#include <mscclpp/device/simt.hpp>
#include <mscclpp/device/wait.hpp>

#if !MSCCLPP_PLATFORM_CUDA
// CUDA's own words would compile here and mean something else (a __shared__ variable would silently
// be private to each thread): refuse them.
#pragma GCC poison __shared__ __syncthreads __syncwarp __shfl_sync __shfl_xor_sync __shfl_up_sync
#pragma GCC poison __ballot_sync __any_sync __all_sync __activemask __nanosleep __threadfence
#pragma GCC poison threadIdx blockIdx blockDim gridDim
#endif
