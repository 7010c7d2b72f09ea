// Whole sequences of calls, enqueued without any host wait in between, on small shapes: in order
// and under seeded chaos (late copies, frozen warps, blocks and ranks). Under TSan every missing
// order is a report. tools/mutation.py asks these tests whether a synchronisation is needed.
#include <algorithm>
#include <chrono>

#include "ep/manual.hpp"
#include "ep/scenario.hpp"

namespace mscclpp::ep::testing {
namespace {

using device::RuntimeConfig;
using reference::Pattern;

constexpr Pattern kBusyPatterns[] = {Pattern::uniform, Pattern::skewed, Pattern::gaps,
                                     Pattern::duplicates, Pattern::oneRank};

/// Small worlds that differ from seed to seed. Under TSan fewer threads fit.
WorldSpec smallWorld(std::uint64_t seed, std::uint64_t which = 0) {
  const auto pick = [&](std::uint64_t key, std::uint64_t count) {
    return static_cast<int>(reference::mix({seed, which, key}) % count);
  };
  const int ranks = underSanitizer() ? 2 : 2 + static_cast<int>(reference::mix({seed}) % 3);
  return {.ranks = ranks,
          .tokens = {1 + pick(1, 13), pick(2, 10), pick(3, 20)},
          .topk = 1 + pick(4, 3),
          .experts = 2 * ranks,
          .pattern = kBusyPatterns[pick(5, 5)],
          .mapped = pick(6, 3) == 0,
          .seed = reference::mix({seed, which})};
}

int worstOf(const World& world) {
  return std::max({world.maxRows(), world.maxTokens(), 1}) + 2;
}

/// What one rank got, to be checked after the run.
struct Outcome {
  DispatchResult sent[4];
  CombineResult combined[4];
};
using Outcomes = std::vector<Outcome>;

Outcome& of(Outcomes& outcomes, const RankContext& rank) {
  return outcomes[static_cast<std::size_t>(rank.rank())];
}

/// A group whose ranks have the worlds' expert maps: making those blocks, so not in the run.
std::unique_ptr<ManualGroup> groupFor(const std::vector<const World*>& worlds,
                                      const BufferOptions& options) {
  auto group = std::make_unique<ManualGroup>(worlds[0]->ranks(), options);
  group->inThreads([&](RankContext& rank) {
    for (const World* world : worlds) expertMapOf(rank, *world);
  });
  return group;
}

BufferOptions pooled() {
  return testOptions(std::size_t{1} << 20);
}
/// No pool: dispatch in windows of some rows, combine in waves of 8 tokens.
BufferOptions unpooled(int ranks, int hidden) {
  BufferOptions options = testOptions();
  const auto peers = static_cast<std::size_t>(ranks - 1);
  const std::size_t row = static_cast<std::size_t>(hidden) * 2 + 16;
  options.stagingBytes = options.numNvlBytes =
      2048 + (8 * row + 16) * std::max<std::size_t>(peers, 1);
  return options;
}

TEST(EpSequence, DispatchThenCombine) {
  underAllSchedules([](std::uint64_t seed, const RuntimeConfig& config) {
    const World world(smallWorld(seed));
    const int hidden = seed % 2 ? 64 : 24, sms = 1 + static_cast<int>(seed % 3);
    const DispatchCase send{.hidden = hidden, .numSms = sms, .worst = worstOf(world)};
    const CombineCase back{.hidden = hidden, .biases = 1, .weightColumns = 2, .numSms = sms};
    const auto group = groupFor({&world}, pooled());
    Outcomes got(static_cast<std::size_t>(world.ranks()));
    ASSERT_TRUE(group->run(config, [&](RankContext& rank) {
      rank.poisonPool();
      Outcome& mine = of(got, rank);
      mine.sent[0] = dispatch(rank, world, send);
      mine.combined[0] = combine(rank, world, back, mine.sent[0].handle);
    })) << group->failure();
    group->forEach([&](RankContext& rank) {
      expectDispatch(rank, world, send, of(got, rank).sent[0]);
      expectCombine(rank, world, back, of(got, rank).combined[0]);
    });
  });
}

/// D-D-C-C with two handles, then the older handle again. Call 0 and 2 are BF16, 1 is FP8.
TEST(EpSequence, TwoHandlesInterleaved) {
  underAllSchedules([](std::uint64_t seed, const RuntimeConfig& config) {
    const World a(smallWorld(seed)), b(smallWorld(seed, 1));
    const DispatchCase sendA{.id = 1, .hidden = 40, .numSms = 2, .worst = worstOf(a)};
    const DispatchCase sendB{
        .id = 2, .hidden = 264, .dtype = DType::e4m3, .numSms = 2, .worst = worstOf(b)};
    const CombineCase backB{.id = 3, .hidden = 16, .numSms = 2};
    const CombineCase backA{
        .id = 4, .hidden = 40, .inPool = false, .weightColumns = 1, .numSms = 1};
    const CombineCase againB{.id = 5, .hidden = 264, .biases = 2, .numSms = 2};
    const auto group = groupFor({&a, &b}, pooled());
    Outcomes got(static_cast<std::size_t>(a.ranks()));
    ASSERT_TRUE(group->run(config, [&](RankContext& rank) {
      rank.poisonPool();
      Outcome& mine = of(got, rank);
      mine.sent[0] = dispatch(rank, a, sendA);
      mine.sent[1] = dispatch(rank, b, sendB);
      mine.combined[0] = combine(rank, b, backB, mine.sent[1].handle);
      mine.combined[1] = combine(rank, a, backA, mine.sent[0].handle);
      DispatchCase cached{.id = 6, .hidden = 48};
      cached.handle = mine.sent[0].handle;
      mine.sent[2] = dispatch(rank, a, cached);
      mine.combined[2] = combine(rank, b, againB, mine.sent[1].handle);
    })) << group->failure();
    group->forEach([&](RankContext& rank) {
      Outcome& mine = of(got, rank);
      DispatchCase cached{.id = 6, .hidden = 48};
      cached.handle = mine.sent[0].handle;
      expectDispatch(rank, a, sendA, mine.sent[0]);
      expectDispatch(rank, b, sendB, mine.sent[1]);
      expectDispatch(rank, a, cached, mine.sent[2]);
      expectCombine(rank, b, backB, mine.combined[0]);
      expectCombine(rank, a, backA, mine.combined[1]);
      expectCombine(rank, b, againB, mine.combined[2]);
    });
  });
}

/// Nothing fits into the pool: several windows per dispatch, several waves per combine, the staging
/// area used again at once.
TEST(EpSequence, StagedInWindowsAndWaves) {
  underAllSchedules([](std::uint64_t seed, const RuntimeConfig& config) {
    WorldSpec spec = smallWorld(seed);
    spec.tokens = {20, static_cast<int>(seed % 12)};
    const World world(spec);
    const int hidden = seed % 2 ? 32 : 72;
    const DispatchCase send{.id = 1, .hidden = hidden, .numSms = 2, .worst = worstOf(world)};
    const CombineCase back{
        .id = 2, .hidden = hidden, .inPool = false, .weightColumns = 2, .numSms = 2};
    const CombineCase again{.id = 3, .hidden = hidden, .inPool = false, .biases = 1, .numSms = 1};
    const auto group = groupFor({&world}, unpooled(world.ranks(), hidden));
    Outcomes got(static_cast<std::size_t>(world.ranks()));
    ASSERT_TRUE(group->run(config, [&](RankContext& rank) {
      Outcome& mine = of(got, rank);
      mine.sent[0] = dispatch(rank, world, send);
      mine.combined[0] = combine(rank, world, back, mine.sent[0].handle);
      mine.combined[1] = combine(rank, world, again, mine.sent[0].handle);
    })) << group->failure();
    group->forEach([&](RankContext& rank) {
      expectDispatch(rank, world, send, of(got, rank).sent[0]);
      expectCombine(rank, world, back, of(got, rank).combined[0]);
      expectCombine(rank, world, again, of(got, rank).combined[1]);
    });
  });
}

/// Many staged chunks per peer, so that the mover's queues and rings go round more than once.
TEST(EpSequence, StagedWithManyChunks) {
  underAllSchedules([](std::uint64_t seed, const RuntimeConfig& config) {
    WorldSpec spec = smallWorld(seed);
    spec.tokens = {90, 61};
    spec.pattern = Pattern::uniform;
    spec.topk = 3;
    const World world(spec);
    const DispatchCase send{.id = 1, .hidden = 8, .numSms = 2, .worst = worstOf(world)};
    const CombineCase back{.id = 2, .hidden = 32, .inPool = false, .weightColumns = 3, .numSms = 1};
    const auto group = groupFor({&world}, pooled());
    Outcomes got(static_cast<std::size_t>(world.ranks()));
    ASSERT_TRUE(group->run(config, [&](RankContext& rank) {
      Outcome& mine = of(got, rank);
      mine.sent[0] = dispatch(rank, world, send);
      mine.combined[0] = combine(rank, world, back, mine.sent[0].handle);
    })) << group->failure();
    group->forEach([&](RankContext& rank) {
      expectDispatch(rank, world, send, of(got, rank).sent[0]);
      expectCombine(rank, world, back, of(got, rank).combined[0]);
    });
  });
}

/// Rows of more than 8 KB take another pipeline; some ranks stage and others do not.
TEST(EpSequence, WideRowsAndMixedStaging) {
  underAllSchedules([](std::uint64_t seed, const RuntimeConfig& config) {
    WorldSpec spec = smallWorld(seed);
    spec.tokens = {21, 3};
    const World world(spec);
    // 16392 values are more than a stage holds: rows move in parts.
    const int hidden = seed % 2 ? 16392 : 4104;
    const DispatchCase send{.id = 1, .hidden = hidden, .numSms = 1, .worst = worstOf(world)};
    const BufferOptions options = testOptions(std::size_t{16} << 20);
    const auto group = groupFor({&world}, options);
    Outcomes got(static_cast<std::size_t>(world.ranks()));
    const auto backOf = [&](const RankContext& rank) {
      return CombineCase{.id = 2, .hidden = hidden, .inPool = rank.rank() % 2 == 0, .numSms = 1};
    };
    ASSERT_TRUE(group->run(config, [&](RankContext& rank) {
      Outcome& mine = of(got, rank);
      mine.sent[0] = dispatch(rank, world, send);
      mine.combined[0] = combine(rank, world, backOf(rank), mine.sent[0].handle);
    })) << group->failure();
    group->forEach([&](RankContext& rank) {
      expectDispatch(rank, world, send, of(got, rank).sent[0]);
      expectCombine(rank, world, backOf(rank), of(got, rank).combined[0]);
    });
  });
}

/// An exact handle, made before, replayed and combined again and again while routings of other
/// calls come in between; outputs are dropped at once, so that the pool's memory goes round.
TEST(EpSequence, ChainWithPoolReuse) {
  underAllSchedules([](std::uint64_t seed, const RuntimeConfig& config) {
    const World fixed(smallWorld(seed));
    std::vector<std::unique_ptr<World>> worlds;
    for (std::uint64_t i = 1; i <= 4; ++i)
      worlds.push_back(std::make_unique<World>(smallWorld(seed, i)));
    BufferOptions options = testOptions();
    options.stagingBytes = 16384;
    options.numNvlBytes = options.stagingBytes + 16384;
    std::vector<const World*> all = {&fixed};
    for (const auto& world : worlds) all.push_back(world.get());
    const auto group = groupFor(all, options);
    std::vector<DispatchHandle> handles(static_cast<std::size_t>(fixed.ranks()));
    group->inThreads([&](RankContext& rank) {
      handles[static_cast<std::size_t>(rank.rank())] =
          dispatch(rank, fixed, {.id = 1, .hidden = 16}).handle;
      rank.sync();
    });
    // Copies of recv_x and the combined rows of every round.
    struct Round {
      DispatchCase send, cached;
      CombineCase back;
      CombineResult combined;
      Tensor copy, cachedCopy;
    };
    std::vector<std::vector<Round>> rounds(static_cast<std::size_t>(fixed.ranks()));
    ASSERT_TRUE(group->run(config, [&](RankContext& rank) {
      const auto me = static_cast<std::size_t>(rank.rank());
      const auto keep = [&](const Tensor& from) {
        Tensor copy = rank.empty(from.dtype, from.shape);
        rank.device().copy(copy.data, from.data, copy.bytes(), rank.compute());
        return copy;
      };
      for (std::uint64_t i = 0; i < worlds.size(); ++i) {
        Round round;
        round.send = {.id = 10 + i, .hidden = 32, .numSms = 2, .worst = worstOf(*worlds[i])};
        round.cached = {.id = 20 + i, .hidden = 16, .numSms = 1};
        round.cached.handle = handles[me];
        round.back = {.id = 30 + i, .hidden = 16, .inPool = i % 2 == 0, .numSms = 2};
        round.copy = keep(dispatch(rank, *worlds[i], round.send).recvX);
        round.cachedCopy = keep(dispatch(rank, fixed, round.cached).recvX);
        round.combined = combine(rank, fixed, round.back, handles[me]);
        rounds[me].push_back(std::move(round));
      }
    })) << group->failure();
    group->forEach([&](RankContext& rank) {
      auto& mine = rounds[static_cast<std::size_t>(rank.rank())];
      for (std::size_t i = 0; i < mine.size(); ++i) {
        SCOPED_TRACE("round " + std::to_string(i));
        expectRows(rank, *worlds[i], mine[i].send, mine[i].copy);
        expectRows(rank, fixed, mine[i].cached, mine[i].cachedCopy);
        expectCombine(rank, fixed, mine[i].back, mine[i].combined);
      }
      mine.clear();
    });
  });
}

/// Epochs cross 2^31 and 2^32 in the middle of a sequence.
TEST(EpSequence, EpochsWrap) {
  underAllSchedules([](std::uint64_t seed, const RuntimeConfig& config) {
    const World world(smallWorld(seed));
    const DispatchCase send{.id = 1, .hidden = 16, .numSms = 2, .worst = worstOf(world)};
    const CombineCase back{.id = 2, .hidden = 16, .inPool = seed % 2 == 0, .numSms = 1};
    BufferOptions options = pooled();
    options.firstEpoch = (seed % 2 ? 0x80000000u : 0u) - 3u;
    const auto group = groupFor({&world}, options);
    Outcomes got(static_cast<std::size_t>(world.ranks()));
    ASSERT_TRUE(group->run(config, [&](RankContext& rank) {
      Outcome& mine = of(got, rank);
      for (int i = 0; i < 2; ++i) {
        mine.sent[i] = dispatch(rank, world, send);
        mine.combined[i] = combine(rank, world, back, mine.sent[i].handle);
      }
    })) << group->failure();
    group->forEach([&](RankContext& rank) {
      for (int i = 0; i < 2; ++i) {
        expectDispatch(rank, world, send, of(got, rank).sent[i]);
        expectCombine(rank, world, back, of(got, rank).combined[i]);
      }
    });
  });
}

/// One rank, where TSan can follow every single lane.
TEST(EpSequence, OneRank) {
  underAllSchedules([](std::uint64_t seed, const RuntimeConfig& config) {
    WorldSpec spec = smallWorld(seed);
    spec.ranks = 1;
    spec.tokens = {static_cast<int>(seed % 40) + 30};
    const World world(spec);
    const DispatchCase send{.id = 1, .hidden = 520, .numSms = 1, .worst = worstOf(world)};
    const DispatchCase fp8{
        .id = 3, .hidden = 512, .dtype = DType::e4m3, .numSms = 1, .worst = worstOf(world)};
    const CombineCase back{.id = 2, .hidden = 520, .biases = 2, .weightColumns = 2, .numSms = 1};
    const auto group = groupFor({&world}, pooled());
    Outcomes got(1);
    ASSERT_TRUE(group->run(config, [&](RankContext& rank) {
      got[0].sent[0] = dispatch(rank, world, send);
      got[0].combined[0] = combine(rank, world, back, got[0].sent[0].handle);
      got[0].sent[1] = dispatch(rank, world, fp8);
    })) << group->failure();
    group->forEach([&](RankContext& rank) {
      expectDispatch(rank, world, send, got[0].sent[0]);
      expectDispatch(rank, world, fp8, got[0].sent[1]);
      expectCombine(rank, world, back, got[0].combined[0]);
    });
  });
}

/// Rows that the copy engine cannot take (24 bytes), many chunks of them.
TEST(EpSequence, RowsCopiedByLanes) {
  underAllSchedules([](std::uint64_t seed, const RuntimeConfig& config) {
    WorldSpec spec = smallWorld(seed);
    spec.tokens = {100, 77};
    spec.pattern = Pattern::uniform;
    const World world(spec);
    const DispatchCase send{.id = 1,
                            .hidden = seed % 2 ? 24 : 520,
                            .dtype = DType::e4m3,
                            .scales = Scales::padded,
                            .numSms = 1,
                            .worst = worstOf(world)};
    const auto group = groupFor({&world}, pooled());
    Outcomes got(static_cast<std::size_t>(world.ranks()));
    ASSERT_TRUE(group->run(config, [&](RankContext& rank) {
      of(got, rank).sent[0] = dispatch(rank, world, send);
    })) << group->failure();
    group->forEach(
        [&](RankContext& rank) { expectDispatch(rank, world, send, of(got, rank).sent[0]); });
  });
}

/// Two ranks with one block each, small enough for TSan to follow every lane: order within a warp.
TEST(EpSequence, LaneByLane) {
  underAllSchedules([](std::uint64_t seed, const RuntimeConfig& schedule) {
    RuntimeConfig config = schedule;
    config.raceContexts = 600;
    const World world({.ranks = 2, .tokens = {42, 30}, .topk = 3, .experts = 8, .seed = seed});
    const DispatchCase send{.id = 1, .hidden = 16, .numSms = 1, .worst = worstOf(world)};
    DispatchCase fp8{.id = 2, .hidden = 520, .dtype = DType::e4m3, .numSms = 1};
    fp8.worst = worstOf(world);
    const CombineCase staged{
        .id = 3, .hidden = 16, .inPool = false, .weightColumns = 2, .numSms = 1};
    const CombineCase inPool{.id = 4, .hidden = 264, .biases = 1, .numSms = 1};
    const auto group = groupFor({&world}, pooled());
    Outcomes got(2);
    ASSERT_TRUE(group->run(config, [&](RankContext& rank) {
      Outcome& mine = of(got, rank);
      mine.sent[0] = dispatch(rank, world, send);
      mine.combined[0] = combine(rank, world, staged, mine.sent[0].handle);
      mine.sent[1] = dispatch(rank, world, fp8);
      mine.combined[1] = combine(rank, world, inPool, mine.sent[1].handle);
    })) << group->failure();
    group->forEach([&](RankContext& rank) {
      expectDispatch(rank, world, send, of(got, rank).sent[0]);
      expectDispatch(rank, world, fp8, of(got, rank).sent[1]);
      expectCombine(rank, world, staged, of(got, rank).combined[0]);
      expectCombine(rank, world, inPool, of(got, rank).combined[1]);
    });
  });
}

/// A host thread that polls sees a failure whole, while kernels are still running. There are no
/// rows, so that the failed call touches no data.
TEST(EpSequence, PollingHostSeesAFailure) {
  const World world({.ranks = 2, .tokens = {0}, .topk = 2, .experts = 4});
  std::string errors[2];
  tryRanks(
      2, [](int) { return testOptions(); },
      [&](RankContext& rank) {
        dispatch(rank, world, {.hidden = 16 + 8 * rank.rank(), .worst = 9});
        const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(20);
        std::string& mine = errors[rank.rank()];
        while (mine.empty() && std::chrono::steady_clock::now() < end) {
          mine = errorOf([&] { rank.buffer().checkHealth(); });
        }
      });
  for (const std::string& error : errors) {
    EXPECT_NE(error.find("hidden=16"), std::string::npos) << error;
    EXPECT_NE(error.find("hidden=24"), std::string::npos) << error;
  }
}

}  // namespace
}  // namespace mscclpp::ep::testing
