// Pinned memory between a socket and memory that the socket calls cannot address.
#pragma once

#include <cstdint>
#include <memory>

#include <mscclpp/platform.hpp>

namespace mscclpp::transport::tcp {

/// One direction of one connection: a ring of pinned memory and the stream of its copies, which
/// others may use, too. Room is given and taken back in the same order.
class Staging {
 public:
  /// Blocks (Device::allocatePinned).
  Staging(std::shared_ptr<Device> device, std::shared_ptr<Stream> stream);
  /// Waits as finish().
  ~Staging();
  Staging(const Staging&) = delete;
  Staging& operator=(const Staging&) = delete;

  /// `bytes` (at most kPieceBytes) in one piece; null when there is no room until a release().
  char* reserve(uint64_t bytes);
  /// Where the last reservation ends: what release() takes.
  uint64_t end() const noexcept { return head_; }
  /// Gives back everything up to `end`.
  void release(uint64_t end) noexcept { tail_ = end; }

  void copy(void* destination, const void* source, uint64_t bytes);
  /// Whether copies were made since the last record().
  bool copied() const noexcept { return copied_; }
  /// Complete when the copies made so far are.
  Event record();
  /// Blocks until all copies are made: neither their sources and targets nor the ring may go
  /// before.
  void finish();

 private:
  std::shared_ptr<Device> device_;
  std::shared_ptr<void> ring_;
  std::shared_ptr<Stream> stream_;
  uint64_t head_ = 0;
  uint64_t tail_ = 0;
  bool copied_ = false;
};

}  // namespace mscclpp::transport::tcp
