// The part of the conformance suite about ends: deaths, good-byes, connections given up.
#include <signal.h>

#include <chrono>
#include <future>

#include "core/connection_suite.hpp"
#include "core/processes.hpp"

namespace mscclpp::test {
namespace {

using Clock = std::chrono::steady_clock;
constexpr size_t kMiB = size_t{1} << 20;
constexpr size_t kArrived = 7;

// --- a peer's process dies -----------------------------------------------------------------------

/// Says "ready", then works (or idles) until it is killed, or alone.
const Scenario kIdleVictim("idleVictim", [](Rank& rank) {
  tellParent("ready");
  while (!rank.to(0).failed()) rank.progress();
});
const Scenario kBusyVictim("busyVictim", [](Rank& rank) {
  tellParent("ready");
  while (!rank.to(0).failed()) {
    rank.write(0, 0, kMiB, kMiB);
    rank.add(0, kArrived, 1);
  }
});

/// Rank 0 of two, the other one in a process that is killed.
class Survivor {
 public:
  Survivor(const ConnectionInstance& instance, const std::string& victim)
      : id_(TcpBootstrap::createUniqueId()),
        victim_("rank", {instance.name, victim, "1", "2", id_.toString()}),
        rank_(instance, 0, 2, id_, {}) {
    EXPECT_EQ(victim_.hear(), "ready");
  }
  Rank& rank() { return rank_; }
  void kill() {
    victim_.kill(SIGKILL);
    killed_ = Clock::now();
  }
  /// `meanwhile` is what the rank does until it notices.
  void expectNotice(const std::function<void()>& meanwhile) {
    constexpr std::chrono::seconds kLimit(10);
    Connection& connection = rank_.to(1);
    while (!connection.failed() && Clock::now() - killed_ < kLimit) {
      meanwhile();
      connection.progress();
    }
    ASSERT_TRUE(connection.failed()) << "not noticed within " << kLimit.count() << " s";
    EXPECT_NE(connection.failure().find("rank 1"), std::string::npos) << connection.failure();
    try {
      connection.flush(kPatience);
      ADD_FAILURE() << "a flush over a broken connection went through";
    } catch (const PeerError& error) {
      EXPECT_EQ(error.rank(), 1);
      EXPECT_NE(std::string(error.what()).find(connection.failure()), std::string::npos)
          << error.what();
    }
    // From now on nothing happens, and nothing is refused.
    const uint64_t posted = connection.posted();
    const uint64_t completed = connection.completed();
    EXPECT_TRUE(connection.canPost());
    connection.atomicAdd({&rank_.wordsOf(1), 0, 1});
    connection.write({&rank_.data().local(), &rank_.dataOf(1), 0, 0, 8});
    connection.submit();
    connection.progress();
    connection.close();
    EXPECT_EQ(connection.posted(), posted);
    EXPECT_EQ(connection.completed(), completed);
  }

