// The fake of the conformance suite is as bad as it says.
#include <atomic>
#include <chrono>
#include <set>
#include <thread>

#include <gtest/gtest.h>

#include <mscclpp/errors.hpp>
#include <mscclpp/proxy.hpp>

#include "core/fake_connection.hpp"

namespace mscclpp::test {
namespace {

/// Rank 0's connection to rank 1, and a memory of each.
struct FakePair {
  explicit FakePair(const FakeBehaviour& behaviour) {
    const auto cpu = Device::open(Platform::cpu);
    for (int rank : {0, 1}) {
      endpoints[rank] =
          std::make_shared<FakeEndpoint>(cpu, EndpointOptions{.rank = rank}, behaviour);
      connections[rank] = endpoints[rank]->open(1 - rank);
      memories[rank] = endpoints[rank]->registerMemory(
          RegisteredMemory(cpu, cpu->allocateExportable(kBytes), kBytes));
    }
    for (int rank : {0, 1}) connections[rank]->connect(connections[1 - rank]->address());
    remote = connections[0]->importMemory(memories[1]->describe());
  }
  Connection& connection() { return *connections[0]; }
  char* source() { return memories[0]->memory().data(); }
  const char* target() { return memories[1]->memory().data(); }
  void write(uint64_t from, uint64_t to, uint64_t bytes) {
    connection().write({memories[0].get(), remote.get(), from, to, bytes});
  }

  static constexpr size_t kBytes = 4096;
  std::shared_ptr<Endpoint> endpoints[2];
  std::shared_ptr<Connection> connections[2];
  std::shared_ptr<LocalMemory> memories[2];
  std::shared_ptr<RemoteMemory> remote;
};

TEST(FakeConnection, FailsWhenItIsToldTo) {
  FakePair pair({.seed = 3, .failAfter = 5});
  for (int i = 0; i < 9; ++i) pair.connection().atomicAdd({pair.remote.get(), 0, 1});
  while (!pair.connection().failed()) pair.connection().progress();
  EXPECT_EQ(*reinterpret_cast<const int64_t*>(pair.target()), 5);
  EXPECT_EQ(pair.connection().completed(), 5U);
  EXPECT_EQ(pair.connection().failure(), "the fake was told to fail");
}

TEST(FakeConnection, ReordersWritesButNothingPassesAnAdd) {
  std::set<char> last;
  bool delayed = false;
  for (uint64_t seed = 0; seed < 50; ++seed) {
    FakePair pair({.seed = seed});
    for (int i = 0; i < 3; ++i) pair.source()[i] = static_cast<char>(i + 1);
    // Two writes to one place: which one is last is a matter of chance.
    pair.write(0, 100, 1);
    pair.write(1, 100, 1);
    pair.connection().atomicAdd({pair.remote.get(), 0, 1});
    pair.write(2, 101, 1);
    while (pair.connection().completed() < pair.connection().posted()) {
      const bool moved = pair.connection().progress();
      delayed = delayed || !moved;
      const bool added = pair.target()[0] == 1;
      EXPECT_TRUE(!added || pair.target()[100] != 0);
      EXPECT_TRUE(added || pair.target()[101] == 0);
    }
    last.insert(pair.target()[100]);
  }
  EXPECT_EQ(last, (std::set<char>{1, 2}));
  EXPECT_TRUE(delayed);
}

TEST(FakeConnection, MovesLongWritesInParts) {
  bool part = false;
  FakePair pair({.seed = 4});
  std::fill_n(pair.source(), FakePair::kBytes, 'x');
  for (int i = 0; i < 50; ++i) {
    std::fill_n(pair.memories[1]->memory().data(), FakePair::kBytes, '.');
    pair.write(0, 0, FakePair::kBytes);
    while (pair.connection().completed() < pair.connection().posted()) {
      pair.connection().progress();
      part = part || (pair.target()[0] == 'x' && pair.target()[FakePair::kBytes - 1] == '.');
    }
    EXPECT_EQ(std::string(pair.target(), FakePair::kBytes), std::string(FakePair::kBytes, 'x'));
  }
  EXPECT_TRUE(part);
}

/// Until `condition` holds, for a minute at most.
template <class Condition>
void await(Condition&& condition) {
  const auto deadline = std::chrono::steady_clock::now() + std::chrono::minutes(1);
  while (!condition()) {
    ASSERT_LT(std::chrono::steady_clock::now(), deadline);
    std::this_thread::yield();
  }
}

TEST(ProxyStalls, OperationsWithoutProgressAreToldOncePerStall) {
  std::atomic<bool> held = true;
  FakePair pair({.held = &held});
  const auto post = [&] { pair.connection().atomicAdd({pair.remote.get(), 0, 1}); };
  ProxyService service(Device::open(Platform::cpu),
                       {.pin = false, .stallAfter = std::chrono::milliseconds(5)});
  service.addConnection(pair.connections[0]);
  const auto stalls = [&] { return service.statistics().at(0).stalls; };
  const auto rounds = [&] { return service.statistics().at(0).rounds; };
  for (uint64_t stall = 1; stall <= 2; ++stall) {
    held = true;
    post();
    service.start();
    await([&] { return stalls() == stall; });
    const auto later = std::chrono::steady_clock::now() + std::chrono::milliseconds(20);
    await([&] { return std::chrono::steady_clock::now() > later; });
    EXPECT_EQ(stalls(), stall) << "one stall is told once";
    held = false;
    service.stop();  // drains
  }
  EXPECT_EQ(*reinterpret_cast<const int64_t*>(pair.target()), 2);
  service.start();
  const uint64_t seen = rounds();
  await([&] { return rounds() > seen; });
  EXPECT_EQ(stalls(), 2U) << "nothing is under way";
}

}  // namespace
}  // namespace mscclpp::test
