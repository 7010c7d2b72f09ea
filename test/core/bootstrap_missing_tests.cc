// TcpBootstrap when ranks are late, never come or leave. Ranks are threads.
#include <algorithm>
#include <barrier>
#include <latch>
#include <memory>

#include <gtest/gtest.h>

#include <mscclpp/bootstrap.hpp>
#include <mscclpp/errors.hpp>

#include "core/limits.hpp"
#include "core/ranks.hpp"

namespace mscclpp {
namespace {

using namespace std::chrono_literals;
using std::chrono::milliseconds;
using test::containsAll;
using test::errorOf;
using test::exercise;
using test::expectAtSomeLimit;
using test::expectError;
using test::kLongTimeout;
using test::runRanks;

using Texts = std::vector<std::string>;

TEST(TcpBootstrap, AMissingRankIsNamedOnEveryRank) {
  const auto wanted = [](size_t rank, const std::string& text) {
    return rank == 2 ? text.empty() : containsAll(text, {"TimeoutError: ", "missing rank 2 of 4"});
  };
  expectAtSomeLimit(300ms, "missing", wanted, [](milliseconds limit) {
    const UniqueId id = TcpBootstrap::createUniqueId();
    Texts texts(4);
    runRanks(4, [&](int rank) {
      if (rank == 2) return;
      texts[static_cast<size_t>(rank)] = errorOf([&] { TcpBootstrap(rank, 4, id, limit); });
    });
    return texts;
  });
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
  const auto wanted = [](size_t rank, const std::string& text) {
    return rank == 3
               ? containsAll(text, {"TimeoutError: ", "gave up: barrier", "missing rank 3 of"})
               : containsAll(text, {"TimeoutError: ", "barrier", "missing rank 3 of 4"});
  };
  expectAtSomeLimit(300ms, "missing", wanted, [](milliseconds limit) {
    const UniqueId id = TcpBootstrap::createUniqueId();
    Texts texts(4);
    std::latch othersGaveUp(3);
    runRanks(4, [&](int rank) {
      std::string& mine = texts[static_cast<size_t>(rank)];
      const std::string failure = errorOf([&] {
        TcpBootstrap group(rank, 4, id, limit);
        group.barrier();
        // The latecomer learns what happened: its barrier must not pass when others' have not.
        if (rank == 3) othersGaveUp.wait();
        mine = errorOf([&] { group.barrier(); });
        EXPECT_EQ(errorOf([&] { group.barrier(); }), mine) << "the group stays broken";
      });
      if (!failure.empty()) mine = failure;
      if (rank != 3) othersGaveUp.count_down();
    });
    return texts;
  });
}

TEST(TcpBootstrap, AMessageThatNeverComesNamesSenderAndTag) {
  const auto wanted = [](size_t rank, const std::string& text) {
    return rank == 0 ? containsAll(text, {"TimeoutError: ", "message with tag 7", "rank 1 of 2"})
                     : text.empty();
  };
  expectAtSomeLimit(300ms, "missing", wanted, [](milliseconds limit) {
    const UniqueId id = TcpBootstrap::createUniqueId();
    Texts texts(2);
    runRanks(2, [&](int rank) {
      std::string& mine = texts[static_cast<size_t>(rank)];
      const std::string failure = errorOf([&] {
        // Rank 1 waits in its next call meanwhile.
        TcpBootstrap group(rank, 2, id, rank == 0 ? limit : 4 * limit);
        if (rank == 0) {
          int value = 0;
          const auto started = std::chrono::steady_clock::now();
          mine = errorOf([&] { group.recv(&value, 4, 1, 7); });
          EXPECT_GE(std::chrono::steady_clock::now() - started, limit);
        }
        exercise(group, 1);  // the group is still good: only that message did not come
      });
      if (!failure.empty()) mine = failure;
    });
    return texts;
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

}  // namespace
}  // namespace mscclpp
