#pragma once

#include "combine_rows.cuh"

/// Low-latency combine, reduced at the tokens' home: the experts' ranks send every selection's row
/// as it is, the home multiplies and adds them in fp32 in the order of k and rounds once. Weights
/// do not cross, and nobody waits before he sends.
namespace mscclpp::ep::MSCCLPP_PLATFORM_NS {

/// Rows that are under way together to be sent; twice as many, since the next ones are requested
/// before these leave.
inline constexpr int kPushedAtOnce = 4;

template <class Path>
struct SourceCombineBlock : CombineRows<LowLatencySourceArgs, Path> {
  using Base = CombineRows<LowLatencySourceArgs, Path>;
  using Base::a, Base::turn, Base::row, Base::areas, Base::shared;
  using typename Base::Item;
  /// Rows that are under way together to be added. What else there is to ask takes registers.
  static constexpr int kPulledAtOnce = Path::kFast ? 8 : 4;

  __device__ __forceinline__ SourceCombineBlock(const LowLatencySourceArgs& args,
                                                const LowLatencyTurn& now)
      : Base(args, now) {}

  // ---- where the experts are -------------------------------------------------------------------

  /// How far this block is: the slots of an item, and which of its selections are left.
  struct Cursor {
    Item item;
    std::int32_t slot;
    unsigned left = 0;
    int begun = 0;      ///< selections that are not left
    bool fresh = true;  ///< `left` is not known yet
  };
  /// Rows of an item whose loads are under way. `mask`: their selections.
  struct Batch {
    Item item;
    unsigned mask = 0;
    int begun = 0;  ///< selections of the item before these
    Vec16 unit[kPushedAtOnce];
  };
  /// Own tokens' rows wait at home between the halves, which leave y free.
  __device__ __forceinline__ bool isSent(const Item& item) const {
    return item.source >= 0 && (item.source != a.group.rank || !receives(a.group.phase));
  }
  /// Requests the next rows, perhaps none of this item. False: there are no more items.
  __device__ __forceinline__ bool request(Batch& batch, Cursor& at) const {
    if (!isSent(at.item)) return false;
    if (at.fresh) at.left = ballot(at.slot >= 0);
    at.fresh = false;
    batch.item = at.item;
    unsigned left = at.left;
#pragma unroll
    for (int i = 0; i < kPushedAtOnce; ++i) {
      if (left == 0) continue;
      this->loadUnit(batch.unit[i], shuffle(at.slot, findFirstSet(left) - 1), at.item.pass);
      left &= left - 1;
    }
    batch.mask = at.left ^ left;
    batch.begun = at.begun;
    at.begun += popCount(batch.mask);
    at.left = left;
    if (left == 0) at = startOf(this->after(at.item));
    return true;
  }
  /// The slots are on their way while the rows before are sent.
  __device__ __forceinline__ Cursor startOf(const Item& item) const {
    return {item, this->loadSlot(item)};
  }
  __device__ __forceinline__ void push(const Batch& batch) const {
    const Item& item = batch.item;
    unsigned mask = batch.mask;
    if (mask == 0) return;
    const bool port = isPort<Path>(a.group, item.source);
    const int place = port ? this->rowsFrom(item.source, item.token).selections() + batch.begun : 0;
    char* const to = port ? this->outbox() : areas.at(item.source);
#pragma unroll
    for (int i = 0; i < kPushedAtOnce; ++i) {
      if (mask == 0) continue;
      const int k = findFirstSet(mask) - 1;
      mask &= mask - 1;
      if (port && place + i >= a.area.outboxRows) continue;  // reported by sendPorts()
      this->pushUnit(
          to + (port ? a.area.outboxRow(item.source, place + i) : a.area.row(item.token, k)),
          batch.unit[i], item.pass);
    }
  }
  /// The next rows are requested before the last ones are pushed: loads behind a push would wait
  /// until the wire has taken it.
  __device__ __forceinline__ void sendRows() const {
    Cursor at = startOf(this->peerItem(firstPeerItem()));
    Batch batch, next;
    bool more = request(batch, at);
#pragma unroll 1
    while (more) {
      more = request(next, at);
      push(batch);
      batch = next;
    }
  }

