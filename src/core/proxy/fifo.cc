#include <bit>

#include <mscclpp/errors.hpp>
#include <mscclpp/fifo.hpp>

namespace mscclpp {

namespace {

// Byte map of the device's part; each word is on a line of its own.
constexpr size_t kLine = 128;
constexpr size_t kHeadAt = 0;
constexpr size_t kTailCopyAt = kLine;
constexpr size_t kTailLockAt = 2 * kLine;
constexpr size_t kDeviceBytes = 3 * kLine;

uint64_t* wordAt(const std::shared_ptr<void>& memory, size_t offset) {
  return reinterpret_cast<uint64_t*>(static_cast<char*>(memory.get()) + offset);
}

}  // namespace

Fifo::Fifo(const std::shared_ptr<Device>& device, int depth, uint64_t startPosition)
    : position_(startPosition), published_(startPosition) {
  check(device != nullptr, ErrorCode::invalidArgument, "Fifo: the device is null");
  check(depth >= 2 && depth <= kMaxDepth && std::has_single_bit(static_cast<unsigned>(depth)),
        ErrorCode::invalidArgument, "Fifo: depth {}: it is a power of two from 2 to {}", depth,
        kMaxDepth);
  const auto slots = static_cast<uint64_t>(depth);
  check(startPosition % slots == 0, ErrorCode::invalidArgument,
        "Fifo: startPosition {} is no multiple of the depth {}", startPosition, depth);
  ring_ = device->allocatePinned(slots * sizeof(Trigger));
  tail_ = device->allocatePinned(kLine);
  device_ = device->allocateExportable(kDeviceBytes);
  handle_ = {.ring = static_cast<uint64_t*>(ring_.get()),
             .tail = wordAt(tail_, 0),
             .head = wordAt(device_, kHeadAt),
             .tailCopy = wordAt(device_, kTailCopyAt),
             .tailLock = wordAt(device_, kTailLockAt),
             .depth = slots};
  if (startPosition == 0) return;
  // As if startPosition triggers had gone through: slots carry the lap bits of the lap before.
  const uint64_t old = lapBit(startPosition - slots, slots);
  for (uint64_t word = 0; word < 2 * slots; ++word) handle_.ring[word] = old;
  *wordAt(tail_, 0) = startPosition;
  const auto start = device->allocatePinned(sizeof(uint64_t));
  *wordAt(start, 0) = startPosition;
  device->copyNow(handle_.head, start.get(), sizeof(uint64_t));
  device->copyNow(handle_.tailCopy, start.get(), sizeof(uint64_t));
}

bool Fifo::peek(TriggerFields& fields) const noexcept {
  const uint64_t* slot = handle_.ring + 2 * (position_ & (handle_.depth - 1));
  const uint64_t lap = lapBit(position_, handle_.depth);
  const Trigger trigger{__atomic_load_n(slot, __ATOMIC_ACQUIRE),
                        __atomic_load_n(slot + 1, __ATOMIC_ACQUIRE)};
  if ((trigger.first & Trigger::kLapBit) != lap || (trigger.second & Trigger::kLapBit) != lap) {
    return false;
  }
  fields = trigger.decode();
  return true;
}

void Fifo::publish() noexcept {
  if (published_ == position_) return;
  published_ = position_;
  __atomic_store_n(const_cast<uint64_t*>(handle_.tail), position_, __ATOMIC_RELEASE);
}

}  // namespace mscclpp
