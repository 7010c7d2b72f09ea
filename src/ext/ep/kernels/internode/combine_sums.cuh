#pragma once

#include "reduce.cuh"
#include "row_pipe.cuh"

/// The rail's side of a combine between nodes: a node's rows of a token are added in fp32, ranks in
/// ascending order, and one row goes home.
namespace mscclpp::ep::MSCCLPP_PLATFORM_NS {

#if MSCCLPP_PLATFORM_CUDA
/// Enough to make a proxy's work of a put small beside its copy.
inline constexpr std::uint64_t kLanePutBytes = 384 << 10;
#else
inline constexpr std::uint64_t kLanePutBytes = 1 << 10;
#endif

/// The sending end of a lane, used by one warp; its members are the same on all lanes. Slots are
/// filled in the ring of the own heap and put in runs to the same places of the peer's ring.
struct SendRing {
  const GroupArgs& g;
  const RailArgs& rails;
  int peer;
  std::uint64_t near, far;  ///< offsets of the rings in the heaps
  int tail;                 ///< word at the peer
  std::uint64_t slotBytes, slots;
  std::uint64_t base;     ///< slots before this launch
  std::uint64_t filled;   ///< of this launch
  std::uint64_t sent;     ///< of them
  std::uint64_t emptied;  ///< of them, as far as known
  std::uint64_t chunk;    ///< slots per put

  /// Free slots that lie together, up to `most` and half a ring per put; there is one at least.
  __device__ int open(int most) const {
    const std::uint64_t free = slots - (filled - emptied), straight = slots - filled % slots;
    const std::uint64_t waiting = filled - sent, half = slots / 2;
    const std::uint64_t run = half > waiting ? half - waiting : 1;
    std::uint64_t n = free < straight ? free : straight;
    if (n > run) n = run;
    return n < static_cast<std::uint64_t>(most) ? static_cast<int>(n) : most;
  }
  /// The i-th of the slots that are open.
  __device__ char* slot(int i) const {
    return g.heaps[g.rank] + near + (filled + static_cast<std::uint64_t>(i)) % slots * slotBytes;
  }
  /// The first `n` of them are full.
  __device__ void close(int n) {
    filled += static_cast<std::uint64_t>(n);
    if (filled % slots == 0) flush();
  }
  /// Puts what was filled, after a syncWarp(): lane 0 sends what all lanes have written.
  __device__ void flush() {
    if (sent == filled) return;
    if (laneId() == 0) {
      bulkWait<0>();  // and what its own bulk stores write
      const std::uint64_t at = sent % slots * slotBytes, n = filled - sent;
      PortChannelDevice(rails.channels[peer])
          .putThenAdd(g.wait, far + at, near + at, n * slotBytes,
                      railAdd(g, rails, tail, static_cast<std::int64_t>(n)));
    }
    sent = filled;
  }
};

/// A warp that serves flows in turn: none of them can hold up another. Lane 0 moves an item on;
/// nextItem() synchronises the warp.
struct SumSender {
  const RailCombineArgs& a;
  const NodeSource* sources;  ///< [members]
  RowPipe& pipe;
  std::uint32_t epoch;
  std::uint64_t launch;
  RailItems items;
  int cursor = 0;
  std::uint64_t credit = 0;  ///< lane 0: of the item in hand

  __device__ const GroupArgs& group() const { return a.combine.group; }
  __device__ std::uint64_t slots() const { return a.rails.plan.ringBytes / a.slot.bytes(); }
  __device__ RailProgress& progressOf(int flow, int lane) const {
    return *railMemory<RailProgress>(group(), a.rails.plan.progress(flow, lane));
  }
  __device__ std::uint64_t chunk() const {
    return slotsPerRun(kLanePutBytes / a.slot.bytes(), slots());
  }
  /// Ready: there is room for a put; for the first slot of a launch, in an empty ring.
  __device__ ItemState stateOf(int flow, int lane) {
    const RailProgress& progress = progressOf(flow, lane);
    if (progress.closed == launch) return ItemState::finished;
    credit = loadLocalAcquire(seenWord(group(), a.rails, a.rails.in[flow].peer,
                                       railCounters(a.rails).combineCredit(lane)));
    const std::uint64_t inFlight = progress.slots - credit;
    const bool room = progress.index == 0 ? inFlight == 0 : inFlight <= slots() - chunk();
    return room ? ItemState::ready : ItemState::stuck;
  }

