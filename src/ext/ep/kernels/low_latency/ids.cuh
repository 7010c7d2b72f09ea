#pragma once

#include "ports.cuh"

/// Expert ids of all ranks: every rank sends its own to every other, and each computes the same
/// slots from them. Nobody waits for an answer.
namespace mscclpp::ep::MSCCLPP_PLATFORM_NS {

/// Items that a block places together: their selections' slots are found by all its warps.
inline constexpr int kPlaceBatch = 4;

/// Counters of writeCounts(): selections of so many (expert, source) are counted at a time.
inline constexpr int kCountsAtOnce = 2048;

/// A block's shared memory: head, tokens and missing [ranks], then ids [ranks][units] or nothing,
/// then a quantised row.
struct DispatchShared {
  struct alignas(16) Head {
    LowLatencyTurn turn;
    /// Of the items that are placed together; -1 = not here, also past top-k.
    alignas(16) std::int32_t slot[kPlaceBatch][kMaxLowLatencyTopk];
    std::int32_t expert[kPlaceBatch][kMaxLowLatencyTopk];  ///< of the slot, among the local ones
    std::uint32_t counts[kCountsAtOnce];
    /// Behind port channels: of a token's row at its owners, and of the items' rows here.
    int sendPlace[kMaxLowLatencyTopk];
    int recvPlace[kPlaceBatch];
    bool lastWriter;
  };
  int ranks;
  int idUnits;  ///< of one rank
  bool idsHere;
  int rowUnits;  ///< 0: not quantised

  constexpr std::size_t tokensAt() const { return alignUp(sizeof(Head), 16); }
  constexpr std::size_t missingAt() const {
    return tokensAt() + alignUp(static_cast<std::size_t>(ranks) * 4, 16);
  }
  constexpr std::size_t idsAt() const {
    return missingAt() + alignUp(static_cast<std::size_t>(ranks) * 4, 16);
  }
  constexpr std::size_t rowAt() const {
    return idsAt() +
           (idsHere ? static_cast<std::size_t>(ranks) * static_cast<std::size_t>(idUnits) * 16 : 0);
  }
  constexpr std::size_t total() const { return rowAt() + static_cast<std::size_t>(rowUnits) * 16; }

