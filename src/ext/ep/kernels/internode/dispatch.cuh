#pragma once

#include "../intranode/dispatch.cuh"
#include "dispatch_send.cuh"

/// dispatch between nodes: sending warps and forwarding warps. A forwarder never waits for one flow
/// alone, so that every sender's slots come free; a sender may.
namespace mscclpp::ep::MSCCLPP_PLATFORM_NS {

/// A block's shared memory: RailShared, targets [members of the own node], then what rows are moved
/// with.
struct RailDispatchView {
  int members;

  constexpr std::size_t targetsAt() const { return alignUp(sizeof(RailShared), 128); }
  constexpr std::size_t targetsBytes() const {
    return static_cast<std::size_t>(members) * sizeof(RecvTarget);
  }
  constexpr PipeLayout pipes() const {
    return {targetsAt() + targetsBytes(), kSendWarps + kForwardWarps, 1};
  }
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

  /// What one rank gets of the slots in hand: `from` is this lane's slot, or null, and `row` its
  /// row there.
  __device__ void place(const char* from, const DispatchSlot& slot, int member, std::int32_t row) {
    const DispatchArgs& d = a.dispatch;
    const RecvTarget& target = targets[member];
    const std::int64_t at = std::int64_t{row} - target.rowBegin;
    const bool taken = from != nullptr && row >= 0 && at >= 0 && at < target.rows;
    const unsigned votes = ballot(taken);
    if (votes == 0) return;
    if (taken) {
      const int job = popCount(votes & lanesBelow());
      pipe.jobs[job] = {target.x + static_cast<std::size_t>(at) * d.rowBytes,
                        static_cast<std::int32_t>(at), 0, 0};
      pipe.jobs.append(job, from + slot.x());
      target.sourceTokens[at] = reinterpret_cast<const SlotHeader*>(from)->token;
    }
    syncWarp();
    placeRest(popCount(votes), slot, target, ranksOfNode(a.rails, a.rails.node)[member]);
    pipe.run(popCount(votes));
  }
  /// Scales, indices and weights of `n` rows of rank `r`, whose loads are under way together.
  __device__ void placeRest(int n, const DispatchSlot& slot, const RecvTarget& target,
                            int r) const {
    const DispatchArgs& d = a.dispatch;
    const auto slotOf = [&](int j) { return pipe.jobs.term(j, 0) - slot.x(); };
    auto* scales = reinterpret_cast<std::uint32_t*>(target.scales);
#pragma unroll 2
    for (int i = static_cast<int>(laneId()); i < n * d.scaleCount; i += 32) {
      const int j = i / d.scaleCount, k = i - j * d.scaleCount;
      scales[static_cast<std::size_t>(pipe.jobs[j].tag) * d.scaleCount + k] =
          reinterpret_cast<const std::uint32_t*>(slotOf(j) + slot.scales())[k];
    }
#pragma unroll 2
    for (int i = static_cast<int>(laneId()); i < n * d.topk; i += 32) {
      const int j = i / d.topk, k = i - j * d.topk;
      const auto to = static_cast<std::size_t>(pipe.jobs[j].tag) * d.topk + k;
      const auto expert = reinterpret_cast<const std::int64_t*>(slotOf(j) + slot.topkIdx())[k];
      const float weight = reinterpret_cast<const float*>(slotOf(j) + slot.topkWeights())[k];
      const bool here = isExpert(d.experts, expert) && rankOfExpert(d.experts, expert) == r;
      target.topkIdx[to] = here ? indexOfExpert(d.experts, expert) : -1;
      target.topkWeights[to] = here ? weight : 0.0f;
    }
  }
  /// The slot of each lane that has one goes to all ranks that take it.
  __device__ void placeAll(const char* from, const DispatchSlot& slot, int flow) {
    const auto members = static_cast<int>(slot.members);
    const auto* rows = reinterpret_cast<const std::int32_t*>(from + DispatchSlot::rows());
    std::int32_t* kept = nullptr;
    if (from != nullptr && a.railRows != nullptr) {
      kept = a.railRows +
             (flow * a.railStride + reinterpret_cast<const SlotHeader*>(from)->token) * members;
    }
    for (int m = 0; m < members; ++m) {
      const std::int32_t row = from != nullptr ? rows[m] : -1;
      if (kept != nullptr) kept[m] = row;
      place(from, slot, m, row);
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
    placeAll(header.kind == SlotKind::row ? from : nullptr, slot, flow);
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

/// One warp per grid looks at the words, the others move rows.
__device__ inline void railDispatchRoles(const RailDispatchArgs& a, const RailDispatchView& v,
                                         std::uint32_t epoch, std::uint64_t launch) {
  const GroupArgs& g = a.dispatch.group;
  const DispatchArgs& d = a.dispatch;
  const RecvTarget* targets = v.targets();
  const RailArgs& rails = a.rails;
  const int warp = static_cast<int>(warpId()), grid = static_cast<int>(gridSize()),
            block = static_cast<int>(blockIndex()), lanes = rails.plan.lanes;
  constexpr int kWarps = kSendWarps + kForwardWarps;
  if (warp == kWarps) {
    const RailCounters counters = railCounters(rails);
    if (block != 0) return;
    RailWatch{g, rails}.run(static_cast<std::uint32_t>(kWarps * grid),
                            WatchedWords{rails.out, rails.outs, RailCounters::windows(), 1},
                            WatchedWords{rails.out, rails.outs, counters.dispatchCredit(0), lanes},
                            WatchedWords{rails.in, rails.ins, counters.dispatchTail(0), lanes});
    return;
  }
  RowPipe pipe =
      RowPipe::of(g, v.pipes(), warp, d.rowBytes, a.partBytes, d.bulk && d.rowBytes % 16 == 0);
  if (warp >= kSendWarps) {
    if (block == 0 && warp == kSendWarps) tellWindows(a, targets, nodeSize(rails, rails.node));
    const RailItems items{rails.ins, lanes, (warp - kSendWarps) * grid + block,
                          kForwardWarps * grid};
    RailForwarder{a, targets, pipe, epoch, launch, items}.run();
  } else {
    const RailItems items{rails.outs, lanes, warp * grid + block, kSendWarps * grid};
    for (int i = 0; i < items.count(); ++i) {
      RailSender{a, pipe, epoch, launch, items.flow(i), items.lane(i)}.run();
    }
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
  if (!turn.broken) railDispatchRoles(a, v, turn.epoch, launch);
  leaveGroup(g, turn, WaitWhat::dispatchDone, shared.lastBlock);
  if (thread != 0 || shared.lastBlock == 0) return;
  words->dispatches = launch;
  words->warpsDone = 0;
  if (d.rowLimit > 0) checkRowLimit(d);
}

}  // namespace mscclpp::ep::MSCCLPP_PLATFORM_NS
