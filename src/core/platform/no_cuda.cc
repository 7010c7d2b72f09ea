// Stands in for cuda_device.cc in a build without CUDA.
#include <mscclpp/errors.hpp>

#include "core/platform/backend.hpp"

namespace mscclpp::detail {

int cudaDeviceCount() noexcept {
  return 0;
}

std::shared_ptr<Device> makeCudaDevice(int index) {
  fail(ErrorCode::unsupported,
       "cuda device {}: this library was built without CUDA: build it where nvcc is installed "
       "(-DMSCCLPP_USE_CUDA=ON), or use the platform cpu",
       index);
}

}  // namespace mscclpp::detail
