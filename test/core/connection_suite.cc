// The part of the conformance suite about order and counting, and what all parts share.
#include "core/connection_suite.hpp"

#include <cstdlib>
#include <map>
#include <utility>

#include "core/processes.hpp"

namespace mscclpp::test {

// --- what all parts share ------------------------------------------------------------------------

void cannotRunHere(const std::string& why, bool required) {
  const char* const ci = std::getenv("CI");
  if (required && ci != nullptr && std::string(ci) == "true") {
    FAIL() << "CI=true, and this cannot run here: " << why;
  }
  GTEST_SKIP() << why;
}

void ConnectionSuite::SetUp() {
  try {
    makeEndpoint(0);
  } catch (const Error& error) {
    if (error.code() != ErrorCode::unsupported) throw;
    cannotRunHere(error.what(), instance().requiredInCi);
  }
}

void ConnectionSuite::runAsThreads(int ranks, const std::function<void(Rank&)>& body,
                                   const RankSetup& setup) {
  const UniqueId id = TcpBootstrap::createUniqueId();
  runRanks(ranks, [&](int number) {
    Rank rank(instance(), number, ranks, id, setup);
    body(rank);
  });
}

namespace {

std::map<std::string, const Scenario*>& scenarios() {
  static std::map<std::string, const Scenario*> all;
  return all;
}

/// A rank in a process of its own.
const RoleRegistration kRank("rank", [](const std::vector<std::string>& arguments) {
  const Scenario& scenario = Scenario::find(arguments.at(1));
  Rank rank(findInstance(arguments.at(0)), std::stoi(arguments.at(2)), std::stoi(arguments.at(3)),
            UniqueId::fromString(arguments.at(4)), scenario.setup());
  scenario.body()(rank);
  tellParent("finished");
  return 0;
});

}  // namespace

Scenario::Scenario(const std::string& name, Body body, const RankSetup& setup)
    : body_(std::move(body)), setup_(setup) {
  scenarios()[name] = this;
}

const Scenario& Scenario::find(const std::string& name) {
  return *scenarios().at(name);
}

void ConnectionSuite::runAsProcesses(int ranks, const std::string& name) {
  const Scenario& scenario = Scenario::find(name);
  const UniqueId id = TcpBootstrap::createUniqueId();
  std::vector<Child> children;
  for (int rank = 1; rank < ranks; ++rank) {
    children.emplace_back("rank", std::vector<std::string>{GetParam(), name, std::to_string(rank),
                                                           std::to_string(ranks), id.toString()});
  }
  Rank rank(instance(), 0, ranks, id, scenario.setup());
  scenario.body()(rank);
  for (Child& child : children) {
    EXPECT_EQ(child.hear(), "finished");
    EXPECT_EQ(child.wait(), 0);
  }
}

std::string instancePlatform(const testing::TestParamInfo<std::string>& info) {
  return std::string(toString(findInstance(info.param).platform));
}

// --- data, then a counter or a signal ------------------------------------------------------------

namespace {

enum class Notify { counter, signal };

/// Every rank sends messages to every other one, with at most kSlots unread, and checks what it
/// gets. A thread of its own posts and progresses, as a proxy does; the caller's reads, as a kernel
/// does: it knows of a message only from the counter or signal behind it.
class Exchange {
 public:
  static constexpr size_t kMaxBytes = size_t{256} << 10;

  Exchange(Rank& rank, int rounds, Notify notify)
      : rank_(rank),
        rounds_(rounds),
        notify_(notify),
        sends_(static_cast<size_t>(rank.size())),
        consumed_(static_cast<size_t>(rank.size())) {}

  void run() {
    rank_.data().fill(0, kPoison, 2 * slots() * kSlotBytes);
    rank_.bootstrap().barrier();
    ProxyThread proxy([this] { work(); });
    const auto limit = std::chrono::steady_clock::now() + kPatience;
    std::vector<int> read(sends_.size(), 0);
    for (int missing = rounds_ * (rank_.size() - 1); missing > 0 || !allSent_;) {
      require(std::chrono::steady_clock::now() < limit, "rank {}: {} messages are missing",
              rank_.rank(), missing);
      if (proxy.broken()) proxy.stop();
      for (int peer = 0; peer < rank_.size(); ++peer) {
        int& next = read[static_cast<size_t>(peer)];
        if (peer == rank_.rank() || next == rounds_ || arrived(peer) <= next) continue;
        readMessage(peer, next++);
        consumed_[static_cast<size_t>(peer)].store(next, std::memory_order_release);
        --missing;
      }
      std::this_thread::yield();
    }
    proxy.stop();
  }

 private:
  static constexpr int kSlots = 2;
  static constexpr size_t kMargin = 256;
  static constexpr size_t kSlotBytes = kMaxBytes + 2 * kMargin;
  static constexpr unsigned char kPoison = 0xA5;

  struct Message {
    uint64_t key;
    size_t bytes;
    size_t sourceShift;
    size_t targetShift;  ///< below kMargin
  };
  struct Sends {
    int next = 0;
    uint64_t busyUntil[kSlots] = {};  ///< operations that must be complete before the slot is free
    int64_t creditsReturned = 0;
    Connection::SignalTarget signal;
  };

