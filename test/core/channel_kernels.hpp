// Kernels that use a memory channel, launched on either platform.
#pragma once

#include <cstdint>

#include <mscclpp/failure.hpp>
#include <mscclpp/memory_channel_handle.hpp>
#include <mscclpp/platform.hpp>

namespace mscclpp::test {

/// What waits of these kernels report.
enum class WaitedFor : uint32_t { ping = 1, pong = 2, never = 3 };

inline constexpr int kChannelThreads = 96;

/// Each side's memory: an inbox of `bytes` at `inbox`, an outbox at `outbox`.
struct PingPongArgs {
  MemoryChannelHandle channel;
  WaitControl control;
  uint64_t bytes;
  uint64_t inbox;
  uint64_t outbox;
  uint32_t* errors;  ///< wrong bytes and failed waits
  int32_t rank;      ///< 0 starts
  uint32_t rounds;
  uint32_t useGet;  ///< the receiver gets, instead of the sender putting
};

/// For one rank that is its own peer.
struct SelfArgs {
  MemoryChannelHandle channel;
  WaitControl control;
  uint32_t* errors;
};

/// Loads the kernels on the device; call it on every rank before any rank launches.
void prepareChannelKernels(Device& device);
void launchPingPong(Device& device, Stream& stream, const PingPongArgs& args);
/// poll(), signal(), read() and write() of a channel to oneself.
void launchSelf(Device& device, Stream& stream, const SelfArgs& args);
/// Waits for a signal that never comes; *errors counts the waits that said so.
void launchStuck(Device& device, Stream& stream, const SelfArgs& args);
/// CUDA only: writes to an address that does not exist.
void launchIllegalAccess(Device& device, Stream& stream);

}  // namespace mscclpp::test
