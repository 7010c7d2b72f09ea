#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>

#include "device_cpu/arena.hpp"
#include "device_cpu/context.hpp"
#include "device_cpu/sync.hpp"
#include "mscclpp/device/cpu/primitives.hpp"
#include "mscclpp/device/cpu/runtime.hpp"

/// The data of the runtime: threads (fibers), warps, blocks, grids, workers, streams.
///
/// A block and everything in it belongs to one worker, i.e. one OS thread: its state is plain data.
/// What workers and host threads share (queues of streams, failures) is behind Runtime::lock.
namespace mscclpp::device {
inline namespace cpu {
namespace detail {

inline constexpr unsigned kWarpLanes = 32;
inline constexpr unsigned kMaxThreads = 1024;
inline constexpr size_t kMaxSharedBytes = 232448;  // 227 KB, what Hopper gives a block
inline constexpr int kBarriers = 16;
inline constexpr unsigned kRaceCopyContexts = 4;
inline constexpr unsigned kMbarrierBuckets = 16;
inline constexpr unsigned kRankSlots = 64;

struct Warp;
struct Block;
struct Grid;
struct Worker;
struct BulkOp;

enum class ThreadState : uint8_t { idle, ready, running, polling, blocked, done };
enum class WaitKind : uint8_t { none, shuffle, ballot, syncWarp, barrier, mbarrier, bulkGroup };

/// One kernel thread.
struct Fiber : Context {
  Block* block = nullptr;
  Warp* warp = nullptr;
  uint16_t thread = 0;
  uint8_t lane = 0;
  ThreadState state = ThreadState::idle;
  WaitKind wait = WaitKind::none;  // while Blocked
  bool started = false;            // in this launch
  bool timedOut = false;
  bool bulkReadOnly = false;  // BulkGroup: only the reads matter
  bool handPolled = false;    // came out of handPolling, nothing changed by it since
  uint16_t sinceYield = 0;    // primitives called without giving way
  uint16_t sameLoads = 0;     // consecutive atomic loads of lastLoad
  const void* lastLoad = nullptr;
  const void* address = nullptr;  // Barrier: its state; Mbarrier: the mbarrier; collectives: theirs
  Polling* polling = nullptr;     // inside a wait that polls
  Polling handPolling;            // for loops that poll without one
  Site site;                      // of the wait while Blocked
  uint64_t polledAt = 0;          // Worker::activity when the condition was last seen false
  uint64_t deadlineNs = 0;        // Mbarrier: 0 = none
  Fiber* nextWaiter = nullptr;    // of the same barrier or mbarrier bucket
  Fiber* nextTimed = nullptr;     // with a deadline
  Fiber* previousTimed = nullptr;
  uint32_t bulkGroup = 0;        // the open group
  uint32_t bulkTarget = 0;       // BulkGroup: groups below this one must be done
  BulkOp* firstStore = nullptr;  // in order of issue
  BulkOp* lastStore = nullptr;
  char issueSync[8] = {};  // race detector: what the thread did before it issued a copy
  char bulkSync[8] = {};   // race detector: what finished stores of this thread did
};

/// One call of a warp collective. It lives until the last lane has read its result.
struct Collective {
  uint64_t values[kWarpLanes];
  uint32_t mask = 0;
  uint32_t arrived = 0;
  uint32_t toRead = 0;
  CollectiveOp op = CollectiveOp::sync;
  bool live = false;
  bool complete = false;
};

struct Warp {
  Block* block = nullptr;
  Fiber* lanes = nullptr;
  Collective* collectives = nullptr;  // one per lane is enough: each holds at least one lane
  uint32_t ready = 0;
  uint32_t later = 0;  // ready, but not before the next visit
  uint32_t polling = 0;
  uint32_t pollRound = 0;  // of `polling`: still to be polled in this visit
  uint32_t exited = 0;
  unsigned liveCollectives = 0;
  bool queued = false;
  uint64_t frozenUntil = 0;
};

struct Barrier {
  unsigned arrived = 0;
  unsigned expected = 0;
  uint32_t generation = 0;
  Fiber* firstWaiter = nullptr;
  Fiber* lastWaiter = nullptr;
  // Race detector: alternates by generation, else a fast thread's next arrival would order itself
  // before a slow waiter's return.
  char sync[2][8] = {};
};

/// A block's memory is kept by its stream and used again by the next launch with the same index.
struct Block {
  Grid* grid = nullptr;
  Worker* worker = nullptr;
  Block* nextStarting = nullptr;
  Block* nextRunning = nullptr;
  Block* previousRunning = nullptr;
  unsigned index = 0;
  unsigned threads = 0;
  unsigned live = 0;    // threads that have not returned
  unsigned active = 0;  // of these, not Blocked
  unsigned copies = 0;  // bulk copies in flight
  uint64_t frozenUntil = 0;
  Fiber* fibers = nullptr;
  Warp* warps = nullptr;
  char* shared = nullptr;
  char* snapshot = nullptr;  // shared memory as bulk stores see it
  size_t sharedBytes = 0;
  Barrier barriers[kBarriers];
  Fiber* mbarrierWaiters[kMbarrierBuckets] = {};
  void* raceCopies[kRaceCopyContexts] = {};
  unsigned nextRaceCopy = 0;

  char* region = nullptr;  // the mapping that holds all of it
  size_t regionBytes = 0;
  unsigned threadCapacity = 0;
  size_t sharedCapacity = 0;
  char* stacks = nullptr;
  size_t stackBytes = 0;
  void** raceLanes = nullptr;  // race detector contexts, made when first needed

  unsigned warpCount() const { return (threads + kWarpLanes - 1) / kWarpLanes; }
};

/// Whom the race detector tells apart. A warp's lane 0 and its other lanes are two contexts at
/// little cost, and most work within warps is handed over between those.
enum class RaceContexts : uint8_t { lanes, leaders, warps };

/// One launch.
struct Grid : ArenaObject {
  StreamState* stream = nullptr;
  GridRequest request{};
  void* args = nullptr;  // in the arena
  std::atomic<unsigned> blocksLeft{0};
  RaceContexts raceContexts = RaceContexts::lanes;
};

struct BulkOp {
  bool load;
  bool read;  // the source has been read into data()
  char* to;
  const char* from;
  uint32_t bytes;
  uint32_t group;
  uint64_t dueWrite;
  void* barrier;
  Fiber* fiber;
  Block* block;
  BulkOp* next;  // of the same thread
  BulkOp* previous;
  void* race;
  Site site;
  char* data() { return reinterpret_cast<char*>(this) + sizeof(BulkOp); }
};

struct DueCopy {
  uint64_t due;
  uint64_t sequence;
  BulkOp* op;
};

/// Why a kernel thread cannot go on; turned into a report on the worker's own stack.
struct PendingFailure {
  const char* what = nullptr;
  const void* address = nullptr;
  Site site;
  Fiber* fiber = nullptr;
};

struct Worker : ArenaObject {
  explicit Worker(int number) : id(number) {}
  int id;
  Context main;
  Fiber* current = nullptr;
  Warp* visiting = nullptr;
  ArenaRing<Warp*> queue;      // warps with something to run or to poll
  ArenaArray<DueCopy> copies;  // heap, earliest first
  uint64_t copySequence = 0;
  uint64_t step = 0;
  uint64_t random = 1;
  uint64_t activity = 1;     // grows whenever anything but a failed poll happens
  uint64_t polledStamp = 0;  // the activity that polledCount belongs to
  unsigned polledCount = 0;  // polling threads whose condition was false at that activity
  unsigned readyCount = 0;
  unsigned pollingCount = 0;
  unsigned idleRounds = 0;
  uint64_t visits = 0;
  Fiber* firstTimed = nullptr;
  Block* firstRunning = nullptr;
  Block* suspect = nullptr;  // may have nobody left who can run
  uint64_t rankFrozenUntil[kRankSlots] = {};
  uint64_t anyRankFrozenUntil = 0;
  PendingFailure pending;
  RuntimeStats stats;
  bool abandoned = false;  // this worker has let go of its blocks after a failure

  uint32_t inboxLock = 0;
  std::atomic<bool> inboxFull{false};
  Block* firstStarting = nullptr;  // blocks to start
  Block* lastStarting = nullptr;
  StreamState* firstAdvance = nullptr;  // streams whose next operation may start
  StreamState* lastAdvance = nullptr;
  Signal signal;
};

/// What an Event::record captured.
class EventRecord {
 public:
  std::atomic<bool> done{false};
  uint64_t timestampNs = 0;
  ArenaString failure;  // valid when done
  Signal signal;
  StreamState* firstWaiting = nullptr;  // streams parked on it (Runtime::lock)
  char sync[8] = {};
};

struct StreamOp : ArenaObject {
  enum class Kind : uint8_t { kernel, host, record, wait };
  Kind kind;
  StreamOp* next = nullptr;
  Grid* grid = nullptr;
  std::function<void()> action;
  std::shared_ptr<EventRecord> event;
};

struct StreamState : ArenaObject {
  int rank = 0;
  int home = 0;  // the worker that moves the stream on
  // Runtime::lock guards these.
  StreamOp* first = nullptr;
  StreamOp* last = nullptr;
  bool busy = false;    // the first operation is under way, or the stream is in an inbox
  bool parked = false;  // the first operation waits for an event
  ArenaString failure;
  StreamState* nextWaiting = nullptr;  // on an event
  StreamState* nextAdvance = nullptr;  // in a worker's inbox
  StreamState* nextStream = nullptr;   // of all streams
  StreamState* previousStream = nullptr;
  Signal signal;  // raised when the stream falls idle
  // The home worker's.
  ArenaArray<Block*> blocks;  // kept for the next launch, by index
  void* raceHost = nullptr;   // race detector: context of host functions and events
  char sync[8] = {};          // race detector: what happened before the running operation
  char doneSync[8] = {};  // race detector: what threads that ended did; joins sync with the grid
};

}  // namespace detail
}  // namespace cpu
}  // namespace mscclpp::device
