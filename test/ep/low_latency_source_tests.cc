// Low-latency combines that are reduced at the tokens' home: equal to the reference bit for bit, in
// all shapes and halves, in turn with those that are reduced where the experts are; and what they
// need and refuse.
#include <cmath>

#include <gmock/gmock.h>

#include <mscclpp/env.hpp>

#include "ep/low_latency_scenario.hpp"

namespace mscclpp::ep::testing {
namespace {

using reference::Pattern;
using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::StartsWith;

/// Whether groups that do not say themselves what their nodes are have several.
bool spansNodes(int ranks) {
  return env().ranksPerNode.value_or(ranks) < ranks;
}
/// For what needs to be seen once only, not on nodes of every size.
bool nodesAreForced() {
  return env().ranksPerNode.has_value();
}

class EpLowLatencySource : public ::testing::TestWithParam<std::tuple<bool, int>> {};

/// Both ways call by call on one Buffer: signals are counted across them.
TEST_P(EpLowLatencySource, InTurnWithTheOtherWay) {
  const auto& [hook, ranks] = GetParam();
  const LowLatencyWorld world(
      {.ranks = ranks, .tokens = {7, 3, 5}, .topk = 3, .experts = 4 * ranks, .maxTokens = 9});
  constexpr int kHidden = 520;  // two passes on the CPU platform, the second with a part of a line
  runRanks(ranks, roomForBoth(world, kHidden), [&](RankContext& rank) {
    for (std::uint64_t id = 1; id <= 6; ++id) {
      lowLatencyRoundTrip(rank, world,
                          {.id = id,
                           .hidden = kHidden,
                           .fp8 = id == 4,
                           .hook = hook,
                           .outputs = id == 2,
                           .numSms = id == 5 ? 1 : 0,
                           .source = id != 3 && id != 4});
    }
  });
}
INSTANTIATE_TEST_SUITE_P(All, EpLowLatencySource,
                         ::testing::Combine(::testing::Bool(), ::testing::Values(1, 2, 4)),
                         [](const auto& test) {
                           return (std::get<0>(test.param) ? "Hook" : "Whole") +
                                  std::to_string(std::get<1>(test.param));
                         });

struct SourceShape {
  const char* name;
  int hidden, topk, experts, ranks;
};
constexpr SourceShape kShapes[] = {
    {"Hidden8", 8, 4, 128, 3},    {"Topk22", 456, 22, 512, 4}, {"Topk32", 24, 32, 40, 3},
    {"FewExperts", 136, 1, 3, 4}, {"FewLocal", 72, 5, 7, 4},   {"ManyRanks", 40, 6, 70, 7},
};
class EpLowLatencySourceShapes : public ::testing::TestWithParam<SourceShape> {};

TEST_P(EpLowLatencySourceShapes, RoundTrip) {
  const SourceShape& shape = GetParam();
  const LowLatencyWorld world({.ranks = shape.ranks,
                               .tokens = {4, 0, 3},
                               .topk = shape.topk,
                               .experts = shape.experts,
                               .pattern = Pattern::gaps});
  const BufferOptions options = sourceOptions(world, shape.hidden, spansNodes(shape.ranks));
  runRanks(shape.ranks, options, [&](RankContext& rank) {
    for (std::uint64_t id = 1; id <= 2; ++id) {
      lowLatencyRoundTrip(rank, world,
                          {.id = id, .hidden = shape.hidden, .hook = id == 2, .source = true});
    }
  });
}
INSTANTIATE_TEST_SUITE_P(Models, EpLowLatencySourceShapes, ::testing::ValuesIn(kShapes),
                         [](const auto& test) { return std::string(test.param.name); });

class EpLowLatencySourcePatterns : public ::testing::TestWithParam<Pattern> {};

TEST_P(EpLowLatencySourcePatterns, RoundTrip) {
  const LowLatencyWorld world({.ranks = 3,
                               .tokens = {20, 1, 0},
                               .topk = 4,
                               .experts = 12,
                               .pattern = GetParam(),
                               .maxTokens = 23});
  runRanks(3, sourceOptions(world, 72, spansNodes(3)), [&](RankContext& rank) {
    lowLatencyRoundTrip(rank, world, {.id = 1, .hidden = 72, .source = true});
    lowLatencyRoundTrip(rank, world, {.id = 2, .hidden = 72, .hook = true, .source = true});
    lowLatencyRoundTrip(rank, world, {.id = 3, .hidden = 72, .numSms = 1, .source = true});
  });
}
INSTANTIATE_TEST_SUITE_P(All, EpLowLatencySourcePatterns, ::testing::ValuesIn(reference::kPatterns),
                         [](const auto& test) { return std::string(nameOf(test.param)); });

/// Two hooks outstanding, one of either way, called in either order, with a whole call between.
TEST(EpLowLatencySource, TwoWaysUnderWay) {
  const LowLatencyWorld world({.ranks = 2, .tokens = {6, 5}, .topk = 2, .experts = 8});
  runRanks(2, roomForBoth(world, 64), [&](RankContext& rank) {
    void* const stream = rank.compute().native();
    const auto sent = lowLatencyDispatch(rank, world, {.id = 1});
    for (std::uint64_t id = 1; id <= 12; id += 3) {
      const LowLatencyCase first{.id = id, .hook = true, .source = id % 2 == 0};
      const LowLatencyCase second{.id = id + 1, .hook = true, .source = !first.source};
      const LowLatencyCase last{.id = id + 2, .source = id % 4 == 0};
      const auto a = lowLatencyCombine(rank, world, first, sent.handle);
      const auto b = lowLatencyCombine(rank, world, second, sent.handle);
      (id % 4 < 2 ? a : b).hook(stream);
      (id % 4 < 2 ? b : a).hook(stream);
      const auto c = lowLatencyCombine(rank, world, last, sent.handle);
      expectLowLatencyCombine(rank, world, first, a);
      expectLowLatencyCombine(rank, world, second, b);
      expectLowLatencyCombine(rank, world, last, c);
    }
  });
}

TEST(EpLowLatencySource, EpochsCrossTheWrap) {
  const LowLatencyWorld world({.ranks = 2, .tokens = {3, 4}, .topk = 2, .experts = 4});
  BufferOptions options = roomForBoth(world, 64);
  options.firstEpoch = 0xFFFFFFFCu;
  runRanks(2, options, [&](RankContext& rank) {
    for (std::uint64_t id = 1; id <= 7; ++id) {
      lowLatencyRoundTrip(rank, world, {.id = id, .hook = id % 3 == 0, .source = id != 4});
    }
  });
}

/// What is added at home is off by the last rounding alone, 2^-8 of the result at most; where
/// remote ranks' sums are rounded too, it is more.
TEST(EpLowLatencySource, RoundsOnce) {
  LowLatencySpec spec{.ranks = 2, .tokens = {8}, .topk = 4, .experts = 8};
  const LowLatencyWorld world(spec);
  double apart[2] = {};
  for (const bool source : {false, true}) {
    const LowLatencyCase call{.hidden = 256, .source = source};
    std::vector<std::vector<std::uint16_t>> y;
    for (int r = 0; r < 2; ++r) y.push_back(lowLatencyExperts(world, 1, call.hidden, r));
    const auto got = combinedReference(world, call, y, 0);
    const reference::Routing& routing = world.routing(0);
    for (std::size_t i = 0; i < got.size(); ++i) {
      const int t = static_cast<int>(i) / call.hidden, c = static_cast<int>(i) % call.hidden;
      double exact = 0, size = 0;
      for (int k = 0; k < spec.topk; ++k) {
        for (std::size_t r = 0; r < 2; ++r) {
          const int slot = world.received(static_cast<int>(r)).slotOf(0, t, k);
          if (slot < 0) continue;
          const double term =
              static_cast<double>(
                  routing.topkWeights[static_cast<std::size_t>(t * spec.topk + k)]) *
              reference::bf16ToFloat(y[r][static_cast<std::size_t>(slot * call.hidden + c)]);
          exact += term;
          size += std::abs(term);
        }
      }
      const double error = std::abs(reference::bf16ToFloat(got[i]) - exact);
      // The end's rounding, and what fp32 leaves.
      const double end = std::abs(exact) / 256 + size * 1e-6;
      if (source) {
        EXPECT_LE(error, end) << "value " << i;
      }
      apart[source ? 1 : 0] += error;
    }
  }
  EXPECT_LT(apart[1], 0.95 * apart[0]);
}

TEST(EpLowLatencySource, SizeHintIsExact) {
  const LowLatencyWorld world({.ranks = 2, .tokens = {6}, .topk = 8, .experts = 64});
  const BufferOptions enough = sourceOptions(world, 1024, spansNodes(2));
  const LowLatencyCase call{.hidden = 1024, .source = true};
  runRanks(2, enough, [&](RankContext& rank) { lowLatencyRoundTrip(rank, world, call); });
  BufferOptions less = enough;
  less.numRdmaBytes -= 4 * 128;
  const auto errors = tryRanks(
      2, [&](int) { return less; },
      [&](RankContext& rank) { lowLatencyRoundTrip(rank, world, call); });
  for (const std::string& error : errors) {
    EXPECT_THAT(error, AllOf(HasSubstr("combine_reduce = \"source\" needs num_rdma_bytes = " +
                                       std::to_string(enough.numRdmaBytes)),
                             HasSubstr(std::to_string(less.numRdmaBytes))));
  }
}

TEST(EpLowLatencySource, SizeHintCountsWhatIsNeeded) {
  const auto hint = [](int ranks, int experts, int topk, bool nodes) {
    return lowLatencySizeHint(
        128, 7168, ranks, experts,
        {.reduce = LowLatencyReduce::source, .topk = topk, .spansNodes = nodes});
  };
  constexpr std::size_t kRow = 128 * 128;  // 896 units in lines of 7
  const auto near = [](std::size_t bytes, double rows) {
    const double wanted = 4.0 * 128 * rows * kRow;
    EXPECT_GE(static_cast<double>(bytes), wanted);
    EXPECT_LE(static_cast<double>(bytes), wanted * 1.01);
  };
  near(hint(8, 256, 8, false), 8);     // as many selections as ranks
  near(hint(2, 256, 8, false), 8);     // more
  near(hint(64, 256, 8, false), 64);   // a dispatch needs more
  near(hint(2, 256, 8, true), 16);     // two parts of an area, and an outbox of 2 x 8
  near(hint(16, 256, 8, true), 128);   // an outbox of 16 ranks x 8 selections
  near(hint(64, 256, 8, true), 256);   // 4 experts on a rank
  near(hint(512, 512, 8, true), 512);  // one
  EXPECT_THAT(errorOf([&] { hint(2, 8, 33, false); }),
              HasSubstr("num_topk = 33 must be in 1 .. 32"));
  EXPECT_THAT(
      describeLowLatencySize(128, 7168, 16, 256, {.reduce = LowLatencyReduce::source, .topk = 8}),
      AllOf(StartsWith(std::to_string(hint(16, 256, 8, false))),
            HasSubstr("128 tokens x top-k 8 x a row of 16384")));
  EXPECT_THAT(
      describeLowLatencySize(128, 7168, 16, 256,
                             {.reduce = LowLatencyReduce::source, .topk = 8, .spansNodes = true}),
      AllOf(StartsWith(std::to_string(hint(16, 256, 8, true))), HasSubstr("16 ranks x 1024 rows")));
  EXPECT_EQ(lowLatencySizeHint(128, 7168, 8, 256),
            lowLatencySizeHint(128, 7168, 8, 256, LowLatencySizeOptions{}));
}

/// A rank that reduces the other way is named by those that reduce at home, unless it is on another
/// node: then the call times out.
TEST(EpLowLatencySource, UnequalWaysAreRefused) {
  if (nodesAreForced()) GTEST_SKIP() << "between nodes it is a timeout";
  const auto errors = combineUnequally({.id = 1, .source = true});
  EXPECT_THAT(errors[0], AllOf(StartsWith("invalidArgument: "),
                               HasSubstr("rank 1 called low_latency_combine with combine_reduce = "
                                         "\"rank\", rank 0 with combine_reduce = \"source\"")));
  EXPECT_NE(errors[1], "");
}

/// An outbox has room for different experts only.
TEST(EpLowLatencySource, RepeatedExpertsBetweenNodesAreNamed) {
  if (nodesAreForced()) GTEST_SKIP() << "makes nodes of its own";
  const bool cuda = testPlatform() == Platform::cuda;
  const LowLatencyWorld world({.ranks = 2, .tokens = {3}, .topk = 4, .experts = 2});
  BufferOptions options = roomForBoth(world, 64);
  options.topology = {.ranksPerNode = 1, .transport = cuda ? Transport::cudaIpc : Transport::shm};
  options.timeoutSeconds = 1;
  const auto errors = tryRanks(
      2, [&](int) { return options; },
      [&](RankContext& rank) {
        LowLatencyDispatchRequest out;
        out.x = rank.empty(DType::bf16, {1, 64});
        // The only token of rank 0 asks four times for the only expert of rank 1.
        out.topkIdx = rank.upload(DType::i64, {1, 4},
                                  std::vector<std::int64_t>(4, rank.rank() == 0 ? 1 : -1));
        out.maxTokens = 3;
        out.experts = 2;
        out.useFp8 = false;
        out.order = rank.order();
        const auto sent = rank.buffer().lowLatencyDispatch(out);
        LowLatencyCombineRequest back;
        back.x = sent.recvX;
        back.topkIdx = out.topkIdx;
        back.topkWeights = rank.empty(DType::f32, {1, 4});
        back.handle = sent.handle;
        back.reduce = LowLatencyReduce::source;
        back.order = rank.order();
        rank.buffer().lowLatencyCombine(back);
        rank.sync();
        rank.buffer().checkHealth();
      });
  EXPECT_THAT(errors[1], AllOf(HasSubstr("rank 0 has 4 selections on rank 1"),
                               HasSubstr("where 3 fit"), HasSubstr("topk_idx must differ")));
}

}  // namespace
}  // namespace mscclpp::ep::testing
