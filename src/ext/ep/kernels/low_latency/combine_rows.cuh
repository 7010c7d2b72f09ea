#pragma once

#include "ports.cuh"

/// What both low-latency combines share: who works on which token, and how a row leaves and comes.
namespace mscclpp::ep::MSCCLPP_PLATFORM_NS {

__device__ __forceinline__ void addScaled(float (&sum)[8], Vec16 row, float weight) {
  float value[8];
  widenBf16(value, row);
#pragma unroll
  for (int i = 0; i < 8; ++i) sum[i] = fma(weight, value[i], sum[i]);
}

/// A block's shared memory.
struct CombineShared {
  LowLatencyTurn turn;
  int places[kMaxLowLatencyTopk];  ///< of the rows of an own token behind port channels
  bool lastWriter;
  std::uint32_t portsLost;  ///< not 0: a message did not come
};

/// One block's share of a call. Args: LowLatencyCombineArgsOf an area.
template <class Args, class Path>
struct CombineRows {
  const Args& a;
  const LowLatencyTurn turn;
  const RowUnits<Path> row;
  const CallAreas<Path> areas;

  __device__ __forceinline__ CombineRows(const Args& args, const LowLatencyTurn& now)
      : a(args),
        turn(now),
        row{args.area.rowUnits},
        areas(args.group, LowLatencyKind::combine, now.epoch) {}

  __device__ __forceinline__ static CombineShared& shared() {
    return sharedStorage<CombineShared>();
  }

  /// The last block: this rank has entered the call, which is reduced there.
  __device__ __forceinline__ void pushHello(std::uint32_t reduced) const {
    const LowLatencyGroup& g = a.group;
    for (int i = static_cast<int>(warpId()); i < g.ranks - 1; i += kLowLatencyWarps) {
      const int peer = i + (i >= g.rank ? 1 : 0);
      if (isPort<Path>(g, peer) || isMaskedForWarp<Path>(g, peer)) continue;
      pushLine(helloLine(g, LowLatencyKind::combine, regionOf<Path>(g, peer), g.rank, turn.epoch),
               Vec16{{reduced, turn.finished, 0, 0}}, turn.epoch, laneId() < kLineLanes,
               Path::writes(g));
    }
  }

  /// The last block, before it waits for rows: every peer is in this call and has said the
  /// same in its hello. Peers behind port channels send none.
  __device__ __forceinline__ void awaitHellos(std::uint32_t reduced) const {
    const LowLatencyGroup& g = a.group;
    for (int i = static_cast<int>(warpId()); i < g.ranks - 1; i += kLowLatencyWarps) {
      const int peer = i + (i >= g.rank ? 1 : 0);
      if (isPort<Path>(g, peer) || isMaskedForWarp<Path>(g, peer)) continue;
      const void* const line = helloLine(g, LowLatencyKind::combine, g.region, peer, turn.epoch);
      const bool active = laneId() < kLineLanes;
      Vec16 hello = peekLine(line, active);
      const bool came = pullLine(waitControl<Path>(g), line, hello, turn.epoch, active,
                                 lowLatencyWait(WaitWhat::lowLatencyEntry, peer), Path::writes(g));
      const std::uint32_t told = shuffle(hello.w[0], kLineUnits);
      if (came && told == reduced) continue;
      if (came && laneId() == 0) {
        reportFailure(g.wait, lowLatencyWait(WaitWhat::lowLatencyReduce, peer), reduced, told);
      }
      giveUpOn(g, peer);
    }
  }

  // ---- peers behind port channels ----------------------------------------------------------

  __device__ __forceinline__ char* outbox() const {
    return outboxArea(a.group, LowLatencyKind::combine, turn.epoch);
  }
  /// All threads: waits for a message of every peer behind a port channel.
  __device__ __forceinline__ void awaitMessages(PortMessage message, WaitWhat what) const {
    awaitPorts<Path>(a.group, message, turn.epoch, what, [&](int peer) {
      giveUpOn(a.group, peer);
      if (laneId() == 0) storeRelaxed(&shared().portsLost, 1u);
    });
  }
  /// A message that did not come may be on its way: nobody may look at its lines. With shrink the
  /// peer is masked, and the others' lines count.
  __device__ __forceinline__ bool isLost(int peer) const {
    return isPort<Path>(a.group, peer) && !Path::shrink(a.group) &&
           loadRelaxed(&shared().portsLost) != 0;
  }

  __device__ __forceinline__ RowTable table() const { return {a.group.ranks, a.area.maxTokens}; }
  /// What the dispatch noted about peers behind port channels: rows of a source's first tokens that
  /// are here, and of the own ones that are at a rank.
  __device__ __forceinline__ RowCount rowsFrom(int source, int tokens) const {
    return {static_cast<std::uint32_t>(a.rowTable[table().from(source, tokens)])};
  }
  __device__ __forceinline__ RowCount rowsTo(int rank, int tokens) const {
    return {static_cast<std::uint32_t>(a.rowTable[table().to(rank, tokens)])};
  }

