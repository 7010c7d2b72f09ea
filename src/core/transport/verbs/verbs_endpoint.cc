#include <mscclpp/errors.hpp>

#include "core/transport/transports.hpp"

namespace mscclpp::transport {

std::shared_ptr<Endpoint> makeVerbsEndpoint(std::shared_ptr<Device>, const EndpointOptions&) {
  fail(ErrorCode::unsupported, "transport verbs is not there yet");
}

}  // namespace mscclpp::transport
