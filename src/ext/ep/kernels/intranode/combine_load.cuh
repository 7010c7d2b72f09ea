#pragma once

#include "combine_move.cuh"

/// Combine's pulling side: where every rank's rows are, and the warp that loads a token's rows.
namespace mscclpp::ep::MSCCLPP_PLATFORM_NS {

/// Where one rank's rows can be read in this launch, from its entry packet.
struct RowSource {
  const char* rows;      ///< of row `rowBegin`; null = that rank is missing
  const float* weights;  ///< of row `weightsBegin`
  std::int64_t start;    ///< row of this rank's first token there
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

__device__ inline RowSource awaitRows(const CombineArgs& a, int peer, Turn turn) {
  const GroupArgs& g = a.group;
  const std::int64_t start = a.sendStart[peer];
  if (turn.broken) return {};
  if (peer == g.rank) return {a.y, a.weights, start, 0, 0, nullptr};
  EntryPacket packet{};
  if (!awaitEntry(g, peer, turn.epoch, WaitWhat::combineEntry, a.signature, packet)) return {};
  return {g.heaps[peer] + packet.base,
          reinterpret_cast<const float*>(g.heaps[peer] + packet.weights),
          start,
          packet.rowBegin,
          packet.weightsBegin,
          packet.staged ? chunkFlags(g, g.rank, peer) : nullptr};
}

/// What the loader tells the consumers about the row in a stage; read at the first row of a unit (a
/// part of a token).
struct StageInfo {
  std::int32_t token;    ///< -1 = the end
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
  RowSource own{};  ///< of rank laneId(), in registers
  int stage = 0;
  unsigned phase = 1;
  std::int64_t delivered = -1;  ///< last chunk of rank laneId() that was seen complete
  bool waited = false;
  unsigned lost = 0;  ///< bit i: rank laneId() + 32 i gave no chunk in time: its rows are left out

  __device__ void awaitChunk(const RowSource& source, int r, std::int64_t row) {
    const std::int64_t chunk = (row - source.rowBegin) / kChunkRows;
    if (r < 32 && chunk <= delivered) return;
    waited = true;
    if (waitReached(a.group.wait, source.chunks + chunk, epoch,
                    waitPoint(WaitWhat::combineChunk, r))) {
      if (r < 32) delivered = chunk;
    } else {
      lost |= 1u << (r / 32);
      giveUp(a.group);
    }
  }
  __device__ std::int32_t positionAt(std::int64_t token, int base) const {
    const int r = base + static_cast<int>(laneId());
    return r < a.group.ranks ? a.position[static_cast<std::size_t>(token) * a.group.ranks + r] : -1;
  }
  /// Address of the row at rank base + laneId(), or null.
  __device__ const char* lookUp(int base, std::int32_t position) {
    const int r = base + static_cast<int>(laneId());
    if (position < 0) return nullptr;
    const RowSource source = base == 0 ? own : sources[r];
    if (source.rows == nullptr || (lost >> (r / 32) & 1u) != 0) return nullptr;
    const std::int64_t row = source.start + position;
    if (source.chunks) awaitChunk(source, r, row);
    if ((lost >> (r / 32) & 1u) != 0) return nullptr;
    return source.rows + static_cast<std::size_t>(row - source.rowBegin) * a.rowBytes;
  }
  /// Lane 0 takes the next stage, describes it, and fills it from `from` (null: no data).
  __device__ void fill(const StageInfo& info, const char* from) {
    if (laneId() == 0) {
      waitParity(a.group.wait, &ring.empty[stage], phase, pipelineWait(a.group));
      ring.info[stage] = info;
      if (from) {
        arriveExpectBytes(&ring.full[stage], info.bytes);
        bulkLoad(ring.stages + static_cast<std::uint32_t>(stage) * a.partBytes, from, info.bytes,
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
  /// `position`: of the token at rank laneId().
  __device__ void loadToken(int token, std::int32_t position) {
    const int ranks = a.group.ranks;
    const char* from = lookUp(0, position);
    int rows = popCount(ballot(from != nullptr));
    for (int base = 32; base < ranks; base += 32) {
      rows += popCount(ballot(lookUp(base, positionAt(token, base)) != nullptr));
    }
    if (any(waited)) {
      syncWarp();               // lane 0 loads what other lanes have waited for
      fenceProxyAsyncGlobal();  // flags were read by the generic proxy, rows by the async one
      waited = false;
    }
    for (std::uint32_t offset = 0; offset < a.rowBytes; offset += a.partBytes) {
      const std::uint32_t left = a.rowBytes - offset;
      const StageInfo info{token, offset, left < a.partBytes ? left : a.partBytes, rows};
      if (rows == 0) fill(info, nullptr);
      for (int base = 0; base < ranks; base += 32) {
        if (ranks > 32) from = lookUp(base, positionAt(token, base));
        for (unsigned lanes = ballot(from != nullptr); lanes != 0; lanes &= lanes - 1) {
          fill(info, shuffle(from, findFirstSet(lanes) - 1) + offset);
        }
      }
    }
  }
  /// Tokens are dealt to the grid's pipes in groups: reading is fair between SMs, so that fixed
  /// shares finish together (docs/kernels.md). Positions are loaded one token ahead.
  __device__ void run(int pipe) {
    const std::int64_t stride =
        static_cast<std::int64_t>(gridSize()) * Shape::kPipes * Shape::kGroupTokens;
    const std::int64_t end = a.tokens < a.tokenEnd ? a.tokens : a.tokenEnd;
    std::int64_t group =
        a.tokenBegin +
        (static_cast<std::int64_t>(blockIndex()) * Shape::kPipes + pipe) * Shape::kGroupTokens;
    std::int64_t token = group;
    if (static_cast<int>(laneId()) < a.group.ranks) own = sources[laneId()];
    fenceProxyAsyncGlobal();  // rows in place: their owners' entry flags were read by this block
    std::int32_t position = token < end ? positionAt(token, 0) : -1;
    while (token < end) {
      std::int64_t next = token + 1;
      if (next == group + Shape::kGroupTokens) next = group += stride;
      const std::int32_t nextPosition = next < end ? positionAt(next, 0) : -1;
      loadToken(static_cast<int>(token), position);
      token = next;
      position = nextPosition;
    }
    fill({-1, 0, 0, 0}, nullptr);
  }
};

}  // namespace mscclpp::ep::MSCCLPP_PLATFORM_NS
