// Port channels under the CPU run time's seeded chaos: the kernels of all ranks run on the test's
// own thread in an order that a seed decides, with frozen warps, blocks and ranks, while real proxy
// threads serve them. A seed repeats the kernels' side only; the proxies' is the machine's.
#include <array>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include <mscclpp/device/cpu/runtime.hpp>

#include "core/port_kernels.hpp"
#include "core/port_suite.hpp"
#include "core/ranks.hpp"
#include "device/seeds.hpp"

namespace mscclpp::test {
namespace {

constexpr uint64_t kLimitNs = 20'000'000'000;
constexpr size_t kMemory = size_t{1} << 22;
constexpr uint64_t kOutbox = kMemory / 2;

/// A number below `count` that depends on the seed and on what it is for.
uint32_t pick(uint64_t seed, uint64_t what, uint32_t count) {
  uint64_t x = (seed * 1000 + what) * 0x9E3779B97F4A7C15U;
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9U;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBU;
  return static_cast<uint32_t>((x ^ (x >> 31)) % count);
}

/// Tiny FIFOs and queues as often as large ones, positions that wrap, one or two proxy threads.
PortSetup setupOf(uint64_t seed) {
  const std::array<int, 3> depths = {4, 16, 512};
  const int depth = depths[pick(seed, 1, 3)];
  const auto lap = static_cast<uint64_t>(depth);
  const std::array<uint64_t, 4> starts = {0, (uint64_t{1} << 31) - lap, (uint64_t{1} << 32) - lap,
                                          (uint64_t{1} << 63) - lap};
  return {.name = "chaos",
          .platform = Platform::cpu,
          .transport = seed % 3 == 1 ? Transport::tcp : Transport::shm,
          .queueDepth = pick(seed, 3, 2) == 0 ? 2 : 1024,
          .threads = 1 + static_cast<int>(pick(seed, 4, 2)),
          .fifoDepth = depth,
          .fifoStart = starts[pick(seed, 5, starts.size())],
          .fifoPerBlock = pick(seed, 6, 2) == 0,
          .late = seed % 3 == 0};
}

/// Small ones mostly; some so large that a connection takes more than one turn of the proxy.
uint64_t sizeOf(uint64_t seed, uint64_t what) {
  constexpr std::array<uint32_t, 8> kLimits = {2, 300, 300, 300, 300, 20'000, 20'000, 1'500'000};
  return pick(seed, what, kLimits[pick(seed, what + 1, kLimits.size())]);
}

/// In order for seed 0. Proxies are outside the run time: it must not take a wait for a deadlock.
device::RuntimeConfig scheduleOf(uint64_t seed) {
  device::RuntimeConfig config = device::RuntimeConfig::testing(seed, seed != 0);
  config.closed = false;
  if (seed % 4 == 3) config.preemptPercent = 40;
  return config;
}

/// Ranks that are threads while they are set up and ended.
class ChaosPorts {
 public:
  ChaosPorts(uint64_t seed, int ranks, int blocks)
      : groups_(static_cast<size_t>(ranks)), ports_(static_cast<size_t>(ranks)) {
    const UniqueId id = TcpBootstrap::createUniqueId();
    runRanks(ranks, [&](int rank) {
      const auto i = static_cast<size_t>(rank);
      groups_[i] = std::make_unique<TcpBootstrap>(rank, ranks, id, kLongTimeout);
      ports_[i] = std::make_unique<PortRank>(setupOf(seed), *groups_[i], blocks, kMemory);
      ports_[i]->fill(0x5A);
      // Some kernels push before anybody serves them.
      if (pick(seed, 7, 4) != 0) ports_[i]->start();
    });
  }
  ~ChaosPorts() {
    runRanks(ranks(), [&](int rank) {
      ports_[static_cast<size_t>(rank)].reset();
      groups_[static_cast<size_t>(rank)]->barrier();
    });
  }
  ChaosPorts(const ChaosPorts&) = delete;
  ChaosPorts& operator=(const ChaosPorts&) = delete;

  int ranks() const { return static_cast<int>(ports_.size()); }
  PortRank& operator[](int rank) { return *ports_[static_cast<size_t>(rank)]; }

  /// Launches for one rank after the other, runs everything and stops the proxies; every rank must
  /// have found everything right.
  void run(uint64_t seed, const std::function<void(PortRank&, int)>& launch) {
    {
      device::Manual manual(scheduleOf(seed));
      for (int rank = 0; rank < ranks(); ++rank) {
        launch((*this)[rank], rank);
        (*this)[rank].start();
      }
      EXPECT_TRUE(manual.runAll()) << manual.lastFailure();
    }
    runRanks(ranks(), [&](int rank) { (*this)[rank].stop(); });
    for (int rank = 0; rank < ranks(); ++rank) {
      PortRank& port = (*this)[rank];
      EXPECT_EQ(*port.errors(), 0u) << "rank " << rank;
      EXPECT_EQ(port.service().failure(), "") << "rank " << rank;
      EXPECT_FALSE(failurePublished(port.record()))
          << "rank " << rank << ": wait " << port.record().what << " for rank "
          << port.record().peer;
    }
  }

