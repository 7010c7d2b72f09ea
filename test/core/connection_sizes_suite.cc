// The part of the conformance suite about sizes, ranges and several connections at once.
#include <algorithm>
#include <future>

#include "core/connection_suite.hpp"

namespace mscclpp::test {
namespace {

constexpr size_t kMiB = size_t{1} << 20;
constexpr size_t kArrived = 7;

// --- sizes ---------------------------------------------------------------------------------------

TEST_P(ConnectionSuite, NoBytesAreAWriteToo) {
  runAsThreads(2, [](Rank& rank) {
    const uint64_t end = rank.data().local().size();
    const std::vector<unsigned char> before = rank.data().get(0, 16);
    for (int i = 0; i < 100; ++i) {
      rank.write(rank.other(), end, end, 0);
      rank.write(rank.other(), 0, 0, 0);
      rank.add(rank.other(), kArrived, 1);
    }
    rank.finish();
    EXPECT_EQ(rank.word(kArrived), 100);
    EXPECT_EQ(rank.data().get(0, 16), before);
  });
}

TEST_P(ConnectionSuite, LargeWritesArriveWhole) {
  constexpr size_t kBytes = 64 * kMiB + 7;
  runAsThreads(2,
               [](Rank& rank) {
                 if (rank.rank() == 0) {
                   rank.data().put(1, payload(5, kBytes));
                   rank.write(1, 1, 3, kBytes);
                   rank.add(1, kArrived, 1);
                 } else {
                   rank.waitFor("the data", [&] { return rank.word(kArrived) == 1; });
                   requireBytes("64 MiB", rank.data().get(3, kBytes), payload(5, kBytes));
                   requireBytes("what follows", rank.data().get(3 + kBytes, 5),
                                std::vector<unsigned char>(5, 0));
                 }
                 rank.finish();
               },
               {.dataBytes = kBytes + 8});
}

TEST_P(ConnectionSuite, BothSidesMaySendAtOnce) {
  constexpr size_t kBytes = 16 * kMiB;
  constexpr int kRepeats = 3;
  runAsThreads(2,
               [](Rank& rank) {
                 const auto key = [](int from, int repeat) {
                   return static_cast<uint64_t>(from * 100 + repeat);
                 };
                 for (int repeat = 0; repeat < kRepeats; ++repeat) {
                   rank.data().put(0, payload(key(rank.rank(), repeat), kBytes));
                   // Nobody reads before everything has been posted: neither side may wait for the
                   // other.
                   rank.write(rank.other(), 0, kBytes, kBytes);
                   rank.add(rank.other(), kArrived, 1);
                   rank.waitFor("the data", [&] { return rank.word(kArrived) == repeat + 1; });
                   requireBytes("from the other side", rank.data().get(kBytes, kBytes),
                                payload(key(rank.other(), repeat), kBytes));
                   rank.flush();
                   rank.bootstrap().barrier();
                 }
                 rank.finish();
               },
               {.dataBytes = 2 * kBytes});
}

TEST_P(ConnectionSuite, OffsetsReachBeyond4GiB) {
  constexpr size_t k4GiB = size_t{1} << 32;
  runAsThreads(2,
               [](Rank& rank) {
                 if (rank.rank() == 0) {
                   rank.data().put(k4GiB + 100, payload(1, 5000));
                   rank.write(1, k4GiB + 100, k4GiB + 200, 5000);
                   rank.add(1, kArrived, 1);
                 } else {
                   rank.waitFor("the data", [&] { return rank.word(kArrived) == 1; });
                   requireBytes("beyond 4 GiB", rank.data().get(k4GiB + 200, 5000),
                                payload(1, 5000));
                   requireBytes("where a short offset leads", rank.data().get(0, 5300),
                                std::vector<unsigned char>(5300, 0));
                 }
                 rank.finish();
               },
               {.dataBytes = k4GiB + kMiB});
}

TEST_P(ConnectionSuite, CountersMayLieBeyond4GiB) {
  constexpr size_t k4GiB = size_t{1} << 32;
  runAsThreads(2, [](Rank& rank) {
    Area far(Device::open(Platform::cpu), rank.endpoint(), k4GiB + 4096);
    const auto theirs = rank.exchange(far);
    rank.postable(rank.other())
        .atomicAdd({.remote = theirs[static_cast<size_t>(rank.other())].get(),
                    .offset = k4GiB + 8,
                    .value = -3});
    rank.finish();
    EXPECT_EQ(*far.word(k4GiB + 8), -3);
    EXPECT_EQ(*far.word(8), 0);
  });
}

TEST_P(ConnectionSuite, TheQueueDepthBoundsWhatIsUnderWay) {
  constexpr uint64_t kDepth = 3;
  RankSetup setup;
  setup.queueDepth = kDepth;
  runAsThreads(
      2,
      [&](Rank& rank) {
        Connection& connection = rank.to(rank.other());
        for (uint64_t i = 0; i < 4 * kDepth && connection.canPost(); ++i) {
          connection.write({&rank.data().local(), &rank.dataOf(rank.other()), 0, kMiB, kMiB});
        }
        EXPECT_LE(connection.posted() - connection.completed(), kDepth);
        rank.flush();
        EXPECT_TRUE(connection.canPost());
        rank.finish();
      },
      setup);
}

// --- what is refused -----------------------------------------------------------------------------

TEST_P(ConnectionSuite, WhatDoesNotFitIsRefusedWithItsValues) {
  runAsThreads(2,
               [](Rank& rank) {
                 Connection& connection = rank.to(rank.other());
                 const LocalMemory* const local = &rank.data().local();
                 const RemoteMemory* const remote = &rank.dataOf(rank.other());
                 const RemoteMemory* const words = &rank.wordsOf(rank.other());
                 const auto write = [&](uint64_t from, uint64_t to, uint64_t bytes) {
                   connection.write({local, remote, from, to, bytes});
                 };
                 constexpr auto kBad = ErrorCode::invalidArgument;
                 expectError(kBad, {"101 bytes", "offset 900", "local", "1000"},
                             [&] { write(900, 0, 101); });
                 expectError(kBad, {"101 bytes", "offset 900", "remote", "1000"},
                             [&] { write(0, 900, 101); });
                 expectError(kBad, {"offset 1001"}, [&] { write(0, 1001, 0); });
                 expectError(kBad, {"18446744073709551615"}, [&] { write(0, 1, UINT64_MAX); });
                 expectError(kBad, {"18446744073709551610"}, [&] { write(0, UINT64_MAX - 5, 6); });
                 expectError(kBad, {"null"}, [&] { connection.write({nullptr, remote, 0, 0, 1}); });
                 expectError(kBad, {"null"}, [&] { connection.write({local, nullptr, 0, 0, 1}); });
                 for (uint64_t offset = 1; offset < 8; ++offset) {
                   expectError(kBad, {"offset " + std::to_string(offset), "multiple of 8"}, [&] {
                     connection.atomicAdd({words, offset, 1});
                   });
                 }
                 expectError(kBad, {"8 bytes", "offset 8192", "8192"}, [&] {
                   connection.atomicAdd({words, 8192, 1});
                 });
                 expectError(kBad, {"null"}, [&] { connection.atomicAdd({nullptr, 0, 1}); });
                 EXPECT_EQ(connection.posted(), 0U);
                 rank.finish();
               },
               {.dataBytes = 1000});
}

TEST_P(ConnectionSuite, BytesThatDescribeNoMemoryAreRefused) {
  runAsThreads(2, [](Rank& rank) {
    Connection& connection = rank.to(rank.other());
    auto bytes = rank.data().local().describe();
    bytes.pop_back();
    expectError(ErrorCode::invalidArgument, {std::to_string(bytes.size())},
                [&] { connection.importMemory(bytes); });
    bytes.assign(bytes.size() + 1, std::byte{0});
    expectError(ErrorCode::invalidArgument, {}, [&] { connection.importMemory(bytes); });
    rank.finish();
  });
}

TEST_P(ConnectionSuite, AddressesOfOtherTransportsAreRefused) {
  const auto connection = makeEndpoint(0)->open(1);
  expectError(ErrorCode::invalidArgument, {"3"},
              [&] { connection->connect(std::vector<std::byte>(3)); });
}

// --- what can be asked ---------------------------------------------------------------------------

TEST_P(ConnectionSuite, SaysWhatItCanDoAndWhoItConnects) {
  runAsThreads(2, [&](Rank& rank) {
    const Connection& connection = rank.to(rank.other());
    const ConnectionCapabilities found = connection.capabilities();
    const ConnectionCapabilities& expected = instance().expected;
    EXPECT_EQ(found.oneSidedWrites, expected.oneSidedWrites);
    EXPECT_EQ(found.oneSidedAtomics, expected.oneSidedAtomics);
    EXPECT_EQ(found.deviceMemory, expected.deviceMemory);
    EXPECT_EQ(found.deviceCounters, expected.deviceCounters);
    EXPECT_EQ(found.deviceSignals, expected.deviceSignals);
    EXPECT_EQ(connection.peer(), rank.other());
    EXPECT_EQ(connection.transport(), instance().transport);
    EXPECT_EQ(rank.endpoint().transport(), instance().transport);
    for (const int each : {0, 1}) {
      EXPECT_NE(connection.describe().find("rank " + std::to_string(each)), std::string::npos)
          << connection.describe();
    }
    EXPECT_FALSE(rank.endpoint().describe().empty());
    EXPECT_FALSE(connection.failed());
    EXPECT_EQ(connection.failure(), "");
    rank.finish();
  });
}

// --- sources -------------------------------------------------------------------------------------

TEST_P(ConnectionSuite, ASourceMayBeReusedAfterAFlush) {
  constexpr int kRepeats = 50;
  constexpr size_t kBytes = 200'000;
  runAsThreads(2,
               [](Rank& rank) {
                 for (int repeat = 0; repeat < kRepeats; ++repeat) {
                   const auto bytes = mix(static_cast<uint64_t>(repeat)) % kBytes;
                   const auto key = static_cast<uint64_t>(repeat);
                   if (rank.rank() == 0) {
                     rank.data().put(0, payload(key, bytes));
                     rank.write(1, 0, 0, bytes);
                     Connection& connection = rank.to(1);
                     connection.flush(kPatience);
                     EXPECT_EQ(connection.completed(), connection.posted());
                     rank.data().fill(0, 0xEE, kBytes);
                     rank.add(1, kArrived, 1);
                   } else {
                     rank.waitFor("the data", [&] { return rank.word(kArrived) == repeat + 1; });
                     requireBytes(fmt::format("{} bytes", bytes), rank.data().get(0, bytes),
                                  payload(key, bytes));
                     rank.add(0, kArrived, 1);
                   }
                   rank.waitFor("the other side", [&] {
                     return rank.rank() == 1 || rank.word(kArrived) == repeat + 1;
                   });
                 }
                 rank.finish();
               },
               {.dataBytes = kBytes});
}

TEST_P(ConnectionSuite, CompletedMeansThatTheDataIsThere) {
  runAsThreads(2, [](Rank& rank) {
    constexpr size_t kBytes = 3 * kMiB;
    if (rank.rank() == 0) {
      rank.data().put(0, payload(9, kBytes));
      rank.write(1, 0, 0, kBytes);
      rank.flush();
      // The other side learns it from this one by another way than the connection.
      const char done = 1;
      rank.bootstrap().send(&done, 1, 1, 0);
    } else {
      auto flushed = std::async(std::launch::async, [&] {
        char byte = 0;
        rank.bootstrap().recv(&byte, 1, 0, 0);
      });
      rank.waitFor("rank 0's flush", [&] { return isReady(flushed); });
      flushed.get();
      requireBytes("flushed", rank.data().get(0, kBytes), payload(9, kBytes));
    }
    rank.finish();
  });
}

// --- several at once -----------------------------------------------------------------------------

TEST_P(ConnectionSuite, SeveralConnectionsLeadToTheSamePeer) {
  runAsThreads(2, [](Rank& rank) {
    constexpr int kMore = 3;
    std::vector<std::vector<std::shared_ptr<Connection>>> more;
    for (int i = 0; i < kMore; ++i) more.push_back(connectAll(rank.bootstrap(), rank.endpoint()));
    std::vector<std::shared_ptr<RemoteMemory>> words;
    for (const auto& connections : more) {
      words.push_back(exchangeMemories(rank.bootstrap(), connections, rank.words().local())
                          .at(static_cast<size_t>(rank.other())));
    }
    // Adds from several connections meet in one counter.
    for (size_t i = 0; i < kMore; ++i) {
      Connection& connection = *more[i][static_cast<size_t>(rank.other())];
      for (int add = 0; add < 100; ++add) {
        connection.atomicAdd({words[i].get(), kArrived * sizeof(int64_t), 1});
      }
    }
    const auto others = [&](auto&& action) {
      for (const auto& connections : more) action(*connections[static_cast<size_t>(rank.other())]);
    };
    rank.waitFor("the adds of all connections", [&] {
      bool complete = rank.word(kArrived) == 100 * kMore;
      others([&](Connection& connection) {
        connection.progress();
        complete = complete && connection.completed() == connection.posted();
      });
      return complete;
    });
    rank.finish();
    others([](Connection& connection) {
      EXPECT_EQ(connection.failure(), "");
      connection.close();
    });
  });
}

TEST_P(ConnectionSuite, GroupsOfOneProcessDoNotMeet) {
  const auto body = [](Rank& rank, int64_t value) {
    for (int i = 0; i < 200; ++i) rank.add(rank.other(), kArrived, value);
    rank.finish();
    EXPECT_EQ(rank.word(kArrived), 200 * value);
  };
  auto second = std::async(std::launch::async,
                           [&] { runAsThreads(2, [&](Rank& rank) { body(rank, 1000); }); });
  runAsThreads(2, [&](Rank& rank) { body(rank, 1); });
  second.get();
}

}  // namespace
}  // namespace mscclpp::test
