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
  std::int64_t start;  ///< row of this rank's first token there
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

__device__ inline RecvTarget awaitTarget(const DispatchArgs& a, int peer, Turn turn) {
  EntryPacket packet{};
  if (turn.broken || !isMapped(a.group, peer)) return {};
  if (!awaitEntry(a.group, peer, turn.epoch, WaitWhat::dispatchEntry, a.signature, packet)) {
    return {};
  }
  char* base = a.group.heaps[peer] + packet.base;
  const RecvLayout layout = recvLayout(a, packet.rows);
  return {base + layout.x(),
          base + layout.scales(),
          reinterpret_cast<std::int64_t*>(base + layout.topkIdx()),
          reinterpret_cast<float*>(base + layout.topkWeights()),
          reinterpret_cast<std::int32_t*>(base + layout.sourceTokens()),
          a.sendStart[peer],
          packet.rowBegin,
          packet.rows};
}

/// Scales move in pieces of 16 bytes where rows allow it, else one by one.
__device__ __forceinline__ bool wideScales(const DispatchArgs& a) {
  return a.scaleBlockStride == 1 && a.scaleCount % 4 == 0 && a.scaleTokenStride % 4 == 0 &&
         reinterpret_cast<std::uintptr_t>(a.scales) % 16 == 0;
}

/// What one lane does for every chunk in its first pass, worked out once: divisions by run-time
/// values would cost the planner more than the copies.
struct LaneShare {
  static constexpr int kScalePasses = 2;
  int rank;                   ///< of (token, rank) entry `lane`
  int sourceToken;            ///< token of that entry
  int topkToken, topkChoice;  ///< of (token, choice) entry `lane`
  int scalePieces;            ///< 16-byte pieces of a token's scales; 0 = not in 16-byte pieces
  int scaleToken[kScalePasses], scalePiece[kScalePasses];

  __device__ explicit LaneShare(const DispatchArgs& a) {
    const int lane = static_cast<int>(laneId());
    rank = lane % a.group.ranks;
    sourceToken = lane / a.group.ranks;
    topkToken = a.topk > 0 ? lane / a.topk : 0;
    topkChoice = a.topk > 0 ? lane - topkToken * a.topk : 0;
    scalePieces = a.scaleCount > 0 && wideScales(a) ? a.scaleCount / 4 : 0;
    for (int p = 0; p < kScalePasses; ++p) {
      const int i = lane + p * 32;
      scaleToken[p] = scalePieces > 0 ? i / scalePieces : 0;
      scalePiece[p] = scalePieces > 0 ? i - scaleToken[p] * scalePieces : 0;
    }
  }
};

/// A chunk and what its first pass needs from memory, loaded one chunk ahead of its use.
struct ChunkLoads {
  int first;  ///< token
  int count;  ///< tokens; 0 = past the end
  int rank;   ///< LaneShare::rank
  std::int32_t position;
  std::int64_t expert;
  float weight;
  Vec16 scales[LaneShare::kScalePasses];
};

__device__ __forceinline__ const char* scaleAt(const DispatchArgs& a, int token, int scale) {
  return a.scales + (token * a.scaleTokenStride + scale * a.scaleBlockStride) * 4;
}

__device__ __forceinline__ ChunkLoads loadChunk(const DispatchArgs& a, const LaneShare& share,
                                                std::uint32_t ticket) {
  const int lane = static_cast<int>(laneId());
  const std::int64_t first = static_cast<std::int64_t>(ticket) * kChunkTokens;
  ChunkLoads c{};
  c.rank = share.rank;
  if (first >= a.tokens) return c;
  c.first = static_cast<int>(first);
  c.count = a.tokens - c.first < kChunkTokens ? a.tokens - c.first : kChunkTokens;
  if (lane < c.count * a.group.ranks) {
    c.position = a.position[static_cast<std::size_t>(c.first) * a.group.ranks + lane];
  }
  if (lane < c.count * a.topk) {
    const std::size_t at = static_cast<std::size_t>(c.first) * a.topk + lane;
    c.expert = a.topkIdx[at];
    c.weight = a.topkWeights[at];
  }
#pragma unroll
  for (int p = 0; p < LaneShare::kScalePasses; ++p) {
    if (lane + p * 32 < c.count * share.scalePieces) {
      c.scales[p] = load16(scaleAt(a, c.first + share.scaleToken[p], share.scalePiece[p] * 4));
    }
  }
  return c;
}

