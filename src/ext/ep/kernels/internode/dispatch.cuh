#pragma once

#include "../intranode/dispatch.cuh"
#include "dispatch_send.cuh"

/// dispatch between nodes: sending warps and forwarding warps. A forwarder never waits for one flow
/// alone, so that every sender's slots come free; a sender may.
namespace mscclpp::ep::MSCCLPP_PLATFORM_NS {

inline constexpr int kDispatchWarps = kSendWarps + kForwardWarps;

/// A block's shared memory: RailShared, targets [members of the own node], then what rows are moved
/// with.
struct RailDispatchView {
  int members;

  constexpr std::size_t targetsAt() const { return alignUp(sizeof(RailShared), 128); }
  constexpr std::size_t targetsBytes() const {
    return static_cast<std::size_t>(members) * sizeof(RecvTarget);
  }
  constexpr PipeLayout pipes() const { return {targetsAt() + targetsBytes(), kDispatchWarps, 1}; }
  __device__ RecvTarget* targets() const {
    return reinterpret_cast<RecvTarget*>(sharedBytes(targetsAt(), targetsBytes()));
  }
};

/// Writes tokens of other nodes' ranks into their final rows in this node. Lane 0 moves an item on;
/// nextItem() synchronises the warp.
struct RailForwarder {
  const RailDispatchArgs& a;
  const RecvTarget* targets;  ///< [members]
  RowPipe& pipe;
  OwnRows& own;
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
    tail = loadLocalAcquire(seenWord(group(), a.rails, a.rails.in[flow].peer,
                                     railCounters(a.rails).dispatchTail(lane)));
    return tail == progress.slots ? ItemState::stuck : ItemState::ready;
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
  /// The slots of lanes that have one, `first` + lane in the ring, go to all ranks that take them.
  __device__ void placeAll(bool has, const char* ring, std::uint64_t first,
                           const DispatchSlot& slot, int flow) {
    const auto members = static_cast<int>(slot.members);
    const std::uint64_t slots = a.rails.plan.ringBytes / slot.bytes();
    const auto slotOf = [&](int lane) {
      return ring + (first + static_cast<unsigned>(lane)) % slots * slot.bytes();
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
  /// Forwards what has come of an item, a slot per lane at most. False: it is not what was
  /// expected.
  __device__ bool forward(int flow, int lane) {
    const int peer = a.rails.in[flow].peer;
    const DispatchSlot slot = slotFor(a, a.rails.node);
    RailProgress& progress = progressOf(flow, lane);
    const std::uint64_t came = shuffle(tail, 0) - progress.slots;
    const std::uint64_t index = progress.index, slots = a.rails.plan.ringBytes / slot.bytes();
    const char* ring =
        railMemory<const char>(group(), a.rails.plan.ring(RailArea::dispatchReceive, flow, lane));
    const int most = pipe.jobsAtOnce;
    const int n = came < static_cast<std::uint64_t>(most) ? static_cast<int>(came) : most;
    const char* from = ring + (index + laneId()) % slots * slot.bytes();
    SlotHeader header{};
    if (static_cast<int>(laneId()) < n) header = *reinterpret_cast<const SlotHeader*>(from);
    const bool wrong = static_cast<int>(laneId()) < n &&
                       (header.epoch != epoch || header.signature != a.dispatch.signature);
    if (const unsigned votes = ballot(wrong); votes != 0) {
      if ((votes & lanesBelow()) == 0 && wrong) {
        reportSlot(group(), header, peer, epoch, a.dispatch.signature);
      }
      return false;
    }
    const bool ended = any(header.kind == SlotKind::end);  // the last slot of a launch
    placeAll(header.kind == SlotKind::row, ring, index, slot, flow);
    syncWarp();  // all lanes have read the slots
    if (laneId() == 0) {
      progress.slots += static_cast<unsigned>(n);
      progress.index = ended ? 0 : index + static_cast<unsigned>(n);
      if (ended) progress.closed = launch;
      addRailWord(group(), a.rails, peer, railCounters(a.rails).dispatchCredit(lane),
                  static_cast<unsigned>(n));
    }
    return true;
  }
  __device__ void run() {
    while (true) {
      const int item = nextItem(
          group(), items, cursor, WaitWhat::railRows, a.rails.in,
          [&](int flow, int lane) { return stateOf(flow, lane); }, [&] { return own.placeSome(); });
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

/// The first forwarding warp looks at the words, the others move rows.
__device__ inline void railDispatchRoles(const RailDispatchArgs& a, const RailDispatchView& v,
                                         std::uint32_t epoch, std::uint64_t launch) {
  const GroupArgs& g = a.dispatch.group;
  const DispatchArgs& d = a.dispatch;
  const RecvTarget* targets = v.targets();
  const RailArgs& rails = a.rails;
  const int warp = static_cast<int>(warpId()), grid = static_cast<int>(gridSize()),
            block = static_cast<int>(blockIndex()), lanes = rails.plan.lanes;
  if (warp == kSendWarps && block == 0) {
    const RailCounters counters = railCounters(rails);
    tellWindows(a, targets, nodeSize(rails, rails.node));
    RailWatch{g, rails}.run(static_cast<std::uint32_t>(kDispatchWarps * grid - 1),
                            WatchedWords{rails.out, rails.outs, RailCounters::windows(), 1},
                            WatchedWords{rails.out, rails.outs, counters.dispatchCredit(0), lanes},
                            WatchedWords{rails.in, rails.ins, counters.dispatchTail(0), lanes});
    return;
  }
  RowPipe pipe =
      RowPipe::of(g, v.pipes(), warp, d.rowBytes, a.partBytes, d.bulk && d.rowBytes % 16 == 0);
  OwnRows own{a, targets, pipe};
  if (warp >= kSendWarps) {
    const int worker = (warp - kSendWarps) * grid + block - 1;  // number 0 is the watch
    const RailItems items{rails.ins, lanes, worker, kForwardWarps * grid - 1};
    RailForwarder{a, targets, pipe, own, epoch, launch, items}.run();
  } else {
    const RailItems items{rails.outs, lanes, warp * grid + block, kSendWarps * grid};
    for (int i = 0; i < items.count(); ++i) {
      RailSender{a, pipe, own, epoch, launch, items.flow(i), items.lane(i)}.run();
    }
  }
  while (own.placeSome()) {
  }
  if (laneId() == 0) RowPipe::drain();
  leaveRole(g, rails);
}

__device__ inline void railDispatchKernel(const RailDispatchArgs& a) {
  const DispatchArgs& d = a.dispatch;
  const GroupArgs& g = d.group;
  const int members = nodeSize(a.rails, a.rails.node);
  auto& shared = sharedStorage<RailShared>();
  const RailDispatchView v{a.rails.plan.members};
  RecvTarget* targets = v.targets();
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
  if (d.rowLimit > 0) fillTail(d);
  if (!turn.broken) railDispatchRoles(a, v, turn.epoch, launch);
  leaveGroup(g, turn, WaitWhat::dispatchDone, shared.lastBlock);
  if (thread != 0 || shared.lastBlock == 0) return;
  words->dispatches = launch;
  words->warpsDone = 0;
  words->ownTurns = 0;
  if (d.rowLimit > 0) checkRowLimit(d);
}

}  // namespace mscclpp::ep::MSCCLPP_PLATFORM_NS
