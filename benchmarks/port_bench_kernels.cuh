// The kernels of port_bench_kernels.hpp, the same source for both platforms.
#pragma once

#include <mscclpp/device/device.hpp>
#include <mscclpp/device/wait.hpp>
#include <mscclpp/port_channel_device.hpp>

#include "port_bench_kernels.hpp"

namespace mscclpp::bench::MSCCLPP_PLATFORM_NS {

using device::nanoseconds;
using device::threadIndex;

__device__ inline void push(const PushArgs& args) {
  const PortChannelHandle& channel = args.channels[device::blockIndex()];
  FifoDevice fifo(channel.fifo);
  const Trigger trigger =
      Trigger::encode({.kind = TriggerKind::atomicAdd, .channel = channel.channel, .value = 1});
  const TriggerOrder order = args.relaxed != 0 ? TriggerOrder::relaxed : TriggerOrder::release;
  for (uint32_t i = 0; i < args.perThread; ++i) {
    if (fifo.push(args.control, trigger, order, channel.peer) == FifoDevice::kNowhere) return;
    device::syncBlock();
  }
}

__device__ inline void ping(const PingArgs& args) {
  if (threadIndex() != 0) return;
  PortChannelDevice channel(args.channel);
  channel.fifo.claim();
  const auto send = [&] {
    return args.bytes == 0 ? channel.signal(args.control)
                           : channel.putWithSignal(args.control, 0, args.bytes, args.bytes);
  };
  for (uint32_t round = 0; round < args.rounds; ++round) {
    const uint64_t start = nanoseconds();
    if (args.rank == 0 && !send()) return;
    if (!channel.wait(args.control, {1, -1})) return;
    if (args.rank != 0 && !send()) return;
    args.times[round] = nanoseconds() - start;
  }
  channel.fifo.release();
}

__device__ inline void flush(const FlushArgs& args) {
  if (threadIndex() != 0) return;
  PortChannelDevice channel(args.channel);
  channel.fifo.claim();
  for (uint32_t round = 0; round < args.rounds; ++round) {
    if (args.bytes != 0 && !channel.put(args.control, 0, args.bytes, args.bytes)) return;
    const uint64_t start = nanoseconds();
    if (!channel.flush(args.control)) return;
    args.times[round] = nanoseconds() - start;
  }
  channel.fifo.release();
}

__device__ inline void stream(const StreamArgs& args) {
  PortChannelDevice channel(args.channel);
  const uint64_t start = nanoseconds();
  for (uint32_t i = 0; i < args.perThread; ++i) {
    if (!channel.put(args.control, 0, args.bytes, args.bytes)) return;
    device::syncBlock();
  }
  if (threadIndex() == 0 && channel.flush(args.control)) args.times[0] = nanoseconds() - start;
}

}  // namespace mscclpp::bench::MSCCLPP_PLATFORM_NS
