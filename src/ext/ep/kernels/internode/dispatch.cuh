#pragma once

#include "../intranode/dispatch.cuh"
#include "dispatch_send.cuh"

/// dispatch between nodes: every warp sends, forwards and writes rows of the own node.
namespace mscclpp::ep::MSCCLPP_PLATFORM_NS {

/// A block's shared memory: RailShared, targets [members of the own node], where its warps are in
/// every flow, then what rows are moved with.
struct RailDispatchView {
  int members, ins;

  constexpr std::size_t targetsAt() const { return alignUp(sizeof(RailShared), 128); }
  constexpr std::size_t targetsBytes() const {
    return static_cast<std::size_t>(members) * sizeof(RecvTarget);
  }
  constexpr std::size_t placesAt() const { return alignUp(targetsAt() + targetsBytes(), 128); }
  constexpr std::size_t placesBytes() const { return static_cast<std::size_t>(ins) * 8; }
  constexpr PipeLayout pipes() const {
    return {placesAt() + kDispatchWarps * placesBytes(), kDispatchWarps, 1};
  }
  __device__ RecvTarget* targets() const {
    return reinterpret_cast<RecvTarget*>(sharedBytes(targetsAt(), targetsBytes()));
  }
  __device__ std::uint64_t* places(int warp) const {
    return reinterpret_cast<std::uint64_t*>(
        sharedBytes(placesAt() + static_cast<std::size_t>(warp) * placesBytes(), placesBytes()));
  }
};

/// A warp's work, in this order: rows that came, so that peers get room; tokens for other nodes;
/// tokens for the own one. It waits for no flow alone: every sender's slots come free.
struct RailWorker {
  const RailDispatchArgs& a;
  RailForwarder& forwarder;
  RailSender& sender;
  OwnRows& own;
  int came = kNoItemReady;   ///< lane 0: flow to forward
  int going = kNoItemReady;  ///< lane 0: flow to send to

  /// Lane 0: whether there is something to do, or nothing will be any more.
  __device__ bool look() {
    came = forwarder.ready();
    if (came >= 0) return true;
    if (going != kNoItemLeft) going = sender.ready();
    return going >= 0 || (came == kNoItemLeft && going == kNoItemLeft);
  }
  /// Lane 0, after look(): a peer that is waited for.
  __device__ WaitPoint missing() const {
    if (sender.late >= 0) return waitPoint(WaitWhat::railWindows, a.rails.out[sender.late].peer);
    return waitPoint(WaitWhat::railRows, a.rails.in[forwarder.late].peer);
  }
  /// Until everything has gone and come. False: something did not.
  __device__ bool run() {
    forwarder.begin();
    while (true) {
      bool found = true;
      if (laneId() == 0) found = look();
      found = shuffle(found, 0);
      if (!found && own.placeSome()) continue;
      if (!found && laneId() == 0) {
        found = waitUntil(
            a.dispatch.group.wait, [&] { return look(); }, missing(), &came);
      }
      if (!shuffle(found, 0)) return false;
      const int from = shuffle(came, 0), to = shuffle(going, 0);
      syncWarp();  // what lane 0 has acquired is there for all
      if (from >= 0) {
        if (!forwarder.forward(from)) return false;
      } else if (to >= 0) {
        if (!sender.send(to)) return false;
      } else {
        return true;
      }
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
        .putThenAdd(g.wait, railOffset(g, a.rails.plan.windows(flow.ring)),
                    railOffset(g, a.rails.plan.ownWindows()),
                    static_cast<std::uint64_t>(members) * sizeof(RailWindow),
                    railAdd(g, a.rails, RailCounters::windows(), 1));
  }
}

/// One warp of the grid looks at the words, the others move rows.
__device__ inline void railDispatchRoles(const RailDispatchArgs& a, const RailDispatchView& v,
                                         std::uint32_t epoch, std::uint64_t launch) {
  const GroupArgs& g = a.dispatch.group;
  const DispatchArgs& d = a.dispatch;
  const RecvTarget* targets = v.targets();
  const RailArgs& rails = a.rails;
  const int warp = static_cast<int>(warpId()), grid = static_cast<int>(gridSize());
  const int worker = warp * grid + static_cast<int>(blockIndex()) - 1;
  const int workers = kDispatchWarps * grid - 1;
  if (worker < 0) {
    tellWindows(a, targets, nodeSize(rails, rails.node));
    RailWatch{g, rails}.run(static_cast<std::uint32_t>(workers),
                            WatchedWords{rails.out, rails.outs, RailCounters::windows(), 1},
                            WatchedWords{rails.out, rails.outs, RailCounters::dispatchCredit(), 1},
                            WatchedWords{rails.in, rails.ins, RailCounters::dispatchTail(), 1});
    return;
  }
  RowPipe pipe =
      RowPipe::of(g, v.pipes(), warp, d.rowBytes, a.partBytes, d.bulk && d.rowBytes % 16 == 0);
  OwnRows own{a, targets, pipe};
  RailForwarder forwarder{a, targets, pipe, epoch, launch, worker, workers, v.places(warp)};
  const int first = rails.outs > 0 ? worker % rails.outs : 0;  // not all at the same peer
  RailSender sender{a, pipe, forwarder, epoch, launch, first};
  if (!RailWorker{a, forwarder, sender, own}.run() && laneId() == 0) giveUp(g);
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
  const RailDispatchView v{a.rails.plan.members, a.rails.ins};
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
  if (shared.lastBlock == 0) return;
  closeRings(g, a.rails);
  if (thread != 0) return;
  words->dispatches = launch;
  words->warpsDone = 0;
  words->ownTurns = 0;
  if (d.rowLimit > 0) checkRowLimit(d);
}

}  // namespace mscclpp::ep::MSCCLPP_PLATFORM_NS
