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
TEST(ManualMode, TheSeedDecidesTheOrder) {
  EXPECT_EQ(traced(1, false), traced(2, false)) << "FIFO needs no seed";
  EXPECT_EQ(traced(1, true), traced(1, true));
  EXPECT_NE(traced(1, true), traced(2, true));
  EXPECT_NE(traced(1, true), traced(1, false));
}

// Chaos freezes whole ranks: with enough seeds, either rank is seen far behind the other.
struct RaceArgs {
  uint32_t* finished;  // shared by the ranks
  uint32_t rank;
  uint32_t* firstFinisher;
};
void raceRanks(const RaceArgs& args) {
  for (int i = 0; i < 20; ++i) syncBlock();
  if (threadIndex() == 0 && fetchAddRelaxed(args.finished, 1) == 0) *args.firstFinisher = args.rank;
}
TEST(ManualMode, ChaosMakesEitherRankLate) {
  int wins[2] = {};
  for (uint64_t seed = 1; seed <= 20; ++seed) {
    Manual manual(RuntimeConfig::testing(seed, true));
    uint32_t finished = 0;
    uint32_t first = 9;
    const StreamHandle a = makeStream(0);
    const StreamHandle b = makeStream(1);
    for (uint32_t rank = 0; rank < 2; ++rank) {
      launch<raceRanks, 32>({.blocks = 1, .threads = 32}, rank == 0 ? a.get() : b.get(),
                            RaceArgs{&finished, rank, &first});
    }
    ASSERT_TRUE(manual.runAll()) << manual.lastFailure();
    ASSERT_LT(first, 2u);
    ++wins[first];
  }
  EXPECT_GT(wins[0], 2);
  EXPECT_GT(wins[1], 2);
}

}  // namespace
}  // namespace mscclpp::test
