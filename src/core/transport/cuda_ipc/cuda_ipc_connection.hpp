// GPU ranks of one host: the copy engine writes into the peer's mapped memory.
#pragma once

#include <cuda_runtime_api.h>

#include <deque>
#include <memory>
#include <vector>

#include <mscclpp/connection.hpp>

#include "core/transport/peer_process.hpp"

namespace mscclpp::transport {

class IpcMemory final : public LocalMemory {
 public:
  using LocalMemory::LocalMemory;
  std::vector<std::byte> describe() const override { return memory().serialize(); }
};

class MappedIpcMemory final : public RemoteMemory {
 public:
  MappedIpcMemory(std::shared_ptr<void> memory, size_t bytes, bool onDevice)
      : RemoteMemory(bytes, onDevice), memory_(std::move(memory)) {}
  char* data() const { return static_cast<char*>(memory_.get()); }

 private:
  std::shared_ptr<void> memory_;
};

/// The numbers 0 to 65535 as 16-bit words in GPU memory. A copy of eight bytes from host memory
/// takes the copy engine two microseconds longer than one of two bytes from here.
class NumberTable {
 public:
  explicit NumberTable(const std::shared_ptr<Device>& device);
  const char* find(uint64_t number) const {
    return static_cast<const char*>(memory_.get()) + 2 * (number % kNumbers);
  }
  static constexpr uint64_t kNumbers = 65536;

 private:
  std::shared_ptr<void> memory_;
};

/// Copies are gathered until submit() and go to the stream as one batch: a copy by itself leaves a
/// gap of two microseconds. A copy that goes on where the one before it ended becomes a part of it.
/// Many bytes do not wait for submit(), since a batch is told as a whole. What must come after them
/// on the host (counters, signals without data) waits for the event behind the batch, so that puts
/// with counters between them are gathered too; signals behind data go through the same stream.
class CudaIpcConnection final : public Connection {
 public:
  CudaIpcConnection(std::shared_ptr<Endpoint> endpoint, std::shared_ptr<Stream> stream,
                    std::shared_ptr<const NumberTable> numbers, int peer);
  ~CudaIpcConnection() override;

  ConnectionCapabilities capabilities() const noexcept override {
    return {.oneSidedWrites = true,
            .oneSidedAtomics = true,
            .deviceMemory = true,
            .deviceCounters = false,
            .deviceSignals = true};
  }
  std::string describe() const override;
  std::vector<std::byte> address() const override;
  void connect(std::span<const std::byte> theirs) override;
  std::shared_ptr<RemoteMemory> importMemory(std::span<const std::byte> description) override;
  bool canPost() const override { return posted() - completed_ < depth_; }
  void submit() override;
  bool progress() override;
  uint64_t completed() const noexcept override {
    asked_ = completed_ < posted();
    return completed_;
  }
  void close() noexcept override { process_.sayGoodbye(); }

 private:
  /// Something under way, complete in the order of the queue.
  struct Step {
    enum class Kind { copies, add, store } kind;
    uint64_t upTo;      ///< operations that are complete once this step is
    cudaEvent_t event;  ///< copies
    uint64_t* word;     ///< add, store: in host memory
    uint64_t value;
  };

  void doWrite(const Write& write) override;
  void doAdd(const Add& add) override;
  void doSignal(SignalTarget& target) override;
  void onHost(Step::Kind kind, uint64_t* word, uint64_t value);
  static void apply(const Step& step);
  bool quiet() const { return steps_.empty() && sources_.empty(); }
  void noteDone();
  void recordEvent();
  void copySignal(char* word, uint64_t count);
  void copyGathered();
  void copyBatch(size_t first, size_t count);
  bool finishSteps();
  void checkPeer();
  cudaEvent_t takeEvent();
  /// Runs `action`; what it throws breaks the connection.
  template <class F>
  void guarded(F&& action);

  std::shared_ptr<Endpoint> endpoint_;
  PeerProcess process_;
  const uint64_t depth_;
  std::shared_ptr<Stream> stream_;
  std::shared_ptr<const NumberTable> numbers_;
  std::shared_ptr<void> values_;  ///< pinned: high parts of signals, one per operation under way
  std::vector<void*> destinations_;
  std::vector<const void*> sources_;
  std::vector<size_t> sizes_;
  Write last_{};  ///< of what is gathered
  size_t gatheredBytes_ = 0;
  std::vector<Step> behindGathered_;  ///< adds and stores; empty when nothing is gathered
  std::deque<Step> steps_;
  size_t hostSteps_ = 0;  ///< of steps_: adds and stores
  std::vector<cudaEvent_t> freeEvents_;
  uint64_t completed_ = 0;
  /// Somebody waits for completions. Asking the driver costs more than a microsecond and keeps
  /// other threads from it: it is done when there is a reason.
  mutable bool asked_ = false;
};

}  // namespace mscclpp::transport
