// The transport verbs between two NICs that work.
#include <cstring>
#include <limits>
#include <thread>
#include <vector>

#include <mscclpp/errors.hpp>

#include "core/ranks.hpp"
#include "core/verbs_world.hpp"

namespace mscclpp::test {
namespace {

using transport::verbs::Tuning;
using transport::verbs::VerbsRemoteMemory;

struct Mode {
  const char* name;
  int queuePairs;
  Tuning tuning;
};

std::ostream& operator<<(std::ostream& out, const Mode& mode) {
  return out << mode.name;
}

/// Small enough that the tests' writes are spread, and cut.
constexpr uint64_t kStripe = 8192;

class VerbsModes : public VerbsTest, public testing::WithParamInterface<Mode> {
 protected:
  VerbsWorld makeWorld(size_t bytes, int queueDepth = 64) {
    return VerbsWorld(bytes, {.queueDepth = queueDepth, .queuePairs = GetParam().queuePairs},
                      GetParam().tuning);
  }
};

constexpr Mode kModes[] = {
    {"NicAdds", 1, {.stripeBytes = kStripe}},
    {"NicAddsFourPairs", 4, {.stripeBytes = kStripe}},
    {"NicAddsFenced", 1, {.fenceEveryAdd = true, .largestPiece = 4096}},
    {"CpuAdds", 1, {.hardwareAtomics = false}},
    {"CpuAddsFourPairs", 4, {.hardwareAtomics = false, .stripeBytes = kStripe}},
    {"CpuAddsFenced", 1, {.hardwareAtomics = false, .fenceEveryAdd = true}},
};
INSTANTIATE_TEST_SUITE_P(All, VerbsModes, testing::ValuesIn(kModes),
                         [](const auto& mode) { return mode.param.name; });

TEST_P(VerbsModes, DataIsThereBeforeItsCounter) {
  VerbsWorld world = makeWorld(size_t{1} << 20);
  const bool plain = GetParam().queuePairs == 1 && !GetParam().tuning.fenceEveryAdd;
  checkDataBeforeCounter(world, plain ? 2000 : 600);
}

TEST_P(VerbsModes, DataIsThereBeforeItsCounterInTheSmallestQueue) {
  VerbsWorld world = makeWorld(size_t{1} << 20, 2);
  checkDataBeforeCounter(world, 150);
}

TEST_P(VerbsModes, SizesAndAlignments) {
  constexpr size_t kBytes = size_t{2} << 20;
  constexpr size_t kLargest = (size_t{1} << 20) + 7;
  VerbsWorld world = makeWorld(kBytes);
  for (size_t i = 0; i < kBytes; ++i) world[0].data()[i] = static_cast<char>(i * 7 + i / 251);
  size_t shift = 0;
  for (const size_t bytes :
       {size_t{0}, size_t{1}, size_t{3}, size_t{63}, size_t{64}, size_t{65}, size_t{4095},
        size_t{4096}, size_t{8191}, size_t{8192}, size_t{65'537}, kLargest}) {
    const size_t from = 5 + shift;
    const size_t to = 3 + 2 * shift++;
    std::memset(world[1].data(), 0x55, kBytes);
    world[0].write(from, to, bytes);
    world.drain();
    EXPECT_EQ(std::memcmp(world[1].data() + to, world[0].data() + from, bytes), 0) << bytes;
    EXPECT_EQ(world[1].data()[to - 1], 0x55) << "before " << bytes << " bytes";
    EXPECT_EQ(world[1].data()[to + bytes], 0x55) << "behind " << bytes << " bytes";
  }
}

TEST_P(VerbsModes, AddsAreSignedAndWrap) {
  VerbsWorld world = makeWorld(4096);
  *world[1].counter(8) = std::numeric_limits<int64_t>::max();
  *world[1].counter(24) = (int64_t{1} << 32) - 1;
  world[0].add(8, 1);
  world[0].add(16, -5);
  world[0].add(24, 1);
  world[0].add(4088, std::numeric_limits<int64_t>::min());
  world.drain();
  EXPECT_EQ(world[1].load(0), 0);
  EXPECT_EQ(world[1].load(8), std::numeric_limits<int64_t>::min());
  EXPECT_EQ(world[1].load(16), -5);
  EXPECT_EQ(world[1].load(24), int64_t{1} << 32);
  EXPECT_EQ(world[1].load(4088), std::numeric_limits<int64_t>::min());
}

/// Without so much memory: the peer's is described as if it began 5 GiB earlier.
TEST_P(VerbsModes, OffsetsBeyond4GiB) {
  constexpr uint64_t k5GiB = uint64_t{5} << 30;
  VerbsWorld world = makeWorld(4096);
  const auto& near = static_cast<const VerbsRemoteMemory&>(*world[0].remote);
  world[0].remote = std::make_shared<VerbsRemoteMemory>(near.address() - k5GiB, near.key(),
                                                        near.size() + k5GiB, false);
  std::strcpy(world[0].data(), "far away");
  world[0].write(0, k5GiB + 100, 9);
  world[0].add(k5GiB + 2048, -7);
  world.drain();
  EXPECT_STREQ(world[1].data() + 100, "far away");
  EXPECT_EQ(world[1].load(2048), -7);
}

TEST_P(VerbsModes, SignalsInBothDirectionsAtOnce) {
  constexpr int kSignals = 500;
  VerbsWorld world = makeWorld(4096, 16);
  Connection::SignalTarget targets[2] = {{.host = world[0].remote.get(), .hostOffset = 64},
                                         {.host = world[1].remote.get(), .hostOffset = 64}};
  int sent[2] = {0, 0};
  const bool all = world.run([&] {
    for (size_t rank = 0; rank < 2; ++rank) {
      Connection& connection = *world[rank].connection;
      for (; sent[rank] < kSignals && connection.canPost(); ++sent[rank]) {
        connection.signal(targets[rank]);
      }
    }
    return world[0].load(64) == kSignals && world[1].load(64) == kSignals;
  });
  EXPECT_TRUE(all) << world[0].load(64) << " and " << world[1].load(64);
  world.drain();
  EXPECT_EQ(targets[0].sentToHost, static_cast<uint64_t>(kSignals));
}

TEST_P(VerbsModes, ManyWritersToOneCounter) {
  constexpr int kWriters = 3;
  constexpr int kAdds = 300;
  const EndpointOptions options{.queueDepth = 32, .queuePairs = GetParam().queuePairs};
  VerbsSide reader(1, 4096, options, GetParam().tuning);
  std::vector<std::shared_ptr<Connection>> ends{reader.connection};
  for (int i = 1; i < kWriters; ++i) ends.push_back(reader.endpoint->open(0));
  std::vector<VerbsSide> writers;
  for (auto& end : ends) {
    writers.emplace_back(0, 4096, options, GetParam().tuning);
    end->connect(writers.back().connection->address());
    writers.back().connection->connect(end->address());
    writers.back().remote = writers.back().connection->importMemory(reader.memory->describe());
  }
  std::vector<std::thread> threads;
  for (const VerbsSide& writer : writers) {
    threads.emplace_back([&writer] {
      Connection& connection = *writer.connection;
      for (int i = 1; i <= kAdds; ++i) {
        repeat([&] { connection.progress(); },
               [&] { return connection.canPost() || connection.failed(); });
        writer.add(128, i % 2 == 0 ? 3 : -1);
      }
      connection.flush(kLongTimeout);
    });
  }
  const bool all = repeat(
      [&] {
        for (const auto& end : ends) end->progress();
      },
      [&] {
        bool done = true;
        for (const VerbsSide& writer : writers) {
          done = done && writer.connection->posted() == kAdds &&
                 writer.connection->completed() == kAdds;
        }
        return done;
      });
  for (std::thread& thread : threads) thread.join();
  EXPECT_TRUE(all);
  EXPECT_EQ(reader.load(128), kWriters * kAdds);
}

TEST_P(VerbsModes, OwnRankMayBeThePeer) {
  VerbsSide side(0, 4096, {.queuePairs = GetParam().queuePairs}, GetParam().tuning);
  side.meet(side.hello());
  std::strcpy(side.data(), "to myself");
  side.write(0, 1000, 10);
  side.add(2048, 42);
  side.connection->flush(kLongTimeout);
  EXPECT_STREQ(side.data() + 1000, "to myself");
  EXPECT_EQ(side.load(2048), 42);
}

TEST_P(VerbsModes, BadRangesAreRefusedAndHarmNothing) {
  VerbsWorld world = makeWorld(4096);
  expectError(ErrorCode::invalidArgument, {"offset 4", "multiple of 8"},
              [&] { world[0].add(4, 1); });
  expectError(ErrorCode::invalidArgument, {"offset 4096"}, [&] { world[0].add(4096, 1); });
  expectError(ErrorCode::invalidArgument, {"4096 bytes"}, [&] { world[0].write(0, 1, 4096); });
  world[0].add(8, 1);
  world.drain();
  EXPECT_EQ(world[1].load(8), 1);
}

using VerbsSetUp = VerbsTest;

TEST_F(VerbsSetUp, DescriptionsNameTheNic) {
  const VerbsWorld world(4096);
  const std::string text = world.sides[0].endpoint->describe();
  for (const char* part : {":1 (", "GID ", "MTU ", "NUMA node ", "atomics ", "GPUDirect none"}) {
    EXPECT_NE(text.find(part), std::string::npos) << "'" << part << "' is missing in " << text;
  }
  const std::string link = world.sides[0].connection->describe();
  for (const char* part : {"rank 0 to rank 1", "1 queue pairs", "adds by"}) {
    EXPECT_NE(link.find(part), std::string::npos) << "'" << part << "' is missing in " << link;
  }
  RecordProperty("endpoint", text);
  std::printf("%s\n%s\n", text.c_str(), link.c_str());
}

TEST_F(VerbsSetUp, CapabilitiesFollowBothNics) {
  VerbsSide one(0, 64);
  VerbsSide other(1, 64, {}, {.hardwareAtomics = false});
  one.meet(other.hello());
  other.meet(one.hello());
  EXPECT_TRUE(one.connection->capabilities().oneSidedWrites);
  EXPECT_FALSE(one.connection->capabilities().oneSidedAtomics);
  EXPECT_FALSE(other.connection->capabilities().oneSidedAtomics);
  EXPECT_FALSE(one.connection->capabilities().deviceMemory);
}

TEST_F(VerbsSetUp, UnknownDeviceIsRefusedWithTheNamesThereAre) {
  const auto create = [](const std::string& name) {
    Endpoint::create(Transport::verbs, Device::open(Platform::cpu), {.interface = name});
  };
  const std::string known = VerbsSide(0, 64).endpoint->nic()->name();
  expectError(ErrorCode::invalidArgument, {"'nosuch0'", known.substr(0, known.find(':'))},
              [&] { create("nosuch0"); });
  expectError(ErrorCode::unsupported, {"has 1 ports", "port 2"},
              [&] { create(known.substr(0, known.find(':')) + ":2"); });
  expectError(ErrorCode::unsupported, {"192.0.2.77"}, [&] { create("192.0.2.77"); });
}

TEST_F(VerbsSetUp, AddressOfTheNicNamesIt) {
  const VerbsSide side(0, 64);
  ibv_gid gid{};
  const auto address = side.endpoint->nic()->address();
  std::copy(address.gid.begin(), address.gid.end(), gid.raw);
  const auto again = Endpoint::create(Transport::verbs, Device::open(Platform::cpu),
                                      {.interface = transport::verbs::gidText(gid)});
  EXPECT_EQ(again->describe(), side.endpoint->describe());
}

TEST_F(VerbsSetUp, UnequalPeersAreRefused) {
  VerbsSide one(0, 64, {.queuePairs = 2});
  VerbsSide other(1, 64, {.queuePairs = 3});
  expectError(ErrorCode::invalidArgument, {"2 queue pairs", "3 at rank 1"},
              [&] { one.meet(other.hello()); });
  const std::vector<std::byte> foreign(40);
  expectError(ErrorCode::invalidArgument, {"40 bytes"}, [&] { one.connection->connect(foreign); });
  expectError(ErrorCode::invalidArgument, {"40 bytes"},
              [&] { static_cast<void>(one.connection->importMemory(foreign)); });
}

TEST_F(VerbsSetUp, AddsByTheCpuWaitForItAndSayHowMany) {
  VerbsWorld world(4096, {.queueDepth = 200}, {.hardwareAtomics = false});
  for (size_t i = 0; i < 150; ++i) world[0].add(i * 8, static_cast<int64_t>(i) + 1);
  expectError<TimeoutError>(ErrorCode::timeout, {"150 of 150 operations", "rank 1 over verbs"},
                            [&] { world[0].connection->flush(std::chrono::milliseconds(300)); });
  EXPECT_EQ(world[1].load(0), 0);
  world.drain();
  for (size_t i = 0; i < 150; ++i) EXPECT_EQ(world[1].load(i * 8), static_cast<int64_t>(i) + 1);
}

}  // namespace
}  // namespace mscclpp::test
