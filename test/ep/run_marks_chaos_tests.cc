// Runs of slots that many warps finish out of order: each is passed on once, in order, complete.
#include <vector>

#include <gtest/gtest.h>

#include <mscclpp/device/launch.hpp>

#include "ep/manual.hpp"
#include "ext/ep/kernels/internode/run_ring.cuh"

namespace mscclpp::ep::testing {
namespace {

using namespace mscclpp::device;
using cpu::RunMarks;

constexpr unsigned kThreads = 128, kBlocks = 3;

struct MarkArgs {
  RunMarks marks;
  std::uint64_t total;     ///< slots of the launch
  std::uint64_t most;      ///< that a warp takes at a time
  std::uint64_t* next;     ///< the first that nobody has taken
  std::uint64_t* emptied;  ///< passed on; slots are used again
  std::uint64_t* slots;    ///< [runSlots * runs]
  std::uint32_t* errors;
  WaitControl control;

  std::uint64_t window() const { return marks.runSlots * marks.runs; }
};

std::uint64_t keyOf(std::uint64_t slot) {
  return slot * 1000 + 7;
}

/// What a proxy would find: the run that comes next, and every slot as its warp has filled it.
struct Taken {
  const MarkArgs& a;
  void operator()(std::uint64_t begin, std::uint64_t end) const {
    bool good = begin == loadRelaxed(a.emptied) && begin < end && end <= a.total;
    for (std::uint64_t slot = begin; slot < end; ++slot) {
      std::uint64_t& word = a.slots[slot % a.window()];
      good = good && word == keyOf(slot);
      word = 0;
    }
    if (!good) fetchAddRelaxed(a.errors, 1u);
    storeRelease(a.emptied, end);
  }
};

void markKernel(const MarkArgs& a) {
  for (std::uint64_t turn = 0;; ++turn) {
    std::uint64_t n = 1 + (turn + warpId()) % a.most, first = 0;
    if (laneId() == 0) first = fetchAddRelaxed(a.next, n);
    first = shuffle(first, 0);
    if (first >= a.total) return;
    if (n > a.total - first) n = a.total - first;
    const auto room = [&] { return first + n - loadAcquire(a.emptied) <= a.window(); };
    if (laneId() == 0 && !waitUntil(a.control, room, {1, 0}, a.emptied)) {
      fetchAddRelaxed(a.errors, 1u);
    }
    syncWarp();
    if (laneId() < n) a.slots[(first + laneId()) % a.window()] = keyOf(first + laneId());
    syncWarp();
    if (laneId() != 0) continue;
    a.marks.finish(first, n, Taken{a});
    if (first + n == a.total) a.marks.close(a.total, Taken{a});
  }
}

TEST(RunMarksChaos, EveryRunOnceInOrder) {
  underAllSchedules([](std::uint64_t seed, const RuntimeConfig& config) {
    for (const std::uint64_t runSlots : {1, 2, 5}) {
      // A warp takes a run's slots at most: the run that it waits for must not be its own.
      const std::uint64_t runs = (runSlots == 1 ? 1 : 2) + seed % 4,
                          total = 1 + (seed * 37 + runSlots * 11) % 90;
      std::vector<std::uint32_t> done(runs);
      std::vector<std::uint64_t> slots(runSlots * runs);
      std::uint64_t next = 0, emptied = 0, all = 0;
      std::uint32_t errors = 0;
      FailureRecord record{};
      Manual manual(config);
      device::Stream* const stream = createStream();
      launch<&markKernel, kThreads>({.blocks = kBlocks, .threads = kThreads}, stream,
                                    MarkArgs{.marks = {done.data(), &all, runSlots, runs},
                                             .total = total,
                                             .most = runSlots,
                                             .next = &next,
                                             .emptied = &emptied,
                                             .slots = slots.data(),
                                             .errors = &errors,
                                             .control = {&record, 0, 0}});
      EXPECT_TRUE(manual.runAll()) << manual.lastFailure();
      destroyStream(stream);
      EXPECT_EQ(errors, 0U) << total << " slots in runs of " << runSlots;
      EXPECT_EQ(emptied, total) << "in runs of " << runSlots;
    }
  });
}

}  // namespace
}  // namespace mscclpp::ep::testing
