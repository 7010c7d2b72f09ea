// Low-latency combine with use_logfmt: what comes out is the reference's bit for bit.
#include <gmock/gmock.h>

#include <mscclpp/env.hpp>

#include "ep/low_latency_scenario.hpp"

namespace mscclpp::ep::testing {
namespace {

using reference::Pattern;
using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::StartsWith;

class EpLowLatencyLogfmt : public ::testing::TestWithParam<std::tuple<bool, int>> {};

/// Rows shorter than a line, of whole and partial blocks, and of several passes.
TEST_P(EpLowLatencyLogfmt, RoundTrip) {
  const auto& [hook, ranks] = GetParam();
  const LowLatencyWorld world(
      {.ranks = ranks, .tokens = {7, 3, 5}, .topk = 3, .experts = 4 * ranks, .maxTokens = 9});
  runRanks(ranks, lowLatencyOptions(world, 1152), [&](RankContext& rank) {
    for (const int hidden : {8, 56, 264, 448, 1152}) {
      SCOPED_TRACE("hidden " + std::to_string(hidden));
      lowLatencyRoundTrip(
          rank, world, {.id = 1, .hidden = hidden, .hook = hook, .logfmt = true, .outputs = true});
    }
  });
}
INSTANTIATE_TEST_SUITE_P(All, EpLowLatencyLogfmt,
                         ::testing::Combine(::testing::Bool(), ::testing::Values(1, 2, 4)),
                         [](const auto& test) {
                           return std::string(std::get<0>(test.param) ? "Hook" : "Whole") +
                                  std::to_string(std::get<1>(test.param));
                         });

/// One block has all tokens: rows follow each other through its shared memory.
TEST(EpLowLatencyLogfmtCalls, LongRowsManyChoicesOneBlock) {
  const LowLatencyWorld world({.ranks = 3, .tokens = {4, 0, 3}, .topk = 12, .experts = 48});
  runRanks(3, lowLatencyOptions(world, 7168), [&](RankContext& rank) {
    lowLatencyRoundTrip(rank, world, {.id = 1, .hidden = 7168, .logfmt = true, .numSms = 1});
    lowLatencyRoundTrip(rank, world, {.id = 2, .hidden = 7168, .hook = true, .logfmt = true});
  });
}

class EpLowLatencyLogfmtPatterns : public ::testing::TestWithParam<Pattern> {};

TEST_P(EpLowLatencyLogfmtPatterns, RoundTrip) {
  const LowLatencyWorld world({.ranks = 3,
                               .tokens = {20, 1, 0},
                               .topk = 4,
                               .experts = 12,
                               .pattern = GetParam(),
                               .maxTokens = 33});
  runRanks(3, lowLatencyOptions(world, 72), [&](RankContext& rank) {
    lowLatencyRoundTrip(rank, world, {.id = 1, .hidden = 72, .logfmt = true});
  });
}
INSTANTIATE_TEST_SUITE_P(All, EpLowLatencyLogfmtPatterns, ::testing::ValuesIn(reference::kPatterns),
                         [](const auto& test) { return std::string(nameOf(test.param)); });

/// The same region serves both formats in turn, also when two calls are under way.
TEST(EpLowLatencyLogfmtCalls, FormatsAlternate) {
  const LowLatencyWorld world({.ranks = 2, .tokens = {6, 5}, .topk = 2, .experts = 8});
  runRanks(2, lowLatencyOptions(world, 520), [&](RankContext& rank) {
    for (std::uint64_t id = 1; id <= 8; ++id) {
      lowLatencyRoundTrip(rank, world,
                          {.id = id,
                           .hidden = id % 3 == 0 ? 520 : 64,
                           .hook = id % 4 == 1,
                           .logfmt = reference::mix({id}) % 2 == 0});
    }
    const LowLatencyCase first{.id = 20, .hook = true, .logfmt = true};
    const LowLatencyCase second{.id = 21, .hook = true}, third{.id = 22, .logfmt = true};
    const auto sent = lowLatencyDispatch(rank, world, {.id = 20});
    const auto a = lowLatencyCombine(rank, world, first, sent.handle);
    const auto b = lowLatencyCombine(rank, world, second, sent.handle);
    b.hook(rank.compute().native());
    a.hook(rank.compute().native());
    const auto c = lowLatencyCombine(rank, world, third, sent.handle);
    expectLowLatencyCombine(rank, world, first, a);
    expectLowLatencyCombine(rank, world, second, b);
    expectLowLatencyCombine(rank, world, third, c);
  });
}

TEST(EpLowLatencyLogfmtCalls, NotWithRowsOfSingleSelections) {
  const LowLatencyWorld world({.ranks = 1, .tokens = {4}, .topk = 2, .experts = 4});
  runRanks(1, roomForBoth(world, 64), [&](RankContext& rank) {
    const auto sent = lowLatencyDispatch(rank, world, {.id = 1});
    const std::string text = errorOf([&] {
      lowLatencyCombine(rank, world, {.id = 1, .logfmt = true, .source = true}, sent.handle);
    });
    EXPECT_THAT(text, AllOf(StartsWith("invalidArgument: use_logfmt = true"),
                            HasSubstr("combine_reduce = \"rank\"")));
    rank.sync();
  });
}

/// A rank that sends the other format is named by those with this one, unless it is on another
/// node: then the call most often times out.
TEST(EpLowLatencyLogfmtCalls, UnequalFormatsAreRefused) {
  if (env().ranksPerNode.value_or(2) < 2) GTEST_SKIP() << "no hello between nodes";
  const auto errors = combineUnequally({.id = 1, .logfmt = true});
  EXPECT_THAT(errors[0], AllOf(StartsWith("invalidArgument: "),
                               HasSubstr("rank 1 called low_latency_combine with combine_reduce = "
                                         "\"rank\", rank 0 with use_logfmt = True")));
}

}  // namespace
}  // namespace mscclpp::ep::testing
