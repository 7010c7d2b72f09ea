#pragma once

#include <chrono>
#include <cstdint>
#include <memory>
#include <vector>

#include <mscclpp/failure.hpp>
#include <mscclpp/port_channel.hpp>
#include <mscclpp/proxy.hpp>
#include <mscclpp/topology.hpp>

#include "port_words.hpp"

namespace mscclpp::ep {

/// Channels to the ranks of other nodes, served by this rank's proxies. Offsets of puts are offsets
/// in the symmetric heap, on both sides.
class PortPeers {
 public:
  struct Options {
    std::shared_ptr<Device> device;
    std::shared_ptr<void> heap;  ///< exportable memory of `device`
    std::size_t heapBytes = 0;
    FailureRecord* record = nullptr;  ///< fails when a connection does
    std::chrono::nanoseconds timeout{};
    int copyStreams = 1;  ///< see EndpointOptions
  };
  /// Collective: connects to every rank of another node and starts the proxies.
  PortPeers(Bootstrap& bootstrap, const Topology& topology, const Options& options);
  /// Stops the proxies without communicating. No kernel may use the channels any more.
  ~PortPeers();
  PortPeers(const PortPeers&) = delete;
  PortPeers& operator=(const PortPeers&) = delete;

  /// Device memory, [ranks]; entries of ranks of the own node mean nothing.
  const PortChannelHandle* table(PortUse use) const;
  /// Host memory that kernels read with the same pointer; laid out by PortWords.
  std::uint64_t* words() const { return reinterpret_cast<std::uint64_t*>(counters_.data()); }
  /// What broke first; empty while all is well.
  std::string failure() const { return service_->failure(); }
  std::vector<ProxyStatistics> statistics() const { return service_->statistics(); }
  void noteSignals(bool on) { service_->noteSignals(on); }
  std::vector<SignalTime> takeSignals() { return service_->takeSignals(); }
  /// Blocks until what kernels have pushed is complete. @throws as ProxyService::drain().
  void drain() { service_->drain(); }
  /// Collective, when no kernel uses the channels any more: waits until all that was pushed has
  /// arrived everywhere, then stops the proxies. @throws as ProxyService::drain().
  void close(Bootstrap& bootstrap);

 private:
  int ranks_;
  std::shared_ptr<Device> device_;
  std::shared_ptr<Endpoint> endpoint_;
  std::vector<std::shared_ptr<Connection>> connections_;
  RegisteredMemory counters_;
  std::shared_ptr<LocalMemory> registered_;  ///< the counters; peers add as long as it lives
  std::unique_ptr<ProxyService> service_;
  std::vector<PortChannel> channels_;  ///< [uses, ranks]
  std::shared_ptr<void> tables_;
};

}  // namespace mscclpp::ep
