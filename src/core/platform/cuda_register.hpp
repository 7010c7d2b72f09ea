// Host memory that GPUs address.
#pragma once

#include <cstddef>
#include <memory>

#include <mscclpp/platform.hpp>

namespace mscclpp::detail {

/// What Device::registerHost does on CUDA.
std::shared_ptr<void> cudaRegisterHost(std::shared_ptr<Device> device, std::shared_ptr<void> memory,
                                       size_t bytes);

}  // namespace mscclpp::detail
