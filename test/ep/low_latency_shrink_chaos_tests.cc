// Low-latency calls with enableShrink under seeded chaos: some blocks of a rank give a source up,
// others have everything of it, and all must agree.
#include "ep/low_latency_scenario.hpp"
#include "ep/manual.hpp"
#include "ext/ep/low_latency_handle.hpp"

namespace mscclpp::ep::testing {
namespace {

using device::RuntimeConfig;
using reference::Pattern;

/// The world as a rank sees it that has nothing of the sources with no tokens.
LowLatencyWorld seenWith(const LowLatencyWorld& world, const std::vector<std::int32_t>& tokens) {
  LowLatencySpec spec = world.spec();
  spec.tokens.assign(tokens.begin(), tokens.end());
  spec.maxTokens = world.maxTokens();
  return LowLatencyWorld(spec);
}

/// Everything is as if the sources that are absent had no tokens: in every block's slots, in the
/// counts of the last one, and in the rows, but for those that were waited for in vain.
void expectAgreement(RankContext& rank, const LowLatencyWorld& world, const LowLatencyCase& call,
                     const LowLatencyDispatchResult& result,
                     const std::vector<std::int32_t>& masked) {
  const auto tokens = rank.download<std::int32_t>(result.handle->sourceTokens);
  for (int s = 0; s < world.ranks(); ++s) {
    const auto source = static_cast<std::size_t>(s);
    if (tokens[source] == world.tokens(s)) continue;
    EXPECT_EQ(tokens[source], 0) << "of rank " << s;
    EXPECT_EQ(masked[source], 1) << "rank " << s << " is absent";
  }
  EXPECT_EQ(tokens[static_cast<std::size_t>(rank.rank())], world.tokens(rank.rank()));
  const LowLatencyWorld seen = seenWith(world, tokens);
  const reference::LowLatencyReceived& expected = seen.received(rank.rank());
  expectSame("recv_count", expected.count, rank.download<std::int32_t>(result.recvCount));
  expectSame("layout_range", expected.layoutRange,
             rank.download<std::int64_t>(result.handle.layoutRange()),
             static_cast<std::size_t>(world.ranks()));
  const auto info = rank.download<std::int32_t>(result.handle.sourceInfo());
  const auto rows = rank.download<std::uint8_t>(result.recvX);
  for (std::size_t slot = 0; slot < expected.sourceOf.size(); ++slot) {
    const reference::Source& source = expected.sourceOf[slot];
    if (source.rank < 0) continue;
    EXPECT_EQ(info[slot], source.token) << "slot " << slot << ", of rank " << source.rank;
    if (masked[static_cast<std::size_t>(source.rank)] != 0) continue;
    const auto sent = reference::keyedBf16({call.id, source.rank, source.token}, 1, call.hidden);
    const auto at = rows.begin() + static_cast<std::ptrdiff_t>(slot) * call.hidden;
    expectSame("row of slot " + std::to_string(slot),
               reference::quantise(sent.data(), call.hidden, false).values,
               std::vector<std::uint8_t>(at, at + call.hidden));
  }
}

/// Two dispatches of every rank, of which rank 1 is late by `rounds`, rank 3 by more. Waits end
/// after a few polls: in one block the ids of a source come in time, in another, which has fewer
/// tokens to quantise and waits earlier, they do not. Which of them decides first depends on
/// rank 3.
void expectThatBlocksAgree(int ranks, std::uint64_t seed, const RuntimeConfig& config, int rounds) {
  const LowLatencyWorld world({.ranks = ranks,
                               .tokens = {6, 5, 7},
                               .topk = 2,
                               .experts = 2 * ranks,
                               .pattern = Pattern::uniform,
                               .maxTokens = 7,
                               .seed = seed});
  BufferOptions options = lowLatencyOptions(world, 40);
  options.enableShrink = true;
  ManualGroup group(ranks, options, ManualGroup::kShortestLimit);
  const auto call = [](std::uint64_t id) {
    return LowLatencyCase{.id = id, .hidden = 40, .fp8 = true, .numSms = 4};
  };
  constexpr std::uint64_t kCalls = 2;
  std::vector<LowLatencyDispatchResult> got[kCalls];
  std::vector<Tensor> masks[kCalls];
  ASSERT_TRUE(group.run(config, [&](RankContext& rank) {
    if (rank.rank() % 2 == 1) keepBusy(rank, rounds == 0 ? 0 : rounds + 4 * (rank.rank() - 1));
    for (std::uint64_t i = 0; i < kCalls; ++i) {
      got[i].push_back(lowLatencyDispatch(rank, world, call(i + 1)));
      masks[i].push_back(rank.empty(DType::i32, {ranks}));
      rank.buffer().queryLowLatencyMask(masks[i].back(), rank.order());
    }
  })) << group.failure();
  group.forEach([&](RankContext& rank) {
    const auto r = static_cast<std::size_t>(rank.rank());
    for (std::uint64_t i = 0; i < kCalls; ++i) {
      expectAgreement(rank, world, call(i + 1), got[i][r],
                      rank.download<std::int32_t>(masks[i][r]));
    }
  });
}

/// A fair order, and ranks that are later and later.
TEST(EpLowLatencyShrinkSequence, BlocksAgreeOnALateRank) {
  for (int rounds = 0; rounds < 48 && !HasFailure(); ++rounds) {
    SCOPED_TRACE("late by " + std::to_string(rounds));
    expectThatBlocksAgree(4, 1, fifoSchedule(), rounds);
  }
}
/// The lanes of a warp must agree, too, about a mask that another block sets meanwhile.
TEST(EpLowLatencyShrinkSequence, BlocksAgreeOnWhoIsMissing) {
  underAllSchedules([](std::uint64_t seed, const RuntimeConfig& config) {
    expectThatBlocksAgree(2 + static_cast<int>(seed % 2), seed, config, 0);
  });
}

/// Behind port channels block 0 alone looks whether a message has come, and tells the others when
/// it gives up. A fair order and two others: each waits for a whole limit.
TEST(EpLowLatencyShrinkSequence, BlocksLearnThatThePortIsSilent) {
  for (const RuntimeConfig& config : {fifoSchedule(), chaosSchedule(1), chaosSchedule(2)}) {
    const LowLatencyWorld world({.ranks = 2, .tokens = {6, 5}, .topk = 2, .experts = 4});
    BufferOptions options = lowLatencyOptions(world, 40);
    options.enableShrink = true;
    options.topology = {.ranksPerNode = 1, .transport = Transport::shm};
    ManualGroup group(2, options, 1.0);
    const auto call = [](std::uint64_t id) {
      return LowLatencyCase{.id = id, .hidden = 40, .fp8 = true, .numSms = 3};
    };
    std::vector<LowLatencyDispatchResult> got;
    Tensor mask;
    ASSERT_TRUE(group.run(config, [&](RankContext& rank) {
      if (rank.rank() == 1) return;
      got.push_back(lowLatencyDispatch(rank, world, call(1)));
      got.push_back(lowLatencyDispatch(rank, world, call(2)));
      mask = rank.empty(DType::i32, {2});
      rank.buffer().queryLowLatencyMask(mask, rank.order());
    })) << group.failure();
    RankContext& rank = group[0];
    const auto masked = rank.download<std::int32_t>(mask);
    EXPECT_EQ(masked, (std::vector<std::int32_t>{0, 1}));
    for (std::uint64_t id = 1; id <= 2; ++id) {
      expectAgreement(rank, world, call(id), got[id - 1], masked);
    }
    got.clear();
    group.inThreads([](RankContext& one) { one.buffer().destroy(); });
  }
}

}  // namespace
}  // namespace mscclpp::ep::testing