  __device__ __forceinline__ Head& head() const { return sharedStorage<Head>(); }
  __device__ __forceinline__ int* tokens() const {
    return reinterpret_cast<int*>(sharedBytes(tokensAt(), static_cast<std::size_t>(ranks) * 4));
  }
  /// 1: something of the source did not come.
  __device__ __forceinline__ std::uint32_t* missing() const {
    return reinterpret_cast<std::uint32_t*>(
        sharedBytes(missingAt(), static_cast<std::size_t>(ranks) * 4));
  }
  __device__ __forceinline__ Vec16* ids(int source) const {
    return reinterpret_cast<Vec16*>(sharedBytes(
        idsAt() + static_cast<std::size_t>(source) * static_cast<std::size_t>(idUnits) * 16,
        static_cast<std::size_t>(idUnits) * 16));
  }
  __device__ __forceinline__ Vec16* row() const {
    return reinterpret_cast<Vec16*>(sharedBytes(rowAt(), static_cast<std::size_t>(rowUnits) * 16));
  }
};
constexpr int idUnitsOf(const DispatchArea& area) {
  return area.idLines * kLineUnits;
}

/// A line of a source's ids in the region or area that is given.
__device__ __forceinline__ char* idLine(const LowLatencyDispatchArgs& a, char* region,
                                        std::uint64_t areaOffset, int source, int line,
                                        std::uint64_t epoch) {
  if (line == 0) return helloLine(a.group, LowLatencyKind::dispatch, region, source, epoch);
  return region + areaOffset + a.area.ids(source, line);
}
template <class Path>
__device__ __forceinline__ const char* myIdLine(const LowLatencyDispatchArgs& a, int source,
                                                int line, std::uint64_t epoch) {
  if (isPort<Path>(a.group, source)) {
    return a.group.region + a.group.plan.area(LowLatencyKind::dispatch, epoch) +
           a.area.ids(source, line);
  }
  return idLine(a, a.group.region, a.group.plan.area(LowLatencyKind::dispatch, epoch), source, line,
                epoch);
}

/// Two of this rank's ids as one word. -1, and what lies behind the last token, are no expert;
/// anything else that is none is remembered in `bad`.
__device__ __forceinline__ std::uint32_t idPair(const LowLatencyDispatchArgs& a, int index,
                                                std::int64_t& bad) {
  std::uint32_t pair = 0;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const std::int64_t expert = index + i < a.tokens * a.area.topk ? a.topkIdx[index + i] : -1;
    const bool valid = static_cast<std::uint64_t>(expert) < static_cast<std::uint64_t>(a.experts);
    if (!valid && expert != -1) bad = expert;
    pair |= (valid ? static_cast<std::uint32_t>(expert) : kNoExpert) << (16 * i);
  }
  return pair;
}
/// Eight of them.
__device__ __forceinline__ Vec16 ownIdUnit(const LowLatencyDispatchArgs& a, int unit,
                                           std::int64_t& bad) {
  Vec16 ids;
#pragma unroll
  for (int i = 0; i < 4; ++i) ids.w[i] = idPair(a, unit * kIdsPerUnit + 2 * i, bad);
  return ids;
}
/// Lines that `tokens` tokens fill; one at least.
__device__ __forceinline__ int usedIdLines(const LowLatencyDispatchArgs& a, int tokens) {
  const int lines = (tokens * a.area.topk + kIdsPerLine - 1) / kIdsPerLine;
  return lines > 0 ? lines : 1;
}

/// Before the call is entered: own ids to shared memory, which pushIds() and the slots read. A
/// receive half gets them back from the send half: the caller's may be gone.
__device__ __forceinline__ void loadOwnIds(const LowLatencyDispatchArgs& a,
                                           const DispatchShared& shared) {
  std::int64_t bad = -1;
  if (shared.idsHere && sends(a.group.phase)) {
    const int units = usedIdLines(a, a.tokens) * kLineUnits;
#pragma unroll 1
    for (int u = static_cast<int>(threadIndex()); u < units; u += kLowLatencyThreads) {
      shared.ids(a.group.rank)[u] = ownIdUnit(a, u, bad);
    }
  }
  for (int s = static_cast<int>(threadIndex()); s < a.group.ranks; s += kLowLatencyThreads) {
    storeRelaxed(&shared.missing()[s], 0u);
    if (s == a.group.rank) shared.tokens()[s] = a.tokens;
  }
  for (int i = static_cast<int>(threadIndex()); i < kPlaceBatch * kMaxLowLatencyTopk;
       i += kLowLatencyThreads) {
    shared.head().slot[i / kMaxLowLatencyTopk][i % kMaxLowLatencyTopk] = -1;
  }
  if (bad != -1) {
    reportFailure(a.group.wait, lowLatencyWait(WaitWhat::invalidExpert, a.group.rank),
                  static_cast<std::uint64_t>(a.experts), static_cast<std::uint64_t>(bad));
  }
}

