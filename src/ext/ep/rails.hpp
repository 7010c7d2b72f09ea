#pragma once

#include <memory>
#include <vector>

#include <mscclpp/topology.hpp>

#include "kernels/internode_api.cuh"
#include "port_peers.hpp"

namespace mscclpp::ep {

/// The rank of `node` through which `rank`, of another node, reaches it: the one with the same
/// place in its node, modulo its size.
int railOf(const Topology& topology, int rank, int node);

/// Flows that a rank feeds and flows that end there.
struct RailFlows {
  std::vector<RailFlow> out;  ///< to its rails, nodes ascending
  std::vector<RailFlow> in;   ///< from the ranks whose rail it is, ascending
};
RailFlows railFlows(const Topology& topology, int rank);

/// The same on all ranks. `bytes`: for all rings together.
RailPlan makeRailPlan(const Topology& topology, int lanes, int maxExpertsPerRank,
                      std::size_t bytes);

/// A rank's tables for the kernels between nodes, in device memory.
class Rails {
 public:
  /// Blocks. `ports` must outlive this object.
  Rails(const Topology& topology, const RailPlan& plan, const PortPeers& ports,
        const std::shared_ptr<Device>& device);
  const RailArgs& args() const { return args_; }

 private:
  RailArgs args_;
  std::shared_ptr<void> memory_;
};

}  // namespace mscclpp::ep
