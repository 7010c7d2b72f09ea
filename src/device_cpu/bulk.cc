#include <algorithm>

#include "device_cpu/runtime.hpp"

/// Bulk asynchronous copies. A copy reads its source and writes its destination at two later
/// moments, both drawn at random, so copies finish late and out of order. Until then a load's
/// destination holds poison. With checkProxy, stores read shared memory as it was at the last
/// fenceProxyAsyncShared().
namespace mscclpp::device {
inline namespace cpu {
namespace detail {
namespace {

constexpr int kPoison = 0xDB;
constexpr uint64_t kLongTail = 64;  // one copy in eight is that many times later

bool earlier(const DueCopy& a, const DueCopy& b) {
  return a.due != b.due ? a.due > b.due
                        : a.sequence > b.sequence;  // for a heap with the least on top
}

void schedule(Worker* worker, BulkOp* op, uint64_t due) {
  RaceQuiet quiet;
  worker->copies.pushBack({due, worker->copySequence++, op});
  std::push_heap(worker->copies.begin(), worker->copies.end(), earlier);
}

// Runs `action` in the copy's own race-detector context, so that a missing wait is a race even when
// the data came out right.
template <class Action>
void inCopyContext(const BulkOp* op, Action action) {
  if (!kRaceDetector) {
    action();
    return;
  }
  void* caller = raceCurrent();
  raceSwitch(op->race);
  action();
  raceSwitch(caller);
}

bool storesDone(const Fiber* fiber) {
  for (const BulkOp* op = fiber->firstStore; op != nullptr; op = op->next) {
    // Group numbers wrap: compare their distance.
    if (static_cast<int32_t>(op->group - fiber->bulkTarget) >= 0) continue;
    if (!(fiber->bulkReadOnly && op->read)) return false;
  }
  return true;
}

void wakeStoreWaiter(Fiber* fiber) {
  if (fiber->state == ThreadState::blocked && fiber->wait == WaitKind::bulkGroup &&
      storesDone(fiber)) {
    wake(fiber);
  }
}

void readSource(BulkOp* op) {
  Block* block = op->block;
  const char* from = op->from;
  if (!op->load && runtime().config.checkProxy) from = block->snapshot + (op->from - block->shared);
  inCopyContext(op, [&] {
    rawCopy(op->data(), from, op->bytes);
    raceRead(op->from, op->bytes);
    if (!op->load) raceRelease(op->fiber->bulkSync);
  });
  op->read = true;
}

void writeDestination(BulkOp* op) {
  Block* block = op->block;
  inCopyContext(op, [&] {
    rawCopy(op->to, op->data(), op->bytes);
    raceWrite(op->to, op->bytes);
    if (op->load) {
      if (runtime().config.checkProxy) {
        rawCopy(block->snapshot + (op->to - block->shared), op->data(), op->bytes);
      }
    } else {
      raceRelease(op->fiber->bulkSync);
    }
  });
}

void unlinkStore(BulkOp* op) {
  Fiber* fiber = op->fiber;
  (op->previous == nullptr ? fiber->firstStore : op->previous->next) = op->next;
  (op->next == nullptr ? fiber->lastStore : op->next->previous) = op->previous;
}

// The copy is complete: tell who waits, and free it.
void finishCopy(Worker* worker, BulkOp* op) {
  Block* block = op->block;
  ++worker->activity;
  --block->copies;
  if (op->load) {
    inCopyContext(op, [&] { mbarrierCompleteBytes(block, op->barrier, op->bytes); });
  } else {
    unlinkStore(op);
    wakeStoreWaiter(op->fiber);
  }
  if (block->copies == 0 && block->active == 0 && block->live != 0) worker->suspect = block;
  arenaRelease(op, sizeof(BulkOp) + op->bytes);
}

void advanceCopy(Worker* worker, BulkOp* op) {
  if (!op->read) {
    readSource(op);
    ++worker->activity;
    if (!op->load) wakeStoreWaiter(op->fiber);
    if (worker->step < op->dueWrite) {
      schedule(worker, op, op->dueWrite);
      return;
    }
  }
  writeDestination(op);
  finishCopy(worker, op);
}

void checkCopy(const Block* block, const void* shared, const void* global, uint32_t bytes,
               const Site& site) {
  if (((reinterpret_cast<uintptr_t>(shared) | reinterpret_cast<uintptr_t>(global) | bytes) & 15u) !=
      0) {
    failFiber("bulk copy: an address or the size is not a multiple of 16", global, site);
  }
  const char* place = static_cast<const char*>(shared);
  if (place < block->shared || place + bytes > block->shared + block->sharedBytes) {
    failFiber("bulk copy: the shared side is outside the block's shared memory", shared, site);
  }
  if (const void* bad = firstPoisoned(global, bytes)) {
    failFiber("bulk copy: the global side touches poisoned memory (AddressSanitizer)", bad, site);
  }
}

void* copyContext(Block* block) {
  if (!kRaceDetector) return nullptr;
  void*& context = block->raceCopies[block->nextRaceCopy++ % kRaceCopyContexts];
  if (context == nullptr) {
    // Made in the scheduler's context, which knows nothing of what kernels did.
    void* caller = raceCurrent();
    raceSwitch(block->worker->main.race);
    context = raceCreate();
    raceSwitch(caller);
  }
  return context;
}

struct CopyRequest {
  bool load;
  char* to;
  const char* from;
  uint32_t bytes;
  void* barrier;
};

void issue(Worker* worker, const CopyRequest& request, const Site& site) {
  Fiber* fiber = worker->current;
  Block* block = fiber->block;
  ++worker->stats.bulkCopies;
  void* memory = arenaAllocate(sizeof(BulkOp) + request.bytes);
  auto* op = new (memory) BulkOp{
      request.load,    false, request.to, request.from, request.bytes, fiber->bulkGroup,   0,
      request.barrier, fiber, block,      nullptr,      nullptr,       copyContext(block), site};
  if (!request.load) {
    op->previous = fiber->lastStore;
    (op->previous == nullptr ? fiber->firstStore : op->previous->next) = op;
    fiber->lastStore = op;
  }
  raceRelease(fiber->issueSync);
  inCopyContext(op, [&] { raceAcquire(fiber->issueSync); });
  ++block->copies;
  auto delay = static_cast<uint64_t>(runtime().config.bulkMaxDelay);
  if (delay == 0) {
    advanceCopy(worker, op);
    return;
  }
  if (randomNumber(worker) % 8 == 0) delay *= kLongTail;
  if (request.load) rawFill(request.to, kPoison, request.bytes);
  const uint64_t dueRead = worker->step + 1 + randomNumber(worker) % delay;
  op->dueWrite = dueRead + randomNumber(worker) % delay;
  schedule(worker, op, dueRead);
}

}  // namespace

void bulkLoad(void* shared, const void* global, uint32_t bytes, void* barrier, const Site& site) {
  beforeAtomicUpdate();
  Worker* worker = currentWorker();
  checkCopy(worker->current->block, shared, global, bytes, site);
  if (!mbarrierReady(barrier))
    failFiber("bulkLoad: the mbarrier is not initialised", barrier, site);
  issue(worker,
        {true, static_cast<char*>(shared), static_cast<const char*>(global), bytes, barrier}, site);
}

void bulkStore(void* global, const void* shared, uint32_t bytes, const Site& site) {
  beforeAtomicUpdate();
  Worker* worker = currentWorker();
  checkCopy(worker->current->block, shared, global, bytes, site);
  issue(worker,
        {false, static_cast<char*>(global), static_cast<const char*>(shared), bytes, nullptr},
        site);
}

void bulkCommit() {
  ++currentFiber()->bulkGroup;
}

void bulkWait(int groupsInFlight, bool readOnly, const Site& site) {
  beforeAtomicUpdate();
  Worker* worker = currentWorker();
  Fiber* fiber = worker->current;
  fiber->bulkTarget = fiber->bulkGroup - static_cast<uint32_t>(groupsInFlight);
  fiber->bulkReadOnly = readOnly;
  if (!storesDone(fiber)) block(worker, fiber, WaitKind::bulkGroup, site);
  raceAcquire(fiber->bulkSync);
}

void fenceProxyAsyncShared() {
  const Block* block = currentFiber()->block;
  if (runtime().config.checkProxy) rawCopy(block->snapshot, block->shared, block->sharedBytes);
}

void runDueCopies(Worker* worker) {
  while (!worker->copies.empty() && worker->copies[0].due <= worker->step) {
    std::pop_heap(worker->copies.begin(), worker->copies.end(), earlier);
    BulkOp* op = worker->copies.back().op;
    worker->copies.popBack();
    advanceCopy(worker, op);
    if (worker->suspect != nullptr) return;  // looked at before anything else happens
  }
}

bool drainCopies(Worker* worker, Block* block) {
  if (block->copies == 0) return true;
  for (const DueCopy& copy : worker->copies) {
    const BulkOp* op = copy.op;
    if (op->block != block || (!op->load && op->read)) continue;
    raiseRuntimeFailure(std::string("exit with a bulk ") + (op->load ? "load" : "store") +
                        " in flight that still uses shared memory: " + describeThread(op->fiber) +
                        " issued it at " + describeSite(op->site) + "\n");
    return false;
  }
  // What is left only writes global memory: done before the kernel counts as finished.
  for (size_t i = 0; i < worker->copies.size();) {
    BulkOp* op = worker->copies[i].op;
    if (op->block != block) {
      ++i;
      continue;
    }
    worker->copies[i] = worker->copies.back();
    worker->copies.popBack();
    writeDestination(op);
    inCopyContext(op, [&] { raceRelease(block->grid->stream->doneSync); });
    finishCopy(worker, op);
  }
  std::make_heap(worker->copies.begin(), worker->copies.end(), earlier);
  return true;
}

void abandonCopies(Worker* worker) {
  for (const DueCopy& copy : worker->copies) {
    arenaRelease(copy.op, sizeof(BulkOp) + copy.op->bytes);
  }
  worker->copies.clear();
}

}  // namespace detail
}  // namespace cpu
}  // namespace mscclpp::device
