#pragma once

#include <optional>
#include <string>

#include <CLI/CLI.hpp>

#include <mscclpp/topology.hpp>

/// Options of commands whose ranks may play several nodes on one host.
namespace mscclpp::ep::cli {

struct NodeOptions {
  std::optional<int> nodes;
  std::string transport;  ///< empty = the environment, or the library, chooses
};

/// --nodes and --transport.
void addNodeOptions(CLI::App& command, NodeOptions& options);
/// --transport alone.
void addTransportOption(CLI::App& command, std::string& transport);
/// @throws CLI::ValidationError when there are no such nodes.
int ranksPerNode(int ranks, int nodes);
/// For BufferOptions. @throws as above.
TopologyOptions topologyOf(const NodeOptions& options, int ranks);

}  // namespace mscclpp::ep::cli
