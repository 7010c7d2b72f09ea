// Combines that are reduced at the tokens' home, in turn with the others, without any host wait, in
// order and under seeded chaos; under TSan every missing order is a report.
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
/// Every other seed plays nodes: of one rank or two, behind shm or tcp.
BufferOptions withNodes(std::uint64_t seed, BufferOptions options) {
  if (seed % 2 != 0) return options;
  options.topology = {.ranksPerNode = ranksFor(seed) == 3 && seed % 4 == 0 ? 2 : 1,
                      .transport = seed / 4 % 2 == 0 ? Transport::shm : Transport::tcp};
  return options;
}
std::size_t at(const RankContext& rank) {
  return static_cast<std::size_t>(rank.rank());
}

/// Combines of one handle: enqueued without a wait, then checked.
class Combines {
 public:
  Combines(const LowLatencyWorld& world, int hidden) : world_(world), hidden_(hidden) {}

  void dispatch(RankContext& rank) {
    sent_.push_back(lowLatencyDispatch(rank, world_, {.id = 1, .hidden = hidden_, .numSms = 2}));
  }
  /// The next call of this rank; returns its hook.
  ReceiveHook combine(RankContext& rank, bool hook, bool source, int sms = 2) {
    results_.resize(static_cast<std::size_t>(world_.ranks()));
    auto& mine = results_[at(rank)];
    const LowLatencyCase call{
        .id = mine.size() + 1, .hidden = hidden_, .hook = hook, .numSms = sms, .source = source};
    mine.emplace_back(call, lowLatencyCombine(rank, world_, call, sent_.back().handle));
    return mine.back().second.hook;
  }
  void check(RankContext& rank) {
    for (const auto& [call, result] : results_[at(rank)]) {
      expectLowLatencyCombine(rank, world_, call, result);
    }
  }
  /// Proxies serve the peers until all is done.
  void end(ManualGroup& group) {
    sent_.clear();
    results_.clear();
    group.inThreads([](RankContext& rank) { rank.buffer().destroy(); });
  }

 private:
  const LowLatencyWorld& world_;
  int hidden_;
  std::vector<LowLatencyDispatchResult> sent_;
  std::vector<std::vector<std::pair<LowLatencyCase, LowLatencyCombineResult>>> results_;
};

LowLatencyWorld worldOf(std::uint64_t seed, std::vector<int> tokens) {
  const int ranks = ranksFor(seed);
  return LowLatencyWorld({.ranks = ranks,
                          .tokens = std::move(tokens),
                          .topk = 2 + static_cast<int>(seed % 5),
                          .experts = 8 * ranks - static_cast<int>(seed % 3),
                          .pattern = seed % 4 == 1 ? Pattern::duplicates : Pattern::gaps,
                          .maxTokens = 7,
                          .seed = seed});
}

/// Whole calls back to back, of both kinds: the areas are used again and again while peers are
/// late.
TEST(EpLowLatencySourceSequence, WholeCallsInARow) {
  underAllSchedules([](std::uint64_t seed, const RuntimeConfig& config) {
    const LowLatencyWorld world = worldOf(seed, {5, 7, 3});
    ManualGroup group(world.ranks(), withNodes(seed, roomForBoth(world, 72)));
    Combines combines(world, 72);
    ASSERT_TRUE(group.run(config, [&](RankContext& rank) {
      combines.dispatch(rank);
      for (int i = 0; i < 5; ++i) {
        combines.combine(rank, false, i != 2, 1 + static_cast<int>(seed % 3));
      }
    })) << group.failure();
    group.forEach([&](RankContext& rank) { combines.check(rank); });
    combines.end(group);
  });
}

/// Two calls under way, received in both orders, with whole calls before, between and after.
TEST(EpLowLatencySourceSequence, HalvesOverlap) {
  underAllSchedules([](std::uint64_t seed, const RuntimeConfig& config) {
    const LowLatencyWorld world = worldOf(seed, {5, 7, 3});
    ManualGroup group(world.ranks(), withNodes(seed, roomForBoth(world, 72)));
    Combines combines(world, 72);
    ASSERT_TRUE(group.run(config, [&](RankContext& rank) {
      void* const stream = rank.compute().native();
      combines.dispatch(rank);
      combines.combine(rank, false, true);
      for (const bool source : {true, false}) {
        const ReceiveHook a = combines.combine(rank, true, source);
        const ReceiveHook b = combines.combine(rank, true, true);
        (seed / 2 % 2 != 0 ? a : b)(stream);
        (seed / 2 % 2 != 0 ? b : a)(stream);
      }
      combines.combine(rank, false, true);
    })) << group.failure();
    group.forEach([&](RankContext& rank) { combines.check(rank); });
    combines.end(group);
  });
}

/// Nothing comes from the tokens of a peer that has none, and with few experts nothing comes from
/// some peers: only what they tell keeps the areas apart, by a hello or, with enableShrink, by a
/// word at the end.
TEST(EpLowLatencySourceSequence, PeersWithNothingToSend) {
  underAllSchedules([](std::uint64_t seed, const RuntimeConfig& config) {
    const bool first = seed / 2 % 2 != 0;
    const LowLatencyWorld world =
        worldOf(seed, first ? std::vector{7, 0, 0} : std::vector{0, 7, 0});
    BufferOptions options = roomForBoth(world, 72);
    options.enableShrink = seed % 3 == 0;
    ManualGroup group(world.ranks(), withNodes(seed, options));
    Combines combines(world, 72);
    ASSERT_TRUE(group.run(config, [&](RankContext& rank) {
      void* const stream = rank.compute().native();
      combines.dispatch(rank);
      combines.combine(rank, false, true);
      combines.combine(rank, false, seed % 5 != 0);
      if (world.tokens(rank.rank()) == 0) keepBusy(rank, 100);
      const ReceiveHook a = combines.combine(rank, true, true);
      const ReceiveHook b = combines.combine(rank, true, true);
      a(stream);
      b(stream);
    })) << group.failure();
    group.forEach([&](RankContext& rank) { combines.check(rank); });
    combines.end(group);
  });
}

}  // namespace
}  // namespace mscclpp::ep::testing
