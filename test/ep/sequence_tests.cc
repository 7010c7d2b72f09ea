// Any order of calls is safe without a barrier by the caller: ranks as threads, real waits.
#include <algorithm>
#include <latch>

#include "ep/scenario.hpp"

namespace mscclpp::ep::testing {
namespace {

using reference::Pattern;

TEST(EpOrder, DispatchDispatchCombineCombineAndOlderHandles) {
  const World a({.ranks = 3, .tokens = {30, 2}, .topk = 3, .experts = 9, .seed = 1});
  const World b({.ranks = 3, .tokens = {0, 41}, .topk = 2, .experts = 6, .seed = 2});
  runRanks(3, testOptions(), [&](RankContext& rank) {
    const DispatchCase sendA{.id = 1, .hidden = 72}, sendB{.id = 2, .hidden = 72};
    const CombineCase back{.id = 3, .hidden = 72}, staged{.id = 4, .hidden = 72, .inPool = false};
    const DispatchResult sentA = dispatch(rank, a, sendA), sentB = dispatch(rank, b, sendB);
    const CombineResult first = combine(rank, b, staged, sentB.handle);
    const CombineResult second = combine(rank, a, back, sentA.handle);
    const CombineResult third = combine(rank, b, back, sentB.handle);
    expectDispatch(rank, a, sendA, sentA);
    expectDispatch(rank, b, sendB, sentB);
    expectCombine(rank, b, staged, first);
    expectCombine(rank, a, back, second);
    expectCombine(rank, b, back, third);
  });
}

TEST(EpOrder, TwoBuffersAlive) {
  const World world({.ranks = 2, .tokens = {25}, .topk = 2, .experts = 4});
  Meeting second(2);
  runRanks(2, testOptions(), [&](RankContext& rank) {
    RankContext other(second.bootstrap(rank.rank()), testOptions());
    const DispatchCase send{.id = 1, .hidden = 64}, sendOther{.id = 2, .hidden = 48};
    const CombineCase back{.id = 3, .hidden = 64},
        backOther{.id = 4, .hidden = 48, .inPool = false};
    const DispatchResult sent = dispatch(rank, world, send);
    const DispatchResult sentOther = dispatch(other, world, sendOther);
    const CombineResult combinedOther = combine(other, world, backOther, sentOther.handle);
    const CombineResult combined = combine(rank, world, back, sent.handle);
    expectDispatch(rank, world, send, sent);
    expectDispatch(other, world, sendOther, sentOther);
    expectCombine(rank, world, back, combined);
    expectCombine(other, world, backOther, combinedOther);
    other.buffer().destroy();
  });
}

/// Pairs of dispatch and combine whose routings and counts change every time, without any host
/// wait.
TEST(EpOrder, ThousandChainedPairs) {
  const int pairs = underSanitizer() ? 100 : 1000;
  constexpr int kWorst = 32;
  std::vector<std::unique_ptr<World>> worlds;
  for (int i = 0; i < 10; ++i) {
    worlds.push_back(
        std::make_unique<World>(WorldSpec{.ranks = 2,
                                          .tokens = {i % 4, (i * 7) % 9},
                                          .topk = 2,
                                          .experts = 4,
                                          .pattern = i % 2 ? Pattern::skewed : Pattern::gaps,
                                          .seed = static_cast<std::uint64_t>(i)}));
  }
  runRanks(2, testOptions(1 << 16), [&](RankContext& rank) {
    struct Kept {
      DispatchCase send;
      CombineCase back;
      Tensor rows = {};
      CombineResult combined = {};
    };
    std::vector<Kept> kept;
    for (int i = 0; i < pairs; ++i) {
      const World& world = *worlds[static_cast<std::size_t>(i) % worlds.size()];
      const auto id = static_cast<std::uint64_t>(i);
      Kept now{.send = {.id = 1000 + id, .hidden = 8, .numSms = 1 + i % 2, .worst = kWorst},
               .back = {.id = 2 + id % 50, .hidden = 8, .inPool = i % 3 != 0, .numSms = 1}};
      const DispatchResult sent = dispatch(rank, world, now.send);
      now.rows = rank.empty(DType::bf16, sent.recvX.shape);
      rank.device().copy(now.rows.data, sent.recvX.data, now.rows.bytes(), rank.compute());
      now.combined = combine(rank, world, now.back, sent.handle);
      kept.push_back(std::move(now));
    }
    for (std::size_t i = 0; i < kept.size() && !::testing::Test::HasFailure(); ++i) {
      SCOPED_TRACE("pair " + std::to_string(i));
      const World& world = *worlds[i % worlds.size()];
      expectRows(rank, world, kept[i].send, kept[i].rows);
      expectCombine(rank, world, kept[i].back, kept[i].combined);
    }
  });
}

class EpFirstEpoch : public ::testing::TestWithParam<std::uint32_t> {};

TEST_P(EpFirstEpoch, FlagsCrossTheWrap) {
  const World world({.ranks = 3, .tokens = {10, 3}, .topk = 2, .experts = 6});
  BufferOptions options = testOptions();
  options.firstEpoch = GetParam();
  runRanks(3, options, [&](RankContext& rank) {
    for (std::uint64_t i = 0; i < 6; ++i) {
      const DispatchCase send{.id = 1 + i, .hidden = 16};
      const CombineCase back{.id = 100 + i, .hidden = 16, .inPool = i % 2 == 0};
      const DispatchResult sent = dispatch(rank, world, send);
      const CombineResult combined = combine(rank, world, back, sent.handle);
      expectDispatch(rank, world, send, sent);
      expectCombine(rank, world, back, combined);
    }
  });
}
INSTANTIATE_TEST_SUITE_P(Starts, EpFirstEpoch,
                         ::testing::Values(0u, 0x7FFFFFF9u, 0xFFFFFFF9u, 0xFFFFFFFFu));

/// A rank that comes late holds the others up, whatever they have enqueued, and nothing gets mixed
/// up.
TEST(EpOrder, LateRank) {
  const World world({.ranks = 3, .tokens = {20}, .topk = 3, .experts = 9});
  for (int late = 0; late < 3; ++late) {
    for (int stage = 0; stage < 4; ++stage) {
      SCOPED_TRACE("rank " + std::to_string(late) + " is late at call " + std::to_string(stage));
      std::latch othersAreThere(2);  // all they have to do is enqueued, and runs
      runRanks(3, testOptions(), [&](RankContext& rank) {
        const DispatchCase send{.id = 1, .hidden = 32, .worst = 64};
        const CombineCase back{.id = 2, .hidden = 32},
            staged{.id = 3, .hidden = 32, .inPool = false};
        const auto arriveAt = [&](int call) {
          if (rank.rank() == late && call == stage) othersAreThere.wait();
        };
        arriveAt(0);
        const DispatchResult sent = dispatch(rank, world, send);
        arriveAt(1);
        const CombineResult first = combine(rank, world, back, sent.handle);
        arriveAt(2);
        const CombineResult second = combine(rank, world, staged, sent.handle);
        arriveAt(3);
        const DispatchResult again = dispatch(rank, world, send);
        if (rank.rank() != late) othersAreThere.count_down();
        expectDispatch(rank, world, send, sent);
        expectCombine(rank, world, back, first);
        expectCombine(rank, world, staged, second);
        expectDispatch(rank, world, send, again);
      });
    }
  }
}

TEST(EpOrder, EveryNumberOfBlocks) {
  const World world({.ranks = 3, .tokens = {50, 9}, .topk = 3, .experts = 9});
  for (const int sms : {1, 2, 3, 4, 100}) {
    SCOPED_TRACE(sms);
    runRanks(3, testOptions(), [&](RankContext& rank) {
      const DispatchCase send{.hidden = 264, .numSms = sms};
      const CombineCase back{
          .hidden = 264, .inPool = sms % 2 == 0, .weightColumns = 2, .numSms = sms};
      const DispatchResult sent = dispatch(rank, world, send);
      const CombineResult combined = combine(rank, world, back, sent.handle);
      expectDispatch(rank, world, send, sent);
      expectCombine(rank, world, back, combined);
    });
  }
}

TEST(EpOrder, BlocksMayDifferBetweenRanks) {
  const World world({.ranks = 3, .tokens = {50, 9}, .topk = 3, .experts = 9});
  runRanks(3, testOptions(), [&](RankContext& rank) {
    const int sms = 1 + rank.rank();
    const DispatchCase send{.hidden = 64, .numSms = sms};
    const CombineCase back{.hidden = 64, .inPool = false, .numSms = 4 - sms};
    const DispatchResult sent = dispatch(rank, world, send);
    const CombineResult combined = combine(rank, world, back, sent.handle);
    expectDispatch(rank, world, send, sent);
    expectCombine(rank, world, back, combined);
  });
}

}  // namespace
}  // namespace mscclpp::ep::testing
