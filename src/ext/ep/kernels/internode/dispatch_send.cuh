#pragma once

#include "dispatch_place.cuh"

/// The sending side of a dispatch between nodes: tokens with a row in another node are packed, in
/// token order, and go to this rank's rail there, once.
namespace mscclpp::ep::MSCCLPP_PLATFORM_NS {

__device__ __forceinline__ DispatchSlot slotFor(const RailDispatchArgs& a, int destinationNode) {
  DispatchSlot slot = a.slot;
  slot.members = static_cast<std::uint32_t>(nodeSize(a.rails, destinationNode));
  return slot;
}

/// One lane of one flow, by one warp.
struct RailSender {
  const RailDispatchArgs& a;
  RowPipe& pipe;
  OwnRows& own;
  std::uint32_t epoch;
  std::uint64_t launch;
  int flowIndex;
  int lane;

  __device__ const GroupArgs& group() const { return a.dispatch.group; }

  /// Where rank `r` wants the token: its row there, or -1.
  __device__ std::int32_t rowAt(std::int64_t token, int r) const {
    const std::int32_t position =
        a.dispatch.position[static_cast<std::size_t>(token) * group().ranks + r];
    return position < 0 ? -1 : a.dispatch.sendStart[r] + position;
  }
  /// Whether some rank of the node takes the token in this launch.
  __device__ bool goes(std::int64_t token, const std::int32_t* ranks, int members,
                       const RailWindow* windows) const {
    for (int m = 0; m < members; ++m) {
      const std::int64_t row = rowAt(token, ranks[m]);
      if (row >= 0 && row >= windows[m].rowBegin && row - windows[m].rowBegin < windows[m].rows) {
        return true;
      }
    }
    return false;
  }

  __device__ SlotHeader header(SlotKind kind, std::int64_t token) const {
    return {epoch, kind, static_cast<std::int32_t>(token), 0, a.dispatch.signature};
  }
  /// A lane makes its token's slot, but for what packRest() writes.
  __device__ void begin(char* to, int job, const DispatchSlot& slot, std::int64_t token,
                        const std::int32_t* ranks) const {
    const DispatchArgs& d = a.dispatch;
    *reinterpret_cast<SlotHeader*>(to) = header(SlotKind::row, token);
    auto* rows = reinterpret_cast<std::int32_t*>(to + DispatchSlot::rows());
    for (int m = 0; m < static_cast<int>(slot.members); ++m) rows[m] = rowAt(token, ranks[m]);
    pipe.jobs[job] = {to + slot.x(), static_cast<std::int32_t>(token), 0, 0};
    pipe.jobs.append(job, d.x + static_cast<std::size_t>(token) * d.rowBytes);
  }
  /// Scales, indices and weights of `n` tokens, whose loads are under way together.
  __device__ void packRest(int n, const DispatchSlot& slot) const {
    const DispatchArgs& d = a.dispatch;
    const auto slotOf = [&](int j) { return pipe.jobs[j].to - slot.x(); };
#pragma unroll 2
    for (int i = static_cast<int>(laneId()); i < n * d.scaleCount; i += 32) {
      const int j = i / d.scaleCount, at = i - j * d.scaleCount;
      reinterpret_cast<std::uint32_t*>(slotOf(j) + slot.scales())[at] =
          *reinterpret_cast<const std::uint32_t*>(scaleAt(d, pipe.jobs[j].tag, at));
    }
#pragma unroll 2
    for (int i = static_cast<int>(laneId()); i < n * d.topk; i += 32) {
      const int j = i / d.topk, k = i - j * d.topk;
      const std::size_t from = static_cast<std::size_t>(pipe.jobs[j].tag) * d.topk + k;
      reinterpret_cast<std::int64_t*>(slotOf(j) + slot.topkIdx())[k] = d.topkIdx[from];
      reinterpret_cast<float*>(slotOf(j) + slot.topkWeights())[k] = d.topkWeights[from];
    }
  }

