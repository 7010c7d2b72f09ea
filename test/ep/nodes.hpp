#pragma once

#include <cstdlib>
#include <string>
#include <vector>

#include "ep/scenario.hpp"

/// Groups whose ranks play several nodes on one host.
namespace mscclpp::ep::testing {

struct NodeShape {
  int ranks = 2;
  int perNode = 1;  ///< the last node has fewer where it does not divide the ranks
  Transport transport = Transport::shm;
};

/// The one between nodes that is not tcp: what --transport names, else what the platform has
/// without special hardware.
inline Transport ownTransport() {
  const char* named = std::getenv("MSCCLPP_EP_TRANSPORT");
  if (named != nullptr) return parseTransport(named);
  return testPlatform() == Platform::cuda ? Transport::cudaIpc : Transport::shm;
}
inline std::string nameOf(const NodeShape& shape) {
  return std::to_string(shape.ranks) + "By" + std::to_string(shape.perNode) +
         (shape.transport == Transport::tcp ? "Tcp" : "Mapped");
}
inline std::string nameOfShape(const ::testing::TestParamInfo<NodeShape>& info) {
  return nameOf(info.param);
}

/// Two nodes and more, of one rank and more, with a small last node, too. nodeOptions() fills the
/// transport in that is not tcp.
inline std::vector<NodeShape> nodeShapes() {
  std::vector<NodeShape> shapes;
  for (const Transport transport : {Transport::shm, Transport::tcp}) {
    for (const auto& [ranks, perNode] :
         {std::pair{2, 1}, {4, 2}, {4, 1}, {8, 4}, {6, 2}, {4, 3}, {5, 2}}) {
      shapes.push_back({ranks, perNode, transport});
    }
  }
  return shapes;
}

/// How many of a rank's tokens go to each node: each once, whatever ranks it picks there.
inline std::vector<std::int32_t> tokensPerNode(const World& world, int rank,
                                               const Topology& topology) {
  std::vector<std::int32_t> counts(static_cast<std::size_t>(topology.nodes()));
  const reference::Layout layout = reference::layout(world.routing(rank), world.placement());
  for (int t = 0; t < world.routing(rank).tokens; ++t) {
    std::vector<bool> nodes(counts.size());
    for (int r = 0; r < world.ranks(); ++r) {
      const auto at = static_cast<std::size_t>(t * world.ranks() + r);
      if (layout.isTokenInRank[at]) nodes[static_cast<std::size_t>(topology.nodeOf(r))] = true;
    }
    for (std::size_t n = 0; n < nodes.size(); ++n) counts[n] += nodes[n] ? 1 : 0;
  }
  return counts;
}

inline BufferOptions nodeOptions(const NodeShape& shape, std::size_t nvlBytes = 8u << 20) {
  BufferOptions options = testOptions(nvlBytes);
  options.topology.ranksPerNode = shape.perNode;
  options.topology.transport = shape.transport == Transport::tcp ? Transport::tcp : ownTransport();
  return options;
}
/// Rings between nodes as small as calls accept: two slots of `slotBytes`, four on GPUs.
inline BufferOptions withSmallestWindow(const NodeShape& shape, std::size_t slotBytes) {
  const bool cpu = testPlatform() == Platform::cpu;
  const std::size_t areas = 4, lanes = cpu ? 2 : 32, slots = cpu ? 2 : 4;
  const int nodes = (shape.ranks + shape.perNode - 1) / shape.perNode;
  const int last = shape.ranks - (nodes - 1) * shape.perNode;
  const int flows = (nodes - 1) * ((shape.perNode + last - 1) / last);  // into the last node's rail
  BufferOptions options = nodeOptions(shape);
  options.numRdmaBytes = slots * slotBytes * areas * lanes * static_cast<std::size_t>(flows);
  return options;
}

}  // namespace mscclpp::ep::testing