/// The last block's first duty: everybody waits for the ids.
template <class Path>
__device__ __forceinline__ void pushIds(const LowLatencyDispatchArgs& a,
                                        const DispatchShared& shared, const LowLatencyTurn& turn,
                                        bool toSelf) {
  const int lines = usedIdLines(a, a.tokens);
  const std::uint64_t areaOffset = a.group.plan.area(LowLatencyKind::dispatch, turn.epoch);
#pragma unroll 1
  for (int base = static_cast<int>(warpId()) * 4; base < lines; base += kLowLatencyWarps * 4) {
    const int line = base + static_cast<int>(laneId()) / kLineLanes;
    const int lane = static_cast<int>(laneId()) % kLineLanes;
    Vec16 unit{{static_cast<std::uint32_t>(a.tokens) | a.shapeHash << kHelloTokenBits,
                turn.finished, 0, 0}};
    if (lane < kLineUnits && line < lines) {
      std::int64_t bad = -1;  // reported by loadOwnIds(), or the call is too large for that
      const int at = line * kLineUnits + lane;
      unit = Path::kFast || shared.idsHere ? shared.ids(a.group.rank)[at] : ownIdUnit(a, at, bad);
    }
    for (int i = 0; i < a.group.ranks; ++i) {
      const int peer =
          a.group.rank + i < a.group.ranks ? a.group.rank + i : a.group.rank + i - a.group.ranks;
      if (peer == a.group.rank ? !toSelf : isMaskedForWarp<Path>(a.group, peer)) continue;
      char* const to =
          isPort<Path>(a.group, peer)
              ? outboxArea(a.group, LowLatencyKind::dispatch, turn.epoch) + a.area.ids(peer, line)
              : idLine(a, regionOf<Path>(a.group, peer), areaOffset, a.group.rank, line,
                       turn.epoch);
      pushLine(to, unit, turn.epoch, line < lines, Path::writes(a.group));
    }
  }
}

/// Four lines of a source's ids, and its hello, which says how many there are. A whole warp. False:
/// they did not come in time.
template <class Path>
__device__ __forceinline__ bool awaitIdLines(const LowLatencyDispatchArgs& a,
                                             const DispatchShared& shared, std::uint64_t epoch,
                                             int source, int firstLine) {
  const LowLatencyGroup& g = a.group;
  const WaitControl wait = waitControl<Path>(g);
  const WaitPoint point = lowLatencyWait(WaitWhat::lowLatencyIds, source);
  const int lane = static_cast<int>(laneId()) % kLineLanes;
  const int line = firstLine + static_cast<int>(laneId()) / kLineLanes;
  const bool inside = line < a.area.idLines;
  const void* const hello = myIdLine<Path>(a, source, 0, epoch);
  const void* const mine = myIdLine<Path>(a, source, inside ? line : 0, epoch);
  // Behind a port channel the lines are here: if the hello is not, they lie elsewhere.
  if (isPort<Path>(g, source) && loadAcquire(&lineTail(hello).epoch) != epoch) {
    if (!Path::shrink(g) && laneId() == 0) {
      reportFailure(g.wait, lowLatencyWait(WaitWhat::lowLatencyShape, source), 0, 0);
    }
    return false;
  }
  // Both are in flight together; most often they arrive together too.
  Vec16 unit = peekLine(mine, inside && line != 0), head = peekLine(hello, true);
  if (!pullLine(wait, hello, head, epoch, true, point, Path::writes(g))) return false;
  const std::uint32_t told = shuffle(head.w[0], kLineUnits);
  if ((told ^ a.shapeHash << kHelloTokenBits) >> kHelloTokenBits != 0) {
    if (laneId() == 0) {
      reportFailure(g.wait, lowLatencyWait(WaitWhat::lowLatencyShape, source), a.shapeHash,
                    told >> kHelloTokenBits);
    }
    return false;
  }
  const int tokens = static_cast<int>(told & ((1u << kHelloTokenBits) - 1));
  const bool wanted = line != 0 && line < usedIdLines(a, tokens);
  if (any(wanted) && !pullLine(wait, mine, unit, epoch, wanted, point, Path::writes(g)))
    return false;
  if (line == 0) unit = head;
  if (lane == kLineUnits) {
    if (line == 0) shared.tokens()[source] = tokens;
  } else if ((Path::kFast || shared.idsHere) && (line == 0 || wanted)) {
    shared.ids(source)[line * kLineUnits + lane] = unit;
  }
  return true;
}

