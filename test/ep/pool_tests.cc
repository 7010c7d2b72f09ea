// The peer-mapped pool: outputs that fit, outputs that do not, and memory that comes back while
// kernels still use it.
#include <algorithm>

#include "ep/scenario.hpp"

namespace mscclpp::ep::testing {
namespace {

/// A heap with room for `stagingRows` staged rows of 64 values and `poolBytes` bytes of pool.
BufferOptions tightOptions(std::size_t stagingBytes, std::size_t poolBytes) {
  BufferOptions options = testOptions();
  options.stagingBytes = stagingBytes;
  options.numNvlBytes = stagingBytes + poolBytes;
  return options;
}

TEST(EpPool, OutputsLieInThePool) {
  const World world({.ranks = 2, .tokens = {20}, .topk = 2, .experts = 4});
  runRanks(2, testOptions(), [&](RankContext& rank) {
    const std::size_t before = rank.buffer().poolBytesFree();
    {
      const DispatchResult sent = dispatch(rank, world, {.hidden = 64});
      EXPECT_TRUE(rank.buffer().inPool(sent.recvX));
      EXPECT_TRUE(rank.buffer().inPool(sent.recvTopkIdx));
      EXPECT_LT(rank.buffer().poolBytesFree(), before);
      rank.sync();
    }
    EXPECT_EQ(rank.buffer().poolBytesFree(), before);
  });
}

class EpStaged : public ::testing::TestWithParam<int> {};  // ranks

TEST_P(EpStaged, DispatchInManyWindowsWithoutAnyPool) {
  const int ranks = GetParam();
  const World world({.ranks = ranks, .tokens = {50, 3, 0}, .topk = 4, .experts = 4 * ranks});
  // One row is 128 + 16 + 48 + 4 bytes at most: about 13 rows per window.
  runRanks(ranks, tightOptions(4096, 0), [&](RankContext& rank) {
    const DispatchCase bf16{.id = 1, .hidden = 64, .numSms = 3};
    const DispatchCase fp8{.id = 2, .hidden = 136, .dtype = DType::e4m3};
    const DispatchCase worst{.id = 3, .hidden = 64, .worst = world.maxRows() + 30 + ranks};
    DispatchCase cached{.id = 4, .hidden = 72};
    const DispatchResult a = dispatch(rank, world, bf16);
    const DispatchResult b = dispatch(rank, world, fp8);
    const DispatchResult c = dispatch(rank, world, worst);
    cached.handle = a.handle;
    const DispatchResult d = dispatch(rank, world, cached);
    EXPECT_FALSE(rank.buffer().inPool(a.recvX));
    expectDispatch(rank, world, bf16, a);
    expectDispatch(rank, world, fp8, b);
    expectDispatch(rank, world, worst, c);
    expectDispatch(rank, world, cached, d);
  });
}

TEST_P(EpStaged, CombineInManyWaves) {
  const int ranks = GetParam();
  const World world({.ranks = ranks, .tokens = {70, 3, 0, 41}, .topk = 4, .experts = 4 * ranks});
  // 8 tokens of 128 + 16 bytes for every peer: the least that is allowed, nine waves.
  const auto peers = static_cast<std::size_t>(ranks - 1);
  runRanks(ranks,
           tightOptions(256 + 16 * peers + 8 * 144 * std::max<std::size_t>(peers, 1) + 4096, 0),
           [&](RankContext& rank) {
             const DispatchResult sent = dispatch(rank, world, {.hidden = 16});
             const CombineCase plain{.id = 5, .hidden = 64, .biases = 1, .numSms = 3};
             const CombineCase weighted{.id = 6, .hidden = 64, .weightColumns = 4, .numSms = 2};
             const CombineResult a = combine(rank, world, plain, sent.handle);
             const CombineResult b = combine(rank, world, weighted, sent.handle);
             expectCombine(rank, world, plain, a);
             expectCombine(rank, world, weighted, b);
           });
}
INSTANTIATE_TEST_SUITE_P(Ranks, EpStaged, ::testing::Values(1, 2, 3, 5));

TEST(EpPoolMix, SomeRanksStageAndOthersDoNot) {
  const World world({.ranks = 4, .tokens = {30, 50}, .topk = 4, .experts = 16});
  runRanks(4, tightOptions(16384, 1 << 20), [&](RankContext& rank) {
    // Odd ranks use their pool up.
    Tensor hog;
    if (rank.rank() % 2 == 1) {
      hog = rank.buffer().createTensor(DType::u8,
                                       {static_cast<std::int64_t>(rank.buffer().poolBytesFree())},
                                       rank.compute().native());
      EXPECT_EQ(rank.buffer().poolBytesFree(), 0u);
    }
    const DispatchCase send{.hidden = 64};
    const DispatchResult sent = dispatch(rank, world, send);
    EXPECT_EQ(rank.buffer().inPool(sent.recvX), rank.rank() % 2 == 0);
    const CombineCase back{.hidden = 64, .biases = 1, .weightColumns = 4};
    const CombineResult combined = combine(rank, world, back, sent.handle);
    expectDispatch(rank, world, send, sent);
    expectCombine(rank, world, back, combined);
  });
}

TEST(EpPoolFull, OutputsThatAreKeptPushLaterOnesOut) {
  const World world({.ranks = 2, .tokens = {64}, .topk = 2, .experts = 4});
  runRanks(2, tightOptions(65536, 60000), [&](RankContext& rank) {
    std::vector<DispatchCase> calls;
    std::vector<DispatchResult> kept;
    int inPool = 0;
    for (std::uint64_t i = 0; i < 8; ++i) {
      calls.push_back({.id = 100 + i, .hidden = 64});
      kept.push_back(dispatch(rank, world, calls.back()));
      inPool += rank.buffer().inPool(kept.back().recvX) ? 1 : 0;
    }
    EXPECT_GT(inPool, 0);
    EXPECT_LT(inPool, 8);
    for (std::size_t i = 0; i < kept.size(); ++i) {
      SCOPED_TRACE("call " + std::to_string(i));
      expectDispatch(rank, world, calls[i], kept[i]);
    }
  });
}

TEST(EpPoolReuse, MemoryComesBackWhileKernelsAreQueued) {
  const World world({.ranks = 3, .tokens = {40}, .topk = 3, .experts = 6});
  // Room for two outputs: every further call takes what the last but one dropped, still in use.
  runRanks(3, tightOptions(65536, 60000), [&](RankContext& rank) {
    std::vector<Tensor> copies;
    std::vector<DispatchCase> calls;
    for (std::uint64_t i = 0; i < 12; ++i) {
      calls.push_back({.id = 200 + i, .hidden = 64});
      const DispatchResult sent = dispatch(rank, world, calls.back());
      Tensor copy = rank.empty(DType::bf16, sent.recvX.shape);
      rank.device().copy(copy.data, sent.recvX.data, copy.bytes(), rank.compute());
      copies.push_back(copy);
    }
    for (std::size_t i = 0; i < calls.size(); ++i) {
      SCOPED_TRACE("call " + std::to_string(i));
      std::vector<std::uint16_t> expected;
      for (const auto& source : world.received(rank.rank()).rows) {
        const auto row = reference::keyedBf16({calls[i].id, source.rank, source.token}, 1, 64);
        expected.insert(expected.end(), row.begin(), row.end());
      }
      expectSame("recv_x", expected, rank.download<std::uint16_t>(copies[i]), 64);
    }
  });
}

TEST(EpPoolReuse, TensorsOutliveTheBuffer) {
  const World world({.ranks = 2, .tokens = {20}, .topk = 2, .experts = 4});
  std::vector<DispatchResult> kept(2);
  runRanks(2, testOptions(), [&](RankContext& rank) {
    // The caller's stream ends here: outputs that outlive it must belong to the communication
    // stream.
    kept[static_cast<std::size_t>(rank.rank())] =
        dispatch(rank, world, {.hidden = 64, .commStreamOwns = true});
  });
  if (testPlatform() != Platform::cpu) return;
  for (int r = 0; r < 2; ++r) {
    const auto rows = world.received(r).rows;
    const auto* x = kept[static_cast<std::size_t>(r)].recvX.as<std::uint16_t>();
    for (std::size_t i = 0; i < rows.size(); ++i) {
      EXPECT_EQ(x[i * 64], reference::keyedBf16({1, rows[i].rank, rows[i].token}, 1, 64)[0]);
    }
  }
}

TEST(EpPoolDrop, WorkOnADroppedPoolTensorOutlivesTheBuffer) {
  runRanks(2, testOptions(std::size_t{64} << 20), [&](RankContext& rank) {
    // Dropped at once, destroyed at once: the fills must still find their memory.
    for (int i = 0; i < 4; ++i) {
      const Tensor tensor =
          rank.buffer().createTensor(DType::u8, {8 << 20}, rank.compute().native());
      EXPECT_TRUE(rank.buffer().inPool(tensor));
      rank.device().fill(tensor.data, 7, tensor.bytes(), rank.compute());
    }
    rank.buffer().destroy();
  });
}

}  // namespace
}  // namespace mscclpp::ep::testing