  // ---- peers behind port channels ----------------------------------------------------------

  /// The last block: the signal that weights come with in the other combine, since signals are
  /// counted and the two may take turns.
  __device__ __forceinline__ void signalPorts() const {
    sendToPorts<Path>(a.group, PortMessage::weights, turn.epoch, [&](int) { return PortRange{}; });
  }
  /// After all rows: the block that comes last lets them go.
  __device__ __forceinline__ void sendPorts() const {
    const LowLatencyGroup& g = a.group;
    if (!isLastWriter(g, LowLatencyKind::combine, shared().lastWriter)) return;
    sendToPorts<Path>(g, PortMessage::partial, turn.epoch, [&](int peer) {
      int rows = this->rowsFrom(peer, a.sourceTokens[peer]).selections();
      if (rows > a.area.outboxRows) {
        if (laneId() == 0) {
          reportFailure(g.wait, lowLatencyWait(WaitWhat::lowLatencyRepeats, peer),
                        static_cast<std::uint64_t>(a.area.outboxRows),
                        static_cast<std::uint64_t>(rows));
        }
        rows = a.area.outboxRows;
      }
      return PortRange{a.area.outboxRow(peer, 0),
                       a.area.portRow(a.rowTable[this->table().baseFrom(peer)]),
                       static_cast<std::size_t>(rows) * a.area.rowBytes};
    });
  }
  /// All threads: the peers' rows.
  __device__ __forceinline__ void awaitPortRows() const {
    this->awaitMessages(PortMessage::partial, WaitWhat::lowLatencyOutput);
    // The last block has the fewest tokens.
    if (blockIndex() == gridSize() - 1 && warpId() == kLowLatencyWarps - 1) {
      noteFinished(a.group, LowLatencyKind::combine);
    }
  }
  /// All threads: places[k] for the selections of an own token behind port channels.
  __device__ __forceinline__ void findPlaces(int token) const {
    syncBlock();  // those of the token before are used
    if (warpId() == 0) {
      const int lane = static_cast<int>(laneId());
      const int owner = ownerOf(a, loadSelection(a, token));
      forEachOwner(a, loadSelection(a, token), [&](int rank) {
        const unsigned here = ballot(owner == rank);
        if (owner != rank || !isPort<Path>(a.group, rank)) return;
        shared().places[lane] = a.rowTable[this->table().baseTo(rank)] +
                                this->rowsTo(rank, token).selections() +
                                popCount(here & ((1u << lane) - 1));
      });
    }
    syncBlock();
  }

  // ---- at home ---------------------------------------------------------------------------------

