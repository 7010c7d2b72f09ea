#pragma once

#include <mscclpp/port_channel_device.hpp>

#include "../internode_api.cuh"
#include "../intranode/group.cuh"

/// What the kernels between nodes share: words that proxies count in, rings, the work of a warp.
namespace mscclpp::ep::MSCCLPP_PLATFORM_NS {

#if MSCCLPP_PLATFORM_CUDA
/// 16 blocks have a warp for every lane of one flow.
inline constexpr int kRailLanes = 60;
inline constexpr std::uint64_t kRailPutBytes = 384 << 10;
inline constexpr int kSendWarps = 4, kForwardWarps = 4;
inline constexpr int kSumWarps = 4, kHomeWarps = 4;
inline constexpr int kRailUnroll = 8;  ///< 16-byte pieces of a part that a lane adds up
#else
inline constexpr int kRailLanes = 2;
inline constexpr std::uint64_t kRailPutBytes = 1 << 10;
inline constexpr int kSendWarps = 1, kForwardWarps = 2;  ///< one forwards even if it is alone
inline constexpr int kSumWarps = 1, kHomeWarps = 2;
inline constexpr int kRailUnroll = 2;
#endif

/// Start of a block's shared memory.
struct RailShared {
  std::uint32_t lastBlock;
};

__device__ __forceinline__ std::uint64_t railOffset(const GroupArgs& g, std::size_t offset) {
  return g.plan.rails() + offset;
}
/// In this rank's heap.
template <class T>
__device__ __forceinline__ T* railMemory(const GroupArgs& g, std::size_t offset) {
  return reinterpret_cast<T*>(g.heaps[g.rank] + railOffset(g, offset));
}
__device__ __forceinline__ RailProgress& railProgress(const GroupArgs& g, const RailArgs& rails,
                                                      RailArea area, int ring, int lane) {
  return *railMemory<RailProgress>(g, rails.plan.progress(area, ring, lane));
}
__device__ __forceinline__ RailCounters railCounters(const RailArgs& rails) {
  return {rails.plan.lanes};
}
__device__ __forceinline__ int nodeSize(const RailArgs& rails, int node) {
  return rails.nodeFirst[node + 1] - rails.nodeFirst[node];
}
__device__ __forceinline__ const std::int32_t* ranksOfNode(const RailArgs& rails, int node) {
  return rails.nodeRanks + rails.nodeFirst[node];
}

/// The word here that `peer` adds to.
__device__ __forceinline__ const std::uint64_t* railWord(const RailArgs& rails, int peer,
                                                         int word) {
  return rails.words + rails.wordLayout.offset(PortUse::highThroughput, peer, word) / 8;
}
/// Adds to this rank's word at `peer`, behind everything that this thread put there before.
__device__ __forceinline__ bool addRailWord(const GroupArgs& g, const RailArgs& rails, int peer,
                                            int word, std::uint64_t value) {
  return PortChannelDevice(rails.channels[peer])
      .atomicAdd(g.wait, rails.wordLayout.offset(PortUse::highThroughput, g.rank, word),
                 static_cast<std::int64_t>(value));
}
/// What the grid's watch has seen of it; see RailWatch.
__device__ __forceinline__ std::uint64_t* seenWord(const GroupArgs& g, const RailArgs& rails,
                                                   int peer, int word) {
  return railMemory<std::uint64_t>(g, rails.plan.seen(peer, word));
}
/// Waits until `peer` has counted up to `count`, which is not 0, in a word or what was seen of it.
/// Returns how far it has come then; 0: not in time.
__device__ inline std::uint64_t awaitRailWord(const GroupArgs& g, const std::uint64_t* at, int peer,
                                              std::uint64_t count, WaitWhat what) {
  std::uint64_t seen = 0;
  const bool came = waitUntil(
      g.wait,
      [&] {
        seen = loadAcquire(at);
        return seen >= count;
      },
      waitPoint(what, peer), at);
  return came ? seen : 0;
}

/// Slots that go together: enough bytes to make a proxy's work of a put small beside its copy, and
/// at most half a ring, so that one half is filled while the other is under way. A put may have up
/// to 31 more where the ring is large, since tokens are worked on 32 at a time.
__device__ __forceinline__ std::uint64_t slotsPerPut(std::uint64_t slotBytes, std::uint64_t slots) {
  const std::uint64_t most = slots / 2, enough = kRailPutBytes / slotBytes;
  const std::uint64_t n = enough < most ? enough : most;
  return n > 0 ? n : 1;
}

/// The sending end of a lane, used by one warp; its members are the same on all lanes. Slots are
/// filled in the ring of the own heap and put in runs to the same places of the peer's ring.
struct SendRing {
  const GroupArgs& g;
  const RailArgs& rails;
  int peer;
  std::uint64_t near, far;      ///< offsets of the rings in the heaps
  const std::uint64_t* credit;  ///< slots that the peer has emptied, ever
  int tail;                     ///< word at the peer
  WaitWhat room;                ///< what waiting for a free slot is reported as
  std::uint64_t slotBytes, slots;
  std::uint64_t base;     ///< slots before this launch
  std::uint64_t filled;   ///< of this launch
  std::uint64_t sent;     ///< of them
  std::uint64_t emptied;  ///< of them, as far as known
  std::uint64_t chunk;    ///< slots per put

