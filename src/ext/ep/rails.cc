#include "rails.hpp"

#include <algorithm>
#include <cstring>

#include <mscclpp/errors.hpp>

namespace mscclpp::ep {

int railOf(const Topology& topology, int rank, int node) {
  const std::vector<int>& members = topology.members(node);
  const auto place = static_cast<std::size_t>(topology.localRank(rank));
  return members[place % members.size()];
}

namespace {

/// Number of the flow to `node` among those that a rank of `from` feeds.
int outIndex(int from, int node) {
  return node < from ? node : node - 1;
}
/// Ranks of other nodes whose rail is `rank`, ascending.
std::vector<int> sourcesOf(const Topology& topology, int rank) {
  const int node = topology.nodeOf(rank);
  std::vector<int> sources;
  for (int s = 0; s < topology.ranks(); ++s) {
    if (topology.nodeOf(s) != node && railOf(topology, s, node) == rank) sources.push_back(s);
  }
  return sources;
}

}  // namespace

RailFlows railFlows(const Topology& topology, int rank) {
  RailFlows flows;
  const int own = topology.nodeOf(rank);
  for (int node = 0; node < topology.nodes(); ++node) {
    if (node == own) continue;
    const int rail = railOf(topology, rank, node);
    const std::vector<int> sources = sourcesOf(topology, rail);
    const auto at = std::find(sources.begin(), sources.end(), rank) - sources.begin();
    flows.out.push_back({rail, node, static_cast<int>(at)});
  }
  for (const int source : sourcesOf(topology, rank)) {
    const int node = topology.nodeOf(source);
    flows.in.push_back({source, node, outIndex(node, own)});
  }
  return flows;
}

RailPlan makeRailPlan(const Topology& topology, int lanes, int maxExpertsPerRank,
                      std::size_t bytes) {
  RailPlan plan;
  plan.ranks = topology.ranks();
  plan.lanes = lanes;
  plan.maxExpertsPerRank = maxExpertsPerRank;
  if (topology.nodes() == 1) return plan;
  check(RailCounters{lanes}.words() <= kPortWords, ErrorCode::internal,
        "{} lanes need {} counters per rank, there are {}", lanes, RailCounters{lanes}.words(),
        kPortWords);
  for (int node = 0; node < topology.nodes(); ++node) {
    plan.members = std::max(plan.members, static_cast<int>(topology.members(node).size()));
  }
  for (int rank = 0; rank < topology.ranks(); ++rank) {
    const auto sources = static_cast<int>(sourcesOf(topology, rank).size());
    plan.rings = std::max({plan.rings, sources, topology.nodes() - 1});
  }
  plan.ringBytes = RailPlan::ringBytesFor(bytes, plan);
  return plan;
}

Rails::Rails(const Topology& topology, const RailPlan& plan, const PortPeers& ports,
             const std::shared_ptr<Device>& device) {
  const RailFlows flows = railFlows(topology, topology.rank());
  std::vector<std::int32_t> ranks, first = {0};
  for (int node = 0; node < topology.nodes(); ++node) {
    const std::vector<int>& members = topology.members(node);
    ranks.insert(ranks.end(), members.begin(), members.end());
    first.push_back(static_cast<std::int32_t>(ranks.size()));
  }
  std::vector<char> image;
  const auto append = [&](const auto& list) {
    const std::size_t at = image.size(), bytes = list.size() * sizeof(list[0]);
    image.resize(at + bytes);
    if (bytes > 0) std::memcpy(image.data() + at, list.data(), bytes);
    return at;
  };
  const std::size_t out = append(flows.out), in = append(flows.in), rankAt = append(ranks),
                    firstAt = append(first);
  memory_ = device->allocateExportable(image.size());  // device memory; never exported
  device->copyNow(memory_.get(), image.data(), image.size());
  const char* base = static_cast<const char*>(memory_.get());
  args_.channels = ports.table(PortUse::highThroughput);
  args_.words = ports.words();
  args_.wordLayout = PortWords{topology.ranks()};
  args_.out = reinterpret_cast<const RailFlow*>(base + out);
  args_.in = reinterpret_cast<const RailFlow*>(base + in);
  args_.outs = static_cast<int>(flows.out.size());
  args_.ins = static_cast<int>(flows.in.size());
  args_.nodeRanks = reinterpret_cast<const std::int32_t*>(base + rankAt);
  args_.nodeFirst = reinterpret_cast<const std::int32_t*>(base + firstAt);
  args_.node = topology.nodeOf(topology.rank());
  args_.nodes = topology.nodes();
  args_.plan = plan;
}

}  // namespace mscclpp::ep
