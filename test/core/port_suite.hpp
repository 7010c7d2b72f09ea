// The conformance suite of port channels: kernels on one side, proxies and a transport behind them.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include <mscclpp/bootstrap.hpp>
#include <mscclpp/port_channel.hpp>

namespace mscclpp::test {

/// One way to set a channel up.
struct PortSetup {
  const char* name;
  Platform platform;
  Transport transport;
  int queueDepth = 1024;
  int threads = 1;  ///< of the proxy service
  int fifoDepth = Fifo::kDefaultDepth;
  uint64_t fifoStart = 0;
  bool fifoPerBlock = true;
  bool late = false;  ///< FakeEndpoint: gathers, delays and reorders
};

class PortSuite : public testing::TestWithParam<PortSetup> {
 protected:
  void SetUp() override;
};

inline std::string portName(const testing::TestParamInfo<PortSetup>& info) {
  return info.param.name;
}

/// One rank of a group with a port channel for each of `blocks` blocks to every other rank, all
/// over the same memories: `bytes` of device memory and kCounterBytes of host counters on each
/// rank.
class PortRank {
 public:
  static constexpr size_t kCounterBytes = 4096;

  PortRank(const PortSetup& setup, Bootstrap& group, int blocks, size_t bytes);
  ~PortRank();

  void start() { service_->start(); }
  /// All ranks: nothing is under way afterwards, and nobody serves any more.
  void stop();

  Device& device() { return *device_; }
  Stream& stream() { return stream_; }
  ProxyService& service() { return *service_; }
  Connection& connection(int peer) { return *connections_[static_cast<size_t>(peer)]; }
  PortChannelHandle channel(int peer, int block = 0) const;
  WaitControl control(uint64_t limitNs) const;
  FailureRecord& record() { return *record_; }
  uint32_t* errors() { return errors_; }
  char* memory() { return static_cast<char*>(memory_.get()); }
  /// Of this rank, where peers add to.
  int64_t* counters() { return reinterpret_cast<int64_t*>(counters_.data()); }
  /// The words that count the signals of `peer`, added up; stream-ordered.
  uint64_t signalsFrom(int peer);
  std::vector<char> read(uint64_t offset, size_t bytes);
  /// Collective: sets all of the memory before any peer writes to it.
  void fill(uint8_t value);

 private:
  Bootstrap& group_;
  std::shared_ptr<Device> device_;
  std::shared_ptr<void> memory_;
  RegisteredMemory counters_;
  size_t bytes_;
  std::shared_ptr<Endpoint> endpoint_;
  std::shared_ptr<LocalMemory> targets_;  ///< the counters: no channel of this rank keeps them
  std::vector<std::shared_ptr<Connection>> connections_;
  std::vector<std::vector<PortSemaphore>> semaphores_;  ///< by block, by peer
  std::unique_ptr<ProxyService> service_;
  std::vector<std::vector<PortChannel>> channels_;  ///< by block, by peer
  std::shared_ptr<void> report_;
  FailureRecord* record_;
  uint32_t* errors_;
  Stream stream_;
};

}  // namespace mscclpp::test