 private:
  UniqueId id_;
  Child victim_;
  Rank rank_;
  Clock::time_point killed_;
};

void greetEachOther(Rank& rank) {
  rank.add(rank.other(), kArrived, 1);
  rank.finish();
  require(rank.word(kArrived) == 1, "the counter is {}", rank.word(kArrived));
}
const Scenario kGreeting("greeting", greetEachOther);

TEST_P(ConnectionSuite, AnIdlePeerThatIsKilledIsNoticed) {
  if (!instance().noticesDeadProcesses) GTEST_SKIP() << "this transport cannot tell";
  Survivor survivor(instance(), "idleVictim");
  survivor.kill();
  survivor.expectNotice([] {});
  runAsProcesses(2, "greeting");  // the process goes on with new connections
}

TEST_P(ConnectionSuite, APeerThatIsKilledWhileItSendsIsNoticed) {
  if (!instance().noticesDeadProcesses) GTEST_SKIP() << "this transport cannot tell";
  Survivor survivor(instance(), "busyVictim");
  survivor.rank().waitFor("data", [&] { return survivor.rank().word(kArrived) > 2; });
  survivor.kill();
  survivor.expectNotice([] {});
  runAsProcesses(2, "greeting");
}

TEST_P(ConnectionSuite, APeerThatIsKilledWhileWeSendIsNoticed) {
  if (!instance().noticesDeadProcesses) GTEST_SKIP() << "this transport cannot tell";
  Survivor survivor(instance(), "idleVictim");
  Connection& connection = survivor.rank().to(1);
  const auto post = [&] {
    if (!connection.canPost() || connection.failed()) return;
    connection.write({&survivor.rank().data().local(), &survivor.rank().dataOf(1), 0, kMiB, kMiB});
  };
  while (connection.completed() < 3) {
    post();
    connection.progress();
  }
  survivor.kill();
  survivor.expectNotice(post);
  runAsProcesses(2, "greeting");
}

// --- ends that are no deaths ---------------------------------------------------------------------

const Scenario kLeaver("leaver", [](Rank& rank) {
  rank.add(0, kArrived, 1);
  rank.flush();
  rank.to(0).close();
});

TEST_P(ConnectionSuite, APeerMayLeaveWithAGoodbye) {
  const UniqueId id = TcpBootstrap::createUniqueId();
  Child leaver("rank", {GetParam(), "leaver", "1", "2", id.toString()});
  Rank rank(instance(), 0, 2, id, {});
  rank.waitFor("the leaver's add", [&] { return rank.word(kArrived) == 1; });
  // It ends only after its flush, for which this side may have to take part.
  auto ended = std::async(std::launch::async, [&] {
    EXPECT_EQ(leaver.hear(), "finished");
    EXPECT_EQ(leaver.wait(), 0);
  });
  rank.waitFor("the leaver's end", [&] { return isReady(ended); });
  for (int i = 0; i < 1000; ++i) rank.progress();
  EXPECT_EQ(rank.to(1).failure(), "");
  rank.to(1).close();
}

TEST_P(ConnectionSuite, ClosingInTheMiddleHarmsNobody) {
  runAsThreads(2, [](Rank& rank) {
    constexpr size_t kBytes = 3 * kMiB;
    if (rank.rank() == 0) {
      rank.data().put(0, payload(1, kBytes));
      for (int i = 0; i < 10; ++i) {
        rank.write(1, 0, 0, kBytes);
        rank.add(1, kArrived, 1);
      }
      rank.progress();
      rank.to(1).close();
      rank.bootstrap().barrier();
    } else {
      rank.bootstrap().barrier();
      // Part of it may have come; the counter never runs ahead of the data.
      for (int i = 0; i < 1000 && !rank.to(0).failed(); ++i) rank.progress();
      if (rank.word(kArrived) > 0) {
        requireBytes("before the close", rank.data().get(0, kBytes), payload(1, kBytes));
      }
      rank.to(0).close();
    }
  });
}

TEST_P(ConnectionSuite, AConnectionMayEndWithWorkUnderWay) {
  for (int repeat = 0; repeat < 5; ++repeat) {
    runAsThreads(2, [](Rank& rank) {
      for (int i = 0; i < 8; ++i) rank.write(rank.other(), 0, kMiB, kMiB);
      rank.progress();
      rank.bootstrap().barrier();  // the memories of both are still there
    });
  }
}

TEST_P(ConnectionSuite, TheFirstReasonOfAFailureIsKept) {
  runAsThreads(2, [](Rank& rank) {
    Connection& connection = rank.to(rank.other());
    rank.write(rank.other(), 0, kMiB, 100);
    connection.fail("given up: the first reason");
    connection.fail("a second reason");
    EXPECT_TRUE(connection.failed());
    EXPECT_EQ(connection.failure(), "given up: the first reason");
    try {
      connection.flush(kPatience);
      ADD_FAILURE() << "a flush over a broken connection went through";
    } catch (const PeerError& error) {
      EXPECT_EQ(error.rank(), rank.other());
      EXPECT_NE(std::string(error.what()).find("the first reason"), std::string::npos);
    }
    const uint64_t posted = connection.posted();
    connection.atomicAdd({&rank.wordsOf(rank.other()), 0, 1});
    EXPECT_EQ(connection.posted(), posted);
    while (connection.progress()) {
    }
    EXPECT_EQ(connection.failure(), "given up: the first reason");
    rank.bootstrap().barrier();
  });
}

TEST_P(ConnectionSuite, AFlushGivesUpAfterItsTime) {
  runAsThreads(2, [](Rank& rank) {
    Connection& connection = rank.to(rank.other());
    if (rank.rank() == 0 && !connection.capabilities().oneSidedWrites) {
      // Rank 1 makes no progress before the barrier.
      rank.write(1, 0, kMiB, kMiB);
      rank.write(1, 0, kMiB, kMiB);
      try {
        connection.flush(std::chrono::milliseconds(50));
        // A transport that needs nobody's help in spite of its capabilities.
        EXPECT_EQ(connection.completed(), connection.posted());
      } catch (const TimeoutError& error) {
        EXPECT_NE(std::string(error.what()).find("2 of 2 operations to rank 1"), std::string::npos)
            << error.what();
      }
    }
    rank.bootstrap().barrier();
    rank.finish();
  });
}

}  // namespace
}  // namespace mscclpp::test
