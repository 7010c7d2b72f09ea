// The part of the conformance suite about order and counting, and what all parts share.
#include "core/connection_suite.hpp"

#include <cstdlib>
#include <map>
#include <utility>

#include "core/connection_exchange.hpp"
#include "core/processes.hpp"

namespace mscclpp::test {

// --- what all parts share ------------------------------------------------------------------------

void ConnectionSuite::SetUp() {
  try {
    makeEndpoint(0);
  } catch (const Error& error) {
    if (error.code() != ErrorCode::unsupported) throw;
    const bool verbs = instance().transport == Transport::verbs;
    if (verbs && std::getenv("MSCCLPP_TEST_REQUIRE_VERBS") != nullptr) throw;
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

constexpr int kRounds = 300;
const Scenario kDataThenCounter(
    "dataThenCounter", [](Rank& rank) { exchange(rank, kRounds, Notify::counter); }, kExchangeRoom);
const Scenario kDataThenSignal(
    "dataThenSignal", [](Rank& rank) { exchange(rank, kRounds, Notify::signal); }, kExchangeRoom);

TEST_P(ConnectionSuite, DataIsThereBeforeTheCounterBetweenThreads) {
  runAsThreads(
      3, [](Rank& rank) { exchange(rank, kRounds, Notify::counter); }, kExchangeRoom);
}

TEST_P(ConnectionSuite, DataIsThereBeforeTheCounterBetweenProcesses) {
  runAsProcesses(3, "dataThenCounter");
}

TEST_P(ConnectionSuite, DataIsThereBeforeTheSignalBetweenThreads) {
  runAsThreads(
      3, [](Rank& rank) { exchange(rank, kRounds, Notify::signal); }, kExchangeRoom);
}

TEST_P(ConnectionSuite, DataIsThereBeforeTheSignalBetweenProcesses) {
  runAsProcesses(2, "dataThenSignal");
}

TEST_P(ConnectionSuite, AQueueOfTwoIsEnough) {
  RankSetup setup = kExchangeRoom;
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
    constexpr uint64_t kTarget = 4096;  // behind the source: the other side's writes go there too
    Connection& connection = rank.to(rank.other());
    Connection::SignalTarget target{.host = &rank.wordsOf(rank.other()), .hostOffset = kOffset};
    if (connection.capabilities().deviceSignals) {
      target.device = &rank.deviceWordsOf(rank.other());
      target.deviceOffset = kOffset;
    }
    for (int i = 0; i < kSignals; ++i) {
      // Some behind a write, some alone: a transport may choose another word for these.
      if (i % 3 == 0) rank.write(rank.other(), 0, kTarget, static_cast<uint64_t>(i));
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
