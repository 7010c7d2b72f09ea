#include "node_options.hpp"

#include <mscclpp/format.hpp>

#include "number_options.hpp"

namespace mscclpp::ep::cli {
namespace {

constexpr int kMaxNodes = 64;

}  // namespace

void addNodeOptions(CLI::App& command, NodeOptions& options) {
  const NumberOptions number(command);
  number(
      "--nodes", options.nodes, 1, kMaxNodes,
      "Nodes that the ranks play on this host: between them, proxies carry the data; default: 1, "
      "or as MSCCLPP_EP_RANKS_PER_NODE says");
  addTransportOption(command, options.transport);
}

void addTransportOption(CLI::App& command, std::string& transport) {
  command
      .add_option("--transport", transport,
                  "What carries the data between nodes: shm (cpu), cuda_ipc (cuda), tcp or verbs; "
                  "default: MSCCLPP_EP_TRANSPORT, else the fastest there is")
      ->check(CLI::IsMember({"shm", "cuda_ipc", "tcp", "verbs"}).description(""))
      ->type_name("NAME");
}

int ranksPerNode(int ranks, int nodes) {
  const int perNode = (ranks + nodes - 1) / nodes;
  if ((ranks + perNode - 1) / perNode != nodes) {
    throw CLI::ValidationError(
        "--nodes", fmt::format("{} ranks (--ranks) cannot make {} nodes of equal size, but for the "
                               "last, which may be smaller",
                               ranks, nodes));
  }
  return perNode;
}

TopologyOptions topologyOf(const NodeOptions& options, int ranks) {
  TopologyOptions topology;
  if (options.nodes) topology.ranksPerNode = ranksPerNode(ranks, *options.nodes);
  if (!options.transport.empty()) topology.transport = parseTransport(options.transport);
  return topology;
}

}  // namespace mscclpp::ep::cli