/// All of awaitIdLines() for one block; a source that did not come is noted in `missing`.
template <class Path>
__device__ __forceinline__ void awaitSources(const LowLatencyDispatchArgs& a,
                                             const DispatchShared& shared, std::uint64_t epoch,
                                             bool fromSelf) {
  const LowLatencyGroup& g = a.group;
  const int warpsPerSource = (a.area.idLines + 3) / 4;
  const int sources = fromSelf ? g.ranks : g.ranks - 1;
  const std::uint64_t start = !Path::kFast && a.waitTotals ? nanoseconds() : 0;
  if constexpr (Path::kPorts) {
    awaitPorts<Path>(g, PortMessage::ids, epoch, WaitWhat::lowLatencyIds, [&](int source) {
      if (laneId() == 0) storeRelaxed(&shared.missing()[source], 1u);
    });
  }
  for (int i = static_cast<int>(warpId()); i < sources * warpsPerSource; i += kLowLatencyWarps) {
    int source = i / warpsPerSource;
    const int part = i - source * warpsPerSource;
    if (!fromSelf && source >= g.rank) ++source;
    const bool lost = isPort<Path>(g, source) && any(loadRelaxed(&shared.missing()[source]) != 0);
    if (lost || isMaskedForWarp<Path>(g, source)) {
      if (laneId() == 0) storeRelaxed(&shared.missing()[source], 1u);
      continue;
    }
    if (!awaitIdLines<Path>(a, shared, epoch, source, part * 4) && laneId() == 0) {
      storeRelaxed(&shared.missing()[source], 1u);
    }
    if (!Path::kFast && a.waitTotals && source != g.rank && part == 0 && laneId() == 0 &&
        blockIndex() == gridSize() - 1) {
      fetchAddLocalRelaxed(&a.waitTotals[source], static_cast<std::int64_t>(nanoseconds() - start));
    }
  }
}

/// Sources of which something is missing take no part. With shrink all blocks must agree on that,
/// or they would give different slots to the same row: the first block that knows decides for all,
/// and if it had everything, then everything is here by now for the others too.
template <class Path>
__device__ __forceinline__ void settleSources(const LowLatencyDispatchArgs& a,
                                              const DispatchShared& shared, std::uint64_t epoch) {
  const LowLatencyGroup& g = a.group;
  for (int s = static_cast<int>(threadIndex()); s < g.ranks; s += kLowLatencyThreads) {
    const bool missing = loadRelaxed(&shared.missing()[s]) != 0;
    bool absent = missing;
    if (Path::shrink(g) && s != g.rank) {
      std::uint64_t* const verdict = &peerWords(g, g.region, s).verdict;
      const std::uint64_t mine = 2 * epoch + (missing ? 1 : 0);
      std::uint64_t seen = loadAcquire(verdict);
      while (seen / 2 != epoch && !compareExchangeAcqRel(verdict, seen, mine)) {
      }
      absent = (seen / 2 == epoch ? seen : mine) % 2 != 0;
    }
    if (absent) {
      shared.tokens()[s] = 0;
      giveUpOn(g, s);
    }
    storeRelaxed(&shared.missing()[s], missing && !absent ? 1u : 0u);
  }
  syncBlock();
  if (!Path::shrink(g)) return;
  for (int s = 0; s < g.ranks; ++s) {
    if (loadRelaxed(&shared.missing()[s]) == 0) continue;
    if (isPort<Path>(g, s)) {
      awaitPort<Path>(g, PortMessage::ids, epoch, s, WaitWhat::lowLatencyIds);
    }
    for (int line = static_cast<int>(warpId()) * 4; line < a.area.idLines;
         line += kLowLatencyWarps * 4) {
      awaitIdLines<Path>(a, shared, epoch, s, line);
    }
  }
  syncBlock();
}

/// Every rank's ids, in shared memory or, when they do not fit, as verified lines of the area.
/// `fromSelf`: this rank's own come that way too.
template <class Path>
__device__ __forceinline__ void awaitIds(const LowLatencyDispatchArgs& a,
                                         const DispatchShared& shared, std::uint64_t epoch,
                                         bool fromSelf) {
  awaitSources<Path>(a, shared, epoch, fromSelf);
  syncBlock();
  settleSources<Path>(a, shared, epoch);
}

