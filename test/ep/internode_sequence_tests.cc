// Between nodes, any order of calls is safe without a barrier by the caller; windows as small as
// they may be, outputs that do not fit the pool, ranks that come late.
#include <algorithm>
#include <latch>

#include "ep/nodes.hpp"

namespace mscclpp::ep::testing {
namespace {

using reference::Pattern;

constexpr NodeShape kTwoByOne{2, 1}, kTwoByTwo{4, 2}, kThreeNodes{3, 1}, kUnequal{4, 3};

/// Of these shapes, for slots of a row of `hidden` values with up to 4 choices.
std::size_t slotBytes(int hidden) {
  return (static_cast<std::size_t>(hidden) * 2 + 24 + 16 + 16 + 4 * 12 + 127) / 128 * 128;
}

/// Two dispatches under way, combined in both orders, the older handle again, and a cached call.
void interleave(RankContext& rank, const World& a, const World& b) {
  const DispatchCase sendA{.id = 1, .hidden = 72}, sendB{.id = 2, .hidden = 72};
  const CombineCase back{.id = 3, .hidden = 72, .biases = 2},
      staged{.id = 4, .hidden = 72, .inPool = false, .weightColumns = 3};
  DispatchCase cached{.id = 5, .hidden = 40, .dtype = DType::e4m3};
  const DispatchResult sentA = dispatch(rank, a, sendA), sentB = dispatch(rank, b, sendB);
  const CombineResult first = combine(rank, b, staged, sentB.handle);
  const CombineResult second = combine(rank, a, back, sentA.handle);
  cached.handle = sentB.handle;
  const DispatchResult sentC = dispatch(rank, b, cached);
  const CombineResult third = combine(rank, b, back, sentC.handle);
  expectDispatch(rank, a, sendA, sentA);
  expectDispatch(rank, b, sendB, sentB);
  expectDispatch(rank, b, cached, sentC);
  expectCombine(rank, b, staged, first);
  expectCombine(rank, a, back, second);
  expectCombine(rank, b, back, third);
}

class EpNodeOrder : public ::testing::TestWithParam<NodeShape> {
 protected:
  const NodeShape shape_ = GetParam();

