#include <mscclpp/errors.hpp>

#include "core/transport/transports.hpp"

namespace mscclpp::transport {

std::shared_ptr<Endpoint> makeTcpEndpoint(std::shared_ptr<Device>, const EndpointOptions&) {
  fail(ErrorCode::unsupported, "transport tcp is not there yet");
}

}  // namespace mscclpp::transport
