// Stands in for the transport verbs in builds with MSCCLPP_USE_VERBS=OFF.
#include <mscclpp/errors.hpp>

#include "core/transport/transports.hpp"

namespace mscclpp::transport {

std::shared_ptr<Endpoint> makeVerbsEndpoint(std::shared_ptr<Device>, const EndpointOptions&) {
  fail(ErrorCode::unsupported,
       "transport verbs: this build is without it: configure with -DMSCCLPP_USE_VERBS=ON");
}

}  // namespace mscclpp::transport
