#pragma once

#include "ids.cuh"
#include "quantise.cuh"

/// Low-latency dispatch. A token's row is pushed once to every rank that hosts one of its experts;
/// the ids of all ranks follow each other around at the same time; when they are here, every block
/// computes the slots of its rows and copies them there.
namespace mscclpp::ep::MSCCLPP_PLATFORM_NS {

inline constexpr int kGroupWarps = kLowLatencyWarps < kFastTopk ? kLowLatencyWarps : kFastTopk;
inline constexpr int kWarpGroups = kLowLatencyWarps / kGroupWarps;

/// One block's share of the call.
template <bool E4m3, class Path>
struct DispatchBlock {
  const LowLatencyDispatchArgs& a;
  const DispatchShared shared;
  const LowLatencyTurn turn;
  const RowUnits<Path> row;
  const CallAreas<Path> areas;

  __device__ __forceinline__ DispatchBlock(const LowLatencyDispatchArgs& args,
                                           const DispatchShared& memory, const LowLatencyTurn& now)
      : a(args),
        shared(memory),
        turn(now),
        row{args.area.rowUnits},
        areas(args.group, LowLatencyKind::dispatch, now.epoch) {}

  /// Own rows stay in registers, unless the halves are apart: then x may have changed in between.
  __device__ __forceinline__ bool ownStaged() const {
    return a.group.phase != LowLatencyPhase::whole;
  }

  /// This thread's unit of pass `pass` of a token's row. All threads, for pass 0 first.
  __device__ __forceinline__ Vec16 loadRow(int token, int pass) const {
    const char* const source = a.x + static_cast<std::size_t>(token) * a.hidden * 2;
    if constexpr (E4m3) {
      if (pass == 0) {
        syncBlock();  // the row before may still be read
        quantiseRow(source, a.hidden, a.roundScale, shared.row());
        syncBlock();
      }
      return row.hasUnit(pass) ? shared.row()[row.unit(pass)] : Vec16{};
    } else {
      return row.hasUnit(pass)
                 ? loadStreaming16(source + static_cast<std::size_t>(row.unit(pass)) * 16)
                 : Vec16{};
    }
  }

  __device__ __forceinline__ void pushRow(char* to, Vec16 unit, int pass) const {
    pushLine(to + static_cast<std::size_t>(row.line(pass)) * kLineSize, unit, turn.epoch,
             row.hasLine(pass), Path::writes(a.group));
  }

  /// A token whose loads are under way.
  struct Loaded {
    std::int64_t selection;
    Vec16 unit;
  };
  __device__ __forceinline__ Loaded load(int token) const {
    if (token >= a.tokens) return {-1, {}};
    const std::int64_t selection = loadSelection(a, token);
    return {selection, loadRow(token, 0)};
  }
  __device__ __forceinline__ RowTable table() const { return {a.group.ranks, a.area.maxTokens}; }
  /// Rows of the first own tokens to a rank behind a port channel, noted for the combine. A whole
  /// warp. Ids that do not fit into shared memory are read from the caller's.
  __device__ __forceinline__ RowCount rowsTo(int rank, int tokens) const {
    const RowCount count =
        shared.idsHere ? IdReader<Path>{a, shared, turn.epoch}.rowsTo(rank, a.group.rank, tokens)
                       : rowsOfCaller(a, rank, tokens);
    if (laneId() == 0) {
      a.rowTable[table().to(rank, tokens)] = static_cast<std::int32_t>(count.packed);
    }
    return count;
  }
  /// Where the rows of ranks behind port channels will begin among all that come home. A warp each.
  __device__ __forceinline__ void noteBasesTo() const {
    for (int peer = static_cast<int>(warpId()); peer < a.group.ranks; peer += kLowLatencyWarps) {
      if (!isPort<Path>(a.group, peer)) continue;
      const int base = countWhere(a.tokens * a.area.topk, [&](int i) {
        const int owner = ownerOf(a, a.topkIdx[i]);
        return owner >= 0 && owner < peer;
      });
      if (laneId() == 0) a.rowTable[table().baseTo(peer)] = base;
    }
  }
  /// Needs nothing but the tokens' own ids.
  __device__ __forceinline__ void pushToken(int token, const Loaded& loaded) const {
    if constexpr (Path::kPorts) {
      findPlaces<Path>(a, loaded.selection, shared.head().sendPlace,
                       [&](int rank) { return rowsTo(rank, token).tokens(); });
    }
    for (int pass = 0; pass < row.passes(); ++pass) {
      const Vec16 unit = pass == 0 ? loaded.unit : loadRow(token, pass);
      int owner = -1;
      forEachOwner(a, loaded.selection, [&](int rank) {
        ++owner;
        if (rank == a.group.rank && !ownStaged()) return;
        if (isMaskedForWarp<Path>(a.group, rank)) return;
        if (isPort<Path>(a.group, rank)) {
          pushRow(outboxArea(a.group, LowLatencyKind::dispatch, turn.epoch) +
                      a.area.row(rank, shared.head().sendPlace[owner]),
                  unit, pass);
        } else {
          pushRow(areas.at(rank) + a.area.row(a.group.rank, token), unit, pass);
        }
      });
    }
  }
  /// After all rows and ids: the block that comes last lets them go.
  __device__ __forceinline__ void sendPorts() const {
    const LowLatencyGroup& g = a.group;
    if (!isLastWriter(g, LowLatencyKind::dispatch, shared.head().lastWriter)) return;
    sendToPorts<Path>(g, PortMessage::ids, turn.epoch, [&](int peer) {
      const auto rows = static_cast<std::size_t>(rowsTo(peer, a.tokens).tokens());
      return PortRange{
          a.area.block(peer), a.area.block(g.rank),
          static_cast<std::size_t>(a.area.idLines) * kLineSize + rows * a.area.rowBytes};
    });
    noteBasesTo();
  }
  /// `first`: the block's first token.
  __device__ __forceinline__ void pushTokens(const Loaded& first) const {
    const int blocks = static_cast<int>(gridSize());
    for (int t = static_cast<int>(blockIndex()); t < a.tokens; t += blocks) {
      pushToken(t, t == static_cast<int>(blockIndex()) ? first : load(t));
    }
  }

