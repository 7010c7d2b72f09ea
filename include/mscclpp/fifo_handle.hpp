// What kernels push and proxies pop: plain structs, the same on the host and on both platforms.
#pragma once

#include <cstdint>
#include <type_traits>

#include <mscclpp/device/platform.hpp>

namespace mscclpp {

/// What a proxy is asked to do.
enum class TriggerKind : uint32_t { none = 0, put, putWithSignal, signal, atomicAdd, flush };

/// One request, as kernels build it and proxies read it.
struct TriggerFields {
  TriggerKind kind = TriggerKind::none;
  uint32_t channel = 0;       ///< number of the port channel at its proxy
  uint64_t remoteOffset = 0;  ///< bytes; put, atomicAdd
  uint64_t localOffset = 0;   ///< bytes; put
  uint64_t bytes = 0;         ///< put
  int64_t value = 0;          ///< atomicAdd
};

/// A request in 16 bytes. Bit 63 of each word is kept free for the lap of its slot (Fifo).
///   word 0: kind 3 | channel 11 | remoteOffset 40 | low 9 bits of bytes, or bit 63 of value in bit
///   54 word 1: localOffset 40 | high 23 bits of bytes, or the low 63 bits of value
struct Trigger {
  static constexpr unsigned kKindBits = 3;
  static constexpr unsigned kChannelBits = 11;
  static constexpr unsigned kOffsetBits = 40;
  static constexpr unsigned kBytesBits = 32;
  static constexpr unsigned kLowBytesBits = 9;
  static constexpr uint64_t kMaxChannels = uint64_t{1} << kChannelBits;
  static constexpr uint64_t kMaxMemory = uint64_t{1} << kOffsetBits;  ///< 1 TiB
  static constexpr uint64_t kMaxBytes = (uint64_t{1} << kBytesBits) - 1;
  static constexpr uint64_t kLapBit = uint64_t{1} << 63;

  uint64_t first;
  uint64_t second;

  __host__ __device__ static constexpr Trigger encode(const TriggerFields& fields) {
    uint64_t first = static_cast<uint64_t>(fields.kind) |
                     static_cast<uint64_t>(fields.channel) << kKindBits |
                     fields.remoteOffset << (kKindBits + kChannelBits);
    constexpr unsigned kRest = kKindBits + kChannelBits + kOffsetBits;
    if (fields.kind == TriggerKind::atomicAdd) {
      const auto value = static_cast<uint64_t>(fields.value);
      return {first | (value >> 63) << kRest, value & ~kLapBit};
    }
    first |= (fields.bytes & ((1u << kLowBytesBits) - 1)) << kRest;
    return {first, fields.localOffset | (fields.bytes >> kLowBytesBits) << kOffsetBits};
  }
  /// The reverse; lap bits are ignored.
  __host__ __device__ constexpr TriggerFields decode() const {
    constexpr unsigned kRest = kKindBits + kChannelBits + kOffsetBits;
    const uint64_t one = first & ~kLapBit;
    const uint64_t two = second & ~kLapBit;
    TriggerFields fields;
    fields.kind = static_cast<TriggerKind>(one & ((1u << kKindBits) - 1));
    fields.channel = static_cast<uint32_t>(one >> kKindBits & (kMaxChannels - 1));
    fields.remoteOffset = one >> (kKindBits + kChannelBits) & (kMaxMemory - 1);
    if (fields.kind == TriggerKind::atomicAdd) {
      fields.value = static_cast<int64_t>(two | (one >> kRest & 1) << 63);
    } else {
      fields.localOffset = two & (kMaxMemory - 1);
      fields.bytes = one >> kRest | two >> kOffsetBits << kLowBytesBits;
    }
    return fields;
  }
};
static_assert(sizeof(Trigger) == 16 && std::is_trivially_copyable_v<Trigger>);
static_assert(Trigger::kKindBits + Trigger::kChannelBits + Trigger::kOffsetBits +
                  Trigger::kLowBytesBits ==
              63);
static_assert(Trigger::kOffsetBits + Trigger::kBytesBits - Trigger::kLowBytesBits == 63);

/// Device side of Fifo: a ring in host memory that only kernels write, with a lap bit in both words
/// of a slot, so that neither 16-byte atomicity nor clearing is needed.
struct FifoHandle {
  uint64_t* ring;        ///< pinned host memory, two words per slot
  const uint64_t* tail;  ///< pinned host memory, the proxy writes it: slots below are free again
  uint64_t* head;        ///< device memory: the next position to take
  uint64_t* tailCopy;    ///< device memory: what somebody last read of tail
  uint64_t* tailLock;    ///< device memory: 1 while somebody reads tail
  uint64_t depth;        ///< slots, a power of two
};

/// In both words of the slot of `position`, 1 in the first lap.
__host__ __device__ constexpr uint64_t lapBit(uint64_t position, uint64_t depth) {
  return (position & depth) == 0 ? Trigger::kLapBit : 0;
}

}  // namespace mscclpp
