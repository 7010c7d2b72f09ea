#pragma once

#include "group.cuh"

/// Low-latency combine, reduced where the experts are: the home of a token sends its weights, the
/// experts' ranks add their rows of it in fp32 and send one bf16 row, the home adds those. A rank's
/// own rows are added in fp32 first, then the peers' in the order of the token's selections: the
/// same bits every time.
namespace mscclpp::ep::MSCCLPP_PLATFORM_NS {

/// Rows of y whose loads are under way together.
inline constexpr int kRowsAtOnce = 8;

__device__ __forceinline__ void addScaled(float (&sum)[8], Vec16 row, float weight) {
  float value[8];
  widenBf16(value, row);
#pragma unroll
  for (int i = 0; i < 8; ++i) sum[i] = fma(weight, value[i], sum[i]);
}

struct CombineBlock {
  const LowLatencyCombineArgs& a;
  const LowLatencyTurn turn;
  const RowUnits row;

  __device__ __forceinline__ char* area(int at) const {
    return regionOf(a.group, at) + a.group.plan.area(LowLatencyKind::combine, turn.epoch);
  }
  __device__ __forceinline__ char* weightLine(int at, int home, int token, int line) const {
    return area(at) + a.area.weights(home, token) + static_cast<std::size_t>(line) * kLineSize;
  }
  __device__ __forceinline__ char* partialLine(int at, int from, int token, int pass) const {
    return area(at) + a.area.partial(from, token) +
           static_cast<std::size_t>(row.line(pass)) * kLineSize;
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
    return static_cast<int>(laneId()) / kLineLanes < a.area.weightLines();
  }
  /// A warp per peer.
  __device__ __forceinline__ void pushWeights() const {
    const LowLatencyGroup& g = a.group;
    const int line = static_cast<int>(laneId()) / kLineLanes;
    for (int t = static_cast<int>(blockIndex()); t < a.tokens; t += static_cast<int>(gridSize())) {
      for (int i = static_cast<int>(warpId()); i < g.ranks - 1; i += kLowLatencyWarps) {
        const int peer = i + (i >= g.rank ? 1 : 0);
        if (isMasked(g, peer)) continue;
        pushLine(weightLine(peer, g.rank, t, hasWeightLine() ? line : 0), ownWeightUnit(t),
                 turn.epoch, hasWeightLine(), g.writes);
      }
    }
  }
  /// The last block: this rank has entered the call.
  __device__ __forceinline__ void pushHello() const {
    const LowLatencyGroup& g = a.group;
    for (int i = static_cast<int>(warpId()); i < g.ranks - 1; i += kLowLatencyWarps) {
      const int peer = i + (i >= g.rank ? 1 : 0);
      if (isMasked(g, peer)) continue;
      pushLine(helloLine(g, LowLatencyKind::combine, peer, g.rank, turn.epoch),
               Vec16{{0, turn.finished, 0, 0}}, turn.epoch, laneId() < kLineLanes, g.writes);
    }
  }

  // ---- sums ------------------------------------------------------------------------------------

  /// The slot of this lane's selection of a token here, -1 = none.
  __device__ __forceinline__ std::int32_t loadSlot(int source, int token) const {
    const int lane = static_cast<int>(laneId());
    if (lane >= a.area.topk) return -1;
    return a
        .slots[(static_cast<std::int64_t>(source) * a.area.maxTokens + token) * a.area.topk + lane];
  }
  struct Rows {
    Vec16 unit[kRowsAtOnce];
  };
  /// Requests up to kRowsAtOnce rows, those of selections from `first` on.
  __device__ __forceinline__ void request(Rows& rows, std::int32_t slot, int first,
                                          int pass) const {
#pragma unroll
    for (int i = 0; i < kRowsAtOnce; ++i) {
      const std::int32_t s = shuffle(slot, (first + i) & 31);
      if (first + i < a.area.topk && s >= 0 && row.hasUnit(pass)) {
        rows.unit[i] = loadStreaming16(a.y + static_cast<std::size_t>(s) * a.hidden * 2 +
                                       static_cast<std::size_t>(row.unit(pass)) * 16);
      }
    }
  }
  __device__ __forceinline__ void add(float (&sum)[8], const Rows& rows, std::int32_t slot,
                                      const Vec16& weights, int first) const {
#pragma unroll
    for (int i = 0; i < kRowsAtOnce; ++i) {
      if (first + i >= a.area.topk) break;
      const std::int32_t s = shuffle(slot, first + i);
      const float weight = weightAt(weights, first + i);
      if (s >= 0) addScaled(sum, rows.unit[i], weight);
    }
  }
  /// All rows of a token here; the first ones have been requested.
  __device__ __forceinline__ void sumRows(float (&sum)[8], Rows& rows, std::int32_t slot,
                                          const Vec16& weights, int pass) const {
    add(sum, rows, slot, weights, 0);
    for (int first = kRowsAtOnce; first < a.area.topk; first += kRowsAtOnce) {
      request(rows, slot, first, pass);
      add(sum, rows, slot, weights, first);
    }
  }

