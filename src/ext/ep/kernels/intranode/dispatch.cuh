#pragma once

#include "dispatch_meta.cuh"
#include "dispatch_plan.cuh"

/// dispatch: every token is read once and written straight into its final row at every rank that
/// hosts one of its experts. Per pipe one planner warp (dispatch_plan.cuh) and one issuing warp.
namespace mscclpp::ep::MSCCLPP_PLATFORM_NS {

/// One thread drives the copy engine: loads each row once into the ring, kAhead units early, and
/// stores it from the same stage to every destination. A unit is a row, or a part of one (WholeRows
/// = false). The thread's instruction latency per unit is the first limit of a block: no address
/// arithmetic beyond additions, everything it needs from the planner is one shared-memory load
/// away.
template <class Shape, bool WholeRows>
__device__ void issueRows(const DispatchArgs& a, const DispatchView<Shape>& v, int pipe) {
  PlanQueue& plan = v.head().plan[pipe];
  Mbarrier* const full = v.head().full[pipe];
  char* const ring = v.stage(pipe, 0);
  const std::uint32_t stageBytes = a.partBytes;
  unsigned loadChunk = 0, storeChunk = 0;  // chunks opened, chunks retired
  int loadLeft = 0, storeLeft = 0;         // tokens of them still to load, to store
  unsigned loadAt = 0, storeAt = 0;        // their place in the queue of tokens
  std::uint32_t loadOffset = 0, storeOffset = 0;
  int loadStage = 0, storeStage = 0, ahead = 0;
  unsigned phase = 0;
  bool ended = false;
  const auto bytesAt = [&](std::uint32_t offset) {
    if constexpr (WholeRows) return a.rowBytes;
    const std::uint32_t left = a.rowBytes - offset;
    return left < stageBytes ? left : stageBytes;
  };
  while (true) {
    while (!ended && ahead < Shape::kAhead) {
      if (loadLeft == 0) {  // open the next chunk
        const unsigned slot = loadChunk % kQueueChunks, parity = loadChunk / kQueueChunks & 1u;
        if (loadChunk - storeChunk == kQueueChunks) break;
        if (ahead > 0 && !testParity(&plan.ready[slot], parity)) break;  // rows wait to leave
        waitParity(a.group.wait, &plan.ready[slot], parity, pipelineWait(a.group));
        loadLeft = plan.count[slot];
        loadAt = slot * kChunkTokens;
        ended = loadLeft < 0;
        if (ended) break;
        ++loadChunk;
      }
      bulkWaitRead<Shape::kStages - Shape::kAhead>();  // the stage's last stores have left it
      const std::uint32_t bytes = bytesAt(loadOffset);
      arriveExpectBytes(&full[loadStage], bytes);
      bulkLoad(ring + static_cast<std::uint32_t>(loadStage) * stageBytes,
               plan.source[loadAt] + loadOffset, bytes, &full[loadStage]);
      if (++loadStage == Shape::kStages) loadStage = 0;
      ++ahead;
      if constexpr (!WholeRows) {
        loadOffset += bytes;
        if (loadOffset < a.rowBytes) continue;
        loadOffset = 0;
      }
      ++loadAt;
      --loadLeft;
    }
    if (ahead == 0) break;  // only at the end: an open queue always gives a row to load
    if (storeLeft == 0) {
      const unsigned slot = storeChunk % kQueueChunks;
      storeLeft = plan.count[slot];
      storeAt = slot * kChunkTokens;
    }
    char* const* const to = v.destinations(pipe, storeAt);
    const int destinations = plan.destinations[storeAt];
    const std::uint32_t bytes = bytesAt(storeOffset);
    const char* const row = ring + static_cast<std::uint32_t>(storeStage) * stageBytes;
    waitParity(a.group.wait, &full[storeStage], phase, pipelineWait(a.group));
    for (int d = 0; d < destinations; ++d) bulkStore(to[d] + storeOffset, row, bytes);
    bulkCommit();
    if (++storeStage == Shape::kStages) {
      storeStage = 0;
      phase ^= 1u;
    }
    --ahead;
    if constexpr (!WholeRows) {
      storeOffset += bytes;
      if (storeOffset < a.rowBytes) continue;
      storeOffset = 0;
    }
    ++storeAt;
    if (--storeLeft == 0) arrive(&plan.freed[storeChunk++ % kQueueChunks]);
  }
  bulkWait<0>();
}

/// Rows that the copy engine cannot take (sizes or addresses off 16 bytes): 8 bytes per lane.
template <class Shape>
__device__ void copyRowsByLanes(const DispatchArgs& a, const DispatchView<Shape>& v, int pipe) {
  PlanQueue& plan = v.head().plan[pipe];
  const std::uint32_t words = a.rowBytes / 8;
  for (int k = 0;; ++k) {
    const int slot = k % kQueueChunks;
    waitParity(a.group.wait, &plan.ready[slot], static_cast<unsigned>(k / kQueueChunks) & 1u,
               pipelineWait(a.group));
    const int count = plan.count[slot];
    if (count < 0) return;
    for (int t = slot * kChunkTokens; t < slot * kChunkTokens + count; ++t) {
      const auto* from = reinterpret_cast<const std::uint64_t*>(plan.source[t]);
      char* const* to = v.destinations(pipe, static_cast<unsigned>(t));
      for (std::uint32_t i = laneId(); i < words; i += 32) {
        const std::uint64_t word = from[i];
        for (int d = 0; d < plan.destinations[t]; ++d) {
          reinterpret_cast<std::uint64_t*>(to[d])[i] = word;
        }
      }
    }
    syncWarp();
    if (laneId() == 0) arrive(&plan.freed[slot]);
  }
}

template <class Shape>
__device__ void initPipes(DispatchHead<Shape>& head) {
  for (int p = 0; p < Shape::kPipes; ++p) {
    for (int s = 0; s < Shape::kStages; ++s) initMbarrier(&head.full[p][s], 1);
    for (int s = 0; s < kQueueChunks; ++s) {
      initMbarrier(&head.plan[p].ready[s], 1);
      initMbarrier(&head.plan[p].freed[s], 1);
    }
  }
  fenceMbarrierInit();
}

/// Worst-case outputs: rows that nobody sends say "no expert".
__device__ inline void fillTail(const DispatchArgs& a) {
  const std::int64_t used = a.rankOffset[a.group.ranks] - a.window.rowBegin;
  auto* idx = reinterpret_cast<std::int64_t*>(a.group.heaps[a.group.rank] + a.window.heapOffset +
                                              recvLayout(a, a.window.rows).topkIdx());
  const std::int64_t stride = static_cast<std::int64_t>(gridSize()) * blockSize();
  for (std::int64_t i = (used > 0 ? used : 0) * a.topk + blockIndex() * blockSize() + threadIndex();
       i < a.window.rows * a.topk; i += stride) {
    idx[i] = -1;
  }
}

/// More rows than fit is an error of this rank alone. It is told when all peers are done: a failure
/// that is on record ends the waits for them.
__device__ inline void checkRowLimit(const DispatchArgs& a) {
  const std::int64_t rows = a.rankOffset[a.group.ranks];
  if (rows <= a.rowLimit) return;
  reportFailure(a.group.wait, waitPoint(WaitWhat::overflow, a.group.rank),
                static_cast<std::uint64_t>(a.rowLimit), static_cast<std::uint64_t>(rows));
}

template <class Shape>
__device__ void dispatchKernel(const DispatchArgs& a) {
  const DispatchView<Shape> v{a.group.ranks, a.partBytes};
  const Turn turn = currentTurn(a.group);
  const int thread = static_cast<int>(threadIndex()), threads = static_cast<int>(blockSize());
  if (blockIndex() == 0 && !turn.broken) {
    for (int r = thread; r < a.group.ranks; r += threads) publishWindow(a, r, turn.epoch);
  }
  if (thread == 0) initPipes<Shape>(v.head());
  for (int r = thread; r < a.group.ranks; r += threads) v.targets()[r] = awaitTarget(a, r, turn);
  syncBlock();

  const int warp = static_cast<int>(warpId());
  if (warp >= Shape::kPipes) {
    planDispatch(a, v, warp - Shape::kPipes);
  } else if (!a.bulk) {
    copyRowsByLanes(a, v, warp);
  } else if (laneId() == 0) {
    if (a.rowBytes <= a.partBytes) {
      issueRows<Shape, true>(a, v, warp);
    } else {
      issueRows<Shape, false>(a, v, warp);
    }
  }
  if (a.rowLimit > 0) fillTail(a);
  leaveGroup(a.group, turn, WaitWhat::dispatchDone, v.head().lastBlock);
  const bool last = thread == 0 && v.head().lastBlock != 0;
  if (a.rowLimit > 0 && last) checkRowLimit(a);
}

}  // namespace mscclpp::ep::MSCCLPP_PLATFORM_NS
