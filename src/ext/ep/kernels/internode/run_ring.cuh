#pragma once

#include "rails.cuh"

/// A flow's ring of a dispatch: all warps of a grid fill it, or empty it, together. What they have
/// finished goes on in runs of slots, each run after the one before it.
namespace mscclpp::ep::MSCCLPP_PLATFORM_NS {

#if MSCCLPP_PLATFORM_CUDA
/// A copy of so many bytes takes longer than a proxy works on it.
inline constexpr std::uint64_t kRunBytes = 512 << 10;
/// Tokens that a warp takes at a time: few, so that runs are complete soon after each other.
inline constexpr int kTurnTokens = 8;
#else
inline constexpr std::uint64_t kRunBytes = 1 << 10;
inline constexpr int kTurnTokens = 4;
#endif

/// Runs that are passed on together where filling is faster than passing on.
inline constexpr std::uint64_t kRunsAtOnce = 4;

/// Marks slots of a launch as finished, by any lanes in any order, and passes runs of them on in
/// order: a run takes runSlots marks and one from the run before it; whoever makes the last one
/// passes it on, with others that are complete by then.
struct RunMarks {
  std::uint32_t* done;   ///< [runs] of the runs under way
  std::uint64_t* total;  ///< slots of the launch, 0: not known yet
  std::uint64_t runSlots, runs;

  /// `n` slots from `first` on are finished. Calls pass(begin, end) for what can be passed on now;
  /// what was done before the marks is visible to it. A pass does not wrap round in `done`.
  template <class Pass>
  __device__ void finish(std::uint64_t first, std::uint64_t n, Pass&& pass) const {
    while (n > 0) {
      const std::uint64_t run = first / runSlots, left = (run + 1) * runSlots - first;
      const std::uint64_t part = n < left ? n : left;
      mark(run, part, pass);
      first += part;
      n -= part;
    }
  }
  /// The launch has so many slots: nobody takes what is left of the last run. Called once.
  template <class Pass>
  __device__ void close(std::uint64_t slots, Pass&& pass) const {
    storeRelaxed(total, slots);
    const std::uint64_t run = slots / runSlots, filled = slots - run * runSlots;
    if (filled > 0) mark(run, runSlots - filled, pass);
  }

 private:
  __device__ std::uint32_t* marksOf(std::uint64_t run) const { return &done[run % runs]; }
  template <class Pass>
  __device__ void mark(std::uint64_t run, std::uint64_t marks, Pass&& pass) const {
    while (true) {
      const auto add = static_cast<std::uint32_t>(marks);
      const std::uint64_t before = fetchAddLocalAcqRel(marksOf(run), add);
      if (before + marks != runSlots + (run == 0 ? 0 : 1)) return;
      const std::uint64_t first = run;
      do {
        storeRelaxed(marksOf(run), 0);  // before anybody can mark the run that comes here next
        ++run;
        // A run that lacks nothing but the mark of the one before it goes with that.
      } while (run - first < kRunsAtOnce && run % runs != 0 &&
               loadLocalAcquire(marksOf(run)) == runSlots);
      const std::uint64_t end = run * runSlots, all = loadRelaxed(total);
      pass(first * runSlots, all == 0 || end < all ? end : all);
      marks = 1;
    }
  }
};

/// Same at both ends; members are the same on all lanes of a warp.
struct RunRing {
  RunProgress& progress;
  char* memory;
  std::uint64_t offset;  ///< of `memory` in the heap
  std::uint64_t slotBytes;
  RunMarks marks;

  __device__ static RunRing of(const GroupArgs& g, const RailPlan& plan, RailArea area, int flow,
                               std::uint64_t slotBytes) {
    const std::uint64_t slots = plan.flowRingBytes() / slotBytes;
    const std::uint64_t runSlots = slotsPerRun(kRunBytes / slotBytes, slots);
    const std::uint64_t runs = slots / runSlots;
    auto& progress = *railMemory<RunProgress>(g, plan.runProgress(area, flow));
    return {progress, railMemory<char>(g, plan.ring(area, flow, 0)),
            railOffset(g, plan.ring(area, flow, 0)), slotBytes,
            RunMarks{progress.done, &progress.total, runSlots,
                     runs < kRailRuns ? runs : std::uint64_t{kRailRuns}}};
  }
  __device__ std::uint64_t slots() const { return marks.runSlots * marks.runs; }
  /// Of a slot of this launch, in the ring.
  __device__ std::uint64_t at(std::uint64_t slot) const { return slot % slots() * slotBytes; }
};

/// What a finished launch leaves: the next one begins at slot 0 of an empty ring. All threads of
/// one block, when no other works on it any more.
__device__ inline void closeRings(const GroupArgs& g, const RailArgs& rails) {
  const int thread = static_cast<int>(threadIndex()), threads = static_cast<int>(blockSize());
  for (int i = thread; i < (rails.outs + rails.ins) * kRailRuns; i += threads) {
    const int ring = i / kRailRuns, run = i - ring * kRailRuns;
    const bool out = ring < rails.outs;
    RunProgress& progress = *railMemory<RunProgress>(
        g, out ? rails.plan.runProgress(RailArea::dispatchSend, ring)
               : rails.plan.runProgress(RailArea::dispatchReceive, ring - rails.outs));
    progress.done[run] = 0;
    if (run != 0) continue;
    progress.slots += progress.total;
    progress.next = 0;
    progress.total = 0;
    progress.turns = 0;
  }
}

}  // namespace mscclpp::ep::MSCCLPP_PLATFORM_NS
