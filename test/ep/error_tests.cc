// Bad input: an error on the host that names value, limit and remedy, on every rank, and the group
// stays in step.
#include <gmock/gmock.h>

#include "ep/scenario.hpp"

namespace mscclpp::ep::testing {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::StartsWith;

WorldSpec smallSpec() {
  return {.ranks = 2, .tokens = {6}, .topk = 2, .experts = 4};
}

/// One change to a good request, and what the message must contain.
struct BadDispatch {
  const char* name;
  std::function<void(DispatchRequest&, RankContext&)> spoil;
  std::vector<std::string> parts;
};

std::vector<BadDispatch> badDispatches() {
  using R = DispatchRequest;
  using C = RankContext;
  return {
      {"xMissing", [](R& r, C&) { r.x = {}; }, {"x is missing"}},
      {"xDtype", [](R& r, C&) { r.x.dtype = DType::f32; }, {"f32[6, 16]", "bf16, or e4m3"}},
      {"xRank", [](R& r, C&) { r.x.shape = {96}; }, {"bf16[96]", "[any, any]"}},
      {"xPlatform",
       [](R& r, C&) {
         r.x.platform = r.x.platform == Platform::cpu ? Platform::cuda : Platform::cpu;
       },
       {"x is on the", "the Buffer on"}},
      {"xStrides",
       [](R& r, C&) {
         r.x.strides = {1, 6};
       },
       {"call .contiguous()"}},
      {"xAlignment", [](R& r, C&) { r.x.data = r.x.as<char>() + 2; }, {"2 modulo 8"}},
      {"xNoMemory", [](R& r, C&) { r.x.data = nullptr; }, {"without memory"}},
      {"hidden",
       [](R& r, C&) {
         r.x.shape = {6, 12};
       },
       {"hidden must be a multiple of 8", "pad 12 to 16"}},
      {"fp8WithoutScales", [](R& r, C&) { r.x.dtype = DType::e4m3; }, {"e4m3 needs scales"}},
      {"scalesWithoutFp8",
       [](R& r, C& c) {
         r.xScales = c.empty(DType::f32, {6, 1});
       },
       {"bf16 has none"}},
      {"scaleShape",
       [](R& r, C& c) {
         r.x.dtype = DType::e4m3;
         r.xScales = c.empty(DType::f32, {6, 2});
       },
       {"f32[6, 2]", "[6, 1]"}},
      {"scaleDtype",
       [](R& r, C& c) {
         r.x.dtype = DType::e4m3;
         r.xScales = c.empty(DType::bf16, {6, 1});
       },
       {"must be f32, or i32"}},
      {"maskMissing", [](R& r, C&) { r.isTokenInRank = {}; }, {"is_token_in_rank is missing"}},
      {"maskShape",
       [](R& r, C&) {
         r.isTokenInRank.shape = {6, 3};
       },
       {"u8[6, 3]", "[6, 2]"}},
      {"perExpertMissing", [](R& r, C&) { r.numTokensPerExpert = {}; }, {"num_tokens_per_expert"}},
      {"expertsNotDivisible",
       [](R& r, C&) { r.numTokensPerExpert.shape = {3}; },
       {"num_experts = 3", "divisible by the 2 ranks", "expert map"}},
      {"tooManyExperts",
       [](R& r, C& c) { r.numTokensPerExpert = c.empty(DType::i32, {4096}); },
       {"2048 experts per rank", "max_experts_per_rank = 1024"}},
      {"topkWithoutWeights", [](R& r, C&) { r.topkWeights = {}; }, {"give both or neither"}},
      {"topkDtype", [](R& r, C&) { r.topkIdx.dtype = DType::i32; }, {"dtype must be i64"}},
      {"topkTooLarge",
       [](R& r, C& c) {
         r.topkIdx = c.empty(DType::i64, {6, 33});
       },
       {"i64[6, 33]", "1 .. 32"}},
      {"weightsShape",
       [](R& r, C&) {
         r.topkWeights.shape = {6, 1};
       },
       {"f32[6, 1]", "[6, 2]"}},
      {"alignment",
       [](R& r, C&) { r.expertAlignment = 0; },
       {"expert_alignment = 0", "at least 1"}},
      {"worstNegative", [](R& r, C&) { r.numWorstTokens = -1; }, {"num_worst_tokens = -1"}},
      {"worstBelowTokens",
       [](R& r, C&) { r.numWorstTokens = 5; },
       {"6 tokens", "num_worst_tokens = 5"}},
      {"numSms", [](R& r, C&) { r.config.numSms = 0; }, {"num_sms = 0", "at least 1"}},
  };
}

TEST(EpBadInput, DispatchNamesValueAndRemedyAndGoesOn) {
  const World world(smallSpec());
  runRanks(2, testOptions(), [&](RankContext& rank) {
    const DispatchCase call{.hidden = 16};
    const DispatchRequest good = makeDispatch(rank, world, call);
    for (const BadDispatch& bad : badDispatches()) {
      SCOPED_TRACE(bad.name);
      DispatchRequest request = good;
      bad.spoil(request, rank);
      const std::string error = errorOf([&] { rank.buffer().dispatch(request); });
      EXPECT_THAT(error, StartsWith("invalidArgument: "));
      for (const std::string& part : bad.parts) EXPECT_THAT(error, HasSubstr(part));
    }
    // Nothing was sent, nothing is out of step.
    expectDispatch(rank, world, call, rank.buffer().dispatch(good));
  });
}

TEST(EpBadInput, CachedDispatch) {
  const World world(smallSpec());
  runRanks(2, testOptions(), [&](RankContext& rank) {
    const DispatchResult sent = dispatch(rank, world, {.hidden = 16});
    DispatchCase call{.id = 3, .hidden = 16};
    call.handle = sent.handle;
    const DispatchRequest good = makeDispatch(rank, world, call);
    DispatchRequest request = good;
    request.topkIdx = rank.empty(DType::i64, {6, 2});
    EXPECT_THAT(errorOf([&] { rank.buffer().dispatch(request); }),
                HasSubstr("a handle brings its routing along"));
    request = good;
    request.x = rank.empty(DType::bf16, {5, 16});
    EXPECT_THAT(errorOf([&] { rank.buffer().dispatch(request); }),
                AllOf(HasSubstr("bf16[5, 16]"), HasSubstr("6 tokens")));
    expectDispatch(rank, world, call, rank.buffer().dispatch(good));
  });
}

struct BadCombine {
  const char* name;
  std::function<void(CombineRequest&, RankContext&)> spoil;
  std::vector<std::string> parts;
};

std::vector<BadCombine> badCombines() {
  using R = CombineRequest;
  using C = RankContext;
  return {
      {"noHandle", [](R& r, C&) { r.handle = {}; }, {"needs the handle of a dispatch"}},
      {"xMissing", [](R& r, C&) { r.x = {}; }, {"x is missing"}},
      {"xDtype", [](R& r, C&) { r.x.dtype = DType::f32; }, {"dtype must be bf16"}},
      {"xRows", [](R& r, C&) { r.x.shape[0] += 1; }, {"its shape must be ["}},
      {"hidden", [](R& r, C&) { r.x.shape[1] = 12; }, {"multiple of 8"}},
      {"xAlignment", [](R& r, C&) { r.x.data = r.x.as<char>() + 8; }, {"8 modulo 16"}},
      {"biasOrder",
       [](R& r, C& c) {
         r.bias1 = c.empty(DType::bf16, {6, 16});
       },
       {"bias 1", "bias 0"}},
      {"biasShape",
       [](R& r, C& c) {
         r.bias0 = c.empty(DType::bf16, {6, 24});
       },
       {"bf16[6, 24]", "[6, 16]"}},
      {"weightRows",
       [](R& r, C& c) {
         r.topkWeights = c.empty(DType::f32, {r.x.shape[0] + 1, 2});
       },
       {"topk_weights", "its shape must be ["}},
      {"weightColumns",
       [](R& r, C& c) {
         r.topkWeights = c.empty(DType::f32, {r.x.shape[0], 33});
       },
       {"1 .. 32"}},
  };
}

TEST(EpBadInput, CombineNamesValueAndRemedyAndGoesOn) {
  const World world({.ranks = 2, .tokens = {6}, .topk = 4, .experts = 4});  // rows on every rank
  runRanks(2, testOptions(), [&](RankContext& rank) {
    const DispatchResult sent = dispatch(rank, world, {.hidden = 16});
    const CombineCase call{.hidden = 16};
    const CombineRequest good = makeCombine(rank, world, call, sent.handle);
    for (const BadCombine& bad : badCombines()) {
      SCOPED_TRACE(bad.name);
      CombineRequest request = good;
      bad.spoil(request, rank);
      const std::string error = errorOf([&] { rank.buffer().combine(request); });
      EXPECT_THAT(error, StartsWith("invalidArgument: "));
      for (const std::string& part : bad.parts) EXPECT_THAT(error, HasSubstr(part));
    }
    expectCombine(rank, world, call, rank.buffer().combine(good));
  });
}

TEST(EpBadInput, LayoutAndMapAndTensor) {
  runRanks(2, testOptions(), [&](RankContext& rank) {
    Buffer& buffer = rank.buffer();
    LayoutRequest request;
    request.order = rank.order();
    request.topkIdx = rank.empty(DType::i64, {4, 33});
    request.numExperts = 4;
    EXPECT_THAT(errorOf([&] { buffer.getDispatchLayout(request); }), HasSubstr("1 .. 32"));
    request.topkIdx = rank.empty(DType::i64, {4, 2});
    request.numExperts = 5;
    EXPECT_THAT(errorOf([&] { buffer.getDispatchLayout(request); }),
                HasSubstr("divisible by the 2"));
    request.numExperts = 0;
    EXPECT_THAT(errorOf([&] { buffer.getDispatchLayout(request); }), HasSubstr("num_experts = 0"));
    EXPECT_THAT(errorOf([&] {
                  buffer.createExpertMap({0, 2});
                }),
                AllOf(HasSubstr("expert 1 on rank 2"), HasSubstr("0 .. 1")));
    EXPECT_THAT(errorOf([&] { buffer.createExpertMap({}); }), HasSubstr("0 experts"));
    EXPECT_THAT(errorOf([&] { buffer.createTensor(DType::bf16, {-1, 8}); }), HasSubstr("negative"));
  });
}

TEST(EpBadInput, StagingTooSmallForOneRow) {
  const World world(smallSpec());
  BufferOptions options = testOptions();
  options.numNvlBytes = options.stagingBytes = 1024;
  const auto errors = tryRanks(
      2, [&](int) { return options; },
      [&](RankContext& rank) { dispatch(rank, world, {.hidden = 4096}); });
  for (const std::string& error : errors) {
    EXPECT_THAT(error, AllOf(StartsWith("invalidArgument: "), HasSubstr("1024 bytes"),
                             HasSubstr("raise num_nvl_bytes")));
  }
}

TEST(EpBadInput, ExpertIdOutOfRangeIsRefusedOnAllRanks) {
  for (const std::int64_t bad : {std::int64_t{4}, std::int64_t{-2}, std::int64_t{1} << 40}) {
    const World world(smallSpec());
    runRanks(2, testOptions(), [&](RankContext& rank) {
      const DispatchCase call{.hidden = 16};
      const DispatchRequest good = makeDispatch(rank, world, call);
      DispatchRequest request = good;
      if (rank.rank() == 1) {
        auto indices = world.routing(1).topkIdx;
        indices[5] = bad;
        request.topkIdx = rank.upload(DType::i64, {6, 2}, indices);
      }
      EXPECT_THAT(errorOf([&] { rank.buffer().dispatch(request); }),
                  AllOf(StartsWith("invalidArgument: dispatch refused on all ranks"),
                        HasSubstr("rank 1 passed expert id " + std::to_string(bad)),
                        HasSubstr("0 .. 3 and -1")));
      expectDispatch(rank, world, call, rank.buffer().dispatch(good));  // still in step
    });
  }
}

TEST(EpBadInput, HandleAndMapOfAnotherBuffer) {
  const World world(smallSpec());
  Meeting second(2);
  runRanks(2, testOptions(), [&](RankContext& rank) {
    RankContext other(second.bootstrap(rank.rank()), testOptions());
    const DispatchResult sent = dispatch(rank, world, {.hidden = 16});
    const CombineRequest request = makeCombine(rank, world, {.hidden = 16}, sent.handle);
    EXPECT_THAT(errorOf([&] { other.buffer().combine(request); }), HasSubstr("another Buffer"));
    DispatchCase cached{.hidden = 16};
    cached.handle = sent.handle;
    const DispatchRequest replay = makeDispatch(rank, world, cached);
    EXPECT_THAT(errorOf([&] { other.buffer().dispatch(replay); }), HasSubstr("another Buffer"));
    DispatchRequest mapped = makeDispatch(other, world, {.hidden = 16});
    mapped.expertMap = rank.expertMap({0, 1, 0, 1});
    EXPECT_THAT(errorOf([&] { other.buffer().dispatch(mapped); }), HasSubstr("another Buffer"));
    rank.sync();
    other.sync();
    other.buffer().destroy();
  });
}

TEST(EpBadInput, CallsAfterDestroy) {
  const World world(smallSpec());
  runRanks(2, testOptions(), [&](RankContext& rank) {
    const DispatchResult sent = dispatch(rank, world, {.hidden = 16});
    const DispatchRequest send = makeDispatch(rank, world, {.hidden = 16});
    const CombineRequest back = makeCombine(rank, world, {.hidden = 16}, sent.handle);
    rank.sync();
    rank.buffer().destroy();
    for (const std::string& error : {errorOf([&] { rank.buffer().dispatch(send); }),
                                     errorOf([&] { rank.buffer().combine(back); }),
                                     errorOf([&] { rank.buffer().poolBytesFree(); })}) {
      EXPECT_THAT(error, AllOf(StartsWith("invalidState: "), HasSubstr("destroyed")));
    }
    rank.buffer().destroy();  // a second time: nothing
  });
}

}  // namespace
}  // namespace mscclpp::ep::testing
