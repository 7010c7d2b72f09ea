#pragma once

#include <mscclpp/device/device.hpp>
#include <mscclpp/port_channel_device.hpp>

#include "../api.cuh"
#include "../low_latency_api.cuh"

/// What both low-latency kernels share: addresses, epochs, who waits for whom before areas are used
/// again, and how work is dealt out to blocks.
namespace mscclpp::ep::MSCCLPP_PLATFORM_NS {

using namespace mscclpp::device;

#if MSCCLPP_PLATFORM_CUDA
/// One block per multiprocessor; a thread owns one unit of a row.
inline constexpr int kLowLatencyThreads = 1024;
#else
inline constexpr int kLowLatencyThreads = 64;
#endif
inline constexpr int kLowLatencyWarps = kLowLatencyThreads / 32;
/// Units that a block moves at a time, and where this thread's lies.
inline constexpr int kUnitsPerPass = kLowLatencyThreads / kLineLanes * kLineUnits;

/// What the kernels need not ask in the common case: rows that one pass of a block moves, top-k up
/// to kFastTopk, no masks, no statistics, whole lines, up to kInlineRanks ranks. A call is so short
/// that code which is only skipped costs: instructions are fetched cold.
template <bool Fast, bool Ports>
struct LowLatencyPath {
  static constexpr bool kFast = Fast;
  static constexpr bool kPorts = Ports;  ///< some peers are behind port channels
  static_assert(!Fast || !Ports);

