#pragma once

#include "dispatch_place.cuh"

/// The receiving side of a dispatch between nodes.
namespace mscclpp::ep::MSCCLPP_PLATFORM_NS {

__device__ __forceinline__ DispatchSlot slotFor(const RailDispatchArgs& a, int destinationNode) {
  DispatchSlot slot = a.slot;
  slot.members = static_cast<std::uint32_t>(nodeSize(a.rails, destinationNode));
  return slot;
}

/// Writes tokens of other nodes' ranks into their final rows in this node. The slots of every flow
/// are dealt to all warps, a few at a time, so that the last ones, too, are shared out.
struct RailForwarder {
  const RailDispatchArgs& a;
  const RecvTarget* targets;  ///< [members]
  RowPipe& pipe;
  std::uint32_t epoch;
  std::uint64_t launch;
  int worker, workers;
  std::uint64_t* places;   ///< [ins] this warp's next slot of the launch, lane 0's
  int cursor = 0;          ///< lane 0: the flow that is looked at first
  int late = -1;           ///< lane 0: a flow that has not finished
  std::uint64_t came = 0;  ///< lane 0: slots of this launch, of the flow in hand

  __device__ const GroupArgs& group() const { return a.dispatch.group; }
  __device__ RunProgress& progressOf(int flow) const {
    return *railMemory<RunProgress>(group(),
                                    a.rails.plan.runProgress(RailArea::dispatchReceive, flow));
  }
  /// All lanes, before anything else.
  __device__ void begin() {
    if (laneId() != 0) return;
    for (int f = 0; f < a.rails.ins; ++f) {
      places[f] = static_cast<std::uint64_t>((worker + f) % workers) * kTurnTokens;
    }
    cursor = a.rails.ins > 0 ? worker % a.rails.ins : 0;
  }
  /// Lane 0: what has come for this warp, and whether that was all.
  __device__ ItemState stateOf(int flow) {
    RunProgress& progress = progressOf(flow);
    came = loadLocalAcquire(
               seenWord(group(), a.rails, a.rails.in[flow].peer, RailCounters::dispatchTail())) -
           progress.slots;
    if (places[flow] < came) return ItemState::ready;
    if (loadLocalAcquire(&progress.closed) != launch) return ItemState::stuck;
    came = loadRelaxed(&progress.total);  // more than was seen before, maybe
    return places[flow] < came ? ItemState::ready : ItemState::finished;
  }
  /// Lane 0: a flow that this warp has slots of, or kNoItemReady, or kNoItemLeft.
  __device__ int ready() {
    const int flows = a.rails.ins;
    late = -1;
    for (int i = 0; i < flows; ++i) {
      const int f = cursor + i < flows ? cursor + i : cursor + i - flows;
      const ItemState state = stateOf(f);
      if (late < 0 && state != ItemState::finished) late = f;
      if (state != ItemState::ready) continue;
      cursor = f + 1 < flows ? f + 1 : 0;
      return f;
    }
    return late < 0 ? kNoItemLeft : kNoItemReady;
  }
  struct Share {
    std::uint64_t first;
    int n;
  };
  /// What has come of this warp's share of the slots of the flow that ready() found.
  __device__ Share take(int flow) {
    Share share{};
    if (laneId() == 0) {
      const std::uint64_t first = places[flow], left = kTurnTokens - first % kTurnTokens;
      const std::uint64_t n = came - first < left ? came - first : left;
      share = {first, static_cast<int>(n)};
      const int others = n == left ? workers - 1 : 0;
      places[flow] = first + n + static_cast<unsigned>(others) * kTurnTokens;
    }
    return {shuffle(share.first, 0), shuffle(share.n, 0)};
  }

  struct Small {
    const char* slot;
    const DispatchSlot& layout;
    __device__ std::uint32_t scale(int i) const {
      return reinterpret_cast<const std::uint32_t*>(slot + layout.scales())[i];
    }
    __device__ std::int64_t expert(int k) const {
      return reinterpret_cast<const std::int64_t*>(slot + layout.topkIdx())[k];
    }
    __device__ float weight(int k) const {
      return reinterpret_cast<const float*>(slot + layout.topkWeights())[k];
    }
  };
  /// The slots of lanes that have one, `first` + lane of the launch, go to all ranks that take
  /// them.
  __device__ void placeAll(bool has, const RunRing& ring, std::uint64_t first,
                           const DispatchSlot& slot, int flow) {
    const auto members = static_cast<int>(slot.members);
    const auto slotOf = [&](int lane) {
      return ring.memory + ring.at(first + static_cast<unsigned>(lane));
    };
    const char* from = slotOf(static_cast<int>(laneId()));
    const std::int32_t token = has ? reinterpret_cast<const SlotHeader*>(from)->token : -1;
    const auto* rows = reinterpret_cast<const std::int32_t*>(from + DispatchSlot::rows());
    std::int32_t* kept = nullptr;
    if (has && a.railRows != nullptr) {
      kept = a.railRows + (flow * a.railStride + token) * members;
    }
    for (int m = 0; m < members; ++m) {
      const std::int32_t row = has ? rows[m] : -1;
      if (kept != nullptr) kept[m] = row;
      RowPlacer{a.dispatch, targets[m], ranksOfNode(a.rails, a.rails.node)[m], pipe}.place(
          row < 0 ? -1 : row - targets[m].rowBegin, from + slot.x(), token, [&](int lane) {
            return Small{slotOf(lane), slot};
          });
    }
  }
  /// Forwards what ready() found, after a syncWarp(). False: it is not what was expected.
  __device__ bool forward(int flow) {
    const Share taken = take(flow);
    const int peer = a.rails.in[flow].peer;
    const DispatchSlot slot = slotFor(a, a.rails.node);
    const RunRing ring =
        RunRing::of(group(), a.rails.plan, RailArea::dispatchReceive, flow, slot.bytes());
    const bool mine = static_cast<int>(laneId()) < taken.n;
    SlotHeader header{};
    if (mine) {
      header = *reinterpret_cast<const SlotHeader*>(ring.memory + ring.at(taken.first + laneId()));
    }
    const bool wrong = mine && (header.epoch != epoch || header.signature != a.dispatch.signature);
    if (const unsigned votes = ballot(wrong); votes != 0) {
      if ((votes & lanesBelow()) == 0 && wrong) {
        reportSlot(group(), header, peer, epoch, a.dispatch.signature);
      }
      return false;
    }
    const bool ended = any(header.kind == SlotKind::end);  // the last slot of a launch
    if (ended && laneId() == 0) {
      storeRelaxed(&ring.progress.total, taken.first + static_cast<unsigned>(taken.n));
      storeLocalRelease(&ring.progress.closed, launch);
    }
    placeAll(header.kind == SlotKind::row, ring, taken.first, slot, flow);
    syncWarp();  // all lanes have read the slots
    if (laneId() == 0) {
      const auto giveBack = [&](std::uint64_t begin, std::uint64_t end) {
        addRailWord(group(), a.rails, peer, RailCounters::dispatchCredit(), end - begin);
      };
      const auto n = static_cast<unsigned>(taken.n);
      ring.marks.finish(taken.first, n, giveBack);
      if (ended) ring.marks.close(taken.first + n, giveBack);
    }
    return true;
  }
};

}  // namespace mscclpp::ep::MSCCLPP_PLATFORM_NS
