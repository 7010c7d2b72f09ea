// What a kernel needs of a memory channel: plain structs, the same on the host and on both
// platforms.
#pragma once

#include <cstdint>
#include <type_traits>

namespace mscclpp {

/// Device side of MemorySemaphore. Every word is 8 bytes, on a cache line of its own.
struct MemorySemaphoreHandle {
  uint64_t* inbound;        ///< here; only the peer writes it
  uint64_t* remoteInbound;  ///< the peer's inbound counter; only this rank writes it
  uint64_t* outbound;       ///< here, private: signals sent so far
  uint64_t* expected;       ///< here, private: signals waited for so far
};

/// Device side of MemoryChannel.
struct MemoryChannelHandle {
  MemorySemaphoreHandle semaphore;
  char* local;
  char* remote;
  uint64_t localBytes;
  uint64_t remoteBytes;
};
static_assert(sizeof(MemoryChannelHandle) == 64 &&
              std::is_trivially_copyable_v<MemoryChannelHandle>);

}  // namespace mscclpp
