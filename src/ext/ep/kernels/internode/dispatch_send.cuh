#pragma once

#include "dispatch_forward.cuh"

/// The sending side of a dispatch between nodes: tokens with a row in another node are packed and
/// go to this rank's rail there, once.
namespace mscclpp::ep::MSCCLPP_PLATFORM_NS {

/// Warps take a flow's tokens in groups and slots as they need them, so that slots are in no order;
/// RunProgress::next counts taken slots and, above them, groups that need no more: the warp of the
/// last group appends the end mark.
struct RailSender {
  const RailDispatchArgs& a;
  RowPipe& pipe;
  RailForwarder& forwarder;  ///< goes on while there is no room
  std::uint32_t epoch;
  std::uint64_t launch;
  int cursor;     ///< lane 0: the flow that is looked at first
  int late = -1;  ///< lane 0: a flow whose rail has not said where its node takes rows

  __device__ const GroupArgs& group() const { return a.dispatch.group; }
  __device__ std::uint32_t groups() const {
    const auto n = static_cast<std::uint32_t>((a.dispatch.tokens + kTurnTokens - 1) / kTurnTokens);
    return n > 0 ? n : 1;  // somebody sends the end mark
  }

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
    moveWords(
        n, d.scaleCount,
        [&](int j, int at) {
          return *reinterpret_cast<const std::uint32_t*>(scaleAt(d, pipe.jobs[j].tag, at));
        },
        [&](int j, int at, std::uint32_t value) {
          reinterpret_cast<std::uint32_t*>(slotOf(j) + slot.scales())[at] = value;
        });
#pragma unroll 2
    for (int i = static_cast<int>(laneId()); i < n * d.topk; i += 32) {
      const int j = i / d.topk, k = i - j * d.topk;
      const std::size_t from = static_cast<std::size_t>(pipe.jobs[j].tag) * d.topk + k;
      reinterpret_cast<std::int64_t*>(slotOf(j) + slot.topkIdx())[k] = d.topkIdx[from];
      reinterpret_cast<float*>(slotOf(j) + slot.topkWeights())[k] = d.topkWeights[from];
    }
  }

  __device__ RunProgress& progressOf(int flow) const {
    return *railMemory<RunProgress>(group(),
                                    a.rails.plan.runProgress(RailArea::dispatchSend, flow));
  }
  /// Lane 0: whether the rail has said where its node takes rows. It has emptied the ring then: its
  /// words come in order, and it had to before it could begin this launch.
  __device__ bool windowsCame(int flow) const {
    return loadLocalAcquire(seenWord(group(), a.rails, a.rails.out[flow].peer,
                                     RailCounters::windows())) >= launch;
  }
  /// Lane 0: a flow with groups that nobody has taken, or kNoItemReady, or kNoItemLeft.
  __device__ int ready() {
    const int flows = a.rails.outs;
    late = -1;
    for (int i = 0; i < flows; ++i) {
      const int f = cursor + i < flows ? cursor + i : cursor + i - flows;
      if (loadRelaxed(&progressOf(f).turns) >= groups()) continue;
      if (!windowsCame(f)) {
        if (late < 0) late = f;
        continue;
      }
      cursor = f;
      return f;
    }
    return late < 0 ? kNoItemLeft : kNoItemReady;
  }

