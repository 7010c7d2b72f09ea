#pragma once

#include "group.cuh"
#include "tuning.cuh"

/// Combine's staging side: when the experts' output is an ordinary tensor, the rows of other ranks'
/// tokens are copied into this rank's staging area, kChunkRows at a time, and one flag per chunk
/// tells the rank that pulls them. Three warps per block: planner, mover, releaser.
namespace mscclpp::ep::MSCCLPP_PLATFORM_NS {

/// Chunks a planner may be ahead of the releaser.
inline constexpr int kMoveQueue = 4;
/// Units by which the mover reports a chunk late, so that waiting for its writes does not empty the
/// ring.
inline constexpr int kReportLag = 4;
/// Units being loaded ahead of the one being stored.
inline constexpr int kMoveAhead = 3;

struct MoveQueue {
  Mbarrier ready[kMoveQueue], moved[kMoveQueue], freed[kMoveQueue];
  const char* source[kMoveQueue];  ///< first row; the others follow
  char* destination[kMoveQueue];
  std::uint32_t* flag[kMoveQueue];  ///< in the heap of the rank that pulls
  int count[kMoveQueue];            ///< rows, -1 = the end
};

/// Rows [begin, end) of y that belong to `destination`'s tokens of this wave.
struct RowRange {
  std::int32_t begin, end;
};

/// First row in [begin, end) whose token is at least `token`; tokens ascend within a source's rows.
__device__ inline std::int32_t firstRowFrom(const std::int32_t* tokens, std::int32_t begin,
                                            std::int32_t end, std::int32_t token) {
  while (begin < end) {
    const std::int32_t middle = begin + (end - begin) / 2;
    if (tokens[middle] < token) {
      begin = middle + 1;
    } else {
      end = middle;
    }
  }
  return begin;
}

__device__ inline RowRange rowsOfWave(const CombineArgs& a, int destination) {
  RowRange range{a.rankOffset[destination], a.rankOffset[destination + 1]};
  if (a.sourceTokens == nullptr) return range;  // one wave takes all
  range.begin = firstRowFrom(a.sourceTokens, range.begin, range.end, a.tokenBegin);
  range.end = firstRowFrom(a.sourceTokens, range.begin, range.end, a.tokenEnd);
  return range;
}

/// Destinations in the staging area: every rank but this one, ascending from the next.
__device__ __forceinline__ int stagedRank(const GroupArgs& g, int destination) {
  const int r = g.rank + 1 + destination;
  return r < g.ranks ? r : r - g.ranks;
}
__device__ __forceinline__ int stagedIndex(const GroupArgs& g, int rank) {
  const int i = rank - g.rank - 1;
  return i < 0 ? i + g.ranks : i;
}
__device__ __forceinline__ int chunksOf(RowRange range) {
  return (range.end - range.begin + kChunkRows - 1) / kChunkRows;
}

/// Draws chunks by ticket: the t-th ticket is chunk t / destinations of destination t %
/// destinations, so that all peers are served evenly. `ranges`: [destinations].
__device__ inline void planMoves(const CombineArgs& a, MoveQueue& queue, const RowRange* ranges) {
  const GroupArgs& g = a.group;
  const int destinations = g.ranks - 1;
  std::uint32_t* ticket = &localWords(g).ticket;
  int most = 0;
  for (int d = 0; d < destinations; ++d) {
    const int chunks = chunksOf(ranges[d]);
    if (chunks > most) most = chunks;
  }
  const auto tickets = static_cast<std::uint32_t>(most) * static_cast<std::uint32_t>(destinations);
  std::uint32_t next = fetchAddLocalRelaxed(ticket, 1u);
  for (int k = 0;; ++k) {
    std::uint32_t drawn = next;
    int d = 0, chunk = 0;
    for (; drawn < tickets; drawn = fetchAddLocalRelaxed(ticket, 1u)) {
      d = static_cast<int>(drawn % static_cast<std::uint32_t>(destinations));
      chunk = static_cast<int>(drawn / static_cast<std::uint32_t>(destinations));
      if (chunk < chunksOf(ranges[d])) break;
    }
    const bool end = drawn >= tickets;
    if (!end) next = fetchAddLocalRelaxed(ticket, 1u);
    const int slot = k % kMoveQueue;
    if (k >= kMoveQueue) {
      waitParity(g.wait, &queue.freed[slot], static_cast<unsigned>(k / kMoveQueue - 1) & 1u,
                 pipelineWait(g));
    }
    if (!end) {
      const std::int32_t row = ranges[d].begin + chunk * kChunkRows;
      const std::int32_t left = ranges[d].end - row;
      queue.count[slot] = left < kChunkRows ? left : kChunkRows;
      queue.source[slot] = a.y + static_cast<std::size_t>(row) * a.rowBytes;
      queue.destination[slot] = g.heaps[g.rank] + a.stagingOffset +
                                a.staging.rows(static_cast<std::uint64_t>(d)) +
                                static_cast<std::size_t>(chunk * kChunkRows) * a.rowBytes;
      queue.flag[slot] = chunkFlags(g, stagedRank(g, d), g.rank) + chunk;
    } else {
      queue.count[slot] = -1;
    }
    arrive(&queue.ready[slot]);
    if (end) return;
  }
}

/// The mover: one thread with a ring, as in dispatch. A chunk's rows are contiguous on both sides,
/// so it moves in units of partBytes, whatever the rows' size.
template <class Shape>
__device__ void moveChunks(const CombineArgs& a, MoveQueue& queue, Mbarrier* full, char* ring) {
  unsigned loadChunk = 0, storeChunk = 0;  // chunks opened, chunks stored
  std::uint32_t loadLeft = 0, storeLeft = 0;
  const char* from = nullptr;
  char* to = nullptr;
  int loadStage = 0, storeStage = 0, ahead = 0, stores = 0, pendingSince = 0;
  unsigned phase = 0, pending = kMoveQueue;  // slot of the chunk to report; kMoveQueue = none
  bool ended = false;
  const auto bytesOf = [&](unsigned chunk) {
    return static_cast<std::uint32_t>(queue.count[chunk % kMoveQueue]) * a.rowBytes;
  };
  const auto unit = [&](std::uint32_t left) { return left < a.partBytes ? left : a.partBytes; };
  const auto report = [&] {  // hands a chunk whose writes are complete to the releaser
    arrive(&queue.moved[pending]);
    pending = kMoveQueue;
  };
  while (true) {
    while (!ended && ahead < kMoveAhead) {
      if (loadLeft == 0) {
        const unsigned slot = loadChunk % kMoveQueue, parity = loadChunk / kMoveQueue & 1u;
        if (loadChunk - storeChunk == kMoveQueue) break;
        const bool busy = ahead > 0 || pending != kMoveQueue;
        if (busy && !testParity(&queue.ready[slot], parity)) break;
        waitParity(a.group.wait, &queue.ready[slot], parity, pipelineWait(a.group));
        ended = queue.count[slot] < 0;
        if (ended) break;
        loadLeft = bytesOf(loadChunk++);
        from = queue.source[slot];
      }
      const std::uint32_t bytes = unit(loadLeft);
      bulkWaitRead<Shape::kMoveStages - kMoveAhead>();
      arriveExpectBytes(&full[loadStage], bytes);
      bulkLoad(ring + static_cast<std::uint32_t>(loadStage) * a.partBytes, from, bytes,
               &full[loadStage]);
      from += bytes;
      loadLeft -= bytes;
      if (++loadStage == Shape::kMoveStages) loadStage = 0;
      ++ahead;
    }
    if (ahead == 0) {
      if (pending != kMoveQueue) {
        bulkWait<0>();
        report();
      }
      if (ended) break;
      continue;
    }
    if (storeLeft == 0) {
      storeLeft = bytesOf(storeChunk);
      to = queue.destination[storeChunk % kMoveQueue];
    }
    const std::uint32_t bytes = unit(storeLeft);
    waitParity(a.group.wait, &full[storeStage], phase, pipelineWait(a.group));
    bulkStore(to, ring + static_cast<std::uint32_t>(storeStage) * a.partBytes, bytes);
    bulkCommit();
    to += bytes;
    storeLeft -= bytes;
    if (++storeStage == Shape::kMoveStages) {
      storeStage = 0;
      phase ^= 1u;
    }
    --ahead;
    ++stores;
    if (pending != kMoveQueue && stores - pendingSince >= kReportLag) {
      bulkWait<kReportLag>();
      report();
    }
    if (storeLeft > 0) continue;
    if (pending != kMoveQueue) {
      bulkWait<0>();
      report();
    }
    pending = storeChunk++ % kMoveQueue;
    pendingSince = stores;
  }
  arrive(&queue.moved[loadChunk % kMoveQueue]);  // the end mark
}

/// A release at system scope takes a microsecond or more, which the mover must not lose. The
/// mbarrier hands the mover's completed writes over, the release passes them on.
__device__ inline void releaseChunks(const CombineArgs& a, MoveQueue& queue, std::uint32_t epoch) {
  for (int k = 0;; ++k) {
    const int slot = k % kMoveQueue;
    waitParity(a.group.wait, &queue.moved[slot], static_cast<unsigned>(k / kMoveQueue) & 1u,
               pipelineWait(a.group));
    if (queue.count[slot] < 0) return;
    storeRelease(queue.flag[slot], epoch);
    arrive(&queue.freed[slot]);
  }
}

/// stageWeights: copies the weights of other ranks' tokens into the staging area. Runs before
/// combine in the same stream; combine's entry packet makes them visible.
__device__ inline void stageWeightsKernel(const CombineArgs& a) {
  const GroupArgs& g = a.group;
  const std::size_t stride = static_cast<std::size_t>(gridSize()) * blockSize();
  for (int d = 0; d < g.ranks - 1; ++d) {
    const RowRange range = rowsOfWave(a, stagedRank(g, d));
    const auto n = static_cast<std::size_t>(range.end - range.begin) * a.topk;
    const float* from = a.weights + static_cast<std::size_t>(range.begin) * a.topk;
    auto* to = reinterpret_cast<float*>(g.heaps[g.rank] + a.stagingOffset +
                                        a.staging.weights(static_cast<std::uint64_t>(d)));
    for (std::size_t i = static_cast<std::size_t>(blockIndex()) * blockSize() + threadIndex();
         i < n; i += stride) {
      to[i] = from[i];
    }
  }
}

}  // namespace mscclpp::ep::MSCCLPP_PLATFORM_NS
