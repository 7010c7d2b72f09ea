// The kernels of channel_kernels.hpp, the same source for both platforms.
#pragma once

#include <mscclpp/device/device.hpp>
#include <mscclpp/device/wait.hpp>
#include <mscclpp/memory_channel_device.hpp>

#include "core/channel_kernels.hpp"

namespace mscclpp::test::MSCCLPP_PLATFORM_NS {

using device::blockSize;
using device::threadIndex;

__device__ inline char pattern(uint32_t round, int32_t sender, uint64_t i) {
  return static_cast<char>(round * 31u + static_cast<uint32_t>(sender) * 101u + i * 7u);
}

__device__ inline void countError(uint32_t* errors) {
  device::fetchAddLocalRelaxed(errors, 1u);
}

/// Takes one message of `round` out of the inbox and counts its wrong bytes. Odd rounds poll.
__device__ inline void receive(MemoryChannelDevice& channel, const PingPongArgs& args,
                               uint32_t round) {
  if (threadIndex() == 0) {
    const auto what = static_cast<uint32_t>(args.rank == 0 ? WaitedFor::pong : WaitedFor::ping);
    const WaitPoint point{what, 1 - args.rank};
    const bool came = round % 2 == 0 ? channel.wait(args.control, point)
                                     : device::waitUntil(
                                           args.control, [&] { return channel.poll(); }, point,
                                           channel.handle.semaphore.inbound);
    if (!came) countError(args.errors);
  }
  device::syncBlock();
  if (args.useGet != 0) {
    channel.get(args.inbox, args.outbox, args.bytes, threadIndex(), blockSize());
    device::syncBlock();
  }
  for (uint64_t i = threadIndex(); i < args.bytes; i += blockSize()) {
    if (channel.handle.local[args.inbox + i] != pattern(round, 1 - args.rank, i)) {
      countError(args.errors);
    }
  }
  device::syncBlock();
}

__device__ inline void transmit(MemoryChannelDevice& channel, const PingPongArgs& args,
                                uint32_t round) {
  for (uint64_t i = threadIndex(); i < args.bytes; i += blockSize()) {
    channel.handle.local[args.outbox + i] = pattern(round, args.rank, i);
  }
  device::syncBlock();
  if (args.useGet == 0) {
    channel.put(args.inbox, args.outbox, args.bytes, threadIndex(), blockSize());
    device::syncBlock();
  }
  if (threadIndex() == 0) channel.signal();
}

__device__ inline void pingPong(const PingPongArgs& args) {
  MemoryChannelDevice channel(args.channel);
  for (uint32_t round = 0; round < args.rounds; ++round) {
    if (args.rank == 0) {
      transmit(channel, args, round);
      receive(channel, args, round);
    } else {
      receive(channel, args, round);
      transmit(channel, args, round);
    }
  }
}

__device__ inline void self(const SelfArgs& args) {
  if (threadIndex() != 0) return;
  MemoryChannelDevice channel(args.channel);
  const auto expect = [&](bool condition) {
    if (!condition) countError(args.errors);
  };
  expect(!channel.poll());
  channel.signal();
  channel.signal();
  expect(channel.poll());
  expect(channel.wait(args.control, {static_cast<uint32_t>(WaitedFor::ping), 0}));
  expect(!channel.poll());
  channel.write<uint64_t>(8, 0x1122334455667788ull);
  expect(channel.read<uint64_t>(8) == 0x1122334455667788ull);
  expect(channel.read<uint8_t>(8) == 0x88);
  expect(channel.read<uint64_t>(0) == 0);
}

__device__ inline void stuck(const SelfArgs& args) {
  MemoryChannelDevice channel(args.channel);
  if (threadIndex() != 0) return;
  if (!channel.wait(args.control, {static_cast<uint32_t>(WaitedFor::never), 5}))
    countError(args.errors);
  // Failures stick: the second wait gives up at once.
  if (!channel.wait(args.control, {static_cast<uint32_t>(WaitedFor::ping), 6}))
    countError(args.errors);
}

}  // namespace mscclpp::test::MSCCLPP_PLATFORM_NS
