#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <new>

#include "device_cpu/runtime.hpp"

/// Memory, start and end of blocks.
namespace mscclpp::device {
inline namespace cpu {
namespace detail {
namespace {

constexpr size_t kPage = 4096;
constexpr size_t kGuardBytes = 1024;  // on both sides of shared memory; also keeps its alignment
constexpr size_t kCanaryBytes = 64;
constexpr int kCanary = 0xA7;
constexpr int kFreshShared = 0xCD;
constexpr int kFreshSnapshot = 0xEE;
constexpr size_t kSanitizerStackFactor = 8;  // sanitizers print their reports on the thread's stack

size_t roundUp(size_t value, size_t unit) {
  return (value + unit - 1) / unit * unit;
}

// Hands out pieces of a mapping; with a null base it only adds up.
class Carver {
 public:
  explicit Carver(char* base) : base_(base) {}
  template <class T>
  T* take(size_t count, size_t alignment = alignof(T)) {
    offset_ = roundUp(offset_, alignment);
    char* piece = base_ + offset_;
    offset_ += count * sizeof(T);
    return reinterpret_cast<T*>(piece);
  }
  size_t offset() const { return offset_; }

 private:
  char* base_;
  size_t offset_ = 0;
};

struct BlockParts {
  Block* block;
  Warp* warps;
  Fiber* fibers;
  Collective* collectives;
  void** raceLanes;
  char* shared;
  char* snapshot;
  char* stacks;
};

BlockParts carve(Carver& carver, unsigned threads, size_t shared, size_t stackBytes) {
  BlockParts parts{};
  const unsigned warps = (threads + kWarpLanes - 1) / kWarpLanes;
  parts.block = carver.take<Block>(1);
  parts.warps = carver.take<Warp>(warps);
  parts.fibers = carver.take<Fiber>(threads, 64);
  parts.collectives = carver.take<Collective>(warps * kWarpLanes);
  parts.raceLanes = carver.take<void*>(threads);
  carver.take<char>(kGuardBytes, 1024);
  parts.shared = carver.take<char>(roundUp(shared, 1024), 1024);
  carver.take<char>(kGuardBytes, 1024);
  parts.snapshot = carver.take<char>(roundUp(shared, 1024), 1024);
  carver.take<char>(0, kPage);
  carver.take<char>(kPage, kPage);  // below the lowest stack: protected
  parts.stacks = carver.take<char>(threads * stackBytes, kPage);
  return parts;
}

bool intact(const char* canary) {
  for (size_t i = 0; i < kCanaryBytes; ++i) {
    if (static_cast<unsigned char>(canary[i]) != kCanary) return false;
  }
  return true;
}

Block* createBlock(unsigned threads, size_t shared) {
  const size_t stackBytes = roundUp(runtime().config.stackBytes, kPage) *
                            (kAddressSanitizer || kRaceDetector ? kSanitizerStackFactor : 1);
  Carver sizer(nullptr);
  carve(sizer, threads, shared, stackBytes);
  const size_t bytes = roundUp(sizer.offset(), kPage);
  void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) {
    std::fprintf(stderr, "mscclpp: no memory for a kernel block of %u threads (%zu bytes)\n",
                 threads, bytes);
    std::abort();
  }
  Carver carver(static_cast<char*>(memory));
  const BlockParts parts = carve(carver, threads, shared, stackBytes);
  mprotect(parts.stacks - kPage, kPage, PROT_NONE);
  auto* block = new (parts.block) Block;
  block->region = static_cast<char*>(memory);
  block->regionBytes = bytes;
  block->threadCapacity = threads;
  block->sharedCapacity = roundUp(shared, 1024);
  block->warps = parts.warps;
  block->fibers = parts.fibers;
  block->shared = parts.shared;
  block->snapshot = parts.snapshot;
  block->stacks = parts.stacks;
  block->stackBytes = stackBytes;
  block->raceLanes = parts.raceLanes;
  for (unsigned w = 0; w < (threads + kWarpLanes - 1) / kWarpLanes; ++w) {
    auto* warp = new (parts.warps + w) Warp;
    warp->block = block;
    warp->lanes = parts.fibers + w * kWarpLanes;
    warp->collectives = parts.collectives + w * kWarpLanes;
  }
  for (unsigned i = 0; i < threads; ++i) {
    auto* fiber = new (parts.fibers + i) Fiber;
    fiber->block = block;
    fiber->warp = parts.warps + i / kWarpLanes;
    fiber->thread = static_cast<uint16_t>(i);
    fiber->lane = static_cast<uint8_t>(i % kWarpLanes);
    fiber->stackBottom = block->stacks + i * stackBytes;
    fiber->stackSize = stackBytes;
    rawFill(fiber->stackBottom, kCanary, kCanaryBytes);
  }
  return block;
}

void resetThread(Fiber& fiber) {
  fiber.state = ThreadState::ready;
  fiber.wait = WaitKind::none;
  fiber.started = false;
  fiber.timedOut = false;
  fiber.handPolled = false;
  fiber.sinceYield = 0;
  fiber.sameLoads = 0;
  fiber.lastLoad = nullptr;
  fiber.polling = nullptr;
  fiber.polledAt = 0;
  fiber.deadlineNs = 0;
  fiber.nextWaiter = nullptr;
  fiber.bulkGroup = 0;
  fiber.firstStore = fiber.lastStore = nullptr;
}

void prepareShared(Block* block) {
  const size_t bytes = block->sharedBytes;
  unpoison(block->shared, block->sharedCapacity + kGuardBytes);
  rawFill(block->shared - kCanaryBytes, kCanary, kCanaryBytes);
  rawFill(block->shared, kFreshShared, bytes);
  rawFill(block->shared + bytes, kCanary, kCanaryBytes);
  if (runtime().config.checkProxy) rawFill(block->snapshot, kFreshSnapshot, bytes);
  poison(block->shared - kGuardBytes, kGuardBytes);
  poison(block->shared + bytes, block->sharedCapacity + kGuardBytes - bytes);
}

// The thread whose race-detector context a thread has.
unsigned contextOf(RaceContexts contexts, unsigned thread) {
  const unsigned lane = thread % kWarpLanes;
  if (contexts == RaceContexts::lanes) return thread;
  return thread - lane + (contexts == RaceContexts::leaders && lane != 0 ? 1 : 0);
}

void assignRaceContexts(Block* block) {
  if (!kRaceDetector) return;
  for (unsigned i = 0; i < block->threads; ++i) {
    const unsigned slot = contextOf(block->grid->raceContexts, i);
    if (block->raceLanes[slot] == nullptr) block->raceLanes[slot] = raceCreate();
    block->fibers[i].race = block->raceLanes[slot];
  }
}

std::string damage(Block* block) {
  for (unsigned i = 0; i < block->threads; ++i) {
    const Fiber& fiber = block->fibers[i];
    if (!intact(static_cast<const char*>(fiber.stackBottom))) {
      return "stack overflow in " + describeThread(&fiber) + ": " +
             std::to_string(block->stackBytes) +
             " bytes were not enough (RuntimeConfig::stackBytes)\n";
    }
  }
  if (kAddressSanitizer) return {};  // reports it itself, at the access
  const char* end = block->shared + block->sharedBytes;
  if (intact(end) && intact(block->shared - kCanaryBytes)) return {};
  return "rank " + std::to_string(block->grid->stream->rank) + " block " +
         std::to_string(block->index) + " (" + kernelName(block->grid) +
         ") wrote outside its shared memory of " + std::to_string(block->sharedBytes) + " bytes\n";
}

}  // namespace

Block* obtainBlock(StreamState* stream, unsigned index, const LaunchShape& shape) {
  while (stream->blocks.size() <= index) stream->blocks.pushBack(nullptr);
  Block*& slot = stream->blocks[index];
  unsigned threads = shape.threads;
  size_t shared = shape.sharedBytes;
  if (slot != nullptr && (slot->threadCapacity < threads || slot->sharedCapacity < shared)) {
    threads = std::max(threads, slot->threadCapacity);
    shared = std::max(shared, slot->sharedCapacity);
    dropBlock(slot);
    slot = nullptr;
  }
  if (slot == nullptr) slot = createBlock(threads, shared);
  slot->index = index;
  return slot;
}

void dropBlock(Block* block) {
  if (kRaceDetector) {
    for (unsigned i = 0; i < block->threadCapacity; ++i) raceDestroy(block->raceLanes[i]);
    for (void* context : block->raceCopies) raceDestroy(context);
  }
  char* region = block->region;
  const size_t bytes = block->regionBytes;
  unpoison(region, bytes);
  munmap(region, bytes);
}

void dropBlocks(StreamState* stream) {
  for (Block* block : stream->blocks) {
    if (block != nullptr) dropBlock(block);
  }
  stream->blocks.clear();
}

void startBlock(Worker* worker, Block* block) {
  const LaunchShape& shape = block->grid->request.shape;
  block->worker = worker;
  block->threads = shape.threads;
  block->live = block->active = shape.threads;
  block->copies = 0;
  block->frozenUntil = 0;
  block->sharedBytes = shape.sharedBytes;
  for (Barrier& barrier : block->barriers) {
    barrier.arrived = barrier.expected = 0;
    barrier.firstWaiter = barrier.lastWaiter = nullptr;
  }
  std::fill(std::begin(block->mbarrierWaiters), std::end(block->mbarrierWaiters), nullptr);
  prepareShared(block);
  assignRaceContexts(block);
  for (unsigned i = 0; i < block->threads; ++i) resetThread(block->fibers[i]);

  block->previousRunning = nullptr;
  block->nextRunning = worker->firstRunning;
  if (block->nextRunning != nullptr) block->nextRunning->previousRunning = block;
  worker->firstRunning = block;
  worker->readyCount += block->threads;
  ++worker->activity;
  for (unsigned w = 0; w < block->warpCount(); ++w) {
    Warp& warp = block->warps[w];
    const unsigned lanes = std::min(kWarpLanes, block->threads - w * kWarpLanes);
    warp.ready = lanes == kWarpLanes ? ~0u : (1u << lanes) - 1;
    warp.exited = ~warp.ready;
    warp.later = warp.polling = warp.pollRound = 0;
    warp.frozenUntil = 0;
    warp.queued = false;
    warp.liveCollectives = 0;
    for (unsigned i = 0; i < kWarpLanes; ++i) warp.collectives[i].live = false;
    enqueueWarp(worker, &warp);
  }
}

bool endBlock(Worker* worker, Block* block) {
  if (!drainCopies(worker, block)) return false;
  const std::string wrong = damage(block);
  if (!wrong.empty()) {
    raiseRuntimeFailure(wrong);
    return false;
  }
  if (block->previousRunning != nullptr) {
    block->previousRunning->nextRunning = block->nextRunning;
  } else {
    worker->firstRunning = block->nextRunning;
  }
  if (block->nextRunning != nullptr) block->nextRunning->previousRunning = block->previousRunning;
  if (worker->suspect == block) worker->suspect = nullptr;
  Grid* grid = block->grid;
  if (grid->blocksLeft.fetch_sub(1, std::memory_order_acq_rel) == 1) finishGrid(grid);
  return true;
}

}  // namespace detail
}  // namespace cpu
}  // namespace mscclpp::device
