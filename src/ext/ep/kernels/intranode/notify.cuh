#pragma once

#include "../internode/rails.cuh"
#include "group.cuh"

/// notify: gives every token its place among the rows that this rank sends to each rank, exchanges
/// the counts, and derives from them where rows start and how many arrive.
namespace mscclpp::ep::MSCCLPP_PLATFORM_NS {

inline constexpr int kMaxWarps = 32;

struct NotifyShared {
  std::int32_t warpTotal[kMaxWarps];
  std::uint32_t lastBlock;
  std::uint32_t peersMissing;
};

/// One source's row of the counts table.
struct CountsRow {
  CountsHeader* header;
  std::int32_t* perRank;    ///< [ranks] tokens from this source
  std::int32_t* perExpert;  ///< [receiver's experts]
};
__device__ __forceinline__ CountsRow countsRowAt(const GroupArgs& g, char* at) {
  auto* counts = reinterpret_cast<std::int32_t*>(at + sizeof(CountsHeader));
  return {reinterpret_cast<CountsHeader*>(at), counts, counts + g.ranks};
}
__device__ __forceinline__ CountsRow countsRow(const GroupArgs& g, int owner, unsigned parity,
                                               int source) {
  return countsRowAt(g, g.heaps[owner] + g.plan.countsRow(parity, source));
}

/// Exclusive scan of "token t goes to rank r" over t, a tile of blockSize() tokens at a time.
__device__ inline void placeTokens(const NotifyArgs& a, NotifyShared& shared, int r) {
  const int ranks = a.group.ranks, warps = static_cast<int>(blockSize()) / 32;
  int placed = 0;
  for (int first = 0; first < a.tokens; first += static_cast<int>(blockSize())) {
    const int t = first + static_cast<int>(threadIndex());
    const std::size_t at = static_cast<std::size_t>(t) * ranks + r;
    const bool goes = t < a.tokens && a.isTokenInRank[at] != 0;
    const unsigned votes = ballot(goes);
    if (laneId() == 0) shared.warpTotal[warpId()] = popCount(votes);
    syncBlock();
    int before = placed + popCount(votes & ((1u << laneId()) - 1));
    for (int w = 0; w < warps; ++w) {
      if (w < static_cast<int>(warpId())) before += shared.warpTotal[w];
      placed += shared.warpTotal[w];
    }
    if (t < a.tokens) a.position[at] = goes ? before : -1;
    syncBlock();  // warpTotal is rewritten by the next tile
  }
  if (threadIndex() == 0) a.sendCount[r] = placed;
}

__device__ inline void checkExperts(const NotifyArgs& a) {
  if (a.topkIdx == nullptr) return;
  const std::size_t n = static_cast<std::size_t>(a.tokens) * a.topk;
  const std::size_t stride = static_cast<std::size_t>(gridSize()) * blockSize();
  std::int64_t invalid = 0;
#pragma unroll 4
  for (std::size_t i = static_cast<std::size_t>(blockIndex()) * blockSize() + threadIndex(); i < n;
       i += stride) {
    const std::int64_t expert = a.topkIdx[i];
    if (expert != -1 && !isExpert(a.experts, expert)) invalid = expert;
  }
  if (invalid != 0) reportInvalidExpert(&localWords(a.group).invalidExpert, invalid);
}

/// Expert `i` of `rank`, in the numbering of tokensPerExpert.
__device__ __forceinline__ int expertAt(const ExpertArgs& e, int rank, int i) {
  return e.listed ? e.listed[e.firstOf[rank] + i] : rank * e.perRank + i;
}
__device__ __forceinline__ int expertsOf(const ExpertArgs& e, int rank) {
  return e.listed ? e.firstOf[rank + 1] - e.firstOf[rank] : e.perRank;
}

/// A notify's place in the sequence. Counts have two tables, used in turn: a rank may be one notify
/// ahead of a reader, or of its own puts, never two.
struct NotifyTurn {
  std::uint32_t epoch;
  std::uint64_t number;
  __device__ unsigned table() const { return static_cast<unsigned>(number & 1u); }
};

/// Sends `r` its row, which lies ready in this rank's heap.
__device__ inline void putCounts(const NotifyArgs& a, int r, NotifyTurn turn) {
  const GroupArgs& g = a.group;
  const std::size_t counts = static_cast<std::size_t>(g.ranks + expertsOf(a.experts, r));
  PortChannelDevice(a.rails.channels[r])
      .putThenAdd(g.wait, g.plan.countsRow(turn.table(), g.rank),
                  railOffset(g, a.rails.plan.counts(turn.table(), r)),
                  sizeof(CountsHeader) + counts * 4,
                  railAdd(g, a.rails, RailCounters::counts(), 1));
}
__device__ inline bool awaitCounts(const NotifyArgs& a, int source, NotifyTurn turn) {
  const GroupArgs& g = a.group;
  if (isMapped(g, source)) {
    return waitReached(g.wait, &peerBox(g, g.rank, source).counts.epoch, turn.epoch,
                       waitPoint(WaitWhat::counts, source));
  }
  return awaitRailWord(g, railWord(a.rails, source, RailCounters::counts()), source, turn.number,
                       WaitWhat::railCounts) != 0;
}

__device__ inline void publishCounts(const NotifyArgs& a, NotifyTurn turn) {
  const GroupArgs& g = a.group;
  const int thread = static_cast<int>(threadIndex()), threads = static_cast<int>(blockSize());
  for (int r = 0; r < g.ranks; ++r) {
    const CountsRow row =
        isMapped(g, r) ? countsRow(g, r, turn.table(), g.rank)
                       : countsRowAt(g, railMemory<char>(g, a.rails.plan.counts(turn.table(), r)));
    if (thread == 0) {
      row.header->signature = a.signature;
      row.header->invalidExpert = loadLocalAcquire(&localWords(g).invalidExpert);
      row.header->numTokens = a.tokens;
    }
    for (int i = thread; i < g.ranks; i += threads) row.perRank[i] = a.sendCount[i];
    for (int i = thread; i < expertsOf(a.experts, r); i += threads) {
      row.perExpert[i] = a.tokensPerExpert[expertAt(a.experts, r, i)];
    }
  }
  syncBlock();
  for (int r = thread; r < g.ranks; r += threads) {
    if (isMapped(g, r)) {
      storeRelease(&peerBox(g, r, g.rank).counts.epoch, turn.epoch);
    } else {
      putCounts(a, r, turn);
    }
  }
}

/// Where my rows start at every rank, and how my own rows are divided among their sources.
__device__ inline void deriveOffsets(const NotifyArgs& a, unsigned table, bool usable) {
  const GroupArgs& g = a.group;
  const int thread = static_cast<int>(threadIndex()), threads = static_cast<int>(blockSize());
  for (int r = thread; r < g.ranks; r += threads) {
    int start = 0;
    for (int s = 0; s < g.rank && usable; ++s) {
      start += countsRow(g, g.rank, table, s).perRank[r];
    }
    a.sendStart[r] = start;
  }
  for (int f = thread; f < a.rails.ins; f += threads) {
    a.railTokens[f] =
        usable ? countsRow(g, g.rank, table, a.rails.in[f].peer).header->numTokens : 0;
  }
  for (int i = thread; i < a.experts.localExperts; i += threads) {
    int total = 0;
    for (int s = 0; s < g.ranks && usable; ++s) {
      total += countsRow(g, g.rank, table, s).perExpert[i];
    }
    a.recvPerExpert[i] = total;
    a.result->perExpert[i] = total;
  }
  if (thread == 0) {
    int row = 0;
    for (int s = 0; s < g.ranks; ++s) {
      a.rankOffset[s] = row;
      if (usable) row += countsRow(g, g.rank, table, s).perRank[g.rank];
    }
    a.rankOffset[g.ranks] = row;
    a.result->recvRows = row;
  }
}

/// What all ranks must agree on, and what they must know of each other to plan their launches.
/// False: the call is refused, and it is the kernel that has to say so.
__device__ inline bool deriveLimits(const NotifyArgs& a, unsigned table, bool usable) {
  const GroupArgs& g = a.group;
  NotifyResult& out = *a.result;
  out.badRank = -1;
  out.maxTokens = 0;
  out.maxRecvRows = 0;
  for (int s = 0; s < g.ranks && usable; ++s) {
    const CountsHeader& header = *countsRow(g, g.rank, table, s).header;
    if (header.numTokens > out.maxTokens) out.maxTokens = header.numTokens;
    if (out.badRank >= 0) continue;
    if (header.signature != a.signature) {
      out.badRank = s;
      out.badWhat = static_cast<std::uint32_t>(WaitWhat::shapeMismatch);
      out.badExpected = a.signature;
      out.badSeen = header.signature;
    } else if (header.invalidExpert != 0) {
      out.badRank = s;
      out.badWhat = static_cast<std::uint32_t>(WaitWhat::invalidExpert);
      out.badExpected = static_cast<std::uint64_t>(a.experts.experts);
      out.badSeen = static_cast<std::uint64_t>(header.invalidExpert);
    }
  }
  const bool refused = out.badRank >= 0 && !a.hostWaits;
  if (refused) {
    reportFailure(g.wait, WaitPoint{out.badWhat, out.badRank}, out.badExpected, out.badSeen);
  }
  for (int r = 0; r < g.ranks && usable; ++r) {
    int rows = 0;
    for (int s = 0; s < g.ranks; ++s) rows += countsRow(g, g.rank, table, s).perRank[r];
    if (rows > out.maxRecvRows) out.maxRecvRows = rows;
  }
  return !refused;
}

__device__ inline void notifyKernel(const NotifyArgs& a) {
  const GroupArgs& g = a.group;
  auto& shared = sharedStorage<NotifyShared>();
  LocalWords& local = localWords(g);
  for (int r = static_cast<int>(blockIndex()); r < g.ranks; r += static_cast<int>(gridSize())) {
    placeTokens(a, shared, r);
  }
  checkExperts(a);
  syncBlock();
  if (threadIndex() == 0) {
    shared.lastBlock = fetchAddLocalAcqRel(&local.scanned, 1u) == gridSize() - 1 ? 1u : 0u;
  }
  syncBlock();
  if (shared.lastBlock == 0) return;
  if (threadIndex() == 0) shared.peersMissing = 0;

  const Turn turn = currentTurn(g);
  const NotifyTurn now{turn.epoch, local.notifies + 1};
  if (!turn.broken) {
    publishCounts(a, now);
    for (int s = static_cast<int>(threadIndex()); s < g.ranks; s += static_cast<int>(blockSize())) {
      if (!awaitCounts(a, s, now)) fetchAddLocalRelaxed(&shared.peersMissing, 1u);
    }
  }
  syncBlock();
  const bool usable = shared.peersMissing == 0 && !turn.broken;
  deriveOffsets(a, now.table(), usable);
  const bool good = threadIndex() != 0 || deriveLimits(a, now.table(), usable);
  syncBlock();
  if (threadIndex() == 0) {
    if (!usable || !good) local.broken = 1;
    local.scanned = 0;
    local.invalidExpert = 0;
    local.notifies = now.number;
    storeLocalRelease(&local.epoch, turn.epoch);
    storeRelease(&a.result->sequence, a.sequence);
  }
}

}  // namespace mscclpp::ep::MSCCLPP_PLATFORM_NS
