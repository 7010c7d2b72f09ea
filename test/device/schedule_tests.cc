// What the seed decides in manual mode.

#include <cstdint>
#include <memory>
#include <vector>

#include <gtest/gtest.h>

#include <mscclpp/device/cpu/runtime.hpp>
#include <mscclpp/device/device.hpp>
#include <mscclpp/device/launch.hpp>

namespace mscclpp::test {
namespace {

using namespace mscclpp::device;  // NOLINT: as kernels do

struct StreamDeleter {
  void operator()(Stream* stream) const { destroyStream(stream); }
};
using StreamHandle = std::unique_ptr<Stream, StreamDeleter>;
StreamHandle makeStream(int rank = 0) {
  return StreamHandle(createStream(rank));
}

// The order of blocks is the seed's: the same seed gives the same one, different seeds different
// ones.
struct TraceArgs {
  uint32_t* next;
  uint32_t* trace;
};
void traceOrder(const TraceArgs& args) {
  for (int i = 0; i < 4; ++i) {
    args.trace[fetchAddRelaxed(args.next, 1)] = blockIndex() * 100 + threadIndex();
    syncWarp();
  }
}
std::vector<uint32_t> traced(uint64_t seed, bool chaos) {
  Manual manual(RuntimeConfig::testing(seed, chaos));
  const StreamHandle stream = makeStream();
  uint32_t next = 0;
  std::vector<uint32_t> trace(2 * 64 * 4);
  launch<traceOrder, 64>({.blocks = 2, .threads = 64}, stream.get(),
                         TraceArgs{&next, trace.data()});
  EXPECT_TRUE(manual.runAll()) << manual.lastFailure();
  return trace;
}
TEST(Schedule, TheSeedDecidesTheOrder) {
  EXPECT_EQ(traced(1, false), traced(2, false)) << "FIFO needs no seed";
  EXPECT_EQ(traced(1, true), traced(1, true));
  EXPECT_NE(traced(1, true), traced(2, true));
  EXPECT_NE(traced(1, true), traced(1, false));
}

// Chaos freezes whole ranks: now and then all blocks of one rank are done before the other rank is
// half way. Freezes of single warps and blocks never get all of a rank's eight blocks behind.
struct RaceArgs {
  uint32_t* progress;  // of both ranks
  uint32_t rank;
  uint32_t* behind;  // progress of the other rank when this one was done
};
constexpr uint32_t kRaceBlocks = 8;
constexpr uint32_t kRaceRounds = 30;
void raceRanks(const RaceArgs& args) {
  for (uint32_t round = 0; round < kRaceRounds; ++round) {
    syncBlock();
    if (threadIndex() != 0) continue;
    if (fetchAddRelaxed(&args.progress[args.rank], 1) + 1 == kRaceBlocks * kRaceRounds) {
      args.behind[args.rank] = loadRelaxed(&args.progress[1 - args.rank]);
    }
  }
}
TEST(Schedule, ChaosMakesEitherRankLate) {
  int late[2] = {};
  for (uint64_t seed = 1; seed <= 40; ++seed) {
    Manual manual(RuntimeConfig::testing(seed, true));
    uint32_t progress[2] = {};
    uint32_t behind[2] = {};
    const StreamHandle streams[2] = {makeStream(0), makeStream(1)};
    for (uint32_t rank = 0; rank < 2; ++rank) {
      launch<raceRanks, 32>({.blocks = kRaceBlocks, .threads = 32}, streams[rank].get(),
                            RaceArgs{progress, rank, behind});
    }
    ASSERT_TRUE(manual.runAll()) << manual.lastFailure();
    for (int rank = 0; rank < 2; ++rank) {
      if (behind[rank] < kRaceBlocks * kRaceRounds / 2) ++late[1 - rank];
    }
  }
  EXPECT_GT(late[0], 0);
  EXPECT_GT(late[1], 0);
  RecordProperty("late0", late[0]);
  RecordProperty("late1", late[1]);
}

}  // namespace
}  // namespace mscclpp::test
