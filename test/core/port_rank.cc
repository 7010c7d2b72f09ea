#include <cstring>

#include <mscclpp/errors.hpp>

#include "core/fake_connection.hpp"
#include "core/port_kernels.hpp"
#include "core/port_suite.hpp"

namespace mscclpp::test {

namespace {

std::shared_ptr<Endpoint> endpointOf(const PortSetup& setup, const std::shared_ptr<Device>& device,
                                     int rank) {
  const EndpointOptions options{.rank = rank,
                                .timeout = std::chrono::seconds(60),
                                .interface = {},
                                .queueDepth = setup.queueDepth};
  if (!setup.late) return Endpoint::create(setup.transport, device, options);
  return std::make_shared<FakeEndpoint>(device, options,
                                        FakeBehaviour{.gathers = true, .deviceSignals = true});
}

}  // namespace

PortRank::PortRank(const PortSetup& setup, Bootstrap& group, int blocks, size_t bytes)
    : group_(group),
      device_(Device::open(setup.platform, group.rank() % Device::count(setup.platform))),
      memory_(device_->allocateExportable(bytes)),
      counters_(allocateHostMemory(device_, kCounterBytes)),
      bytes_(bytes),
      endpoint_(endpointOf(setup, device_, group.rank())),
      connections_(connectAll(group, *endpoint_)),
      service_(std::make_unique<ProxyService>(device_,
                                              ProxyOptions{.rank = group.rank(),
                                                           .threads = setup.threads,
                                                           .fifoDepth = setup.fifoDepth,
                                                           .fifoStart = setup.fifoStart,
                                                           .timeout = std::chrono::seconds(60)})),
      report_(device_->allocatePinned(sizeof(FailureRecord) + 64)),
      record_(static_cast<FailureRecord*>(report_.get())),
      errors_(reinterpret_cast<uint32_t*>(record_ + 1)),
      stream_(device_->createStream(false, group.rank())) {
  const auto local = endpoint_->registerMemory({device_, memory_, bytes});
  targets_ = endpoint_->registerMemory(counters_);
  const auto remote = exchangeMemories(group, connections_, *local);
  const auto remoteCounters = exchangeMemories(group, connections_, *targets_);
  service_->watch(*record_);
  for (int block = 0; block < blocks; ++block) {
    semaphores_.push_back(PortSemaphore::createAll(group, *endpoint_, connections_));
    channels_.emplace_back(connections_.size());
    for (size_t peer = 0; peer < connections_.size(); ++peer) {
      if (connections_[peer] == nullptr) continue;
      channels_.back()[peer] = service_->createChannel({.connection = connections_[peer],
                                                        .semaphore = semaphores_.back()[peer],
                                                        .local = local,
                                                        .remote = remote[peer],
                                                        .counters = remoteCounters[peer],
                                                        .fifo = setup.fifoPerBlock ? block : 0});
    }
  }
  preparePortKernels(*device_);
  group.barrier();  // no rank may spin while another loads kernels
}

PortRank::~PortRank() = default;

void PortRank::stop() {
  stream_.synchronize();
  group_.barrier();  // every kernel has ended, so that no peer pushes any more
  service_->drain();
  group_.barrier();  // until here peers may have needed this side's progress
  service_->stop();
  for (const auto& connection : connections_) {
    if (connection) connection->close();
  }
  group_.barrier();
}

PortChannelHandle PortRank::channel(int peer, int block) const {
  return channels_[static_cast<size_t>(block)][static_cast<size_t>(peer)].deviceHandle();
}

WaitControl PortRank::control(uint64_t limitNs) const {
  return {record_, limitNs, group_.rank()};
}

std::vector<char> PortRank::read(uint64_t offset, size_t bytes) {
  const auto host = device_->allocatePinned(bytes);
  device_->copy(host.get(), memory() + offset, bytes, stream_);
  stream_.synchronize();
  const char* begin = static_cast<const char*>(host.get());
  return {begin, begin + bytes};
}

void PortRank::fill(uint8_t value) {
  device_->fill(memory(), value, bytes_, stream_);
  stream_.synchronize();
  group_.barrier();  // peers may write from now on
}

uint64_t PortRank::signalsFrom(int peer) {
  uint64_t total = 0;
  for (const auto& semaphores : semaphores_) {
    const PortSemaphoreHandle handle = semaphores[static_cast<size_t>(peer)].deviceHandle();
    total += __atomic_load_n(handle.inboundHost, __ATOMIC_ACQUIRE);
    if (handle.inboundDevice == nullptr) continue;
    const auto host = device_->allocatePinned(8);
    device_->copy(host.get(), handle.inboundDevice, 8, stream_);
    stream_.synchronize();
    total += *static_cast<const uint64_t*>(host.get());
  }
  return total;
}

}  // namespace mscclpp::test
