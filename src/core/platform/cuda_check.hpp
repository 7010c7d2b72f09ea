// CUDA calls with errors as exceptions, and the guard that every CUDA method starts with.
#pragma once

#include <cuda_runtime_api.h>

#include <string>

#include <mscclpp/errors.hpp>

namespace mscclpp::detail {

/// Throws CudaError with `what`, the error's name and text; clears CUDA's own "last error".
inline void cudaTry(cudaError_t result, const std::string& what) {
  if (result == cudaSuccess) return;
  static_cast<void>(cudaGetLastError());
  throw CudaError(
      static_cast<int>(result),
      fmt::format("{}: {} ({})", what, cudaGetErrorString(result), cudaGetErrorName(result)));
}

/// For destructors: logs. At the end of the process CUDA may be gone already, which is no error.
inline void cudaLog(cudaError_t result, const char* what) noexcept {
  if (result == cudaSuccess || result == cudaErrorCudartUnloading) return;
  static_cast<void>(cudaGetLastError());
  runNoThrow(what, [&] { reportError(fmt::format("{}: {}", what, cudaGetErrorString(result))); });
}

/// Makes a device current and the previous one again in the end.
class CurrentDevice {
 public:
  explicit CurrentDevice(int index) {
    cudaTry(cudaGetDevice(&previous_), "cudaGetDevice");
    if (previous_ == index) return;
    cudaTry(cudaSetDevice(index), fmt::format("cudaSetDevice({})", index));
    changed_ = true;
  }
  ~CurrentDevice() {
    if (changed_) cudaLog(cudaSetDevice(previous_), "cudaSetDevice");
  }
  CurrentDevice(const CurrentDevice&) = delete;
  CurrentDevice& operator=(const CurrentDevice&) = delete;

 private:
  int previous_ = 0;
  bool changed_ = false;
};

/// Lets this thread allocate, query and record while another thread captures a graph.
class RelaxedCapture {
 public:
  RelaxedCapture() { cudaLog(cudaThreadExchangeStreamCaptureMode(&mode_), "capture mode"); }
  ~RelaxedCapture() { cudaLog(cudaThreadExchangeStreamCaptureMode(&mode_), "capture mode"); }
  RelaxedCapture(const RelaxedCapture&) = delete;
  RelaxedCapture& operator=(const RelaxedCapture&) = delete;

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

}  // namespace mscclpp::detail
