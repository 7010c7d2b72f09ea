// Who shares a node with whom, and what carries the data between two ranks.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include <mscclpp/connection.hpp>

namespace mscclpp {

/// How one rank reaches another.
enum class LinkKind {
  self,    ///< it is the same rank
  memory,  ///< same node: the memory is mapped (MemoryChannel)
  port     ///< another node: a proxy carries the data (PortChannel)
};

/// Both may be left out: then MSCCLPP_EP_RANKS_PER_NODE and MSCCLPP_EP_TRANSPORT decide, and what
/// they leave open is found from the hosts.
struct TopologyOptions {
  /// So many consecutive ranks make a node, whatever their hosts: one host can play several nodes.
  /// A node may not span hosts.
  std::optional<int> ranksPerNode = {};
  /// What carries data between nodes. It must be there on every rank: there is no fallback.
  std::optional<Transport> transport = {};
};

/// The same on all ranks of a group. Plain data, made once.
class Topology {
 public:
  /// Collective: finds out, and checks that what was asked for can be had on every rank.
  /// Where nothing was asked: ranks of one host make a node; between nodes, verbs if every rank has
  /// an active RDMA device, else the host's own transport (shm, cuda_ipc) where all nodes are
  /// played by one host, else tcp.
  /// @throws Error invalidArgument (on every rank) for a shape that does not fit, unsupported for a
  /// transport that a rank lacks, with its reason.
  static Topology discover(Bootstrap& bootstrap, const std::shared_ptr<Device>& device,
                           const TopologyOptions& options = {});

  int rank() const noexcept { return rank_; }
  int ranks() const noexcept { return static_cast<int>(nodeOf_.size()); }
  int nodes() const noexcept { return static_cast<int>(members_.size()); }
  /// Nodes are numbered in the order of their lowest ranks.
  int nodeOf(int rank) const { return nodeOf_.at(static_cast<size_t>(rank)); }
  /// Ranks of a node, ascending.
  const std::vector<int>& members(int node) const { return members_.at(static_cast<size_t>(node)); }
  /// Place of a rank among the members of its node.
  int localRank(int rank) const;
  LinkKind link(int peer) const;
  /// What carries port channels; empty when there is only one node.
  std::optional<Transport> transport() const noexcept { return transport_; }
  /// A table for people: per rank its node, host, device and endpoint, and why the transport was
  /// chosen. Rank 0 logs it too, at level info.
  const std::string& describe() const noexcept { return text_; }

 private:
  int rank_ = 0;
  std::vector<int> nodeOf_;
  std::vector<std::vector<int>> members_;
  std::optional<Transport> transport_;
  std::string text_;
};

/// For people, a line each: the endpoint that every transport would have on `device` (with verbs:
/// NIC, link layer, GID, NUMA node, atomics, kind of GPUDirect) or why it has none, and what would
/// carry the data to a peer of the same node, of another node on this host and of another host.
/// `rank` decides among NICs that are equally near. Not collective; peers are taken to be like this
/// rank. Creates and drops endpoints.
std::vector<std::string> describeTransports(const std::shared_ptr<Device>& device, int rank = 0);

}  // namespace mscclpp
