#include "ep/layer_calls.hpp"

namespace mscclpp::ep::testing {

World layerWorld(int ranks) {
  return World({.ranks = ranks, .tokens = {40, 0, 17, 129}, .topk = 3, .experts = 4 * ranks});
}

void runLayerCalls(RankContext& rank) {
  const World world = layerWorld(rank.ranks());
  for (std::uint64_t i = 0; i < 3; ++i) {
    const DispatchCase exact{.id = 10 + i, .hidden = 264};
    const DispatchCase worst{.id = 20 + i, .hidden = 64, .worst = 600};
    DispatchCase cached{
        .id = 30 + i, .hidden = 512, .dtype = DType::e4m3, .scales = Scales::padded};
    const CombineCase inPool{.id = 40 + i, .hidden = 264, .biases = 2};
    const CombineCase staged{.id = 50 + i, .hidden = 64, .inPool = false, .weightColumns = 3};
    const DispatchResult a = dispatch(rank, world, exact), b = dispatch(rank, world, worst);
    cached.handle = a.handle;
    const DispatchResult c = dispatch(rank, world, cached);
    const CombineResult d = combine(rank, world, staged, b.handle);
    const CombineResult e = combine(rank, world, inPool, a.handle);
    expectDispatch(rank, world, exact, a);
    expectDispatch(rank, world, worst, b);
    expectDispatch(rank, world, cached, c);
    expectCombine(rank, world, staged, d);
    expectCombine(rank, world, inPool, e);
  }
}

LowLatencyWorld decodingWorld(int ranks) {
  return LowLatencyWorld(
      {.ranks = ranks, .tokens = {7, 0, 3, 12}, .topk = 3, .experts = 4 * ranks, .maxTokens = 12});
}
BufferOptions decodingOptions(int ranks) {
  return lowLatencyOptions(decodingWorld(ranks), kDecodingHidden);
}

void runDecodingCalls(RankContext& rank) {
  const LowLatencyWorld world = decodingWorld(rank.ranks());
  const auto callOf = [](std::uint64_t id, bool hook) {
    return LowLatencyCase{.id = id, .hidden = kDecodingHidden, .fp8 = id % 3 == 0, .hook = hook};
  };
  for (std::uint64_t i = 0; i < 6; ++i) {
    lowLatencyRoundTrip(rank, world, callOf(10 + i, i % 2 == 1), callOf(20 + i, i % 4 > 1));
  }
}

}  // namespace mscclpp::ep::testing
