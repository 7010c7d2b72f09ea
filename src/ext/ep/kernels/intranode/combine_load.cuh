#pragma once

#include "combine_move.cuh"

/// Combine's pulling side: where every rank's rows are, and the warp that loads a token's rows.
namespace mscclpp::ep::MSCCLPP_PLATFORM_NS {

/// Where one rank's rows can be read in this launch, from its entry packet.
struct RowSource {
  const char* rows;       ///< of row `rowBegin`; null = that rank is missing
  const float* weights;   ///< of row `weightsBegin`
  std::int64_t rowBegin;
  std::int64_t weightsBegin;
  const std::uint32_t* chunks;  ///< staged: this rank's flags, one per kChunkRows rows; else null
};

__device__ inline void publishRows(const CombineArgs& a, int peer, const RowRange* ranges,
                                   std::uint32_t epoch) {
  EntryPacket packet{};
  packet.signature = a.signature;
  packet.base = a.heapOffset;
  if (peer != a.group.rank) {
    const int d = stagedIndex(a.group, peer);
    const auto at = static_cast<std::uint64_t>(d);
    packet.weights = a.stagingOffset + a.staging.weights(at);
    packet.weightsBegin = ranges[d].begin;
    if (a.staged) {
      packet.staged = 1;
      packet.base = a.stagingOffset + a.staging.rows(at);
      packet.rowBegin = ranges[d].begin;
    }
  }
  publishEntry(a.group, peer, packet, epoch);
}

__device__ inline RowSource awaitRows(const CombineArgs& a, int peer, std::uint32_t epoch) {
  const GroupArgs& g = a.group;
  if (peer == g.rank) return {a.y, a.weights, 0, 0, nullptr};
  EntryPacket packet{};
  if (!awaitEntry(g, peer, epoch, WaitWhat::combineEntry, a.signature, packet)) return {};
  return {g.heaps[peer] + packet.base,
          reinterpret_cast<const float*>(g.heaps[peer] + packet.weights), packet.rowBegin,
          packet.weightsBegin, packet.staged ? chunkFlags(g, g.rank, peer) : nullptr};
}

/// This rank's row for `token` at rank `r`, or -1.
__device__ __forceinline__ std::int64_t rowAt(const CombineArgs& a, const RowSource* sources,
                                              int token, int r) {
  const std::int32_t position = a.position[static_cast<std::size_t>(token) * a.group.ranks + r];
  return position >= 0 && sources[r].rows ? a.sendStart[r] + static_cast<std::int64_t>(position) : -1;
}

/// What the loader tells the consumers about the row in a stage; read at the first row of a unit (a
/// part of a token).
struct StageInfo {
  std::int32_t token;   ///< -1 = the end
  std::uint32_t offset;  ///< of the part within the row
  std::uint32_t bytes;
  std::int32_t rows;  ///< of this unit; 0 = the stage holds no data
};

/// One pipe's ring.
struct RowRing {
  Mbarrier* full;
  Mbarrier* empty;
  StageInfo* info;
  char* stages;
};

/// The warp that fills a ring: lanes look up the rows of a token, one lane per rank, and wait for
/// staged chunks side by side; lane 0 issues the loads, ranks in ascending order.
template <class Shape>
struct RowLoader {
  const CombineArgs& a;
  const RowSource* sources;  ///< [ranks], shared memory
  RowRing ring;
  std::uint32_t epoch;
  int stage = 0;
  unsigned phase = 1;
  std::int64_t delivered = -1;  ///< last chunk of rank laneId() that was seen complete

  __device__ void awaitChunk(int r, std::int64_t row) {
    const RowSource& source = sources[r];
    if (row < 0 || source.chunks == nullptr) return;
    const std::int64_t chunk = (row - source.rowBegin) / kChunkRows;
    if (r < 32 && chunk <= delivered) return;
    waitReached(a.group.wait, source.chunks + chunk, epoch,
                waitPoint(WaitWhat::combineChunk, r));
    if (r < 32) delivered = chunk;
  }
  /// Rows of ranks base .. base + 31, one per lane.
  __device__ std::int64_t lookUp(int token, int base) {
    const int r = base + static_cast<int>(laneId());
    if (r >= a.group.ranks) return -1;
    const std::int64_t row = rowAt(a, sources, token, r);
    awaitChunk(r, row);
    return row;
  }
  /// Lane 0 takes the next stage, describes it, and fills it from `from` (null: no data).
  __device__ void fill(const StageInfo& info, const char* from) {
    if (laneId() == 0) {
      waitParity(a.group.wait, &ring.empty[stage], phase, pipelineWait(a.group));
      ring.info[stage] = info;
      if (from) {
        fenceProxyAsyncGlobal();  // flags were read by the generic proxy, rows by the async one
        arriveExpectBytes(&ring.full[stage], info.bytes);
        bulkLoad(ring.stages + static_cast<std::size_t>(stage) * a.partBytes, from, info.bytes,
                 &ring.full[stage]);
      } else {
        arrive(&ring.full[stage]);
      }
    }
    if (++stage == Shape::kStages) {
      stage = 0;
      phase ^= 1u;
    }
  }
  __device__ void loadToken(int token) {
    const int ranks = a.group.ranks;
    std::int64_t row = lookUp(token, 0);
    int rows = popCount(ballot(row >= 0));
    for (int base = 32; base < ranks; base += 32) rows += popCount(ballot(lookUp(token, base) >= 0));
    syncWarp();  // lane 0 loads what other lanes have waited for
    for (std::uint32_t offset = 0; offset < a.rowBytes; offset += a.partBytes) {
      const std::uint32_t left = a.rowBytes - offset;
      StageInfo info{token, offset, left < a.partBytes ? left : a.partBytes, rows};
      if (rows == 0) fill(info, nullptr);
      for (int base = 0; base < ranks; base += 32) {
        if (ranks > 32) row = lookUp(token, base);
        for (unsigned left32 = ballot(row >= 0); left32 != 0; left32 &= left32 - 1) {
          const int lane = findFirstSet(left32) - 1;
          const RowSource& source = sources[base + lane];
          const std::int64_t from = shuffle(row, lane) - source.rowBegin;
          fill(info, source.rows + static_cast<std::size_t>(from) * a.rowBytes + offset);
        }
      }
    }
  }
  /// Tokens are dealt to the grid's pipes in groups: reading is fair between SMs, so that fixed shares
  /// finish together (docs/kernels.md).
  __device__ void run(int pipe) {
    const std::int64_t pipes = static_cast<std::int64_t>(gridSize()) * Shape::kPipes;
    const std::int64_t end = a.tokens < a.tokenEnd ? a.tokens : a.tokenEnd;
    std::int64_t first = a.tokenBegin + (static_cast<std::int64_t>(blockIndex()) * Shape::kPipes + pipe) *
                                            Shape::kGroupTokens;
    for (; first < end; first += pipes * Shape::kGroupTokens) {
      for (std::int64_t t = first; t < first + Shape::kGroupTokens && t < end; ++t) {
        loadToken(static_cast<int>(t));
      }
    }
    fill({-1, 0, 0, 0}, nullptr);
  }
};

}  // namespace mscclpp::ep::MSCCLPP_PLATFORM_NS
