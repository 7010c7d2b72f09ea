#include "core/channel_suite.hpp"

#include <atomic>

#include <mscclpp/bootstrap.hpp>
#include <mscclpp/errors.hpp>
#include <mscclpp/memory_channel.hpp>

#include "core/channel_kernels.hpp"
#include "core/processes.hpp"
#include "core/ranks.hpp"

namespace mscclpp::test {
namespace {

using namespace std::chrono_literals;

struct Shape {
  uint64_t bytes = 4096;
  uint64_t inbox = 0;
  uint64_t outbox = 8192;
  uint32_t rounds = 20;
  bool useGet = false;
};

constexpr size_t kMemoryBytes = 1 << 16;
constexpr uint64_t kLimitNs = 60'000'000'000;

/// A failure record and an error counter that kernels reach.
struct Report {
  explicit Report(Device& device)
      : memory(device.allocatePinned(sizeof(FailureRecord) + 64)),
        record(static_cast<FailureRecord*>(memory.get())),
        errors(reinterpret_cast<uint32_t*>(record + 1)) {}
  std::shared_ptr<void> memory;
  FailureRecord* record;
  uint32_t* errors;
};

MemoryChannel channelTo(Bootstrap& group, const std::shared_ptr<Device>& device, int peer) {
  const RegisteredMemory local(device, device->allocateExportable(kMemoryBytes), kMemoryBytes);
  const auto memories = exchangeMemories(group, local);
  const auto semaphores = MemorySemaphore::createAll(group, device);
  return {semaphores[static_cast<size_t>(peer)], local, memories[static_cast<size_t>(peer)]};
}

/// One rank of a pair; returns the number of wrong bytes and failed waits. Collective over the
/// pair.
uint32_t runPingPong(Bootstrap& group, const std::shared_ptr<Device>& device, const Shape& shape) {
  const int rank = group.rank();
  const MemoryChannel channel = channelTo(group, device, 1 - rank);
  Report report(*device);
  Stream stream = device->createStream(false, rank);
  prepareChannelKernels(*device);
  group.barrier();  // no rank may spin while another loads kernels
  const PingPongArgs args{.channel = channel.deviceHandle(),
                          .control = {report.record, kLimitNs, rank},
                          .bytes = shape.bytes,
                          .inbox = shape.inbox,
                          .outbox = shape.outbox,
                          .errors = report.errors,
                          .rank = rank,
                          .rounds = shape.rounds,
                          .useGet = shape.useGet ? 1u : 0u};
  // Two launches: the counters go on where the first left them.
  launchPingPong(*device, stream, args);
  launchPingPong(*device, stream, args);
  stream.synchronize();
  group.barrier();
  return *report.errors;
}

/// Ranks as threads; on several GPUs each has its own.
void pingPongOfThreads(Platform platform, const Shape& shape) {
  const UniqueId id = TcpBootstrap::createUniqueId();
  runRanks(2, [&](int rank) {
    TcpBootstrap group(rank, 2, id, kLongTimeout);
    const auto device = Device::open(platform, rank % Device::count(platform));
    EXPECT_EQ(runPingPong(group, device, shape), 0u) << "on rank " << rank;
  });
}

TEST_P(ChannelSuite, PutSignalWaitPingPong) {
  pingPongOfThreads(GetParam(), {});
}

TEST_P(ChannelSuite, GetPingPong) {
  pingPongOfThreads(GetParam(), {.useGet = true});
}

TEST_P(ChannelSuite, OffsetsAndSizesOfAnyAlignment) {
  pingPongOfThreads(GetParam(), {.bytes = 4095, .inbox = 16, .outbox = 8192, .rounds = 3});
  pingPongOfThreads(GetParam(), {.bytes = 1000, .inbox = 3, .outbox = 8201, .rounds = 3});
  pingPongOfThreads(GetParam(), {.bytes = 1, .inbox = 7, .outbox = 8192, .rounds = 3});
  pingPongOfThreads(GetParam(), {.bytes = 0, .inbox = 0, .outbox = 8192, .rounds = 3});
}

TEST_P(ChannelSuite, AllPairsOfFourRanksAtOnce) {
  constexpr int kRanks = 4;
  const UniqueId id = TcpBootstrap::createUniqueId();
  runRanks(kRanks, [&](int rank) {
    TcpBootstrap group(rank, kRanks, id, kLongTimeout);
    const auto device = Device::open(GetParam(), rank % Device::count(GetParam()));
    // In step s the partner of r is r ^ s; every step has memory and semaphores of its own.
    std::vector<MemoryChannel> channels;
    for (int step = 1; step < kRanks; ++step)
      channels.push_back(channelTo(group, device, rank ^ step));
    Report report(*device);
    prepareChannelKernels(*device);
    // Before any kernel spins: to make a stream, CUDA may wait for the whole device.
    Stream stream = device->createStream(false, rank);
    group.barrier();
    for (int step = 1; step < kRanks; ++step) {
      const int peer = rank ^ step;
      const PingPongArgs args{.channel = channels[static_cast<size_t>(step - 1)].deviceHandle(),
                              .control = {report.record, kLimitNs, rank},
                              .bytes = 512,
                              .inbox = 0,
                              .outbox = 8192,
                              .errors = report.errors,
                              .rank = rank < peer ? 0 : 1,
                              .rounds = 4,
                              .useGet = 0};
      launchPingPong(*device, stream, args);
    }
    stream.synchronize();
    EXPECT_EQ(*report.errors, 0u) << "on rank " << rank;
    group.barrier();
  });
}

TEST_P(ChannelSuite, PollReadAndWriteToOneself) {
  const UniqueId id = TcpBootstrap::createUniqueId();
  TcpBootstrap group(0, 1, id, kLongTimeout);
  const MemoryChannel channel = channelTo(group, device_, 0);
  Report report(*device_);
  Stream stream = device_->createStream();
  prepareChannelKernels(*device_);
  launchSelf(*device_, stream,
             {channel.deviceHandle(), {report.record, kLimitNs, 0}, report.errors});
  stream.synchronize();
  EXPECT_EQ(*report.errors, 0u);
  EXPECT_FALSE(failurePublished(*report.record));
}

TEST_P(ChannelSuite, ASignalThatNeverComesIsReportedWithinTheLimit) {
  const UniqueId id = TcpBootstrap::createUniqueId();
  TcpBootstrap group(0, 1, id, kLongTimeout);
  const MemoryChannel channel = channelTo(group, device_, 0);
  Report report(*device_);
  Stream stream = device_->createStream();
  prepareChannelKernels(*device_);
  constexpr uint64_t kShort = 50'000'000;
  launchStuck(*device_, stream,
              {channel.deviceHandle(), {report.record, kShort, 4}, report.errors});
  stream.synchronize();
  EXPECT_EQ(*report.errors, 2u) << "both waits must say that they failed";
  ASSERT_TRUE(failurePublished(*report.record));
  EXPECT_EQ(report.record->what, static_cast<uint32_t>(WaitedFor::never));
  EXPECT_EQ(report.record->peer, 5);
  EXPECT_EQ(report.record->rank, 4);
  EXPECT_GE(report.record->waitedNs, kShort);
}

TEST_P(ChannelSuite, SemaphoresConnectPairwise) {
  const UniqueId id = TcpBootstrap::createUniqueId();
  std::vector<MemorySemaphoreHandle> handles(2);
  runRanks(2, [&](int rank) {
    TcpBootstrap group(rank, 2, id, kLongTimeout);
    const auto semaphore = MemorySemaphore::connect(group, device_, 1 - rank, 3);
    handles[static_cast<size_t>(rank)] = semaphore.deviceHandle();
    group.barrier();
  });
  // Threads of one process share addresses: each side's outbound word is the other's inbound.
  EXPECT_EQ(handles[0].remoteInbound, handles[1].inbound);
  EXPECT_EQ(handles[1].remoteInbound, handles[0].inbound);
  EXPECT_NE(handles[0].inbound, handles[1].inbound);
}

TEST_P(ChannelSuite, EmptyChannelsAndShortStatesAreRefused) {
  expectError(ErrorCode::invalidState, {"empty"}, [] { MemoryChannel().deviceHandle(); });
  expectError(ErrorCode::invalidState, {"empty"}, [] { MemorySemaphore().deviceHandle(); });
  const RegisteredMemory memory(device_, device_->allocateExportable(256), 256);
  expectError(ErrorCode::invalidArgument, {"offset 8", "256 bytes"},
              [&] { MemorySemaphore(memory, 8, memory, 0); });
  expectError(ErrorCode::invalidArgument, {"remote"},
              [&] { MemorySemaphore(memory, 0, RegisteredMemory(), 0); });
}

// --- ranks as processes --------------------------------------------------------------------------

const RoleRegistration kChannelRank("channel-rank", [](const std::vector<std::string>& arguments) {
  const Platform platform = parsePlatform(arguments.at(0));
  const int rank = std::stoi(arguments.at(1));
  const UniqueId id =
      arguments.size() > 2 ? UniqueId::fromString(arguments[2]) : TcpBootstrap::createUniqueId();
  if (arguments.size() <= 2) tellParent(id.toString());
  TcpBootstrap group(rank, 2, id, kLongTimeout);
  const auto device = Device::open(platform, rank % Device::count(platform));
  const uint32_t put = runPingPong(group, device, {.rounds = 5});
  const uint32_t get = runPingPong(group, device, {.rounds = 5, .useGet = true});
  tellParent(fmt::format("errors {} {}", put, get));
  return 0;
});

TEST_P(ChannelSuite, RanksAsProcesses) {
  const std::string platform(toString(GetParam()));
  Child zero("channel-rank", {platform, "0"});
  const std::string id = zero.hear();
  Child one("channel-rank", {platform, "1", id});
  EXPECT_EQ(zero.hear(), "errors 0 0");
  EXPECT_EQ(one.hear(), "errors 0 0");
  EXPECT_EQ(zero.wait(), 0);
  EXPECT_EQ(one.wait(), 0);
}

}  // namespace
}  // namespace mscclpp::test
