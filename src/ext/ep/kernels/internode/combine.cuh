#pragma once

#include "combine_sums.cuh"

/// combine between nodes: warps that send sums to other nodes, and a team of warps per block that
/// adds up this rank's own tokens: biases, the own node's rows, the other nodes' sums in ascending
/// order, all in fp32.
namespace mscclpp::ep::MSCCLPP_PLATFORM_NS {

/// A block's shared memory: RailShared, sources [members], then per warp a list of terms
/// [members + outs], per home warp what it knows of the flows, and the credits that the team owes.
struct RailCombineView {
  int members, outs;

  /// What a home warp knows of a flow.
  struct Flow {
    std::uint64_t before;  ///< slots of this launch before the tokens in hand
    std::uint32_t here;    ///< which of the 32 tokens in hand have a slot
    std::uint32_t owed;    ///< the team's first warp: emptied and not told yet
    std::uint64_t came;    ///< slots that were seen to have come, ever
  };
  constexpr std::size_t sourcesAt() const { return alignUp(sizeof(RailShared), 128); }
  constexpr std::size_t listsAt() const {
    return alignUp(sourcesAt() + static_cast<std::size_t>(members) * sizeof(NodeSource), 128);
  }
  constexpr std::size_t listBytes() const {
    return static_cast<std::size_t>(members + outs) * sizeof(const char*);
  }
  constexpr std::size_t flowsAt() const {
    return alignUp(listsAt() + (kSumWarps + kHomeWarps) * listBytes(), 128);
  }
  constexpr std::size_t flowsBytes() const { return static_cast<std::size_t>(outs) * sizeof(Flow); }
  constexpr std::size_t total() const { return flowsAt() + kHomeWarps * flowsBytes(); }

  __device__ NodeSource* sources() const {
    return reinterpret_cast<NodeSource*>(
        sharedBytes(sourcesAt(), static_cast<std::size_t>(members) * sizeof(NodeSource)));
  }
  __device__ TermList list(int warp) const {
    return {reinterpret_cast<const char**>(
        sharedBytes(listsAt() + static_cast<std::size_t>(warp) * listBytes(), listBytes()))};
  }
  __device__ Flow* flows(int homeWarp) const {
    return reinterpret_cast<Flow*>(
        sharedBytes(flowsAt() + static_cast<std::size_t>(homeWarp) * flowsBytes(), flowsBytes()));
  }
};

/// One warp of the team that serves a lane. Each takes every kHomeWarps-th token; slots are given
/// back when all have finished theirs.
struct HomeWarp {
  const RailCombineArgs& a;
  const NodeSource* sources;
  TermList list;
  RailCombineView::Flow* flows;  ///< [outs], this warp's
  std::uint32_t epoch;
  int warp;  ///< of the team
  int lane;

  __device__ const GroupArgs& group() const { return a.combine.group; }
  __device__ std::uint64_t slots() const { return a.rails.plan.ringBytes / a.slot.bytes(); }
  __device__ RailProgress& progressOf(int flow) const {
    return railProgress(group(), a.rails, RailArea::combineReceive, flow, lane);
  }
  __device__ std::int32_t positionAt(std::int64_t token, int r) const {
    return a.combine.position[static_cast<std::size_t>(token) * group().ranks + r];
  }
  __device__ bool isIn(std::int64_t token, int node) const {
    const std::int32_t* ranks = ranksOfNode(a.rails, node);
    for (int m = 0; m < nodeSize(a.rails, node); ++m) {
      if (positionAt(token, ranks[m]) >= 0) return true;
    }
    return false;
  }

