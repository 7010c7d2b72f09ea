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

/// A kernel's place in the sequence, and whether an earlier one has given up. A rank that gave up
/// says nothing more, neither that its kernels start nor that they are done, and moves no data: its
/// outputs are void, its memory will be used otherwise, and a peer that is only late must run into
/// its own limit rather than take what it finds for an answer.
struct Turn {
  std::uint32_t epoch;
  bool broken;
};
__device__ __forceinline__ Turn currentTurn(const GroupArgs& g) {
  const std::uint32_t broken = loadRelaxed(&localWords(g).broken);
  return {currentEpoch(g), broken != 0};
}
/// Added to LocalWords::blocksDone, beyond any number of blocks, so that the last block learns of
/// it with the count.
inline constexpr std::uint32_t kGaveUp = 1u << 16;
__device__ __forceinline__ void giveUp(const GroupArgs& g) {
  fetchAddLocalRelaxed(&localWords(g).blocksDone, kGaveUp);
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

/// Ranks of other nodes have no memory here; kernels pass them over.
__device__ __forceinline__ bool isMapped(const GroupArgs& g, int rank) {
  return g.heaps[rank] != nullptr;
}

/// Tells `peer` where this rank's rows are. Called by one thread per peer.
__device__ __forceinline__ void publishEntry(const GroupArgs& g, int peer,
                                             const EntryPacket& packet, std::uint32_t epoch) {
  if (!isMapped(g, peer)) return;
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
  const bool came = waitReached(g.wait, &box.epoch, epoch, waitPoint(what, peer));
  if (came) packet = box;
  if (came && packet.signature == signature) return true;
  if (came) {
    reportFailure(g.wait, waitPoint(WaitWhat::shapeMismatch, peer), signature, packet.signature);
  }
  giveUp(g);
  return false;
}

/// Tells every peer up to which epoch this rank is done. Called by one warp.
__device__ __forceinline__ void tellDone(const GroupArgs& g, std::uint32_t epoch) {
  for (int peer = static_cast<int>(laneId()); peer < g.ranks; peer += 32) {
    if (peer != g.rank && isMapped(g, peer))
      storeRelease(&peerBox(g, peer, g.rank).done.epoch, epoch);
  }
}

/// End of a collective kernel, called by all threads of all blocks. The last block tells every peer
/// that this rank is done and waits for them, unless some wait has failed. If a peer does not come
/// in time, the word is taken back: that peer may still be reading here, and must not take what
/// this rank's memory is used for next for an answer. Every thread that issued
/// bulk stores has waited for them; syncBlock orders the block's writes before thread 0's acq_rel
/// add, whose chain the last block's release at system scope passes on to the peers.
__device__ inline void leaveGroup(const GroupArgs& g, Turn turn, WaitWhat what,
                                  std::uint32_t& lastBlock) {
  LocalWords& local = localWords(g);
  syncBlock();
  if (threadIndex() == 0) {
    const std::uint32_t before = fetchAddLocalAcqRel(&local.blocksDone, 1u);
    lastBlock = before % kGaveUp == gridSize() - 1 ? 1 + before / kGaveUp : 0;
  }
  syncBlock();
  if (lastBlock == 0 || warpId() != 0) return;
  const bool finished = lastBlock == 1 && !turn.broken;
  if (finished) tellDone(g, turn.epoch);
  bool good = finished;
  for (int peer = static_cast<int>(laneId()); good && peer < g.ranks; peer += 32) {
    if (peer == g.rank || !isMapped(g, peer)) continue;
    good = waitReached(g.wait, &peerBox(g, g.rank, peer).done.epoch, turn.epoch,
                       waitPoint(what, peer));
  }
  good = all(good);
  if (finished && !good) tellDone(g, turn.epoch - 1);
  syncWarp();
  if (laneId() == 0) {
    local.blocksDone = 0;
    local.ticket = 0;
    if (!good) local.broken = 1;
    storeLocalRelease(&local.epoch, turn.epoch);
  }
}

}  // namespace mscclpp::ep::MSCCLPP_PLATFORM_NS
