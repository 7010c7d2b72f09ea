// Sequences of low-latency calls without any host wait, in order and under seeded chaos; under TSan
// every missing order is a report. tools/mutation.py asks these tests too.
#include <algorithm>

#include "ep/low_latency_scenario.hpp"
#include "ep/manual.hpp"

namespace mscclpp::ep::testing {
namespace {

using device::RuntimeConfig;
using reference::Pattern;

constexpr Pattern kBusyPatterns[] = {Pattern::uniform, Pattern::skewed, Pattern::gaps,
                                     Pattern::duplicates, Pattern::oneRank};

LowLatencySpec smallWorld(std::uint64_t seed, std::uint64_t which = 0) {
  const auto pick = [&](std::uint64_t key, std::uint64_t count) {
    return static_cast<int>(reference::mix({seed, which, key}) % count);
  };
  const int ranks = underSanitizer() ? 2 : 2 + static_cast<int>(reference::mix({seed}) % 3);
  return {.ranks = ranks,
          .tokens = {pick(1, 5), 1 + pick(2, 7), pick(3, 9)},
          .topk = 1 + pick(4, 4),
          .experts = 3 * ranks - pick(6, 3),
          .pattern = kBusyPatterns[pick(5, 5)],
          .maxTokens = 9,
          .seed = reference::mix({seed, which})};
}

struct Outcome {
  LowLatencyDispatchResult sent[4];
  LowLatencyCombineResult combined[4];
};
using Outcomes = std::vector<Outcome>;

Outcome& of(Outcomes& outcomes, const RankContext& rank) {
  return outcomes[static_cast<std::size_t>(rank.rank())];
}

BufferOptions roomFor(const LowLatencyWorld& a, const LowLatencyWorld& b, int hidden) {
  BufferOptions options = lowLatencyOptions(a, hidden);
  options.numRdmaBytes = std::max(options.numRdmaBytes, lowLatencyOptions(b, hidden).numRdmaBytes);
  return options;
}

/// Every third seed plays nodes: of one rank or two, behind shm or tcp.
BufferOptions withNodes(std::uint64_t seed, BufferOptions options) {
  if (seed % 3 != 0) return options;
  options.topology = {.ranksPerNode = 1 + static_cast<int>(seed / 3 % 2),
                      .transport = seed / 6 % 2 == 0 ? Transport::shm : Transport::tcp};
  return options;
}
/// Proxies serve the peers until all is done.
void endGroup(ManualGroup& group) {
  group.inThreads([](RankContext& rank) { rank.buffer().destroy(); });
}

/// Whole calls back to back: the areas are used again and again while peers are late.
TEST(EpLowLatencySequence, RoundTripsInARow) {
  underAllSchedules([](std::uint64_t seed, const RuntimeConfig& config) {
    const LowLatencyWorld a(smallWorld(seed)), b(smallWorld(seed, 1));
    const int sms = 1 + static_cast<int>(seed % 3);
    ManualGroup group(a.ranks(), withNodes(seed, roomFor(a, b, 264)));
    Outcomes got(static_cast<std::size_t>(a.ranks()));
    const auto world = [&](int i) -> const LowLatencyWorld& { return i % 2 == 0 ? a : b; };
    const auto call = [&](int i) {
      return LowLatencyCase{.id = static_cast<std::uint64_t>(i) + 1,
                            .hidden = i % 2 == 0 ? 264 : 40,
                            .fp8 = i == 2,
                            .numSms = sms};
    };
    ASSERT_TRUE(group.run(config, [&](RankContext& rank) {
      Outcome& mine = of(got, rank);
      for (int i = 0; i < 4; ++i) {
        mine.sent[i] = lowLatencyDispatch(rank, world(i), call(i));
        mine.combined[i] = lowLatencyCombine(rank, world(i), call(i), mine.sent[i].handle);
      }
    })) << group.failure();
    group.forEach([&](RankContext& rank) {
      for (int i = 0; i < 4; ++i) {
        expectLowLatencyDispatch(rank, world(i), call(i), of(got, rank).sent[i]);
        expectLowLatencyCombine(rank, world(i), call(i), of(got, rank).combined[i]);
      }
    });
    got.clear();
    endGroup(group);
  });
}

/// Two calls under way, received in both orders, a whole call between. `nodes`: for withNodes().
void overlapHalves(std::uint64_t seed, std::uint64_t nodes, const RuntimeConfig& config) {
  const LowLatencyWorld world(smallWorld(seed));
  ManualGroup group(world.ranks(), withNodes(nodes, lowLatencyOptions(world, 72)));
  Outcomes got(static_cast<std::size_t>(world.ranks()));
  const auto call = [](std::uint64_t id, bool hook) {
    return LowLatencyCase{.id = id, .hidden = 72, .fp8 = id == 2, .hook = hook, .numSms = 2};
  };
  ASSERT_TRUE(group.run(config, [&](RankContext& rank) {
    Outcome& mine = of(got, rank);
    void* const stream = rank.compute().native();
    mine.sent[0] = lowLatencyDispatch(rank, world, call(1, true));
    mine.sent[1] = lowLatencyDispatch(rank, world, call(2, true));
    mine.sent[seed % 2].hook(stream);
    mine.sent[1 - seed % 2].hook(stream);
    mine.sent[2] = lowLatencyDispatch(rank, world, call(3, true));
    mine.combined[0] = lowLatencyCombine(rank, world, call(1, true), mine.sent[0].handle);
    mine.combined[1] = lowLatencyCombine(rank, world, call(2, false), mine.sent[1].handle);
    mine.combined[0].hook(stream);
    mine.sent[2].hook(stream);
    mine.combined[2] = lowLatencyCombine(rank, world, call(3, true), mine.sent[2].handle);
    mine.combined[2].hook(stream);
    mine.sent[3] = lowLatencyDispatch(rank, world, call(4, false));
    mine.combined[3] = lowLatencyCombine(rank, world, call(4, false), mine.sent[3].handle);
  })) << group.failure();
  group.forEach([&](RankContext& rank) {
    for (std::uint64_t i = 0; i < 4; ++i) {
      expectLowLatencyDispatch(rank, world, call(i + 1, false), of(got, rank).sent[i]);
      expectLowLatencyCombine(rank, world, call(i + 1, false), of(got, rank).combined[i]);
    }
  });
  got.clear();
  endGroup(group);
}
TEST(EpLowLatencySequence, HalvesOverlap) {
  underAllSchedules(
      [](std::uint64_t seed, const RuntimeConfig& config) { overlapHalves(seed, seed, config); });
}
/// What a peer behind a port channel has received it tells with counters alone.
TEST(EpLowLatencySequence, HalvesOverlapBetweenNodes) {
  underAllSchedules([](std::uint64_t seed, const RuntimeConfig& config) {
    overlapHalves(seed, 3 * seed, config);
  });
}

/// After a whole call two sends in a row: what the second may overwrite it knows from the first's
/// message alone, which it has not received. (Later receive halves tell in words of their own.)
TEST(EpLowLatencySequence, TwoSendsAfterAWholeCall) {
  underAllSchedules([](std::uint64_t seed, const RuntimeConfig& config) {
    LowLatencySpec spec = smallWorld(seed);
    spec.tokens = {5, 7, 3};
    spec.pattern = Pattern::uniform;
    const LowLatencyWorld world(spec);
    ManualGroup group(world.ranks(), withNodes(seed, lowLatencyOptions(world, 72)));
    Outcomes got(static_cast<std::size_t>(world.ranks()));
    const auto call = [](std::uint64_t id) {
      return LowLatencyCase{.id = id, .hidden = 72, .hook = id == 2 || id == 3, .numSms = 2};
    };
    ASSERT_TRUE(group.run(config, [&](RankContext& rank) {
      Outcome& mine = of(got, rank);
      void* const stream = rank.compute().native();
      for (std::uint64_t i = 0; i < 3; ++i) {
        mine.sent[i] = lowLatencyDispatch(rank, world, call(i + 1));
      }
      mine.sent[1].hook(stream);
      mine.sent[2].hook(stream);
    })) << group.failure();
    group.forEach([&](RankContext& rank) {
      for (std::uint64_t i = 0; i < 3; ++i) {
        expectLowLatencyDispatch(rank, world, call(i + 1), of(got, rank).sent[i]);
      }
    });
    got.clear();
    endGroup(group);
  });
}

}  // namespace
}  // namespace mscclpp::ep::testing
