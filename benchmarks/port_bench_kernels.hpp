// Kernels of the port-channel benchmarks, and the bare copies that they are compared with.
#pragma once

#include <cstdint>

#include <mscclpp/failure.hpp>
#include <mscclpp/platform.hpp>
#include <mscclpp/port_channel_handle.hpp>

namespace mscclpp::bench {

inline constexpr int kMaxThreads = 32;
inline constexpr int kMaxBlocks = 32;

/// Every thread of every block pushes `perThread` triggers.
struct PushArgs {
  PortChannelHandle channels[kMaxBlocks];
  WaitControl control;
  uint32_t perThread;
  uint32_t relaxed;
};

/// Rank 0 sends and waits for the answer, `rounds` times; times[i] is how long round i took, in ns.
struct PingArgs {
  PortChannelHandle channel;
  WaitControl control;
  uint32_t rounds;
  uint32_t rank;
  uint64_t bytes;  ///< put with the signal; 0: the signal alone
  uint64_t* times;
};

/// One thread puts `bytes` (0: nothing) and flushes, `rounds` times; times are those of the flush.
struct FlushArgs {
  PortChannelHandle channel;
  WaitControl control;
  uint32_t rounds;
  uint32_t reserved;
  uint64_t bytes;
  uint64_t* times;
};

/// The lanes of a warp put `perThread` pieces each, then flush; times[0] is how long all took.
struct StreamArgs {
  PortChannelHandle channel;
  WaitControl control;
  uint32_t perThread;
  uint32_t threads;
  uint64_t bytes;
  uint64_t* times;
};

void prepareKernels(Device& device);
void launchPush(Device& device, Stream& stream, unsigned blocks, unsigned threads,
                const PushArgs& args);
void launchPing(Device& device, Stream& stream, const PingArgs& args);
void launchFlush(Device& device, Stream& stream, const FlushArgs& args);
void launchStream(Device& device, Stream& stream, const StreamArgs& args);

/// Seconds that `count` copies of `bytes` from `source` to `destination` take without any proxy:
/// the platform's fastest way, in batches of `batch`.
double bareCopies(Device& device, char* destination, const char* source, uint64_t bytes,
                  uint64_t count, unsigned batch);

}  // namespace mscclpp::bench
