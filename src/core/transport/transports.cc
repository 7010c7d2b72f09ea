#include "core/transport/transports.hpp"

#include <array>

#include <mscclpp/errors.hpp>

namespace mscclpp {

namespace transport {

std::span<const TransportEntry> transports() {
  static constexpr std::array kTable{
      TransportEntry{Transport::shm, "shm", makeShmEndpoint},
      TransportEntry{Transport::cudaIpc, "cuda_ipc", makeCudaIpcEndpoint},
      TransportEntry{Transport::tcp, "tcp", makeTcpEndpoint},
      TransportEntry{Transport::verbs, "verbs", makeVerbsEndpoint},
  };
  return kTable;
}

namespace {

constexpr int kMinQueueDepth = 2;
constexpr int kMaxQueueDepth = 65536;
constexpr int kMaxQueuePairs = 16;
constexpr int kMaxCopyStreams = 64;

void checkOptions(const EndpointOptions& options) {
  check(options.rank >= 0, ErrorCode::invalidArgument, "Endpoint: rank is {}: it is 0 or more",
        options.rank);
  check(options.timeout.count() >= 0, ErrorCode::invalidArgument,
        "Endpoint: the timeout is {} ns: it is 0 (no limit) or more", options.timeout.count());
  check(options.queueDepth >= kMinQueueDepth && options.queueDepth <= kMaxQueueDepth,
        ErrorCode::invalidArgument, "Endpoint: queueDepth is {}: allowed is {} to {}",
        options.queueDepth, kMinQueueDepth, kMaxQueueDepth);
  check(options.queuePairs >= 1 && options.queuePairs <= kMaxQueuePairs, ErrorCode::invalidArgument,
        "Endpoint: queuePairs is {}: allowed is 1 to {}", options.queuePairs, kMaxQueuePairs);
  check(options.copyStreams >= 1 && options.copyStreams <= kMaxCopyStreams,
        ErrorCode::invalidArgument, "Endpoint: copyStreams is {}: allowed is 1 to {}",
        options.copyStreams, kMaxCopyStreams);
}

}  // namespace
}  // namespace transport

std::string_view toString(Transport transport) noexcept {
  for (const auto& entry : transport::transports()) {
    if (entry.transport == transport) return entry.name;
  }
  return "unknown";
}

Transport parseTransport(std::string_view name) {
  std::string allowed;
  for (const auto& entry : transport::transports()) {
    if (name == entry.name) return entry.transport;
    allowed += (allowed.empty() ? "" : ", ") + std::string(entry.name);
  }
  fail(ErrorCode::invalidArgument, "'{}' is no transport: use one of {}", name, allowed);
}

std::shared_ptr<Endpoint> Endpoint::create(Transport transport, std::shared_ptr<Device> device,
                                           const EndpointOptions& options) {
  check(device != nullptr, ErrorCode::invalidArgument, "Endpoint: the device is null");
  transport::checkOptions(options);
  for (const auto& entry : transport::transports()) {
    if (entry.transport == transport) return entry.create(std::move(device), options);
  }
  fail(ErrorCode::invalidArgument, "Endpoint: transport number {} does not exist",
       static_cast<int>(transport));
}

}  // namespace mscclpp
