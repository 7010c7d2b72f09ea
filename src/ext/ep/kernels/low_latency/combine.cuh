#pragma once

#include "combine_rows.cuh"

/// Low-latency combine, reduced where the experts are: the home of a token sends its weights, the
/// experts' ranks add their rows of it in fp32 and send one bf16 row, the home adds those. A rank's
/// own rows are added in fp32 first, then the peers' in ascending order: the same bits every time.
namespace mscclpp::ep::MSCCLPP_PLATFORM_NS {

/// Rows of y whose loads are under way together.
inline constexpr int kRowsAtOnce = 8;

template <class Path>
struct CombineBlock : CombineRows<LowLatencyCombineArgs, Path> {
  using Base = CombineRows<LowLatencyCombineArgs, Path>;
  using Base::a, Base::turn, Base::row, Base::areas, Base::shared, Base::isLost, Base::loadSlot;
  using Base::awaitMessages, Base::outbox;
  using typename Base::Item;

  __device__ __forceinline__ CombineBlock(const LowLatencyCombineArgs& args,
                                          const LowLatencyTurn& now)
      : Base(args, now) {}

  /// This lane's line of a token's weights.
  __device__ __forceinline__ std::size_t weightLine(int home, int token) const {
    const std::size_t line = hasWeightLine() ? laneId() / kLineLanes : 0;
    return a.area.weights(home, token) + line * kLineSize;
  }
  // ---- weights: 28 to a line -----------------------------------------------------------------

  /// The four weights of this lane's unit of a token's lines; lanes past the last line have none.
  __device__ __forceinline__ Vec16 ownWeightUnit(int token) const {
    const int lane = static_cast<int>(laneId());
    const int first = lane / kLineLanes * kWeightsPerLine + lane % kLineLanes * 4;
    Vec16 unit{};
    if (lane % kLineLanes == kLineUnits) return unit;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (first + i < a.area.topk) {
        unit.w[i] =
            floatToBits(a.weights[static_cast<std::int64_t>(token) * a.area.topk + first + i]);
      }
    }
    return unit;
  }
  /// Weight `k` of the token whose units a warp holds.
  __device__ __forceinline__ static float weightAt(const Vec16& unit, int k) {
    const int line = k / kWeightsPerLine, in = k - line * kWeightsPerLine;
    const int lane = line * kLineLanes + in / 4;
    const int word = in % 4;
    const std::uint32_t w = word == 0   ? unit.w[0]
                            : word == 1 ? unit.w[1]
                            : word == 2 ? unit.w[2]
                                        : unit.w[3];
    return bitsToFloat(shuffle(w, lane));
  }
  __device__ __forceinline__ bool hasWeightLine() const {
    return static_cast<int>(laneId()) / kLineLanes < a.area.weightLines;
  }
  /// A warp per peer.
  __device__ __forceinline__ void pushWeights() const {
    const LowLatencyGroup& g = a.group;
    if (static_cast<int>(warpId()) >= g.ranks - 1) return;
#pragma unroll 1
    for (int t = static_cast<int>(blockIndex()); t < a.tokens; t += static_cast<int>(gridSize())) {
      const Vec16 unit = ownWeightUnit(t);
#pragma unroll 1
      for (int i = static_cast<int>(warpId()); i < g.ranks - 1; i += kLowLatencyWarps) {
        const int peer = i + (i >= g.rank ? 1 : 0);
        if (isPort<Path>(g, peer) || isMaskedForWarp<Path>(g, peer)) continue;
        pushLine(areas.at(peer) + weightLine(g.rank, t), unit, turn.epoch, hasWeightLine(),
                 Path::writes(g));
      }
    }
  }
  // ---- peers behind port channels ----------------------------------------------------------