  /// Waits until the rail has said where its node takes rows. It has emptied the ring then: its
  /// words come in order, and it had to before it could begin this launch.
  __device__ bool awaitWindows(const RailFlow& flow) const {
    const std::uint64_t* const told =
        seenWord(group(), a.rails, flow.peer, RailCounters::windows());
    bool came = false;
    do {
      if (laneId() == 0) came = loadLocalAcquire(told) >= launch;
      came = shuffle(came, 0);
    } while (!came && own.placeSome());
    if (!came && laneId() == 0) {
      came = awaitRailWord(group(), told, flow.peer, launch, WaitWhat::railWindows) != 0;
    }
    came = shuffle(came, 0);
    syncWarp();
    return came;
  }
  /// False: the rail did not come in time.
  __device__ bool sendAll(SendRing& ring, const DispatchSlot& slot, const RailFlow& flow) const {
    const std::int32_t* ranks = ranksOfNode(a.rails, flow.node);
    const auto* windows = railMemory<const RailWindow>(group(), a.rails.plan.windows(flowIndex));
    const LaneTokens tokens{lane, a.rails.plan.lanes};
    for (std::int64_t i = 0; tokens.at(i) < a.dispatch.tokens; i += 32) {
      const std::int64_t mine = tokens.at(i + laneId());
      const bool mineGoes =
          mine < a.dispatch.tokens && goes(mine, ranks, static_cast<int>(slot.members), windows);
      for (unsigned left = ballot(mineGoes); left != 0;) {
        const int waiting = popCount(left);
        const int most = waiting < pipe.jobsAtOnce ? waiting : pipe.jobsAtOnce;
        ring.pass();
        const int n = ring.open(most), job = popCount(left & lanesBelow());
        if (n == 0) return false;
        const bool taken = (left >> laneId() & 1u) != 0 && job < n;
        if (taken) begin(ring.slot(job), job, slot, mine, ranks);
        syncWarp();
        packRest(n, slot);
        pipe.run(n);
        ring.close(n);
        left &= ~ballot(taken);
      }
    }
    if (ring.open(1) == 0) return false;
    if (laneId() == 0) {
      *reinterpret_cast<SlotHeader*>(ring.slot(0)) = header(SlotKind::end, -1);
    }
    ++ring.filled;
    ring.flush(sizeof(SlotHeader));
    return true;
  }
  __device__ void run() const {
    const RailFlow flow = a.rails.out[flowIndex];
    const RailPlan& plan = a.rails.plan;
    const DispatchSlot slot = slotFor(a, flow.node);
    const RailCounters counters = railCounters(a.rails);
    RailProgress& progress =
        railProgress(group(), a.rails, RailArea::dispatchSend, flowIndex, lane);
    SendRing ring{.g = group(),
                  .rails = a.rails,
                  .peer = flow.peer,
                  .near = railOffset(group(), plan.ring(RailArea::dispatchSend, flowIndex, lane)),
                  .far = railOffset(group(), plan.ring(RailArea::dispatchReceive, flow.ring, lane)),
                  .credit = seenWord(group(), a.rails, flow.peer, counters.dispatchCredit(lane)),
                  .tail = counters.dispatchTail(lane),
                  .room = WaitWhat::railRoom,
                  .slotBytes = slot.bytes(),
                  .slots = plan.ringBytes / slot.bytes(),
                  .base = progress.slots,
                  .filled = 0,
                  .sent = 0,
                  .emptied = 0,
                  .chunk = slotsPerPut(slot.bytes(), plan.ringBytes / slot.bytes())};
    if (!awaitWindows(flow) || !sendAll(ring, slot, flow)) {
      if (laneId() == 0) giveUp(group());
      return;
    }
    // awaitWindows() synchronised: all lanes have read it.
    if (laneId() == 0) progress.slots += ring.filled;
  }
};

}  // namespace mscclpp::ep::MSCCLPP_PLATFORM_NS
