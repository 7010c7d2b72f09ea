#include "port_peers.hpp"

#include <cstring>

#include <mscclpp/errors.hpp>

namespace mscclpp::ep {

PortPeers::PortPeers(Bootstrap& bootstrap, const Topology& topology, const Options& options)
    : ranks_(bootstrap.size()),
      device_(options.device),
      endpoint_(Endpoint::create(topology.transport().value(), device_,
                                 {.rank = bootstrap.rank(),
                                  .timeout = options.timeout,
                                  .copyStreams = options.copyStreams})),
      connections_(connectAll(bootstrap, *endpoint_,
                              [&](int peer) { return topology.link(peer) == LinkKind::port; })),
      counters_(allocateHostMemory(device_, PortWords{ranks_}.bytes())),
      service_(std::make_unique<ProxyService>(
          device_, ProxyOptions{.rank = bootstrap.rank(),
                                .pin = device_->platform() == Platform::cuda,
                                .timeout = options.timeout})) {
  const auto heap = endpoint_->registerMemory({device_, options.heap, options.heapBytes});
  registered_ = endpoint_->registerMemory(counters_);
  const auto remoteHeaps = exchangeMemories(bootstrap, connections_, *heap);
  const auto remoteCounters = exchangeMemories(bootstrap, connections_, *registered_);
  if (options.record != nullptr) service_->watch(*options.record);
  const auto ranks = static_cast<std::size_t>(ranks_);
  channels_.resize(kPortUses * ranks);
  std::vector<PortChannelHandle> handles(channels_.size());
  for (std::size_t use = 0; use < kPortUses; ++use) {
    const auto semaphores = PortSemaphore::createAll(bootstrap, *endpoint_, connections_);
    for (std::size_t peer = 0; peer < ranks; ++peer) {
      if (!connections_[peer]) continue;
      PortChannel& channel = channels_[use * ranks + peer];
      channel = service_->createChannel({.connection = connections_[peer],
                                         .semaphore = semaphores[peer],
                                         .local = heap,
                                         .remote = remoteHeaps[peer],
                                         .counters = remoteCounters[peer],
                                         .fifo = static_cast<int>(use)});
      handles[use * ranks + peer] = channel.deviceHandle();
    }
  }
  const std::size_t bytes = handles.size() * sizeof(PortChannelHandle);
  tables_ = device_->allocateExportable(bytes);  // device memory; never exported
  device_->copyNow(tables_.get(), handles.data(), bytes);
  service_->start();
}

PortPeers::~PortPeers() = default;

const PortChannelHandle* PortPeers::table(PortUse use) const {
  return static_cast<const PortChannelHandle*>(tables_.get()) +
         static_cast<std::size_t>(use) * static_cast<std::size_t>(ranks_);
}

void PortPeers::close(Bootstrap& bootstrap) {
  service_->drain();
  bootstrap.barrier();  // until here peers may have needed this side's progress
  service_->stop();
  for (const auto& connection : connections_) {
    if (connection) connection->close();
  }
  bootstrap.barrier();  // nobody frees memory that a peer's proxy may write
}

}  // namespace mscclpp::ep
