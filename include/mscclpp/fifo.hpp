// The queue from kernels to a proxy.
#pragma once

#include <cstdint>
#include <memory>

#include <mscclpp/fifo_handle.hpp>
#include <mscclpp/platform.hpp>

namespace mscclpp {

/// A ring of triggers: kernels push (FifoDevice), one host thread pops. Pops come in the order of
/// positions. Its memory belongs to this object: no kernel may use the handle once it is gone.
class Fifo {
 public:
  static constexpr int kDefaultDepth = 512;
  static constexpr int kMaxDepth = 1 << 20;

  /// `depth` is a power of two from 2. Positions start at `startPosition`, a multiple of `depth`
  /// (tests begin close to where counters of 32 bits would wrap). Blocks for the allocations.
  /// @throws Error invalidArgument, outOfMemory.
  explicit Fifo(const std::shared_ptr<Device>& device, int depth = kDefaultDepth,
                uint64_t startPosition = 0);

  /// For FifoDevice in kernels of the device.
  FifoHandle deviceHandle() const noexcept { return handle_; }

  /// Whether a trigger has come; if so, `fields` is it. It stays the next one until pop().
  bool peek(TriggerFields& fields) const noexcept;
  /// Brings triggers that are likely to be next closer: a slot that a device has written is not in
  /// any cache of this processor.
  void prefetch() const noexcept {
    constexpr uint64_t kSlotsAhead = 16;
    __builtin_prefetch(handle_.ring + 2 * ((position_ + kSlotsAhead) & (handle_.depth - 1)));
  }
  /// Done with the trigger that peek() showed.
  void pop() noexcept { ++position_; }
  /// Position of the next trigger: how many were popped, plus startPosition.
  uint64_t position() const noexcept { return position_; }
  /// Lets producers use the popped slots again. Once per run is enough.
  void publish() noexcept;

 private:
  FifoHandle handle_{};
  std::shared_ptr<void> ring_;
  std::shared_ptr<void> tail_;
  std::shared_ptr<void> device_;  ///< head, tail copy and lock
  uint64_t position_;
  uint64_t published_;
};

}  // namespace mscclpp
