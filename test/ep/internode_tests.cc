// Dispatch and combine in groups whose ranks play several nodes on one host: every output equals
// the reference bit for bit.
#include "ep/nodes.hpp"

namespace mscclpp::ep::testing {
namespace {

using reference::Pattern;

class EpNodes : public ::testing::TestWithParam<NodeShape> {
 protected:
  const NodeShape shape_ = GetParam();

  WorldSpec spec(std::vector<int> tokens, Pattern pattern = Pattern::uniform) const {
    return {.ranks = shape_.ranks,
            .tokens = std::move(tokens),
            .topk = 4,
            .experts = 4 * shape_.ranks,
            .pattern = pattern};
  }
  /// BF16 and FP8 there, in place and staged back, enqueued together and checked at the end.
  void run(const World& world) const {
    runRanks(shape_.ranks, nodeOptions(shape_), [&](RankContext& rank) {
      rank.poisonPool();
      const DispatchCase bf16{.id = 1, .hidden = 136, .numSms = 3, .alignment = 4};
      const DispatchCase fp8{
          .id = 2, .hidden = 264, .dtype = DType::e4m3, .scales = Scales::transposed, .numSms = 2};
      const CombineCase inPlace{.id = 3, .hidden = 136, .biases = 1, .numSms = 2};
      const CombineCase staged{
          .id = 4, .hidden = 64, .inPool = false, .biases = 2, .weightColumns = 4, .numSms = 3};
      const DispatchResult first = dispatch(rank, world, bf16);
      const DispatchResult second = dispatch(rank, world, fp8);
      const CombineResult third = combine(rank, world, inPlace, first.handle);
      const CombineResult fourth = combine(rank, world, staged, second.handle);
      expectDispatch(rank, world, bf16, first);
      expectDispatch(rank, world, fp8, second);
      expectCombine(rank, world, inPlace, third);
      expectCombine(rank, world, staged, fourth);
    });
  }
};

TEST_P(EpNodes, FewTokens) {
  run(World(spec({1, 0})));
}
TEST_P(EpNodes, UnevenTokens) {
  run(World(spec({7, 33, 0, 129}, Pattern::skewed)));
}
TEST_P(EpNodes, ChoicesMissing) {
  run(World(spec({40, 3}, Pattern::gaps)));
}
TEST_P(EpNodes, NobodySends) {
  run(World(spec({20}, Pattern::nothing)));
}
TEST_P(EpNodes, OneRankGetsAll) {
  run(World(spec({50, 21}, Pattern::oneRank)));
}
TEST_P(EpNodes, ExplicitExpertMap) {
  WorldSpec mapped = spec({30, 5}, Pattern::duplicates);
  mapped.mapped = true;
  run(World(mapped));
}

TEST_P(EpNodes, LayoutCountsNodes) {
  const World world(spec({40, 3}, Pattern::gaps));
  runRanks(shape_.ranks, nodeOptions(shape_), [&](RankContext& rank) {
    const reference::Routing& routing = world.routing(rank.rank());
    LayoutRequest request;
    request.topkIdx = rank.upload(DType::i64, {routing.tokens, routing.topk}, routing.topkIdx);
    request.numExperts = world.placement().experts();
    request.order = rank.order();
    const LayoutResult counted = rank.buffer().getDispatchLayout(request);
    expectSame("tokens per node", tokensPerNode(world, rank.rank(), rank.buffer().topology()),
               rank.download<std::int32_t>(counted.numTokensPerRdmaRank));
  });
}

INSTANTIATE_TEST_SUITE_P(Shapes, EpNodes, ::testing::ValuesIn(nodeShapes()), nameOfShape);

}  // namespace
}  // namespace mscclpp::ep::testing