  /// An own token, whose selections a warp's lanes hold.
  struct Token {
    int token;
    int owner;          ///< of this lane's selection
    std::int32_t slot;  ///< of this lane's selection, if its expert is here
    float weight;
    unsigned wanted;  ///< selections with a row; see settle()
  };
  /// All threads, of every token of the block; the first one's before the wait for rows.
  __device__ __forceinline__ Token loadToken(int token) const {
    Token of{token, -1, -1, 0.0f, 0};
    if (token >= a.tokens) return of;
    if constexpr (Path::kPorts) findPlaces(token);
    const std::int64_t first = static_cast<std::int64_t>(token) * a.area.topk;
    const int lane = static_cast<int>(laneId());
    const bool inside = lane < a.area.topk;
    of.owner = ownerOf(a, loadSelection(a, token));
    if (inside) {
      of.slot = a.slots[static_cast<std::int64_t>(a.group.rank) * a.area.maxTokens * a.area.topk +
                        first + lane];
      of.weight = a.weights[first + lane];
    }
    return of;
  }
  /// Finds out which rows of a token are to be had, once it is known whose did not come.
  __device__ __forceinline__ void settle(Token& of) const {
    const LowLatencyGroup& g = a.group;
    bool wanted = of.owner >= 0;
    if (of.owner == g.rank) {
      wanted = of.slot >= 0;
    } else if (wanted) {
      wanted = !this->isLost(of.owner) && !isMasked<Path>(g, of.owner);
    }
    of.wanted = ballot(wanted);
  }
  /// Where a row has come or will.
  __device__ __forceinline__ const char* rowOf(const Token& of, int k, int rank) const {
    return areas.mine + (isPort<Path>(a.group, rank) ? a.area.portRow(shared().places[k])
                                                     : a.area.row(of.token, k));
  }
  /// In a whole call own rows are read where the experts left them.
  __device__ __forceinline__ bool isHere(int rank) const {
    return rank == a.group.rank && sends(a.group.phase);
  }
  /// Adds up to kPulledAtOnce rows, those of selections from `first` on.
  __device__ __forceinline__ void addRows(float (&sum)[8], const Token& of, int first,
                                          int pass) const {
    Vec16 unit[kPulledAtOnce];
    const unsigned mask = of.wanted >> first;
#pragma unroll
    for (int i = 0; i < kPulledAtOnce; ++i) {
      if ((mask >> i & 1u) == 0) continue;
      const int rank = shuffle(of.owner, first + i);
      if (isHere(rank)) {
        this->loadUnit(unit[i], shuffle(of.slot, first + i), pass);
      } else {
        unit[i] = this->peekUnit(rowOf(of, first + i, rank), pass);
      }
    }
#pragma unroll
    for (int i = 0; i < kPulledAtOnce; ++i) {
      if ((mask >> i & 1u) == 0) continue;
      const int rank = shuffle(of.owner, first + i);
      if (!isHere(rank)) {
        if (isMaskedForWarp<Path>(a.group, rank)) continue;
        const std::uint64_t start = this->waitBegins();
        const bool came = this->receiveUnit(rowOf(of, first + i, rank), unit[i], pass, rank,
                                            WaitWhat::lowLatencyOutput);
        if (rank != a.group.rank) this->countWait(rank, start);
        if (!came) continue;
      }
      addScaled(sum, unit[i], bitsToFloat(shuffle(floatToBits(of.weight), first + i)));
    }
  }
  __device__ __forceinline__ void receiveRows(Token of) const {
#pragma unroll 1
    for (; of.token < a.tokens; of = loadToken(of.token + static_cast<int>(gridSize()))) {
      settle(of);
#pragma unroll 1
      for (int pass = 0; pass < row.passes(); ++pass) {
        float sum[8] = {};
        addRows(sum, of, 0, pass);
        if constexpr (!Path::kFast) {
#pragma unroll 1
          for (int first = kPulledAtOnce; first < a.area.topk; first += kPulledAtOnce) {
            addRows(sum, of, first, pass);
          }
        }
        this->store(sum, of.token, pass);
      }
    }
  }
};

template <class Path>
__device__ void lowLatencySourceKernel(const LowLatencySourceArgs& a) {
  using Block = SourceCombineBlock<Path>;
  waitForPreviousKernel();
  letNextKernelStart();
  if (Path::kPorts && threadIndex() == 0) storeRelaxed(&Block::shared().portsLost, 0u);
  const LowLatencyTurn turn =
      enterLowLatency<Path>(a.group, LowLatencyKind::combine, sharedStorage<CombineShared>().turn);
  const Block block(a, turn);
  const bool last = blockIndex() == gridSize() - 1;
  if (turn.sound && sends(a.group.phase)) {
    if (last) block.pushHello(kReducedAtSource);
    if constexpr (Path::kPorts) {
      if (last) block.signalPorts();
    }
    block.sendRows();
    if constexpr (Path::kPorts) block.sendPorts();
  }
  if (turn.sound && receives(a.group.phase)) {
    const typename Block::Token first = block.loadToken(static_cast<int>(blockIndex()));
    if constexpr (Path::kPorts) block.awaitPortRows();
    if (last) block.awaitHellos(kReducedAtSource);
    block.receiveRows(first);
  }
  finishLowLatency<Path>(a.group, LowLatencyKind::combine, turn);
}

}  // namespace mscclpp::ep::MSCCLPP_PLATFORM_NS
