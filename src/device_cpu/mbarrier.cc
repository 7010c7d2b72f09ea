#include <cstring>

#include "device_cpu/runtime.hpp"

/// Mbarriers, in the 8 bytes that the hardware's take. Who waits for one sleeps until its phase
/// completes.
namespace mscclpp::device {
inline namespace cpu {
namespace detail {
namespace {

constexpr uint64_t kMagic = 0xB5;
constexpr uint32_t kMaxArrivals = (1u << 14) - 1;
constexpr uint32_t kMaxBytes = (1u << 20) - 1;  // the hardware's limit on bytes under way
constexpr int64_t kByteBias = 1 << 23;

struct State {
  uint64_t
      bytes : 24;  // still to come, plus kByteBias (copies may finish before they are announced)
  uint64_t missing : 14;
  uint64_t arrivals : 14;
  uint64_t phase : 1;
  uint64_t unused : 3;
  uint64_t magic : 8;
};
static_assert(sizeof(State) == 8);

State load(const void* barrier) {
  State state;
  rawCopy(&state, barrier, sizeof state);
  return state;
}
void store(void* barrier, State state) {
  rawCopy(barrier, &state, sizeof state);
}

char* phaseSync(void* barrier, unsigned parity) {
  return static_cast<char*>(barrier) + parity;
}

unsigned bucketOf(const void* barrier) {
  return static_cast<unsigned>(reinterpret_cast<uintptr_t>(barrier) >> 3) % kMbarrierBuckets;
}

void wakeWaiters(Block* block, const void* barrier) {
  Fiber** link = &block->mbarrierWaiters[bucketOf(barrier)];
  while (*link != nullptr) {
    Fiber* waiter = *link;
    if (waiter->address != barrier) {
      link = &waiter->nextWaiter;
      continue;
    }
    *link = waiter->nextWaiter;
    if (waiter->deadlineNs != 0) removeTimed(block->worker, waiter);
    wake(waiter);
  }
}

void addWaiter(Block* block, Fiber* fiber) {
  Fiber** link = &block->mbarrierWaiters[bucketOf(fiber->address)];
  while (*link != nullptr) link = &(*link)->nextWaiter;
  fiber->nextWaiter = nullptr;
  *link = fiber;
}

void completeIfDue(Block* block, void* barrier, State state) {
  const bool complete = state.missing == 0 && state.bytes == kByteBias;
  if (complete) {
    state.phase ^= 1u;
    state.missing = state.arrivals;
  }
  store(barrier, state);
  if (complete) wakeWaiters(block, barrier);
}

State checked(const void* barrier, const char* what, const Site& site) {
  const Block* block = currentFiber()->block;
  const char* place = static_cast<const char*>(barrier);
  if (place < block->shared || place + sizeof(State) > block->shared + block->sharedBytes) {
    failFiber("mbarrier: not in the block's shared memory", barrier, site);
  }
  const State state = load(barrier);
  if (state.magic != kMagic) failFiber(what, barrier, site);
  raceRead(barrier, sizeof(State));
  return state;
}

}  // namespace

bool mbarrierReady(const void* barrier) {
  return load(barrier).magic == kMagic;
}

void mbarrierInit(void* barrier, unsigned arrivals, const Site& site) {
  if (arrivals == 0 || arrivals > kMaxArrivals) {
    failFiber("initMbarrier: the number of arrivals is not in 1..16383", barrier, site);
  }
  if (reinterpret_cast<uintptr_t>(barrier) % 8 != 0) {
    failFiber("initMbarrier: the address is not a multiple of 8", barrier, site);
  }
  raceWrite(barrier, sizeof(State));
  store(barrier, State{static_cast<uint64_t>(kByteBias), arrivals, arrivals, 0, 0, kMagic});
}

void mbarrierArrive(void* barrier, uint32_t expectBytes, const Site& site) {
  beforeAtomicUpdate();
  State state = checked(barrier, "arrive: the mbarrier is not initialised", site);
  if (state.missing == 0) {
    failFiber("arrive: more arrivals than this phase of the mbarrier has", barrier, site);
  }
  if (expectBytes > kMaxBytes) {
    failFiber("arriveExpectBytes: more than 1048575 bytes", barrier, site);
  }
  raceRelease(phaseSync(barrier, state.phase));
  state.bytes += expectBytes;
  --state.missing;
  completeIfDue(currentFiber()->block, barrier, state);
}

void mbarrierCompleteBytes(Block* block, void* barrier, uint32_t bytes) {
  State state = load(barrier);
  raceRelease(phaseSync(barrier, state.phase));
  state.bytes -= bytes;
  completeIfDue(block, barrier, state);
}

bool mbarrierTest(void* barrier, unsigned parity, const Site& site) {
  beforeAtomicLoad(barrier);
  const State state = checked(barrier, "testParity: the mbarrier is not initialised", site);
  if (state.phase == (parity & 1u)) return false;
  raceAcquire(phaseSync(barrier, parity & 1u));
  return true;
}

bool mbarrierWait(void* barrier, unsigned parity, const MbarrierWait& wait, const Site& site,
                  uint64_t& waitedNs) {
  beforeAtomicUpdate();
  Worker* worker = currentWorker();
  Fiber* fiber = worker->current;
  const uint64_t start = wait.limitNs == 0 ? 0 : nanoseconds();
  while (checked(barrier, "waitParity: the mbarrier is not initialised", site).phase ==
         (parity & 1u)) {
    fiber->address = barrier;
    addWaiter(fiber->block, fiber);
    fiber->timedOut = false;
    fiber->deadlineNs = wait.limitNs == 0 ? 0 : start + wait.limitNs;
    if (fiber->deadlineNs != 0) {
      fiber->previousTimed = nullptr;
      fiber->nextTimed = worker->firstTimed;
      if (fiber->nextTimed != nullptr) fiber->nextTimed->previousTimed = fiber;
      worker->firstTimed = fiber;
    }
    block(worker, fiber, WaitKind::mbarrier, site);
    if (fiber->timedOut) {
      waitedNs = nanoseconds() - start;
      return false;
    }
  }
  raceAcquire(phaseSync(barrier, parity & 1u));
  return true;
}

void removeTimed(Worker* worker, Fiber* fiber) {
  (fiber->previousTimed == nullptr ? worker->firstTimed : fiber->previousTimed->nextTimed) =
      fiber->nextTimed;
  if (fiber->nextTimed != nullptr) fiber->nextTimed->previousTimed = fiber->previousTimed;
  fiber->deadlineNs = 0;
}

void checkDeadlines(Worker* worker) {
  if (worker->firstTimed == nullptr) return;
  const uint64_t now = nanoseconds();
  Fiber* next = nullptr;
  for (Fiber* fiber = worker->firstTimed; fiber != nullptr; fiber = next) {
    next = fiber->nextTimed;
    if (now < fiber->deadlineNs) continue;
    removeTimed(worker, fiber);
    Fiber** link = &fiber->block->mbarrierWaiters[bucketOf(fiber->address)];
    while (*link != fiber) link = &(*link)->nextWaiter;
    *link = fiber->nextWaiter;
    fiber->timedOut = true;
    wake(fiber);
  }
}

}  // namespace detail
}  // namespace cpu
}  // namespace mscclpp::device
