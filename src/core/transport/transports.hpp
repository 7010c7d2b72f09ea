// The transports there are. A new one is a folder beside this file and a row of the table in
// transports.cc.
#pragma once

#include <memory>
#include <span>

#include <mscclpp/connection.hpp>

namespace mscclpp::transport {

struct TransportEntry {
  Transport transport;
  const char* name;
  std::shared_ptr<Endpoint> (*create)(std::shared_ptr<Device> device,
                                      const EndpointOptions& options);
};

std::span<const TransportEntry> transports();

std::shared_ptr<Endpoint> makeShmEndpoint(std::shared_ptr<Device> device,
                                          const EndpointOptions& options);
std::shared_ptr<Endpoint> makeCudaIpcEndpoint(std::shared_ptr<Device> device,
                                              const EndpointOptions& options);
std::shared_ptr<Endpoint> makeTcpEndpoint(std::shared_ptr<Device> device,
                                          const EndpointOptions& options);
std::shared_ptr<Endpoint> makeVerbsEndpoint(std::shared_ptr<Device> device,
                                            const EndpointOptions& options);

}  // namespace mscclpp::transport
