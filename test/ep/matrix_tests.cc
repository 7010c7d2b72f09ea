// Shapes of real models, many of which legacy DeepEP refuses, on any number of ranks: every output
// of dispatch and combine equals the reference bit for bit.
#include "ep/scenario.hpp"

namespace mscclpp::ep::testing {
namespace {

using reference::Pattern;

struct ModelShape {
  const char* name;
  int hidden, topk, experts;
};
constexpr ModelShape kModelShapes[] = {
    {"DeepSeekV3", 7168, 8, 256},   {"GptOss", 2880, 4, 128},      {"KimiK3", 3584, 16, 896},
    {"LongCat2", 8192, 12, 768},    {"Nemotron3", 1024, 22, 512},  {"Mixtral", 4096, 2, 8},
    {"NemotronNano", 2688, 6, 128}, {"Mscclpp6656", 6656, 8, 256}, {"Tiny8", 8, 1, 8},
    {"Tiny24", 24, 32, 40},         {"Odd2888", 2888, 5, 30}};

class EpMatrix : public ::testing::TestWithParam<std::tuple<ModelShape, int>> {
 protected:
  const ModelShape shape_ = std::get<0>(GetParam());
  const int ranks_ = std::get<1>(GetParam());

  World world(std::vector<int> tokens, Pattern pattern) const {
    return World({.ranks = ranks_,
                  .tokens = std::move(tokens),
                  .topk = shape_.topk,
                  .experts = shape_.experts,
                  .pattern = pattern});
  }
  /// Dispatch in all formats and combine in both ways, enqueued together and checked at the end.
  void run(const World& world) const {
    const std::size_t rowBytes = static_cast<std::size_t>(shape_.hidden) * 2 + 512;
    const auto rows = static_cast<std::size_t>(world.maxRows() + 8 * ranks_);
    const BufferOptions options = testOptions(rows * rowBytes * 6 + (1 << 20));
    runRanks(ranks_, options, [&](RankContext& rank) {
      const DispatchCase bf16{.id = 1, .hidden = shape_.hidden, .numSms = 3, .alignment = 4};
      const DispatchCase fp8{.id = 2,
                             .hidden = shape_.hidden,
                             .dtype = DType::e4m3,
                             .scales = Scales::transposed,
                             .numSms = 2};
      const CombineCase inPlace{.id = 3, .hidden = shape_.hidden, .biases = 1, .numSms = 2};
      const CombineCase staged{.id = 4,
                               .hidden = shape_.hidden,
                               .inPool = false,
                               .weightColumns = shape_.topk,
                               .numSms = 3};
      const DispatchResult first = dispatch(rank, world, bf16);
      const DispatchResult second = dispatch(rank, world, fp8);
      const CombineResult third = combine(rank, world, inPlace, first.handle);
      const CombineResult fourth = combine(rank, world, staged, second.handle);
      expectDispatch(rank, world, bf16, first);
      expectDispatch(rank, world, fp8, second);
      expectCombine(rank, world, inPlace, third);
      expectCombine(rank, world, staged, fourth);
    });
  }
};

TEST_P(EpMatrix, FewTokens) {
  run(world({1, 0}, Pattern::uniform));
}
TEST_P(EpMatrix, UnevenTokens) {
  run(world({7, 33, 0, 129}, Pattern::skewed));
}

INSTANTIATE_TEST_SUITE_P(Models, EpMatrix,
                         ::testing::Combine(::testing::ValuesIn(kModelShapes),
                                            ::testing::Values(1, 2, 3, 4, 5, 8)),
                         [](const auto& test) {
                           return std::string(std::get<0>(test.param).name) + "_" +
                                  std::to_string(std::get<1>(test.param)) + "Ranks";
                         });

TEST(EpMatrixLarge, DeepSeek128TokensOn8Ranks) {
  const World world({.ranks = 8, .tokens = {128}, .topk = 8, .experts = 256});
  runRanks(8, testOptions(std::size_t{64} << 20), [&](RankContext& rank) {
    const DispatchCase send{.hidden = 7168, .numSms = 4};
    const CombineCase back{.hidden = 7168, .numSms = 4};
    const DispatchResult sent = dispatch(rank, world, send);
    const CombineResult combined = combine(rank, world, back, sent.handle);
    expectDispatch(rank, world, send, sent);
    expectCombine(rank, world, back, combined);
  });
}

TEST(EpMatrixLarge, ThirtyThreeRanks) {  // more ranks than lanes of a warp
  if (testPlatform() == Platform::cuda && Device::count(Platform::cuda) < 4) {
    GTEST_SKIP() << "a GPU has 32 queues: too few for 3 streams of each of more than 10 ranks";
  }
  const World world({.ranks = 33, .tokens = {3, 0, 5}, .topk = 6, .experts = 66});
  runRanks(33, testOptions(1 << 20), [&](RankContext& rank) {
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

}  // namespace
}  // namespace mscclpp::ep::testing
