#pragma once

#include "combine_sums.cuh"
#include "run_ring.cuh"

/// combine between nodes: warps that send sums to other nodes, and warps that add up this rank's
/// own tokens: biases, the own node's rows, the other nodes' sums in ascending order, all in fp32.
namespace mscclpp::ep::MSCCLPP_PLATFORM_NS {

inline constexpr int kCombineWarps = kSumWarps + kHomeWarps;

/// A block's shared memory: RailShared, sources [members], per warp what it knows of the
/// flows, then what rows are moved with.
struct RailCombineView {
  int members, outs;

  /// What a warp knows of a flow when it adds up own tokens.
  struct Flow {
    std::uint64_t first;   ///< slots, ever, before this launch
    std::uint64_t before;  ///< before the tokens in hand
    std::uint64_t came;    ///< that were seen to have come
    std::uint32_t here;    ///< which of the tokens in hand have a slot
    std::uint32_t done;    ///< of their slots, those that are emptied
  };
  constexpr std::size_t sourcesAt() const { return alignUp(sizeof(RailShared), 128); }
  constexpr std::size_t flowsAt() const {
    return alignUp(sourcesAt() + static_cast<std::size_t>(members) * sizeof(NodeSource), 128);
  }
  constexpr std::size_t flowsBytes() const { return static_cast<std::size_t>(outs) * sizeof(Flow); }
  constexpr PipeLayout pipes() const {
    constexpr int kBiases = 2;
    return {flowsAt() + kCombineWarps * flowsBytes(), kCombineWarps, members + outs + kBiases};
  }

  __device__ NodeSource* sources() const {
    return reinterpret_cast<NodeSource*>(
        sharedBytes(sourcesAt(), static_cast<std::size_t>(members) * sizeof(NodeSource)));
  }
  __device__ Flow* flows(int warp) const {
    return reinterpret_cast<Flow*>(
        sharedBytes(flowsAt() + static_cast<std::size_t>(warp) * flowsBytes(), flowsBytes()));
  }
};

/// Adds up kLaneTokens tokens of a lane, a turn, as they get their slots. Turns are taken in order
/// and worked on side by side: each learns from the one before where its slots begin.
struct HomeTurn {
  const RailCombineArgs& a;
  const NodeSource* sources;
  RowPipe& pipe;
  RailCombineView::Flow* flows;  ///< [outs], this warp's
  std::uint32_t epoch;
  int lane;
  std::uint64_t turn;  ///< of the lane, in this launch
  std::int64_t firstToken;
  bool isLast;  ///< of the lane

