// Node shapes and the choice of a transport.
#include <map>

#include <gtest/gtest.h>

#include <mscclpp/errors.hpp>
#include <mscclpp/topology.hpp>

#include "core/ranks.hpp"

namespace mscclpp {
namespace {

using test::expectError;
using test::failuresOfRanks;
using test::kLongTimeout;
using test::runRanks;

void discoverAll(int ranks, const std::function<TopologyOptions(int)>& options,
                 const std::function<void(const Topology&)>& look) {
  const UniqueId id = TcpBootstrap::createUniqueId();
  runRanks(ranks, [&](int rank) {
    TcpBootstrap group(rank, ranks, id, kLongTimeout);
    look(Topology::discover(group, Device::open(Platform::cpu), options(rank)));
    group.barrier();
  });
}

TEST(Topology, RanksOfOneHostAreOneNode) {
  discoverAll(
      3, [](int) { return TopologyOptions{}; },
      [](const Topology& topology) {
        EXPECT_EQ(topology.nodes(), 1);
        EXPECT_EQ(topology.ranks(), 3);
        EXPECT_FALSE(topology.transport());
        for (int peer = 0; peer < 3; ++peer) {
          EXPECT_EQ(topology.link(peer),
                    peer == topology.rank() ? LinkKind::self : LinkKind::memory);
          EXPECT_EQ(topology.localRank(peer), peer);
        }
        EXPECT_NE(topology.describe().find("3 ranks on 1 node"), std::string::npos)
            << topology.describe();
      });
}

TEST(Topology, AForcedShapeMakesNodesAlsoUnequalOnes) {
  discoverAll(
      5, [](int) { return TopologyOptions{.ranksPerNode = 2}; },
      [](const Topology& topology) {
        EXPECT_EQ(topology.nodes(), 3);
        EXPECT_EQ(topology.members(1), (std::vector<int>{2, 3}));
        EXPECT_EQ(topology.members(2), (std::vector<int>{4}));
        EXPECT_EQ(topology.localRank(3), 1);
        EXPECT_EQ(topology.transport(), Transport::shm);
        const int peer = topology.rank() == 0 ? 1 : 0;
        EXPECT_EQ(topology.link(peer), topology.rank() < 2 ? LinkKind::memory : LinkKind::port);
        EXPECT_NE(topology.describe().find("between nodes: shm (one host plays all nodes)"),
                  std::string::npos)
            << topology.describe();
        EXPECT_NE(topology.describe().find("rank 4 node 2"), std::string::npos);
      });
}

TEST(Topology, ATransportThatWasAskedForIsTakenOrRefused) {
  discoverAll(
      2, [](int) { return TopologyOptions{.ranksPerNode = 1, .transport = Transport::tcp}; },
      [](const Topology& topology) {
        EXPECT_EQ(topology.transport(), Transport::tcp);
        EXPECT_NE(topology.describe().find("tcp (asked for)"), std::string::npos);
      });
  // CPU ranks cannot use cuda_ipc: no rank goes on, and nothing else is taken instead.
  const UniqueId id = TcpBootstrap::createUniqueId();
  runRanks(2, [&](int rank) {
    TcpBootstrap group(rank, 2, id, kLongTimeout);
    expectError(ErrorCode::unsupported, {"rank 0", "cuda_ipc"}, [&] {
      Topology::discover(group, Device::open(Platform::cpu),
                         {.ranksPerNode = 1, .transport = Transport::cudaIpc});
    });
    group.barrier();
  });
}

TEST(Topology, RanksThatAskForDifferentThingsAreRefusedEverywhere) {
  const UniqueId id = TcpBootstrap::createUniqueId();
  runRanks(3, [&](int rank) {
    TcpBootstrap group(rank, 3, id, kLongTimeout);
    expectError(ErrorCode::invalidArgument, {"ranks per node", "is 2 on rank 0", "1 on rank 2"},
                [&] {
                  Topology::discover(group, Device::open(Platform::cpu),
                                     {.ranksPerNode = rank == 2 ? 1 : 2});
                });
    group.barrier();
  });
}

}  // namespace
}  // namespace mscclpp