  size_t slots() const { return sends_.size() * kSlots; }
  size_t sourceAt(int peer, int round) const {
    return (static_cast<size_t>(peer) * kSlots + static_cast<size_t>(round % kSlots)) * kSlotBytes;
  }
  size_t targetAt(int sender, int round) const {
    return slots() * kSlotBytes + sourceAt(sender, round);
  }
  static Message message(int from, int to, int round) {
    const uint64_t key = mix(static_cast<uint64_t>(from * 1000 + to), static_cast<uint64_t>(round));
    const uint64_t limit = uint64_t{1} << (mix(key, 1) % 19);  // as many small ones as large ones
    return {.key = key,
            .bytes = mix(key, 2) % (limit + 1),
            .sourceShift = mix(key, 3) % kMargin,
            .targetShift = mix(key, 4) % kMargin};
  }

  int64_t arrived(int peer) {
    const auto index = Rank::kArrivals + static_cast<size_t>(peer);
    int64_t count = rank_.word(index);
    if (notify_ == Notify::signal && rank_.to(peer).capabilities().deviceSignals) {
      int64_t onDevice = 0;
      const auto bytes = rank_.deviceWords().get(index * sizeof(int64_t), sizeof(int64_t));
      std::copy(bytes.begin(), bytes.end(), reinterpret_cast<unsigned char*>(&onDevice));
      count += onDevice;
    }
    return count;
  }

  void readMessage(int peer, int round) {
    const Message expected = message(peer, rank_.rank(), round);
    const size_t at = targetAt(peer, round);
    const auto found = rank_.data().get(at, expected.bytes + 2 * kMargin);
    std::vector<unsigned char> whole(found.size(), kPoison);
    std::ranges::copy(payload(expected.key, expected.bytes),
                      whole.begin() + static_cast<ptrdiff_t>(expected.targetShift));
    requireBytes(fmt::format("rank {}: message {} from rank {}, {} bytes at {}", rank_.rank(),
                             round, peer, expected.bytes, expected.targetShift),
                 found, whole);
    rank_.data().fill(at, kPoison, found.size());
  }

  void work() {
    bool all = true;
    for (int peer = 0; peer < rank_.size(); ++peer) {
      if (peer == rank_.rank()) continue;
      Sends& sends = sends_[static_cast<size_t>(peer)];
      if (sends.next < rounds_) sendNext(peer, sends);
      all = all && sends.next == rounds_;
      const int64_t consumed = consumed_[static_cast<size_t>(peer)].load(std::memory_order_acquire);
      if (consumed > sends.creditsReturned) {
        rank_.add(peer, Rank::kCredits + static_cast<size_t>(rank_.rank()),
                  consumed - std::exchange(sends.creditsReturned, consumed));
      }
    }
    if (all) allSent_.store(true, std::memory_order_relaxed);
    rank_.waitFor("nothing", [] { return true; });  // throws when a connection is broken
    if (!rank_.progress()) std::this_thread::yield();
  }

  void sendNext(int peer, Sends& sends) {
    const auto own = static_cast<size_t>(rank_.rank());
    const int64_t credits = rank_.word(Rank::kCredits + static_cast<size_t>(peer));
    uint64_t& busyUntil = sends.busyUntil[sends.next % kSlots];
    Connection& connection = rank_.to(peer);
    if (sends.next >= credits + kSlots || connection.completed() < busyUntil) return;
    const Message next = message(rank_.rank(), peer, sends.next);
    const size_t from = sourceAt(peer, sends.next) + next.sourceShift;
    rank_.data().put(from, payload(next.key, next.bytes));
    rank_.write(peer, from, targetAt(rank_.rank(), sends.next) + next.targetShift, next.bytes);
    busyUntil = connection.posted();
    if (notify_ == Notify::counter) {
      rank_.add(peer, Rank::kArrivals + own, 1);
    } else {
      const uint64_t offset = (Rank::kArrivals + own) * sizeof(int64_t);
      sends.signal.host = &rank_.wordsOf(peer);
      sends.signal.hostOffset = offset;
      if (connection.capabilities().deviceSignals) sends.signal.device = &rank_.deviceWordsOf(peer);
      sends.signal.deviceOffset = offset;
      rank_.postable(peer).signal(sends.signal);
    }
    ++sends.next;
  }

