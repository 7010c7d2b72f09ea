// TcpBootstrap and CallbackBootstrap with ranks as threads.
#include <algorithm>
#include <barrier>
#include <cstring>
#include <memory>
#include <random>

#include <gtest/gtest.h>

#include <mscclpp/bootstrap.hpp>
#include <mscclpp/errors.hpp>
#include <mscclpp/log.hpp>

#include "core/ranks.hpp"

namespace mscclpp {
namespace {

using namespace std::chrono_literals;
using test::expectError;
using test::failuresOfRanks;
using test::kLongTimeout;
using test::runRanks;

/// One of every call, with values that tell rank and round.
void exercise(Bootstrap& group, int rounds = 3) {
  const int size = group.size();
  const int rank = group.rank();
  for (int round = 0; round < rounds; ++round) {
    std::vector<int> values(static_cast<size_t>(size), -1);
    values[static_cast<size_t>(rank)] = round * 1000 + rank;
    group.allGather(values);
    for (int i = 0; i < size; ++i) ASSERT_EQ(values[static_cast<size_t>(i)], round * 1000 + i);
    group.barrier();
    const int next = (rank + 1) % size;
    const int previous = (rank + size - 1) % size;
    const int sent = round * 1000 + rank;
    int received = -1;
    group.send(&sent, sizeof(sent), next, round);
    group.recv(&received, sizeof(received), previous, round);
    ASSERT_EQ(received, round * 1000 + previous);
  }
}

class TcpGroup : public testing::TestWithParam<int> {};

TEST_P(TcpGroup, EveryCallWorksInRandomJoinOrder) {
  const int size = GetParam();
  std::mt19937 random(static_cast<unsigned>(size));
  const UniqueId id = TcpBootstrap::createUniqueId();
  std::vector<int> order(static_cast<size_t>(size));
  for (int i = 0; i < size; ++i) order[static_cast<size_t>(i)] = i;
  std::ranges::shuffle(order, random);
  runRanks(
      size,
      [&](int rank) {
        TcpBootstrap group(rank, size, id, kLongTimeout);
        EXPECT_EQ(group.rank(), rank);
        EXPECT_EQ(group.size(), size);
        exercise(group);
      },
      order);
}

INSTANTIATE_TEST_SUITE_P(Sizes, TcpGroup, testing::Values(1, 2, 3, 8, 17));

TEST(TcpBootstrap, RankZeroMayComeLast) {
  const UniqueId id = TcpBootstrap::createUniqueId();
  std::barrier<> othersAreOnTheirWay(3);
  runRanks(3, [&](int rank) {
    if (rank == 0) othersAreOnTheirWay.arrive_and_wait();
    if (rank != 0) static_cast<void>(othersAreOnTheirWay.arrive());
    TcpBootstrap group(rank, 3, id, kLongTimeout);
    exercise(group, 1);
  });
}

TEST(TcpBootstrap, MessagesKeepTheirOrderPerTag) {
  const UniqueId id = TcpBootstrap::createUniqueId();
  runRanks(2, [&](int rank) {
    TcpBootstrap group(rank, 2, id, kLongTimeout);
    constexpr int kMessages = 200;
    if (rank == 1) {
      for (int i = 0; i < kMessages; ++i) group.send(&i, sizeof(i), 0, i % 2);
    } else {
      for (const int tag : {1, 0}) {  // the second tag first
        for (int i = tag; i < kMessages; i += 2) {
          int value = -1;
          group.recv(&value, sizeof(value), 1, tag);
          ASSERT_EQ(value, i);
        }
      }
    }
    group.barrier();
  });
}

TEST(TcpBootstrap, LargeAndEmptyMessagesAndToOneself) {
  const UniqueId id = TcpBootstrap::createUniqueId();
  runRanks(2, [&](int rank) {
    TcpBootstrap group(rank, 2, id, kLongTimeout);
    std::vector<char> out(8 << 20, static_cast<char>('a' + rank));
    std::vector<char> in(out.size());
    const int peer = 1 - rank;
    group.send(out.data(), out.size(), peer, 5);
    group.send(nullptr, 0, peer, 5);
    group.send(&rank, sizeof(rank), rank, 5);
    group.recv(in.data(), in.size(), peer, 5);
    group.recv(nullptr, 0, peer, 5);
    int own = -1;
    group.recv(&own, sizeof(own), rank, 5);
    EXPECT_EQ(own, rank);
    EXPECT_EQ(static_cast<size_t>(std::ranges::count(in, static_cast<char>('a' + peer))),
              in.size());
    std::vector<char> all(2 * out.size());
    std::memcpy(all.data() + static_cast<size_t>(rank) * out.size(), out.data(), out.size());
    group.allGather(all.data(), out.size());
    EXPECT_EQ(all.front(), 'a');
    EXPECT_EQ(all.back(), 'b');
  });
}

TEST(TcpBootstrap, SeveralGroupsAtOnce) {
  constexpr int kGroups = 5;
  constexpr int kRanks = 3;
  std::vector<UniqueId> ids;
  for (int i = 0; i < kGroups; ++i) ids.push_back(TcpBootstrap::createUniqueId());
  runRanks(kGroups * kRanks, [&](int thread) {
    // Every rank number r of group g lives beside those of the others, and joins at any time.
    const int group = thread % kGroups;
    const int rank = thread / kGroups;
    TcpBootstrap bootstrap(rank, kRanks, ids[static_cast<size_t>(group)], kLongTimeout);
    std::vector<int> values(kRanks);
    values[static_cast<size_t>(rank)] = group * 100 + rank;
    bootstrap.allGather(values);
    for (int i = 0; i < kRanks; ++i) ASSERT_EQ(values[static_cast<size_t>(i)], group * 100 + i);
    exercise(bootstrap);
  });
}

TEST(TcpBootstrap, OneThreadInTwoGroupsCanInterleave) {
  const UniqueId first = TcpBootstrap::createUniqueId();
  const UniqueId second = TcpBootstrap::createUniqueId();
  runRanks(2, [&](int rank) {
    TcpBootstrap a(rank, 2, first, kLongTimeout);
    TcpBootstrap b(rank, 2, second, kLongTimeout);
    for (int i = 0; i < 20; ++i) {
      a.barrier();
      b.barrier();
    }
  });
}

// --- arguments -----------------------------------------------------------------------------------

TEST(TcpBootstrap, RefusesBadArguments) {
  const UniqueId id = TcpBootstrap::createUniqueId();
  expectError(ErrorCode::invalidArgument, {"rank 3 of 3"}, [&] { TcpBootstrap(3, 3, id, 1s); });
  expectError(ErrorCode::invalidArgument, {"rank -1 of 3"}, [&] { TcpBootstrap(-1, 3, id, 1s); });
  expectError(ErrorCode::invalidArgument, {"rank 0 of 0"}, [&] { TcpBootstrap(0, 0, id, 1s); });
  expectError(ErrorCode::invalidArgument, {"-5 ms"}, [&] { TcpBootstrap(0, 1, id, -5ms); });
  TcpBootstrap group(0, 1, id, 1s);
  int value = 0;
  expectError(ErrorCode::invalidArgument, {"peer 1", "0 to 0"},
              [&] { group.send(&value, 4, 1, 0); });
  expectError(ErrorCode::invalidArgument, {"peer -1"}, [&] { group.recv(&value, 4, -1, 0); });
  std::vector<int> tooMany(2);
  expectError(ErrorCode::invalidArgument, {"2 elements", "1 ranks"},
              [&] { group.allGather(tooMany); });
  expectError(ErrorCode::invalidArgument, {"at most"},
              [&] { group.allGather(static_cast<void*>(&value), size_t{1} << 40); });
}

TEST(TcpBootstrap, RankZeroMustOwnTheIdAndOnlyOnce) {
  const UniqueId id = TcpBootstrap::createUniqueId();
  { TcpBootstrap group(0, 1, id, 1s); }
  expectError(ErrorCode::invalidState, {"createUniqueId"}, [&] { TcpBootstrap(0, 1, id, 1s); });
}

TEST(TcpBootstrap, SizesThatDifferAreRefused) {
  const UniqueId id = TcpBootstrap::createUniqueId();
  const auto failures = failuresOfRanks(2, [&](int rank) {
    if (rank == 0) TcpBootstrap(0, 2, id, 2s);
    if (rank == 1) TcpBootstrap(1, 3, id, 2s);
  });
  EXPECT_NE(failures[1].find("size 3"), std::string::npos) << failures[1];
  EXPECT_NE(failures[0].find("missing rank 1"), std::string::npos) << failures[0];
}

TEST(TcpBootstrap, ARankTakenTwiceIsRefusedAndTheGroupGoesOn) {
  const UniqueId id = TcpBootstrap::createUniqueId();
  runRanks(2, [&](int rank) {
    TcpBootstrap group(rank, 2, id, kLongTimeout);
    group.barrier();
    if (rank == 1) {
      expectError(ErrorCode::invalidArgument, {"rank 1 of 2 is there already"},
                  [&] { TcpBootstrap(1, 2, id, 5s); });
    }
    exercise(group, 1);
  });
}

TEST(TcpBootstrap, DifferentSizesInACollectiveAreNamed) {
  const UniqueId id = TcpBootstrap::createUniqueId();
  const auto failures = failuresOfRanks(2, [&](int rank) {
    TcpBootstrap group(rank, 2, id, kLongTimeout);
    std::vector<char> data(64);
    group.allGather(data.data(), rank == 0 ? 8 : 16);
  });
  for (const auto& text : failures) {
    EXPECT_NE(text.find("8 bytes"), std::string::npos) << text;
    EXPECT_NE(text.find("16 bytes"), std::string::npos) << text;
  }
}

TEST(TcpBootstrap, AMessageOfAnotherSizeIsAnError) {
  const UniqueId id = TcpBootstrap::createUniqueId();
  runRanks(2, [&](int rank) {
    TcpBootstrap group(rank, 2, id, kLongTimeout);
    int64_t value = 0;
    if (rank == 0) group.send(&value, 4, 1, 0);
    if (rank == 1) {
      expectError(ErrorCode::invalidArgument, {"4 bytes", "8 were expected"},
                  [&] { group.recv(&value, 8, 0, 0); });
    }
    group.barrier();
  });
}

// --- who is missing ------------------------------------------------------------------------------

TEST(TcpBootstrap, AMissingRankIsNamedOnEveryRank) {
  const UniqueId id = TcpBootstrap::createUniqueId();
  const auto failures = failuresOfRanks(4, [&](int rank) {
    if (rank == 2) return;
    expectError<TimeoutError>(ErrorCode::timeout, {"missing rank 2 of 4"},
                              [&] { TcpBootstrap(rank, 4, id, 500ms); });
  });
  for (const auto& text : failures) EXPECT_EQ(text, "");
}

TEST(TcpBootstrap, SeveralMissingRanksAreListed) {
  const UniqueId id = TcpBootstrap::createUniqueId();
  expectError<TimeoutError>(ErrorCode::timeout, {"missing ranks 1, 2, 3 of 4"},
                            [&] { TcpBootstrap(0, 4, id, 200ms); });
}

TEST(TcpBootstrap, AMissingRankZeroIsNamed) {
  const UniqueId id = TcpBootstrap::createUniqueId();
  expectError<TimeoutError>(ErrorCode::timeout, {"rank 0 is missing", "rank 1 of 2"},
                            [&] { TcpBootstrap(1, 2, id, 300ms); });
}

TEST(TcpBootstrap, ARankThatSkipsACollectiveIsNamedOnEveryRank) {
  const UniqueId id = TcpBootstrap::createUniqueId();
  std::barrier<> done(4);
  runRanks(4, [&](int rank) {
    TcpBootstrap group(rank, 4, id, 1s);
    group.barrier();
    if (rank != 3) {
      expectError<TimeoutError>(ErrorCode::timeout, {"barrier", "missing rank 3 of 4"},
                                [&] { group.barrier(); });
      expectError<TimeoutError>(ErrorCode::timeout, {"missing rank 3"}, [&] { group.barrier(); });
    }
    done.arrive_and_wait();
    // The latecomer learns what happened as well.
    if (rank == 3) {
      expectError<TimeoutError>(ErrorCode::timeout, {"gave up"}, [&] { group.barrier(); });
    }
    done.arrive_and_wait();
  });
}

TEST(TcpBootstrap, AMessageThatNeverComesNamesSenderAndTag) {
  const UniqueId id = TcpBootstrap::createUniqueId();
  std::barrier<> timedOut(2);
  runRanks(2, [&](int rank) {
    TcpBootstrap group(rank, 2, id, 1s);
    if (rank == 0) {
      int value = 0;
      const auto started = std::chrono::steady_clock::now();
      expectError<TimeoutError>(ErrorCode::timeout, {"tag 7", "rank 1 of 2"},
                                [&] { group.recv(&value, 4, 1, 7); });
      EXPECT_GE(std::chrono::steady_clock::now() - started, 1s);
    }
    timedOut.arrive_and_wait();
    exercise(group, 1);  // the group is still good: only that message did not come
  });
}

TEST(TcpBootstrap, ARankThatLeftIsNamed) {
  const UniqueId id = TcpBootstrap::createUniqueId();
  std::barrier<> gone(3);
  runRanks(3, [&](int rank) {
    auto group = std::make_unique<TcpBootstrap>(rank, 3, id, kLongTimeout);
    int value = 40 + rank;
    if (rank == 2) group->send(&value, sizeof(value), 1, 9);
    group->barrier();
    if (rank == 2) group.reset();
    if (rank == 2) return gone.arrive_and_drop();
    gone.arrive_and_wait();
    // What it sent before it left still arrives.
    if (rank == 1) {
      group->recv(&value, sizeof(value), 2, 9);
      EXPECT_EQ(value, 42);
    }
    expectError<PeerError>(ErrorCode::peerFailure, {"rank 2 of 3 has left"},
                           [&] { group->recv(&value, 4, 2, 0); });
    expectError<PeerError>(ErrorCode::peerFailure, {"rank 2 of 3 has left"},
                           [&] { group->barrier(); });
    gone.arrive_and_wait();
  });
}

TEST(TcpBootstrap, RankZeroLeavingIsNamedToo) {
  const UniqueId id = TcpBootstrap::createUniqueId();
  runRanks(2, [&](int rank) {
    TcpBootstrap group(rank, 2, id, kLongTimeout);
    if (rank == 1) {
      try {
        group.barrier();
        ADD_FAILURE() << "nothing was thrown";
      } catch (const PeerError& error) {
        EXPECT_EQ(error.rank(), 0) << error.what();
      }
    }
  });
}

TEST(TcpBootstrap, WhatRankZeroSendsBeforeItLeavesArrives) {
  const UniqueId id = TcpBootstrap::createUniqueId();
  runRanks(2, [&](int rank) {
    TcpBootstrap group(rank, 2, id, kLongTimeout);
    std::vector<char> data(16 << 20, rank == 0 ? 'z' : '.');
    if (rank == 0) return group.send(data.data(), data.size(), 1, 0);
    group.recv(data.data(), data.size(), 0, 0);
    EXPECT_EQ(static_cast<size_t>(std::ranges::count(data, 'z')), data.size());
  });
}

TEST(TcpBootstrap, DestructionInAnyOrderAfterABarrier) {
  for (int round = 0; round < 20; ++round) {
    const UniqueId id = TcpBootstrap::createUniqueId();
    runRanks(4, [&](int rank) {
      TcpBootstrap group(rank, 4, id, kLongTimeout);
      group.barrier();
    });
  }
}

// --- callbacks -----------------------------------------------------------------------------------

/// The caller's own collective, for ranks that are threads.
struct SharedCollective {
  explicit SharedCollective(int ranks) : sync(ranks) {}
  void allGather(int rank, int size, void* data, size_t bytes) {
    {
      const std::lock_guard lock(mutex);
      board.resize(bytes * static_cast<size_t>(size));
      const size_t at = bytes * static_cast<size_t>(rank);
      std::memcpy(board.data() + at, static_cast<char*>(data) + at, bytes);
    }
    sync.arrive_and_wait();
    std::memcpy(data, board.data(), board.size());
    sync.arrive_and_wait();
  }
  std::mutex mutex;
  std::vector<char> board;
  std::barrier<> sync;
};

TEST(CallbackBootstrap, UsesTheCallbacks) {
  constexpr int kRanks = 4;
  SharedCollective shared(kRanks);
  std::atomic<int> barriers = 0;
  runRanks(kRanks, [&](int rank) {
    const auto gather = [&, rank](void* data, size_t bytes) {
      shared.allGather(rank, kRanks, data, bytes);
    };
    CallbackBootstrap withBarrier(rank, kRanks, gather, [&] { ++barriers; });
    std::vector<int> values(kRanks);
    values[static_cast<size_t>(rank)] = rank * 7;
    withBarrier.allGather(values);
    for (int i = 0; i < kRanks; ++i) EXPECT_EQ(values[static_cast<size_t>(i)], i * 7);
    withBarrier.barrier();
    CallbackBootstrap without(rank, kRanks, gather);
    without.barrier();
  });
  EXPECT_EQ(barriers, kRanks);
}

TEST(CallbackBootstrap, ReportsWhatItCannotDo) {
  CallbackBootstrap group(0, 1, [](void*, size_t) {});
  expectError(ErrorCode::unsupported, {"cannot send"}, [&] { group.send(nullptr, 0, 0, 0); });
  expectError(ErrorCode::unsupported, {"cannot receive"}, [&] { group.recv(nullptr, 0, 0, 0); });
  expectError(ErrorCode::invalidArgument, {"callback is empty"},
              [] { CallbackBootstrap(0, 1, {}); });
  expectError(ErrorCode::invalidArgument, {"rank 2 of 2"},
              [] { CallbackBootstrap(2, 2, [](void*, size_t) {}); });
}

TEST(CallbackBootstrap, ExceptionsOfTheCallbackPassThrough) {
  CallbackBootstrap group(0, 1, [](void*, size_t) { throw std::runtime_error("gloo says no"); });
  int value = 0;
  EXPECT_THROW(group.allGather(static_cast<void*>(&value), 4), std::runtime_error);
}

}  // namespace
}  // namespace mscclpp
