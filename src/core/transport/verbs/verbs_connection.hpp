// One peer over reliable connected queue pairs.
#pragma once

#include <array>
#include <chrono>
#include <cstdint>
#include <deque>
#include <memory>
#include <string>
#include <vector>

#include <mscclpp/connection.hpp>

#include "core/transport/verbs/queue_pair.hpp"
#include "core/transport/verbs/verbs_endpoint.hpp"

namespace mscclpp::transport::verbs {

/// What the two sides of a connection tell each other by writing into each other's memory.
struct ControlBlock {
  static constexpr uint32_t kAddSlots = 64;
  /// An add that the receiver's CPU makes.
  struct AddRecord {
    uint64_t address;
    int64_t value;
    uint64_t key;
  };
  // Written by the peer.
  uint64_t goodbye = 0;
  uint64_t applied = 0;  ///< how many of this side's add records it has dealt with
  std::array<AddRecord, kAddSlots> addsIn{};
  // Sources of writes to the peer, and where results go that nobody reads.
  uint64_t goodbyeOut = 1;
  uint64_t appliedOut = 0;
  uint64_t result = 0;
  std::array<AddRecord, kAddSlots> addsOut{};
};

/// How order is kept. A queue pair executes its requests in order at the peer, so queue pair 0
/// carries all adds, all signals and all writes but the large ones: what follows on it needs no
/// waiting. Large writes are cut into pieces that go round all queue pairs; an add behind them is
/// held back until the pieces on the other queue pairs are complete, and what was posted after it
/// waits behind it. With one queue pair, nothing is ever held back.
///
/// Between host memory and GPU memory the peer's bus keeps no order. An add into the one after
/// writes into the other is made behind a read of what was written last: its answer cannot
/// overtake the writes.
///
/// Without atomics of both NICs an add is a write with immediate data: a record that the receiver
/// finds with the completion, and applies; what came before on the queue pair is in memory then. It
/// answers with the number of records applied, which is also the permission to send more.
class VerbsConnection final : public Connection {
 public:
  VerbsConnection(std::shared_ptr<VerbsEndpoint> endpoint, int peer);

  ConnectionCapabilities capabilities() const noexcept override;
  std::string describe() const override;
  std::vector<std::byte> address() const override;
  /// Does not wait for the peer: until its queue pairs are ready too, the hardware's retries cover
  /// a difference of half a second, and connectAll() lets nobody go before all have connected.
  void connect(std::span<const std::byte> theirs) override;
  std::shared_ptr<RemoteMemory> importMemory(std::span<const std::byte> description) override;

  bool canPost() const override;
  void submit() override;
  bool progress() override;
  uint64_t completed() const noexcept override { return completed_; }
  /// Waits until the peer's NIC has the good-bye, about a second at most.
  void close() noexcept override;

 private:
  /// Of work requests that belong to no operation.
  static constexpr uint64_t kNoOperation = ~uint64_t{0};

  struct Operation {
    bool isAdd = false;
    bool readByCpu = false;
    bool remoteOnDevice = false;
    uint32_t localKey = 0;
    uint32_t remoteKey = 0;
    uint64_t local = 0;
    uint64_t remote = 0;
    uint64_t bytes = 0;
    int64_t value = 0;
    uint64_t sent = 0;         ///< bytes that have been posted
    uint32_t outstanding = 0;  ///< completions, and the peer's answer, that are missing
  };
  /// A memory's last written place, when an add elsewhere would have no order behind it.
  struct Unordered {
    bool any = false;
    uint64_t address = 0;
    uint32_t key = 0;
  };

  void doWrite(const Write& write) override;
  void doAdd(const Add& add) override;
  void doSignal(SignalTarget& target) override;

  /// What goes wrong breaks the connection.
  template <class F>
  void guarded(F&& action) noexcept {
    if (failed() || !connected_ || closed_) return;
    try {
      action();
    } catch (const std::exception& error) {
      fail(error.what());
    }
  }
  Operation& at(uint64_t operation) { return operations_[operation - completed_]; }
  QueuePair& first() { return *pairs_.front(); }
  void pump();
  bool postWrite(Operation& operation);
  bool postAdd(Operation& operation);
  void postFence(const Unordered& place);
  void postControl(uint64_t offsetThere, const uint64_t* source, uint32_t bytes);
  bool pollCompletions();
  void onAddRecord(uint32_t slot);
  bool noticeApplied();
  void tellApplied();
  void finishPart(uint64_t operation);
  void retire();
  void keepAlive();
  void lookForEvents();
  void onBadCompletion(const ibv_wc& completion);
  bool peerHasLeft() const noexcept;

  std::shared_ptr<VerbsEndpoint> endpoint_;
  std::unique_ptr<ControlBlock> control_;
  Handle<ibv_mr> controlRegion_;
  uint32_t sendDepth_;
  Handle<ibv_cq> completions_;
  std::vector<std::unique_ptr<QueuePair>> pairs_;
  std::chrono::nanoseconds keepAlive_;

  bool connected_ = false;
  bool closed_ = false;
  bool hardwareAtomics_ = false;
  std::string peerText_;  ///< for describe()
  uint64_t theirControl_ = 0;
  uint32_t theirControlKey_ = 0;
  uint64_t largestPiece_ = 0;

  std::deque<Operation> operations_;  ///< from number completed_ on
  uint64_t completed_ = 0;
  uint64_t next_ = 0;                   ///< first operation that is not posted altogether
  std::array<Unordered, 2> unordered_;  ///< [0] host memory, [1] GPU memory
  bool lastOnDevice_ = false;           ///< the last write posted
  std::deque<uint64_t>
      awaitingApplied_;  ///< operations whose add records the peer has not answered
  uint64_t recordsSent_ = 0;
  uint64_t recordsAnswered_ = 0;
  uint64_t recordsApplied_ = 0;                     ///< of the peer's
  uint64_t recordsTold_ = 0;                        ///< of these, how many it knows of
  std::chrono::steady_clock::time_point lastSign_;  ///< of life
  uint64_t eventsSeen_ = 0;
};

}  // namespace mscclpp::transport::verbs
