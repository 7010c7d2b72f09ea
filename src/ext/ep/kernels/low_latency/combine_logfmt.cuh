#pragma once

#include "combine.cuh"
#include "logfmt_rows.cuh"

/// Low-latency combine with use_logfmt: as in combine.cuh, but the sums that cross between ranks
/// are logarithmic values. Own sums stay fp32.
namespace mscclpp::ep::MSCCLPP_PLATFORM_NS {

/// A block's shared memory. Rows take the passes in turn: one barrier each is enough, since all
/// threads are through with the row before last when they come to the barrier of the last one.
struct LogfmtShared {
  CombineShared combine;
  alignas(16) LogfmtPass pass[2];
};

template <class Path>
struct LogfmtCombineBlock : CombineBlock<Path> {
  using Base = CombineBlock<Path>;
  using Base::a, Base::turn, Base::row, Base::areas;
  using typename Base::Item;
  using typename Base::Rows;

  const LogfmtRow<Path> encoded{row};

  __device__ __forceinline__ LogfmtCombineBlock(const LowLatencyCombineArgs& args,
                                                const LowLatencyTurn& now)
      : Base(args, now) {}

  /// Of the block's row number `number`, from 1 on.
  __device__ __forceinline__ static LogfmtPass& passOf(std::uint32_t number) {
    return sharedStorage<LogfmtShared>().pass[number % 2];
  }
  /// All threads, in every row: whether all warps have brought their part.
  __device__ __forceinline__ static bool isComplete(LogfmtPass& pass, std::uint32_t number,
                                                    bool mine) {
    if (!mine && laneId() == 0) storeRelaxed(&pass.incomplete, number);
    syncBlock();
    return loadRelaxed(&pass.incomplete) != number;
  }

  /// A peer's sum, which this warp `has`, to its home. All threads.
  __device__ __forceinline__ void sendSum(const float (&sum)[8], const Item& item, int place,
                                          bool has, std::uint32_t number) const {
    LogfmtPass& pass = passOf(number);
    if (has) encoded.encode(pass, sum, item.pass);
    if (!isComplete(pass, number, has)) return;
    char* const to = isPort<Path>(a.group, item.source)
                         ? this->outbox() + a.area.partial(item.source, place)
                         : areas.at(item.source) + a.area.partial(a.group.rank, place);
    pushLine(to + encoded.offsetOf(item.pass), encoded.lineUnit(pass, item.pass), turn.epoch,
             encoded.hasLine(item.pass), Path::writes(a.group));
  }

  /// This warp's lines of a peer's sum. False: they did not come.
  __device__ __forceinline__ bool receiveLines(LogfmtPass& to, int rank, const char* from,
                                               int pass) const {
    const LowLatencyGroup& g = a.group;
    const char* const line = from + encoded.offsetOf(pass);
    const bool active = encoded.hasLine(pass);
    Vec16 unit = peekLine(line, active);
    if (!pullLine(waitControl<Path>(g), line, unit, turn.epoch, active,
                  lowLatencyWait(WaitWhat::lowLatencyPartial, rank), Path::writes(g))) {
      giveUpOn(g, rank);
      return false;
    }
    encoded.keepLineUnit(to, unit, pass);
    return true;
  }
  /// The peers' sums of an own token. All threads; `number`: of the last row.
  __device__ __forceinline__ void addPeers(float (&sum)[8], const Item& item,
                                           std::int64_t selection, std::uint32_t& number) const {
    const LowLatencyGroup& g = a.group;
    int owner = -1;
    forEachOwner(a, selection, [&](int rank) {
      ++owner;
      if (rank == g.rank) return;
      LogfmtPass& pass = passOf(++number);
      const std::uint64_t start = this->waitBegins();
      const int place = isPort<Path>(g, rank) ? this->shared().places[owner] : item.token;
      const bool came =
          !this->isLost(rank) && !isMaskedForWarp<Path>(g, rank) &&
          receiveLines(pass, rank, areas.mine + a.area.partial(rank, place), item.pass);
      if (isComplete(pass, number, came)) encoded.addDecoded(sum, pass, item.pass);
      this->countWait(rank, start);
    });
  }
  __device__ __forceinline__ void finishOwn(float (&sum)[8], const Item& item,
                                            std::int64_t selection, std::uint32_t& number) const {
    if (!receives(a.group.phase)) {
      this->keepOwn(sum, item);
      return;
    }
    if (!sends(a.group.phase)) this->takeOwn(sum, item);
    addPeers(sum, item, selection, number);
    this->store(sum, item.token, item.pass);
  }

  /// As CombineBlock::run(), but all threads stay together where a row goes through shared memory.
  /// They agree on which tokens have rows here, unless masks may change.
  __device__ __forceinline__ void run() const {
    Rows rows;
    Item item = this->peerItem(firstPeerItem());
    std::int32_t slot = this->loadSlot(item);
    this->request(rows, slot, 0, item.pass);
    if (Path::kPorts && sends(a.group.phase)) {
      this->awaitMessages(PortMessage::weights, WaitWhat::lowLatencyWeights);
    }
    bool passed = false;
    std::uint32_t number = 0;
#pragma unroll 1
    while (true) {
      const bool own = item.source == a.group.rank;
      const std::int64_t selection = own ? loadSelection(a, item.token) : -1;
      if constexpr (Path::kPorts) {
        if (own && item.pass == 0) this->findOwnPlaces(item, selection);
      }
      if (!passed && (item.source < 0 || own)) {
        if constexpr (Path::kPorts) this->passPorts();
        // Not before: the peers' sums must not wait for a peer that is late.
        const bool last = blockIndex() == gridSize() - 1;
        if (last && receives(a.group.phase)) this->awaitHellos(kReducedAsLogfmt);
        passed = true;
      }
      if (item.source < 0) break;
      const Item next = this->after(item);
      const std::int32_t nextSlot = this->loadSlot(next);
      const bool wanted = own || rows.mask != 0;
      float sum[8] = {};
      Vec16 weights{};
      const int place = wanted ? this->placeOf(item) : 0;
      const bool has = wanted && this->loadWeights(item, place, weights);
      if (has) this->sumRows(sum, rows, slot, weights, item.pass);
      this->request(rows, nextSlot, 0, next.pass);
      if (own) {
        finishOwn(sum, item, selection, number);
      } else if (wanted || Path::shrink(a.group)) {
        sendSum(sum, item, place, has, ++number);
      }
      item = next;
      slot = nextSlot;
    }
  }
};

template <class Path>
__device__ void lowLatencyLogfmtKernel(const LowLatencyCombineArgs& a) {
  using Block = LogfmtCombineBlock<Path>;
  waitForPreviousKernel();
  letNextKernelStart();
  if (threadIndex() == 0) {
    if constexpr (Path::kPorts) storeRelaxed(&Block::shared().portsLost, 0u);
    for (std::uint32_t i = 0; i < 2; ++i) storeRelaxed(&Block::passOf(i).incomplete, 0u);
  }
  const LowLatencyTurn turn =
      enterLowLatency<Path>(a.group, LowLatencyKind::combine, sharedStorage<CombineShared>().turn);
  const Block block(a, turn);
  if (turn.sound) {
    if (sends(a.group.phase)) {
      block.pushWeights();
      const bool last = blockIndex() == gridSize() - 1;
      if (last) block.pushHello(kReducedAsLogfmt);
      if constexpr (Path::kPorts) {
        if (last) block.sendPortWeights();
      }
    }
    block.run();
  }
  finishLowLatency<Path>(a.group, LowLatencyKind::combine, turn);
}

}  // namespace mscclpp::ep::MSCCLPP_PLATFORM_NS
