#include <bit>

#include "device_cpu/runtime.hpp"

/// Warp collectives, barriers, and what else a kernel thread asks about itself.
namespace mscclpp::device {
inline namespace cpu {
namespace detail {
namespace {

void completeCollective(Warp* warp, Collective& collective, const Fiber* caller) {
  collective.complete = true;
  collective.toRead = collective.arrived;
  for (uint32_t lanes = collective.arrived; lanes != 0; lanes &= lanes - 1) {
    Fiber* fiber = warp->lanes + std::countr_zero(lanes);
    if (fiber != caller) wake(fiber);
  }
}

// The call of this mask that still misses this lane, or a new one.
Collective* joinCollective(Warp* warp, CollectiveOp op, uint32_t mask, uint32_t bit) {
  Collective* unused = nullptr;
  unsigned live = warp->liveCollectives;
  for (unsigned i = 0; i < kWarpLanes && (live != 0 || unused == nullptr); ++i) {
    Collective& candidate = warp->collectives[i];
    if (!candidate.live) {
      if (unused == nullptr) unused = &candidate;
      continue;
    }
    --live;
    if (!candidate.complete && candidate.mask == mask && (candidate.arrived & bit) == 0) {
      return &candidate;
    }
  }
  ++warp->liveCollectives;
  unused->live = true;
  unused->complete = false;
  unused->mask = mask;
  unused->arrived = 0;
  unused->op = op;
  return unused;
}

WaitKind waitKind(CollectiveOp op) {
  switch (op) {
    case CollectiveOp::shuffle:
      return WaitKind::shuffle;
    case CollectiveOp::ballot:
      return WaitKind::ballot;
    default:
      return WaitKind::syncWarp;
  }
}

uint64_t readResult(const Collective& collective, CollectiveOp op, unsigned sourceLane) {
  if (op == CollectiveOp::shuffle) return collective.values[sourceLane];
  uint64_t result = 0;
  if (op == CollectiveOp::ballot) {
    for (uint32_t lanes = collective.arrived; lanes != 0; lanes &= lanes - 1) {
      const int lane = std::countr_zero(lanes);
      if (collective.values[lane] != 0) result |= uint64_t{1} << lane;
    }
  }
  return result;
}

}  // namespace

unsigned threadIndex() {
  return currentFiber()->thread;
}

ThreadPosition position() {
  const Fiber* fiber = currentFiber();
  const Block* block = fiber->block;
  return {fiber->thread, block->index, block->threads, block->grid->request.shape.blocks};
}

void* sharedMemory(size_t offset, size_t bytes, size_t alignment, const Site& site) {
  const Block* block = currentFiber()->block;
  if (offset > block->sharedBytes || bytes > block->sharedBytes - offset) {
    failFiber("shared memory: the range ends beyond the launch's sharedBytes",
              block->shared + offset, site);
  }
  if (offset % alignment != 0) {
    failFiber("shared memory: the offset is not aligned for the type", block->shared + offset,
              site);
  }
  return block->shared + offset;
}

// Only SyncWarp orders memory: CUDA promises none for shuffles and votes.
uint64_t warpCollective(CollectiveOp op, uint32_t mask, uint64_t value, unsigned sourceLane,
                        const Site& site) {
  Worker* worker = currentWorker();
  Fiber* fiber = worker->current;
  Warp* warp = fiber->warp;
  const uint32_t bit = 1u << fiber->lane;
  ++worker->stats.collectives;
  if ((mask & bit) == 0)
    failFiber("warp collective: the caller's lane is not in the mask", nullptr, site);
  Collective* collective = joinCollective(warp, op, mask, bit);
  if (collective->op != op) {
    failFiber("warp collective: lanes of one mask are in different collectives", nullptr, site);
  }
  collective->values[fiber->lane] = value;
  collective->arrived |= bit;
  if (op == CollectiveOp::sync) raceRelease(collective->values);
  if (collective->arrived == (mask & ~warp->exited)) {
    completeCollective(warp, *collective, fiber);
  } else {
    fiber->address = collective;
    block(worker, fiber, waitKind(op), site);
  }
  if (op == CollectiveOp::sync) {
    raceAcquire(collective->values);
  } else if (op == CollectiveOp::shuffle && (collective->arrived >> sourceLane & 1u) == 0) {
    failFiber("shuffle: the source lane does not take part", nullptr, site);
  }
  const uint64_t result = readResult(*collective, op, sourceLane);
  collective->toRead &= ~bit;
  if (collective->toRead == 0) {
    collective->live = false;
    --warp->liveCollectives;
  }
  return result;
}

void barrier(int id, int threads, bool wait, const Site& site) {
  Worker* worker = currentWorker();
  Fiber* fiber = worker->current;
  Block* block = fiber->block;
  if (id < 0 || id >= kBarriers) failFiber("barrier: the id is not in 0..15", nullptr, site);
  Barrier& state = block->barriers[id];
  const unsigned expected = threads == 0 ? block->threads : static_cast<unsigned>(threads);
  if (threads != 0 && (threads < 0 || threads % 32 != 0 || expected > block->threads)) {
    failFiber("barrier: the thread count is not a multiple of 32 or exceeds the block", &state,
              site);
  }
  if (state.arrived != 0 && state.expected != expected) {
    failFiber("barrier: two thread counts for one barrier", &state, site);
  }
  state.expected = expected;
  ++state.arrived;
  char* sync = state.sync[state.generation & 1u];
  raceRelease(sync);
  if (state.arrived == expected) {
    ++state.generation;
    state.arrived = 0;
    Fiber* waiter = state.firstWaiter;
    state.firstWaiter = state.lastWaiter = nullptr;
    while (waiter != nullptr) {
      Fiber* next = waiter->nextWaiter;
      wake(waiter);
      waiter = next;
    }
  } else if (wait) {
    fiber->nextWaiter = nullptr;
    (state.lastWaiter == nullptr ? state.firstWaiter : state.lastWaiter->nextWaiter) = fiber;
    state.lastWaiter = fiber;
    fiber->address = &state;
    detail::block(worker, fiber, WaitKind::barrier, site);
  }
  if (wait) raceAcquire(sync);
}

void finishThread(Worker* worker, Fiber* fiber) {
  Block* block = fiber->block;
  Warp* warp = fiber->warp;
  fiber->state = ThreadState::done;
  warp->exited |= 1u << fiber->lane;
  for (unsigned i = 0; i < kWarpLanes; ++i) {
    Collective& collective = warp->collectives[i];
    if (collective.live && !collective.complete &&
        collective.arrived == (collective.mask & ~warp->exited)) {
      completeCollective(warp, collective, nullptr);
    }
  }
  --block->live;
  if (--block->active == 0 && block->live != 0) worker->suspect = block;
}

}  // namespace detail
}  // namespace cpu
}  // namespace mscclpp::device
