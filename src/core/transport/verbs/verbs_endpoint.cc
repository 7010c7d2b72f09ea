#include "core/transport/verbs/verbs_endpoint.hpp"

#include <mscclpp/errors.hpp>

#include "core/transport/transports.hpp"
#include "core/transport/verbs/verbs_connection.hpp"

namespace mscclpp::transport {

namespace verbs {

VerbsEndpoint::VerbsEndpoint(std::shared_ptr<Device> device, const EndpointOptions& options,
                             const Tuning& tuning)
    : Endpoint(Transport::verbs, std::move(device), options),
      tuning_(tuning),
      nic_(Nic::open(options.interface, *this->device(), options.rank)),
      gpuDirect_(gpuDirectOf(*this->device())) {}

std::string VerbsEndpoint::describe() const {
  const std::string distance = nic_->distanceTo(*device());
  return fmt::format("verbs on {} for {}, GPUDirect {}{}{}", nic_->describe(), device()->describe(),
                     toString(gpuDirect_), distance.empty() ? "" : ", ", distance);
}

std::shared_ptr<LocalMemory> VerbsEndpoint::registerMemory(RegisteredMemory memory) {
  auto registered = std::make_shared<VerbsMemory>(nic_, std::move(memory));
  memories_.add(registered);
  return registered;
}

std::shared_ptr<Connection> VerbsEndpoint::open(int peer) {
  return std::make_shared<VerbsConnection>(shared_from_this(), peer);
}

}  // namespace verbs

std::shared_ptr<Endpoint> makeVerbsEndpoint(std::shared_ptr<Device> device,
                                            const EndpointOptions& options) {
  return std::make_shared<verbs::VerbsEndpoint>(std::move(device), options, verbs::Tuning{});
}

}  // namespace mscclpp::transport