  /// Puts what makes a put; before a further open(), so that a launch's last slots go together.
  __device__ void pass() {
    if (filled - sent >= chunk) flush(slotBytes);
  }
  /// Free slots that lie together, up to `most` and half a ring per put. In a full ring waits for
  /// as many as make a put: one at a time would be put one at a time from then on. 0: they did not
  /// come free in time.
  __device__ int open(int most) {
    if (filled - emptied >= slots) {
      flush(slotBytes);
      std::uint64_t seen = 0;
      bool came = true;
      if (laneId() == 0) {
        came = waitUntil(
            g.wait,
            [&] {
              seen = loadAcquire(credit) - base;
              return filled - seen <= slots - chunk;
            },
            waitPoint(room, peer), credit);
      }
      emptied = shuffle(seen, 0);
      syncWarp();  // what the peer has read may be overwritten by all lanes
      if (!shuffle(came, 0)) return 0;
    }
    const std::uint64_t free = slots - (filled - emptied), straight = slots - filled % slots;
    const std::uint64_t waiting = filled - sent, half = slots / 2;
    const std::uint64_t run = half > waiting ? half - waiting : 1;
    std::uint64_t n = free < straight ? free : straight;
    if (n > run) n = run;
    return n < static_cast<std::uint64_t>(most) ? static_cast<int>(n) : most;
  }
  /// The i-th of the slots that are open.
  __device__ char* slot(int i) const {
    return g.heaps[g.rank] + near + (filled + static_cast<std::uint64_t>(i)) % slots * slotBytes;
  }
  /// The first `n` of them are full.
  __device__ void close(int n) {
    filled += static_cast<std::uint64_t>(n);
    if (filled % slots == 0) flush(slotBytes);
  }
  /// Puts what was filled; `lastBytes` of the last slot.
  __device__ void flush(std::uint64_t lastBytes) {
    if (sent == filled) return;
    syncWarp();  // lane 0 sends what all lanes have written
    if (laneId() == 0) {
      bulkWait<0>();  // and what its own bulk stores write
      const std::uint64_t at = sent % slots * slotBytes, n = filled - sent;
      PortChannelDevice channel(rails.channels[peer]);
      channel.put(g.wait, far + at, near + at, (n - 1) * slotBytes + lastBytes);
      channel.atomicAdd(g.wait, rails.wordLayout.offset(PortUse::highThroughput, g.rank, tail),
                        static_cast<std::int64_t>(n));
    }
    sent = filled;
  }
};

/// Flows and lanes that a warp serves in turn: `worker` of `workers` warps of the grid.
struct RailItems {
  int flows, lanes, worker, workers;

