#include "ep/scenario.hpp"

namespace mscclpp::ep::testing {
namespace {

using reference::Pattern;

class EpLayout : public ::testing::TestWithParam<std::tuple<int, Pattern>> {};

TEST_P(EpLayout, CountsEqualTheReference) {
  const auto [ranks, pattern] = GetParam();
  for (const bool mapped : {false, true}) {
    const World world({.ranks = ranks,
                       .tokens = {130, 0, 1, 65},
                       .topk = 5,
                       .experts = 12 * ranks,
                       .pattern = pattern,
                       .mapped = mapped});
    runRanks(ranks, testOptions(1 << 16), [&](RankContext& rank) {
      const reference::Routing& routing = world.routing(rank.rank());
      LayoutRequest request;
      request.topkIdx = rank.upload(DType::i64, {routing.tokens, routing.topk}, routing.topkIdx);
      request.numExperts = world.placement().experts();
      request.expertMap = expertMapOf(rank, world);
      request.order = rank.order();
      const LayoutResult result = rank.buffer().getDispatchLayout(request);
      const reference::Layout expected = reference::layout(routing, world.placement());
      expectSame("tokens per rank", expected.tokensPerRank,
                 rank.download<std::int32_t>(result.numTokensPerRank));
      expectSame("tokens per expert", expected.tokensPerExpert,
                 rank.download<std::int32_t>(result.numTokensPerExpert));
      expectSame("is_token_in_rank", expected.isTokenInRank,
                 rank.download<std::uint8_t>(result.isTokenInRank),
                 static_cast<std::size_t>(ranks));
    });
  }
}
INSTANTIATE_TEST_SUITE_P(All, EpLayout,
                         ::testing::Combine(::testing::Values(1, 3, 8),
                                            ::testing::ValuesIn(reference::kPatterns)),
                         [](const auto& test) {
                           return std::to_string(std::get<0>(test.param)) + "Ranks_" +
                                  reference::nameOf(std::get<1>(test.param));
                         });

TEST(EpLayoutEdges, TopkOneAnd32AndManyExperts) {
  for (const int topk : {1, 32}) {
    const World world({.ranks = 2, .tokens = {200}, .topk = topk, .experts = 896});
    runRanks(2, testOptions(1 << 16), [&](RankContext& rank) {
      const reference::Routing& routing = world.routing(rank.rank());
      LayoutRequest request;
      request.topkIdx = rank.upload(DType::i64, {routing.tokens, topk}, routing.topkIdx);
      request.numExperts = 896;
      request.order = rank.order();
      request.order.asyncFinish = true;  // the event is the only promise
      const LayoutResult result = rank.buffer().getDispatchLayout(request);
      result.event.synchronize();
      const reference::Layout expected = reference::layout(routing, world.placement());
      expectSame("tokens per expert", expected.tokensPerExpert,
                 rank.download<std::int32_t>(result.numTokensPerExpert));
    });
  }
}

}  // namespace
}  // namespace mscclpp::ep::testing
