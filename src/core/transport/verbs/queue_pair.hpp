// A reliable connected queue pair.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <vector>

#include "core/transport/verbs/nic.hpp"

namespace mscclpp::transport::verbs {

/// Plain bytes, told to the peer.
struct QueuePairAddress {
  uint32_t number;
  uint32_t firstPacket;  ///< sequence number, random: packets of an earlier life do not fit
};

class QueuePair {
 public:
  struct Depths {
    uint32_t sends;
    uint32_t receives;
  };
  /// One work request.
  struct Work {
    ibv_wr_opcode opcode = IBV_WR_RDMA_WRITE;
    uint64_t local = 0;
    uint32_t bytes = 0;
    uint32_t localKey = 0;
    bool readByCpu = false;  ///< `local` may be read while posting: small ones travel inline
    uint64_t remote = 0;
    uint32_t remoteKey = 0;
    uint64_t add = 0;
    uint32_t immediate = 0;
    bool fence = false;      ///< waits for the reads and atomics before it
    uint64_t operation = 0;  ///< the caller's; comes back from retire()
  };

  QueuePair(std::shared_ptr<Nic> nic, ibv_cq* completions, unsigned index, Depths depths);
  ~QueuePair();
  QueuePair(const QueuePair&) = delete;
  QueuePair& operator=(const QueuePair&) = delete;

  QueuePairAddress address() const noexcept { return {pair_->qp_num, firstPacket_}; }
  /// Ready to receive and to send. `readsAtOnce`: how many reads and atomics may be under way.
  /// @throws SystemError.
  void connect(const PortAddress& port, const QueuePairAddress& peer, uint8_t readsAtOnce);

  uint32_t room() const noexcept { return depths_.sends - static_cast<uint32_t>(posted_ - done_); }
  bool idle() const noexcept { return posted_ == done_; }
  /// Adds to the chain; needs room(). Posts when the chain is full. @throws SystemError.
  void append(const Work& work);
  /// Posts the chain. @throws SystemError.
  void submit();
  /// Readies `count` receives without memory, for writes with immediate data. @throws SystemError.
  void postReceives(uint32_t count);

  static unsigned indexOf(uint64_t workId) noexcept { return workId % kMaxPairs; }
  /// A completion with this id says that everything up to it is done: calls `action` with the
  /// operations that belong to it.
  template <class F>
  void retire(uint64_t workId, F&& action) {
    for (const uint64_t end = workId / kMaxPairs + 1; done_ < end; ++done_) {
      action(operations_[done_ % operations_.size()]);
    }
  }
  uint32_t peer() const noexcept { return peer_; }

 private:
  static constexpr unsigned kMaxPairs = 16;
  static constexpr size_t kChain = 16;

  void modify(ibv_qp_attr& attributes, int mask, const char* to);

  std::shared_ptr<Nic> nic_;
  unsigned index_;
  Depths depths_;
  Handle<ibv_qp> pair_;
  uint32_t firstPacket_;
  uint32_t maxInline_ = 0;
  uint32_t peer_ = 0;
  uint64_t posted_ = 0;  ///< or in the chain
  uint64_t done_ = 0;
  std::vector<uint64_t> operations_;  ///< of the work requests under way, by number
  size_t chained_ = 0;
  std::array<ibv_send_wr, kChain> chain_{};
  std::array<ibv_sge, kChain> pieces_{};
};

}  // namespace mscclpp::transport::verbs
