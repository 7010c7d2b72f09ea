#pragma once

#include "../intranode/dispatch.cuh"
#include "dispatch_send.cuh"

/// dispatch between nodes: sending warps and forwarding warps. A forwarder never waits for one flow
/// alone, so that every sender's slots come free; a sender may.
namespace mscclpp::ep::MSCCLPP_PLATFORM_NS {

/// A block's shared memory: RailShared, targets [members of the own node].
__device__ __forceinline__ RecvTarget* railTargets(int members) {
  return reinterpret_cast<RecvTarget*>(sharedBytes(
      alignUp(sizeof(RailShared), 128), static_cast<std::size_t>(members) * sizeof(RecvTarget)));
}

/// Writes tokens of other nodes' ranks into their final rows in this node. Lane 0 moves an item on;
/// nextItem() synchronises the warp.
struct RailForwarder {
  const RailDispatchArgs& a;
  const RecvTarget* targets;  ///< [members]
  std::uint32_t epoch;
  std::uint64_t launch;
  RailItems items;
  int cursor = 0;
  std::uint64_t tail = 0;  ///< lane 0: of the item in hand

  __device__ const GroupArgs& group() const { return a.dispatch.group; }
  __device__ RailProgress& progressOf(int flow, int lane) const {
    return railProgress(group(), a.rails, RailArea::dispatchReceive, flow, lane);
  }
  __device__ ItemState stateOf(int flow, int lane) {
    const RailProgress& progress = progressOf(flow, lane);
    if (progress.closed == launch) return ItemState::finished;
    tail = loadAcquire(
        railWord(a.rails, a.rails.in[flow].peer, railCounters(a.rails).dispatchTail(lane)));
    return tail == progress.slots ? ItemState::stuck : ItemState::ready;
  }

