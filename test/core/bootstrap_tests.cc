// TcpBootstrap and CallbackBootstrap with ranks as threads.
#include <fcntl.h>

#include <algorithm>
#include <barrier>
#include <cstring>
#include <filesystem>
#include <memory>
#include <random>
#include <set>
#include <string>

#include <gtest/gtest.h>

#include <mscclpp/bootstrap.hpp>
#include <mscclpp/errors.hpp>
#include <mscclpp/log.hpp>

#include "core/ranks.hpp"

namespace mscclpp {
namespace {

using namespace std::chrono_literals;
using test::exercise;
using test::expectError;
using test::failuresOfRanks;
using test::kLongTimeout;
using test::runRanks;

/// The descriptors of this process that are open now.
std::set<int> openDescriptors() {
  std::set<int> found;
  for (const auto& entry : std::filesystem::directory_iterator("/proc/self/fd")) {
    found.insert(std::stoi(entry.path().filename()));
  }
  return found;
}

/// A child that inherits a socket keeps it open when this process has died.
TEST(TcpSockets, DoNotLeakIntoChildren) {
  constexpr int kRanks = 3;
  const std::set<int> before = openDescriptors();
  const UniqueId id = TcpBootstrap::createUniqueId();
  runRanks(kRanks, [&](int rank) {
    TcpBootstrap group(rank, kRanks, id, kLongTimeout);
    group.barrier();
    for (const int fd : openDescriptors()) {
      const int flags = ::fcntl(fd, F_GETFD);
      if (flags < 0 || before.contains(fd)) continue;  // the folder that was read itself, for one
      EXPECT_NE(flags & FD_CLOEXEC, 0)
          << std::filesystem::read_symlink("/proc/self/fd/" + std::to_string(fd));
    }
    group.barrier();
  });
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
  expectError(ErrorCode::invalidArgument, {"rank 3 of 3"}, [&] { TcpBootstrap(3, 3, id); });
  expectError(ErrorCode::invalidArgument, {"rank -1 of 3"}, [&] { TcpBootstrap(-1, 3, id); });
  expectError(ErrorCode::invalidArgument, {"rank 0 of 0"}, [&] { TcpBootstrap(0, 0, id); });
  expectError(ErrorCode::invalidArgument, {"-5 ms"}, [&] { TcpBootstrap(0, 1, id, -5ms); });
  TcpBootstrap group(0, 1, id);
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
  { TcpBootstrap group(0, 1, id); }
  expectError(ErrorCode::invalidState, {"createUniqueId"}, [&] { TcpBootstrap(0, 1, id); });
}

TEST(TcpBootstrap, SizesThatDifferAreRefusedAndTheGroupGoesOn) {
  const UniqueId id = TcpBootstrap::createUniqueId();
  runRanks(2, [&](int rank) {
    if (rank == 1) {
      expectError(ErrorCode::invalidArgument, {"rank 1", "size 3", "rank 0 with size 2"},
                  [&] { TcpBootstrap(1, 3, id, kLongTimeout); });
    }
    TcpBootstrap group(rank, 2, id, kLongTimeout);
    exercise(group, 1);
  });
}

TEST(TcpBootstrap, ARankTakenTwiceIsRefusedAndTheGroupGoesOn) {
  const UniqueId id = TcpBootstrap::createUniqueId();
  runRanks(2, [&](int rank) {
    TcpBootstrap group(rank, 2, id, kLongTimeout);
    group.barrier();
    if (rank == 1) {
      expectError(ErrorCode::invalidArgument, {"rank 1 of 2 is there already"},
                  [&] { TcpBootstrap(1, 2, id, kLongTimeout); });
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
