#pragma once

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

/// What a platform has without special hardware.
inline std::vector<Transport> nodeTransports() {
  if (testPlatform() == Platform::cuda) return {Transport::cudaIpc, Transport::tcp};
  return {Transport::shm, Transport::tcp};
}
inline std::string nameOf(const NodeShape& shape) {
  return std::to_string(shape.ranks) + "By" + std::to_string(shape.perNode) +
         (shape.transport == Transport::tcp ? "Tcp" : "Mapped");
}
inline std::string nameOfShape(const ::testing::TestParamInfo<NodeShape>& info) {
  return nameOf(info.param);
}

/// Two nodes and more, of one rank and more, with a small last node, too. The transport that is not
/// tcp is the platform's own: it is filled in by nodeOptions().
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

inline BufferOptions nodeOptions(const NodeShape& shape, std::size_t nvlBytes = 8u << 20) {
  BufferOptions options = testOptions(nvlBytes);
  options.topology.ranksPerNode = shape.perNode;
  options.topology.transport =
      shape.transport == Transport::tcp ? Transport::tcp : nodeTransports().front();
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
