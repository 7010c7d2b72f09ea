// The kernels of port_kernels.hpp, the same source for both platforms.
#pragma once

#include <mscclpp/device/device.hpp>
#include <mscclpp/device/wait.hpp>
#include <mscclpp/port_channel_device.hpp>

#include "core/port_kernels.hpp"

namespace mscclpp::test::MSCCLPP_PLATFORM_NS {

using device::blockIndex;
using device::blockSize;
using device::threadIndex;

__device__ inline void portCheck(uint32_t* errors, bool condition) {
  if (!condition) device::fetchAddLocalRelaxed(errors, 1u);
}

__device__ inline void sendMessage(PortChannelDevice& channel, const PortPingPongArgs& args,
                                   uint32_t round) {
  for (uint64_t i = threadIndex(); i < args.bytes; i += blockSize()) {
    args.local[args.outbox + i] = portByte(round, args.rank, i);
  }
  device::syncBlock();
  if (threadIndex() != 0) return;
  bool done = false;
  switch (args.announce) {
    case Announce::putWithSignal:
      done = channel.putWithSignal(args.control, args.inbox, args.outbox, args.bytes);
      break;
    case Announce::putThenSignal:
      done = channel.put(args.control, args.inbox, args.outbox, args.bytes) &&
             channel.signal(args.control);
      break;
    case Announce::putThenAdd:
      done = round % 2 == 0 ? channel.putThenAdd(args.control, args.inbox, args.outbox, args.bytes,
                                                 {args.counterOffset, 5})
                            : channel.put(args.control, args.inbox, args.outbox, args.bytes) &&
                                  channel.atomicAdd(args.control, args.counterOffset, 5);
      break;
    case Announce::putFlushSignal:
      done = channel.put(args.control, args.inbox, args.outbox, args.bytes) &&
             channel.flush(args.control);
      // After the flush the source may be overwritten: from its end, which leaves last.
      for (uint64_t i = args.bytes; i > 0; --i) args.local[args.outbox + i - 1] = 0x33;
      done = done && channel.signal(args.control);
      break;
  }
  portCheck(args.errors, done);
}

__device__ inline void takeMessage(PortChannelDevice& channel, const PortPingPongArgs& args,
                                   uint32_t round) {
  if (threadIndex() == 0) {
    if (args.announce == Announce::putThenAdd) {
      const uint64_t wanted = uint64_t{5} * (round + 1);
      const uint64_t* counter = args.counter;
      portCheck(args.errors,
                device::waitUntil(
                    args.control, [=] { return device::loadAcquire(counter) >= wanted; },
                    {static_cast<uint32_t>(PortWait::counter), 1 - args.rank}, counter));
    } else {
      portCheck(args.errors, channel.wait(args.control, {static_cast<uint32_t>(PortWait::message),
                                                         1 - args.rank}));
    }
  }
  device::syncBlock();
  for (uint64_t i = threadIndex(); i < args.bytes; i += blockSize()) {
    portCheck(args.errors, args.local[args.inbox + i] == portByte(round, 1 - args.rank, i));
    args.local[args.inbox + i] = 0x5A;  // what the next message does not overwrite shows
  }
  device::syncBlock();
}

__device__ inline void portPingPong(const PortPingPongArgs& args) {
  PortChannelDevice channel(args.channel);
  const bool claims = args.claim != 0 && threadIndex() == 0;
  if (claims) channel.fifo.claim();
  for (uint32_t i = 0; i < args.rounds; ++i) {
    const uint32_t round = args.firstRound + i;
    if (args.rank == 0) {
      sendMessage(channel, args, round);
      takeMessage(channel, args, round);
    } else {
      takeMessage(channel, args, round);
      sendMessage(channel, args, round);
    }
  }
  if (claims) channel.fifo.release();
}

/// What one thread adds in a round; over the rounds of a block it is not zero.
__device__ inline int64_t hammerValue(uint32_t round, uint32_t thread) {
  return (round & 1) != 0 ? -static_cast<int64_t>(thread)
                          : static_cast<int64_t>(2 * thread + round);
}

__device__ inline void portHammer(const PortHammerArgs& args) {
  PortChannelDevice channel(args.channels[blockIndex()]);
  for (uint32_t round = 0; round < args.rounds; ++round) {
    portCheck(args.errors, channel.atomicAdd(args.control, args.counterOffset + 8 * blockIndex(),
                                             hammerValue(round, threadIndex())));
    if (threadIndex() % 16 == round % 16) portCheck(args.errors, channel.signal(args.control));
    if (threadIndex() % 32 == round % 32) portCheck(args.errors, channel.flush(args.control));
  }
  portCheck(args.errors, channel.flush(args.control));
}

__device__ inline void portStream(const PortStreamArgs& args) {
  PortChannelDevice channel(args.channels[blockIndex()]);
  const uint64_t base = args.inbox + args.stride * args.count * blockIndex();
  for (uint32_t message = 0; message < args.count; ++message) {
    const uint64_t at = base + args.stride * message;
    for (uint64_t i = threadIndex(); i < args.bytes; i += blockSize()) {
      args.local[at + i] = portByte(message + blockIndex(), args.rank, i);
    }
    device::syncBlock();
    if (threadIndex() == 0) {
      portCheck(args.errors, args.signalEach != 0
                                 ? channel.putWithSignal(args.control, at, at, args.bytes)
                                 : channel.put(args.control, at, at, args.bytes));
      if ((message + 1) % args.flushEvery == 0) {
        portCheck(args.errors, channel.flush(args.control));
      }
    }
  }
  device::syncBlock();
  if (threadIndex() == 0) {
    portCheck(args.errors, channel.flush(args.control));
    if (args.signalEach == 0) portCheck(args.errors, channel.signal(args.control));
  }
}

__device__ inline void portStuck(const PortStuckArgs& args) {
  if (threadIndex() != 0) return;
  PortChannelDevice channel(args.channel);
  const bool first = args.flush != 0
                         ? channel.flush(args.control)
                         : channel.wait(args.control, {static_cast<uint32_t>(PortWait::never), 5});
  portCheck(args.errors, first);
  // Failures stick: the second wait gives up at once.
  portCheck(args.errors, channel.flush(args.control));
}

__device__ inline void portPut(const PortPutArgs& args) {
  if (threadIndex() != 0) return;
  PortChannelDevice channel(args.channel);
  if (args.wait != 0) {
    portCheck(args.errors,
              channel.wait(args.control, {static_cast<uint32_t>(PortWait::message), -1}));
  } else {
    portCheck(args.errors,
              channel.putWithSignal(args.control, args.remoteOffset, args.localOffset, args.bytes));
  }
}

}  // namespace mscclpp::test::MSCCLPP_PLATFORM_NS
