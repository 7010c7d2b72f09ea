#pragma once

#include <mscclpp/port_channel_device.hpp>

#include "group.cuh"

/// Peers behind port channels. What goes to one is gathered in this rank's outbox, laid out as it
/// will lie in the peer's area, and leaves as one put and one signal: a proxy that moves messages
/// cannot promise lines, so their arrival is the signal's business. Rows lie close together there,
/// in the order of the tokens that go to the peer.
namespace mscclpp::ep::MSCCLPP_PLATFORM_NS {

__device__ __forceinline__ LowLatencyKind kindOf(PortMessage message) {
  return message == PortMessage::ids ? LowLatencyKind::dispatch : LowLatencyKind::combine;
}
__device__ __forceinline__ const PortChannelHandle& channelTo(const LowLatencyGroup& g,
                                                              LowLatencyKind kind, int peer) {
  return g.ports.channels[static_cast<int>(kind)][peer];
}
/// Signals of a peer until its `message` of call `epoch` is here: a dispatch makes one, a combine
/// two.
__device__ __forceinline__ std::uint64_t signalsUntil(const LowLatencyGroup& g, PortMessage message,
                                                      std::uint64_t epoch) {
  const std::uint64_t calls = epoch - g.ports.firstEpoch;
  if (message == PortMessage::ids) return calls;
  return message == PortMessage::weights ? 2 * calls - 1 : 2 * calls;
}
__device__ __forceinline__ char* outboxArea(const LowLatencyGroup& g, LowLatencyKind kind,
                                            std::uint64_t epoch) {
  return g.heaps[g.rank] + g.ports.outboxOffset + (g.plan.area(kind, epoch) - g.plan.head());
}

/// A peer sends its sums when it has everybody's weights: who waits for those is to report first.
inline constexpr std::uint64_t kPartialGraceNs = 10'000'000;

/// Block 0 looks at the channel and publishes what it saw.
template <class Path>
__device__ __forceinline__ bool lookAtPort(const LowLatencyGroup& g, PortMessage message,
                                           std::uint64_t count, int peer, WaitWhat what) {
  LowLatencyPeer& words = peerWords(g, g.region, peer);
  const int m = static_cast<int>(message);
  const PortChannelDevice channel(channelTo(g, kindOf(message), peer));
  WaitControl control = waitControl<Path>(g);
  if (message == PortMessage::partial && control.limitNs != 0) control.limitNs += kPartialGraceNs;
  if (!waitUntil(
          control, [&] { return channel.signals() >= count; }, lowLatencyWait(what, peer),
          &words.arrived[m])) {
    storeLocalRelease(&words.lost[m], count);
    return false;
  }
  if (g.ports.times != nullptr) storeRelaxed(&g.ports.times->arrived[m], nanoseconds());
  // Of two calls under way the later one may be received first.
  if (loadRelaxed(&words.arrived[m]) < count) storeLocalRelease(&words.arrived[m], count);
  return true;
}
/// What peers had received before they sent a message is known when it is here: the next call need
/// not look at their counters, which are host memory, at its start. One warp of block 0 looks,
/// while the others go on.
__device__ __forceinline__ void noteFinished(const LowLatencyGroup& g, LowLatencyKind kind) {
  for (int i = static_cast<int>(laneId()); i < 2 * g.ranks; i += 32) {
    const int peer = i / 2, parity = i % 2;
    if (peer == g.rank || g.heaps[peer] != nullptr) continue;
    storeRelease(
        &peerWords(g, g.region, peer).finished[static_cast<int>(kind)][parity],
        static_cast<std::uint32_t>(portFinished(g, kind, peer, static_cast<unsigned>(parity))));
  }
}
/// The other blocks wait for block 0 alone, whose wait ends. They look neither at the channel nor
/// at the failure record: those are host memory, where a look of every block takes a microsecond
/// after the other, and block 0's look has to queue.
__device__ __forceinline__ bool lookAtBlock0(const LowLatencyGroup& g, PortMessage message,
                                             std::uint64_t count, int peer, WaitWhat what) {
  LowLatencyPeer& words = peerWords(g, g.region, peer);
  const std::uint64_t* const arrived = &words.arrived[static_cast<int>(message)];
  const std::uint64_t* const lost = &words.lost[static_cast<int>(message)];
  waitUntil(
      WaitControl{nullptr, 0, g.wait.rank},
      [&] { return loadLocalAcquire(arrived) >= count || loadLocalAcquire(lost) == count; },
      lowLatencyWait(what, peer), arrived);
  return loadLocalAcquire(arrived) >= count;
}
/// Waits for a message of `peer`; a whole warp.
template <class Path>
__device__ __forceinline__ bool awaitPort(const LowLatencyGroup& g, PortMessage message,
                                          std::uint64_t epoch, int peer, WaitWhat what) {
  bool came = true;
  if (laneId() == 0) {
    const std::uint64_t count = signalsUntil(g, message, epoch);
    came = blockIndex() == 0 ? lookAtPort<Path>(g, message, count, peer, what)
                             : lookAtBlock0(g, message, count, peer, what);
  }
  came = all(came);
  syncWarp();  // votes order no memory
  return came;
}

/// All threads: waits for the message of every peer behind a port channel. Calls missing(peer) in
/// all lanes of a warp for one that did not come.
template <class Path, class F>
__device__ __forceinline__ void awaitPorts(const LowLatencyGroup& g, PortMessage message,
                                           std::uint64_t epoch, WaitWhat what, F&& missing) {
  for (int peer = static_cast<int>(warpId()); peer < g.ranks; peer += kLowLatencyWarps) {
    if (peer == g.rank || !isPort<Path>(g, peer)) continue;
    if (isMaskedForWarp<Path>(g, peer)) {
      // Other blocks may have looked before the peer was masked, and wait for block 0.
      if (blockIndex() == 0 && laneId() == 0) {
        storeLocalRelease(&peerWords(g, g.region, peer).lost[static_cast<int>(message)],
                          signalsUntil(g, message, epoch));
      }
      continue;
    }
    if (!awaitPort<Path>(g, message, epoch, peer, what)) missing(peer);
  }
  syncBlock();
  const bool notes = message != PortMessage::partial && blockIndex() == 0;
  if (notes && warpId() == kLowLatencyWarps - 1) noteFinished(g, kindOf(message));
}

/// What goes to one peer: offsets in an area, and bytes.
struct PortRange {
  std::uint64_t from;
  std::uint64_t to;
  std::uint64_t bytes;
};
/// All threads of one block, when everything is written: a message and a signal to every peer
/// behind a port channel, or the signal alone where nothing is to be sent, since signals are
/// counted. rangeOf(peer) runs in all lanes of a warp.
template <class Path, class F>
__device__ __forceinline__ void sendToPorts(const LowLatencyGroup& g, PortMessage message,
                                            std::uint64_t epoch, F&& rangeOf) {
  const LowLatencyKind kind = kindOf(message);
  if (g.ports.times != nullptr && threadIndex() == 0) {
    g.ports.times->written[static_cast<int>(message)] = nanoseconds();
  }
  for (int i = static_cast<int>(warpId()); i < g.ranks - 1; i += kLowLatencyWarps) {
    const int peer = g.rank + 1 + i < g.ranks ? g.rank + 1 + i : g.rank + 1 + i - g.ranks;
    if (!isPort<Path>(g, peer)) continue;
    PortChannelDevice channel(channelTo(g, kind, peer));  // its load runs beside the counting
    const PortRange range = isMaskedForWarp<Path>(g, peer) ? PortRange{} : rangeOf(peer);
    if (laneId() != 0) continue;
    if (range.bytes == 0) {
      channel.signal(pushControl(g));
    } else {
      channel.putWithSignal(
          pushControl(g), g.regionOffset + g.plan.area(kind, epoch) + range.to,
          g.ports.outboxOffset + (g.plan.area(kind, epoch) - g.plan.head()) + range.from,
          range.bytes);
    }
  }
}

/// All threads of every block that sends, once: true in the block that comes last, for which
/// everything that the others wrote before is there. `shared`: a word in shared memory.
__device__ __forceinline__ bool isLastWriter(const LowLatencyGroup& g, LowLatencyKind kind,
                                             bool& shared) {
  syncBlock();
  if (threadIndex() == 0) {
    const std::uint64_t share = shareOf(g);
    const std::uint64_t before =
        fetchAddLocalAcqRel(&wordsOf(g).written[static_cast<int>(kind)], share);
    shared = (before + share) % kEpochStep == 0;
  }
  syncBlock();
  return shared;
}

/// How many of numbers below `count` f is true for. A whole warp.
template <class F>
__device__ __forceinline__ int countWhere(int count, F&& f) {
  std::uint32_t found = 0;
#pragma unroll 1
  for (int i = static_cast<int>(laneId()); i < count; i += 32) found += f(i) ? 1 : 0;
  return static_cast<int>(sumWarp(found));
}
/// Rows of the first `tokens` own tokens that go to `rank`, from the caller's ids. A whole warp.
template <class Args>
__device__ __forceinline__ RowCount rowsOfCaller(const Args& a, int rank, int tokens) {
  std::uint32_t sum = 0;
#pragma unroll 1
  for (int t = static_cast<int>(laneId()); t < tokens; t += 32) {
    const std::int64_t* const ids = a.topkIdx + static_cast<std::int64_t>(t) * a.area.topk;
    int selections = 0;
#pragma unroll 4
    for (int k = 0; k < a.area.topk; ++k) selections += ownerOf(a, ids[k]) == rank ? 1 : 0;
    sum += RowCount::ofToken(selections).packed;
  }
  return {sumWarp(sum)};
}
/// All threads: places[i] for the i-th owner of a token's selections, where it is behind a port
/// channel: placeAt(rank), which a whole warp calls. `places`: in shared memory, as many as there
/// can be selections.
template <class Path, class Args, class PlaceAt>
__device__ __forceinline__ void findPlaces(const Args& a, std::int64_t selection, int* places,
                                           PlaceAt&& placeAt) {
  syncBlock();  // those of the token before are used
  int i = 0;
  forEachOwner(a, selection, [&](int rank) {
    if (isPort<Path>(a.group, rank) && i % kLowLatencyWarps == static_cast<int>(warpId())) {
      const int place = placeAt(rank);
      if (laneId() == 0) places[i] = place;
    }
    ++i;
  });
  syncBlock();
}

}  // namespace mscclpp::ep::MSCCLPP_PLATFORM_NS
