// GPU memory as a dma-buf, for NICs.
#pragma once

#include <string>

#include <mscclpp/platform.hpp>

namespace mscclpp::detail {

/// "0000:18:00.0", in lower case as sysfs writes it.
std::string cudaPciAddress(int device);
bool cudaCanExportDmaBuf(int device) noexcept;
/// @throws CudaError, Error unsupported.
DmaBuf cudaExportDmaBuf(int device, const void* memory, size_t bytes);

}  // namespace mscclpp::detail