  /// The slot of token number `bit` in hand in a flow, once it is there. Null: it did not come.
  __device__ const char* awaitSlot(int flow, std::int64_t token, int bit) const {
    const RailFlow& from = a.rails.out[flow];
    RailCombineView::Flow& known = flows[flow];
    const std::uint64_t index =
        known.before + static_cast<std::uint64_t>(popCount(known.here & ((1u << bit) - 1)));
    const std::uint64_t needed = progressOf(flow).slots + index + 1;
    const int tail = railCounters(a.rails).combineTail(lane);
    if (known.came < needed) {
      known.came = awaitRailWord(group(), a.rails, from.peer, tail, needed, WaitWhat::railSums);
      if (known.came == 0) {
        giveUp(group());
        return nullptr;
      }
    }
    const char* slot =
        railMemory<const char>(group(), a.rails.plan.ring(RailArea::combineReceive, flow, lane)) +
        index % slots() * a.slot.bytes();
    const SlotHeader header = *reinterpret_cast<const SlotHeader*>(slot);
    const bool right =
        header.epoch == epoch && header.token == token && header.signature == a.combine.signature;
    if (right) return slot;
    if (header.epoch == epoch && header.signature != a.combine.signature) {
      reportFailure(group().wait, waitPoint(WaitWhat::shapeMismatch, from.peer),
                    a.combine.signature, header.signature);
    } else {
      reportFailure(group().wait, waitPoint(WaitWhat::railProtocol, from.peer), epoch,
                    header.epoch);
    }
    giveUp(group());
    return nullptr;
  }
  __device__ void sumWeights(std::int64_t token, int local) const {
    const CombineArgs& c = a.combine;
    const std::int32_t* ranks = ranksOfNode(a.rails, a.rails.node);
    for (int k = static_cast<int>(laneId()); k < c.topk; k += 32) {
      float sum = 0.0f;
      for (int m = 0; m < nodeSize(a.rails, a.rails.node); ++m) {
        const std::int32_t position = positionAt(token, ranks[m]);
        if (position < 0 || sources[m].heap == nullptr) continue;
        sum += weightsOf(c, sources[m], group().rank, c.sendStart[ranks[m]] + position)[k];
      }
      for (int j = local; j < list.count; ++j) {
        const char* slot = list.terms[j] - SumSlot::x();
        sum += reinterpret_cast<const float*>(slot + a.slot.weights())[k];
      }
      c.outWeights[token * c.topk + k] = sum;
    }
  }
  __device__ void addToken(std::int64_t token, int bit) {
    const CombineArgs& c = a.combine;
    const int me = static_cast<int>(laneId()), members = nodeSize(a.rails, a.rails.node);
    const std::int32_t* ranks = ranksOfNode(a.rails, a.rails.node);
    list.count = 0;
    for (int base = 0; base < members; base += 32) {
      const int m = base + me;
      const std::int32_t position = m < members ? positionAt(token, ranks[m]) : -1;
      const bool has = position >= 0 && sources[m].heap != nullptr;
      list.append(has ? rowOf(c, sources[m], group().rank, c.sendStart[ranks[m]] + position)
                      : nullptr);
    }
    const int local = list.count;
    for (int base = 0; base < a.rails.outs; base += 32) {
      const int f = base + me;
      const bool has = f < a.rails.outs && (flows[f].here >> bit & 1u) != 0;
      const char* slot = has ? awaitSlot(f, token, bit) : nullptr;
      list.append(slot ? slot + SumSlot::x() : nullptr);
    }
    syncWarp();  // what one lane has waited for is there for all
    const std::size_t at = static_cast<std::size_t>(token) * c.rowBytes;
    if (c.outWeights) sumWeights(token, local);
    addRows(list, c.bias0 ? c.bias0 + at : nullptr, c.bias1 ? c.bias1 + at : nullptr, c.out + at,
            c.rowBytes);
  }

  /// Finds out which of 32 tokens have a slot in which flow. Returns a bit per token that has any.
  __device__ std::uint32_t lookUp(std::int64_t token, bool valid) {
    std::uint32_t any = 0;
    for (int f = 0; f < a.rails.outs; ++f) {
      const std::uint32_t here = ballot(valid && isIn(token, a.rails.out[f].node));
      if (laneId() == 0) {
        flows[f].before += static_cast<std::uint64_t>(popCount(flows[f].here));
        flows[f].here = here;
      }
      any |= here;
    }
    syncWarp();
    return any;
  }
  /// Gives the slots of the step's tokens back, in batches that leave the rail room to go on.
  __device__ void giveBack(std::uint32_t step, bool all) {
    const std::uint64_t batch = creditBatch(slots());
    for (int f = static_cast<int>(laneId()); f < a.rails.outs; f += 32) {
      flows[f].owed += static_cast<std::uint32_t>(popCount(flows[f].here & step));
      if (flows[f].owed == 0 || (!all && flows[f].owed < batch)) continue;
      addRailWord(group(), a.rails, a.rails.out[f].peer, railCounters(a.rails).combineCredit(lane),
                  flows[f].owed);
      flows[f].owed = 0;
    }
  }
  __device__ void syncTeam() const { syncBarrier(1, kHomeWarps * 32); }

