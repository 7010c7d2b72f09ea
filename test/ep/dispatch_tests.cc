#include "ep/scenario.hpp"

namespace mscclpp::ep::testing {
namespace {

using reference::Pattern;

TEST(EpDispatch, SmallestCase) {
  const World world({.ranks = 2, .tokens = {5}, .topk = 2, .experts = 4});
  runRanks(2, testOptions(), [&](RankContext& rank) {
    const DispatchCase call{.hidden = 16};
    const DispatchResult result = dispatch(rank, world, call);
    expectDispatch(rank, world, call, result);
  });
}

TEST(EpCombine, SmallestCase) {
  const World world({.ranks = 2, .tokens = {5}, .topk = 2, .experts = 4});
  runRanks(2, testOptions(), [&](RankContext& rank) {
    const DispatchResult sent = dispatch(rank, world, {.hidden = 16});
    const CombineCase call{.hidden = 16};
    expectCombine(rank, world, call, combine(rank, world, call, sent.handle));
  });
}

}  // namespace
}  // namespace mscclpp::ep::testing