  struct Item {
    int source;
    int token;
    bool exists;
  };
  /// The block's work after the ids are here: rounds of one own token and one of every peer.
  __device__ __forceinline__ Item itemAt(int i) const {
    const int n = a.group.ranks, blocks = static_cast<int>(gridSize());
    const int round = n == 2 ? i >> 1 : i / n, of = i - round * n;
    if (of == 0) {
      const int token = static_cast<int>(blockIndex()) + round * blocks;
      return {a.group.rank, token, token < shared.tokens()[a.group.rank]};
    }
    const TokenOf item = peerToken(a.group, firstPeerItem() + (round * (n - 1) + of - 1) * blocks);
    return {item.source, item.token, item.token < shared.tokens()[item.source]};
  }

  /// The slots of one selection; a whole warp. What there is no room for goes nowhere, which
  /// writeCounts() reports.
  __device__ __forceinline__ void findSlot(const IdReader<Path>& ids, int place, const Item& item,
                                           int k) const {
    const int index = item.token * a.area.topk + k;
    const std::uint32_t expert = ids.id(item.source, index);
    int slot = -1, local = 0;
    if (expert != kNoExpert && ownerOf(a, expert) == a.group.rank) {
      const int before = ids.before(item.source, index, expert);
      local = static_cast<int>(expert) - a.group.rank * a.expertsPerRank;
      if (before < rowsPerExpert(a)) slot = local * rowsPerExpert(a) + before;
    }
    if (laneId() != 0) return;
    shared.head().slot[place][k] = slot;
    shared.head().expert[place][k] = local;
    a.slots[(static_cast<std::int64_t>(item.source) * a.area.maxTokens + item.token) * a.area.topk +
            k] = slot;
    if (slot >= 0) a.sourceInfo[slot] = item.token;
  }

  __device__ __forceinline__ void storeUnit(int slot, int local, int unit, Vec16 v) const {
    if constexpr (!E4m3) {
      store16(a.recvX + static_cast<std::size_t>(slot) * a.hidden * 2 +
                  static_cast<std::size_t>(unit) * 16,
              v);
    } else if (unit < e4m3ValueUnits(a.hidden)) {
      storeValues(a.recvX + static_cast<std::size_t>(slot) * a.hidden, unit, a.hidden, v);
    } else {
      storeScales(a, slot, local, unit - e4m3ValueUnits(a.hidden), v);
    }
  }