  World world(std::vector<int> tokens, std::uint64_t seed, int topk = 3) const {
    return World({.ranks = shape_.ranks,
                  .tokens = std::move(tokens),
                  .topk = topk,
                  .experts = 3 * shape_.ranks,
                  .seed = seed});
  }
};

TEST_P(EpNodeOrder, HandlesInterleaved) {
  const World a = world({30, 2}, 1), b = world({0, 41}, 2, 2);
  runRanks(shape_.ranks, nodeOptions(shape_), [&](RankContext& rank) { interleave(rank, a, b); });
}

/// The rings hold the least that calls accept, and go round many times.
TEST_P(EpNodeOrder, WindowsOfTwoSlots) {
  const World a = world({90, 61}, 3), b = world({3, 120}, 4, 2);
  const BufferOptions options = withSmallestWindow(shape_, slotBytes(72));
  runRanks(shape_.ranks, options, [&](RankContext& rank) {
    for (int i = 0; i < 3; ++i) interleave(rank, a, b);
  });
}

/// Nothing fits into the pool: several launches per dispatch, several waves per combine. Or only
/// this rank's outputs do.
TEST_P(EpNodeOrder, StagedInWindowsAndWaves) {
  const World a = world({60, 13}, 5), b = world({9, 44}, 6, 2);
  BufferOptions options = nodeOptions(shape_);
  const auto peers = static_cast<std::size_t>(shape_.ranks - 1);
  options.stagingBytes = options.numNvlBytes = 2048 + (16 * (72 * 2 + 16) + 16) * peers;
  options.numRdmaBytes = std::size_t{1} << 20;
  runRanks(shape_.ranks, options, [&](RankContext& rank) { interleave(rank, a, b); });
}
TEST_P(EpNodeOrder, SomeStageAndOthersDoNot) {
  const World a = world({60, 13}, 7);
  BufferOptions options = nodeOptions(shape_);
  options.stagingBytes = 16384;
  options.numNvlBytes = options.stagingBytes + (std::size_t{1} << 18);
  options.numRdmaBytes = std::size_t{1} << 20;
  runRanks(shape_.ranks, options, [&](RankContext& rank) {
    Tensor all;
    if (rank.rank() % 2 == 1) {  // this rank's pool is taken
      all = rank.buffer().createTensor(
          DType::u8, {static_cast<std::int64_t>(rank.buffer().poolBytesFree() / 256 * 256)},
          rank.compute().native());
    }
    const DispatchCase send{.id = 1, .hidden = 264};
    const CombineCase back{.id = 3, .hidden = 264, .biases = 1, .weightColumns = 2};
    const DispatchResult sent = dispatch(rank, a, send);
    const CombineResult combined = combine(rank, a, back, sent.handle);
    expectDispatch(rank, a, send, sent);
    expectCombine(rank, a, back, combined);
  });
}

/// Pairs whose routings and counts change every time, without any host wait. Only ranks that share
/// a GPU as threads wait now and then: they share its queue of launches, and one that fills it up
/// keeps the other's proxy from the driver (docs/low_latency.md).
TEST_P(EpNodeOrder, ChainedPairs) {
  const int pairs = underSanitizer() ? 30 : 200;
  std::vector<std::unique_ptr<World>> worlds;
  for (int i = 0; i < 10; ++i) {
    worlds.push_back(
        std::make_unique<World>(WorldSpec{.ranks = shape_.ranks,
                                          .tokens = {i % 4, (i * 7) % 19, (i * 5) % 11},
                                          .topk = 2,
                                          .experts = 2 * shape_.ranks,
                                          .pattern = i % 3 == 0 ? Pattern::oneSender
                                                     : i % 2    ? Pattern::skewed
                                                                : Pattern::gaps,
                                          .seed = static_cast<std::uint64_t>(i)}));
  }
  int worst = 1;
  for (const auto& world : worlds) worst = std::max({worst, world->maxRows(), world->maxTokens()});
  BufferOptions options = nodeOptions(shape_, 1 << 18);
  options.numRdmaBytes = std::size_t{1} << 20;
  const bool shareGpus =
      testPlatform() == Platform::cuda && shape_.ranks > Device::count(Platform::cuda);
  runRanks(shape_.ranks, options, [&](RankContext& rank) {
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
      const int hidden = 8 + i % 3 * 32;  // slots of other sizes follow each other
      Kept now{.send = {.id = 1000 + id, .hidden = hidden, .numSms = 1 + i % 3, .worst = worst},
               .back = {.id = 2 + id % 50, .hidden = 8, .inPool = i % 3 != 0, .numSms = 1 + i % 2}};
      const DispatchResult sent = dispatch(rank, world, now.send);
      now.rows = rank.empty(DType::bf16, sent.recvX.shape);
      rank.device().copy(now.rows.data, sent.recvX.data, now.rows.bytes(), rank.compute());
      now.combined = combine(rank, world, now.back, sent.handle);
      kept.push_back(std::move(now));
      if (shareGpus && i % 25 == 24) rank.sync();
    }
    for (std::size_t i = 0; i < kept.size() && !::testing::Test::HasFailure(); ++i) {
      SCOPED_TRACE("pair " + std::to_string(i));
      const World& world = *worlds[i % worlds.size()];
      expectRows(rank, world, kept[i].send, kept[i].rows);
      expectCombine(rank, world, kept[i].back, kept[i].combined);
    }
  });
}

TEST_P(EpNodeOrder, EpochsWrap) {
  const World a = world({10, 3}, 8), b = world({1, 9}, 9, 2);
  for (const std::uint32_t first : {0x7FFFFFF9u, 0xFFFFFFF4u}) {
    BufferOptions options = nodeOptions(shape_);
    options.firstEpoch = first;
    runRanks(shape_.ranks, options, [&](RankContext& rank) { interleave(rank, a, b); });
  }
}

TEST_P(EpNodeOrder, BlocksDifferBetweenRanks) {
  const World a = world({50, 9}, 10);
  runRanks(shape_.ranks, nodeOptions(shape_), [&](RankContext& rank) {
    const DispatchCase send{.hidden = 64, .numSms = 1 + rank.rank() % 4};
    const CombineCase back{.hidden = 64, .inPool = false, .numSms = 4 - rank.rank() % 4};
    const DispatchResult sent = dispatch(rank, a, send);
    const CombineResult combined = combine(rank, a, back, sent.handle);
    expectDispatch(rank, a, send, sent);
    expectCombine(rank, a, back, combined);
  });
}

/// A rank that comes late holds the others up, whatever they have enqueued, and nothing gets mixed
/// up.
TEST_P(EpNodeOrder, LateRank) {
  const World a = world({20}, 11);
  const int worst = std::max(a.maxRows(), a.maxTokens());
  for (const int late : {0, shape_.ranks - 1}) {
    for (int stage = 0; stage < 4; ++stage) {
      SCOPED_TRACE("rank " + std::to_string(late) + " is late at call " + std::to_string(stage));
      std::latch othersAreThere(shape_.ranks - 1);  // all they have to do is enqueued, and runs
      runRanks(shape_.ranks, nodeOptions(shape_), [&](RankContext& rank) {
        const DispatchCase send{.id = 1, .hidden = 32, .worst = worst};
        const CombineCase back{.id = 2, .hidden = 32},
            staged{.id = 3, .hidden = 32, .inPool = false};
        const auto arriveAt = [&](int call) {
          if (rank.rank() == late && call == stage) othersAreThere.wait();
        };
        arriveAt(0);
        const DispatchResult sent = dispatch(rank, a, send);
        arriveAt(1);
        const CombineResult first = combine(rank, a, back, sent.handle);
        arriveAt(2);
        const CombineResult second = combine(rank, a, staged, sent.handle);
        arriveAt(3);
        const DispatchResult again = dispatch(rank, a, send);
        if (rank.rank() != late) othersAreThere.count_down();
        expectDispatch(rank, a, send, sent);
        expectCombine(rank, a, back, first);
        expectCombine(rank, a, staged, second);
        expectDispatch(rank, a, send, again);
      });
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Shapes, EpNodeOrder,
                         ::testing::Values(kTwoByOne, kTwoByTwo, kThreeNodes, kUnequal,
                                           NodeShape{2, 1, Transport::tcp},
                                           NodeShape{4, 2, Transport::tcp}),
                         nameOfShape);

TEST(EpNodesLarge, ManyRanks) {  // 33: more ranks, and more nodes, than lanes of a warp
  if (testPlatform() == Platform::cuda) {
    GTEST_SKIP() << "a GPU has 32 queues: too few for 3 streams of each of more than 10 ranks";
  }
  for (const NodeShape& shape :
       {NodeShape{33, 32}, NodeShape{33, 11}, NodeShape{33, 1}, NodeShape{64, 8}}) {
    SCOPED_TRACE(nameOf(shape));
    const World world(
        {.ranks = shape.ranks, .tokens = {3, 0, 25}, .topk = 6, .experts = 2 * shape.ranks});
    BufferOptions options = nodeOptions(shape, 1 << 20);
    options.numRdmaBytes = std::size_t{1} << 20;
    options.maxExpertsPerRank = 2;
    runRanks(shape.ranks, options, [&](RankContext& rank) {
      const DispatchCase send{.hidden = 24, .numSms = 1};
      const DispatchResult sent = dispatch(rank, world, send);
      expectDispatch(rank, world, send, sent);
      for (const bool inPool : {true, false}) {
        const CombineCase back{
            .hidden = 24, .inPool = inPool, .biases = 2, .weightColumns = 6, .numSms = 1};
        expectCombine(rank, world, back, combine(rank, world, back, sent.handle));
      }
    });
  }
}

TEST(EpNodesLarge, ModelShapes) {
  struct ModelShape {
    int hidden, topk, experts;
  };
  for (const ModelShape& shape : {ModelShape{7168, 8, 256}, {2880, 4, 128}, {2688, 22, 512}}) {
    SCOPED_TRACE(shape.hidden);
    const World world(
        {.ranks = 4, .tokens = {65, 33}, .topk = shape.topk, .experts = shape.experts});
    runRanks(4, nodeOptions(kTwoByTwo, std::size_t{64} << 20), [&](RankContext& rank) {
      const DispatchCase send{.hidden = shape.hidden, .numSms = 4};
      const DispatchCase fp8{
          .id = 5, .hidden = shape.hidden, .dtype = DType::e4m3, .scales = Scales::i32};
      const CombineCase back{.hidden = shape.hidden, .weightColumns = shape.topk, .numSms = 4};
      const DispatchResult sent = dispatch(rank, world, send);
      const DispatchResult second = dispatch(rank, world, fp8);
      const CombineResult combined = combine(rank, world, back, sent.handle);
      expectDispatch(rank, world, send, sent);
      expectDispatch(rank, world, fp8, second);
      expectCombine(rank, world, back, combined);
    });
  }
}

}  // namespace
}  // namespace mscclpp::ep::testing