  __device__ __forceinline__ static LineWrites writes(const LowLatencyGroup& g) {
    return Fast ? LineWrites::whole : g.writes;
  }
  __device__ __forceinline__ static bool shrink(const LowLatencyGroup& g) {
    return !Fast && g.shrink;
  }
};

template <class Path>
__device__ __forceinline__ char* regionOf(const LowLatencyGroup& g, int rank) {
  if constexpr (Path::kFast) return g.regions[rank];
  return rank < kInlineRanks ? g.regions[rank] : g.heaps[rank] + g.regionOffset;
}
/// Whether a peer is behind a port channel: then its memory is not mapped.
template <class Path>
__device__ __forceinline__ bool isPort(const LowLatencyGroup& g, int rank) {
  if constexpr (!Path::kPorts) return false;
  return g.heaps[rank] == nullptr;
}
__device__ __forceinline__ LowLatencyWords& wordsOf(const LowLatencyGroup& g) {
  return *reinterpret_cast<LowLatencyWords*>(g.region + g.plan.words());
}
/// What `writer` tells the owner of `region`.
__device__ __forceinline__ LowLatencyPeer& peerWords(const LowLatencyGroup& g, char* region,
                                                     int writer) {
  return *reinterpret_cast<LowLatencyPeer*>(region + g.plan.peer(writer));
}
template <class Path>
__device__ __forceinline__ bool isMasked(const LowLatencyGroup& g, int rank) {
  return Path::shrink(g) && loadRelaxed(&peerWords(g, g.region, rank).masked) != 0;
}
/// The same for a whole warp, which agrees: another block may give the rank up between the looks of
/// two lanes, and what depends on the answer are often steps of all lanes together.
template <class Path>
__device__ __forceinline__ bool isMaskedForWarp(const LowLatencyGroup& g, int rank) {
  if (!Path::shrink(g)) return false;
  return any(isMasked<Path>(g, rank));
}
/// The rank that hosts an expert; -1 for none.
template <class Args>
__device__ __forceinline__ int ownerOf(const Args& a, std::int64_t expert) {
  if (expert < 0 || expert >= a.experts) return -1;
  const auto id = static_cast<std::uint32_t>(expert);
  if (a.ownerMagic == 0) return static_cast<int>(id);
  return static_cast<int>(static_cast<std::uint64_t>(id) * a.ownerMagic >> 32);
}

/// Rows of recv_x that an expert has: enough when a token names it once.
__device__ __forceinline__ int rowsPerExpert(const LowLatencyDispatchArgs& a) {
  return a.group.ranks * a.area.maxTokens;
}

/// What a kernel has to know before it may write anything. All of it is loaded at once: at this
/// size of a call every dependent load counts.
struct LowLatencyStart {
  std::uint64_t sent;
  std::uint64_t received[2];
  std::uint32_t broken;
  std::uint32_t told[2], finished[2];  ///< of the peer that is this lane's number; see awaitRoom()
};
__device__ __forceinline__ const std::uint32_t* toldWord(const LowLatencyGroup& g,
                                                         LowLatencyKind kind, int peer,
                                                         unsigned parity) {
  return &lineTail(g.region + g.plan.hello(kind, ~parity & 1u, peer)).second;
}
__device__ __forceinline__ const std::uint32_t* finishedWord(const LowLatencyGroup& g,
                                                             LowLatencyKind kind, int peer,
                                                             unsigned parity) {
  return &peerWords(g, g.region, peer).finished[static_cast<int>(kind)][parity];
}
__device__ __forceinline__ LowLatencyStart lowLatencyStart(const LowLatencyGroup& g,
                                                           LowLatencyKind kind) {
  const LowLatencyWords& words = wordsOf(g);
  const int k = static_cast<int>(kind), lane = static_cast<int>(laneId());
  const int peer = lane < g.ranks ? lane : g.rank;
  LowLatencyStart start;
  start.sent = loadRelaxed(&words.sent[k]);
  start.received[0] = loadRelaxed(&words.received[k][0]);
  start.received[1] = loadRelaxed(&words.received[k][1]);
  start.broken = loadRelaxed(&words.broken);
#pragma unroll
  for (unsigned parity = 0; parity < 2; ++parity) {
    start.told[parity] = loadPermission(toldWord(g, kind, peer, parity));
    start.finished[parity] = loadPermission(finishedWord(g, kind, peer, parity));
  }
  return start;
}

/// One call as this block sees it.
struct LowLatencyTurn {
  std::uint64_t epoch;
  std::uint32_t finished;  ///< low bits of the last epoch of the other parity that is received
  bool sound;              ///< false: an earlier call failed, or this one has no room; tell nobody
};
/// A whole warp, so that all lanes agree.
__device__ __forceinline__ LowLatencyTurn lowLatencyTurn(const LowLatencyGroup& g,
                                                         const LowLatencyStart& start) {
  const std::uint64_t sent = start.sent / kEpochStep;
  const std::uint64_t epoch = sends(g.phase) ? sent + 1 : sent - g.laterSends;
  const unsigned other = static_cast<unsigned>(~epoch & 1);
  const std::uint64_t calls = (other != 0 ? start.received[1] : start.received[0]) / kEpochStep;
  return {epoch, static_cast<std::uint32_t>(epochOfCalls(calls, other)), !any(start.broken != 0)};
}

/// A wait for `peer` has failed: without shrink nothing that this rank tells from now on is true.
__device__ inline void giveUpOn(const LowLatencyGroup& g, int peer) {
  if (g.shrink) {
    storeRelaxed(&peerWords(g, g.region, peer).masked, 1u);
  } else {
    storeRelaxed(&wordsOf(g).broken, 1u);
  }
}

/// Waits of this kernel: with shrink they end by themselves, whatever the record says.
template <class Path>
__device__ __forceinline__ WaitControl waitControl(const LowLatencyGroup& g) {
  WaitControl wait = g.wait;
  if (Path::shrink(g)) wait.record = nullptr;
  return wait;
}
/// Of pushes to a proxy: what a call has to tell is told also when this rank has failed meanwhile,
/// so that its peers learn why.
__device__ __forceinline__ WaitControl pushControl(const LowLatencyGroup& g) {
  return {nullptr, g.wait.limitNs, g.wait.rank};
}
__device__ __forceinline__ WaitPoint lowLatencyWait(WaitWhat what, int peer) {
  return {static_cast<std::uint32_t>(what), peer};
}

__device__ __forceinline__ char* helloLine(const LowLatencyGroup& g, LowLatencyKind kind,
                                           char* region, int from, std::uint64_t epoch) {
  return region + g.plan.hello(kind, epoch, from);
}

/// The channels and words of a kind of call.
__device__ __forceinline__ PortUse portUseOf(LowLatencyKind kind) {
  return kind == LowLatencyKind::dispatch ? PortUse::lowLatencyDispatch
                                          : PortUse::lowLatencyCombine;
}
/// The last epoch of a parity that a peer behind a port channel has told the end of.
__device__ __forceinline__ std::uint64_t portFinished(const LowLatencyGroup& g, LowLatencyKind kind,
                                                      int peer, unsigned parity) {
  const std::uint64_t at =
      PortWords{g.ranks}.offset(portUseOf(kind), peer, static_cast<int>(parity));
  return epochOfCalls(callsUntil(g.ports.firstEpoch, parity), parity) +
         loadAcquire(g.ports.words + at / sizeof(std::uint64_t));
}

/// Before anything is written: the peers have read what lies there, that of two epochs ago. They
/// say so in their hello of the epoch between or, when the halves of their calls are apart, in
/// their words here. Every warp looks for itself. True if all have; a peer that has not in time is
/// given up.
template <class Path>
__device__ __forceinline__ bool awaitRoom(const LowLatencyGroup& g, LowLatencyKind kind,
                                          const LowLatencyStart& start,
                                          const LowLatencyTurn& turn) {
  const auto before = static_cast<std::uint32_t>(turn.epoch - 2);
  const unsigned parity = static_cast<unsigned>(turn.epoch & 1);
  const auto reached = [&](std::uint32_t finished) {
    return static_cast<std::int32_t>(finished - before) >= 0;
  };
  bool good = true;
  for (int base = 0; base < g.ranks; base += 32) {
    const int peer = base + static_cast<int>(laneId());
    if (peer >= g.ranks || peer == g.rank) continue;
    const std::uint32_t told = parity != 0 ? start.told[1] : start.told[0];
    const std::uint32_t finished = parity != 0 ? start.finished[1] : start.finished[0];
    if (base == 0 && (reached(told) || reached(finished))) continue;
    if (isMasked<Path>(g, peer)) continue;
    const std::uint32_t* const toldAt = toldWord(g, kind, peer, parity);
    const std::uint32_t* const finishedAt = finishedWord(g, kind, peer, parity);
    const auto look = [&] {
      if (isPort<Path>(g, peer)) {
        return reached(loadAcquire(finishedAt)) ||
               reached(static_cast<std::uint32_t>(portFinished(g, kind, peer, parity)));
      }
      return reached(loadAcquire(toldAt)) || reached(loadAcquire(finishedAt));
    };
    if (waitUntil(waitControl<Path>(g), look, lowLatencyWait(WaitWhat::lowLatencyRoom, peer),
                  toldAt)) {
      continue;
    }
    giveUpOn(g, peer);
    good = Path::shrink(g);
  }
  return all(good);
}

/// Start of a kernel, called by all threads. One warp looks (the last, which has the least to do
/// before): thousands that read the same words get them one after the other. `shared`: in shared
/// memory.
template <class Path>
__device__ __forceinline__ LowLatencyTurn enterLowLatency(const LowLatencyGroup& g,
                                                          LowLatencyKind kind,
                                                          LowLatencyTurn& shared) {
  if (warpId() == kLowLatencyWarps - 1) {
    const LowLatencyStart start = lowLatencyStart(g, kind);
    LowLatencyTurn turn = lowLatencyTurn(g, start);
    if (turn.sound && sends(g.phase)) turn.sound = awaitRoom<Path>(g, kind, start, turn);
    if (laneId() == 0) shared = turn;
    if (Path::kPorts && g.ports.times != nullptr && blockIndex() == 0 && laneId() == 0) {
      g.ports.times->entered = nanoseconds();
    }
  }
  syncBlock();
  return shared;
}

/// What this block adds to an epoch counter.
__device__ __forceinline__ std::uint64_t shareOf(const LowLatencyGroup& g) {
  return blockIndex() != 0 ? g.share : kEpochStep - g.share * (gridSize() - 1);
}
/// Tells all peers behind port channels that a call has been received. A whole warp of one block.
template <class Path>
__device__ inline void tellPorts(const LowLatencyGroup& g, LowLatencyKind kind,
                                 std::uint64_t epoch) {
  const int k = static_cast<int>(kind), parity = static_cast<int>(epoch & 1);
  std::uint64_t* const told = &wordsOf(g).toldPorts[k][parity];
  const auto more = static_cast<std::int64_t>(epoch - loadRelaxed(told));
  syncWarp();
  for (int peer = static_cast<int>(laneId()); peer < g.ranks; peer += 32) {
    if (peer == g.rank || !isPort<Path>(g, peer)) continue;
    PortChannelDevice channel(g.ports.channels[k][peer]);
    channel.atomicAdd(pushControl(g), PortWords{g.ranks}.offset(portUseOf(kind), g.rank, parity),
                      more);
  }
  if (laneId() == 0) storeRelaxed(told, epoch);
}

/// End of a kernel, called by all threads: the epoch advances when the last block is here. After a
/// receive half alone the peers are told, since no later message of this rank may do it in time;
/// and with shrink, since masked ranks get no messages. Peers behind port channels are always told:
/// their hello may lie anywhere.
template <class Path>
__device__ __forceinline__ void finishLowLatency(const LowLatencyGroup& g, LowLatencyKind kind,
                                                 const LowLatencyTurn& turn) {
  syncBlock();  // every thread has read the epoch and done its part
  if (warpId() != 0) return;
  LowLatencyWords& words = wordsOf(g);
  const int k = static_cast<int>(kind), parity = static_cast<int>(turn.epoch & 1);
  const std::uint64_t share = shareOf(g);
  const bool mapped = !sends(g.phase) || Path::shrink(g);  // told by a store
  const bool tells = receives(g.phase) && (mapped || Path::kPorts);
  bool last = false;
  if (laneId() == 0) {
    if (sends(g.phase)) fetchAddLocalRelaxed(&words.sent[k], share);
    if (tells) {
      const std::uint64_t before = fetchAddLocalAcqRel(&words.received[k][parity], share);
      last = (before + share) % kEpochStep == 0;
    } else if (receives(g.phase)) {
      fetchAddLocalRelaxed(&words.received[k][parity], share);
    }
  }
  if (!tells || !any(last) || !turn.sound) return;
  syncWarp();  // the vote orders no memory: what lane 0 acquired is for all
  if constexpr (Path::kPorts) {
    if (g.ports.times != nullptr && laneId() == 0) g.ports.times->left = nanoseconds();
    tellPorts<Path>(g, kind, turn.epoch);
  }
  for (int peer = static_cast<int>(laneId()); mapped && peer < g.ranks; peer += 32) {
    if (peer == g.rank || isPort<Path>(g, peer)) continue;
    storeRelease(&peerWords(g, regionOf<Path>(g, peer), g.rank).finished[k][parity],
                 static_cast<std::uint32_t>(turn.epoch));
  }
}

/// A row as lines: this thread's unit of pass `pass`, and whether it holds one.
template <class Path>
struct RowUnits {
  int units;