  /// One rank's copy of a row.
  __device__ void place(const char* from, const DispatchSlot& slot, int member, std::int64_t row,
                        std::int32_t token) const {
    const DispatchArgs& d = a.dispatch;
    const RecvTarget& target = targets[member];
    const int me = static_cast<int>(laneId()), r = ranksOfNode(a.rails, a.rails.node)[member];
    const auto at = static_cast<std::size_t>(row);
    copyRow(target.x + at * d.rowBytes, from + slot.x(), d.rowBytes, d.rowBytes % 16 == 0);
    const auto* scales = reinterpret_cast<const std::uint32_t*>(from + slot.scales());
    auto* toScales = reinterpret_cast<std::uint32_t*>(target.scales) + at * d.scaleCount;
    for (int i = me; i < d.scaleCount; i += 32) toScales[i] = scales[i];
    const auto* idx = reinterpret_cast<const std::int64_t*>(from + slot.topkIdx());
    const auto* weights = reinterpret_cast<const float*>(from + slot.topkWeights());
    for (int k = me; k < d.topk; k += 32) {
      const std::int64_t expert = idx[k];
      const bool here = isExpert(d.experts, expert) && rankOfExpert(d.experts, expert) == r;
      target.topkIdx[at * d.topk + k] = here ? indexOfExpert(d.experts, expert) : -1;
      target.topkWeights[at * d.topk + k] = here ? weights[k] : 0.0f;
    }
    if (me == 0) target.sourceTokens[at] = token;
  }
  __device__ void placeAll(const char* from, const DispatchSlot& slot, int flow,
                           std::int32_t token) const {
    const auto* rows = reinterpret_cast<const std::int32_t*>(from + DispatchSlot::rows());
    const auto members = static_cast<int>(slot.members);
    for (int m = 0; m < members; ++m) {
      const std::int64_t row = std::int64_t{rows[m]} - targets[m].rowBegin;
      if (rows[m] >= 0 && row >= 0 && row < targets[m].rows) place(from, slot, m, row, token);
    }
    if (a.railRows == nullptr) return;
    std::int32_t* kept = a.railRows + (flow * a.railStride + token) * members;
    for (int m = static_cast<int>(laneId()); m < members; m += 32) kept[m] = rows[m];
  }
  /// Forwards what has come of an item, a chunk at most. False: it is not what was expected.
  __device__ bool forward(int flow, int lane) {
    const int peer = a.rails.in[flow].peer;
    const DispatchSlot slot = slotFor(a, a.rails.node);
    RailProgress& progress = progressOf(flow, lane);
    const std::uint64_t came = shuffle(tail, 0) - progress.slots;
    const std::uint64_t index = progress.index, slots = a.rails.plan.ringBytes / slot.bytes();
    const char* ring =
        railMemory<const char>(group(), a.rails.plan.ring(RailArea::dispatchReceive, flow, lane));
    const std::uint64_t most = slotsPerPut(slot.bytes(), slots);
    std::uint64_t n = 0;
    bool ended = false;
    while (n < came && n < most && !ended) {
      const char* from = ring + (index + n++) % slots * slot.bytes();
      const SlotHeader header = *reinterpret_cast<const SlotHeader*>(from);
      if (!checkSlot(group(), header, peer, epoch, a.dispatch.signature)) return false;
      ended = header.kind == SlotKind::end;
      if (!ended) placeAll(from, slot, flow, header.token);
    }
    syncWarp();  // all lanes have read the slots
    if (laneId() == 0) {
      progress.slots += n;
      progress.index = ended ? 0 : index + n;
      if (ended) progress.closed = launch;
      addRailWord(group(), a.rails, peer, railCounters(a.rails).dispatchCredit(lane), n);
    }
    return true;
  }
  __device__ void run() {
    while (true) {
      const int item =
          nextItem(group(), items, cursor, WaitWhat::railRows, a.rails.in, a.rails.words,
                   [&](int flow, int lane) { return stateOf(flow, lane); });
      if (item < 0 || !forward(items.flow(item), items.lane(item))) return;
    }
  }
};

/// Tells the sources of all flows into this node's rail where the node's ranks take rows. Called by
/// one warp. What an earlier launch put here has arrived: its sources have closed that launch
/// since.
__device__ inline void tellWindows(const RailDispatchArgs& a, const RecvTarget* targets,
                                   int members) {
  const GroupArgs& g = a.dispatch.group;
  auto* windows = railMemory<RailWindow>(g, a.rails.plan.ownWindows());
  for (int m = static_cast<int>(laneId()); m < members; m += 32) {
    windows[m] = {targets[m].rowBegin, targets[m].rows};
  }
  syncWarp();
  for (int f = static_cast<int>(laneId()); f < a.rails.ins; f += 32) {
    const RailFlow flow = a.rails.in[f];
    PortChannelDevice(a.rails.channels[flow.peer])
        .put(g.wait, railOffset(g, a.rails.plan.windows(flow.ring)),
             railOffset(g, a.rails.plan.ownWindows()),
             static_cast<std::uint64_t>(members) * sizeof(RailWindow));
    addRailWord(g, a.rails, flow.peer, RailCounters::windows(), 1);
  }
}

__device__ inline void railDispatchRoles(const RailDispatchArgs& a, const RecvTarget* targets,
                                         std::uint32_t epoch, std::uint64_t launch) {
  const RailArgs& rails = a.rails;
  const int warp = static_cast<int>(warpId()), grid = static_cast<int>(gridSize()),
            block = static_cast<int>(blockIndex()), lanes = rails.plan.lanes;
  if (warp >= kSendWarps) {
    if (block == 0 && warp == kSendWarps) tellWindows(a, targets, nodeSize(rails, rails.node));
    const RailItems items{rails.ins, lanes, (warp - kSendWarps) * grid + block,
                          kForwardWarps * grid};
    RailForwarder{a, targets, epoch, launch, items}.run();
    return;
  }
  const RailItems items{rails.outs, lanes, warp * grid + block, kSendWarps * grid};
  for (int i = 0; i < items.count(); ++i) {
    RailSender{a, epoch, launch, items.flow(i), items.lane(i)}.run();
  }
}

__device__ inline void railDispatchKernel(const RailDispatchArgs& a) {
  const DispatchArgs& d = a.dispatch;
  const GroupArgs& g = d.group;
  const int members = nodeSize(a.rails, a.rails.node);
  auto& shared = sharedStorage<RailShared>();
  RecvTarget* targets = railTargets(members);
  auto* words = railMemory<RailWords>(g, a.rails.plan.words());
  const Turn turn = currentTurn(g);
  const std::uint64_t launch = words->dispatches + 1;
  const int thread = static_cast<int>(threadIndex()), threads = static_cast<int>(blockSize());
  if (blockIndex() == 0 && !turn.broken) {
    for (int r = thread; r < g.ranks; r += threads) publishWindow(d, r, turn.epoch);
  }
  for (int m = thread; m < members; m += threads) {
    targets[m] = awaitTarget(d, ranksOfNode(a.rails, a.rails.node)[m], turn);
  }
  syncBlock();
  if (!turn.broken) railDispatchRoles(a, targets, turn.epoch, launch);
  leaveGroup(g, turn, WaitWhat::dispatchDone, shared.lastBlock);
  if (thread != 0 || shared.lastBlock == 0) return;
  words->dispatches = launch;
  if (d.rowLimit > 0) checkRowLimit(d);
}

}  // namespace mscclpp::ep::MSCCLPP_PLATFORM_NS