  Rank& rank_;
  const int rounds_;
  const Notify notify_;
  std::vector<Sends> sends_;
  std::vector<std::atomic<int64_t>> consumed_;
  std::atomic<bool> allSent_ = false;
};

constexpr int kRounds = 300;
const RankSetup kRoom{.dataBytes = size_t{8} << 20};

void exchange(Rank& rank, int rounds, Notify notify) {
  Exchange(rank, rounds, notify).run();
  rank.finish();
}

const Scenario kDataThenCounter(
    "dataThenCounter", [](Rank& rank) { exchange(rank, kRounds, Notify::counter); }, kRoom);
const Scenario kDataThenSignal(
    "dataThenSignal", [](Rank& rank) { exchange(rank, kRounds, Notify::signal); }, kRoom);

TEST_P(ConnectionSuite, DataIsThereBeforeTheCounterBetweenThreads) {
  runAsThreads(
      3, [](Rank& rank) { exchange(rank, kRounds, Notify::counter); }, kRoom);
}

TEST_P(ConnectionSuite, DataIsThereBeforeTheCounterBetweenProcesses) {
  runAsProcesses(3, "dataThenCounter");
}

TEST_P(ConnectionSuite, DataIsThereBeforeTheSignalBetweenThreads) {
  runAsThreads(
      3, [](Rank& rank) { exchange(rank, kRounds, Notify::signal); }, kRoom);
}

TEST_P(ConnectionSuite, DataIsThereBeforeTheSignalBetweenProcesses) {
  runAsProcesses(2, "dataThenSignal");
}

TEST_P(ConnectionSuite, AQueueOfTwoIsEnough) {
  RankSetup setup = kRoom;
  setup.queueDepth = 2;
  runAsThreads(
      2,
      [](Rank& rank) {
        exchange(rank, kRounds, Notify::counter);
        EXPECT_TRUE(rank.to(rank.other()).canPost());
      },
      setup);
}

// --- counting ------------------------------------------------------------------------------------

/// Ranks 1, 2, ... add up and down; rank 0 sees the sum, and no sum before it that cannot be.
void manyWriters(Rank& rank) {
  constexpr size_t kSum = 3;
  constexpr int kAdds = 2000;
  const auto value = [](int writer, int i) {
    return static_cast<int64_t>(mix(static_cast<uint64_t>(writer), static_cast<uint64_t>(i)));
  };
  uint64_t expected = 0;
  for (int writer = 1; writer < rank.size(); ++writer) {
    for (int i = 0; i < kAdds; ++i) expected += static_cast<uint64_t>(value(writer, i));
  }
  if (rank.rank() != 0) {
    for (int i = 0; i < kAdds; ++i) rank.add(0, kSum, value(rank.rank(), i));
    rank.flush();
  }
  rank.finish();
  if (rank.rank() == 0) {
    const auto sum = static_cast<uint64_t>(rank.word(kSum));
    require(sum == expected, "the sum is {} instead of {}", sum, expected);
  }
}
const Scenario kManyWriters("manyWriters", manyWriters);

TEST_P(ConnectionSuite, ManyWritersToOneCounterBetweenThreads) {
  runAsThreads(4, manyWriters);
}

TEST_P(ConnectionSuite, ManyWritersToOneCounterBetweenProcesses) {
  runAsProcesses(4, "manyWriters");
}

TEST_P(ConnectionSuite, SignalsAreCountedOnce) {
  runAsThreads(2, [](Rank& rank) {
    constexpr int kSignals = 1000;
    constexpr uint64_t kOffset = 5 * sizeof(int64_t);
    Connection& connection = rank.to(rank.other());
    Connection::SignalTarget target{.host = &rank.wordsOf(rank.other()), .hostOffset = kOffset};
    if (connection.capabilities().deviceSignals) {
      target.device = &rank.deviceWordsOf(rank.other());
      target.deviceOffset = kOffset;
    }
    for (int i = 0; i < kSignals; ++i) {
      // Some behind a write, some alone: a transport may choose another word for these.
      if (i % 3 == 0) rank.write(rank.other(), 0, 0, static_cast<uint64_t>(i));
      rank.postable(rank.other()).signal(target);
    }
    rank.finish();
    int64_t onDevice = 0;
    const auto bytes = rank.deviceWords().get(kOffset, sizeof(onDevice));
    std::copy(bytes.begin(), bytes.end(), reinterpret_cast<unsigned char*>(&onDevice));
    EXPECT_EQ(rank.word(5) + onDevice, kSignals);
  });
}

TEST_P(ConnectionSuite, CountersCrossEveryBoundary) {
  runAsThreads(2, [](Rank& rank) {
    const std::vector<int64_t> starts = {INT32_MAX - int64_t{2}, UINT32_MAX - int64_t{2},
                                         INT64_MAX - 2, -2, INT64_MIN + 2};
    for (size_t i = 0; i < starts.size(); ++i) {
      rank.setWord(2 * i, starts[i]);
      rank.setWord(2 * i + 1, starts[i]);
    }
    rank.bootstrap().barrier();
    for (int step = 0; step < 5; ++step) {
      for (size_t i = 0; i < starts.size(); ++i) {
        rank.add(rank.other(), 2 * i, 1);
        rank.add(rank.other(), 2 * i + 1, -1);
      }
    }
    rank.finish();
    for (size_t i = 0; i < starts.size(); ++i) {
      const auto start = static_cast<uint64_t>(starts[i]);
      EXPECT_EQ(static_cast<uint64_t>(rank.word(2 * i)), start + 5);
      EXPECT_EQ(static_cast<uint64_t>(rank.word(2 * i + 1)), start - 5);
    }
  });
}

}  // namespace
}  // namespace mscclpp::test