  /// A peer's token: the rows that it has here become one row at its home. `before` runs just
  /// before the push: loads that come after it would wait until the wire has taken it.
  template <class Before>
  __device__ __forceinline__ void reduceForPeer(const TokenOf& item, Rows& rows, std::int32_t slot,
                                                Before before) const {
    const LowLatencyGroup& g = a.group;
    if (!any(slot >= 0)) {
      before();
      return;
    }
    const char* const line =
        weightLine(g.rank, item.source, item.token,
                   hasWeightLine() ? static_cast<int>(laneId()) / kLineLanes : 0);
    Vec16 weights = peekLine(line, hasWeightLine());
    if (!pullLine(waitControl(g), line, weights, turn.epoch, hasWeightLine(),
                  lowLatencyWait(WaitWhat::lowLatencyWeights, item.source), g.writes)) {
      giveUpOn(g, item.source);
      before();
      return;
    }
    for (int pass = 0; pass < row.passes(); ++pass) {
      if (pass > 0) request(rows, slot, 0, pass);
      float sum[8] = {};
      sumRows(sum, rows, slot, weights, pass);
      if (pass == row.passes() - 1) before();
      pushLine(partialLine(item.source, g.rank, item.token, pass), narrowBf16(sum), turn.epoch,
               row.hasLine(pass), g.writes);
    }
  }

  /// An own token: its rows here, in fp32.
  __device__ __forceinline__ void sumOwn(float (&sum)[8], Rows& rows, std::int32_t slot, int token,
                                         int pass) const {
    sumRows(sum, rows, slot, ownWeightUnit(token), pass);
  }
  __device__ __forceinline__ char* ownSum(int token, int pass) const {
    return area(a.group.rank) + a.area.ownSum(token) +
           static_cast<std::size_t>(row.unit(pass)) * 2 * sizeof(Vec16);
  }
  /// Between the halves of a call, which leaves y free.
  __device__ __forceinline__ void keepOwn(int token) const {
    const std::int32_t slot = loadSlot(a.group.rank, token);
    for (int pass = 0; pass < row.passes(); ++pass) {
      Rows rows;
      float sum[8] = {};
      request(rows, slot, 0, pass);
      sumOwn(sum, rows, slot, token, pass);
      if (!row.hasUnit(pass)) continue;
      Vec16 half[2];
#pragma unroll
      for (int i = 0; i < 8; ++i) half[i / 4].w[i % 4] = floatToBits(sum[i]);
      store16(ownSum(token, pass), half[0]);
      store16(ownSum(token, pass) + sizeof(Vec16), half[1]);
    }
  }
  __device__ __forceinline__ void takeOwn(float (&sum)[8], int token, int pass) const {
    if (!row.hasUnit(pass)) return;
    const Vec16 half[2] = {load16(ownSum(token, pass)),
                           load16(ownSum(token, pass) + sizeof(Vec16))};
#pragma unroll
    for (int i = 0; i < 8; ++i) sum[i] = bitsToFloat(half[i / 4].w[i % 4]);
  }

