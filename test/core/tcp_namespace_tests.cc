// The transport tcp between two network namespaces: addresses of their own, a link that can be cut,
// packets that get lost.
#include <chrono>
#include <functional>
#include <map>

#include <gtest/gtest.h>

#include "core/connection_exchange.hpp"
#include "core/connection_suite.hpp"
#include "core/namespaces.hpp"
#include "core/processes.hpp"

namespace mscclpp::test {
namespace {

using namespace std::chrono_literals;
using Clock = std::chrono::steady_clock;

// Rank 0 is side 0 of the link, rank 1 side 1.
constexpr auto kTimeout = 2s;

struct Namespaced {
  ConnectionInstance instance;
  std::unique_ptr<Rank> rank;

  /// Collective. `timeout` is the endpoint's.
  Namespaced(int own, const UniqueId& id, std::chrono::nanoseconds timeout) {
    instance = {.name = "tcp between namespaces",
                .transport = Transport::tcp,
                .options = {.interface = kLinkInterfaces[own]}};
    RankSetup setup = kExchangeRoom;
    setup.timeout = timeout;
    rank = std::make_unique<Rank>(instance, own, 2, id, setup);
  }
};

/// One packet in a hundred of those that come in vanishes.
void losePackets(int own) {
  runCommand(
      fmt::format("ip link set {} gso_max_segs 1 && nft add table ip loss && "
                  "nft add chain ip loss in '{{ type filter hook input priority 0; }}' && "
                  "nft add rule ip loss in iifname {} numgen random mod 100 0 counter drop",
                  kLinkInterfaces[own], kLinkInterfaces[own]));
}

/// How many have vanished.
int lostPackets() {
  const std::string rules = runCommand("nft list chain ip loss in");
  const size_t at = rules.find("counter packets ");
  check(at != std::string::npos, ErrorCode::internal, "no counter in: {}", rules);
  return std::stoi(rules.substr(at + std::string("counter packets ").size()));
}

/// Progresses, and posts when busy, until the connection breaks; requires that it does in time.
std::string noticeTheCut(Rank& rank, bool busy) {
  const auto start = Clock::now();
  Connection& connection = rank.to(rank.other());
  while (!connection.failed()) {
    if (busy && connection.canPost()) rank.write(rank.other(), 0, 0, 100'000);
    connection.progress();
    require(Clock::now() - start < kTimeout + 3s, "rank {} has not noticed the cut for {} s",
            rank.rank(), std::chrono::duration<double>(Clock::now() - start).count());
  }
  const std::string why = connection.failure();
  const std::string peer =
      fmt::format("rank {} at {}:", rank.other(), kLinkAddresses[rank.other()]);
  require(why.find(peer) != std::string::npos, "'{}' is missing in: {}", peer, why);
  return why;
}

// --- rank 1 --------------------------------------------------------------------------------------

/// Does what rank 0 says, a line at a time.
const RoleRegistration kRight("namespaced_peer", [](const std::vector<std::string>&) {
  enterNetworkNamespace();
  tellParent("entered");
  std::unique_ptr<Namespaced> side;
  for (std::string line = askParent(); !line.empty(); line = askParent()) {
    const std::string word = line.substr(0, line.find(' '));
    const std::string rest = line.substr(std::min(line.size(), word.size() + 1));
    if (word == "configure") configureLink(1);
    if (word == "lose") losePackets(1);
    if (word == "join")
      side = std::make_unique<Namespaced>(1, UniqueId::fromString(rest), kTimeout);
    if (word == "join-patient") {
      side = std::make_unique<Namespaced>(1, UniqueId::fromString(rest), 60s);
    }
    if (word == "exchange") exchange(*side->rank, std::stoi(rest), Notify::counter);
    if (word == "notice") {
      tellParent(noticeTheCut(*side->rank, rest == "busy"));
      continue;
    }
    if (word == "until-cut") {  // says that it has begun, then as above
      tellParent("begun");
      tellParent(noticeTheCut(*side->rank, rest == "busy"));
      continue;
    }
    tellParent("done");
  }
  return 0;
});

// --- rank 0 --------------------------------------------------------------------------------------

/// Both namespaces, as rank 0 sees them.
class Link {
 public:
  Link() : peer_("namespaced_peer", {}) {
    const std::string entered = peer_.hear();
    check(entered == "entered", ErrorCode::unsupported, "the second namespace: {}", entered);
    makeLink(peer_.pid());
    order("configure");
  }
  void tell(const std::string& line) { peer_.tell(line); }
  void expect(const std::string& answer) {
    const std::string said = peer_.hear();
    require(said == answer, "rank 1 said '{}' instead of '{}'", said, answer);
  }
  std::string hear() { return peer_.hear(); }
  void order(const std::string& line) {
    tell(line);
    expect("done");
  }
  std::unique_ptr<Namespaced> join(const std::string& word, std::chrono::nanoseconds timeout) {
    const UniqueId id = TcpBootstrap::createUniqueId(kLinkInterfaces[0]);
    tell(word + " " + id.toString());
    auto side = std::make_unique<Namespaced>(0, id, timeout);
    expect("done");
    return side;
  }

 private:
  Child peer_;
};

void ownAddresses(Link& link) {
  const auto side = link.join("join-patient", 60s);
  const std::string path = side->rank->to(1).describe();
  for (const char* address : kLinkAddresses) {
    require(path.find(address) != std::string::npos, "'{}' is missing in: {}", address, path);
  }
  link.tell("exchange 100");
  exchange(*side->rank, 100, Notify::counter);
  link.expect("done");
}

void loss(Link& link) {
  const auto side = link.join("join-patient", 60s);
  losePackets(0);
  link.order("lose");
  link.tell("exchange 200");
  exchange(*side->rank, 200, Notify::counter);
  link.expect("done");
  require(lostPackets() > 0, "no packet was lost: this has tested nothing");
}

void cut(Link& link, const std::string& state) {
  {
    const auto side = link.join("join", kTimeout);
    link.tell("until-cut " + state);
    link.expect("begun");
    if (state == "busy") {
      for (int i = 0; i < 20; ++i) side->rank->write(1, 0, 0, 100'000);
      side->rank->waitFor("work under way", [&] { return side->rank->to(1).completed() >= 10; });
    }
    setLink(false);
    noticeTheCut(*side->rank, state == "busy");
    const std::string said = link.hear();
    require(said.find("rank 0 at 10.77.0.1:") != std::string::npos, "rank 1 said '{}'", said);
  }
  // Both processes go on when the link is back.
  setLink(true);
  const auto side = link.join("join-patient", 60s);
  link.tell("exchange 10");
  exchange(*side->rank, 10, Notify::counter);
  link.expect("done");
}

const std::map<std::string, std::function<void(Link&)>> kTrials = {
    {"ownAddresses", ownAddresses},
    {"loss", loss},
    {"cutIdle", [](Link& link) { cut(link, "idle"); }},
    {"cutBusy", [](Link& link) { cut(link, "busy"); }}};

const RoleRegistration kLeft("namespaced_rank", [](const std::vector<std::string>& arguments) {
  std::unique_ptr<Link> link;
  try {
    enterNetworkNamespace();
    link = std::make_unique<Link>();
    runCommand("nft list tables");  // what losePackets() needs
  } catch (const std::exception& error) {
    tellParent(kCannotRun + std::string(error.what()));
    return 1;
  }
  kTrials.at(arguments.at(0))(*link);
  tellParent("finished");
  return 0;
});

void runTrial(const std::string& name) {
  runSide0("namespaced_rank", {name}, "finished");
}

TEST(TcpNamespaces, EachSideHasAnAddressOfItsOwn) {
  runTrial("ownAddresses");
}

TEST(TcpNamespaces, DataIsRightWhenOnePacketInAHundredIsLost) {
  runTrial("loss");
}

TEST(TcpNamespaces, ACutLinkIsNoticedWhileIdle) {
  runTrial("cutIdle");
}

TEST(TcpNamespaces, ACutLinkIsNoticedWhileBusy) {
  runTrial("cutBusy");
}

}  // namespace
}  // namespace mscclpp::test
