#include "core/port_suite.hpp"

#include <mscclpp/errors.hpp>

#include "core/port_kernels.hpp"
#include "core/ranks.hpp"

namespace mscclpp::test {

namespace {

constexpr uint64_t kLimitNs = 60'000'000'000;
constexpr size_t kMemory = size_t{1} << 20;
constexpr uint64_t kOutbox = kMemory / 2;

/// Ranks as threads; on several GPUs they take turns.
void ofRanks(const PortSetup& setup, int ranks, int blocks, size_t bytes,
             const std::function<void(PortRank&, Bootstrap&)>& body) {
  const UniqueId id = TcpBootstrap::createUniqueId();
  runRanks(ranks, [&](int rank) {
    TcpBootstrap group(rank, ranks, id, kLongTimeout);
    PortRank port(setup, group, blocks, bytes);
    body(port, group);
  });
}

PortPingPongArgs pingPong(PortRank& port, int rank, Announce announce, uint64_t bytes,
                          uint32_t rounds) {
  return {.channel = port.channel(1 - rank),
          .control = port.control(kLimitNs),
          .announce = announce,
          .rounds = rounds,
          .bytes = bytes,
          .inbox = 0,
          .outbox = kOutbox,
          .local = port.memory(),
          .counter = reinterpret_cast<const uint64_t*>(port.counters()) + 3,
          .counterOffset = 24,
          .errors = port.errors(),
          .rank = rank,
          .firstRound = 0,
          .claim = 0};
}

}  // namespace

void PortSuite::SetUp() {
  if (Device::count(GetParam().platform) == 0) {
    GTEST_SKIP() << "no device of platform " << toString(GetParam().platform) << " is visible here";
  }
}

TEST_P(PortSuite, DataComesBeforeItsAnnouncement) {
  ofRanks(GetParam(), 2, 1, kMemory, [](PortRank& port, Bootstrap& group) {
    port.fill(0x5A);
    port.start();
    for (const Announce announce : {Announce::putWithSignal, Announce::putThenSignal,
                                    Announce::putFlushSignal, Announce::putThenAdd}) {
      PortPingPongArgs args = pingPong(port, group.rank(), announce, 3000, 20);
      launchPortPingPong(port.device(), port.stream(), args);
      // Another launch goes on where the first left the counters, with other sizes and places.
      args.firstRound = 20;
      args.bytes = 1;
      args.inbox = 12345;
      args.outbox = kOutbox + 777;
      args.claim = 1;
      launchPortPingPong(port.device(), port.stream(), args);
      args.firstRound = 40;
      args.claim = 0;
      launchPortPingPong(port.device(), port.stream(), args);
      port.stream().synchronize();
      EXPECT_EQ(*port.errors(), 0u) << "announcement " << static_cast<int>(announce);
    }
    port.stop();
    EXPECT_EQ(port.service().failure(), "");
    EXPECT_FALSE(failurePublished(port.record()));
  });
}

TEST_P(PortSuite, MessagesOfManySizes) {
  ofRanks(GetParam(), 2, 1, kMemory, [](PortRank& port, Bootstrap& group) {
    port.fill(0x5A);
    port.start();
    uint32_t round = 0;
    for (const uint64_t bytes : {0ul, 1ul, 15ul, 4096ul, 7168ul, 65537ul, 262144ul}) {
      PortPingPongArgs args = pingPong(port, group.rank(), Announce::putWithSignal, bytes, 3);
      args.firstRound = round;
      round += args.rounds;
      launchPortPingPong(port.device(), port.stream(), args);
    }
    port.stop();
    EXPECT_EQ(*port.errors(), 0u);
    EXPECT_EQ(port.service().failure(), "");
  });
}

/// A signal behind data carries its number in two parts.
TEST_P(PortSuite, SignalsBehindDataBeyondSixteenBits) {
  if (GetParam().platform != Platform::cuda) GTEST_SKIP() << "one part only: the CPU counts them";
  ofRanks(GetParam(), 2, 1, kMemory, [](PortRank& port, Bootstrap& group) {
    constexpr uint32_t kRounds = 66'000;
    port.fill(0x5A);
    port.start();
    launchPortPingPong(port.device(), port.stream(),
                       pingPong(port, group.rank(), Announce::putWithSignal, 8, kRounds));
    port.stop();
    EXPECT_EQ(*port.errors(), 0u);
    EXPECT_EQ(port.signalsFrom(1 - group.rank()), kRounds);
  });
}

TEST_P(PortSuite, ManyThreadsOfManyBlocksPushAtOnce) {
  constexpr int kBlocks = 4;
  constexpr uint32_t kRounds = 12;
  constexpr int kRanks = 3;
  ofRanks(GetParam(), kRanks, kBlocks, kMemory, [](PortRank& port, Bootstrap& group) {
    // Two writers for each rank's counters: both others.
    std::vector<Stream> streams;
    for (int step = 1; step < kRanks; ++step) {
      streams.push_back(port.device().createStream(false, group.rank()));
    }
    group.barrier();
    port.start();
    for (int step = 1; step < kRanks; ++step) {
      PortHammerArgs args{.channels = {},
                          .control = port.control(kLimitNs),
                          .rounds = kRounds,
                          .errors = port.errors(),
                          .counterOffset = 64,
                          .rank = group.rank()};
      for (int block = 0; block < kBlocks; ++block) {
        args.channels[block] = port.channel((group.rank() + step) % kRanks, block);
      }
      launchPortHammer(port.device(), streams[static_cast<size_t>(step - 1)], kBlocks, args);
    }
    for (Stream& stream : streams) stream.synchronize();
    port.stop();
    EXPECT_EQ(*port.errors(), 0u);
    EXPECT_EQ(port.service().failure(), "");
    int64_t sum = 0;
    for (uint32_t round = 0; round < kRounds; ++round) {
      for (int64_t thread = 0; thread < kPortThreads; ++thread) {
        sum += round % 2 == 1 ? -thread : 2 * thread + round;
      }
    }
    for (int block = 0; block < kBlocks; ++block) {
      EXPECT_EQ(port.counters()[8 + block], (kRanks - 1) * sum) << "counter of block " << block;
    }
    for (int step = 1; step < kRanks; ++step) {
      EXPECT_EQ(port.signalsFrom((group.rank() + step) % kRanks),
                uint64_t{kBlocks} * kRounds * (kPortThreads / 16));
    }
  });
}

TEST_P(PortSuite, StreamsOfPutsFromSeveralBlocks) {
  constexpr int kBlocks = 3;
  constexpr uint32_t kCount = 24;
  constexpr uint64_t kBytes = 2500;
  constexpr uint64_t kStride = 3001;
  ofRanks(GetParam(), 2, kBlocks, kMemory, [](PortRank& port, Bootstrap& group) {
    const int rank = group.rank();
    // Each rank writes its half: where its messages lie here, they lie at the peer.
    PortStreamArgs args{.channels = {},
                        .control = port.control(kLimitNs),
                        .count = kCount,
                        .flushEvery = 7,
                        .bytes = kBytes,
                        .local = port.memory(),
                        .inbox = rank == 0 ? 0 : kOutbox,
                        .stride = kStride,
                        .errors = port.errors(),
                        .rank = rank};
    for (int block = 0; block < kBlocks; ++block)
      args.channels[block] = port.channel(1 - rank, block);
    port.start();
    launchPortStream(port.device(), port.stream(), kBlocks, args);
    port.stop();
    EXPECT_EQ(*port.errors(), 0u);
    EXPECT_EQ(port.signalsFrom(1 - rank), uint64_t{kBlocks});
    const uint64_t theirs = rank == 0 ? kOutbox : 0;
    const auto got = port.read(theirs, kBlocks * kCount * kStride);
    uint64_t wrong = 0;
    for (uint64_t at = 0; at < got.size(); ++at) {
      const uint64_t message = at / kStride, i = at % kStride;
      const auto block = static_cast<uint32_t>(message / kCount);
      const char expected =
          i < kBytes ? portByte(static_cast<uint32_t>(message % kCount) + block, 1 - rank, i) : 0;
      wrong += got[at] != expected;
    }
    EXPECT_EQ(wrong, 0u);
  });
}

TEST_P(PortSuite, AWaitThatNobodyAnswersIsReported) {
  ofRanks(GetParam(), 2, 1, 4096, [](PortRank& port, Bootstrap& group) {
    constexpr uint64_t kShort = 50'000'000;
    // The proxies are not running: a flush cannot come back.
    for (const uint32_t flush : {0u, 1u}) {
      *port.errors() = 0;
      launchPortStuck(port.device(), port.stream(),
                      {.channel = port.channel(1 - group.rank()),
                       .control = port.control(kShort),
                       .errors = port.errors(),
                       .flush = flush});
      port.stream().synchronize();
      EXPECT_EQ(*port.errors(), 2u) << "both waits must say that they failed";
      ASSERT_TRUE(failurePublished(port.record()));
      EXPECT_EQ(port.record().what,
                flush != 0 ? kWaitFlush : static_cast<uint32_t>(PortWait::never));
      EXPECT_EQ(port.record().peer, flush != 0 ? 1 - group.rank() : 5);
      EXPECT_GE(port.record().waitedNs, kShort);
      clearFailure(port.record());
    }
    group.barrier();
  });
}

TEST_P(PortSuite, AFullFifoWithoutAProxyIsReported) {
  PortSetup small = GetParam();
  small.fifoDepth = 8;
  ofRanks(small, 2, 1, 4096, [](PortRank& port, Bootstrap& group) {
    PortHammerArgs args{.channels = {},
                        .control = port.control(50'000'000),
                        .rounds = 2,
                        .errors = port.errors(),
                        .counterOffset = 64,
                        .rank = group.rank()};
    args.channels[0] = port.channel(1 - group.rank());
    launchPortHammer(port.device(), port.stream(), 1, args);
    port.stream().synchronize();
    EXPECT_GT(*port.errors(), 0u);
    ASSERT_TRUE(failurePublished(port.record()));
    EXPECT_EQ(port.record().peer, 1 - group.rank());
    group.barrier();
  });
}

TEST_P(PortSuite, APutOutsideItsMemoryBreaksTheConnectionAndEveryWaitKnows) {
  ofRanks(GetParam(), 2, 1, 4096, [](PortRank& port, Bootstrap& group) {
    port.start();
    if (group.rank() == 0) {
      const PortPutArgs put{.channel = port.channel(1),
                            .control = port.control(kLimitNs),
                            .remoteOffset = 4000,
                            .localOffset = 0,
                            .bytes = 200,
                            .errors = port.errors(),
                            .wait = 0};
      launchPortPut(port.device(), port.stream(), put);
      PortPutArgs wait = put;
      wait.wait = 1;  // for a signal that rank 1 never sends: ends with the failure, not the limit
      launchPortPut(port.device(), port.stream(), wait);
      port.stream().synchronize();
      EXPECT_EQ(*port.errors(), 1u);
      ASSERT_TRUE(failurePublished(port.record()));
      EXPECT_EQ(port.record().what, kWaitProxyFailed);
      EXPECT_EQ(port.record().peer, 1);
      expectError<PeerError>(ErrorCode::peerFailure, {"rank 1", "200 bytes", "offset 4000", "4096"},
                             [&] { port.service().checkHealth(); });
    }
    port.stop();
  });
}

TEST_P(PortSuite, AProxyStopsAndStartsAgain) {
  ofRanks(GetParam(), 2, 1, kMemory, [](PortRank& port, Bootstrap& group) {
    port.fill(0x5A);
    for (uint32_t turn = 0; turn < 3; ++turn) {
      PortPingPongArgs args = pingPong(port, group.rank(), Announce::putWithSignal, 2000, 4);
      args.firstRound = 4 * turn;
      // The kernel may push before anybody serves it.
      launchPortPingPong(port.device(), port.stream(), args);
      port.start();
      port.stream().synchronize();
      group.barrier();
      port.service().drain();
      group.barrier();
      port.service().stop();
      group.barrier();
    }
    EXPECT_EQ(*port.errors(), 0u);
    EXPECT_EQ(port.service().failure(), "");
    const auto statistics = port.service().statistics();
    uint64_t triggers = 0;
    for (const ProxyStatistics& thread : statistics) triggers += thread.triggers;
    EXPECT_EQ(triggers, 12u);
  });
}

}  // namespace mscclpp::test
