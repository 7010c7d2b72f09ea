#pragma once

#include "dispatch_meta.cuh"
#include "dispatch_plan.cuh"

/// dispatch: every token is read once and written straight into its final row at every rank that
/// hosts one of its experts. Per pipe one planner warp (dispatch_plan.cuh) and one issuing warp.
namespace mscclpp::ep::MSCCLPP_PLATFORM_NS {

/// The issuing thread's place in the planner's chunks: rows being loaded, and rows being stored.
struct IssueCursor {
  int chunk = 0;   ///< chunks opened (loads) or retired (stores)
  int token = 0;   ///< within the chunk
  int count = 0;   ///< tokens of the chunk
  std::uint32_t offset = 0;  ///< within the row: rows may move in parts
  int stage = 0;
};

/// One thread drives the copy engine: loads each row once into the ring, Ahead rows early, and
/// stores it from the same stage to every destination. Its instruction latency per row is the first
/// limit of a block, so it does no address arithmetic beyond adding offsets.
template <class Shape>
struct DispatchIssuer {
  const DispatchArgs& a;
  const DispatchView<Shape>& v;
  PlanQueue& plan;
  int pipe;
  IssueCursor load{}, store{};
  int ahead = 0;
  unsigned phase = 0;
  bool ended = false;

  __device__ DispatchIssuer(const DispatchArgs& args, const DispatchView<Shape>& view, int pipe_)
      : a(args), v(view), plan(view.head().plan[pipe_]), pipe(pipe_) {}

  __device__ std::uint32_t partAt(std::uint32_t offset) const {
    const std::uint32_t left = a.rowBytes - offset;
    return left < a.partBytes ? left : a.partBytes;
  }
  __device__ void advance(IssueCursor& c, std::uint32_t bytes) const {
    if (++c.stage == Shape::kStages) c.stage = 0;
    c.offset += bytes;
    if (c.offset == a.rowBytes) {
      c.offset = 0;
      ++c.token;
    }
  }
  /// Makes the next chunk current for loads. False: there is none now.
  __device__ bool openChunk() {
    if (load.chunk - store.chunk == kQueueChunks) return false;
    const int slot = load.chunk % kQueueChunks;
    const unsigned parity = static_cast<unsigned>(load.chunk / kQueueChunks) & 1u;
    if (ahead > 0 && !testParity(&plan.ready[slot], parity)) return false;  // rows wait to leave
    waitParity(a.group.wait, &plan.ready[slot], parity, pipelineWait(a.group));
    load.count = plan.count[slot];
    load.token = 0;
    ended = load.count < 0;
    if (!ended) ++load.chunk;
    return !ended;
  }
  __device__ void loadRow() {
    bulkWaitRead<Shape::kStages - Shape::kAhead>();  // the stage's last stores have left it
    const std::uint32_t bytes = partAt(load.offset);
    Mbarrier* full = &v.head().full[pipe][load.stage];
    const char* source = plan.source[(load.chunk - 1) % kQueueChunks][load.token] + load.offset;
    arriveExpectBytes(full, bytes);
    bulkLoad(v.stage(pipe, load.stage), source, bytes, full);
    advance(load, bytes);
    ++ahead;
  }
  __device__ void retireChunks() {
    while (store.chunk < load.chunk &&
           store.token == plan.count[store.chunk % kQueueChunks]) {
      arrive(&plan.freed[store.chunk % kQueueChunks]);
      ++store.chunk;
      store.token = 0;
    }
  }
  __device__ void storeRow() {
    const int slot = store.chunk % kQueueChunks;
    waitParity(a.group.wait, &v.head().full[pipe][store.stage], phase, pipelineWait(a.group));
    const std::uint32_t bytes = partAt(store.offset);
    char* const* to = v.destinations(pipe, slot, store.token);
    const int count = plan.destinations[slot][store.token];
    for (int d = 0; d < count; ++d) {
      bulkStore(to[d] + store.offset, v.stage(pipe, store.stage), bytes);
    }
    bulkCommit();
    if (store.stage == Shape::kStages - 1) phase ^= 1u;
    advance(store, bytes);
    --ahead;
  }
  __device__ void run() {
    while (true) {
      while (!ended && ahead < Shape::kAhead) {
        if (load.token == load.count && !openChunk()) break;
        if (load.token < load.count) loadRow();
      }
      retireChunks();
      if (ahead > 0) {
        storeRow();
      } else if (ended) {
        break;
      }
    }
    bulkWait<0>();
  }
};

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
    for (int t = 0; t < count; ++t) {
      const auto* from = reinterpret_cast<const std::uint64_t*>(plan.source[slot][t]);
      char* const* to = v.destinations(pipe, slot, t);
      for (std::uint32_t i = laneId(); i < words; i += 32) {
        const std::uint64_t word = from[i];
        for (int d = 0; d < plan.destinations[slot][t]; ++d) {
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

/// Worst-case outputs: rows that nobody sends say "no expert". More rows than fit is an error.
__device__ inline void fillTail(const DispatchArgs& a) {
  const std::int64_t rows = a.rankOffset[a.group.ranks];
  if (rows > a.rowLimit && blockIndex() == 0 && threadIndex() == 0) {
    reportFailure(a.group.wait, waitPoint(WaitWhat::overflow, a.group.rank),
                  static_cast<std::uint64_t>(a.rowLimit), static_cast<std::uint64_t>(rows));
  }
  const std::int64_t used = rows - a.window.rowBegin;
  auto* idx = reinterpret_cast<std::int64_t*>(a.group.heaps[a.group.rank] + a.window.heapOffset +
                                              recvLayout(a, a.window.rows).topkIdx());
  const std::int64_t stride = static_cast<std::int64_t>(gridSize()) * blockSize();
  for (std::int64_t i = (used > 0 ? used : 0) * a.topk + blockIndex() * blockSize() + threadIndex();
       i < a.window.rows * a.topk; i += stride) {
    idx[i] = -1;
  }
}

template <class Shape>
__device__ void dispatchKernel(const DispatchArgs& a) {
  const DispatchView<Shape> v{a.group.ranks, a.partBytes};
  const std::uint32_t epoch = currentEpoch(a.group);
  const int thread = static_cast<int>(threadIndex()), threads = static_cast<int>(blockSize());
  if (blockIndex() == 0) {
    for (int r = thread; r < a.group.ranks; r += threads) publishWindow(a, r, epoch);
  }
  if (thread == 0) initPipes<Shape>(v.head());
  for (int r = thread; r < a.group.ranks; r += threads) v.targets()[r] = awaitTarget(a, r, epoch);
  syncBlock();

  const int warp = static_cast<int>(warpId());
  if (warp >= Shape::kPipes) {
    planDispatch(a, v, warp - Shape::kPipes);
  } else if (!a.bulk) {
    copyRowsByLanes(a, v, warp);
  } else if (laneId() == 0) {
    DispatchIssuer<Shape>(a, v, warp).run();
  }
  if (a.rowLimit > 0) fillTail(a);
  leaveGroup(a.group, epoch, WaitWhat::dispatchDone, v.head().lastBlock);
}

}  // namespace mscclpp::ep::MSCCLPP_PLATFORM_NS
