#pragma once

#include <mscclpp/port_channel_device.hpp>

#include "../internode_api.cuh"
#include "../intranode/group.cuh"

/// What the kernels between nodes share: words that proxies count in, rings, the work of a warp.
namespace mscclpp::ep::MSCCLPP_PLATFORM_NS {

#if MSCCLPP_PLATFORM_CUDA
/// Of a combine: 16 blocks have a warp for every lane of one flow.
inline constexpr int kRailLanes = 60;
inline constexpr int kDispatchWarps = 8;
inline constexpr int kSumWarps = 4, kHomeWarps = 4;
inline constexpr int kRailUnroll = 8;  ///< 16-byte pieces of a part that a lane adds up
#else
inline constexpr int kRailLanes = 2;
inline constexpr int kDispatchWarps = 3;
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
/// What a put counts up by: this rank's word at the peer.
__device__ __forceinline__ PortChannelDevice::Counting railAdd(const GroupArgs& g,
                                                               const RailArgs& rails, int word,
                                                               std::int64_t value) {
  return {rails.wordLayout.offset(PortUse::highThroughput, g.rank, word), value};
}
/// Adds to this rank's word at `peer`, behind everything that this thread put there before.
__device__ __forceinline__ bool addRailWord(const GroupArgs& g, const RailArgs& rails, int peer,
                                            int word, std::uint64_t value) {
  const auto add = railAdd(g, rails, word, static_cast<std::int64_t>(value));
  return PortChannelDevice(rails.channels[peer]).atomicAdd(g.wait, add.offset, add.value);
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

/// Slots that are put, or given back, together: at most half a ring, so that one half is filled
/// while the other is under way.
__device__ __forceinline__ std::uint64_t slotsPerRun(std::uint64_t enough, std::uint64_t slots) {
  const std::uint64_t half = slots / 2, n = enough < half ? enough : half;
  return n > 0 ? n : 1;
}

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
/// lanes; waits while all are stuck.
enum class ItemState { finished, stuck, ready };
template <class State>
__device__ int nextItem(const GroupArgs& g, const RailItems& items, int& cursor, WaitWhat what,
                        const RailFlow* flows, State&& state) {
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
  if (laneId() == 0) look();
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
