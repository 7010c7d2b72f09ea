#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <string>
#include <type_traits>

#include <mscclpp/errors.hpp>

/// CUDA half of <mscclpp/device/launch.hpp>. Only for nvcc: host code calls launchers compiled
/// there.
namespace mscclpp::device {
inline namespace cuda {

using NativeStream = cudaStream_t;

/// Blocks, threads per block and bytes of dynamic shared memory of one launch.
struct LaunchShape {
  unsigned blocks = 1;
  unsigned threads = 32;
  size_t sharedBytes = 0;
  /// The kernel may start before the one in front of it has ended: it calls
  /// waitForPreviousKernel() before it reads or writes anything. From sm_90 on.
  bool early = false;
};

namespace detail {

template <auto Body, int MaxThreads, class Args>
__global__ void __launch_bounds__(MaxThreads, 1) kernelEntry(const __grid_constant__ Args args) {
  Body(args);
}

inline void checkLaunch(cudaError_t result, const char* call, const LaunchShape& shape) {
  if (result == cudaSuccess) return;
  throw CudaError(static_cast<int>(result),
                  std::string(call) + " failed: " + cudaGetErrorString(result) + " (" +
                      std::to_string(shape.blocks) + " blocks of " + std::to_string(shape.threads) +
                      " threads, " + std::to_string(shape.sharedBytes) +
                      " bytes of shared memory)");
}

}  // namespace detail

/// Loads the kernel on the current device and allows it `maxSharedBytes` of dynamic shared memory.
/// Call it once before any peer can be spinning: loading in the middle of a spinning peer
/// deadlocks. May synchronise the device.
template <auto Body, int MaxThreads, class Args>
void prepare(size_t maxSharedBytes) {
  const auto kernel = reinterpret_cast<const void*>(&detail::kernelEntry<Body, MaxThreads, Args>);
  const LaunchShape shape{0, MaxThreads, maxSharedBytes};
  cudaFuncAttributes attributes{};
  detail::checkLaunch(cudaFuncGetAttributes(&attributes, kernel), "cudaFuncGetAttributes", shape);
  detail::checkLaunch(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                           static_cast<int>(maxSharedBytes)),
                      "cudaFuncSetAttribute(MaxDynamicSharedMemorySize)", shape);
}

/// Enqueues one kernel; does not block. More than 48 KB of shared memory needs prepare() first.
/// Throws CudaError when the launch is refused.
template <auto Body, int MaxThreads, class Args>
void launch(const LaunchShape& shape, NativeStream stream, const Args& args) {
  static_assert(std::is_trivially_copyable_v<Args>, "Args is copied as bytes");
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(shape.blocks);
  config.blockDim = dim3(shape.threads);
  config.dynamicSmemBytes = shape.sharedBytes;
  config.stream = stream;
  cudaLaunchAttribute early{};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  config.attrs = &early;
  config.numAttrs = shape.early ? 1 : 0;
  detail::checkLaunch(
      cudaLaunchKernelEx(&config, &detail::kernelEntry<Body, MaxThreads, Args>, args),
      "cudaLaunchKernelEx", shape);
}

}  // namespace cuda
}  // namespace mscclpp::device