/// The ids of all ranks once awaitIds() has returned.
template <class Path>
struct IdReader {
  const LowLatencyDispatchArgs& a;
  const DispatchShared& shared;
  std::uint64_t epoch;

  __device__ __forceinline__ Vec16 unit(int source, int index) const {
    if (Path::kFast || shared.idsHere) return shared.ids(source)[index];
    const int line = index / kLineUnits;
    return loadLineUnit(myIdLine<Path>(a, source, line, epoch), index - line * kLineUnits);
  }
  __device__ __forceinline__ std::uint32_t id(int source, int index) const {
    const Vec16 ids = unit(source, index / kIdsPerUnit);
    const int i = index % kIdsPerUnit;
    return ids.w[i / 2] >> (i % 2 * 16) & 0xFFFFu;
  }
  /// How many of the first `ids` selections of `source` are of `expert`; this lane's share.
  __device__ __forceinline__ std::uint32_t countShare(int source, int ids,
                                                      std::uint32_t expert) const {
    const int lane = static_cast<int>(laneId()), whole = ids / kIdsPerUnit;
    const std::uint32_t pattern = expert | expert << 16;
    std::uint32_t equal = 0;
#pragma unroll 2
    for (int u = lane; u < whole; u += 32) {
      const Vec16 q = unit(source, u);
      // min(a ^ b, 1) in each half counts the ids that differ.
      const std::uint32_t differ =
          minHalves(q.w[0] ^ pattern, 0x10001u) + minHalves(q.w[1] ^ pattern, 0x10001u) +
          minHalves(q.w[2] ^ pattern, 0x10001u) + minHalves(q.w[3] ^ pattern, 0x10001u);
      equal += kIdsPerUnit - (differ & 0xFFFFu) - (differ >> 16);
    }
    if (lane < ids % kIdsPerUnit && id(source, whole * kIdsPerUnit + lane) == expert) ++equal;
    return equal;
  }
  /// Rows of the first `tokens` tokens of `source` that go to `rank`. A whole warp.
  __device__ __forceinline__ RowCount rowsTo(int rank, int source, int tokens) const {
    const std::uint32_t first = static_cast<std::uint32_t>(rank * a.expertsPerRank);
    const auto isThere = [&](std::uint32_t expert) {
      const bool inside = expert - first < static_cast<std::uint32_t>(a.expertsPerRank);
      return inside && expert != kNoExpert ? 1 : 0;
    };
    std::uint32_t sum = 0;
#pragma unroll 1
    for (int t = static_cast<int>(laneId()); t < tokens; t += 32) {
      int selections = 0;
      if (a.area.topk == kIdsPerUnit) {
        const Vec16 ids = unit(source, t);
#pragma unroll
        for (int i = 0; i < 4; ++i)
          selections += isThere(ids.w[i] & 0xFFFFu) + isThere(ids.w[i] >> 16);
      } else {
#pragma unroll 1
        for (int k = 0; k < a.area.topk; ++k)
          selections += isThere(id(source, t * a.area.topk + k));
      }
      sum += RowCount::ofToken(selections).packed;
    }
    return {sumWarp(sum)};
  }
  /// How many selections of `expert` come before selection `index` of `source`: all of lower
  /// sources, and earlier ones of this source. A whole warp.
  __device__ __forceinline__ int before(int source, int index, std::uint32_t expert) const {
    std::uint32_t equal = 0;
#pragma unroll 1
    for (int s = 0; s <= source; ++s) {
      equal += countShare(s, s < source ? shared.tokens()[s] * a.area.topk : index, expert);
    }
    return static_cast<int>(sumWarp(equal));
  }
};

}  // namespace mscclpp::ep::MSCCLPP_PLATFORM_NS
