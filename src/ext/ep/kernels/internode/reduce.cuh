#pragma once

#include "../intranode/combine_move.cuh"
#include "rails.cuh"

/// Where a combine between nodes finds the rows of the own node's ranks, and how a warp adds them.
namespace mscclpp::ep::MSCCLPP_PLATFORM_NS {

/// One rank of the own node. Its output is read in place, or from its staging area, where the rows
/// of every source rank lie apart.
struct NodeSource {
  const char* heap;           ///< null: that rank is missing
  const char* y;              ///< row 0; null: staged
  const float* weights;       ///< row 0, of this rank itself; null: staged
  const std::int32_t* begin;  ///< [ranks] first staged row of each source
  int rank;
};

__device__ inline NodeSource awaitSource(const CombineArgs& c, const RailArgs& rails, int r,
                                         Turn turn) {
  const GroupArgs& g = c.group;
  if (turn.broken) return {};
  if (r == g.rank) return {g.heaps[r], c.y, c.weights, nullptr, r};
  EntryPacket packet{};
  if (!awaitEntry(g, r, turn.epoch, WaitWhat::combineEntry, c.signature, packet)) return {};
  char* const heap = g.heaps[r];
  return {heap, packet.staged ? nullptr : heap + packet.base, nullptr,
          reinterpret_cast<const std::int32_t*>(heap + g.plan.rails() + rails.plan.stagedBegin()),
          r};
}
/// Place of `home` among the destinations in `owner`'s staging area, see stagedRank().
__device__ __forceinline__ std::uint64_t stagedPlace(const GroupArgs& g, int owner, int home) {
  const int i = home - owner - 1;
  return static_cast<std::uint64_t>(i < 0 ? i + g.ranks : i);
}
/// Row `row` of a rank's output, which belongs to a token of `home`.
__device__ inline const char* rowOf(const CombineArgs& c, const NodeSource& source, int home,
                                    std::int64_t row) {
  if (source.y) return source.y + static_cast<std::size_t>(row) * c.rowBytes;
  return source.heap + c.stagingOffset + c.staging.rows(stagedPlace(c.group, source.rank, home)) +
         static_cast<std::size_t>(row - source.begin[home]) * c.rowBytes;
}
__device__ inline const float* weightsOf(const CombineArgs& c, const NodeSource& source, int home,
                                         std::int64_t row) {
  if (source.weights) return source.weights + row * c.topk;
  const auto* staged = reinterpret_cast<const float*>(
      source.heap + c.stagingOffset + c.staging.weights(stagedPlace(c.group, source.rank, home)));
  return staged + (row - source.begin[home]) * c.topk;
}

/// Terms of a sum, in shared memory, and the warp that collects them in order.
struct TermList {
  const char** terms;
  int count = 0;

  /// Lane i's term, if it has one, goes behind those of lower lanes.
  __device__ void append(const char* term) {
    const unsigned votes = ballot(term != nullptr);
    if (term) terms[count + popCount(votes & ((1u << laneId()) - 1))] = term;
    count += popCount(votes);
  }
};

/// A warp's share of a row, kRailUnroll pieces of 8 values per lane, in fp32.
struct RowSum {
  float value[kRailUnroll][8];
  bool started;

  __device__ void add(const char* row, std::uint32_t at, std::uint32_t bytes) {
    Vec16 piece[kRailUnroll];
#pragma unroll
    for (int u = 0; u < kRailUnroll; ++u) {
      const std::uint32_t from = at + static_cast<std::uint32_t>(u) * 512;
      if (from < bytes) piece[u] = load16(row + from);
    }
#pragma unroll
    for (int u = 0; u < kRailUnroll; ++u) {
      if (at + static_cast<std::uint32_t>(u) * 512 >= bytes) continue;
      if (started) {
        addBf16(value[u], piece[u]);
      } else {
        widenBf16(value[u], piece[u]);
      }
    }
    started = true;
  }
  __device__ void store(char* row, std::uint32_t at, std::uint32_t bytes) const {
#pragma unroll
    for (int u = 0; u < kRailUnroll; ++u) {
      const std::uint32_t to = at + static_cast<std::uint32_t>(u) * 512;
      if (to < bytes) store16(row + to, narrowBf16(value[u]));
    }
  }
};

/// out = bias0 + bias1 + the terms in their order, in fp32, rounded once; +0 where there is
/// nothing.
__device__ inline void addRows(const TermList& list, const char* bias0, const char* bias1,
                               char* out, std::uint32_t bytes) {
  syncWarp();  // the list is complete
  for (std::uint32_t at = laneId() * 16; at < bytes; at += kRailUnroll * 512) {
    RowSum sum{};
    if (bias0) sum.add(bias0, at, bytes);
    if (bias1) sum.add(bias1, at, bytes);
    for (int j = 0; j < list.count; ++j) sum.add(list.terms[j], at, bytes);
    sum.store(out, at, bytes);
  }
  syncWarp();  // the list may be written again
}

/// stage: copies what other ranks' sums need of this rank into its staging area. Runs before
/// combine in the same stream; combine's entry packet makes it visible.
__device__ inline void stageForRails(const RailCombineArgs& a) {
  const CombineArgs& c = a.combine;
  const GroupArgs& g = c.group;
  const std::size_t stride = static_cast<std::size_t>(gridSize()) * blockSize();
  const std::size_t first = static_cast<std::size_t>(blockIndex()) * blockSize() + threadIndex();
  auto* begin = railMemory<std::int32_t>(g, a.rails.plan.stagedBegin());
  for (int d = 0; d < g.ranks - 1; ++d) {
    const int home = stagedRank(g, d);
    const RowRange range = rowsOfWave(c, home);
    const auto rows = static_cast<std::size_t>(range.end - range.begin);
    char* staging = g.heaps[g.rank] + c.stagingOffset;
    if (first == 0) begin[home] = range.begin;
    if (c.staged) {
      const char* from = c.y + static_cast<std::size_t>(range.begin) * c.rowBytes;
      char* to = staging + c.staging.rows(static_cast<std::uint64_t>(d));
      for (std::size_t i = first; i < rows * c.rowBytes / 16; i += stride) {
        store16(to + i * 16, load16(from + i * 16));
      }
    }
    const auto weights = rows * static_cast<std::size_t>(c.weights ? c.topk : 0);
    const float* from = c.weights + static_cast<std::size_t>(range.begin) * c.topk;
    auto* to = reinterpret_cast<float*>(staging + c.staging.weights(static_cast<std::uint64_t>(d)));
    for (std::size_t i = first; i < weights; i += stride) to[i] = from[i];
  }
}

}  // namespace mscclpp::ep::MSCCLPP_PLATFORM_NS
