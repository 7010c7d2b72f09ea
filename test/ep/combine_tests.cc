#include "ep/scenario.hpp"

namespace mscclpp::ep::testing {
namespace {

using reference::Pattern;

class EpCombine : public ::testing::TestWithParam<std::tuple<int, Pattern>> {};

TEST_P(EpCombine, EveryVariant) {
  const auto [ranks, pattern] = GetParam();
  const World world({.ranks = ranks,
                     .tokens = {33, 0, 7, 128, 1},
                     .topk = 4,
                     .experts = 6 * ranks,
                     .pattern = pattern});
  runRanks(ranks, testOptions(), [&](RankContext& rank) {
    const DispatchResult sent = dispatch(rank, world, {.hidden = 16});
    std::vector<CombineCase> calls;
    std::vector<CombineResult> results;
    for (const bool inPool : {true, false}) {
      for (const int biases : {0, 1, 2}) {
        const int i = static_cast<int>(calls.size());
        calls.push_back({.id = 20 + calls.size(),
                         .hidden = i % 2 ? 136 : 2560,
                         .inPool = inPool,
                         .biases = biases,
                         .weightColumns = biases == 1 ? 0 : 4 - biases,
                         .numSms = 1 + i % 4});
      }
    }
    for (const CombineCase& call : calls) {
      results.push_back(combine(rank, world, call, sent.handle));
    }
    for (std::size_t i = 0; i < calls.size(); ++i) {
      SCOPED_TRACE("call " + std::to_string(i));
      expectCombine(rank, world, calls[i], results[i]);
    }
  });
}
INSTANTIATE_TEST_SUITE_P(All, EpCombine,
                         ::testing::Combine(::testing::Values(1, 2, 5),
                                            ::testing::ValuesIn(reference::kPatterns)),
                         [](const auto& test) {
                           return std::to_string(std::get<0>(test.param)) + "Ranks_" +
                                  reference::nameOf(std::get<1>(test.param));
                         });

TEST(EpCombineHidden, EveryPieceCountAndRowsInParts) {
  // 8 KB is what the consumers keep in registers on the CPU platform: larger rows move in parts.
  const World world({.ranks = 2, .tokens = {6, 3}, .topk = 2, .experts = 4});
  runRanks(2, testOptions(std::size_t{16} << 20), [&](RankContext& rank) {
    const DispatchResult sent = dispatch(rank, world, {.hidden = 16});
    for (const int hidden : {8, 16, 24, 248, 256, 264, 4088, 4096, 4104, 8200, 16392, 40960}) {
      SCOPED_TRACE(hidden);
      for (const bool inPool : {true, false}) {
        const CombineCase call{.id = 7, .hidden = hidden, .inPool = inPool, .biases = 1};
        expectCombine(rank, world, call, combine(rank, world, call, sent.handle));
      }
    }
  });
}

TEST(EpCombineWithoutDispatchData, HandleOfATopklessDispatch) {
  const World world({.ranks = 3, .tokens = {12}, .topk = 2, .experts = 6});
  runRanks(3, testOptions(), [&](RankContext& rank) {
    const DispatchResult sent = dispatch(rank, world, {.hidden = 16, .withTopk = false});
    const CombineCase call{.hidden = 16, .weightColumns = 32};
    expectCombine(rank, world, call, combine(rank, world, call, sent.handle));
  });
}

/// A layer as models run it. Expert e computes x * (1 + e) + e; a choice counts with its weight.
std::vector<std::uint16_t> runExperts(const World& world, int rank, int hidden,
                                      const std::vector<std::uint16_t>& x,
                                      const std::vector<std::int64_t>& topkIdx,
                                      const std::vector<float>& weights) {
  std::vector<std::uint16_t> y;
  const auto topk = static_cast<std::size_t>(world.spec().topk);
  for (std::size_t row = 0; row < topkIdx.size() / topk; ++row) {
    for (std::size_t c = 0; c < static_cast<std::size_t>(hidden); ++c) {
      const float in = reference::bf16ToFloat(x[row * static_cast<std::size_t>(hidden) + c]);
      float sum = 0;
      for (std::size_t k = 0; k < topk; ++k) {
        const std::int64_t local = topkIdx[row * topk + k];
        if (local < 0) continue;
        const auto e =
            static_cast<float>(world.placement().expertAt(rank, static_cast<int>(local)));
        sum += weights[row * topk + k] * (in * (1 + e) + e);
      }
      y.push_back(reference::floatToBf16(sum));
    }
  }
  return y;
}

TEST(EpLayer, EveryExpertComputesSomethingElse) {
  constexpr int kHidden = 200;
  for (const bool mapped : {false, true}) {
    const World world(
        {.ranks = 4, .tokens = {60, 9}, .topk = 5, .experts = 16, .mapped = mapped, .seed = 3});
    const DispatchCase send{.hidden = kHidden};
    runRanks(4, testOptions(), [&](RankContext& rank) {
      const DispatchResult sent = dispatch(rank, world, send);
      const auto y =
          runExperts(world, rank.rank(), kHidden, rank.download<std::uint16_t>(sent.recvX),
                     rank.download<std::int64_t>(sent.recvTopkIdx),
                     rank.download<float>(sent.recvTopkWeights));
      CombineRequest request;
      request.handle = sent.handle;
      request.order = rank.order();
      request.x =
          rank.buffer().createTensor(DType::bf16, sent.recvX.shape, request.order.computeStream);
      rank.uploadTo(request.x, y);
      const CombineResult combined = rank.buffer().combine(request);

      // The same layer from the routing alone, without any dispatch.
      const int me = rank.rank();
      const auto bytes = inputRows(world, send, me);
      std::vector<std::uint16_t> x(bytes.size() / 2);
      std::memcpy(x.data(), bytes.data(), bytes.size());
      std::vector<float> sum(x.size(), 0.0f);
      for (int host = 0; host < 4; ++host) {
        std::vector<std::int64_t> local = world.routing(me).topkIdx;
        for (std::int64_t& expert : local) {
          const auto e = static_cast<std::size_t>(expert);
          const bool here = expert >= 0 && world.placement().rankOf[e] == host;
          expert = here ? world.placement().indexOf[e] : -1;
        }
        const auto part = runExperts(world, host, kHidden, x, local, world.routing(me).topkWeights);
        for (std::size_t i = 0; i < sum.size(); ++i) sum[i] += reference::bf16ToFloat(part[i]);
      }
      std::vector<std::uint16_t> expected;
      for (const float value : sum) expected.push_back(reference::floatToBf16(value));
      expectSame("layer", expected, rank.download<std::uint16_t>(combined.x), kHidden);
    });
  }
}

}  // namespace
}  // namespace mscclpp::ep::testing
