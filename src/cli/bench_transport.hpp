#pragma once

#include <memory>
#include <vector>

#include <mscclpp/connection.hpp>
#include <mscclpp/topology.hpp>

#include "bench.hpp"
#include "bench_data.hpp"
#include "device_memory.hpp"

namespace mscclpp::ep::cli {

/// The roofline between nodes: the bytes that a call has to carry there, every token once per node,
/// written by the host over connections of the same transport, in large pieces. No kernels, no
/// FIFO, no proxies.
class TransportRoofline {
 public:
  /// Collective.
  TransportRoofline(const BenchOptions& options, const RankContext& context,
                    const RankDevice& device, const BenchRouting& routing, const Topology& topology,
                    std::size_t rowBytes);
  ~TransportRoofline();

  /// That this rank sends to other nodes.
  double bytes() const;
  /// Collective. Times the writes of all ranks at once, and checks that they came.
  Timing measure();

 private:
  struct Flow {
    int peer;
    std::uint64_t bytes;
    std::uint64_t remoteOffset;
  };
  void fillMemories();
  double round();
  void write();
  void add(int peer, std::uint64_t word);
  bool progress();
  std::uint64_t counter(std::uint64_t word) const;
  bool arrived() const;

  const BenchOptions& options_;
  const RankContext& context_;
  const RankDevice& device_;
  std::vector<Flow> out_, in_;
  std::uint64_t rounds_ = 0;
  std::uint64_t peers_ = 0;  ///< connections
  std::size_t farBytes_ = 0;
  std::shared_ptr<void> near_, far_;
  RegisteredMemory counters_;
  std::shared_ptr<Endpoint> endpoint_;
  std::vector<std::shared_ptr<Connection>> connections_;  ///< [ranks]
  std::shared_ptr<LocalMemory> local_, target_, words_;
  std::vector<std::shared_ptr<RemoteMemory>> remote_, remoteWords_;
};

}  // namespace mscclpp::ep::cli
