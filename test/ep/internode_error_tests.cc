// What goes wrong between nodes is said on every rank that can know, within the limit.
#include <chrono>
#include <latch>

#include <gmock/gmock.h>

#include <mscclpp/errors.hpp>

#include "core/limits.hpp"
#include "ep/nodes.hpp"

namespace mscclpp::ep::testing {
namespace {

using std::chrono::milliseconds;
using test::containsAll;
using test::expectAtSomeLimit;
using ::testing::AllOf;
using ::testing::AnyOf;
using ::testing::HasSubstr;
using ::testing::StartsWith;

constexpr NodeShape kTwoByTwo{4, 2}, kTwoByOne{2, 1};

World smallWorld(int ranks) {
  return World({.ranks = ranks, .tokens = {6}, .topk = 2, .experts = 2 * ranks});
}
BufferOptions optionsWith(const NodeShape& shape, milliseconds limit) {
  BufferOptions options = nodeOptions(shape);
  options.timeoutSeconds = std::chrono::duration<double>(limit).count();
  return options;
}

/// What a rank does instead of the last call of the others.
enum class Missing { dispatch, worstDispatch, cachedDispatch, combine };

void callUntil(RankContext& rank, const World& world, Missing missing, bool absent) {
  const DispatchCase send{.hidden = 16, .worst = 24};
  const bool notYet = missing == Missing::dispatch || missing == Missing::worstDispatch;
  DispatchHandle handle;
  if (!notYet) handle = dispatch(rank, world, send).handle;
  rank.sync();
  if (absent) return;
  DispatchCase call = missing == Missing::dispatch ? DispatchCase{.hidden = 16} : send;
  if (missing == Missing::combine) {
    combine(rank, world, {.hidden = 16}, handle);
  } else {
    if (missing == Missing::cachedDispatch) call = {.hidden = 16, .handle = handle};
    dispatch(rank, world, call);
  }
  rank.sync();
  rank.buffer().checkHealth();
}

/// Rank 3 does not make the last call. The ranks of the other node and its neighbour time out, and
/// somebody names it.
TEST(EpNodeErrors, AMissingRankIsNamed) {
  const World world = smallWorld(4);
  for (const Transport transport : {Transport::shm, Transport::tcp}) {
    for (const Missing missing :
         {Missing::dispatch, Missing::worstDispatch, Missing::cachedDispatch, Missing::combine}) {
      SCOPED_TRACE(static_cast<int>(missing));
      const auto wanted = [](std::size_t rank, const std::string& text) {
        if (rank == 3) return true;
        return containsAll(text, {"timeout: EP timeout after",
                                  rank == 0 ? "waited for rank" : "waited for rank 3"});
      };
      expectAtSomeLimit(milliseconds(500), "EP timeout after", wanted, [&](milliseconds limit) {
        std::latch ended(3);
        return tryRanks(
            4,
            [&](int) {
              return optionsWith({4, 2, transport}, limit);
            },
            [&](RankContext& rank) {
              const bool absent = rank.rank() == 3;
              const std::string error = errorOf([&] { callUntil(rank, world, missing, absent); });
              if (!absent) ended.count_down();
              ended.wait();  // until then everybody's proxies go on
              if (!error.empty()) {
                throw Error(ErrorCode::timeout, error.substr(error.find(": ") + 2));
              }
              throw Error(ErrorCode::peerFailure, "done");  // nobody waits in destroy()
            });
      });
    }
  }
}

TEST(EpNodeErrors, UnequalDispatchesAreRefusedOnAllRanks) {
  const World world = smallWorld(4);
  const auto errors = tryRanks(
      4, [](int) { return nodeOptions(kTwoByTwo); },
      [&](RankContext& rank) { dispatch(rank, world, {.hidden = rank.rank() < 2 ? 16 : 24}); });
  for (const std::string& error : errors) {
    EXPECT_THAT(error, AllOf(StartsWith("invalidArgument: "), HasSubstr("equal calls"),
                             HasSubstr("hidden=16"), HasSubstr("hidden=24")));
  }
}

/// Without counts, the first row of the other node tells. Who has been told gives up, perhaps
/// before it has sent a row itself: then the other one waits in vain, for it.
TEST(EpNodeErrors, UnequalCachedDispatchesAndCombinesAreNoticed) {
  const World world({.ranks = 2, .tokens = {40}, .topk = 2, .experts = 4});
  for (const bool combining : {false, true}) {
    std::latch ended(2);
    std::string errors[2];
    tryRanks(
        2, [](int) { return optionsWith(kTwoByOne, milliseconds(4000)); },
        [&](RankContext& rank) {
          const DispatchResult sent = dispatch(rank, world, {.hidden = 16});
          const int hidden = rank.rank() == 0 ? 16 : 48;
          errors[rank.rank()] = errorOf([&] {
            if (combining) {
              combine(rank, world, {.hidden = hidden}, sent.handle);
            } else {
              dispatch(rank, world, {.hidden = hidden, .handle = sent.handle});
            }
            rank.sync();
            rank.buffer().checkHealth();
          });
          ended.arrive_and_wait();                      // until then both sides' proxies go on
          throw Error(ErrorCode::peerFailure, "done");  // nobody waits in destroy()
        });
    const auto told = AllOf(StartsWith("invalidArgument: "), HasSubstr("equal calls"),
                            HasSubstr("hidden=16"), HasSubstr("hidden=48"));
    EXPECT_THAT(errors, ::testing::Contains(told));
    for (int r = 0; r < 2; ++r) {
      const std::string other = "waited for rank " + std::to_string(1 - r);
      EXPECT_THAT(errors[r], AnyOf(told, AllOf(StartsWith("timeout: "), HasSubstr(other))));
    }
  }
}

TEST(EpNodeErrors, ExpertIdOutOfRangeIsRefusedOnAllRanks) {
  const World world = smallWorld(2);
  runRanks(2, nodeOptions(kTwoByOne), [&](RankContext& rank) {
    const DispatchCase call{.hidden = 16};
    const DispatchRequest good = makeDispatch(rank, world, call);
    DispatchRequest request = good;
    if (rank.rank() == 1) {
      auto indices = world.routing(1).topkIdx;
      indices[5] = 77;
      request.topkIdx = rank.upload(DType::i64, {6, 2}, indices);
    }
    EXPECT_THAT(errorOf([&] { rank.buffer().dispatch(request); }),
                HasSubstr("rank 1 passed expert id 77"));
    expectDispatch(rank, world, call, rank.buffer().dispatch(good));  // still in step
  });
}

/// More rows than num_worst_tokens: an error of that rank alone; the others get theirs.
TEST(EpNodeErrors, OverflowIsTheReceiversOwn) {
  const World world({.ranks = 4,
                     .tokens = {10},
                     .topk = 2,
                     .experts = 8,
                     .pattern = reference::Pattern::oneRank});
  const auto errors = tryRanks(
      4, [](int) { return nodeOptions(kTwoByTwo); },
      [&](RankContext& rank) {
        const DispatchCase send{.hidden = 16, .worst = 12};
        const DispatchResult sent = dispatch(rank, world, send);
        rank.sync();
        if (rank.rank() != 3) expectDispatch(rank, world, send, sent);
        rank.buffer().checkHealth();
        throw Error(ErrorCode::peerFailure, "done");  // rank 3 cannot take part in destroy()
      });
  for (std::size_t r = 0; r < errors.size(); ++r) {
    if (r == 3) {
      EXPECT_THAT(errors[r], AllOf(HasSubstr("rank 3 would receive 40 rows"),
                                   HasSubstr("num_worst_tokens = 12")));
    } else {
      EXPECT_EQ(errors[r], "peerFailure: done");
    }
  }
}

TEST(EpNodeErrors, RingTooSmallForTheRows) {
  const World world = smallWorld(2);
  BufferOptions options = nodeOptions(kTwoByOne);
  options.numRdmaBytes = 65536;
  runRanks(2, options, [&](RankContext& rank) {
    EXPECT_THAT(errorOf([&] { dispatch(rank, world, {.hidden = 8192}); }),
                AllOf(StartsWith("invalidArgument: "), HasSubstr("num_rdma_bytes = ")));
    const DispatchCase call{.hidden = 4096};                  // a ring of one row
    const DispatchResult sent = dispatch(rank, world, call);  // still in step
    expectDispatch(rank, world, call, sent);
    EXPECT_THAT(errorOf([&] { combine(rank, world, {.hidden = 4096}, sent.handle); }),
                AllOf(StartsWith("invalidArgument: "), HasSubstr("num_rdma_bytes = ")));
  });
}

}  // namespace
}  // namespace mscclpp::ep::testing
