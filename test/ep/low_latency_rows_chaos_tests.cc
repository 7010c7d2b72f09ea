// Shapes that low-latency kernels treat in a way of their own, in order and under seeded chaos:
// rows of several warps or passes, quantised or not; more experts than a block counts at a time;
// combines whose halves follow each other; statistics.
#include <utility>

#include "ep/low_latency_scenario.hpp"
#include "ep/manual.hpp"

namespace mscclpp::ep::testing {
namespace {

using device::RuntimeConfig;
using reference::Pattern;

int ranksFor(std::uint64_t seed) {
  return underSanitizer() ? 2 : 2 + static_cast<int>(seed % 2);
}
/// Every third seed plays nodes of one rank.
BufferOptions withNodes(std::uint64_t seed, BufferOptions options) {
  if (seed % 3 != 0) return options;
  options.topology = {.ranksPerNode = 1,
                      .transport = seed / 3 % 2 == 0 ? Transport::shm : Transport::tcp};
  return options;
}
void endGroup(ManualGroup& group) {
  group.inThreads([](RankContext& rank) { rank.buffer().destroy(); });
}
std::size_t at(const RankContext& rank) {
  return static_cast<std::size_t>(rank.rank());
}

/// A block quantises one token after the other in the same shared memory, from which several warps
/// read; the second call's rows take two passes.
TEST(EpLowLatencyRows, QuantisedOneAfterTheOther) {
  underAllSchedules([](std::uint64_t seed, const RuntimeConfig& config) {
    const int ranks = ranksFor(seed);
    const LowLatencyWorld world(
        {.ranks = ranks, .tokens = {5, 7, 4}, .topk = 2, .experts = 2 * ranks, .seed = seed});
    ManualGroup group(ranks, withNodes(seed, lowLatencyOptions(world, 1024)));
    const auto call = [](int i) {
      return LowLatencyCase{.id = static_cast<std::uint64_t>(i) + 1,
                            .hidden = i == 0 ? 512 : 1024,
                            .fp8 = true,
                            .numSms = 2};
    };
    std::vector<LowLatencyDispatchResult> sent[2];
    std::vector<LowLatencyCombineResult> combined[2];
    ASSERT_TRUE(group.run(config, [&](RankContext& rank) {
      for (int i = 0; i < 2; ++i) {
        sent[i].push_back(lowLatencyDispatch(rank, world, call(i)));
        combined[i].push_back(lowLatencyCombine(rank, world, call(i), sent[i].back().handle));
      }
    })) << group.failure();
    group.forEach([&](RankContext& rank) {
      for (int i = 0; i < 2; ++i) {
        expectLowLatencyDispatch(rank, world, call(i), sent[i][at(rank)]);
        expectLowLatencyCombine(rank, world, call(i), combined[i][at(rank)]);
      }
    });
    for (auto& results : sent) results.clear();
    endGroup(group);
  });
}

/// More counts than fit into shared memory at a time, and ids of several lines.
TEST(EpLowLatencyRows, CountsInTwoRounds) {
  underAllSchedules([](std::uint64_t seed, const RuntimeConfig& config) {
    const LowLatencyWorld world({.ranks = 2,
                                 .tokens = {9, 15},
                                 .topk = 8,
                                 .experts = 2400,
                                 .pattern = Pattern::uniform,
                                 .seed = seed});
    ManualGroup group(2, withNodes(seed, lowLatencyOptions(world, 8)));
    const LowLatencyCase call{.hidden = 8, .numSms = 2};
    std::vector<LowLatencyDispatchResult> sent;
    ASSERT_TRUE(group.run(config, [&](RankContext& rank) {
      sent.push_back(lowLatencyDispatch(rank, world, call));
    })) << group.failure();
    group.forEach(
        [&](RankContext& rank) { expectLowLatencyDispatch(rank, world, call, sent[at(rank)]); });
    sent.clear();
    endGroup(group);
  });
}

/// Logarithmic rows of two passes follow each other through a block's shared memory, own tokens'
/// and peers'; a call in halves.
TEST(EpLowLatencyRows, EncodedOneAfterTheOther) {
  underAllSchedules([](std::uint64_t seed, const RuntimeConfig& config) {
    const int ranks = ranksFor(seed);
    const LowLatencyWorld world(
        {.ranks = ranks, .tokens = {3, 4, 2}, .topk = 2, .experts = 2 * ranks, .seed = seed});
    ManualGroup group(ranks, withNodes(seed, lowLatencyOptions(world, 520)));
    const auto call = [](int i) {
      return LowLatencyCase{.id = static_cast<std::uint64_t>(i) + 1,
                            .hidden = 520,
                            .hook = i == 1,
                            .logfmt = true,
                            .numSms = 1 + i};
    };
    std::vector<LowLatencyDispatchResult> sent;
    std::vector<LowLatencyCombineResult> combined[2];
    ASSERT_TRUE(group.run(config, [&](RankContext& rank) {
      sent.push_back(lowLatencyDispatch(rank, world, {.id = 1, .hidden = 520}));
      for (int i = 0; i < 2; ++i) {
        combined[i].push_back(lowLatencyCombine(rank, world, call(i), sent.back().handle));
      }
      combined[1].back().hook(rank.compute().native());
    })) << group.failure();
    group.forEach([&](RankContext& rank) {
      for (int i = 0; i < 2; ++i) {
        expectLowLatencyCombine(rank, world, call(i), combined[i][at(rank)]);
      }
    });
    sent.clear();
    for (auto& results : combined) results.clear();
    endGroup(group);
  });
}

/// What the second of two sends may overwrite, and the call after them, is known from the peers'
/// hellos alone: of the call between, which need not be received.
TEST(EpLowLatencyRows, CombineHalvesInARow) {
  underAllSchedules([](std::uint64_t seed, const RuntimeConfig& config) {
    const int ranks = ranksFor(seed);
    const LowLatencyWorld world({.ranks = ranks,
                                 .tokens = {5, 7, 3},
                                 .topk = 2,
                                 .experts = 2 * ranks,
                                 .pattern = Pattern::uniform,
                                 .seed = seed});
    ManualGroup group(ranks, withNodes(seed, lowLatencyOptions(world, 72)));
    constexpr int kCalls = 6;
    const auto call = [](int i) {
      return LowLatencyCase{.id = static_cast<std::uint64_t>(i) + 1,
                            .hidden = 72,
                            .hook = i % 5 != 0,  // whole, four in halves, whole
                            .numSms = 2};
    };
    std::vector<LowLatencyDispatchResult> sent;
    std::vector<LowLatencyCombineResult> got[kCalls];
    ASSERT_TRUE(group.run(config, [&](RankContext& rank) {
      void* const stream = rank.compute().native();
      sent.push_back(lowLatencyDispatch(rank, world, {.id = 1, .hidden = 72, .numSms = 2}));
      const auto combine = [&](int i) {
        got[i].push_back(lowLatencyCombine(rank, world, call(i), sent.back().handle));
      };
      combine(0);
      for (const int first : {1, 3}) {
        combine(first);
        combine(first + 1);
        got[first + static_cast<int>(seed % 2)].back().hook(stream);
        got[first + 1 - static_cast<int>(seed % 2)].back().hook(stream);
      }
      combine(5);
    })) << group.failure();
    group.forEach([&](RankContext& rank) {
      for (int i = 0; i < kCalls; ++i) {
        expectLowLatencyCombine(rank, world, call(i), got[i][at(rank)]);
      }
    });
    sent.clear();
    for (auto& results : got) results.clear();
    endGroup(group);
  });
}

/// A peer without tokens sends no weights for which anybody would have to wait, and its warps that
/// have no part of a row read weights that no sum tells about: only what it tells keeps the areas
/// apart, by a hello or, with enableShrink, by a word at the end.
TEST(EpLowLatencyRows, CombineWithAPeerThatHasNoTokens) {
  underAllSchedules([](std::uint64_t seed, const RuntimeConfig& config) {
    const int ranks = ranksFor(seed);
    LowLatencySpec spec{.ranks = ranks,
                        .tokens = {7, 0, 0},
                        .topk = 3,
                        .experts = 2 * ranks,
                        .pattern = Pattern::uniform,
                        .seed = seed};
    if (seed / 2 % 2 != 0) std::swap(spec.tokens[0], spec.tokens[1]);
    const LowLatencyWorld world(spec);
    BufferOptions options = lowLatencyOptions(world, 72);
    options.enableShrink = seed % 2 != 0;
    ManualGroup group(ranks, withNodes(seed, options));
    constexpr int kCalls = 4;
    const auto call = [](int i) {
      return LowLatencyCase{
          .id = static_cast<std::uint64_t>(i) + 1, .hidden = 72, .hook = i >= 2, .numSms = 2};
    };
    std::vector<LowLatencyDispatchResult> sent;
    std::vector<LowLatencyCombineResult> got[kCalls];
    ASSERT_TRUE(group.run(config, [&](RankContext& rank) {
      sent.push_back(lowLatencyDispatch(rank, world, {.id = 1, .hidden = 72, .numSms = 2}));
      for (int i = 0; i < kCalls; ++i) {
        if (i == 2 && world.tokens(rank.rank()) == 0) keepBusy(rank, 100);
        got[i].push_back(lowLatencyCombine(rank, world, call(i), sent.back().handle));
      }
      got[2].back().hook(rank.compute().native());
      got[3].back().hook(rank.compute().native());
    })) << group.failure();
    group.forEach([&](RankContext& rank) {
      for (int i = 0; i < kCalls; ++i) {
        expectLowLatencyCombine(rank, world, call(i), got[i][at(rank)]);
      }
    });
    sent.clear();
    for (auto& results : got) results.clear();
    endGroup(group);
  });
}

/// Four blocks wait for the same late peer and end together: what all of them waited is in the sum,
/// and later calls find that all have ended. In fair orders with many switches, so that every block
/// waits when the first event is reached.
TEST(EpLowLatencyRows, WaitsOfAllBlocksCount) {
  constexpr int kBlocks = 4;
  const LowLatencyWorld world({.ranks = 2, .tokens = {kBlocks, 0}, .topk = 2, .experts = 2});
  for (std::uint64_t seed = 1; seed <= 10 && !HasFailure(); ++seed) {
    SCOPED_TRACE("seed " + std::to_string(seed));
    RuntimeConfig config = RuntimeConfig::testing(seed, false);
    config.preemptPercent = 40;
    ManualGroup group(2, lowLatencyOptions(world, 40));
    device::Event waiting, late;
    Tensor waits;
    ASSERT_TRUE(group.run(config, [&](RankContext& rank) {
      const auto sent = lowLatencyDispatch(rank, world, {.hidden = 40, .numSms = kBlocks});
      LowLatencyCombineRequest request;
      request.x = rank.upload(DType::bf16, {world.localExperts(), 2 * kBlocks, 40},
                              lowLatencyExperts(world, 1, 40, rank.rank()));
      const reference::Routing& routing = world.routing(rank.rank());
      request.topkIdx = rank.upload(DType::i64, {routing.tokens, 2}, routing.topkIdx);
      request.topkWeights = rank.upload(DType::f32, {routing.tokens, 2}, routing.topkWeights);
      request.handle = sent.handle;
      request.numSms = kBlocks;
      request.order = rank.order();
      if (rank.rank() == 0) {
        request.waitTotals = waits = rank.upload(DType::i64, {2}, std::vector<std::int64_t>{5, 5});
      } else {
        auto& stream = *static_cast<device::Stream*>(rank.compute().native());
        keepBusy(rank, 400);
        waiting.record(stream);
        keepBusy(rank, 4000);
        late.record(stream);
      }
      rank.buffer().lowLatencyCombine(request);
      request.waitTotals = {};
      for (int i = 0; i < 2; ++i) rank.buffer().lowLatencyCombine(request);
    })) << group.failure();
    const auto got = group[0].download<std::int64_t>(waits);
    const auto least = static_cast<std::int64_t>(late.timestampNs() - waiting.timestampNs());
    EXPECT_EQ(got[0], 5) << "nobody waits for itself";
    EXPECT_GE(got[1], 5 + kBlocks * least);
  }
}

}  // namespace
}  // namespace mscclpp::ep::testing