  __device__ __forceinline__ int passes() const {
    if constexpr (Path::kFast) return 1;
    return (units + kUnitsPerPass - 1) / kUnitsPerPass;
  }
  __device__ __forceinline__ int line(int pass) const {
    return pass * (kLowLatencyThreads / kLineLanes) + static_cast<int>(threadIndex()) / kLineLanes;
  }
  __device__ __forceinline__ int unit(int pass) const {
    return line(pass) * kLineUnits + static_cast<int>(laneId()) % kLineLanes;
  }
  __device__ __forceinline__ bool hasLine(int pass) const {
    return line(pass) * kLineUnits < units;
  }
  __device__ __forceinline__ bool hasUnit(int pass) const {
    return laneId() % kLineLanes < kLineUnits && unit(pass) < units;
  }
};

/// Tokens of peers are dealt out from the other end of the grid, so that with few tokens no block
/// gets an own and a peer's. The last block has other duties and gets them last.
__device__ __forceinline__ int firstPeerItem() {
  const int blocks = static_cast<int>(gridSize()), block = static_cast<int>(blockIndex());
  return blocks - 2 - block + (block == blocks - 1 ? blocks : 0);
}
struct TokenOf {
  int source;
  int token;
};
/// Item `j` of the peers' tokens, token by token.
__device__ __forceinline__ TokenOf peerToken(const LowLatencyGroup& g, int j) {
  const int peers = g.ranks - 1;
  const int token =
      peers == 1 ? j : static_cast<int>(static_cast<unsigned>(j) / static_cast<unsigned>(peers));
  const int source = peers == 1 ? 0 : j - token * peers;
  return {source + (source >= g.rank ? 1 : 0), token};
}

/// The areas of one call: the peers' lie where this rank's does.
template <class Path>
struct CallAreas {
  const LowLatencyGroup& group;
  char* mine;
  std::uint64_t offset;  ///< of the area in a region

