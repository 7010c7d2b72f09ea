#pragma once

#include "dispatch_meta.cuh"
#include "group.cuh"
#include "tuning.cuh"

/// The planner of dispatch: takes chunks of tokens by ticket, works out source and destination
/// addresses with 32 lanes in parallel, and copies the small rows (indices, weights, scales).
namespace mscclpp::ep::MSCCLPP_PLATFORM_NS {

/// One pipe's queue of planned chunks, filled by the planner and emptied by the issuer.
struct PlanQueue {
  Mbarrier ready[kQueueChunks], freed[kQueueChunks];
  const char* source[kQueueChunks][kChunkTokens];
  int destinations[kQueueChunks][kChunkTokens];
  int count[kQueueChunks];  ///< tokens that go anywhere, -1 = the end
};

template <class Shape>
struct DispatchHead {
  Mbarrier full[Shape::kPipes][Shape::kStages];
  PlanQueue plan[Shape::kPipes];
  std::uint32_t lastBlock;
};

/// A block's shared memory: head, targets [ranks], then per pipe the destination lists, the rows of
/// the chunk in hand, and the ring.
template <class Shape>
struct DispatchView {
  int ranks;
  std::uint32_t partBytes;

  static constexpr std::size_t perRank(int n, std::size_t bytes) {
    return static_cast<std::size_t>(n) * bytes;
  }
  constexpr std::size_t targetsAt() const { return alignUp(sizeof(DispatchHead<Shape>), 128); }
  constexpr std::size_t listsAt(int pipe) const {
    return targetsAt() + perRank(ranks, sizeof(RecvTarget)) +
           static_cast<std::size_t>(pipe) * perRank(ranks, kQueueChunks * kChunkTokens * 8);
  }
  constexpr std::size_t rowsAt(int pipe) const {
    return listsAt(Shape::kPipes) + static_cast<std::size_t>(pipe) * perRank(ranks, kChunkTokens * 4);
  }
  constexpr std::size_t ringAt() const { return alignUp(rowsAt(Shape::kPipes), 128); }
  constexpr std::size_t total() const {
    return ringAt() + static_cast<std::size_t>(Shape::kPipes * Shape::kStages) * partBytes;
  }

  __device__ DispatchHead<Shape>& head() const { return sharedStorage<DispatchHead<Shape>>(); }
  __device__ RecvTarget* targets() const {
    return reinterpret_cast<RecvTarget*>(
        sharedBytes(targetsAt(), perRank(ranks, sizeof(RecvTarget))));
  }
  __device__ char** destinations(int pipe, int slot, int token) const {
    const std::size_t list = perRank(ranks, 8);
    return reinterpret_cast<char**>(sharedBytes(
        listsAt(pipe) + static_cast<std::size_t>(slot * kChunkTokens + token) * list, list));
  }
  __device__ std::int32_t* rows(int pipe) const {
    return reinterpret_cast<std::int32_t*>(
        sharedBytes(rowsAt(pipe), perRank(ranks, kChunkTokens * 4)));
  }
  __device__ char* stage(int pipe, int stage) const {
    return sharedBytes(
        ringAt() + static_cast<std::size_t>(pipe * Shape::kStages + stage) * partBytes, partBytes);
  }
};

/// Row of every (token, rank) of the chunk within the receiver's window, or -1.
template <class Shape>
__device__ void placeChunk(const DispatchArgs& a, const DispatchView<Shape>& v, int first, int count,
                           std::int32_t* rows) {
  const int ranks = a.group.ranks;
  for (int i = static_cast<int>(laneId()); i < count * ranks; i += 32) {
    const int r = i % ranks;
    const std::int32_t position = a.position[static_cast<std::size_t>(first) * ranks + i];
    const RecvTarget& target = v.targets()[r];
    const std::int64_t row = a.sendStart[r] + static_cast<std::int64_t>(position) - target.rowBegin;
    rows[i] = position >= 0 && row >= 0 && row < target.rows ? static_cast<std::int32_t>(row) : -1;
  }
}

/// Lane t lists token t's destinations, remote ranks first and this rank last. Tokens that go
/// nowhere are left out. Returns the number of tokens kept, on all lanes.
template <class Shape>
__device__ int listChunk(const DispatchArgs& a, const DispatchView<Shape>& v, int pipe, int slot,
                         int first, int count) {
  const int ranks = a.group.ranks, lane = static_cast<int>(laneId());
  const std::int32_t* rows = v.rows(pipe) + lane * ranks;
  bool goes = false;
  if (lane < count) {
    for (int r = 0; r < ranks; ++r) goes = goes || rows[r] >= 0;
  }
  const unsigned kept = ballot(goes);
  if (goes) {
    const int at = popCount(kept & ((1u << lane) - 1));
    char** to = v.destinations(pipe, slot, at);
    int n = 0;
    for (int i = 0, r = a.group.rank; i < ranks; ++i) {
      r = r + 1 == ranks ? 0 : r + 1;
      if (rows[r] >= 0) to[n++] = v.targets()[r].x + static_cast<std::size_t>(rows[r]) * a.rowBytes;
    }
    PlanQueue& plan = v.head().plan[pipe];
    plan.destinations[slot][at] = n;
    plan.source[slot][at] = a.x + static_cast<std::size_t>(first + lane) * a.rowBytes;
  }
  return popCount(kept);
}

template <class Shape>
__device__ void planDispatch(const DispatchArgs& a, const DispatchView<Shape>& v, int pipe) {
  PlanQueue& plan = v.head().plan[pipe];
  std::uint32_t* ticket = &localWords(a.group).ticket;
  const std::uint32_t chunks = static_cast<std::uint32_t>((a.tokens + kChunkTokens - 1) / kChunkTokens);
  auto draw = [&] { return laneId() == 0 ? fetchAddLocalRelaxed(ticket, 1u) : 0u; };
  std::uint32_t next = draw();
  for (int k = 0;; ++k) {
    const int slot = k % kQueueChunks;
    const std::uint32_t chunk = shuffle(next, 0);
    if (k >= kQueueChunks) {
      waitParity(a.group.wait, &plan.freed[slot],
                 static_cast<unsigned>(k / kQueueChunks - 1) & 1u, pipelineWait(a.group));
    }
    const bool end = chunk >= chunks;
    const int first = end ? 0 : static_cast<int>(chunk) * kChunkTokens;
    const int left = a.tokens - first;
    const int count = end ? 0 : (left < kChunkTokens ? left : kChunkTokens);
    if (!end) next = draw();  // its latency hides behind this chunk
    placeChunk(a, v, first, count, v.rows(pipe));
    syncWarp();
    const int kept = listChunk(a, v, pipe, slot, first, count);
    if (laneId() == 0) plan.count[slot] = end ? -1 : kept;
    syncWarp();
    if (laneId() == 0) arrive(&plan.ready[slot]);
    if (end) return;
    copyMeta(a, v.targets(), v.rows(pipe), first, count);
    syncWarp();  // the rows are rewritten by the next chunk
  }
}

}  // namespace mscclpp::ep::MSCCLPP_PLATFORM_NS