  /// The peers' rows of an own token.
  __device__ __forceinline__ void addPeers(float (&sum)[8], int token, std::int64_t selection,
                                           int pass) const {
    const LowLatencyGroup& g = a.group;
    forEachOwner(a, selection, [&](int rank) {
      if (rank == g.rank || isMasked(g, rank)) return;
      const std::uint64_t start = a.waitTotals ? nanoseconds() : 0;
      const char* const line = partialLine(g.rank, rank, token, pass);
      Vec16 unit = peekLine(line, row.hasLine(pass));
      if (pullLine(waitControl(g), line, unit, turn.epoch, row.hasLine(pass),
                   lowLatencyWait(WaitWhat::lowLatencyPartial, rank), g.writes)) {
        addBf16(sum, unit);
      } else {
        giveUpOn(g, rank);
      }
      if (a.waitTotals && threadIndex() == 0) {
        fetchAddLocalRelaxed(&a.waitTotals[rank], static_cast<std::int64_t>(nanoseconds() - start));
      }
    });
  }
  __device__ __forceinline__ void store(const float (&sum)[8], int token, int pass) const {
    if (!row.hasUnit(pass)) return;
    store16(a.out + static_cast<std::size_t>(token) * a.hidden * 2 +
                static_cast<std::size_t>(row.unit(pass)) * 16,
            narrowBf16(sum));
  }
};

/// The experts' side. `beforeLastPush`: see CombineBlock::reduceForPeer.
template <class Before>
__device__ __forceinline__ void reduceForPeers(const CombineBlock& block, CombineBlock::Rows& rows,
                                               Before beforeLastPush) {
  const LowLatencyCombineArgs& a = block.a;
  const LowLatencyGroup& g = a.group;
  const int blocks = static_cast<int>(gridSize());
  if (g.ranks == 1) return;
  for (int j = firstPeerItem();; j += blocks) {
    const TokenOf item = peerToken(g, j);
    if (item.token >= a.area.maxTokens) return;
    // Read together with the count that says whether it means anything: one latency, not two.
    std::int32_t slot = block.loadSlot(item.source, item.token);
    const int tokens = a.sourceTokens[item.source];
    if (item.token >= tokens) {
      if (g.ranks == 2) return;
      continue;
    }
    if (isMasked(g, item.source)) continue;
    block.request(rows, slot, 0, 0);
    const bool isLast = peerToken(g, j + blocks).token >= a.area.maxTokens;
    block.reduceForPeer(item, rows, slot, [&] {
      if (isLast) beforeLastPush();
    });
  }
}

__device__ inline void lowLatencyCombineKernel(const LowLatencyCombineArgs& a) {
  const LowLatencyGroup& g = a.group;
  const LowLatencyStart start = lowLatencyStart(g, LowLatencyKind::combine);
  const LowLatencyTurn turn = lowLatencyTurn(g, start);
  const CombineBlock block{a, turn, {a.area.rowUnits}};
  const int blocks = static_cast<int>(gridSize()), first = static_cast<int>(blockIndex());
  CombineBlock::Rows rows;
  std::int32_t ownSlot = -1;
  bool ownRequested = false;
  if (sends(g.phase) && !turn.broken && awaitRoom(g, LowLatencyKind::combine, start, turn)) {
    block.pushWeights();
    if (first == blocks - 1) block.pushHello();
    reduceForPeers(block, rows, [&] {
      if (!receives(g.phase) || first >= a.tokens) return;
      ownSlot = block.loadSlot(g.rank, first);
      block.request(rows, ownSlot, 0, 0);
      ownRequested = true;
    });
    if (!receives(g.phase)) {
      for (int t = first; t < a.tokens; t += blocks) block.keepOwn(t);
    }
  }
  if (receives(g.phase) && !turn.broken) {
    for (int t = first; t < a.tokens; t += blocks) {
      const std::int64_t selection = loadSelection(a, t);
      for (int pass = 0; pass < block.row.passes(); ++pass) {
        float sum[8] = {};
        if (g.phase == LowLatencyPhase::receive) {
          block.takeOwn(sum, t, pass);
        } else {
          if (!ownRequested || t != first || pass > 0) {
            ownSlot = block.loadSlot(g.rank, t);
            block.request(rows, ownSlot, 0, pass);
          }
          block.sumOwn(sum, rows, ownSlot, t, pass);
        }
        block.addPeers(sum, t, selection, pass);
        block.store(sum, t, pass);
      }
    }
  }
  finishLowLatency(g, LowLatencyKind::combine, turn);
}

}  // namespace mscclpp::ep::MSCCLPP_PLATFORM_NS