  __device__ void run() {
    const CombineArgs& c = a.combine;
    const LaneTokens tokens{lane, a.rails.plan.lanes};
    const std::int64_t end = c.tokens < c.tokenEnd ? c.tokens : c.tokenEnd;
    for (int f = static_cast<int>(laneId()); f < a.rails.outs; f += 32) flows[f] = {};
    syncWarp();
    constexpr std::uint32_t kStep = (1u << kHomeWarps) - 1;
    for (std::int64_t i = tokens.firstFrom(c.tokenBegin); tokens.at(i) < end; i += 32) {
      const std::int64_t mine = tokens.at(i + laneId());
      const std::uint32_t any = lookUp(mine, mine >= c.tokenBegin && mine < end);
      for (int first = 0; first < 32; first += kHomeWarps) {
        const int bit = first + warp;
        const std::int64_t token = tokens.at(i + bit);
        if (token >= c.tokenBegin && token < end) addToken(token, bit);
        if ((any >> first & kStep) == 0) continue;
        syncTeam();
        if (warp == 0) giveBack(kStep << first, false);
      }
      syncWarp();  // `here` is rewritten
    }
    syncTeam();
    if (warp != 0) return;
    giveBack(0, true);
    for (int f = static_cast<int>(laneId()); f < a.rails.outs; f += 32) {
      progressOf(f).slots += flows[f].before + static_cast<unsigned>(popCount(flows[f].here));
    }
  }
};

__device__ inline void publishOutput(const CombineArgs& c, int peer, std::uint32_t epoch) {
  EntryPacket packet{};
  packet.signature = c.signature;
  packet.staged = c.staged ? 1 : 0;
  packet.base = c.heapOffset;
  publishEntry(c.group, peer, packet, epoch);
}

__device__ inline void railCombineKernel(const RailCombineArgs& a) {
  const CombineArgs& c = a.combine;
  const GroupArgs& g = c.group;
  const RailCombineView v{nodeSize(a.rails, a.rails.node), a.rails.outs};
  auto& shared = sharedStorage<RailShared>();
  auto* words = railMemory<RailWords>(g, a.rails.plan.words());
  const Turn turn = currentTurn(g);
  const std::uint64_t launch = words->combines + 1;
  const int thread = static_cast<int>(threadIndex()), threads = static_cast<int>(blockSize());
  if (blockIndex() == 0 && !turn.broken) {
    for (int r = thread; r < g.ranks; r += threads) publishOutput(c, r, turn.epoch);
  }
  for (int m = thread; m < v.members; m += threads) {
    v.sources()[m] = awaitSource(c, a.rails, ranksOfNode(a.rails, a.rails.node)[m], turn);
  }
  syncBlock();
  const int warp = static_cast<int>(warpId()), grid = static_cast<int>(gridSize()),
            block = static_cast<int>(blockIndex());
  if (!turn.broken && warp < kSumWarps) {
    const RailItems items{a.rails.ins, a.rails.plan.lanes, warp * grid + block, kSumWarps * grid};
    SumSender{a, v.sources(), v.list(warp), turn.epoch, launch, items}.run();
  } else if (!turn.broken) {
    const int home = warp - kSumWarps;
    for (int lane = block; lane < a.rails.plan.lanes; lane += grid) {
      HomeWarp{a, v.sources(), v.list(warp), v.flows(home), turn.epoch, home, lane}.run();
    }
  }
  leaveGroup(g, turn, WaitWhat::combineDone, shared.lastBlock);
  if (thread == 0 && shared.lastBlock != 0) words->combines = launch;
}

}  // namespace mscclpp::ep::MSCCLPP_PLATFORM_NS
