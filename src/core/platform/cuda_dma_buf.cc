#include "core/platform/cuda_dma_buf.hpp"

#include <cuda.h>
#include <unistd.h>

#include <algorithm>
#include <cctype>

#include <mscclpp/errors.hpp>

#include "core/platform/cuda_check.hpp"

namespace mscclpp::detail {

namespace {

/// The driver is not linked: this library starts on machines that have none.
template <class F>
F driverFunction(const char* name, unsigned version) {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found{};
#if CUDART_VERSION >= 12050
  const cudaError_t result =
      cudaGetDriverEntryPointByVersion(name, &function, version, cudaEnableDefault, &found);
#else
  static_cast<void>(version);
  const cudaError_t result = cudaGetDriverEntryPoint(name, &function, cudaEnableDefault, &found);
#endif
  if (result != cudaSuccess || found != cudaDriverEntryPointSuccess) {
    static_cast<void>(cudaGetLastError());
    return nullptr;
  }
  return reinterpret_cast<F>(function);
}

void driverTry(CUresult result, const char* what) {
  check(result == CUDA_SUCCESS, ErrorCode::unsupported, "{} failed with CUresult {}", what,
        static_cast<int>(result));
}

}  // namespace

std::string cudaPciAddress(int device) {
  char text[32] = {};
  cudaTry(cudaDeviceGetPCIBusId(text, sizeof(text), device), "cudaDeviceGetPCIBusId");
  std::string address = text;
  std::transform(address.begin(), address.end(), address.begin(),
                 [](unsigned char letter) { return std::tolower(letter); });
  return address;
}

bool cudaCanExportDmaBuf(int device) noexcept {
  const auto getAttribute =
      driverFunction<decltype(&cuDeviceGetAttribute)>("cuDeviceGetAttribute", 2000);
  int supported = 0;
  return getAttribute != nullptr &&
         getAttribute(&supported, CU_DEVICE_ATTRIBUTE_DMA_BUF_SUPPORTED, device) == CUDA_SUCCESS &&
         supported != 0;
}

DmaBuf cudaExportDmaBuf(int device, const void* memory, size_t bytes) {
  const CurrentDevice current(device);
  const auto getHandle = driverFunction<decltype(&cuMemGetHandleForAddressRange)>(
      "cuMemGetHandleForAddressRange", 11070);
  check(getHandle != nullptr, ErrorCode::unsupported,
        "the NVIDIA driver has no cuMemGetHandleForAddressRange: it is older than CUDA 11.7");
  // Exported are whole pages of the host; allocations of the driver cover their last one.
  const auto page = static_cast<CUdeviceptr>(::sysconf(_SC_PAGESIZE));
  const auto address = reinterpret_cast<CUdeviceptr>(memory);
  const CUdeviceptr begin = address / page * page;
  const CUdeviceptr end = (address + bytes + page - 1) / page * page;
  int descriptor = -1;
  driverTry(getHandle(&descriptor, begin, end - begin, CU_MEM_RANGE_HANDLE_TYPE_DMA_BUF_FD, 0),
            "cuMemGetHandleForAddressRange");
  return {.descriptor = descriptor, .offset = address - begin};
}

}  // namespace mscclpp::detail
