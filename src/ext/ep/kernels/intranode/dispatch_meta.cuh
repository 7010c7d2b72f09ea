#pragma once

#include "group.cuh"

/// The small rows of dispatch: where every receiver wants them, and how they get there.
namespace mscclpp::ep::MSCCLPP_PLATFORM_NS {

/// Tokens per ticket (field measurement: 4; 2 makes the planner the limit).
inline constexpr int kChunkTokens = 4;
/// Chunks a planner may be ahead of its issuer.
inline constexpr int kQueueChunks = 4;

/// Where one rank takes this rank's rows in this launch, from its entry packet.
struct RecvTarget {
  char* x;
  char* scales;
  std::int64_t* topkIdx;
  float* topkWeights;
  std::int32_t* sourceTokens;
  std::int64_t rowBegin;
  std::int64_t rows;  ///< 0 = send nothing there
};

__device__ __forceinline__ RecvLayout recvLayout(const DispatchArgs& a, std::int64_t rows) {
  RecvLayout layout;
  layout.rows = static_cast<std::uint64_t>(rows);
  layout.rowBytes = a.rowBytes;
  layout.scaleBytes = static_cast<std::uint64_t>(a.scaleCount) * 4;
  layout.topk = static_cast<std::uint64_t>(a.topk);
  return layout;
}

__device__ __forceinline__ void publishWindow(const DispatchArgs& a, int peer,
                                              std::uint32_t epoch) {
  EntryPacket packet{};
  packet.base = a.window.heapOffset;
  packet.rowBegin = a.window.rowBegin;
  packet.rows = a.window.rows;
  packet.signature = a.signature;
  publishEntry(a.group, peer, packet, epoch);
}

__device__ inline RecvTarget awaitTarget(const DispatchArgs& a, int peer, std::uint32_t epoch) {
  EntryPacket packet{};
  if (!awaitEntry(a.group, peer, epoch, WaitWhat::dispatchEntry, a.signature, packet)) return {};
  char* base = a.group.heaps[peer] + packet.base;
  const RecvLayout layout = recvLayout(a, packet.rows);
  return {base + layout.x(),
          base + layout.scales(),
          reinterpret_cast<std::int64_t*>(base + layout.topkIdx()),
          reinterpret_cast<float*>(base + layout.topkWeights()),
          reinterpret_cast<std::int32_t*>(base + layout.sourceTokens()),
          packet.rowBegin,
          packet.rows};
}

/// Indices become the receiver's own numbering; choices of other ranks' experts become -1 and 0.
__device__ inline void copyTopk(const DispatchArgs& a, const RecvTarget* targets,
                                const std::int32_t* rows, int first, int count) {
  const int ranks = a.group.ranks;
  for (int i = static_cast<int>(laneId()); i < count * a.topk; i += 32) {
    const int t = i / a.topk, k = i - t * a.topk;
    const std::size_t from = static_cast<std::size_t>(first) * a.topk + i;
    const std::int64_t expert = a.topkIdx[from];
    const float weight = a.topkWeights[from];
    const bool valid = isExpert(a.experts, expert);
    const int host = valid ? rankOfExpert(a.experts, expert) : -1;
    const int index = valid ? indexOfExpert(a.experts, expert) : -1;
    for (int r = 0; r < ranks; ++r) {
      const std::int32_t row = rows[t * ranks + r];
      if (row < 0) continue;
      const std::size_t to = static_cast<std::size_t>(row) * a.topk + k;
      targets[r].topkIdx[to] = r == host ? index : -1;
      targets[r].topkWeights[to] = r == host ? weight : 0.0f;
    }
  }
}

/// Scales in pieces of `Piece` (16 bytes where rows allow it), four loads in flight per lane, each
/// stored to all destinations.
template <class Piece>
__device__ void copyScales(const DispatchArgs& a, const RecvTarget* targets,
                           const std::int32_t* rows, int first, int count) {
  constexpr int kInFlight = 4, kPer = static_cast<int>(sizeof(Piece) / 4);
  const int pieces = a.scaleCount / kPer, total = count * pieces, ranks = a.group.ranks;
  for (int i0 = static_cast<int>(laneId()); i0 < total; i0 += 32 * kInFlight) {
    Piece value[kInFlight];
    int token[kInFlight], piece[kInFlight];
#pragma unroll
    for (int u = 0; u < kInFlight; ++u) {
      const int i = i0 + u * 32;
      if (i >= total) continue;
      token[u] = i / pieces;
      piece[u] = i - token[u] * pieces;
      value[u] = *reinterpret_cast<const Piece*>(
          a.scales + ((first + token[u]) * a.scaleTokenStride +
                      piece[u] * kPer * a.scaleBlockStride) * 4);
    }
#pragma unroll
    for (int u = 0; u < kInFlight; ++u) {
      if (i0 + u * 32 >= total) continue;
      for (int r = 0; r < ranks; ++r) {
        const std::int32_t row = rows[token[u] * ranks + r];
        if (row < 0) continue;
        reinterpret_cast<Piece*>(targets[r].scales +
                                 static_cast<std::size_t>(row) * a.scaleCount * 4)[piece[u]] =
            value[u];
      }
    }
  }
}

/// Copies everything but the rows themselves. `rows`: [count, ranks] rows in the windows, or -1.
__device__ inline void copyMeta(const DispatchArgs& a, const RecvTarget* targets,
                                const std::int32_t* rows, int first, int count) {
  const int ranks = a.group.ranks;
  for (int i = static_cast<int>(laneId()); i < count * ranks; i += 32) {
    if (rows[i] >= 0) targets[i % ranks].sourceTokens[rows[i]] = first + i / ranks;
  }
  if (a.topk > 0) copyTopk(a, targets, rows, first, count);
  if (a.scaleCount == 0) return;
  const bool wide = a.scaleBlockStride == 1 && a.scaleCount % 4 == 0 && a.scaleTokenStride % 4 == 0 &&
                    reinterpret_cast<std::uintptr_t>(a.scales) % 16 == 0;
  if (wide) {
    copyScales<Vec16>(a, targets, rows, first, count);
  } else {
    copyScales<std::uint32_t>(a, targets, rows, first, count);
  }
}

}  // namespace mscclpp::ep::MSCCLPP_PLATFORM_NS
