#include "core/transport/tcp/tcp_endpoint.hpp"

#include <mscclpp/errors.hpp>

#include "core/bootstrap/rendezvous.hpp"
#include "core/transport/tcp/tcp_connection.hpp"
#include "core/transport/transports.hpp"

namespace mscclpp::transport {

namespace tcp {

TcpEndpoint::TcpEndpoint(std::shared_ptr<Device> device, const EndpointOptions& options,
                         StagingUse staging)
    : Endpoint(Transport::tcp, std::move(device), options),
      memories_(std::make_shared<MemoryTable>()),
      staging_(staging) {
  if (TcpEndpoint::device()->platform() == Platform::cuda || staging_ == StagingUse::always) {
    streams_ =
        std::make_unique<CopyStreams>(TcpEndpoint::device(), options.rank, options.copyStreams);
  }
  static_cast<void>(detail::localAddresses(options.interface));  // refuses what is not there
}

std::string TcpEndpoint::describe() const {
  std::string addresses;
  for (const auto& address : detail::localAddresses(options().interface)) {
    addresses += (addresses.empty() ? "" : ", ") + address.host();
  }
  return fmt::format("tcp on {}, for {}", addresses, device()->describe());
}

std::shared_ptr<LocalMemory> TcpEndpoint::registerMemory(RegisteredMemory memory) {
  check(static_cast<bool>(memory), ErrorCode::invalidArgument, "tcp: the memory is empty");
  const bool onDevice = memory.device()->platform() == Platform::cuda;
  check(!onDevice || memory.device() == device(), ErrorCode::unsupported,
        "tcp: the memory of {} bytes lies on {}, this endpoint serves {}: make an endpoint there",
        memory.size(), memory.device()->describe(), device()->describe());
  return memories_->add(memories_, std::move(memory), onDevice || staging_ == StagingUse::always);
}

std::shared_ptr<Connection> TcpEndpoint::open(int peer) {
  check(peer >= 0 && peer != options().rank, ErrorCode::invalidArgument,
        "tcp: rank {} cannot open a connection to rank {}: a peer is another rank, 0 or more",
        options().rank, peer);
  return std::make_shared<TcpConnection>(shared_from_this(), peer);
}

std::unique_ptr<Staging> TcpEndpoint::makeStaging() {
  return streams_ ? std::make_unique<Staging>(device(), streams_->next()) : nullptr;
}

}  // namespace tcp

std::shared_ptr<Endpoint> makeTcpEndpoint(std::shared_ptr<Device> device,
                                          const EndpointOptions& options) {
  return std::make_shared<tcp::TcpEndpoint>(std::move(device), options,
                                            tcp::StagingUse::deviceMemory);
}

}  // namespace mscclpp::transport