  __device__ const std::int32_t* rowsOf(int flow, std::int64_t token, int members) const {
    return a.railRows + (flow * a.railStride + token) * members;
  }
  __device__ bool isHere(int flow, std::int64_t token, int members) const {
    const std::int32_t* rows = rowsOf(flow, token, members);
    for (int m = 0; m < members; ++m) {
      if (rows[m] >= 0) return true;
    }
    return false;
  }
  /// A lane makes its token's slot, but for the weights.
  __device__ void begin(char* to, int job, int flow, std::int64_t token, int members) const {
    const CombineArgs& c = a.combine;
    const int home = a.rails.in[flow].peer;
    const std::int32_t* rows = rowsOf(flow, token, members);
    *reinterpret_cast<SlotHeader*>(to) = {epoch, SlotKind::row, static_cast<std::int32_t>(token), 0,
                                          c.signature};
    pipe.jobs[job] = {to + SumSlot::x(), static_cast<std::int32_t>(token), 0, 0};
    for (int m = 0; m < members; ++m) {
      if (rows[m] < 0 || sources[m].heap == nullptr) continue;
      pipe.jobs.append(job, rowOf(c, sources[m], home, rows[m]));
    }
  }
  /// The weights of `n` tokens, whose loads are under way together.
  __device__ void addWeights(int n, int flow, int members) const {
    const CombineArgs& c = a.combine;
    const int home = a.rails.in[flow].peer;
#pragma unroll 2
    for (int i = static_cast<int>(laneId()); i < n * c.topk; i += 32) {
      const int j = i / c.topk, k = i - j * c.topk;
      const std::int32_t* rows = rowsOf(flow, pipe.jobs[j].tag, members);
      float total = 0.0f;
      for (int m = 0; m < members; ++m) {
        if (rows[m] < 0 || sources[m].heap == nullptr) continue;
        total += weightsOf(c, sources[m], home, rows[m])[k];
      }
      char* const slot = pipe.jobs[j].to - SumSlot::x();
      reinterpret_cast<float*>(slot + a.slot.weights())[k] = total;
    }
  }

  __device__ SendRing ringOf(int flow, int lane, const RailProgress& progress) const {
    const RailFlow& to = a.rails.in[flow];
    const RailPlan& plan = a.rails.plan;
    const RailCounters counters = railCounters(a.rails);
    const std::uint64_t base = progress.slots - progress.index;
    return {.g = group(),
            .rails = a.rails,
            .peer = to.peer,
            .near = railOffset(group(), plan.ring(RailArea::combineSend, flow, lane)),
            .far = railOffset(group(), plan.ring(RailArea::combineReceive, to.ring, lane)),
            .tail = counters.combineTail(lane),
            .slotBytes = a.slot.bytes(),
            .slots = slots(),
            .base = base,
            .filled = progress.index,
            .sent = progress.index,
            .emptied = shuffle(credit, 0) - base,
            .chunk = chunk()};
  }
  /// Sends as many sums of an item as there is room for, a chunk at most.
  __device__ void send(int flow, int lane) {
    const CombineArgs& c = a.combine;
    const int members = nodeSize(a.rails, a.rails.node);
    RailProgress& progress = progressOf(flow, lane);
    SendRing ring = ringOf(flow, lane, progress);
    const std::int64_t known = a.railTokens[flow], end = known < c.tokenEnd ? known : c.tokenEnd;
    const LaneTokens tokens{lane, a.rails.plan.lanes};
    const auto first = static_cast<std::uint64_t>(tokens.firstFrom(c.tokenBegin));
    auto i = static_cast<std::int64_t>(progress.cursor > first ? progress.cursor : first);
    std::uint64_t room = ring.slots - (ring.filled - ring.emptied);
    if (room > ring.chunk) room = ring.chunk;
    while (room > 0 && tokens.at(i) < end) {
      const std::int64_t mine = tokens.at(i + laneId());
      unsigned left = ballot(mine >= c.tokenBegin && mine < end && isHere(flow, mine, members));
      while (left != 0 && room > 0) {
        const int job = popCount(left & lanesBelow()), waiting = popCount(left);
        const int fit = room < static_cast<std::uint64_t>(pipe.jobsAtOnce) ? static_cast<int>(room)
                                                                           : pipe.jobsAtOnce;
        const int n = ring.open(waiting < fit ? waiting : fit);  // at least 1: there is room
        const bool taken = (left >> laneId() & 1u) != 0 && job < n;
        if (taken) begin(ring.slot(job), job, flow, mine, members);
        syncWarp();
        addWeights(n, flow, members);
        pipe.run(n);
        ring.close(n);
        room -= static_cast<unsigned>(n);
        left &= ~ballot(taken);
      }
      i += left != 0 ? findFirstSet(left) - 1 : 32;
    }
    ring.flush();
    const bool ended = tokens.at(i) >= end;
    syncWarp();  // every lane has read `progress`
    if (laneId() == 0) {
      progress.slots = ring.base + ring.filled;
      progress.index = ended ? 0 : ring.filled;
      progress.cursor = ended ? 0 : static_cast<std::uint64_t>(i);
      if (ended) progress.closed = launch;
    }
  }
  __device__ void run() {
    while (true) {
      const int item = nextItem(group(), items, cursor, WaitWhat::railSumRoom, a.rails.in,
                                [&](int flow, int lane) { return stateOf(flow, lane); });
      if (item < 0) return;
      send(items.flow(item), items.lane(item));
    }
  }
};

}  // namespace mscclpp::ep::MSCCLPP_PLATFORM_NS
