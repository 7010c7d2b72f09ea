#include <algorithm>

#include "ep/scenario.hpp"

namespace mscclpp::ep::testing {
namespace {

using reference::Pattern;

class EpDispatch : public ::testing::TestWithParam<std::tuple<int, Pattern>> {};

TEST_P(EpDispatch, EveryPatternInEveryFormat) {
  const auto [ranks, pattern] = GetParam();
  const World world({.ranks = ranks,
                     .tokens = {33, 0, 7, 128, 1},
                     .topk = 4,
                     .experts = 6 * ranks,
                     .pattern = pattern});
  runRanks(ranks, testOptions(), [&](RankContext& rank) {
    rank.poisonPool();
    std::vector<DispatchCase> calls = {
        {.id = 1, .hidden = 136, .numSms = 1, .alignment = 1},
        {.id = 2, .hidden = 136, .withTopk = false, .numSms = 2, .alignment = 7},
    };
    for (const Scales scales : {Scales::f32, Scales::i32, Scales::transposed, Scales::padded}) {
      for (const int hidden :
           {16, 136, 512, 640}) {  // 640: scales move 4 bytes, 512: 16 bytes each
        calls.push_back({.id = 10 + calls.size(),
                         .hidden = hidden,
                         .dtype = DType::e4m3,
                         .scales = scales,
                         .numSms = 3,
                         .alignment = 128});
      }
    }
    std::vector<DispatchResult> results;
    for (const DispatchCase& call : calls) results.push_back(dispatch(rank, world, call));
    for (std::size_t i = 0; i < calls.size(); ++i) {
      SCOPED_TRACE("call " + std::to_string(i));
      expectDispatch(rank, world, calls[i], results[i]);
    }
  });
}
INSTANTIATE_TEST_SUITE_P(All, EpDispatch,
                         ::testing::Combine(::testing::Values(1, 2, 5),
                                            ::testing::ValuesIn(reference::kPatterns)),
                         [](const auto& test) {
                           return std::to_string(std::get<0>(test.param)) + "Ranks_" +
                                  reference::nameOf(std::get<1>(test.param));
                         });

TEST(EpDispatchTokens, CountsAroundTheTileSizes) {
  // notify scans in tiles of its block, the planner takes chunks of 4 tokens.
  for (const int tokens : {0, 1, 2, 3, 4, 5, 63, 64, 65, 127, 128, 129}) {
    SCOPED_TRACE(tokens);
    const World world({.ranks = 3, .tokens = {tokens}, .topk = 3, .experts = 9});
    runRanks(3, testOptions(), [&](RankContext& rank) {
      const DispatchCase call{.hidden = 8, .numSms = 4};
      expectDispatch(rank, world, call, dispatch(rank, world, call));
    });
  }
}

TEST(EpDispatchTokens, UnalignedInputTakesTheSlowPath) {
  // A view that starts 8 bytes into an allocation: the copy engine wants 16.
  const World world({.ranks = 2, .tokens = {9}, .topk = 2, .experts = 4});
  runRanks(2, testOptions(), [&](RankContext& rank) {
    const DispatchCase call{.hidden = 64};
    DispatchRequest request = makeDispatch(rank, world, call);
    const Tensor shifted = rank.empty(DType::bf16, {world.tokens(rank.rank()) * 64 + 4});
    rank.device().copy(shifted.as<char>() + 8, request.x.data, request.x.bytes(), rank.compute());
    request.x.data = shifted.as<char>() + 8;
    expectDispatch(rank, world, call, rank.buffer().dispatch(request));
  });
}

TEST(EpDispatchMap, UnevenExpertsInBothModes) {
  const World world({.ranks = 4, .tokens = {40, 3}, .topk = 6, .experts = 31, .mapped = true});
  runRanks(4, testOptions(), [&](RankContext& rank) {
    for (const int worst : {0, 200}) {
      const DispatchCase call{.hidden = 40, .worst = worst, .alignment = 16};
      expectDispatch(rank, world, call, dispatch(rank, world, call));
    }
  });
}

TEST(EpDispatchCached, ReplaysARoutingWithOtherTypes) {
  const World world({.ranks = 4, .tokens = {50, 0, 9, 64}, .topk = 3, .experts = 8});
  const World other({.ranks = 4, .tokens = {5, 70}, .topk = 8, .experts = 64, .seed = 9});
  runRanks(4, testOptions(), [&](RankContext& rank) {
    const DispatchCase plain{.id = 1, .hidden = 72};
    const DispatchResult first = dispatch(rank, world, plain);
    const DispatchResult between = dispatch(rank, other, {.id = 2, .hidden = 32});
    std::vector<DispatchCase> calls = {
        {.id = 3, .hidden = 72},
        {.id = 4, .hidden = 72},
        {.id = 5, .hidden = 1024, .numSms = 4},
        {.id = 6, .hidden = 392, .dtype = DType::e4m3, .scales = Scales::padded},
        {.id = 7, .hidden = 392, .dtype = DType::e4m3, .scales = Scales::i32, .numSms = 1},
        {.id = 8, .hidden = 4104},  // above 8 KB: the other pipeline shape
    };
    std::vector<DispatchResult> results;
    for (DispatchCase& call : calls) {
      call.handle = first.handle;
      results.push_back(dispatch(rank, world, call));
    }
    expectDispatch(rank, world, plain, first);
    expectDispatch(rank, other, {.id = 2, .hidden = 32}, between);
    for (std::size_t i = 0; i < calls.size(); ++i) {
      SCOPED_TRACE("replay " + std::to_string(i));
      expectDispatch(rank, world, calls[i], results[i]);
    }
  });
}

class EpWorstCase : public ::testing::TestWithParam<int> {};  // rows beyond what is needed

TEST_P(EpWorstCase, UnusedRowsSayNoExpert) {
  const World world({.ranks = 3, .tokens = {20, 11, 0}, .topk = 4, .experts = 6});
  const int worst = std::max(world.maxRows(), world.maxTokens()) + GetParam();
  runRanks(3, testOptions(), [&](RankContext& rank) {
    rank.poisonPool();
    const DispatchCase send{.hidden = 48, .worst = worst};
    const DispatchResult sent = dispatch(rank, world, send);
    DispatchCase again{.id = 5, .hidden = 64};
    again.handle = sent.handle;
    const DispatchResult replay = dispatch(rank, world, again);
    const CombineCase back{.hidden = 48, .biases = 1, .weightColumns = 4};
    const CombineResult combined = combine(rank, world, back, sent.handle);
    expectDispatch(rank, world, send, sent);
    expectDispatch(rank, world, again, replay);
    expectCombine(rank, world, back, combined);
  });
}
INSTANTIATE_TEST_SUITE_P(Extra, EpWorstCase, ::testing::Values(0, 1, 100));

TEST(EpWorstCaseLimit, TooSmallIsANamedErrorWhereItHappens) {
  const World world(
      {.ranks = 3, .tokens = {20}, .topk = 6, .experts = 6, .pattern = Pattern::oneRank});
  const auto errors = tryRanks(
      3, [](int) { return testOptions(); },
      [&](RankContext& rank) {
        const DispatchResult sent = dispatch(rank, world, {.hidden = 48, .worst = 40});
        rank.sync();
        rank.buffer().checkHealth();
      });
  const std::string& error = errors[2];  // all 60 rows go there
  EXPECT_EQ(error.find("invalidArgument"), 0u) << error;
  EXPECT_NE(error.find("60 rows, more than num_worst_tokens = 40"), std::string::npos) << error;
  EXPECT_NE(error.find("raise num_worst_tokens"), std::string::npos) << error;
}

TEST(EpDispatchOrder, PreviousEventAndAsyncFinishAndOwners) {
  const World world({.ranks = 2, .tokens = {30}, .topk = 2, .experts = 4});
  runRanks(2, testOptions(), [&](RankContext& rank) {
    for (const bool commStreamOwns : {false, true}) {
      const DispatchCase call{.hidden = 64, .commStreamOwns = commStreamOwns};
      DispatchRequest request = makeDispatch(rank, world, call);
      request.order.previousEvent = rank.compute().record();
      request.order.asyncFinish = true;
      // Work after the event must not hold the communication up.
      const DispatchResult result = rank.buffer().dispatch(request);
      ASSERT_TRUE(result.event);
      rank.compute().wait(result.event);
      expectDispatch(rank, world, call, result);
    }
  });
}

}  // namespace
}  // namespace mscclpp::ep::testing