  __device__ __forceinline__ CallAreas(const LowLatencyGroup& g, LowLatencyKind kind,
                                       std::uint64_t epoch)
      : group(g), mine(g.region), offset(g.plan.area(kind, epoch)) {
    mine += offset;
  }
  __device__ __forceinline__ char* at(int rank) const {
    return regionOf<Path>(group, rank) + offset;
  }
};

/// This lane's selection of a token, -1 = none. Loaded early, looked at late.
template <class Args>
__device__ __forceinline__ std::int64_t loadSelection(const Args& a, int token) {
  const int lane = static_cast<int>(laneId());
  if (lane >= a.area.topk) return -1;
  return a.topkIdx[static_cast<std::int64_t>(token) * a.area.topk + lane];
}
/// Calls f(rank) once per rank that owns a selection, ranks in ascending order. f runs in all lanes
/// together. `selection`: what loadSelection() returned.
template <class Args, class F>
__device__ __forceinline__ void forEachOwner(const Args& a, std::int64_t selection, F&& f) {
  const int owner = ownerOf(a, selection);
#pragma unroll 1
  for (int base = 0; base < a.group.ranks; base += 32) {
    const bool here = owner >= base && owner < base + 32;
    std::uint32_t owners = orWarp(here ? 1u << (owner - base) : 0u);
#pragma unroll 1
    for (; owners != 0; owners &= owners - 1) f(base + findFirstSet(owners) - 1);
  }
}

}  // namespace mscclpp::ep::MSCCLPP_PLATFORM_NS
