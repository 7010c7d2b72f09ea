// Groups whose ranks play several nodes on one host.
#include <array>
#include <string>

#include "ep/harness.hpp"
#include "ext/ep/kernels/internode_api.cuh"

namespace mscclpp::ep::testing {
namespace {

std::vector<Transport> transports() {
  if (testPlatform() == Platform::cuda) return {Transport::cudaIpc, Transport::tcp};
  return {Transport::shm, Transport::tcp};
}

BufferOptions nodeOptions(int ranksPerNode, Transport transport) {
  BufferOptions options = testOptions();
  options.topology = {.ranksPerNode = ranksPerNode, .transport = transport};
  return options;
}

TEST(EpPortPeers, GroupsSpanNodesAndEnd) {
  for (const Transport transport : transports()) {
    for (const auto& [ranks, perNode] : {std::pair{2, 1}, {4, 2}, {4, 1}, {4, 3}}) {
      SCOPED_TRACE(std::string(toString(transport)) + ", " + std::to_string(ranks) + " ranks, " +
                   std::to_string(perNode) + " per node");
      runRanks(ranks, nodeOptions(perNode, transport), [&, each = perNode](RankContext& rank) {
        const Topology& topology = rank.buffer().topology();
        EXPECT_EQ(topology.nodes(), (topology.ranks() + each - 1) / each);
        EXPECT_EQ(topology.transport(), transport);
        rank.buffer().checkHealth();
      });
    }
  }
}

/// What the kernels keep of nodes and ranks must fit into shared memory; a Buffer is refused else.
TEST(EpPortPeers, KernelsSayWhatTheyHaveRoomFor) {
  const InternodeKernels& kernels = cpu::internodeKernels();
  EXPECT_TRUE(kernels.fits(1, 1));
  EXPECT_TRUE(kernels.fits(8, 63));
  EXPECT_TRUE(kernels.fits(1, 500));
  EXPECT_FALSE(kernels.fits(1, 5000));
  EXPECT_FALSE(kernels.fits(5000, 1));
}

TEST(EpPortPeers, UnequalShapesAreRefusedOnEveryRank) {
  const auto errors = tryRanks(
      2, [](int rank) { return nodeOptions(1 + rank, transports().front()); }, [](RankContext&) {});
  for (const std::string& error : errors) {
    EXPECT_NE(error.find("ranks per node"), std::string::npos) << error;
    EXPECT_NE(error.find("1 on rank 0 and 2 on rank 1"), std::string::npos) << error;
  }
}

}  // namespace
}  // namespace mscclpp::ep::testing
