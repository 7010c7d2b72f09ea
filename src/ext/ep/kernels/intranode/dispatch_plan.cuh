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
  const char* source[kQueueChunks * kChunkTokens];  ///< by chunk, then token
  int destinations[kQueueChunks * kChunkTokens];
  int count[kQueueChunks];  ///< tokens of the chunk, 1 or more; -1 = the end
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
    return listsAt(Shape::kPipes) +
           static_cast<std::size_t>(pipe) * perRank(ranks, kChunkTokens * 4);
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
  /// Destinations of the token at place `at` of the queue.
  __device__ char** destinations(int pipe, unsigned at) const {
    const std::size_t list = perRank(ranks, 8);
    return reinterpret_cast<char**>(sharedBytes(listsAt(pipe) + at * list, list));
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

/// Places a chunk's tokens: their rows in the receivers' windows into `rows` ([count, ranks], -1 =
/// none), then lane t lists token t's destinations, remote ranks first and this rank last. Tokens
/// that go nowhere are left out. Returns the number of tokens kept, on all lanes.
template <class Shape>
__device__ int placeChunk(const DispatchArgs& a, const DispatchView<Shape>& v, int pipe,
                          unsigned slot, const ChunkLoads& chunk) {
  const int ranks = a.group.ranks, lane = static_cast<int>(laneId()), entries = chunk.count * ranks;
  std::int32_t* const rows = v.rows(pipe);
  const auto place = [&](int entry, int r, std::int32_t position) {
    const RecvTarget& target = v.targets()[r];
    const std::int64_t row = target.start + static_cast<std::int64_t>(position) - target.rowBegin;
    rows[entry] =
        position >= 0 && row >= 0 && row < target.rows ? static_cast<std::int32_t>(row) : -1;
  };
  if (lane < entries) place(lane, chunk.rank, chunk.position);
  for (int i = lane + 32; i < entries; i += 32) {
    place(i, i % ranks, a.position[static_cast<std::size_t>(chunk.first) * ranks + i]);
  }
  syncWarp();
  bool goes = false;
  if (lane < chunk.count) {
    for (int r = 0; r < ranks; ++r) goes = goes || rows[lane * ranks + r] >= 0;
  }
  const unsigned kept = ballot(goes);
  if (goes) {
    const unsigned at =
        slot * kChunkTokens + static_cast<unsigned>(popCount(kept & ((1u << lane) - 1)));
    char** to = v.destinations(pipe, at);
    int n = 0;
    for (int i = 0, r = a.group.rank; i < ranks; ++i) {
      r = r + 1 == ranks ? 0 : r + 1;
      const std::int32_t row = rows[lane * ranks + r];
      if (row >= 0) to[n++] = v.targets()[r].x + static_cast<std::size_t>(row) * a.rowBytes;
    }
    PlanQueue& plan = v.head().plan[pipe];
    plan.destinations[at] = n;
    plan.source[at] = a.x + static_cast<std::size_t>(chunk.first + lane) * a.rowBytes;
  }
  return popCount(kept);
}

template <class Shape>
__device__ void planDispatch(const DispatchArgs& a, const DispatchView<Shape>& v, int pipe) {
  PlanQueue& plan = v.head().plan[pipe];
  std::uint32_t* ticket = &localWords(a.group).ticket;
  const LaneShare share(a);
  const auto draw = [&] { return laneId() == 0 ? fetchAddLocalRelaxed(ticket, 1u) : 0u; };
  // Two tickets ahead: while one chunk is placed, the next one's small rows are being loaded, and
  // the ticket after it is being drawn.
  ChunkLoads next = loadChunk(a, share, shuffle(draw(), 0));
  std::uint32_t drawn = draw();
  for (unsigned k = 0;;) {
    const ChunkLoads chunk = next;
    if (chunk.count > 0) {
      next = loadChunk(a, share, shuffle(drawn, 0));
      drawn = next.count > 0 ? draw() : drawn;
    }
    const unsigned slot = k % kQueueChunks;
    if (k >= kQueueChunks) {
      waitParity(a.group.wait, &plan.freed[slot], (k / kQueueChunks - 1) & 1u,
                 pipelineWait(a.group));
    }
    const int kept = placeChunk(a, v, pipe, slot, chunk);
    const bool end = chunk.count == 0;
    if (end || kept > 0) {
      if (laneId() == 0) plan.count[slot] = end ? -1 : kept;
      syncWarp();
      if (laneId() == 0) arrive(&plan.ready[slot]);
      if (end) return;
      ++k;
      storeMeta(a, share, v.targets(), v.rows(pipe), chunk);
    }
    syncWarp();  // the rows are rewritten by the next chunk
  }
}

}  // namespace mscclpp::ep::MSCCLPP_PLATFORM_NS
