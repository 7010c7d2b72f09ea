// Calls that differ between ranks, and ranks that never call: every rank that can know gets an
// error that says so, within the limit.
#include <barrier>
#include <chrono>
#include <latch>

#include <gmock/gmock.h>

#include "core/limits.hpp"
#include "ep/scenario.hpp"

namespace mscclpp::ep::testing {
namespace {

using std::chrono::milliseconds;
using test::containsAll;
using test::expectAtSomeLimit;
using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::StartsWith;

WorldSpec smallSpec() {
  return {.ranks = 2, .tokens = {6}, .topk = 2, .experts = 4};
}

BufferOptions optionsWith(milliseconds limit) {
  BufferOptions options = testOptions();
  options.timeoutSeconds = std::chrono::duration<double>(limit).count();
  return options;
}

constexpr milliseconds kFirstLimit(500);
constexpr const char* kLate = "EP timeout after";

TEST(EpUnequal, OptionsAreComparedAtCreation) {
  struct Unequal {
    const char* field;
    std::function<void(BufferOptions&)> change;
  };
  const Unequal cases[] = {
      {"num_nvl_bytes", [](BufferOptions& o) { o.numNvlBytes += 4096; }},
      {"staging_bytes", [](BufferOptions& o) { o.stagingBytes = 4096; }},
      {"max_experts_per_rank", [](BufferOptions& o) { o.maxExpertsPerRank = 7; }},
      {"first_epoch", [](BufferOptions& o) { o.firstEpoch = 9; }},
  };
  for (const Unequal& unequal : cases) {
    SCOPED_TRACE(unequal.field);
    const auto errors = tryRanks(
        3,
        [&](int rank) {
          BufferOptions options = testOptions();
          if (rank == 1) unequal.change(options);
          return options;
        },
        [](RankContext&) {});
    for (const std::string& error : errors) {
      EXPECT_THAT(error, AllOf(StartsWith("invalidArgument: "), HasSubstr(unequal.field),
                               HasSubstr("on rank 1")));
    }
  }
}

/// Calls that differ between ranks. `good` is what rank 0 calls, `bad` rank 1.
struct UnequalCall {
  const char* name;
  DispatchCase good, bad;
  std::vector<std::string> parts;
};

TEST(EpUnequal, DispatchesAreRefusedOnAllRanks) {
  const World world(smallSpec());
  const UnequalCall calls[] = {
      {"hidden", {.hidden = 16}, {.hidden = 24}, {"hidden=16", "hidden=24"}},
      {"dtype", {.hidden = 16}, {.hidden = 16, .dtype = DType::e4m3}, {"dtype=bf16", "dtype=e4m3"}},
      {"topk", {.hidden = 16}, {.hidden = 16, .withTopk = false}, {"topk=2", "topk=0"}},
      {"scales",
       {.hidden = 16, .dtype = DType::e4m3},
       {.hidden = 16, .dtype = DType::e4m3, .scales = Scales::i32},
       {"f32 scales", "i32 scales"}},
      {"worst", {.hidden = 16}, {.hidden = 16, .worst = 99}, {"options #"}},
  };
  for (const UnequalCall& call : calls) {
    SCOPED_TRACE(call.name);
    const auto errors = tryRanks(
        2, [](int) { return testOptions(); },
        [&](RankContext& rank) {
          const DispatchResult sent =
              dispatch(rank, world, rank.rank() == 0 ? call.good : call.bad);
          rank.sync();  // without a host wait the error comes with the next call
          rank.buffer().checkHealth();
        });
    for (const std::string& error : errors) {
      EXPECT_THAT(error, AllOf(StartsWith("invalidArgument: "), HasSubstr("equal calls")));
      for (const std::string& part : call.parts) EXPECT_THAT(error, HasSubstr(part));
    }
  }
}

TEST(EpUnequal, AnotherOperationIsNamed) {
  const World world(smallSpec());
  const auto errors = tryRanks(
      2, [](int) { return testOptions(); },
      [&](RankContext& rank) {
        const DispatchResult sent = dispatch(rank, world, {.hidden = 16});
        if (rank.rank() == 0) {
          combine(rank, world, {.hidden = 16}, sent.handle);
        } else {
          DispatchCase cached{.hidden = 16};
          cached.handle = sent.handle;
          dispatch(rank, world, cached);
        }
        rank.sync();
        rank.buffer().checkHealth();
      });
  for (const std::string& error : errors) {
    EXPECT_THAT(error,
                AllOf(HasSubstr("combine(hidden=16"), HasSubstr("cached dispatch(hidden=16")));
  }
}

TEST(EpUnequal, DispatchAgainstCombineEndsInTime) {
  const World world(smallSpec());
  const auto wanted = [](std::size_t rank, const std::string& text) {
    return containsAll(
        text,
        {rank == 0 ? "rank 0 in dispatch (notify)" : "rank 1 in combine (entry)", "same calls"});
  };
  expectAtSomeLimit(kFirstLimit, kLate, wanted, [&](milliseconds limit) {
    return tryRanks(
        2, [&](int) { return optionsWith(limit); },
        [&](RankContext& rank) {
          const DispatchResult sent = dispatch(rank, world, {.hidden = 16});
          if (rank.rank() == 0) {
            dispatch(rank, world, {.hidden = 16});
          } else {
            combine(rank, world, {.hidden = 16}, sent.handle);
            rank.sync();
            rank.buffer().checkHealth();
          }
        });
  });
}

/// Rank 1 never makes the call: the others name it, within the limit.
class EpMissingRank : public ::testing::TestWithParam<const char*> {};

void makeCall(RankContext& rank, const World& world, const std::string& call,
              const DispatchHandle& handle) {
  if (call == "dispatch") {
    dispatch(rank, world, {.hidden = 16});
  } else if (call == "cached") {
    DispatchCase cached{.hidden = 16};
    cached.handle = handle;
    dispatch(rank, world, cached);
  } else {
    combine(rank, world, {.hidden = 16, .inPool = call == "combine"}, handle);
  }
  rank.sync();
  rank.buffer().checkHealth();
}

TEST_P(EpMissingRank, IsNamedByTheOthersInTime) {
  const World world({.ranks = 3, .tokens = {6}, .topk = 3, .experts = 6});
  const auto wanted = [](std::size_t rank, const std::string& text) {
    return rank == 1 || containsAll(text, {"timeout: EP timeout after", "waited for rank 1",
                                           "has not entered this call", "MSCCLPP_EP_TIMEOUT"});
  };
  expectAtSomeLimit(kFirstLimit, kLate, wanted, [&](milliseconds limit) {
    const auto start = std::chrono::steady_clock::now();
    const auto errors = tryRanks(
        3, [&](int) { return optionsWith(limit); },
        [&](RankContext& rank) {
          const DispatchResult sent = dispatch(rank, world, {.hidden = 16});
          rank.sync();
          if (rank.rank() != 1) makeCall(rank, world, GetParam(), sent.handle);
        });
    const auto taken = std::chrono::steady_clock::now() - start;
    EXPECT_LT(taken, limit + std::chrono::seconds(30)) << "the limit does not end the wait";
    return errors;
  });
}
INSTANTIATE_TEST_SUITE_P(Calls, EpMissingRank,
                         ::testing::Values("dispatch", "cached", "combine", "staged"),
                         [](const auto& test) { return std::string(test.param); });

/// Rank 1 calls when rank 0 has given it up. What rank 0 had prepared by then must not look like an
/// answer: its rows for rank 1 were never sent, and its memory is being used otherwise.
class EpLateRank : public ::testing::TestWithParam<const char*> {};

TEST_P(EpLateRank, GetsAnErrorNotWhatIsThere) {
  const World world(smallSpec());
  const auto wanted = [](std::size_t rank, const std::string& text) {
    return containsAll(
        text, {"timeout: EP timeout after", rank == 0 ? "waited for rank 1" : "waited for rank 0"});
  };
  expectAtSomeLimit(kFirstLimit, kLate, wanted, [&](milliseconds limit) {
    std::latch gaveUp(1);
    std::string errors[2];
    tryRanks(
        2, [&](int) { return optionsWith(limit); },
        [&](RankContext& rank) {
          std::string& mine = errors[rank.rank()];
          DispatchHandle handle;
          mine = errorOf([&] {
            handle = dispatch(rank, world, {.hidden = 16}).handle;
            rank.sync();
          });
          if (rank.rank() == 1) gaveUp.wait();
          if (mine.empty()) mine = errorOf([&] { makeCall(rank, world, GetParam(), handle); });
          if (rank.rank() == 0) gaveUp.count_down();
        });
    return std::vector<std::string>{errors[0], errors[1]};
  });
}
INSTANTIATE_TEST_SUITE_P(Calls, EpLateRank,
                         ::testing::Values("dispatch", "cached", "combine", "staged"),
                         [](const auto& test) { return std::string(test.param); });

/// Rank 1 has told that it is done and gives up on rank 0, which is only slow. Its memory serves
/// other ends from then on, so rank 0 must not take what it still reads there for an answer.
TEST(EpSlowRank, LearnsThatItsPeerGaveUp) {
  if (testPlatform() == Platform::cuda) GTEST_SKIP() << "no GPU takes longer than a limit can be";
  const World world({.ranks = 2, .tokens = {256, 0}, .topk = 2, .experts = 4});
  const CombineCase call{.hidden = 1 << 18, .numSms = 1};
  constexpr int kPatience = 8;  // rank 1 has this much less of it
  const auto wanted = [](std::size_t rank, const std::string& text) {
    return rank == 0 ? containsAll(text, {kLate, "rank 0 in combine (end) waited for rank 1"})
                     : containsAll(text, {kLate, "rank 1 in combine (end) waited for rank 0"});
  };
  expectAtSomeLimit(kFirstLimit, kLate, wanted, [&](milliseconds limit) {
    std::barrier ready(2);
    return tryRanks(
        2,
        [&](int rank) {
          BufferOptions options = optionsWith(rank == 0 ? limit : limit / kPatience);
          options.numNvlBytes = std::size_t{512} << 20;
          return options;
        },
        [&](RankContext& rank) {
          CombineRequest request;
          const std::string early = errorOf([&] {
            const DispatchResult sent = dispatch(rank, world, {.hidden = 8});
            request = makeCombine(rank, world, call, sent.handle);
            rank.sync();
          });
          ready.arrive_and_wait();
          if (!early.empty()) throw std::runtime_error(early);
          rank.buffer().combine(request);
          rank.sync();
          rank.buffer().checkHealth();
        });
  });
}

TEST(EpMissingRankLater, TheBufferStaysBrokenAndSaysSo) {
  const World world(smallSpec());
  tryRanks(
      2, [](int) { return optionsWith(kFirstLimit); },
      [&](RankContext& rank) {
        if (rank.rank() == 1) throw std::runtime_error("this rank gives up");
        const std::string first = errorOf([&] { dispatch(rank, world, {.hidden = 16}); });
        EXPECT_THAT(first, HasSubstr("waited for rank 1"));
        const std::string second = errorOf([&] { dispatch(rank, world, {.hidden = 16}); });
        EXPECT_THAT(second, AllOf(StartsWith("timeout: "), HasSubstr("of no use since")));
        rank.buffer().destroy();  // a broken group frees its own and waits for nobody
      });
}

}  // namespace
}  // namespace mscclpp::ep::testing