  __device__ const GroupArgs& group() const { return a.combine.group; }
  __device__ std::uint64_t slots() const { return a.rails.plan.ringBytes / a.slot.bytes(); }
  __device__ HomeProgress& progressOf(int flow) const {
    return *railMemory<HomeProgress>(group(), a.rails.plan.homeProgress(flow, lane));
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

  /// This lane's token's number among the slots of a flow, ever.
  __device__ std::uint64_t numberOf(int flow) const {
    const RailCombineView::Flow& known = flows[flow];
    return known.before + static_cast<unsigned>(popCount(known.here & lanesBelow()));
  }
  __device__ bool hasSlot(int flow) const { return (flows[flow].here >> laneId() & 1u) != 0; }
  /// The first flow that this lane's token still waits for; -1: none.
  __device__ int missing() const {
    for (int f = 0; f < a.rails.outs; ++f) {
      if (hasSlot(f) && flows[f].came <= numberOf(f)) return f;
    }
    return -1;
  }
  __device__ const std::uint64_t* tailOf(int flow) const {
    return seenWord(group(), a.rails, a.rails.out[flow].peer,
                    railCounters(a.rails).combineTail(lane));
  }
  /// Which of the tokens in `left` come before one that waits for a slot. 0: none did in time.
  __device__ std::uint32_t awaitReady(std::uint32_t left) const {
    const std::uint32_t first = left & (~left + 1);
    const auto ready = [&] {
      const std::uint32_t waiting = ballot((left >> laneId() & 1u) != 0 && missing() >= 0);
      return left & ((waiting & (~waiting + 1)) - 1);
    };
    std::uint32_t now = ready();
    if ((now & first) == 0) {
      syncWarp();  // `came` was read
      for (int f = static_cast<int>(laneId()); f < a.rails.outs; f += 32) {
        flows[f].came = loadLocalAcquire(tailOf(f));
      }
      syncWarp();
      now = ready();
    }
    while ((now & first) == 0) {
      const int f = shuffle(missing(), findFirstSet(left) - 1);
      const std::uint64_t needed = shuffle(numberOf(f), findFirstSet(left) - 1) + 1;
      syncWarp();
      if (laneId() == 0) {
        flows[f].came =
            awaitRailWord(group(), tailOf(f), a.rails.out[f].peer, needed, WaitWhat::railSums);
      }
      syncWarp();
      if (flows[f].came == 0) return 0;
      now = ready();
    }
    return now;
  }
  __device__ const char* slotOf(int flow) const {
    const std::uint64_t index = numberOf(flow) - flows[flow].first;
    return railMemory<const char>(group(),
                                  a.rails.plan.ring(RailArea::combineReceive, flow, lane)) +
           index % slots() * a.slot.bytes();
  }

  /// A lane lists what its token is made of. False: a slot is not what was expected.
  __device__ bool begin(int job, std::int64_t token) const {
    const CombineArgs& c = a.combine;
    const std::size_t at = static_cast<std::size_t>(token) * c.rowBytes;
    const int members = nodeSize(a.rails, a.rails.node);
    const std::int32_t* ranks = ranksOfNode(a.rails, a.rails.node);
    pipe.jobs[job] = {c.out + at, static_cast<std::int32_t>(token), 0, 0};
    if (c.bias0) pipe.jobs.append(job, c.bias0 + at);
    if (c.bias1) pipe.jobs.append(job, c.bias1 + at);
    for (int m = 0; m < members; ++m) {
      const std::int32_t position = positionAt(token, ranks[m]);
      if (position < 0 || sources[m].heap == nullptr) continue;
      pipe.jobs.append(job, rowOf(c, sources[m], group().rank, c.sendStart[ranks[m]] + position));
    }
    pipe.jobs[job].maker = pipe.jobs[job].terms;  // terms from here on are slots
    for (int f = 0; f < a.rails.outs; ++f) {
      if (!hasSlot(f)) continue;
      const char* slot = slotOf(f);
      const SlotHeader header = *reinterpret_cast<const SlotHeader*>(slot);
      if (header.epoch != epoch || header.token != token || header.signature != c.signature) {
        reportSlot(group(), header, a.rails.out[f].peer, epoch, c.signature);
        return false;
      }
      pipe.jobs.append(job, slot + SumSlot::x());
    }
    return true;
  }
  /// The summed weights of `n` tokens, whose loads are under way together.
  __device__ void addWeights(int n) const {
    const CombineArgs& c = a.combine;
    const int members = nodeSize(a.rails, a.rails.node);
    const std::int32_t* ranks = ranksOfNode(a.rails, a.rails.node);
#pragma unroll 2
    for (int i = static_cast<int>(laneId()); i < n * c.topk; i += 32) {
      const int j = i / c.topk, k = i - j * c.topk;
      const RowJob& job = pipe.jobs[j];
      float sum = 0.0f;
      for (int m = 0; m < members; ++m) {
        const std::int32_t position = positionAt(job.tag, ranks[m]);
        if (position < 0 || sources[m].heap == nullptr) continue;
        sum += weightsOf(c, sources[m], group().rank, c.sendStart[ranks[m]] + position)[k];
      }
      for (int t = job.maker; t < job.terms; ++t) {
        const char* slot = pipe.jobs.term(j, t) - SumSlot::x();
        sum += reinterpret_cast<const float*>(slot + a.slot.weights())[k];
      }
      c.outWeights[static_cast<std::int64_t>(job.tag) * c.topk + k] = sum;
    }
  }

  /// Finds out which of the tokens in hand have a slot in which flow, and which slots these are.
  /// False: a turn before did not come so far.
  __device__ bool lookUp(std::int64_t token, bool valid) const {
    for (int f = 0; f < a.rails.outs; ++f) {
      const std::uint32_t here = ballot(valid && isIn(token, a.rails.out[f].node));
      if (laneId() == 0) flows[f] = {.first = 0, .before = 0, .came = 0, .here = here, .done = 0};
    }
    syncWarp();
    bool good = true;
    for (int f = static_cast<int>(laneId()); f < a.rails.outs; f += 32) {
      HomeProgress& progress = progressOf(f);
      SlotsAndTurns before;
      const auto known = [&] {
        before.word = loadRelaxed(&progress.next);  // hands over nothing but itself
        return before.turns() == turn;
      };
      good = good && waitUntil(group().wait, known, waitPoint(WaitWhat::pipeline, group().rank),
                               &progress.next);
      const auto mine = static_cast<unsigned>(popCount(flows[f].here));
      storeRelaxed(&progress.next, before.word + SlotsAndTurns::of(mine, 1));
      flows[f].first = progress.slots;
      flows[f].before = progress.slots + before.slots();
    }
    good = all(good);
    syncWarp();
    return good;
  }
  /// Runs are half a ring, so that the other half can be filled meanwhile.
  __device__ RunMarks marksOf(int flow) const {
    HomeProgress& progress = progressOf(flow);
    return {progress.done, &progress.total, slotsPerRun(slots(), slots()), HomeProgress::kRuns};
  }
  __device__ auto giveBackTo(int flow) const {
    return [flow, this](std::uint64_t begin, std::uint64_t end) {
      addRailWord(group(), a.rails, a.rails.out[flow].peer,
                  railCounters(a.rails).combineCredit(lane), end - begin);
    };
  }
  /// Gives back the slots of the tokens in `done`.
  __device__ void giveBack(std::uint32_t done) const {
    for (int f = static_cast<int>(laneId()); f < a.rails.outs; f += 32) {
      RailCombineView::Flow& known = flows[f];
      const auto n = static_cast<unsigned>(popCount(known.here & done));
      marksOf(f).finish(known.before - known.first + known.done, n, giveBackTo(f));
      known.done += n;
    }
  }
  /// The lane has no more turns. Its slots have all come then: RunMarks counts those of a ring
  /// only. False: they did not.
  __device__ bool closeLane() const {
    bool good = true;
    for (int f = static_cast<int>(laneId()); f < a.rails.outs; f += 32) {
      const RailCombineView::Flow& known = flows[f];
      const std::uint64_t total =
          known.before - known.first + static_cast<unsigned>(popCount(known.here));
      if (total == 0) continue;
      const bool came = awaitRailWord(group(), tailOf(f), a.rails.out[f].peer, known.first + total,
                                      WaitWhat::railSums) != 0;
      if (came) marksOf(f).close(total, giveBackTo(f));
      good = good && came;
    }
    return all(good);
  }
  /// False: something did not come.
  __device__ bool run() const {
    const CombineArgs& c = a.combine;
    const std::int64_t token = firstToken + laneId(),
                       end = c.tokens < c.tokenEnd ? c.tokens : c.tokenEnd;
    const bool valid = static_cast<int>(laneId()) < kLaneTokens && token < end;
    if (!lookUp(token, valid)) return false;
    for (std::uint32_t left = ballot(valid); left != 0;) {
      const std::uint32_t ready = awaitReady(left);
      if (ready == 0) return false;
      const int job = popCount(ready & lanesBelow());
      const bool taken = (ready >> laneId() & 1u) != 0 && job < pipe.jobsAtOnce;
      if (any(taken && !begin(job, token))) return false;
      const std::uint32_t done = ballot(taken);
      syncWarp();
      if (c.outWeights) addWeights(popCount(done));
      pipe.run(popCount(done));
      left &= ~done;
      giveBack(done);
    }
    const bool good = !isLast || closeLane();
    syncWarp();  // `flows` is rewritten by the next turn
    return good;
  }
};

/// Takes turns of own tokens until there are none.
__device__ inline void addOwnTokens(const RailCombineArgs& a, const RailCombineView& v,
                                    RowPipe& pipe, std::uint32_t epoch) {
  const CombineArgs& c = a.combine;
  auto* const taken = &railMemory<RailWords>(c.group, a.rails.plan.words())->homeTurns;
  const std::int64_t end = c.tokens < c.tokenEnd ? c.tokens : c.tokenEnd;
  const std::int64_t first = c.tokenBegin / kLaneTokens,
                     turns = (end + kLaneTokens - 1) / kLaneTokens;
  const int lanes = a.rails.plan.lanes;
  while (true) {
    std::uint32_t number = 0;
    if (laneId() == 0) number = fetchAddLocalRelaxed(taken, 1u);
    number = shuffle(number, 0);
    const std::int64_t turn = first + number;
    if (turn >= turns) return;
    const HomeTurn home{a,
                        v.sources(),
                        pipe,
                        v.flows(static_cast<int>(warpId())),
                        epoch,
                        static_cast<int>(turn % lanes),
                        number / static_cast<unsigned>(lanes),
                        turn * kLaneTokens,
                        turn + lanes >= turns};
    if (home.run()) continue;
    if (laneId() == 0) giveUp(c.group);
    return;
  }
}

/// What a finished launch leaves; as closeRings().
__device__ inline void closeLanes(const GroupArgs& g, const RailArgs& rails) {
  const int lanes = rails.plan.lanes;
  for (int i = static_cast<int>(threadIndex()); i < rails.outs * lanes;
       i += static_cast<int>(blockSize())) {
    HomeProgress& progress =
        *railMemory<HomeProgress>(g, rails.plan.homeProgress(i / lanes, i % lanes));
    progress.slots += progress.total;
    progress.next = 0;
    progress.total = 0;
    for (std::uint32_t& done : progress.done) done = 0;
  }
}

__device__ inline void publishOutput(const CombineArgs& c, int peer, std::uint32_t epoch) {
  EntryPacket packet{};
  packet.signature = c.signature;
  packet.staged = c.staged ? 1 : 0;
  packet.base = c.heapOffset;
  publishEntry(c.group, peer, packet, epoch);
}

/// One warp per grid looks at the words. Of the others some send sums first; all of them then take
/// turns of own tokens.
__device__ inline void railCombineRoles(const RailCombineArgs& a, const RailCombineView& v,
                                        std::uint32_t epoch, std::uint64_t launch) {
  const GroupArgs& g = a.combine.group;
  const RailArgs& rails = a.rails;
  const int warp = static_cast<int>(warpId()), grid = static_cast<int>(gridSize()),
            block = static_cast<int>(blockIndex()), lanes = rails.plan.lanes;
  if (warp == kSumWarps && block == 0) {
    const RailCounters counters = railCounters(rails);
    RailWatch{g, rails}.run(static_cast<std::uint32_t>(kCombineWarps * grid - 1),
                            WatchedWords{rails.out, rails.outs, counters.combineTail(0), lanes},
                            WatchedWords{rails.in, rails.ins, counters.combineCredit(0), lanes});
    return;
  }
  RowPipe pipe = RowPipe::of(g, v.pipes(), warp, a.combine.rowBytes, a.partBytes, true);
  if (warp < kSumWarps) {
    const RailItems items{rails.ins, lanes, warp * grid + block, kSumWarps * grid};
    SumSender{a, v.sources(), pipe, epoch, launch, items}.run();
  }
  addOwnTokens(a, v, pipe, epoch);
  if (laneId() == 0) RowPipe::drain();
  leaveRole(g, rails);
}

__device__ inline void railCombineKernel(const RailCombineArgs& a) {
  const CombineArgs& c = a.combine;
  const GroupArgs& g = c.group;
  const RailCombineView v{a.rails.plan.members, a.rails.outs};
  auto& shared = sharedStorage<RailShared>();
  auto* words = railMemory<RailWords>(g, a.rails.plan.words());
  const Turn turn = currentTurn(g);
  const std::uint64_t launch = words->combines + 1;
  const int thread = static_cast<int>(threadIndex()), threads = static_cast<int>(blockSize());
  if (blockIndex() == 0 && !turn.broken) {
    for (int r = thread; r < g.ranks; r += threads) publishOutput(c, r, turn.epoch);
  }
  for (int m = thread; m < nodeSize(a.rails, a.rails.node); m += threads) {
    v.sources()[m] = awaitSource(c, a.rails, ranksOfNode(a.rails, a.rails.node)[m], turn);
  }
  syncBlock();
  if (!turn.broken) railCombineRoles(a, v, turn.epoch, launch);
  leaveGroup(g, turn, WaitWhat::combineDone, shared.lastBlock);
  if (shared.lastBlock == 0) return;
  closeLanes(g, a.rails);
  if (thread != 0) return;
  words->combines = launch;
  words->warpsDone = 0;
  words->homeTurns = 0;
}

}  // namespace mscclpp::ep::MSCCLPP_PLATFORM_NS