  /// One row to its slots, of which there is at least one.
  __device__ __forceinline__ void placeRow(const Item& item, int place, Vec16 known,
                                           bool isKnown) const {
    const LowLatencyGroup& g = a.group;
    const bool own = item.source == g.rank && !ownStaged();
    const int at = isPort<Path>(g, item.source) ? shared.head().recvPlace[place] : item.token;
    const char* const from = own ? nullptr : areas.mine + a.area.row(item.source, at);
    for (int pass = 0; pass < row.passes(); ++pass) {
      Vec16 unit = known;
      if (own) {
        if (!isKnown || row.passes() > 1) unit = loadRow(item.token, pass);
      } else {
        const char* const line = from + static_cast<std::size_t>(row.line(pass)) * kLineSize;
        if (!isKnown || pass > 0) unit = peekLine(line, row.hasLine(pass));
        if (!pullLine(waitControl<Path>(g), line, unit, turn.epoch, row.hasLine(pass),
                      lowLatencyWait(WaitWhat::lowLatencyRow, item.source), Path::writes(g))) {
          giveUpOn(g, item.source);
          continue;
        }
      }
      if (!row.hasUnit(pass)) continue;
      const auto& head = shared.head();
#pragma unroll 2
      for (int base = 0; base < a.area.topk; base += 4) {
        const Vec16 slots = load16(&head.slot[place][base]);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const auto slot = static_cast<std::int32_t>(slots.w[i]);
          if (slot >= 0) {
            storeUnit(slot, E4m3 ? head.expert[place][base + i] : 0, row.unit(pass), unit);
          }
        }
      }
    }
  }

  __device__ __forceinline__ bool isWanted(int place) const {
    std::uint32_t none = ~0u;
#pragma unroll 2
    for (int base = 0; base < a.area.topk; base += 4) {
      const Vec16 slots = load16(&shared.head().slot[place][base]);
      none &= slots.w[0] & slots.w[1] & slots.w[2] & slots.w[3];
    }
    return none != ~0u;
  }

  /// `own`: this thread's unit of the block's first token.
  __device__ __forceinline__ void placeRows(Vec16 own) const {
    const IdReader<Path> ids{a, shared, turn.epoch};
    const int n = a.group.ranks, topk = a.area.topk;
    const int items = n * a.rounds;
    for (int batch = 0; batch < items; batch += kPlaceBatch) {
      // The first row of a peer is in flight while the slots are computed.
      Vec16 seen{};
      const Item firstPeer = itemAt(1);
      const bool peek =
          batch == 0 && n > 1 && firstPeer.exists && !isPort<Path>(a.group, firstPeer.source);
      if (peek) {
        seen = peekLine(areas.mine + a.area.row(firstPeer.source, firstPeer.token) +
                            static_cast<std::size_t>(row.line(0)) * kLineSize,
                        row.hasLine(0));
      }
      // A group of warps takes an item, a warp a selection.
      for (int place = static_cast<int>(warpId()) / kGroupWarps; place < kPlaceBatch;
           place += kWarpGroups) {
        const Item item = itemAt(batch + place);
        if (batch + place >= items || !item.exists) continue;
        for (int k = static_cast<int>(warpId()) % kGroupWarps; k < topk; k += kGroupWarps) {
          findSlot(ids, place, item, k);
        }
        if (isPort<Path>(a.group, item.source) && warpId() % kGroupWarps == 0) {
          const RowCount before = ids.rowsTo(a.group.rank, item.source, item.token);
          if (laneId() == 0) {
            shared.head().recvPlace[place] = before.tokens();
            noteRows(item.source, item.token, before);
          }
        }
      }
      syncBlock();
      for (int place = 0; place < kPlaceBatch && batch + place < items; ++place) {
        const Item item = itemAt(batch + place);
        if (!item.exists || !isWanted(place)) continue;
        const bool fromPeer = item.source != a.group.rank;
        const bool isKnown =
            batch == 0 && (fromPeer ? place == 1 && peek : place == 0 && !ownStaged());
        placeRow(item, place, fromPeer ? seen : own, isKnown);
      }
      syncBlock();
    }
  }