  __device__ int count() const {
    const int total = flows * lanes;
    return worker < total ? (total - worker + workers - 1) / workers : 0;
  }
  __device__ int flow(int i) const { return (worker + i * workers) % flows; }
  __device__ int lane(int i) const { return (worker + i * workers) / flows; }
};

inline constexpr int kNoItemLeft = -1, kItemsLate = -2, kNoItemReady = -3;

/// One of a warp's items that can go on, in turn. `state(flow, lane)` says of each whether it is
/// finished, stuck or ready; called by lane 0. Returns its number, or one of the above, on all
/// lanes. `meanwhile` does something else while all are stuck, and says whether there was anything
/// to do; if not, the warp waits.
enum class ItemState { finished, stuck, ready };
template <class State, class Meanwhile>
__device__ int nextItem(const GroupArgs& g, const RailItems& items, int& cursor, WaitWhat what,
                        const RailFlow* flows, State&& state, Meanwhile&& meanwhile) {
  const int count = items.count();
  int found = kNoItemReady;
  const auto look = [&] {
    bool all = true;
    for (int n = 0; n < count; ++n) {
      const int i = cursor + n < count ? cursor + n : cursor + n - count;
      const ItemState now = state(items.flow(i), items.lane(i));
      all = all && now == ItemState::finished;
      if (now != ItemState::ready) continue;
      found = i;
      cursor = i + 1 < count ? i + 1 : 0;
      return true;
    }
    if (all) found = kNoItemLeft;
    return all;
  };
  do {
    if (laneId() == 0) look();
    found = shuffle(found, 0);
  } while (found == kNoItemReady && meanwhile());
  if (found == kNoItemReady && laneId() == 0) {
    int peer = -1;
    for (int i = 0; i < count && peer < 0; ++i) {
      if (state(items.flow(i), items.lane(i)) != ItemState::finished) {
        peer = flows[items.flow(i)].peer;
      }
    }
    if (!waitUntil(g.wait, look, waitPoint(what, peer), flows)) {
      found = kItemsLate;
      giveUp(g);
    }
  }
  found = shuffle(found, 0);
  syncWarp();  // what lane 0 has acquired is there for all
  return found;
}

/// A slot that is not the one this call expects; called by one lane.
__device__ inline void reportSlot(const GroupArgs& g, const SlotHeader& header, int peer,
                                  std::uint32_t epoch, std::uint64_t signature) {
  if (header.epoch == epoch && header.signature != signature) {
    reportFailure(g.wait, waitPoint(WaitWhat::shapeMismatch, peer), signature, header.signature);
  } else {
    reportFailure(g.wait, waitPoint(WaitWhat::railProtocol, peer), epoch, header.epoch);
  }
  giveUp(g);
}
/// A range of the words that every flow's peer adds to.
struct WatchedWords {
  const RailFlow* flows;
  int count;  ///< of flows
  int first, words;
};
/// Words that peers add to lie in host memory, where looks of several warps are served one after
/// the other, a microsecond each. One warp of the grid looks at all of them and leaves what it saw
/// in device memory, where all others look, until they are done.
struct RailWatch {
  const GroupArgs& g;
  const RailArgs& rails;

  __device__ void look(const WatchedWords& watched) const {
    constexpr int kAtOnce = 4;
    const int total = watched.count * watched.words;
    for (int base = static_cast<int>(laneId()); base < total; base += kAtOnce * 32) {
      const std::uint64_t* at[kAtOnce] = {};
      std::uint64_t* seen[kAtOnce] = {};
      std::uint64_t now[kAtOnce] = {}, before[kAtOnce] = {};
#pragma unroll
      for (int u = 0; u < kAtOnce; ++u) {
        const int i = base + u * 32, flow = i / watched.words;
        if (i >= total) continue;
        const int peer = watched.flows[flow].peer;
        const int word = watched.first + i - flow * watched.words;
        at[u] = railWord(rails, peer, word);
        seen[u] = seenWord(g, rails, peer, word);
        now[u] = loadRelaxed(at[u]);
        before[u] = loadRelaxed(seen[u]);
      }
#pragma unroll
      for (int u = 0; u < kAtOnce; ++u) {
        if (now[u] != before[u]) storeLocalRelease(seen[u], loadAcquire(at[u]));
      }
    }
  }
  /// Until `warps` warps of the launch are done, whose waits end. A whole warp.
  template <class... Words>
  __device__ void run(std::uint32_t warps, const Words&... watched) const {
    auto* const done = &railMemory<RailWords>(g, rails.plan.words())->warpsDone;
    const auto round = [&] {
      (look(watched), ...);
      return loadLocalAcquire(done) >= warps;
    };
    // By lane: a lane looks at its own words.
    waitUntil(WaitControl{nullptr, 0, g.rank}, round, waitPoint(WaitWhat::pipeline, g.rank), done);
  }
};
/// The end of a warp's role.
__device__ inline void leaveRole(const GroupArgs& g, const RailArgs& rails) {
  syncWarp();
  if (laneId() == 0) {
    fetchAddLocalAcqRel(&railMemory<RailWords>(g, rails.plan.words())->warpsDone, 1u);
  }
}

/// The lanes below this one.
__device__ __forceinline__ std::uint32_t lanesBelow() {
  return (1u << laneId()) - 1;
}

}  // namespace mscclpp::ep::MSCCLPP_PLATFORM_NS