  /// The last block: to each peer the weights of the tokens that go there, close together.
  __device__ __forceinline__ void sendPortWeights() const {
    const LowLatencyGroup& g = a.group;
#pragma unroll 1
    for (int t = static_cast<int>(warpId()); t < a.tokens; t += kLowLatencyWarps) {
      const Vec16 unit = ownWeightUnit(t);
      forEachOwner(a, loadSelection(a, t), [&](int rank) {
        if (!isPort<Path>(g, rank)) return;
        pushLine(outbox() + weightLine(rank, this->rowsTo(rank, t).tokens()), unit, turn.epoch,
                 hasWeightLine(), Path::writes(g));
      });
    }
    syncBlock();
    sendToPorts<Path>(g, PortMessage::weights, turn.epoch, [&](int peer) {
      return PortRange{a.area.weights(peer, 0), a.area.weights(g.rank, 0),
                       a.area.weights(0, this->rowsTo(peer, a.tokens).tokens())};
    });
  }
  /// Where a peer's weights lie and its sum will: behind a port channel, those of its tokens with
  /// rows here lie close together.
  __device__ __forceinline__ int placeOf(const Item& item) const {
    return isPort<Path>(a.group, item.source) ? this->rowsFrom(item.source, item.token).tokens()
                                              : item.token;
  }
  /// All threads: where the sums of an own token will come from behind port channels.
  __device__ __forceinline__ void findOwnPlaces(const Item& item, std::int64_t selection) const {
    findPlaces<Path>(a, selection, shared().places,
                     [&](int rank) { return this->rowsTo(rank, item.token).tokens(); });
  }
  /// Between the peers' tokens and the own ones, all threads of every block: the peers' sums leave,
  /// theirs are waited for.
  __device__ __forceinline__ void passPorts() const {
    const LowLatencyGroup& g = a.group;
    if (sends(g.phase) && isLastWriter(g, LowLatencyKind::combine, shared().lastWriter)) {
      sendToPorts<Path>(g, PortMessage::partial, turn.epoch, [&](int peer) {
        const auto rows =
            static_cast<std::size_t>(this->rowsFrom(peer, a.sourceTokens[peer]).tokens());
        return PortRange{a.area.partial(peer, 0), a.area.partial(g.rank, 0),
                         rows * a.area.rowBytes};
      });
    }
    if (!receives(g.phase)) return;
    awaitMessages(PortMessage::partial, WaitWhat::lowLatencyPartial);
  }
  // ---- sums ------------------------------------------------------------------------------------

  /// Rows whose loads are under way, and which selections they are of.
  struct Rows {
    Vec16 unit[kRowsAtOnce];
    unsigned mask = 0;
  };
  /// Requests up to kRowsAtOnce rows, those of selections from `first` on.
  __device__ __forceinline__ void request(Rows& rows, std::int32_t slot, int first,
                                          int pass) const {
    rows.mask = ballot(slot >= 0) >> first;
#pragma unroll
    for (int i = 0; i < kRowsAtOnce; ++i) {
      if ((rows.mask >> i & 1u) == 0) continue;
      this->loadUnit(rows.unit[i], shuffle(slot, (first + i) & 31), pass);
    }
  }
  __device__ __forceinline__ void add(float (&sum)[8], const Rows& rows, const Vec16& weights,
                                      int first) const {
#pragma unroll
    for (int i = 0; i < kRowsAtOnce; ++i) {
      if ((rows.mask >> i & 1u) != 0) addScaled(sum, rows.unit[i], weightAt(weights, first + i));
    }
  }
  /// All rows of a token here; the first ones have been requested.
  __device__ __forceinline__ void sumRows(float (&sum)[8], Rows& rows, std::int32_t slot,
                                          const Vec16& weights, int pass) const {
    add(sum, rows, weights, 0);
    if constexpr (!Path::kFast) {
#pragma unroll 1
      for (int first = kRowsAtOnce; first < a.area.topk; first += kRowsAtOnce) {
        request(rows, slot, first, pass);
        add(sum, rows, weights, first);
      }
    }
  }

  /// The weights of an item's token; a peer's are waited for. False: they did not come.
  __device__ __forceinline__ bool loadWeights(const Item& item, int place, Vec16& weights) const {
    const LowLatencyGroup& g = a.group;
    if (item.source == g.rank) {
      // The sums of a receive half exist already, and the caller's weights may be gone.
      if (sends(g.phase)) weights = ownWeightUnit(item.token);
      return true;
    }
    if (isLost(item.source)) return false;
    const char* const line = areas.mine + weightLine(item.source, place);
    weights = peekLine(line, hasWeightLine());
    if (pullLine(waitControl<Path>(g), line, weights, turn.epoch, hasWeightLine(),
                 lowLatencyWait(WaitWhat::lowLatencyWeights, item.source), Path::writes(g))) {
      return true;
    }
    giveUpOn(g, item.source);
    return false;
  }

