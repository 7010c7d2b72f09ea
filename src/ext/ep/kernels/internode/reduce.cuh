#pragma once

#include "../intranode/combine_move.cuh"
#include "rails.cuh"

/// Where a combine between nodes finds the rows of the own node's ranks.
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

/// A thread's share of a copy: pieces of 16 bytes from `first` on, several loads under way.
__device__ inline void copyPieces(char* to, const char* from, std::size_t pieces, std::size_t first,
                                  std::size_t stride) {
  constexpr int kAtOnce = 4;
  for (std::size_t i = first; i < pieces; i += kAtOnce * stride) {
    Vec16 piece[kAtOnce];
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
      const std::size_t at = i + static_cast<std::size_t>(u) * stride;
      if (at < pieces) piece[u] = loadStreaming16(from + at * 16);
    }
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
      const std::size_t at = i + static_cast<std::size_t>(u) * stride;
      if (at < pieces) store16(to + at * 16, piece[u]);
    }
  }
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
      copyPieces(to, from, rows * c.rowBytes / 16, first, stride);
    }
    const auto weights = rows * static_cast<std::size_t>(c.weights ? c.topk : 0);
    const float* from = c.weights + static_cast<std::size_t>(range.begin) * c.topk;
    auto* to = reinterpret_cast<float*>(staging + c.staging.weights(static_cast<std::uint64_t>(d)));
    for (std::size_t i = first; i < weights; i += stride) to[i] = from[i];
  }
}

}  // namespace mscclpp::ep::MSCCLPP_PLATFORM_NS
