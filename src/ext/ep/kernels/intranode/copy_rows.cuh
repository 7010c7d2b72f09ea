#pragma once

#include "group.cuh"

/// The roofline of the benchmark: the same rows to the same places by plain bulk copies, one thread and
/// a ring per block, fixed lists of (token, rank).
namespace mscclpp::ep::MSCCLPP_PLATFORM_NS {

inline constexpr int kCopyStages = 8, kCopyAhead = 4;

struct CopyRowsHead {
  Mbarrier full[kCopyStages];
  std::uint32_t lastBlock;
};

/// Walks this block's (token, rank) pairs that carry a row.
struct RowWalk {
  const CopyRowsArgs& a;
  std::int64_t at, end;

  __device__ explicit RowWalk(const CopyRowsArgs& args)
      : a(args), at(blockIndex()), end(static_cast<std::int64_t>(args.tokens) * args.group.ranks) {
    skip();
  }
  __device__ void skip() {
    while (at < end && a.position[at] < 0) at += gridSize();
  }
  __device__ bool valid() const { return at < end; }
  __device__ void next() {
    at += gridSize();
    skip();
  }
  __device__ char* near() const {
    return const_cast<char*>(a.x) + static_cast<std::size_t>(at / a.group.ranks) * a.rowBytes;
  }
  __device__ char* far() const {
    const int r = static_cast<int>(at % a.group.ranks);
    const auto row = static_cast<std::size_t>(a.sendStart[r] + a.position[at]);
    return a.group.heaps[r] + a.heapOffset + row * a.rowBytes;
  }
};

__device__ inline void copyRowsKernel(const CopyRowsArgs& a) {
  auto& head = sharedStorage<CopyRowsHead>();
  char* ring = sharedBytes(alignUp(sizeof(CopyRowsHead), 128), kCopyStages * std::size_t{a.rowBytes});
  const std::uint32_t epoch = currentEpoch(a.group);
  if (threadIndex() == 0) {
    for (int s = 0; s < kCopyStages; ++s) initMbarrier(&head.full[s], 1);
    fenceMbarrierInit();
    RowWalk load(a), store(a);
    int loadStage = 0, storeStage = 0, ahead = 0;
    unsigned phase = 0;
    while (load.valid() || store.valid()) {
      for (; load.valid() && ahead < kCopyAhead; load.next(), ++ahead) {
        bulkWaitRead<kCopyStages - kCopyAhead>();
        arriveExpectBytes(&head.full[loadStage], a.rowBytes);
        bulkLoad(ring + static_cast<std::size_t>(loadStage) * a.rowBytes,
                 a.pull ? load.far() : load.near(), a.rowBytes, &head.full[loadStage]);
        if (++loadStage == kCopyStages) loadStage = 0;
      }
      waitParity(a.group.wait, &head.full[storeStage], phase, pipelineWait(a.group));
      bulkStore(a.pull ? store.near() : store.far(),
                ring + static_cast<std::size_t>(storeStage) * a.rowBytes, a.rowBytes);
      bulkCommit();
      if (++storeStage == kCopyStages) {
        storeStage = 0;
        phase ^= 1u;
      }
      store.next();
      --ahead;
    }
    bulkWait<0>();
  }
  leaveGroup(a.group, epoch, WaitWhat::dispatchDone, head.lastBlock);
}

}  // namespace mscclpp::ep::MSCCLPP_PLATFORM_NS
