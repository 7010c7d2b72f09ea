#include <algorithm>
#include <exception>

#include "device_cpu/runtime.hpp"

/// Operations of streams: queued by host threads, moved on by the stream's home worker.
namespace mscclpp::device {
inline namespace cpu {
namespace detail {
namespace {

Worker* homeOf(const StreamState* stream) {
  const Runtime& rt = runtime();
  return rt.workers[stream->home % rt.workerCount];
}

void postAdvance(StreamState* stream) {
  Worker* worker = homeOf(stream);
  {
    WordLock lock(worker->inboxLock);
    stream->nextAdvance = nullptr;
    (worker->lastAdvance == nullptr ? worker->firstAdvance : worker->lastAdvance->nextAdvance) =
        stream;
    worker->lastAdvance = stream;
    worker->inboxFull.store(true, std::memory_order_release);
  }
  worker->signal.raise();
}

void postBlock(Worker* worker, Block* block) {
  {
    WordLock lock(worker->inboxLock);
    block->nextStarting = nullptr;
    (worker->lastStarting == nullptr ? worker->firstStarting : worker->lastStarting->nextStarting) =
        block;
    worker->lastStarting = block;
    worker->inboxFull.store(true, std::memory_order_release);
  }
  worker->signal.raise();
}

// Runtime::lock is held.
void completeEvent(EventRecord& record, const ArenaString& failure) {
  record.timestampNs = nanoseconds();
  record.failure = failure;
  record.done.store(true, std::memory_order_release);
  record.signal.raise();
  StreamState* waiting = record.firstWaiting;
  record.firstWaiting = nullptr;
  while (waiting != nullptr) {
    StreamState* next = waiting->nextWaiting;
    waiting->parked = false;
    if (waiting->first != nullptr) postAdvance(waiting);
    waiting = next;
  }
}

// The stream's queue ran empty. Runtime::lock is held.
void becomeIdle(StreamState* stream) {
  Runtime& rt = runtime();
  stream->busy = false;
  stream->signal.raise();
  if (--rt.busyStreams == 0) rt.idleSignal.raise();
}

void freeOperation(StreamOp* op) {
  if (op->grid != nullptr) {
    arenaRelease(op->grid->args, op->grid->request.argsBytes);
    delete op->grid;
  }
  delete op;
}

// Runtime::lock is held.
void popFirst(StreamState* stream) {
  StreamOp* op = stream->first;
  stream->first = op->next;
  if (stream->first == nullptr) stream->last = nullptr;
  freeOperation(op);
}

// Runs host code of the stream in a race-detector context of the stream's own.
template <class Action>
void inStreamContext(StreamState* stream, Action action) {
  if (!kRaceDetector) {
    action();
    return;
  }
  if (stream->raceHost == nullptr) stream->raceHost = raceCreate();
  void* caller = raceCurrent();
  raceSwitch(stream->raceHost);
  raceAcquire(stream->sync);
  action();
  raceRelease(stream->sync);
  raceSwitch(caller);
}

void startGrid(Worker* worker, StreamState* stream, Grid* grid) {
  Runtime& rt = runtime();
  ++worker->stats.grids;
  const LaunchShape& shape = grid->request.shape;
  // The race detector forgets when it has many more contexts than clock slots.
  const auto most = static_cast<unsigned>(rt.config.raceContexts);
  const unsigned threads = shape.blocks * shape.threads * std::max(1u, rt.busyStreams);
  if (threads / kWarpLanes * 2 > most) {
    grid->raceContexts = RaceContexts::warps;
  } else if (threads > most) {
    grid->raceContexts = RaceContexts::leaders;
  }
  grid->blocksLeft.store(shape.blocks, std::memory_order_relaxed);
  for (unsigned i = 0; i < shape.blocks; ++i) {
    Worker* owner = rt.workers[(i + static_cast<unsigned>(stream->home)) %
                               static_cast<unsigned>(rt.workerCount)];
    Block* block = obtainBlock(stream, i, shape);
    block->grid = grid;
    postBlock(owner, block);
  }
}

void runHostAction(StreamState* stream, StreamOp* op) {
  ArenaString problem;
  inStreamContext(stream, [&] {
    try {
      op->action();
    } catch (const std::exception& error) {
      RaceQuiet quiet;
      problem = error.what();
    } catch (...) {
      problem = "an exception that is no std::exception";
    }
    op->action = nullptr;
  });
  if (!problem.empty()) {
    RaceQuiet quiet;
    raiseRuntimeFailure("a host function of rank " + std::to_string(stream->rank) +
                        " threw: " + problem.c_str() + "\n");
  }
}

// Starts the first operation. True when it is done already.
bool startOperation(Worker* worker, StreamState* stream, StreamOp* op) {
  Runtime& rt = runtime();
  switch (op->kind) {
    case StreamOp::Kind::kernel:
      startGrid(worker, stream, op->grid);
      return false;
    case StreamOp::Kind::host:
      runHostAction(stream, op);
      return !rt.failing.load();
    case StreamOp::Kind::record: {
      inStreamContext(stream, [&] { raceRelease(op->event->sync); });
      WordLock lock(rt.lock);
      completeEvent(*op->event, {});
      return true;
    }
    case StreamOp::Kind::wait: {
      {
        WordLock lock(rt.lock);
        EventRecord& record = *op->event;
        if (!record.done.load(std::memory_order_acquire)) {
          stream->parked = true;
          stream->nextWaiting = record.firstWaiting;
          record.firstWaiting = stream;
          return false;
        }
      }
      inStreamContext(stream, [&] { raceAcquire(op->event->sync); });
      return true;
    }
  }
  return true;
}

}  // namespace

void enqueue(StreamState* stream, std::unique_ptr<StreamOp> op) {
  Runtime& rt = runtime();
  raceRelease(stream->sync);
  {
    WordLock lock(rt.lock);
    if (!stream->failure.empty()) {
      StreamOp* refused = op.release();
      const std::string report(stream->failure.c_str());
      freeOperation(refused);
      throw DeviceError(
          "the stream has failed before (Stream::clearFailure makes it usable again):\n" + report);
    }
    if (!rt.manual) ensureWorkers();
    StreamOp* raw = op.release();
    (stream->last == nullptr ? stream->first : stream->last->next) = raw;
    stream->last = raw;
    if (stream->busy) return;
    stream->busy = true;
    ++rt.busyStreams;
    postAdvance(stream);
  }
  wakeWatchdog();
}

void advanceStream(Worker* worker, StreamState* stream) {
  Runtime& rt = runtime();
  for (;;) {
    if (rt.failing.load(std::memory_order_acquire)) return;
    StreamOp* op = nullptr;
    {
      WordLock lock(rt.lock);
      op = stream->first;
    }
    if (op == nullptr || !startOperation(worker, stream, op)) return;
    WordLock lock(rt.lock);
    popFirst(stream);
    if (stream->first == nullptr) {
      becomeIdle(stream);
      return;
    }
  }
}

void finishGrid(Grid* grid) {
  StreamState* stream = grid->stream;
  inStreamContext(stream, [&] { raceAcquire(stream->doneSync); });
  WordLock lock(runtime().lock);
  popFirst(stream);
  if (stream->first == nullptr) {
    becomeIdle(stream);
  } else {
    postAdvance(stream);
  }
}

void dropOperations(StreamState* stream, const ArenaString& why) {
  if (stream->first == nullptr) return;
  if (stream->parked) {
    StreamState** link = &stream->first->event->firstWaiting;
    while (*link != nullptr && *link != stream) link = &(*link)->nextWaiting;
    if (*link == stream) *link = stream->nextWaiting;
    stream->parked = false;
  }
  while (stream->first != nullptr) {
    if (stream->first->kind == StreamOp::Kind::record) completeEvent(*stream->first->event, why);
    popFirst(stream);
  }
  becomeIdle(stream);
}

void addStream(StreamState* stream) {
  Runtime& rt = runtime();
  WordLock lock(rt.lock);
  stream->nextStream = rt.firstStream;
  if (rt.firstStream != nullptr) rt.firstStream->previousStream = stream;
  rt.firstStream = stream;
}

void removeStream(StreamState* stream) {
  Runtime& rt = runtime();
  WordLock lock(rt.lock);
  (stream->previousStream == nullptr ? rt.firstStream : stream->previousStream->nextStream) =
      stream->nextStream;
  if (stream->nextStream != nullptr) stream->nextStream->previousStream = stream->previousStream;
}

void launchGrid(NativeStream stream, const GridRequest& request) {
  if (stream == nullptr) {
    fail(ErrorCode::invalidArgument, "launch: the stream is null; make one with createStream()");
  }
  const LaunchShape& shape = request.shape;
  const unsigned most = std::min(request.maxThreads, kMaxThreads);
  if (shape.threads == 0 || shape.threads > most) {
    fail(ErrorCode::invalidArgument, "launch: {} threads per block, this kernel takes 1 to {}",
         shape.threads, most);
  }
  if (shape.blocks == 0) fail(ErrorCode::invalidArgument, "launch: 0 blocks, at least 1 is needed");
  if (shape.sharedBytes > kMaxSharedBytes) {
    fail(ErrorCode::invalidArgument, "launch: {} bytes of shared memory per block, at most {}",
         shape.sharedBytes, kMaxSharedBytes);
  }
  auto op = std::make_unique<StreamOp>();
  op->kind = StreamOp::Kind::kernel;
  op->grid = new Grid;
  op->grid->stream = &stream->state();
  op->grid->request = request;
  op->grid->args = arenaAllocate(request.argsBytes);
  rawCopy(op->grid->args, request.args, request.argsBytes);
  enqueue(&stream->state(), std::move(op));
}

}  // namespace detail
}  // namespace cpu
}  // namespace mscclpp::device