/// One choice of one token: the index becomes the receiver's own numbering; choices of other ranks'
/// experts become -1 and 0.
__device__ __forceinline__ void storeChoice(const DispatchArgs& a, const RecvTarget* targets,
                                            const std::int32_t* rows, int choice,
                                            std::int64_t expert, float weight) {
  const bool valid = isExpert(a.experts, expert);
  const int host = valid ? rankOfExpert(a.experts, expert) : -1;
  const int index = valid ? indexOfExpert(a.experts, expert) : -1;
  for (int r = 0; r < a.group.ranks; ++r) {
    if (rows[r] < 0) continue;
    const std::size_t to = static_cast<std::size_t>(rows[r]) * a.topk + choice;
    targets[r].topkIdx[to] = r == host ? index : -1;
    targets[r].topkWeights[to] = r == host ? weight : 0.0f;
  }
}

template <class Piece>
__device__ __forceinline__ void storeScales(const DispatchArgs& a, const RecvTarget* targets,
                                            const std::int32_t* rows, int piece, Piece value) {
  for (int r = 0; r < a.group.ranks; ++r) {
    if (rows[r] < 0) continue;
    char* to = targets[r].scales + static_cast<std::size_t>(rows[r]) * a.scaleCount * 4;
    reinterpret_cast<Piece*>(to)[piece] = value;
  }
}

/// What is left of a chunk after the first pass: many ranks, many choices, many or odd scales.
__device__ inline void storeMetaRest(const DispatchArgs& a, const LaneShare& share,
                                     const RecvTarget* targets, const std::int32_t* rows,
                                     const ChunkLoads& c) {
  const int lane = static_cast<int>(laneId()), ranks = a.group.ranks;
  for (int i = lane + 32; i < c.count * ranks; i += 32) {
    if (rows[i] >= 0) targets[i % ranks].sourceTokens[rows[i]] = c.first + i / ranks;
  }
  for (int i = lane + 32; i < c.count * a.topk; i += 32) {
    const int t = i / a.topk;
    const std::size_t at = static_cast<std::size_t>(c.first) * a.topk + i;
    storeChoice(a, targets, rows + t * ranks, i - t * a.topk, a.topkIdx[at], a.topkWeights[at]);
  }
  if (share.scalePieces > 0) {
    for (int i = lane + 32 * LaneShare::kScalePasses; i < c.count * share.scalePieces; i += 32) {
      const int t = i / share.scalePieces, piece = i - t * share.scalePieces;
      storeScales(a, targets, rows + t * ranks, piece, load16(scaleAt(a, c.first + t, piece * 4)));
    }
  } else {
    for (int i = lane; i < c.count * a.scaleCount; i += 32) {
      const int t = i / a.scaleCount, scale = i - t * a.scaleCount;
      const auto* from = reinterpret_cast<const std::uint32_t*>(scaleAt(a, c.first + t, scale));
      storeScales(a, targets, rows + t * ranks, scale, *from);
    }
  }
}

/// Stores everything but the rows themselves. `rows`: [count, ranks] rows in the windows, or -1.
__device__ __forceinline__ void storeMeta(const DispatchArgs& a, const LaneShare& share,
                                          const RecvTarget* targets, const std::int32_t* rows,
                                          const ChunkLoads& c) {
  const int lane = static_cast<int>(laneId()), ranks = a.group.ranks;
  if (lane < c.count * ranks && rows[lane] >= 0) {
    targets[share.rank].sourceTokens[rows[lane]] = c.first + share.sourceToken;
  }
  if (lane < c.count * a.topk) {
    storeChoice(a, targets, rows + share.topkToken * ranks, share.topkChoice, c.expert, c.weight);
  }
#pragma unroll
  for (int p = 0; p < LaneShare::kScalePasses; ++p) {
    if (lane + p * 32 < c.count * share.scalePieces) {
      storeScales(a, targets, rows + share.scaleToken[p] * ranks, share.scalePiece[p], c.scales[p]);
    }
  }
  const int most = c.count * (a.topk > ranks ? a.topk : ranks);
  const bool odd = a.scaleCount > 0 && share.scalePieces == 0;
  if (most > 32 || odd || c.count * share.scalePieces > 32 * LaneShare::kScalePasses) {
    storeMetaRest(a, share, targets, rows, c);
  }
}

}  // namespace mscclpp::ep::MSCCLPP_PLATFORM_NS
