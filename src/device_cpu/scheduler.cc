#include <sched.h>

#include <algorithm>
#include <bit>

#include "device_cpu/runtime.hpp"

/// Which kernel thread runs next. FIFO: warps take turns; a warp's ready lanes run to exhaustion
/// before the next warp, which keeps their stacks in the cache. Chaos: everything that CUDA leaves
/// open is decided by the seed.
namespace mscclpp::device {
inline namespace cpu {
namespace detail {
namespace {

thread_local Worker* threadWorker = nullptr;

constexpr uint64_t kStepsPerTimeCheck = 4096;
constexpr unsigned kYieldRounds = 64;  // idle rounds before sleeping
constexpr uint64_t kMinSleepNs = 1000;
constexpr uint64_t kMaxSleepNs = 50000;

void threadMain();

// Takes a lane that is ready or due for polling off its mask and makes it the current thread.
Fiber* takeLane(Worker* worker, Warp* warp, unsigned lane) {
  const uint32_t bit = 1u << lane;
  if ((warp->ready & bit) != 0) {
    warp->ready &= ~bit;
    --worker->readyCount;
    ++worker->activity;
  } else {
    warp->pollRound &= ~bit;
    warp->polling &= ~bit;
    --worker->pollingCount;
  }
  Fiber* fiber = warp->lanes + lane;
  fiber->state = ThreadState::running;
  fiber->sinceYield = 0;
  worker->current = fiber;
  return fiber;
}

// Leaves the current thread, whose state says how it goes on.
void leave(Worker* worker, Fiber* fiber) {
  ++worker->stats.switches;
  Runtime& rt = runtime();
  Warp* warp = fiber->warp;
  const uint32_t runnable = warp->ready | warp->pollRound;
  if (runnable != 0 && !rt.config.chaos && !rt.failing.load(std::memory_order_relaxed)) {
    Fiber* next = takeLane(worker, warp, static_cast<unsigned>(std::countr_zero(runnable)));
    if (next != fiber) jump(*fiber, *next, threadMain);
    return;
  }
  worker->current = nullptr;
  jump(*fiber, worker->main, nullptr);
}

// A kernel thread's whole life: one kernel after the other on the same stack.
void threadMain() {
  for (;;) {
    Fiber* fiber = currentFiber();
    Grid* grid = fiber->block->grid;
    raceAcquire(grid->stream->sync);
    fiber->started = true;
    grid->request.entry(grid->args);
    fiber = currentFiber();
    Worker* worker = currentWorker();
    raceRelease(grid->stream->doneSync);
    finishThread(worker, fiber);
    leaveFinished(worker, fiber);
  }
}

uint64_t frozenUntil(const Worker* worker, const Warp* warp) {
  const Block* block = warp->block;
  const auto rank = static_cast<unsigned>(block->grid->stream->rank) % kRankSlots;
  return std::max({warp->frozenUntil, block->frozenUntil, worker->rankFrozenUntil[rank]});
}

// A random warp that is not frozen; when all are, time moves on to the first that thaws.
Warp* chooseAtRandom(Worker* worker) {
  const size_t size = worker->queue.size();
  size_t chosen = 0;
  bool found = false;
  for (int attempt = 0; attempt < 4 && !found; ++attempt) {
    chosen = randomNumber(worker) % size;
    found = frozenUntil(worker, worker->queue[chosen]) <= worker->step;
  }
  if (!found) {
    uint64_t earliest = UINT64_MAX;
    for (size_t i = 0; i < size; ++i) {
      const uint64_t until = frozenUntil(worker, worker->queue[i]);
      if (until < earliest) {
        earliest = until;
        chosen = i;
      }
    }
    worker->step = std::max(worker->step, earliest);
  }
  std::swap(worker->queue[chosen], worker->queue[0]);
  return worker->queue.popFront();
}

// Warps freeze often and for a short time, blocks and ranks seldom and for long; never two ranks at
// once, or they would only take turns.
void freezeAtRandom(Worker* worker, Warp* warp) {
  const auto longest = static_cast<uint64_t>(std::max(1, runtime().config.freezeSteps));
  const uint64_t step = worker->step;
  if (randomNumber(worker) % 64 == 0) {
    warp->frozenUntil = step + randomNumber(worker) % std::min<uint64_t>(longest, 1024);
  }
  const uint64_t draw = randomNumber(worker) % 1024;
  if (draw == 0 && worker->anyRankFrozenUntil <= step) {
    const auto rank = static_cast<unsigned>(warp->block->grid->stream->rank) % kRankSlots;
    worker->anyRankFrozenUntil = step + randomNumber(worker) % (4 * longest);
    worker->rankFrozenUntil[rank] = worker->anyRankFrozenUntil;
  } else if (draw == 1) {
    warp->block->frozenUntil = step + randomNumber(worker) % longest;
  }
}

unsigned chooseLane(Worker* worker, uint32_t mask, bool chaos) {
  if (chaos) {
    for (uint64_t skip = randomNumber(worker) % std::popcount(mask); skip != 0; --skip) {
      mask &= mask - 1;
    }
  }
  return static_cast<unsigned>(std::countr_zero(mask));
}

void reportPending(Worker* worker) {
  raiseRuntimeFailure(failureHeading(worker->pending));
  worker->pending = PendingFailure{};
}

void visitWarp(Worker* worker, Warp* warp) {
  const bool chaos = runtime().config.chaos;
  Block* block = warp->block;
  warp->queued = false;
  ++worker->visits;
  warp->ready |= warp->later;
  warp->later = 0;
  warp->pollRound = warp->polling;
  worker->visiting = warp;
  for (;;) {
    const uint32_t mask = warp->ready | warp->pollRound;
    if (mask == 0) break;
    jump(worker->main, *takeLane(worker, warp, chooseLane(worker, mask, chaos)), threadMain);
    worker->current = nullptr;
    if (worker->pending.fiber != nullptr) {
      worker->visiting = nullptr;
      reportPending(worker);
      return;
    }
    if (runtime().failing.load(std::memory_order_relaxed)) break;
    if (chaos && (randomNumber(worker) & 1) != 0) break;
  }
  worker->visiting = nullptr;
  warp->pollRound = 0;
  if (block->live == 0) {
    endBlock(worker, block);
    return;
  }
  if ((warp->ready | warp->later | warp->polling) != 0) {
    enqueueWarp(worker, warp);
    if (chaos) freezeAtRandom(worker, warp);
  }
}

// A block whose threads are all blocked, with no copy under way, stays so for ever.
void checkSuspect(Worker* worker) {
  const Block* block = worker->suspect;
  worker->suspect = nullptr;
  if (block->live == 0 || block->active != 0 || block->copies != 0) return;
  raiseRuntimeFailure("deadlock: every thread of rank " +
                      std::to_string(block->grid->stream->rank) + " block " +
                      std::to_string(block->index) + " (" + kernelName(block->grid) +
                      ") is blocked [seed " + std::to_string(runtime().config.seed) + "]\n");
}

// Called when nothing but polling is left and every poll failed since anything else happened.
void nothingButPolling(Worker* worker) {
  Runtime& rt = runtime();
  if (rt.config.closed && rt.workerCount == 1) {
    raiseRuntimeFailure("no progress: every thread is blocked or polling [seed " +
                        std::to_string(rt.config.seed) + "]\n");
    return;
  }
  // Somebody outside has to raise a flag: give the processor away, then sleep.
  ++worker->activity;  // a new round
  checkDeadlines(worker);
  if (++worker->idleRounds < kYieldRounds) {
    sched_yield();
    return;
  }
  const unsigned doublings = std::min((worker->idleRounds - kYieldRounds) / 64, 6u);
  const uint32_t seen = worker->signal.read();
  if (!worker->inboxFull.load()) {
    worker->signal.wait(seen, std::min(kMinSleepNs << doublings, kMaxSleepNs));
  }
}

void takeInbox(Worker* worker) {
  Block* starting = nullptr;
  StreamState* advancing = nullptr;
  {
    WordLock lock(worker->inboxLock);
    worker->inboxFull.store(false, std::memory_order_relaxed);
    starting = worker->firstStarting;
    advancing = worker->firstAdvance;
    worker->firstStarting = worker->lastStarting = nullptr;
    worker->firstAdvance = worker->lastAdvance = nullptr;
  }
  while (starting != nullptr) {
    Block* next = starting->nextStarting;
    startBlock(worker, starting);
    starting = next;
  }
  while (advancing != nullptr) {
    StreamState* next = advancing->nextAdvance;
    advanceStream(worker, advancing);
    advancing = next;
  }
}

// One step of a worker. False when it has nothing at all to do.
bool stepWorker(Worker* worker) {
  Runtime& rt = runtime();
  if (worker->inboxFull.load(std::memory_order_acquire)) takeInbox(worker);
  ++worker->step;
  if (!worker->copies.empty()) {
    if (worker->queue.empty()) worker->step = std::max(worker->step, worker->copies[0].due);
    runDueCopies(worker);
  }
  if (worker->suspect != nullptr) checkSuspect(worker);
  if (worker->queue.empty()) return !worker->copies.empty();
  Warp* warp = rt.config.chaos ? chooseAtRandom(worker) : worker->queue.popFront();
  visitWarp(worker, warp);
  if (rt.failing.load(std::memory_order_relaxed)) return true;
  if (worker->suspect != nullptr) checkSuspect(worker);
  if (worker->firstTimed != nullptr && worker->step % kStepsPerTimeCheck == 0) {
    checkDeadlines(worker);
  }
  if (worker->readyCount != 0 || !worker->copies.empty()) {
    worker->idleRounds = 0;
  } else if (worker->pollingCount != 0 && worker->polledStamp == worker->activity &&
             worker->polledCount == worker->pollingCount &&
             !worker->inboxFull.load(std::memory_order_acquire)) {
    nothingButPolling(worker);
  }
  return true;
}

}  // namespace

__attribute__((noinline)) Worker* currentWorker() {
  Worker* worker = threadWorker;
  asm volatile("" : "+r"(worker));  // never kept across a fiber switch
  return worker;
}
void setCurrentWorker(Worker* worker) {
  threadWorker = worker;
}
Fiber* currentFiber() {
  return currentWorker()->current;
}

uint64_t randomNumber(Worker* worker) {
  uint64_t x = worker->random;
  x ^= x << 13;
  x ^= x >> 7;
  x ^= x << 17;
  worker->random = x;
  return x >> 8;
}

void resetWorker(Worker* worker, const RuntimeConfig& config) {
  worker->random =
      config.seed * 0x9E3779B97F4A7C15ull + 0x1234567u + static_cast<uint64_t>(worker->id) * 77u;
  if (worker->random == 0) worker->random = 1;
  for (int i = 0; i < 8; ++i) randomNumber(worker);
  worker->step = 0;
  worker->visits = 0;
  worker->idleRounds = 0;
  worker->anyRankFrozenUntil = 0;
  std::fill(std::begin(worker->rankFrozenUntil), std::end(worker->rankFrozenUntil), 0u);
}

void enqueueWarp(Worker* worker, Warp* warp) {
  if (warp->queued || warp == worker->visiting) return;
  RaceQuiet quiet;
  warp->queued = true;
  worker->queue.pushBack(warp);
}

void wake(Fiber* fiber) {
  Block* block = fiber->block;
  Worker* worker = block->worker;
  fiber->state = ThreadState::ready;
  fiber->wait = WaitKind::none;
  ++block->active;
  ++worker->readyCount;
  fiber->warp->ready |= 1u << fiber->lane;
  enqueueWarp(worker, fiber->warp);
}

void block(Worker* worker, Fiber* fiber, WaitKind wait, const Site& site) {
  fiber->state = ThreadState::blocked;
  fiber->wait = wait;
  fiber->site = site;
  if (--fiber->block->active == 0) worker->suspect = fiber->block;
  leave(worker, fiber);
}

void giveWay(Worker* worker, Fiber* fiber) {
  fiber->state = ThreadState::ready;
  ++worker->readyCount;
  fiber->warp->later |= 1u << fiber->lane;
  leave(worker, fiber);
}

void pollAgain(Worker* worker, Fiber* fiber) {
  ++worker->stats.polls;
  if (worker->polledStamp != worker->activity) {
    worker->polledStamp = worker->activity;
    worker->polledCount = 0;
  }
  if (fiber->polledAt != worker->activity) {
    fiber->polledAt = worker->activity;
    ++worker->polledCount;
  }
  fiber->state = ThreadState::polling;
  ++worker->pollingCount;
  fiber->warp->polling |= 1u << fiber->lane;
  leave(worker, fiber);
}

void leaveFinished(Worker* worker, Fiber* fiber) {
  leave(worker, fiber);
}

bool runManually(Worker* worker) {
  Runtime& rt = runtime();
  adoptThread(worker->main);
  setCurrentWorker(worker);
  wakeWatchdog();
  bool sound = true;
  for (;;) {
    if (rt.failing.load(std::memory_order_acquire)) {
      abandonWork(worker);
      sound = false;
      break;
    }
    if (stepWorker(worker) || worker->inboxFull.load(std::memory_order_acquire)) continue;
    bool busy = false;
    {
      WordLock lock(rt.lock);
      busy = rt.busyStreams != 0;
    }
    if (!busy) break;
    raiseRuntimeFailure("streams wait for events that nobody will record\n");
  }
  setCurrentWorker(nullptr);
  return sound;
}

void runInBackground(Worker* worker) {
  Runtime& rt = runtime();
  adoptThread(worker->main);
  setCurrentWorker(worker);
  for (;;) {
    const uint32_t seen = worker->signal.read();
    if (rt.failing.load(std::memory_order_acquire)) abandonWork(worker);
    if (rt.stopping.load(std::memory_order_acquire)) break;
    if (stepWorker(worker)) continue;
    if (worker->inboxFull.load(std::memory_order_acquire)) continue;
    worker->signal.wait(seen);
  }
  setCurrentWorker(nullptr);
}

}  // namespace detail
}  // namespace cpu
}  // namespace mscclpp::device