  /// The last block: counts and ranges of every local expert, as many experts at a time as there
  /// are counters for.
  __device__ __forceinline__ void writeCounts() const {
    const IdReader<Path> ids{a, shared, turn.epoch};
    const int n = a.group.ranks, thread = static_cast<int>(threadIndex());
    for (int s = thread; s < n; s += kLowLatencyThreads) a.sourceTokens[s] = shared.tokens()[s];
    if constexpr (Path::kPorts) finishRowTable(ids);
    const int atOnce = n < kCountsAtOnce ? kCountsAtOnce / n : 1;
#pragma unroll 1
    for (int first = 0; first < a.expertsPerRank; first += atOnce) {
      const int left = a.expertsPerRank - first, experts = left < atOnce ? left : atOnce;
      for (int i = thread; i < experts * n; i += kLowLatencyThreads) shared.head().counts[i] = 0;
      syncBlock();
      countSelections(ids, a.group.rank * a.expertsPerRank + first, experts);
      syncBlock();
      for (int e = thread; e < experts; e += kLowLatencyThreads) writeCountsOf(first + e, e);
      syncBlock();
    }
  }
  __device__ __forceinline__ void noteRows(int source, int tokens, RowCount count) const {
    a.rowTable[table().from(source, tokens)] = static_cast<std::int32_t>(count.packed);
  }
  /// All rows of every source, and where they will begin among all that come home there.
  __device__ __forceinline__ void finishRowTable(const IdReader<Path>& ids) const {
    const int first = a.group.rank * a.expertsPerRank;
    for (int s = static_cast<int>(warpId()); s < a.group.ranks; s += kLowLatencyWarps) {
      const int base = countWhere(shared.tokens()[s] * a.area.topk, [&](int i) {
        const std::uint32_t expert = ids.id(s, i);
        return expert != kNoExpert && static_cast<int>(expert) < first;
      });
      const RowCount all = ids.rowsTo(a.group.rank, s, shared.tokens()[s]);
      if (laneId() != 0) continue;
      noteRows(s, shared.tokens()[s], all);
      a.rowTable[table().baseFrom(s)] = base;
    }
  }
  __device__ __forceinline__ void countSelections(const IdReader<Path>& ids, int firstExpert,
                                                  int experts) const {
    const int n = a.group.ranks;
#pragma unroll 1
    for (int s = 0; s < n; ++s) {
      const int selections = shared.tokens()[s] * a.area.topk;
#pragma unroll 1
      for (int i = static_cast<int>(threadIndex()); i < selections; i += kLowLatencyThreads) {
        const int expert = static_cast<int>(ids.id(s, i)) - firstExpert;
        if (expert >= 0 && expert < experts) {
          fetchAddLocalRelaxed(&shared.head().counts[expert * n + s], 1u);
        }
      }
    }
  }
  __device__ __forceinline__ void writeCountsOf(int expert, int counted) const {
    const int n = a.group.ranks;
    int begin = 0, lost = 0;
#pragma unroll 1
    for (int s = 0; s < n; ++s) {
      const int asked = static_cast<int>(loadRelaxed(&shared.head().counts[counted * n + s]));
      const int room = rowsPerExpert(a) - begin, count = asked < room ? asked : room;
      lost += asked - count;
      a.layoutRange[static_cast<std::int64_t>(expert) * n + s] =
          static_cast<std::int64_t>(begin) << 32 | count;
      begin += count;
    }
    if (lost > 0) {
      reportFailure(
          a.group.wait,
          lowLatencyWait(WaitWhat::lowLatencyExpertRows, a.group.rank * a.expertsPerRank + expert),
          static_cast<std::uint64_t>(rowsPerExpert(a)), static_cast<std::uint64_t>(begin + lost));
    }
    a.recvCount[expert] = begin;
    if (a.expertTotals) a.expertTotals[expert] += begin;
  }
};

template <bool E4m3, class Path>
__device__ void lowLatencyDispatchKernel(const LowLatencyDispatchArgs& a) {
  using Block = DispatchBlock<E4m3, Path>;
  const LowLatencyGroup& g = a.group;
  const DispatchShared shared{g.ranks, idUnitsOf(a.area), a.idsInShared,
                              E4m3 ? e4m3Units(a.hidden) : 0};
  const bool last = blockIndex() == gridSize() - 1;
  waitForPreviousKernel();
  letNextKernelStart();
  // The loads of the first row are on their way before the epoch is looked at.
  typename Block::Loaded first{-1, {}};
  if (sends(g.phase)) first = Block(a, shared, {}).load(static_cast<int>(blockIndex()));
  loadOwnIds(a, shared);
  const LowLatencyTurn turn =
      enterLowLatency<Path>(g, LowLatencyKind::dispatch, shared.head().turn);
  const Block block(a, shared, turn);
  const bool idsFromSelf = block.ownStaged() || !a.idsInShared;
  if (turn.sound) {
    if (sends(g.phase)) {
      if (last) pushIds<Path>(a, shared, turn, idsFromSelf);
      block.pushTokens(first);
      if constexpr (Path::kPorts) block.sendPorts();
    }
    if (receives(g.phase)) {
      awaitIds<Path>(a, shared, turn.epoch, idsFromSelf);
      block.placeRows(first.unit);
      if (last) block.writeCounts();
    }
  }
  finishLowLatency<Path>(g, LowLatencyKind::dispatch, turn);
}

}  // namespace mscclpp::ep::MSCCLPP_PLATFORM_NS
