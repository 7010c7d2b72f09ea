// Stands in for the transport cuda_ipc in builds without CUDA.
#include <mscclpp/errors.hpp>

#include "core/transport/transports.hpp"

namespace mscclpp::transport {

std::shared_ptr<Endpoint> makeCudaIpcEndpoint(std::shared_ptr<Device>, const EndpointOptions&) {
  fail(ErrorCode::unsupported, "transport cuda_ipc: this build has no CUDA; use shm or tcp");
}

}  // namespace mscclpp::transport
