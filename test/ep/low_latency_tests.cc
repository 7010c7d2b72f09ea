// Low-latency dispatch and combine: every output equals the reference bit for bit, for the formats,
// halves and shapes that exist, in any sequence.
#include <chrono>
#include <set>
#include <thread>

#include "ep/low_latency_scenario.hpp"
#include "ext/ep/low_latency_traffic.hpp"

namespace mscclpp::ep::testing {
namespace {

using reference::Pattern;

struct Format {
  const char* name;
  bool fp8, roundScale, ue8m0;
};
constexpr Format kFormats[] = {{"bf16", false, false, false},
                               {"fp8", true, false, false},
                               {"fp8round", true, true, false},
                               {"ue8m0", true, true, true}};

class EpLowLatencyFormats : public ::testing::TestWithParam<std::tuple<Format, bool, int>> {};

TEST_P(EpLowLatencyFormats, RoundTrip) {
  const auto& [format, hook, ranks] = GetParam();
  const LowLatencyWorld world(
      {.ranks = ranks, .tokens = {7, 3, 5}, .topk = 3, .experts = 4 * ranks, .maxTokens = 9});
  for (const int hidden : {8, 56, 264, 1152}) {
    SCOPED_TRACE("hidden " + std::to_string(hidden));
    runRanks(ranks, lowLatencyOptions(world, hidden), [&](RankContext& rank) {
      for (std::uint64_t id = 1; id <= 3; ++id) {
        lowLatencyRoundTrip(rank, world,
                            {.id = id,
                             .hidden = hidden,
                             .fp8 = format.fp8,
                             .roundScale = format.roundScale,
                             .ue8m0 = format.ue8m0,
                             .hook = hook,
                             .outputs = id == 2});
      }
    });
  }
}
INSTANTIATE_TEST_SUITE_P(All, EpLowLatencyFormats,
                         ::testing::Combine(::testing::ValuesIn(kFormats), ::testing::Bool(),
                                            ::testing::Values(1, 2, 4)),
                         [](const auto& test) {
                           return std::string(std::get<0>(test.param).name) +
                                  (std::get<1>(test.param) ? "Hook" : "Whole") +
                                  std::to_string(std::get<2>(test.param));
                         });

struct LowLatencyShape {
  const char* name;
  int hidden, topk, experts, ranks;
};
constexpr LowLatencyShape kShapes[] = {
    {"DeepSeekV3", 7168, 8, 256, 2}, {"GptOss", 2880, 4, 128, 3},     {"KimiK3", 3584, 16, 896, 2},
    {"LongCat2", 8192, 12, 768, 2},  {"Nemotron3", 1024, 22, 512, 4}, {"Mixtral", 4096, 2, 8, 8},
    {"Topk32", 24, 32, 40, 3},       {"FewExperts", 136, 1, 3, 4},    {"ManyRanks", 40, 6, 70, 7},
    {"Wide", 16384, 2, 6, 2},
};
class EpLowLatencyShapes : public ::testing::TestWithParam<LowLatencyShape> {};

TEST_P(EpLowLatencyShapes, RoundTrip) {
  const LowLatencyShape& shape = GetParam();
  const LowLatencyWorld world({.ranks = shape.ranks,
                               .tokens = {4, 0, 3},
                               .topk = shape.topk,
                               .experts = shape.experts,
                               .pattern = Pattern::gaps});
  runRanks(shape.ranks, lowLatencyOptions(world, shape.hidden), [&](RankContext& rank) {
    lowLatencyRoundTrip(rank, world, {.id = 1, .hidden = shape.hidden});
    lowLatencyRoundTrip(rank, world, {.id = 2, .hidden = shape.hidden, .fp8 = true, .hook = true});
  });
}
INSTANTIATE_TEST_SUITE_P(Models, EpLowLatencyShapes, ::testing::ValuesIn(kShapes),
                         [](const auto& test) { return std::string(test.param.name); });

class EpLowLatencyPatterns : public ::testing::TestWithParam<Pattern> {};

TEST_P(EpLowLatencyPatterns, RoundTrip) {
  const LowLatencyWorld world({.ranks = 3,
                               .tokens = {20, 1, 0},
                               .topk = 4,
                               .experts = 12,
                               .pattern = GetParam(),
                               .maxTokens = 33});
  runRanks(3, lowLatencyOptions(world, 72), [&](RankContext& rank) {
    lowLatencyRoundTrip(rank, world, {.id = 1, .hidden = 72});
    lowLatencyRoundTrip(rank, world, {.id = 2, .hidden = 72, .hook = true});
    lowLatencyRoundTrip(rank, world, {.id = 3, .hidden = 72, .fp8 = true, .numSms = 1});
  });
}
INSTANTIATE_TEST_SUITE_P(All, EpLowLatencyPatterns, ::testing::ValuesIn(reference::kPatterns),
                         [](const auto& test) { return std::string(nameOf(test.param)); });

/// Shapes alternate on one Buffer: what one leaves behind must never look like another's message.
TEST(EpLowLatency, ShapesAlternateWithoutCleaning) {
  const LowLatencyWorld a(
      {.ranks = 2, .tokens = {9, 4}, .topk = 8, .experts = 16, .maxTokens = 16});
  const LowLatencyWorld b({.ranks = 2, .tokens = {30}, .topk = 2, .experts = 6, .maxTokens = 31});
  BufferOptions options = lowLatencyOptions(a, 1024);
  options.numRdmaBytes = std::max(options.numRdmaBytes, lowLatencyOptions(b, 264).numRdmaBytes);
  runRanks(2, options, [&](RankContext& rank) {
    for (std::uint64_t id = 1; id <= 12; ++id) {
      const bool first = reference::mix({id}) % 2 == 0;
      lowLatencyRoundTrip(
          rank, first ? a : b,
          {.id = id, .hidden = first ? 1024 : 264, .fp8 = id % 3 == 0, .hook = id % 4 == 1});
    }
  });
}

/// Two hooks outstanding, called in either order, with a whole call between.
TEST(EpLowLatency, TwoCallsUnderWay) {
  const LowLatencyWorld world({.ranks = 2, .tokens = {6, 5}, .topk = 2, .experts = 8});
  runRanks(2, lowLatencyOptions(world, 64), [&](RankContext& rank) {
    void* const stream = rank.compute().native();
    for (std::uint64_t id = 1; id <= 12; id += 3) {
      const LowLatencyCase first{.id = id, .hook = true}, second{.id = id + 1, .hook = true};
      const auto a = lowLatencyDispatch(rank, world, first);
      const auto b = lowLatencyDispatch(rank, world, second);
      (id % 2 != 0 ? a : b).hook(stream);
      (id % 2 != 0 ? b : a).hook(stream);
      const auto c = lowLatencyCombine(rank, world, first, a.handle);
      const LowLatencyCase between{.id = id + 2};
      const auto d = lowLatencyCombine(rank, world, between, b.handle);
      c.hook(stream);
      expectLowLatencyDispatch(rank, world, first, a);
      expectLowLatencyDispatch(rank, world, second, b);
      expectLowLatencyCombine(rank, world, first, c);
      expectLowLatencyCombine(rank, world, between, d);
    }
  });
}

TEST(EpLowLatency, EpochsCrossTheWrap) {
  const LowLatencyWorld world({.ranks = 2, .tokens = {3, 4}, .topk = 2, .experts = 4});
  for (const std::uint32_t first : {0x7FFFFFFDu, 0xFFFFFFFCu}) {
    BufferOptions options = lowLatencyOptions(world, 64);
    options.firstEpoch = first;
    runRanks(2, options, [&](RankContext& rank) {
      for (std::uint64_t id = 1; id <= 7; ++id) {
        lowLatencyRoundTrip(rank, world, {.id = id, .hook = id % 3 == 0});
      }
    });
  }
}

TEST(EpLowLatency, StatisticsAddUp) {
  const LowLatencyWorld world({.ranks = 2, .tokens = {6, 5}, .topk = 2, .experts = 8});
  runRanks(2, lowLatencyOptions(world, 64), [&](RankContext& rank) {
    const reference::Routing& routing = world.routing(rank.rank());
    LowLatencyDispatchRequest request;
    request.x = rank.upload(DType::bf16, {routing.tokens, 64},
                            reference::keyedBf16({1, rank.rank(), 0}, routing.tokens, 64));
    request.topkIdx = rank.upload(DType::i64, {routing.tokens, routing.topk}, routing.topkIdx);
    request.maxTokens = world.maxTokens();
    request.experts = 8;
    request.expertTotals = rank.upload(DType::i32, {4}, std::vector<std::int32_t>{100, 0, 0, 7});
    request.waitTotals = rank.upload(DType::i64, {2, 2}, std::vector<std::int64_t>(4, 5));
    request.order = rank.order();
    for (int i = 0; i < 3; ++i) rank.buffer().lowLatencyDispatch(request);
    std::vector<std::int32_t> totals = {100, 0, 0, 7};
    for (std::size_t e = 0; e < 4; ++e) totals[e] += 3 * world.received(rank.rank()).count[e];
    expectSame("totals", totals, rank.download<std::int32_t>(request.expertTotals));
    const auto waits = rank.download<std::int64_t>(request.waitTotals);
    const auto mine = static_cast<std::size_t>(rank.rank()), other = 1 - mine;
    EXPECT_EQ(waits[2 * other], 5);
    EXPECT_EQ(waits[2 * other + 1], 5);
    EXPECT_EQ(waits[3 * mine], 5) << "nobody waits for itself";
    EXPECT_GT(waits[2 * mine + other], 5);
  });
}

/// What goes to other nodes is one put of a dispatch and two of a combine per peer (reduced at
/// home: one, and a signal), and an add for each call: what traffic-ll says.
class EpLowLatencyMessages : public ::testing::TestWithParam<bool> {};

TEST_P(EpLowLatencyMessages, ProxiesCarryAsManyAsWorkedOut) {
  const bool source = GetParam();
  const LowLatencyWorld world({.ranks = 4, .tokens = {6, 0, 9}, .topk = 3, .experts = 8});
  runRanks(4, roomForBoth(world, 64), [&](RankContext& rank) {
    const Topology& topology = rank.buffer().topology();
    constexpr std::uint64_t kTrips = 3;
    for (std::uint64_t i = 0; i < kTrips; ++i) {
      const auto sent = lowLatencyDispatch(rank, world, {.id = 10 + i});
      lowLatencyCombine(rank, world, {.id = 20 + i, .source = source}, sent.handle);
    }
    rank.sync();
    const int perNode = static_cast<int>(topology.members(0).size());
    const LowLatencyRoundTrip trip = lowLatencyTraffic({.ranks = 4,
                                                        .ranksPerNode = perNode,
                                                        .tokens = world.maxTokens(),
                                                        .hidden = 64,
                                                        .topk = 3,
                                                        .experts = 8,
                                                        .source = source});
    const double each = trip.dispatch.puts + trip.dispatch.adds + trip.combine.puts +
                        trip.combine.signals + trip.combine.adds;
    const auto expected = static_cast<std::uint64_t>(each * kTrips);
    const auto carried = [&] {
      std::uint64_t triggers = 0;
      for (const ProxyStatistics& one : rank.buffer().proxyStatistics()) triggers += one.triggers;
      return triggers;
    };
    const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(20);
    while (carried() < expected && std::chrono::steady_clock::now() < end)
      std::this_thread::yield();
    EXPECT_EQ(carried(), expected);
    EXPECT_EQ(expected == 0, topology.nodes() == 1);
  });
}

INSTANTIATE_TEST_SUITE_P(Reduced, EpLowLatencyMessages, ::testing::Bool(), [](const auto& test) {
  return std::string(test.param ? "AtHome" : "WhereTheExpertsAre");
});

TEST(EpLowLatency, TrafficIsThatOfTheRouting) {
  ep::LowLatencyShape shape{.ranks = 6,
                            .ranksPerNode = 4,
                            .tokens = 50,
                            .hidden = 264,
                            .topk = 3,
                            .experts = 12,
                            .fp8 = false,
                            .seed = 7};
  const LowLatencyRoundTrip trip = lowLatencyTraffic(shape);
  // Nodes of 4 and 2: 4 ranks have 2 peers in the other node, 2 have 4.
  EXPECT_DOUBLE_EQ(trip.dispatch.puts, (4 * 2 + 2 * 4) / 6.0);
  EXPECT_DOUBLE_EQ(trip.combine.puts, 2 * trip.dispatch.puts);
  EXPECT_DOUBLE_EQ(trip.dispatch.adds, trip.dispatch.puts);
  const reference::Placement placement = reference::lowLatencyPlacement(12, 6);
  double near = 0, far = 0, selections = 0, nearSelections = 0;
  for (int source = 0; source < 6; ++source) {
    const reference::Routing routing =
        reference::makeRouting({reference::Pattern::uniform, 50, 3, source, 7}, placement);
    for (std::size_t t = 0; t < 50; ++t) {
      std::set<int> ranks;
      for (std::size_t k = 0; k < 3; ++k) {
        const int rank = placement.rankOf[static_cast<std::size_t>(routing.topkIdx[t * 3 + k])];
        ranks.insert(rank);
        if (rank / 4 != source / 4) ++selections;
        if (rank / 4 == source / 4 && rank != source) ++nearSelections;
      }
      ranks.erase(source);
      for (const int rank : ranks) ++(rank / 4 == source / 4 ? near : far);
    }
  }
  // 33 units of 8 values make 5 lines; 150 ids 3 lines; a token's weights one line.
  const double ids = 3 * 128, weights = 50 * 128, row = 5 * 128, nearPeers = (4 * 3 + 2 * 1) / 6.0;
  EXPECT_DOUBLE_EQ(trip.dispatch.memoryBytes, nearPeers * ids + near / 6 * row);
  EXPECT_DOUBLE_EQ(trip.dispatch.putBytes, trip.dispatch.puts * ids + far / 6 * row);
  EXPECT_DOUBLE_EQ(trip.combine.memoryBytes, nearPeers * weights + near / 6 * row);
  EXPECT_DOUBLE_EQ(trip.combine.putBytes, far / 6 * (128 + row));
  EXPECT_DOUBLE_EQ(trip.dispatch.rows, selections / 6);
  EXPECT_DOUBLE_EQ(trip.combine.rowBytes, selections / 6 * 264 * 2);
  shape.source = true;
  const LowLatencyTraffic rows = lowLatencyTraffic(shape).combine;
  EXPECT_DOUBLE_EQ(rows.memoryBytes, nearSelections / 6 * row);
  EXPECT_DOUBLE_EQ(rows.putBytes, selections / 6 * row);
  EXPECT_DOUBLE_EQ(rows.puts, trip.dispatch.puts);
  EXPECT_DOUBLE_EQ(rows.signals, trip.dispatch.puts);
}

TEST(EpLowLatency, SizeHintIsExact) {
  const LowLatencyWorld world({.ranks = 2, .tokens = {6}, .topk = 32, .experts = 64});
  const BufferOptions enough = lowLatencyOptions(world, 1024);
  runRanks(2, enough,
           [&](RankContext& rank) { lowLatencyRoundTrip(rank, world, {.hidden = 1024}); });
  BufferOptions less = enough;
  less.numRdmaBytes -= 4 * 128;
  const auto errors = tryRanks(
      2, [&](int) { return less; },
      [&](RankContext& rank) { lowLatencyRoundTrip(rank, world, {.hidden = 1024}); });
  for (const std::string& error : errors) {
    EXPECT_NE(error.find("needs num_rdma_bytes = " + std::to_string(enough.numRdmaBytes)),
              std::string::npos)
        << error;
  }
  EXPECT_EQ(lowLatencySizeHint(128, 7168, 8, 8), lowLatencySizeHint(128, 7168, 8, 4096));
}

}  // namespace
}  // namespace mscclpp::ep::testing
