#pragma once

#include <mscclpp/device/device.hpp>

#include "../api.cuh"

/// What all collective kernels share: addresses in the symmetric heap, the experts' hosts, and the
/// handshakes at a kernel's start and end.
namespace mscclpp::ep::MSCCLPP_PLATFORM_NS {

using namespace mscclpp::device;

__device__ __forceinline__ LocalWords& localWords(const GroupArgs& g) {
  return *reinterpret_cast<LocalWords*>(g.heaps[g.rank] + g.plan.localWords());
}
/// The box in `owner`'s heap that `writer` writes.
__device__ __forceinline__ PeerBox& peerBox(const GroupArgs& g, int owner, int writer) {
  return *reinterpret_cast<PeerBox*>(g.heaps[owner] + g.plan.peerBox(writer));
}
__device__ __forceinline__ std::uint32_t* chunkFlags(const GroupArgs& g, int owner, int writer) {
  return reinterpret_cast<std::uint32_t*>(g.heaps[owner] + g.plan.chunkFlags(writer));
}
__device__ __forceinline__ WaitPoint waitPoint(WaitWhat what, int peer) {
  return WaitPoint{static_cast<std::uint32_t>(what), peer};
}
__device__ __forceinline__ WaitPoint pipelineWait(const GroupArgs& g) {
  return waitPoint(WaitWhat::pipeline, g.rank);
}

/// Epochs live on the device, so that a replayed graph advances them. Every block reads the same
/// value: the last block stores the next one only after all blocks have arrived at leaveGroup.
__device__ __forceinline__ std::uint32_t currentEpoch(const GroupArgs& g) {
  return loadLocalAcquire(&localWords(g).epoch) + 1;
}

__device__ __forceinline__ int rankOfExpert(const ExpertArgs& e, std::int64_t expert) {
  return e.rankOf ? e.rankOf[expert] : static_cast<int>(expert) / e.perRank;
}
__device__ __forceinline__ int indexOfExpert(const ExpertArgs& e, std::int64_t expert) {
  return e.indexOf ? e.indexOf[expert] : static_cast<int>(expert) % e.perRank;
}
__device__ __forceinline__ bool isExpert(const ExpertArgs& e, std::int64_t expert) {
  return expert >= 0 && expert < e.experts;
}
/// Remembers a topk index that names no expert; notify tells every rank, so that all refuse.
__device__ __forceinline__ void reportInvalidExpert(std::int64_t* word, std::int64_t expert) {
  std::int64_t none = 0;
  compareExchangeAcqRel(word, none, expert);
}

/// Reports something other than a wait that makes this call useless. The first report is kept.
__device__ inline void reportFailure(const WaitControl& wait, WaitPoint point,
                                     std::uint64_t expected, std::uint64_t seen) {
  std::uint32_t none = kFailureNone;
  if (!compareExchangeAcqRel(&wait.record->state, none, kFailureClaimed)) return;
  wait.record->what = point.what;
  wait.record->rank = wait.rank;
  wait.record->peer = point.peer;
  wait.record->block = blockIndex();
  wait.record->thread = threadIndex();
  wait.record->expected = expected;
  wait.record->seen = seen;
  storeRelease(&wait.record->state, kFailurePublished);
}

/// Tells `peer` where this rank's rows are. Called by one thread per peer.
__device__ __forceinline__ void publishEntry(const GroupArgs& g, int peer,
                                             const EntryPacket& packet, std::uint32_t epoch) {
  EntryPacket& box = peerBox(g, peer, g.rank).entry;
  box.staged = packet.staged;
  box.base = packet.base;
  box.weights = packet.weights;
  box.rowBegin = packet.rowBegin;
  box.weightsBegin = packet.weightsBegin;
  box.rows = packet.rows;
  box.signature = packet.signature;
  storeRelease(&box.epoch, epoch);
}

/// Waits for `peer`'s kernel to start. False: it did not within the limit, or its call has another
/// shape (both are recorded); the caller then leaves that peer out.
__device__ inline bool awaitEntry(const GroupArgs& g, int peer, std::uint32_t epoch, WaitWhat what,
                                  std::uint64_t signature, EntryPacket& packet) {
  const EntryPacket& box = peerBox(g, g.rank, peer).entry;
  if (!waitReached(g.wait, &box.epoch, epoch, waitPoint(what, peer))) return false;
  packet = box;
  if (packet.signature == signature) return true;
  reportFailure(g.wait, waitPoint(WaitWhat::shapeMismatch, peer), signature, packet.signature);
  return false;
}

/// End of a collective kernel, called by all threads of all blocks. The last block tells every peer
/// that this rank is done and waits for them. Every thread that issued bulk stores has waited for
/// them; syncBlock orders the block's writes before thread 0's acq_rel add, whose chain the last
/// block's release at system scope passes on to the peers.
__device__ inline void leaveGroup(const GroupArgs& g, std::uint32_t epoch, WaitWhat what,
                                  std::uint32_t& lastBlock) {
  LocalWords& local = localWords(g);
  syncBlock();
  if (threadIndex() == 0) {
    lastBlock = fetchAddLocalAcqRel(&local.blocksDone, 1u) == gridSize() - 1 ? 1u : 0u;
  }
  syncBlock();
  if (lastBlock == 0 || warpId() != 0) return;
  for (int peer = static_cast<int>(laneId()); peer < g.ranks; peer += 32) {
    if (peer != g.rank) storeRelease(&peerBox(g, peer, g.rank).done.epoch, epoch);
  }
  for (int peer = static_cast<int>(laneId()); peer < g.ranks; peer += 32) {
    if (peer != g.rank) {
      waitReached(g.wait, &peerBox(g, g.rank, peer).done.epoch, epoch, waitPoint(what, peer));
    }
  }
  syncWarp();
  if (laneId() == 0) {
    local.blocksDone = 0;
    local.ticket = 0;
    storeLocalRelease(&local.epoch, epoch);
  }
}

}  // namespace mscclpp::ep::MSCCLPP_PLATFORM_NS