  // ---- work ------------------------------------------------------------------------------------

  /// One token's part of a pass: a peer's, whose rows here go home, or an own one.
  struct Item {
    int index;   ///< of the peers' items, while `source` is a peer
    int source;  ///< -1: no more work
    int token;
    int pass;
  };
  __device__ __forceinline__ Item peerItem(int index) const {
    if (sends(a.group.phase) && a.group.ranks > 1) {
      const TokenOf of = peerToken(a.group, index);
      if (of.token < a.area.maxTokens) return {index, of.source, of.token, 0};
    }
    return ownItem(static_cast<int>(blockIndex()));
  }
  __device__ __forceinline__ Item ownItem(int token) const {
    return {0, token < a.tokens ? a.group.rank : -1, token, 0};
  }
  __device__ __forceinline__ Item after(Item item) const {
    if (++item.pass < row.passes()) return item;
    const int blocks = static_cast<int>(gridSize());
    return item.source == a.group.rank ? ownItem(item.token + blocks)
                                       : peerItem(item.index + blocks);
  }
  /// The slot of this lane's selection here, -1 = none. A peer's is read together with the count
  /// that says whether it means anything: one latency, not two.
  __device__ __forceinline__ std::int32_t loadSlot(const Item& item) const {
    const int lane = static_cast<int>(laneId());
    if (item.source < 0 || !sends(a.group.phase)) return -1;
    const bool masked = isMaskedForWarp<Path>(a.group, item.source);
    if (lane >= a.area.topk) return -1;
    const std::int32_t slot =
        a.slots[(static_cast<std::int64_t>(item.source) * a.area.maxTokens + item.token) *
                    a.area.topk +
                lane];
    const std::int32_t tokens =
        item.source == a.group.rank ? a.tokens : a.sourceTokens[item.source];
    return item.token < tokens && !masked ? slot : -1;
  }

  // ---- rows ------------------------------------------------------------------------------------

  /// This thread's unit of a pass in a slot of y, if it has one: a load.
  __device__ __forceinline__ void loadUnit(Vec16& unit, std::int32_t slot, int pass) const {
    const char* const from = a.y + static_cast<std::size_t>(row.unit(pass)) * sizeof(Vec16);
    const auto rowBytes = static_cast<std::uint32_t>(a.hidden) * 2;
    if (row.hasUnit(pass)) {
      unit = loadStreaming16(from + static_cast<std::uint64_t>(static_cast<std::uint32_t>(slot)) *
                                        rowBytes);
    }
  }
  /// Sends this thread's unit of a row. `to`: where the row's lines begin.
  __device__ __forceinline__ void pushUnit(char* to, const Vec16& unit, int pass) const {
    pushLine(to + static_cast<std::size_t>(row.line(pass)) * kLineSize, unit, turn.epoch,
             row.hasLine(pass), Path::writes(a.group));
  }
  /// What receiveUnit() needs: a load that may run beside others.
  __device__ __forceinline__ Vec16 peekUnit(const char* from, int pass) const {
    return peekLine(from + static_cast<std::size_t>(row.line(pass)) * kLineSize, row.hasLine(pass));
  }
  /// Waits for this thread's unit of a row of `rank`. False: it did not come, the rank is given up.
  __device__ __forceinline__ bool receiveUnit(const char* from, Vec16& unit, int pass, int rank,
                                              WaitWhat what) const {
    const LowLatencyGroup& g = a.group;
    if (pullLine(waitControl<Path>(g), from + static_cast<std::size_t>(row.line(pass)) * kLineSize,
                 unit, turn.epoch, row.hasLine(pass), lowLatencyWait(what, rank),
                 Path::writes(g))) {
      return true;
    }
    giveUpOn(g, rank);
    return false;
  }
  /// Statistics: the clock, where they are wanted.
  __device__ __forceinline__ std::uint64_t waitBegins() const {
    return !Path::kFast && a.waitTotals ? nanoseconds() : 0;
  }
  __device__ __forceinline__ void countWait(int rank, std::uint64_t start) const {
    if (!Path::kFast && a.waitTotals && threadIndex() == 0) {
      fetchAddLocalRelaxed(&a.waitTotals[rank], static_cast<std::int64_t>(nanoseconds() - start));
    }
  }
  __device__ __forceinline__ void store(const float (&sum)[8], int token, int pass) const {
    if (!row.hasUnit(pass)) return;
    store16(a.out + static_cast<std::size_t>(token) * a.hidden * 2 +
                static_cast<std::size_t>(row.unit(pass)) * 16,
            narrowBf16(sum));
  }
};

}  // namespace mscclpp::ep::MSCCLPP_PLATFORM_NS
