// The incoming half of a tcp connection.
#pragma once

#include <array>
#include <deque>
#include <memory>
#include <optional>
#include <vector>

#include "core/bootstrap/connection.hpp"
#include "core/transport/tcp/memory.hpp"
#include "core/transport/tcp/staging.hpp"
#include "core/transport/tcp/wire.hpp"

namespace mscclpp::transport::tcp {

/// Reads frames and applies them in the order in which they come. Payloads go from the socket into
/// the registered memory. Copies of staged payloads run behind: adds and completions that come
/// after such a copy wait for it, so nobody learns of data that is not there yet.
class Receiver {
 public:
  /// `staging` is null when no memory of the endpoint needs it.
  Receiver(std::shared_ptr<MemoryTable> memories, std::unique_ptr<Staging> staging)
      : memories_(std::move(memories)), staging_(std::move(staging)) {}

  /// Reads what is there without blocking, up to a limit; returns how many bytes came.
  /// @throws Error peerFailure for a frame that cannot be right; nothing of it has been applied.
  size_t advance(detail::Socket& socket, asio::error_code& error);
  /// Applies what waits for copies that have ended; returns whether there was any.
  bool settle();

  /// Operations of the peer that are complete.
  uint64_t complete() const noexcept { return complete_; }
  /// How many of our operations the peer says are complete.
  uint64_t acknowledged() const noexcept { return acknowledged_; }
  bool goodbye() const noexcept { return goodbye_; }

 private:
  struct Add {
    std::shared_ptr<Memory> memory;
    uint64_t offset;
    int64_t value;
  };
  /// What one call of advance() has put behind copies.
  struct Batch {
    Event copied;  ///< null: waits only for the batches before it
    uint64_t stagingEnd = 0;
    uint64_t operations = 0;
    std::vector<Add> adds;
    std::vector<std::shared_ptr<Memory>> targets;  ///< kept alive until copied
  };
  static constexpr size_t kBufferBytes = 8192;

  bool digest();
  bool begin(const FrameHeader& header);
  bool beginWrite(const FrameHeader& header);
  void beginAdd(const FrameHeader& header);
  void endPayload();
  void operationEnds();
  void closeBatch();
  bool behindCopies() const noexcept {
    return !batches_.empty() || (staging_ != nullptr && staging_->copied());
  }
  std::shared_ptr<Memory> memoryFor(const FrameHeader& header, const char* what, uint64_t bytes);

  std::shared_ptr<MemoryTable> memories_;
  std::array<char, kBufferBytes> buffer_;
  size_t begin_ = 0;  ///< of what has been read and not digested
  size_t end_ = 0;

  FrameHeader frame_{};  ///< whose payload is being read
  std::shared_ptr<Memory> target_;
  char* into_ = nullptr;  ///< where the rest of the payload goes
  uint64_t rest_ = 0;
  char* staged_ = nullptr;  ///< start of the payload in the ring, when it is staged

  Batch open_;
  std::deque<Batch> batches_;
  uint64_t complete_ = 0;
  uint64_t acknowledged_ = 0;
  bool goodbye_ = false;
  std::unique_ptr<Staging> staging_;  ///< last: its copies end before their targets go
};

}  // namespace mscclpp::transport::tcp
