// Low-latency calls that cannot work, ranks that differ, are late or missing: refused with values,
// or named within the limit.
#include <algorithm>
#include <chrono>
#include <latch>

#include <gmock/gmock.h>

#include "core/limits.hpp"
#include "ep/low_latency_scenario.hpp"

namespace mscclpp::ep::testing {
namespace {

using std::chrono::milliseconds;
using test::containsAll;
using test::expectAtSomeLimit;
using ::testing::AllOf;
using ::testing::AnyOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::StartsWith;

constexpr milliseconds kFirstLimit(500);
constexpr const char* kLate = "EP timeout after";

BufferOptions optionsWith(const LowLatencyWorld& world, milliseconds limit) {
  BufferOptions options = lowLatencyOptions(world, 64);
  options.timeoutSeconds = std::chrono::duration<double>(limit).count();
  return options;
}
LowLatencySpec smallSpec(int ranks) {
  return {.ranks = ranks, .tokens = {4, 3}, .topk = 2, .experts = 4 * ranks};
}

TEST(EpLowLatencyErrors, BadArgumentsAreRefusedWithValues) {
  const LowLatencyWorld world(smallSpec(1));
  runRanks(1, lowLatencyOptions(world, 64), [&](RankContext& rank) {
    LowLatencyDispatchRequest good;
    good.x = rank.empty(DType::bf16, {4, 64});
    good.topkIdx = rank.upload(DType::i64, {4, 2}, world.routing(0).topkIdx);
    good.maxTokens = 4;
    good.experts = 4;
    good.order = rank.order();
    struct Bad {
      std::function<void(LowLatencyDispatchRequest&)> change;
      std::vector<std::string> parts;
    };
    const Bad cases[] = {
        {[&](auto& r) {
           r.x = rank.empty(DType::f32, {4, 64});
         },
         {"x is f32[4, 64]", "bf16"}},
        {[&](auto& r) {
           r.x = rank.empty(DType::bf16, {4, 60});
         },
         {"[4, 60]", "multiple of 8"}},
        {[&](auto& r) { r.maxTokens = 3; }, {"[4, 64]", "num_max_dispatch_tokens_per_rank = 3"}},
        {[&](auto& r) { r.maxTokens = 5000; }, {"5000", "0 .. 4096"}},
        {[&](auto& r) { r.experts = 70000; }, {"70000", "1 .. 65535"}},
        {[&](auto& r) {
           r.topkIdx = rank.empty(DType::i64, {4, 33});
         },
         {"33", "1 .. 32"}},
        {[&](auto& r) {
           r.topkIdx = rank.empty(DType::i64, {3, 2});
         },
         {"[3, 2]", "[4, any]"}},
        {[&](auto& r) { r.useUe8m0 = true; }, {"use_ue8m0", "round_scale = true"}},
        {[&](auto& r) { r.useFp8 = false, r.roundScale = true; }, {"round_scale", "use_fp8"}},
        {[&](auto& r) { r.numSms = -1; }, {"num_sms = -1"}},
        {[&](auto& r) { r.expertTotals = rank.empty(DType::i32, {3}); },
         {"cumulative_local_expert_recv_stats", "[4]"}},
        {[&](auto& r) { r.waitTotals = rank.empty(DType::i64, {2}); },
         {"wait_recv_cost_stats", "[1]"}},
        {[&](auto& r) {
           r.outputs.recvX = rank.empty(DType::bf16, {4, 4, 64});
         },
         {"recv_x is bf16", "e4m3"}},
    };
    for (const Bad& bad : cases) {
      LowLatencyDispatchRequest request = good;
      bad.change(request);
      const std::string text = errorOf([&] { rank.buffer().lowLatencyDispatch(request); });
      EXPECT_THAT(text, StartsWith("invalidArgument: "));
      for (const std::string& part : bad.parts) EXPECT_THAT(text, HasSubstr(part));
    }
    const LowLatencyDispatchResult sent = rank.buffer().lowLatencyDispatch(good);
    LowLatencyCombineRequest back;
    back.x = rank.empty(DType::bf16, {4, 5, 64});
    back.topkIdx = good.topkIdx;
    back.topkWeights = rank.empty(DType::f32, {4, 2});
    back.handle = sent.handle;
    EXPECT_THAT(errorOf([&] { rank.buffer().lowLatencyCombine(back); }),
                AllOf(HasSubstr("[4, 5, 64]"), HasSubstr("[4, 4, 64]")));
    back.x = rank.empty(DType::bf16, {4, 4, 64});
    back.handle = {};
    EXPECT_THAT(errorOf([&] { rank.buffer().lowLatencyCombine(back); }), HasSubstr("handle"));
    rank.sync();
  });
}

TEST(EpLowLatencyErrors, ModeHooksAndMasksAreChecked) {
  const LowLatencyWorld world(smallSpec(1));
  runRanks(1, testOptions(), [&](RankContext& rank) {
    EXPECT_THAT(errorOf([&] { lowLatencyDispatch(rank, world, {}); }),
                AllOf(StartsWith("invalidState: "), HasSubstr("low_latency_mode")));
  });
  runRanks(1, lowLatencyOptions(world, 64), [&](RankContext& rank) {
    void* const stream = rank.compute().native();
    const auto a = lowLatencyDispatch(rank, world, {.id = 1, .hook = true});
    const auto b = lowLatencyDispatch(rank, world, {.id = 2, .hook = true});
    EXPECT_THAT(errorOf([&] { lowLatencyDispatch(rank, world, {.id = 3}); }),
                AllOf(StartsWith("invalidState: "), HasSubstr("at most two calls")));
    a.hook(stream);
    EXPECT_THAT(errorOf([&] { a.hook(stream); }), HasSubstr("called before"));
    b.hook(stream);
    expectLowLatencyDispatch(rank, world, {.id = 2}, b);
    EXPECT_THAT(errorOf([&] { rank.buffer().updateLowLatencyMask(0, true); }),
                HasSubstr("enable_shrink"));
  });
  BufferOptions tiny = lowLatencyOptions(world, 64);
  tiny.numRdmaBytes = 64;
  for (const std::string& error : tryRanks(
           1, [&](int) { return tiny; }, [](RankContext&) {})) {
    EXPECT_THAT(error, AllOf(HasSubstr("num_rdma_bytes = 64"), HasSubstr("size_hint")));
  }
}

TEST(EpLowLatencyErrors, ExpertOutOfRangeIsNamed) {
  const LowLatencyWorld world(smallSpec(2));
  const auto errors = tryRanks(
      2, [&](int) { return lowLatencyOptions(world, 64); },
      [&](RankContext& rank) {
        LowLatencyDispatchRequest request;
        request.x = rank.empty(DType::bf16, {1, 64});
        request.topkIdx = rank.upload(DType::i64, {1, 2}, std::vector<std::int64_t>{1, 8});
        request.maxTokens = 4;
        request.experts = 8;
        request.order = rank.order();
        rank.buffer().lowLatencyDispatch(request);
        rank.sync();
        rank.buffer().checkHealth();
      });
  for (const std::string& error : errors) {
    EXPECT_THAT(error, AllOf(StartsWith("invalidArgument: "), HasSubstr("expert id 8"),
                             HasSubstr("0 .. 7")));
  }
}

/// An expert has room for every token once. Of more, nothing is written anywhere else.
TEST(EpLowLatencyErrors, RepeatedExpertsDoNotOverrunARow) {
  constexpr std::int64_t kRoom = 6;  // 2 ranks x 3 tokens
  const LowLatencyWorld world({.ranks = 2, .tokens = {3}, .topk = 2, .experts = 4});
  const auto errors = tryRanks(
      2, [&](int) { return lowLatencyOptions(world, 64); },
      [&](RankContext& rank) {
        LowLatencyDispatchRequest request;
        request.x = rank.empty(DType::bf16, {3, 64});
        // Expert 2, the first of rank 1, twice by every token.
        request.topkIdx = rank.upload(DType::i64, {3, 2}, std::vector<std::int64_t>(6, 2));
        request.maxTokens = 3;
        request.experts = 4;
        request.useFp8 = false;
        request.outputs.recvX = rank.empty(DType::bf16, {2, kRoom, 64});
        rank.uploadTo(request.outputs.recvX,
                      std::vector<std::uint16_t>(2 * kRoom * 64, std::uint16_t{0x1234}));
        request.order = rank.order();
        const auto sent = rank.buffer().lowLatencyDispatch(request);
        const std::vector<std::int32_t> counts = rank.download<std::int32_t>(sent.recvCount);
        const auto rows = rank.download<std::uint16_t>(sent.recvX);
        const auto untouched = std::count(rows.begin(), rows.end(), std::uint16_t{0x1234});
        if (rank.rank() == 1) {
          EXPECT_THAT(counts, ElementsAre(kRoom, 0));
          EXPECT_EQ(untouched, kRoom * 64);  // the other expert's
        } else {
          EXPECT_THAT(counts, ElementsAre(0, 0));
          EXPECT_EQ(untouched, 2 * kRoom * 64);
        }
        rank.buffer().checkHealth();
      });
  EXPECT_THAT(errors[1], AllOf(StartsWith("invalidArgument: "),
                               HasSubstr("expert 2 of rank 1 is sent 12 rows, where 6 fit"),
                               HasSubstr("topk_idx must differ")));
  // Rank 0 may have looked before rank 1 said so.
  EXPECT_THAT(errors[0], AnyOf("", AllOf(StartsWith("peerFailure: "), HasSubstr("expert 2"))));
}

TEST(EpLowLatencyErrors, UnequalCallsAreRefused) {
  const LowLatencyWorld world(smallSpec(2));
  const auto errors = tryRanks(
      2, [&](int) { return lowLatencyOptions(world, 64); },
      [&](RankContext& rank) {
        lowLatencyDispatch(rank, world, {.hidden = rank.rank() == 0 ? 64 : 56});
        rank.sync();
        rank.buffer().checkHealth();
      });
  for (const std::string& error : errors) {
    EXPECT_THAT(error, AllOf(StartsWith("invalidArgument: "), HasSubstr("other arguments"),
                             HasSubstr("hidden")));
  }
}

/// Rank 1 of three never makes the call: the others name it, within the limit. Over tcp the first
/// that gives up closes its connections, which another may see before its own limit ends.
class EpLowLatencyMissing : public ::testing::TestWithParam<const char*> {};

TEST_P(EpLowLatencyMissing, IsNamedByTheOthers) {
  const std::string call = GetParam();
  const LowLatencyWorld world({.ranks = 3, .tokens = {6}, .topk = 6, .experts = 6});
  const bool source = call == "source";
  const auto names = [](const std::string& text) {
    return containsAll(text, {"timeout: EP timeout after", "waited for rank 1"});
  };
  const auto wanted = [&](std::size_t rank, const std::string& text) {
    return rank == 1 || names(text) || containsAll(text, {"peerFailure: ", "connection to rank"});
  };
  bool named = false;
  expectAtSomeLimit(kFirstLimit, kLate, wanted, [&](milliseconds limit) {
    const std::vector<std::string> texts = tryRanks(
        3,
        [&](int) {
          BufferOptions options = optionsWith(world, limit);
          if (source) options.numRdmaBytes = roomForBoth(world, 64).numRdmaBytes;
          return options;
        },
        [&](RankContext& rank) {
          const auto sent = lowLatencyDispatch(rank, world, {.id = 1});
          rank.sync();
          if (rank.rank() == 1) return;
          if (call == "combine" || source) {
            lowLatencyCombine(rank, world, {.id = 1, .source = source}, sent.handle);
          } else {
            const auto again = lowLatencyDispatch(rank, world, {.id = 2, .hook = call == "hook"});
            if (again.hook) again.hook(rank.compute().native());
          }
          rank.sync();
          rank.buffer().checkHealth();
        });
    named = std::ranges::any_of(texts, names);
    return texts;
  });
  EXPECT_TRUE(named) << "nobody named rank 1";
}
INSTANTIATE_TEST_SUITE_P(Calls, EpLowLatencyMissing,
                         ::testing::Values("dispatch", "hook", "combine", "source"),
                         [](const auto& test) { return std::string(test.param); });

/// With enable_shrink the rank that does not come is masked, and the others go on with exact
/// results: its experts' rows are what is missing, and its tokens. Combines of every kind.
TEST(EpLowLatencyShrink, GoesOnWithoutTheRankThatDoesNotCome) {
  const LowLatencyWorld world({.ranks = 3, .tokens = {5, 4, 6}, .topk = 2, .experts = 6});
  // What the survivors must see: rank 1 has no tokens, and nobody gets rows from its experts.
  LowLatencySpec without = world.spec();
  without.tokens = {5, 0, 6};
  without.maxTokens = world.maxTokens();
  const LowLatencyWorld survivors(without);
  std::latch done(2);
  const auto errors = tryRanks(
      3,
      [&](int) {
        BufferOptions options = optionsWith(world, milliseconds(1000));
        options.numRdmaBytes = roomForBoth(world, 64).numRdmaBytes;
        options.enableShrink = true;
        return options;
      },
      [&](RankContext& rank) {
        const auto first = lowLatencyDispatch(rank, world, {.id = 1});
        expectLowLatencyDispatch(rank, world, {.id = 1}, first);
        if (rank.rank() == 1) {
          done.wait();
          return;
        }
        const std::shared_ptr<void> leaving(nullptr, [&](void*) { done.count_down(); });
        for (std::uint64_t id = 2; id <= 5; ++id) {
          const auto sent = lowLatencyDispatch(rank, survivors, {.id = id, .hook = id == 3});
          if (sent.hook) sent.hook(rank.compute().native());
          expectLowLatencyDispatch(rank, survivors, {.id = id}, sent);
          const LowLatencyCase back{
              .id = id, .hook = id >= 4, .logfmt = id == 5, .source = id == 3 || id == 4};
          const auto combined = lowLatencyCombine(rank, survivors, back, sent.handle);
          if (combined.hook) combined.hook(rank.compute().native());
          // Rows of the missing rank's experts count as nothing.
          std::vector<std::vector<std::uint16_t>> y;
          for (int r = 0; r < 3; ++r) {
            y.push_back(lowLatencyExperts(survivors, id, 64, r));
            if (r == 1) std::fill(y.back().begin(), y.back().end(), std::uint16_t{0});
          }
          expectSame("combined x", combinedReference(survivors, back, y, rank.rank()),
                     rank.download<std::uint16_t>(combined.x), 64);
        }
        const Tensor mask = rank.empty(DType::i32, {3});
        rank.buffer().queryLowLatencyMask(mask, rank.order());
        EXPECT_EQ(rank.download<std::int32_t>(mask), (std::vector<std::int32_t>{0, 1, 0}));
        rank.buffer().checkHealth();
      });
  for (const std::string& error : errors) EXPECT_EQ(error, "");
}

/// A mask that the caller sets, and takes back.
TEST(EpLowLatencyShrink, CallerMasks) {
  const LowLatencyWorld world({.ranks = 2, .tokens = {5, 4}, .topk = 2, .experts = 4});
  BufferOptions options = lowLatencyOptions(world, 64);
  options.enableShrink = true;
  LowLatencySpec alone = world.spec();
  runRanks(2, options, [&](RankContext& rank) {
    const int other = 1 - rank.rank();
    LowLatencySpec without = alone;
    without.maxTokens = world.maxTokens();
    without.tokens = rank.rank() == 0 ? std::vector<int>{5, 0} : std::vector<int>{0, 4};
    const LowLatencyWorld mine(without);
    const auto first = lowLatencyDispatch(rank, world, {.id = 1});
    expectLowLatencyDispatch(rank, world, {.id = 1}, first);
    rank.buffer().updateLowLatencyMask(other, true);
    const auto second = lowLatencyDispatch(rank, world, {.id = 2});
    expectLowLatencyDispatch(rank, mine, {.id = 2}, second);
    rank.buffer().cleanLowLatencyMask();
    const auto third = lowLatencyDispatch(rank, world, {.id = 3});
    expectLowLatencyDispatch(rank, world, {.id = 3}, third);
    EXPECT_THAT(errorOf([&] { rank.buffer().updateLowLatencyMask(rank.rank(), true); }),
                HasSubstr("rank_to_mask"));
  });
}

}  // namespace
}  // namespace mscclpp::ep::testing
