// Kernels that use port channels, launched on either platform.
#pragma once

#include <cstdint>

#include <mscclpp/device/platform.hpp>
#include <mscclpp/failure.hpp>
#include <mscclpp/platform.hpp>
#include <mscclpp/port_channel_handle.hpp>

namespace mscclpp::test {

inline constexpr int kPortThreads = 64;
inline constexpr int kMaxPortBlocks = 8;

/// What waits of these kernels report.
enum class PortWait : uint32_t { message = 1, counter = 2, never = 3 };

/// How a message is announced.
enum class Announce : uint32_t { putWithSignal, putThenSignal, putThenAdd, putFlushSignal };

/// Messages to and fro. Each side's memory has an inbox and an outbox.
struct PortPingPongArgs {
  PortChannelHandle channel;
  WaitControl control;
  Announce announce;
  uint32_t rounds;
  uint64_t bytes;
  uint64_t inbox;
  uint64_t outbox;
  char* local;              ///< this rank's memory
  const uint64_t* counter;  ///< this rank's counter that the peer adds to
  uint64_t counterOffset;   ///< of the peer's
  uint32_t* errors;         ///< wrong bytes and failed waits
  int32_t rank;             ///< 0 starts
  uint32_t firstRound;      ///< keys the payload
  uint32_t claim;           ///< the pushing thread keeps the FIFO to itself
};

/// Every thread adds to a counter and signals; each block has a channel.
struct PortHammerArgs {
  PortChannelHandle channels[kMaxPortBlocks];
  WaitControl control;
  uint32_t rounds;  ///< per thread
  uint32_t* errors;
  uint64_t counterOffset;  ///< of block 0; each block's is 8 bytes further
  int32_t rank;
};

/// One thread of each block puts `count` messages behind one another, flushing every `flushEvery`.
struct PortStreamArgs {
  PortChannelHandle channels[kMaxPortBlocks];
  WaitControl control;
  uint32_t count;
  uint32_t flushEvery;
  uint64_t bytes;
  char* local;
  uint64_t inbox;  ///< of block 0, message 0; `stride` apart
  uint64_t stride;
  uint32_t* errors;
  int32_t rank;
  uint32_t signalEach = 0;  ///< every put with a signal, not one signal at the end
};

/// A wait, or a flush, that nobody answers.
struct PortStuckArgs {
  PortChannelHandle channel;
  WaitControl control;
  uint32_t* errors;
  uint32_t flush;
};

/// One put and signal, for ranges of any size.
struct PortPutArgs {
  PortChannelHandle channel;
  WaitControl control;
  uint64_t remoteOffset;
  uint64_t localOffset;
  uint64_t bytes;
  uint32_t* errors;
  uint32_t wait;  ///< waits for one signal instead
};

/// Byte `i` of message `round` of a rank.
__host__ __device__ constexpr char portByte(uint32_t round, int32_t sender, uint64_t i) {
  return static_cast<char>(round * 37u + static_cast<uint32_t>(sender) * 101u + i * 7u + 1u);
}

/// Loads the kernels on the device; call it on every rank before any rank launches.
void preparePortKernels(Device& device);
void launchPortPingPong(Device& device, Stream& stream, const PortPingPongArgs& args);
void launchPortHammer(Device& device, Stream& stream, unsigned blocks, const PortHammerArgs& args);
void launchPortStream(Device& device, Stream& stream, unsigned blocks, const PortStreamArgs& args);
void launchPortStuck(Device& device, Stream& stream, const PortStuckArgs& args);
void launchPortPut(Device& device, Stream& stream, const PortPutArgs& args);

}  // namespace mscclpp::test