 private:
  std::vector<std::unique_ptr<TcpBootstrap>> groups_;
  std::vector<std::unique_ptr<PortRank>> ports_;
};

/// The first failure ends it, and the trace says which seed it was: MSCCLPP_TEST_SEED=n runs it.
void underSchedules(const std::function<void(uint64_t)>& body) {
  const uint64_t only = seedAlone();
  const uint64_t first = only != 0 ? only : 0;
  const uint64_t last = only != 0 ? only : seedCount(8);
  for (uint64_t seed = first; seed <= last && !testing::Test::HasFailure(); ++seed) {
    SCOPED_TRACE(seed == 0 ? std::string("in order (no chaos)")
                           : "again with MSCCLPP_TEST_SEED=" + std::to_string(seed));
    body(seed);
  }
}

TEST(PortChaos, DataComesBeforeItsAnnouncement) {
  underSchedules([](uint64_t seed) {
    ChaosPorts ports(seed, 2, 1);
    ports.run(seed, [&](PortRank& port, int rank) {
      constexpr uint32_t kLaunches = 5;
      constexpr std::array kSignalled = {Announce::putWithSignal, Announce::putThenSignal,
                                         Announce::putFlushSignal};
      // A counter tells the number of all rounds: every one must be announced by it.
      const bool counted = pick(seed, 9, 4) == 0;
      uint32_t round = 0;
      for (uint32_t launch = 0; launch < kLaunches; ++launch) {
        const uint64_t key = 10 * (launch + 1);
        const Announce announce = counted ? Announce::putThenAdd : kSignalled[pick(seed, key, 3)];
        const uint32_t rounds = 1 + pick(seed, key + 1, 4);
        launchPortPingPong(port.device(), port.stream(),
                           {.channel = port.channel(1 - rank),
                            .control = port.control(kLimitNs),
                            .announce = announce,
                            .rounds = rounds,
                            .bytes = sizeOf(seed, key + 2),
                            .inbox = pick(seed, key + 4, 1000),
                            .outbox = kOutbox + pick(seed, key + 5, 1000),
                            .local = port.memory(),
                            .counter = reinterpret_cast<const uint64_t*>(port.counters()) + 3,
                            .counterOffset = 24,
                            .errors = port.errors(),
                            .rank = rank,
                            .firstRound = round,
                            .claim = pick(seed, key + 6, 2)});
        round += rounds;
      }
    });
  });
}

TEST(PortChaos, ManyThreadsOfManyBlocksPushAtOnce) {
  constexpr int kBlocks = 2;
  constexpr uint32_t kRounds = 4;
  underSchedules([](uint64_t seed) {
    const int ranks = 2 + static_cast<int>(pick(seed, 8, 2));
    ChaosPorts ports(seed, ranks, kBlocks);
    std::vector<Stream> streams;  // one more per rank and peer: all writers at once
    ports.run(seed, [&](PortRank& port, int rank) {
      for (int step = 1; step < ranks; ++step) {
        streams.push_back(port.device().createStream(false, rank));
        PortHammerArgs args{.channels = {},
                            .control = port.control(kLimitNs),
                            .rounds = kRounds,
                            .errors = port.errors(),
                            .counterOffset = 64,
                            .rank = rank};
        for (int block = 0; block < kBlocks; ++block) {
          args.channels[block] = port.channel((rank + step) % ranks, block);
        }
        launchPortHammer(port.device(), streams.back(), kBlocks, args);
      }
    });
    int64_t sum = 0;
    for (uint32_t round = 0; round < kRounds; ++round) {
      for (int64_t thread = 0; thread < kPortThreads; ++thread) {
        sum += round % 2 == 1 ? -thread : 2 * thread + round;
      }
    }
    for (int rank = 0; rank < ranks; ++rank) {
      for (int block = 0; block < kBlocks; ++block) {
        EXPECT_EQ(ports[rank].counters()[8 + block], (ranks - 1) * sum)
            << "rank " << rank << ", counter of block " << block;
      }
      for (int step = 1; step < ranks; ++step) {
        EXPECT_EQ(ports[rank].signalsFrom((rank + step) % ranks),
                  uint64_t{kBlocks} * kRounds * (kPortThreads / 16));
      }
    }
  });
}

TEST(PortChaos, StreamsOfPutsFromSeveralBlocks) {
  constexpr int kBlocks = 3;
  constexpr uint32_t kCount = 10;
  constexpr uint64_t kBytes = 900;
  constexpr uint64_t kStride = 1001;
  underSchedules([](uint64_t seed) {
    // Two operations for a trigger: a connection may have room for the first only.
    const auto signalEach = static_cast<uint32_t>(seed % 2);
    ChaosPorts ports(seed, 2, kBlocks);
    ports.run(seed, [&](PortRank& port, int rank) {
      PortStreamArgs args{.channels = {},
                          .control = port.control(kLimitNs),
                          .count = kCount,
                          .flushEvery = 1 + pick(seed, 9, kCount),
                          .bytes = kBytes,
                          .local = port.memory(),
                          .inbox = rank == 0 ? 0 : kOutbox,
                          .stride = kStride,
                          .errors = port.errors(),
                          .rank = rank,
                          .signalEach = signalEach};
      for (int block = 0; block < kBlocks; ++block) {
        args.channels[block] = port.channel(1 - rank, block);
      }
      launchPortStream(port.device(), port.stream(), kBlocks, args);
    });
    for (const int rank : {0, 1}) {
      EXPECT_EQ(ports[rank].signalsFrom(1 - rank),
                uint64_t{kBlocks} * (signalEach != 0 ? kCount : 1));
      const auto got = ports[rank].read(rank == 0 ? kOutbox : 0, kBlocks * kCount * kStride);
      uint64_t wrong = 0;
      for (uint64_t at = 0; at < got.size(); ++at) {
        const uint64_t message = at / kStride, i = at % kStride;
        const auto key = static_cast<uint32_t>(message % kCount + message / kCount);
        wrong += got[at] != (i < kBytes ? portByte(key, 1 - rank, i) : char{0x5A});
      }
      EXPECT_EQ(wrong, 0u) << "rank " << rank;
    }
  });
}

}  // namespace
}  // namespace mscclpp::test
