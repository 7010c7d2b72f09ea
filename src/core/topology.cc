#include <algorithm>
#include <cstring>
#include <map>
#include <set>

#include <mscclpp/env.hpp>
#include <mscclpp/errors.hpp>
#include <mscclpp/log.hpp>
#include <mscclpp/topology.hpp>

#include "core/transport/transports.hpp"

namespace mscclpp {

namespace {

/// What a rank tells of itself. Texts are zero terminated and cut where they are too long.
struct Card {
  char host[64];
  char device[160];
  int32_t platform;
  int32_t ranksPerNode;  ///< 0: not forced
  int32_t transport;     ///< -1: not forced
};

/// What a rank tells of its endpoint, or why it has none.
struct EndpointCard {
  int32_t there;
  char text[508];
};

template <size_t N>
void put(char (&to)[N], const std::string& text) {
  text.copy(to, N - 1);
}

bool hasVerbs(const std::shared_ptr<Device>& device, int rank) {
  try {
    Endpoint::create(Transport::verbs, device, {.rank = rank});
    return true;
  } catch (const Error&) {
    return false;
  }
}

Card makeCard(const std::shared_ptr<Device>& device, const TopologyOptions& options) {
  Card card{};
  put(card.host, hostId());
  put(card.device, device->describe());
  card.platform = static_cast<int32_t>(device->platform());
  card.ranksPerNode = options.ranksPerNode.value_or(env().ranksPerNode.value_or(0));
  const auto transport = options.transport ? options.transport : env().transport;
  card.transport = transport ? static_cast<int32_t>(*transport) : -1;
  return card;
}

void checkEqual(const std::vector<Card>& cards) {
  for (size_t rank = 1; rank < cards.size(); ++rank) {
    const auto same = [&](const char* what, int32_t first, int32_t other) {
      check(first == other, ErrorCode::invalidArgument,
            "topology: {} is {} on rank 0 and {} on rank {}: all ranks must ask for the same", what,
            first, other, rank);
    };
    same("the platform", cards[0].platform, cards[rank].platform);
    same("ranks per node (0 = not forced)", cards[0].ranksPerNode, cards[rank].ranksPerNode);
    same("the transport's number (-1 = not forced)", cards[0].transport, cards[rank].transport);
  }
}

/// The node of every rank.
std::vector<int> nodesOf(const std::vector<Card>& cards) {
  std::vector<int> nodes(cards.size());
  const int perNode = cards[0].ranksPerNode;
  check(perNode >= 0, ErrorCode::invalidArgument, "topology: ranksPerNode is {}: it is 1 or more",
        perNode);
  std::map<std::string, int> known;
  for (size_t rank = 0; rank < cards.size(); ++rank) {
    if (perNode == 0) {
      nodes[rank] = known.emplace(cards[rank].host, static_cast<int>(known.size())).first->second;
      continue;
    }
    nodes[rank] = static_cast<int>(rank) / perNode;
    const auto first = static_cast<size_t>(nodes[rank]) * static_cast<size_t>(perNode);
    check(std::strcmp(cards[first].host, cards[rank].host) == 0, ErrorCode::invalidArgument,
          "topology: with {} ranks per node, ranks {} and {} would share a node, but they run on "
          "hosts '{}' and '{}'",
          perNode, first, rank, cards[first].host, cards[rank].host);
  }
  return nodes;
}

struct Choice {
  Transport transport;
  std::string why;
};

struct Situation {
  std::optional<Transport> asked;
  bool everyRankHasVerbs;
  bool oneHost;
  Platform platform;
};

Choice choose(const Situation& now) {
  if (now.asked) return {*now.asked, "asked for"};
  if (now.everyRankHasVerbs) return {Transport::verbs, "every rank has an RDMA device"};
  if (!now.oneHost) return {Transport::tcp, "several hosts, and not every rank has an RDMA device"};
  return {now.platform == Platform::cuda ? Transport::cudaIpc : Transport::shm,
          "one host plays all nodes"};
}

/// Collective. Devices are looked for only where they may decide.
bool everyRankHasVerbs(Bootstrap& bootstrap, const std::shared_ptr<Device>& device) {
  std::vector<int32_t> has(static_cast<size_t>(bootstrap.size()));
  const int rank = bootstrap.rank();
  has[static_cast<size_t>(rank)] = hasVerbs(device, rank) ? 1 : 0;
  bootstrap.allGather(has);
  return std::all_of(has.begin(), has.end(), [](int32_t one) { return one != 0; });
}

Choice choose(Bootstrap& bootstrap, const std::shared_ptr<Device>& device,
              const std::vector<Card>& cards) {
  const Card& first = cards[0];
  const auto all = [&](auto&& condition) {
    return std::all_of(cards.begin(), cards.end(), condition);
  };
  return choose(
      {.asked = first.transport < 0 ? std::optional<Transport>()
                                    : static_cast<Transport>(first.transport),
       .everyRankHasVerbs = first.transport < 0 && everyRankHasVerbs(bootstrap, device),
       .oneHost = all([&](const Card& card) { return std::strcmp(card.host, first.host) == 0; }),
       .platform = static_cast<Platform>(first.platform)});
}

std::vector<EndpointCard> lookAtEndpoints(Bootstrap& bootstrap,
                                          const std::shared_ptr<Device>& device,
                                          Transport transport) {
  std::vector<EndpointCard> cards(static_cast<size_t>(bootstrap.size()));
  EndpointCard& own = cards[static_cast<size_t>(bootstrap.rank())];
  try {
    put(own.text, Endpoint::create(transport, device, {.rank = bootstrap.rank()})->describe());
    own.there = 1;
  } catch (const Error& error) {
    put(own.text, error.what());
  }
  bootstrap.allGather(cards);
  for (size_t rank = 0; rank < cards.size(); ++rank) {
    check(cards[rank].there != 0, ErrorCode::unsupported,
          "topology: rank {} cannot use the transport {}: {}", rank, toString(transport),
          cards[rank].text);
  }
  return cards;
}

}  // namespace

Topology Topology::discover(Bootstrap& bootstrap, const std::shared_ptr<Device>& device,
                            const TopologyOptions& options) {
  check(device != nullptr, ErrorCode::invalidArgument, "topology: the device is null");
  std::vector<Card> cards(static_cast<size_t>(bootstrap.size()));
  cards[static_cast<size_t>(bootstrap.rank())] = makeCard(device, options);
  bootstrap.allGather(cards);
  checkEqual(cards);

  Topology topology;
  topology.rank_ = bootstrap.rank();
  topology.nodeOf_ = nodesOf(cards);
  topology.members_.resize(
      static_cast<size_t>(1 + *std::max_element(topology.nodeOf_.begin(), topology.nodeOf_.end())));
  for (int rank = 0; rank < topology.ranks(); ++rank) {
    topology.members_[static_cast<size_t>(topology.nodeOf(rank))].push_back(rank);
  }
  std::vector<EndpointCard> endpoints;
  topology.text_ =
      fmt::format("{} ranks on {} node{}; inside a node: mapped memory", topology.ranks(),
                  topology.nodes(), topology.nodes() == 1 ? "" : "s");
  if (topology.nodes() > 1) {
    const Choice choice = choose(bootstrap, device, cards);
    topology.transport_ = choice.transport;
    endpoints = lookAtEndpoints(bootstrap, device, choice.transport);
    topology.text_ +=
        fmt::format("; between nodes: {} ({})", toString(choice.transport), choice.why);
  }
  topology.text_ += "\n";
  for (size_t rank = 0; rank < cards.size(); ++rank) {
    topology.text_ += fmt::format("  rank {} node {} host {}: {}\n", rank, topology.nodeOf_[rank],
                                  cards[rank].host, cards[rank].device);
    if (!endpoints.empty()) topology.text_ += fmt::format("    {}\n", endpoints[rank].text);
  }
  if (topology.rank_ == 0) log::info("topology: {}", topology.text_);
  return topology;
}

int Topology::localRank(int rank) const {
  const auto& all = members(nodeOf(rank));
  return static_cast<int>(std::find(all.begin(), all.end(), rank) - all.begin());
}

LinkKind Topology::link(int peer) const {
  if (peer == rank_) return LinkKind::self;
  return nodeOf(peer) == nodeOf(rank_) ? LinkKind::memory : LinkKind::port;
}

std::vector<std::string> describeTransports(const std::shared_ptr<Device>& device, int rank) {
  check(device != nullptr, ErrorCode::invalidArgument, "describeTransports: the device is null");
  std::vector<std::string> lines;
  Situation now{.asked = env().transport,
                .everyRankHasVerbs = false,
                .oneHost = true,
                .platform = device->platform()};
  std::set<Transport> there;
  for (const auto& entry : transport::transports()) {
    try {
      const auto endpoint = Endpoint::create(entry.transport, device, {.rank = rank});
      lines.push_back(endpoint->describe());
      there.insert(entry.transport);
    } catch (const Error& error) {
      lines.push_back(fmt::format("no {}: {}", entry.name, error.what()));
    }
  }
  now.everyRankHasVerbs = there.contains(Transport::verbs);
  lines.emplace_back("to a peer of the same node: mapped memory");
  for (const bool oneHost : {true, false}) {
    now.oneHost = oneHost;
    const Choice choice = choose(now);
    lines.push_back(fmt::format("to a peer of another {}: {} ({}){}",
                                oneHost ? "node on this host" : "host", toString(choice.transport),
                                choice.why,
                                there.contains(choice.transport) ? "" : ", which is not there"));
  }
  return lines;
}

}  // namespace mscclpp