  /// Own sums wait in fp32 between the halves of a call, which leave y free.
  __device__ __forceinline__ char* ownSum(int token, int pass) const {
    return areas.mine + a.area.ownSum(token) +
           static_cast<std::size_t>(row.unit(pass)) * 2 * sizeof(Vec16);
  }
  __device__ __forceinline__ void keepOwn(const float (&sum)[8], const Item& item) const {
    if (!row.hasUnit(item.pass)) return;
    char* const to = ownSum(item.token, item.pass);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      Vec16 bits;
#pragma unroll
      for (int i = 0; i < 4; ++i) bits.w[i] = floatToBits(sum[4 * half + i]);
      store16(to + half * sizeof(Vec16), bits);
    }
  }
  __device__ __forceinline__ void takeOwn(float (&sum)[8], const Item& item) const {
    if (!row.hasUnit(item.pass)) return;
    const char* const from = ownSum(item.token, item.pass);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const Vec16 bits = load16(from + half * sizeof(Vec16));
#pragma unroll
      for (int i = 0; i < 4; ++i) sum[4 * half + i] = bitsToFloat(bits.w[i]);
    }
  }

  /// The peers' rows of an own token.
  __device__ __forceinline__ void addPeers(float (&sum)[8], int token, std::int64_t selection,
                                           int pass) const {
    const LowLatencyGroup& g = a.group;
    int owner = -1;
    forEachOwner(a, selection, [&](int rank) {
      ++owner;
      if (rank == g.rank || isLost(rank) || isMaskedForWarp<Path>(g, rank)) return;
      const std::uint64_t start = this->waitBegins();
      const int place = isPort<Path>(g, rank) ? shared().places[owner] : token;
      const char* const from = areas.mine + a.area.partial(rank, place);
      Vec16 unit = this->peekUnit(from, pass);
      if (this->receiveUnit(from, unit, pass, rank, WaitWhat::lowLatencyPartial)) {
        addBf16(sum, unit);
      }
      this->countWait(rank, start);
    });
  }
  /// What becomes of a sum.
  __device__ __forceinline__ void finish(float (&sum)[8], const Item& item, std::int64_t selection,
                                         int place) const {
    if (isPort<Path>(a.group, item.source)) {
      this->pushUnit(outbox() + a.area.partial(item.source, place), narrowBf16(sum), item.pass);
    } else if (item.source != a.group.rank) {
      this->pushUnit(areas.at(item.source) + a.area.partial(a.group.rank, place), narrowBf16(sum),
                     item.pass);
    } else if (!receives(a.group.phase)) {
      keepOwn(sum, item);
    } else {
      if (!sends(a.group.phase)) takeOwn(sum, item);
      addPeers(sum, item.token, selection, item.pass);
      this->store(sum, item.token, item.pass);
    }
  }

  /// Peers' tokens, then own ones. The next item's rows are requested before the peer's row is
  /// pushed: loads behind a push would wait until the wire has taken it. The first ones before a
  /// message is waited for.
  __device__ __forceinline__ void run() const {
    Rows rows;
    Item item = this->peerItem(firstPeerItem());
    std::int32_t slot = loadSlot(item);
    request(rows, slot, 0, item.pass);
    if (Path::kPorts && sends(a.group.phase)) {
      awaitMessages(PortMessage::weights, WaitWhat::lowLatencyWeights);
    }
    bool passed = !Path::kPorts;
#pragma unroll 1
    while (true) {
      const bool own = item.source == a.group.rank;
      const std::int64_t selection = own ? loadSelection(a, item.token) : -1;
      if constexpr (Path::kPorts) {
        if (own && item.pass == 0) findOwnPlaces(item, selection);
        if (!passed && (item.source < 0 || own)) {
          passPorts();
          passed = true;
        }
      }
      if (item.source < 0) break;
      const Item next = this->after(item);
      const std::int32_t nextSlot = loadSlot(next);
      const bool wanted = own || rows.mask != 0;
      float sum[8] = {};
      Vec16 weights{};
      const int place = wanted ? placeOf(item) : 0;
      const bool have = wanted && loadWeights(item, place, weights);
      if (have) sumRows(sum, rows, slot, weights, item.pass);
      request(rows, nextSlot, 0, next.pass);
      if (have) finish(sum, item, selection, place);
      item = next;
      slot = nextSlot;
    }
  }
};

template <class Path>
__device__ void lowLatencyCombineKernel(const LowLatencyCombineArgs& a) {
  waitForPreviousKernel();
  letNextKernelStart();
  if (Path::kPorts && threadIndex() == 0) storeRelaxed(&CombineBlock<Path>::shared().portsLost, 0u);
  const LowLatencyTurn turn =
      enterLowLatency<Path>(a.group, LowLatencyKind::combine, sharedStorage<CombineShared>().turn);
  const CombineBlock<Path> block(a, turn);
  if (turn.sound) {
    if (sends(a.group.phase)) {
      block.pushWeights();
      const bool last = blockIndex() == gridSize() - 1;
      if (last) block.pushHello(kReducedAtRanks);
      if constexpr (Path::kPorts) {
        if (last) block.sendPortWeights();
      }
    }
    block.run();
  }
  finishLowLatency<Path>(a.group, LowLatencyKind::combine, turn);
}

}  // namespace mscclpp::ep::MSCCLPP_PLATFORM_NS