  /// Waits until the peer has emptied all but a ring of the launch's first `slots`, and forwards
  /// meanwhile: peers may be waiting for that. False: it did not in time.
  __device__ bool awaitRoom(const RunRing& ring, const RailFlow& flow, std::uint64_t slots) const {
    const std::uint64_t* const credit =
        seenWord(group(), a.rails, flow.peer, RailCounters::dispatchCredit());
    while (slots > ring.slots()) {  // else the ring has not been filled once
      bool room = false, came = true;
      int other = kNoItemReady;
      if (laneId() == 0) {
        const auto look = [&] {
          room = slots - (loadLocalAcquire(credit) - ring.progress.slots) <= ring.slots();
          if (!room) other = forwarder.ready();
          return room || other >= 0;
        };
        came = waitUntil(group().wait, look, waitPoint(WaitWhat::railRoom, flow.peer), credit);
      }
      came = shuffle(came, 0);
      room = shuffle(room, 0);
      other = shuffle(other, 0);
      syncWarp();  // what the peer has read may be overwritten, and what came read, by all lanes
      if (room) return true;
      if (!came || !forwarder.forward(other)) return false;
    }
    return true;
  }
  /// Puts runs that are complete.
  __device__ auto putTo(const RunRing& ring, const RailFlow& flow) const {
    return [&ring, &flow, this](std::uint64_t begin, std::uint64_t end) {
      const std::uint64_t at = ring.at(begin), slots = end - begin;
      const std::uint64_t far =
          railOffset(group(), a.rails.plan.ring(RailArea::dispatchReceive, flow.ring, 0));
      PortChannelDevice(a.rails.channels[flow.peer])
          .putThenAdd(group().wait, far + at, ring.offset + at, slots * ring.slotBytes,
                      railAdd(group(), a.rails, RailCounters::dispatchTail(),
                              static_cast<std::int64_t>(slots)));
    };
  }
  /// The end mark, behind all other slots.
  __device__ bool sendEnd(const RunRing& ring, const RailFlow& flow, std::uint64_t slot) const {
    if (!awaitRoom(ring, flow, slot + 1)) return false;
    if (laneId() == 0) {
      *reinterpret_cast<SlotHeader*>(ring.memory + ring.at(slot)) = header(SlotKind::end, -1);
      ring.marks.finish(slot, 1, putTo(ring, flow));
      ring.marks.close(slot + 1, putTo(ring, flow));
    }
    return true;
  }
  /// A group of tokens of the flow that ready() found, after a syncWarp(). False: the rail did not
  /// come in time.
  __device__ bool send(int flowIndex) const {
    const RailFlow flow = a.rails.out[flowIndex];
    const DispatchSlot slot = slotFor(a, flow.node);
    const RunRing ring =
        RunRing::of(group(), a.rails.plan, RailArea::dispatchSend, flowIndex, slot.bytes());
    const std::int32_t* ranks = ranksOfNode(a.rails, flow.node);
    const auto* windows = railMemory<const RailWindow>(group(), a.rails.plan.windows(flowIndex));
    std::uint32_t number = 0;
    if (laneId() == 0) number = fetchAddLocalRelaxed(&ring.progress.turns, 1u);
    number = shuffle(number, 0);
    if (number >= groups()) return true;  // others were quicker
    const std::int64_t mine = std::int64_t{number} * kTurnTokens + laneId();
    unsigned left = ballot(laneId() < kTurnTokens && mine < a.dispatch.tokens &&
                           goes(mine, ranks, static_cast<int>(slot.members), windows));
    std::uint64_t most = static_cast<unsigned>(pipe.jobsAtOnce);
    if (most > ring.marks.runSlots) most = ring.marks.runSlots;
    while (true) {
      const auto waiting = static_cast<unsigned>(popCount(left));
      const std::uint64_t n = waiting < most ? waiting : most;
      const bool groupEnds = n == waiting;
      SlotsAndTurns before;
      if (laneId() == 0) {
        before.word =
            fetchAddLocalRelaxed(&ring.progress.next, SlotsAndTurns::of(n, groupEnds ? 1 : 0));
      }
      before.word = shuffle(before.word, 0);
      const std::uint64_t first = before.slots();
      if (n > 0 && !awaitRoom(ring, flow, first + n)) return false;
      const int job = popCount(left & lanesBelow());
      const bool taken = (left >> laneId() & 1u) != 0 && static_cast<unsigned>(job) < n;
      if (taken) {
        begin(ring.memory + ring.at(first + static_cast<unsigned>(job)), job, slot, mine, ranks);
      }
      syncWarp();
      if (n > 0) {
        packRest(static_cast<int>(n), slot);
        pipe.copy(static_cast<int>(n));
        if (laneId() == 0) {
          bulkWait<0>();  // its own stores have written the rows
          ring.marks.finish(first, n, putTo(ring, flow));
        }
      }
      if (groupEnds) {
        return before.turns() + 1 != groups() || sendEnd(ring, flow, first + n);
      }
      left &= ~ballot(taken);
    }
  }
};

}  // namespace mscclpp::ep::MSCCLPP_PLATFORM_NS
