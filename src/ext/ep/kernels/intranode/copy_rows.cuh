#pragma once

#include "group.cuh"

/// The roofline of the benchmark: the same rows to the same places by plain bulk copies, one thread
/// and a ring per block, fixed lists of (token, rank).
namespace mscclpp::ep::MSCCLPP_PLATFORM_NS {

inline constexpr int kCopyStages = 8, kCopyAhead = 4;

struct CopyRowsHead {
  Mbarrier full[kCopyStages];
  std::uint32_t lastBlock;
};

/// The two ends of one copy. 32 lanes work out 32 of them at a time; lane 0 issues.
struct CopyEnds {
  char* near;
  char* far;  ///< null = this (token, rank) pair carries no row
};
__device__ __forceinline__ CopyEnds endsAt(const CopyRowsArgs& a, std::int64_t pair) {
  if (pair >= static_cast<std::int64_t>(a.tokens) * a.group.ranks) return {};
  const std::int32_t position = a.position[pair];
  if (position < 0) return {};
  const auto at = static_cast<std::uint32_t>(pair),
             ranks = static_cast<std::uint32_t>(a.group.ranks);
  const std::uint32_t token = at / ranks, r = at - token * ranks;
  const auto row = static_cast<std::size_t>(a.sendStart[r] + position);
  return {const_cast<char*>(a.x) + std::size_t{token} * a.rowBytes,
          a.group.heaps[r] + a.heapOffset + row * a.rowBytes};
}

/// One lane's ring: loads run kCopyAhead rows before stores.
struct CopyRing {
  const CopyRowsArgs& a;
  Mbarrier* full;
  char* stages;
  char* to[kCopyAhead] = {};
  unsigned loads = 0, stores = 0;

  __device__ void store() {
    const unsigned stage = stores % kCopyStages;
    waitParity(a.group.wait, &full[stage], stores / kCopyStages & 1u, pipelineWait(a.group));
    bulkStore(to[0], stages + stage * a.rowBytes, a.rowBytes);
    bulkCommit();
    for (int i = 0; i + 1 < kCopyAhead; ++i) to[i] = to[i + 1];
    ++stores;
  }
  __device__ void copy(char* from, char* destination) {
    if (loads - stores == kCopyAhead) store();
    const unsigned stage = loads % kCopyStages;
    bulkWaitRead<kCopyStages - kCopyAhead>();
    arriveExpectBytes(&full[stage], a.rowBytes);
    bulkLoad(stages + stage * a.rowBytes, from, a.rowBytes, &full[stage]);
    for (unsigned i = 0; i < kCopyAhead; ++i) {
      if (i == loads - stores) to[i] = destination;
    }
    ++loads;
  }
  __device__ void drain() {
    while (stores < loads) store();
    bulkWait<0>();
  }
};

__device__ inline void copyRowsKernel(const CopyRowsArgs& a) {
  auto& head = sharedStorage<CopyRowsHead>();
  char* stages =
      sharedBytes(alignUp(sizeof(CopyRowsHead), 128), kCopyStages * std::size_t{a.rowBytes});
  const Turn turn = currentTurn(a.group);
  if (threadIndex() == 0) {
    for (int s = 0; s < kCopyStages; ++s) initMbarrier(&head.full[s], 1);
    fenceMbarrierInit();
  }
  CopyRing ring{a, head.full, stages};
  const std::int64_t pairs = static_cast<std::int64_t>(a.tokens) * a.group.ranks;
  // Blocks take runs of `ranks` pairs, a token each, so that every block serves every rank.
  const std::int64_t ranks = a.group.ranks, stride = gridSize() * ranks;
  const auto pairOf = [&](std::int64_t n) {
    const auto at = static_cast<std::uint32_t>(n), of = static_cast<std::uint32_t>(ranks);
    const std::uint32_t group = at / of;
    return std::int64_t{group} * stride + blockIndex() * ranks + (at - group * of);
  };
  CopyEnds next = endsAt(a, pairOf(laneId()));
  for (std::int64_t n = 0; pairOf(n) < pairs; n += 32) {
    const CopyEnds ends = next;
    next = endsAt(a, pairOf(n + 32 + laneId()));
    for (unsigned lanes = ballot(ends.far != nullptr); lanes != 0; lanes &= lanes - 1) {
      const int lane = findFirstSet(lanes) - 1;
      char* near = shuffle(ends.near, lane);
      char* far = shuffle(ends.far, lane);
      if (laneId() == 0) ring.copy(a.pull ? far : near, a.pull ? near : far);
    }
  }
  if (laneId() == 0) ring.drain();
  leaveGroup(a.group, turn, WaitWhat::dispatchDone, head.lastBlock);
}

}  // namespace mscclpp::ep::MSCCLPP_PLATFORM_NS
