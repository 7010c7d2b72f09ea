// The outgoing half of a tcp connection.
#pragma once

#include <chrono>
#include <deque>
#include <memory>
#include <optional>
#include <vector>

#include <asio/buffer.hpp>

#include "core/bootstrap/connection.hpp"
#include "core/transport/tcp/memory.hpp"
#include "core/transport/tcp/staging.hpp"
#include "core/transport/tcp/wire.hpp"

namespace mscclpp::transport::tcp {

/// Turns operations into frames and hands them to the socket, from the caller's memory without a
/// copy. Order is kept; acks and heartbeats go between two frames.
class Sender {
 public:
  /// `staging` is null when no memory of the endpoint needs it.
  explicit Sender(std::unique_ptr<Staging> staging) : staging_(std::move(staging)) {}

  void write(std::shared_ptr<const Memory> source, uint64_t sourceOffset, const PeerMemory& target,
             uint64_t targetOffset, uint64_t bytes);
  void add(const PeerMemory& target, uint64_t offset, int64_t value);
  /// Tells the peer that so many of its operations are complete; repeats cost nothing.
  void acknowledge(uint64_t complete) noexcept { ackValue_ = complete; }
  void heartbeat();
  /// Nothing more but the ack that is due and a good-bye; what has not begun to leave is dropped.
  void goodbye();

  /// One gathering send that does not block; returns how much the socket took.
  size_t advance(detail::Socket& socket, asio::error_code& error);
  /// Nothing waits to be sent.
  bool idle() const noexcept { return operations_.empty() && frames_.empty(); }

 private:
  /// What is still to be framed of an operation.
  struct Operation {
    FrameHeader header;  ///< write: `value` and `offset` are those of the rest
    std::shared_ptr<const Memory> source;
    uint64_t sourceOffset = 0;
  };
  struct Frame {
    FrameHeader header;
    const char* payload = nullptr;
    size_t bytes = 0;                                ///< of the payload
    std::shared_ptr<const Memory> source = nullptr;  ///< kept alive until the socket has taken it
    std::optional<Event> copied = std::nullopt;      ///< staged: when the payload is there
    uint64_t stagingEnd = 0;
  };
  void compose();
  bool composePiece();
  void push(Frame frame);
  /// Fills buffers_ with what may leave now.
  void gather();
  void consume(size_t bytes);

  std::deque<Operation> operations_;
  std::deque<Frame> frames_;
  uint64_t framedBytes_ = 0;  ///< of all frames_
  size_t sent_ = 0;           ///< bytes of the first frame that have left
  uint64_t ackValue_ = 0;
  uint64_t ackFramed_ = 0;
  size_t acksInFrames_ = 0;
  std::vector<asio::const_buffer> buffers_;
  std::unique_ptr<Staging> staging_;  ///< last: its copies end before their sources go
};

}  // namespace mscclpp::transport::tcp
