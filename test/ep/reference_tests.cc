// The reference itself, against cases worked out by hand.
#include <set>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "ext/ep/reference.hpp"

namespace mscclpp::ep::reference {
namespace {

using ::testing::ElementsAre;

/// Two ranks with two experts each. Rank 0: token 0 -> experts 0 and 3, token 1 -> 1 and nothing.
/// Rank 1: token 0 -> experts 3 and 2.
std::vector<Routing> twoRanks() {
  return {{2, 2, {0, 3, 1, -1}, {0.5f, 0.25f, 1.0f, 7.0f}}, {1, 2, {3, 2}, {0.125f, 2.0f}}};
}

TEST(EpReference, LayoutCountsATokenOncePerRank) {
  const Placement placement = Placement::blocks(4, 2);
  const Layout rank1 = layout(twoRanks()[1], placement);
  EXPECT_THAT(rank1.tokensPerRank, ElementsAre(0, 1));
  EXPECT_THAT(rank1.tokensPerExpert, ElementsAre(0, 0, 1, 1));
  EXPECT_THAT(rank1.isTokenInRank, ElementsAre(0, 1));
  const Layout rank0 = layout(twoRanks()[0], placement);
  EXPECT_THAT(rank0.tokensPerRank, ElementsAre(2, 1));
  EXPECT_THAT(rank0.isTokenInRank, ElementsAre(1, 1, 1, 0));
}

TEST(EpReference, DispatchOrdersByRankAndTokenAndRenumbersExperts) {
  const Received rank1 = dispatch(twoRanks(), Placement::blocks(4, 2), 1);
  ASSERT_EQ(rank1.count(), 2);
  EXPECT_EQ(rank1.rows[0].rank, 0);
  EXPECT_EQ(rank1.rows[0].token, 0);
  EXPECT_EQ(rank1.rows[1].rank, 1);
  EXPECT_THAT(rank1.rankOffset, ElementsAre(0, 1, 2));
  EXPECT_THAT(rank1.topkIdx, ElementsAre(-1, 1, 1, 0));
  EXPECT_THAT(rank1.topkWeights, ElementsAre(0.0f, 0.25f, 0.125f, 2.0f));
  EXPECT_THAT(rank1.tokensPerExpert, ElementsAre(1, 2));
  EXPECT_EQ(rank1.rowOf(1, 0), 1);
  EXPECT_EQ(rank1.rowOf(0, 1), -1);
  const std::vector<std::vector<std::uint8_t>> x = {{10, 11, 20, 21}, {30, 31}};
  EXPECT_THAT(gatherRows(rank1, x, 2), ElementsAre(10, 11, 30, 31));
}

TEST(EpReference, ExplicitPlacementNumbersExpertsPerRank) {
  const Placement placement = Placement::of({1, 0, 1, 1}, 2);
  EXPECT_THAT(placement.indexOf, ElementsAre(0, 0, 1, 2));
  EXPECT_THAT(placement.hostedBy, ElementsAre(1, 3));
  EXPECT_EQ(placement.expertAt(1, 2), 3);
}

TEST(EpReference, CombineAddsBiasesThenRanksInOrderAndRoundsOnce) {
  const auto bf = [](float value) { return floatToBf16(value); };
  const std::vector<Received> received = {dispatch(twoRanks(), Placement::blocks(4, 2), 0),
                                          dispatch(twoRanks(), Placement::blocks(4, 2), 1)};
  // Rank 0 holds (0,0) and (0,1); rank 1 holds (0,0) and (1,0).
  const std::vector<std::vector<std::uint16_t>> y = {{bf(0x1p30f), bf(2)}, {bf(-0x1p30f), bf(5)}};
  const std::vector<std::uint16_t> bias = {bf(3), bf(4)};
  CombineInput input{0, 2, 1, &received, &y, nullptr, nullptr};
  EXPECT_THAT(combine(input), ElementsAre(bf(0), bf(2)));
  input.bias0 = &bias;  // 3 + 2^30 loses the 3 in fp32: the order is visible
  EXPECT_THAT(combine(input), ElementsAre(bf(0), bf(6)));
  input.bias1 = &bias;
  EXPECT_THAT(combine(input), ElementsAre(bf(0), bf(10)));
  const std::vector<std::vector<float>> weights = {{1, 2, 3, 4}, {10, 20, 30, 40}};
  EXPECT_THAT(combineWeights({0, 2, 2, &received, &weights}), ElementsAre(11, 22, 3, 4));
  EXPECT_THAT(combineWeights({1, 1, 2, &received, &weights}), ElementsAre(30, 40));
}

TEST(EpReference, Bf16RoundsToNearestEven) {
  EXPECT_EQ(floatToBf16(1.0f), 0x3F80);
  EXPECT_EQ(floatToBf16(1.00390625f), 0x3F80);  // half way, even stays
  EXPECT_EQ(floatToBf16(1.01171875f), 0x3F82);  // half way, odd goes up
  EXPECT_EQ(floatToBf16(bf16ToFloat(0x7FC0)), 0x7FFF);
  EXPECT_EQ(floatToBf16(bf16ToFloat(0xFF80)), 0xFF80);
}

TEST(EpReference, GeneratorsDoWhatTheirNamesSay) {
  const Placement placement = Placement::blocks(16, 4);
  for (const Pattern pattern : kPatterns) {
    SCOPED_TRACE(nameOf(pattern));
    int chosen = 0, empty = 0, repeated = 0, foreign = 0, low = 0;
    for (int rank = 0; rank < 4; ++rank) {
      const Routing routing = makeRouting({pattern, 50, 4, rank, 7}, placement);
      ASSERT_EQ(routing.topkIdx.size(), 200u);
      for (std::size_t t = 0; t < 50; ++t) {
        std::set<std::int64_t> seen;
        for (std::size_t k = 0; k < 4; ++k) {
          const std::int64_t expert = routing.topkIdx[t * 4 + k];
          ASSERT_TRUE(expert >= -1 && expert < 16);
          expert < 0 ? ++empty : ++chosen;
          if (expert >= 0 && !seen.insert(expert).second) ++repeated;
          if (expert >= 0 && placement.rankOf[static_cast<std::size_t>(expert)] != 3) ++foreign;
          if (expert >= 0 && expert < 4) ++low;
        }
      }
    }
    EXPECT_EQ(chosen == 0, pattern == Pattern::nothing);
    EXPECT_EQ(repeated > 0, pattern == Pattern::duplicates);
    EXPECT_EQ(foreign == 0, pattern == Pattern::oneRank || pattern == Pattern::nothing);
    EXPECT_EQ(empty > 0, pattern == Pattern::nothing || pattern == Pattern::oneSender ||
                             pattern == Pattern::gaps);
    if (pattern == Pattern::skewed) {
      EXPECT_GT(low, chosen / 3);
    }
    if (pattern == Pattern::oneSender) {
      EXPECT_EQ(chosen, 200);
    }
  }
}

TEST(EpReference, KeyedRowsDiffer) {
  std::set<std::vector<std::uint16_t>> rows;
  for (std::uint64_t tensor : {1, 2}) {
    for (int rank : {0, 1, 2}) {
      for (int row : {0, 1, 5}) rows.insert(keyedBf16({tensor, rank, row}, 1, 8));
    }
  }
  EXPECT_EQ(rows.size(), 18u);
  const auto all = keyedBf16({1, 2, 0}, 6, 8);
  const auto last = keyedBf16({1, 2, 5}, 1, 8);
  EXPECT_TRUE(std::equal(last.begin(), last.end(), all.begin() + 40));
}

}  // namespace
}  // namespace mscclpp::ep::reference
