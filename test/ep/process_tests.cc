// Ranks as processes. Rank 0 is the test itself; the others are this binary, started with a role.
#include <signal.h>

#include <chrono>
#include <cstdlib>

#include <gtest/gtest.h>

#include <mscclpp/bootstrap.hpp>
#include <mscclpp/errors.hpp>

#include "core/limits.hpp"
#include "core/processes.hpp"
#include "ep/layer_calls.hpp"
#include "ep/nodes.hpp"

namespace mscclpp::ep::testing {
namespace {

using std::chrono::milliseconds;
using test::Child;

constexpr const char* kGroupVariable = "MSCCLPP_TEST_GROUP";
constexpr int kVictim = 2;

/// One good pair; then the victim dies: before it calls, or right after it has enqueued its
/// dispatch.
void runUntilDeath(RankContext& rank, bool insideCall) {
  const World world = layerWorld(rank.ranks());
  const DispatchCase send{.hidden = 64, .worst = 600};
  const CombineCase back{.hidden = 64};
  const CombineResult good = combine(rank, world, back, dispatch(rank, world, send).handle);
  rank.sync();
  rank.buffer().checkHealth();  // between nodes the victim may be gone before its rows are here
  expectCombine(rank, world, back, good);
  if (rank.rank() == kVictim && !insideCall) raise(SIGKILL);
  const DispatchResult sent = dispatch(rank, world, send);
  if (rank.rank() == kVictim) raise(SIGKILL);
  combine(rank, world, back, sent.handle);
  rank.sync();
  rank.buffer().checkHealth();
}

/// `limit`: milliseconds, 0 = the usual. A mode may end in "@ranks per node@transport".
BufferOptions optionsFor(const std::string& mode, int ranks, int limit) {
  BufferOptions options = mode.starts_with("lowLatency") ? decodingOptions(ranks) : testOptions();
  if (limit > 0) options.timeoutSeconds = limit / 1000.0;
  const std::size_t at = mode.find('@'), second = mode.find('@', at + 1);
  if (at != std::string::npos) {
    options.topology.ranksPerNode = std::stoi(mode.substr(at + 1));
    options.topology.transport = parseTransport(mode.substr(second + 1));
  }
  return options;
}

void runMode(const std::string& modeAndNodes, RankContext& rank) {
  const std::string mode = modeAndNodes.substr(0, modeAndNodes.find('@'));
  if (mode == "calls" || mode == "hosts") {
    if (mode == "hosts") {
      const Topology& topology = rank.buffer().topology();
      EXPECT_EQ(topology.nodes(), 2);
      EXPECT_NE(topology.nodeOf(0), topology.nodeOf(1));
      // Between hosts memory cannot be mapped.
      const bool verbs = ownTransport() == Transport::verbs;
      EXPECT_EQ(topology.transport(), verbs ? Transport::verbs : Transport::tcp);
    }
    runLayerCalls(rank);
    rank.sync();
    rank.buffer().destroy();
  } else if (mode == "lowLatency") {
    runDecodingCalls(rank);
    rank.buffer().destroy();
  } else {
    runUntilDeath(rank, mode == "inside");
  }
}

/// Arguments: rank, ranks, mode, limit. Says its error, or "ok", and fails when an expectation did.
int rankRole(const std::vector<std::string>& arguments) {
  const int rank = std::stoi(arguments.at(0)), ranks = std::stoi(arguments.at(1));
  const std::string error = errorOf([&] {
    const UniqueId id = UniqueId::fromString(std::getenv(kGroupVariable));
    RankContext context(std::make_shared<TcpBootstrap>(rank, ranks, id),
                        optionsFor(arguments.at(2), ranks, std::stoi(arguments.at(3))));
    runMode(arguments.at(2), context);
  });
  test::tellParent(error.empty() ? "ok" : error);
  return ::testing::UnitTest::GetInstance()->ad_hoc_test_result().Failed() ? 1 : 0;
}
const test::RoleRegistration kRankRole("ep_rank", rankRole);

struct Ending {
  std::string said;  ///< a child's last line
  int exitCode = 0;
};

/// Runs a group and returns rank 0's error; the children's endings, by rank, in `endings`.
/// `otherHost`: odd ranks say that they run on another host.
std::string runProcesses(int ranks, const std::string& mode, std::vector<Ending>& endings,
                         int limit = 0, bool otherHost = false) {
  const UniqueId id = TcpBootstrap::createUniqueId("127.0.0.1");
  std::vector<Child> children;
  for (int r = 1; r < ranks; ++r) {
    std::vector<std::string> variables = {std::string(kGroupVariable) + "=" + id.toString()};
    if (otherHost && r % 2 == 1) variables.emplace_back("MSCCLPP_HOST_ID=another");
    children.emplace_back("ep_rank",
                          std::vector<std::string>{std::to_string(r), std::to_string(ranks), mode,
                                                   std::to_string(limit)},
                          variables);
  }
  const auto bootstrap = std::make_shared<TcpBootstrap>(0, ranks, id);
  const std::string error = errorOf([&] {
    RankContext context(bootstrap, optionsFor(mode, ranks, limit));
    runMode(mode, context);
  });
  endings.resize(static_cast<std::size_t>(ranks));
  for (std::size_t r = 1; r < endings.size(); ++r) {
    endings[r].said = children[r - 1].hear();
    endings[r].exitCode = children[r - 1].wait();
  }
  return error;
}

bool enoughDevices(int ranks) {
  return testPlatform() == Platform::cpu || Device::count(testPlatform()) >= ranks;
}

/// All ranks end well.
void expectProcesses(int ranks, const std::string& mode, bool otherHost = false) {
  SCOPED_TRACE(std::to_string(ranks) + " ranks: " + mode);
  std::vector<Ending> endings;
  EXPECT_EQ(runProcesses(ranks, mode, endings, 0, otherHost), "");
  for (std::size_t r = 1; r < endings.size(); ++r) {
    EXPECT_EQ(endings[r].said, "ok") << "rank " << r;
    EXPECT_EQ(endings[r].exitCode, 0) << "rank " << r;
  }
}

TEST(EpProcesses, EveryCallOnFourRanks) {
  const int ranks = enoughDevices(4) ? 4 : 2;
  if (!enoughDevices(ranks)) GTEST_SKIP() << "needs " << ranks << " GPUs";
  expectProcesses(ranks, "calls");
}

std::string nodesOf(int ranksPerNode, Transport transport) {
  return "@" + std::to_string(ranksPerNode) + "@" + std::string(toString(transport));
}

TEST(EpProcesses, EveryCallBetweenNodes) {
  const int ranks = enoughDevices(4) ? 4 : 2;
  if (!enoughDevices(ranks)) GTEST_SKIP() << "needs " << ranks << " GPUs";
  for (const std::string& nodes :
       {nodesOf(2, ownTransport()), nodesOf(1, ownTransport()), nodesOf(2, Transport::tcp)}) {
    expectProcesses(ranks, "calls" + nodes);
  }
}

/// 1 x 4, 2 x 2, 4 x 1 and 3 + 1 ranks.
TEST(EpProcesses, LowLatencyInsideAndBetweenNodes) {
  const int ranks = enoughDevices(4) ? 4 : 2;
  if (!enoughDevices(ranks)) GTEST_SKIP() << "needs " << ranks << " GPUs";
  for (const std::string& nodes :
       {nodesOf(4, ownTransport()), nodesOf(2, ownTransport()), nodesOf(1, ownTransport()),
        nodesOf(3, ownTransport()), nodesOf(1, Transport::tcp), nodesOf(3, Transport::tcp)}) {
    expectProcesses(ranks, "lowLatency" + nodes);
  }
}

/// Nodes are found from the hosts, whose ranks alternate.
TEST(EpProcesses, EveryCallBetweenHosts) {
  if (!enoughDevices(4)) GTEST_SKIP() << "needs 4 GPUs";
  for (const int ranks : {2, 4, 5}) {
    if (!enoughDevices(ranks)) break;
    expectProcesses(ranks, "hosts", true);
  }
}

/// A connection that breaks says so at once; a rank of the own node, or one that waits for others
/// who wait, runs into the limit.
TEST(EpProcesses, AKilledRankOfAnotherNodeIsNamed) {
  if (!enoughDevices(3)) GTEST_SKIP() << "needs 3 GPUs";
  for (const std::string mode : {"before", "inside"}) {
    for (const std::string& nodes :
         {nodesOf(1, ownTransport()), nodesOf(2, ownTransport()), nodesOf(1, Transport::tcp)}) {
      SCOPED_TRACE(mode + nodes);
      std::vector<Ending> endings;
      const std::string mine = runProcesses(3, mode + nodes, endings, 4000);
      // Who saw it first may be gone, too, before the other one looks.
      const auto names = [](const std::string& text, const char* rank) {
        return text.find(rank) != std::string::npos;
      };
      const std::string& other = endings[1].said;
      EXPECT_TRUE(names(mine, "rank 2") || names(other, "rank 2")) << mine << "\n" << other;
      EXPECT_TRUE(names(mine, "rank 2") || names(mine, "to rank 1")) << mine;
      EXPECT_TRUE(names(other, "rank 2") || names(other, "to rank 0")) << other;
      EXPECT_EQ(endings[1].exitCode, 0);
      EXPECT_EQ(endings[kVictim].exitCode, 128 + SIGKILL);
    }
  }
}

class EpKilledRank : public ::testing::TestWithParam<const char*> {};

TEST_P(EpKilledRank, IsNamedByTheOthersInTime) {
  if (!enoughDevices(3)) GTEST_SKIP() << "needs 3 GPUs";
  const auto wanted = [](std::size_t rank, const std::string& text) {
    return rank == kVictim ||
           test::containsAll(text, {"timeout: EP timeout after", "waited for rank 2"});
  };
  test::expectAtSomeLimit(milliseconds(500), "EP timeout after", wanted, [](milliseconds limit) {
    std::vector<Ending> endings;
    const auto start = std::chrono::steady_clock::now();
    const std::string mine = runProcesses(3, GetParam(), endings, static_cast<int>(limit.count()));
    const auto taken = std::chrono::steady_clock::now() - start;
    EXPECT_LT(taken, limit + std::chrono::seconds(40)) << "the limit does not end the wait";
    EXPECT_EQ(endings[kVictim].exitCode, 128 + SIGKILL);
    EXPECT_EQ(endings[1].exitCode, 0);
    return std::vector<std::string>{mine, endings[1].said, endings[kVictim].said};
  });
}
INSTANTIATE_TEST_SUITE_P(Moments, EpKilledRank, ::testing::Values("before", "inside"),
                         [](const auto& test) { return std::string(test.param); });

}  // namespace
}  // namespace mscclpp::ep::testing
