#pragma once

#include <mscclpp/device/device.hpp>
#include <mscclpp/device/launch.hpp>

/// Kernels with a bug planted in each (Bug = true), and the same kernels without it. They check
/// their own data and count what is wrong in Memory::errors. Two ranks, two blocks of 64 threads
/// each.
namespace mscclpp::test::planted {

using namespace mscclpp::device;  // NOLINT: as kernels do

inline constexpr uint32_t kThreads = 64;
inline constexpr uint32_t kBlocks = 2;
inline constexpr uint32_t kRow = 256;  // bytes
inline constexpr uint32_t kRows = 12;

struct Memory {
  uint32_t data[1024];
  uint32_t flags[16];
  uint32_t counter;
  uint32_t errors;
  alignas(16) char rows[kRows * kRow];
  alignas(16) char out[kRows * kRow];
};

struct Args {
  Memory* mine;
  Memory* peer;
  int rank;
  WaitControl control;
};

inline uint32_t slot() {
  return blockIndex() * kThreads + threadIndex();
}
inline void expectWord(const Args& args, uint32_t found, uint32_t expected) {
  if (found != expected) fetchAddRelaxed(&args.mine->errors, 1);
}

// Where each kernel stands in this file: reports must name a line of it.
struct Lines {
  unsigned first;
  unsigned last;
};

// ------------------------------------------------------------------ flags between ranks

enum class Flag { right, relaxed, plain, beforeData, noBarrier, relaxedLoad };

inline constexpr unsigned kFlagFirst = __LINE__;
template <Flag Kind>
void flags(const Args& args) {
  const uint32_t block = blockIndex();
  const uint32_t thread = threadIndex();
  uint32_t* theirs = &args.peer->flags[block];
  if (Kind == Flag::beforeData && thread == 0) storeRelease(theirs, 1);
  args.peer->data[slot()] = slot() + 7;
  if (Kind != Flag::noBarrier && Kind != Flag::beforeData) syncBlock();
  if (thread == 0) {
    if (Kind == Flag::relaxed) storeRelaxed(theirs, 1);
    if (Kind == Flag::plain) *const_cast<volatile uint32_t*>(theirs) = 1;
    if (Kind != Flag::relaxed && Kind != Flag::plain && Kind != Flag::beforeData) {
      storeRelease(theirs, 1);
    }
    const uint32_t* ours = &args.mine->flags[block];
    if (Kind == Flag::relaxedLoad) {
      waitUntil(
          args.control, [&] { return loadRelaxed(ours) == 1; }, {1, 1 - args.rank}, ours);
    } else {
      waitReached(args.control, ours, 1, {1, 1 - args.rank});
    }
  }
  syncBlock();
  expectWord(args, args.mine->data[slot()], slot() + 7);
}
inline constexpr unsigned kFlagLast = __LINE__;

// Rank 1 pulls what rank 0 has made; without the wait it usually comes late enough.
inline constexpr unsigned kPullFirst = __LINE__;
template <bool Bug>
void pull(const Args& args) {
  if (args.rank == 0) {
    args.mine->data[slot()] = slot() + 9;
    syncBlock();
    if (threadIndex() == 0) storeRelease(&args.peer->flags[blockIndex()], 1);
    return;
  }
  for (int i = 0; i < 4; ++i) syncBlock();
  if (!Bug && threadIndex() == 0) {
    waitReached(args.control, &args.mine->flags[blockIndex()], 1, {2, 0});
  }
  syncBlock();
  expectWord(args, args.peer->data[slot()], slot() + 9);
}
inline constexpr unsigned kPullLast = __LINE__;

inline constexpr unsigned kNeverFirst = __LINE__;
template <bool Bug>
void neverRaised(const Args& args) {
  if (threadIndex() == 0) {
    if (!Bug || args.rank == 1) storeRelease(&args.peer->flags[blockIndex()], 3);
    waitReached(args.control, &args.mine->flags[blockIndex()], 3, {4, 1 - args.rank});
  }
  syncBlock();
}
inline constexpr unsigned kNeverLast = __LINE__;

// ------------------------------------------------------------------ inside a warp and a block

enum class Exchange { right, noSyncWarpRaw, noSyncWarpWar, shuffleAsFence };

inline constexpr unsigned kWarpFirst = __LINE__;
template <Exchange Kind>
void warpExchange(const Args& args) {
  uint32_t* shared = &sharedStorage<uint32_t>() + warpId() * 32;
  const unsigned lane = laneId();
  for (uint32_t round = 0; round < 3; ++round) {
    if (Kind == Exchange::shuffleAsFence) {
      // Lane 0 writes, a shuffle "tells" the others. CUDA gives shuffles no memory ordering.
      if (lane == 0) shared[0] = round + 5;
      shuffle(lane, 0);
      expectWord(args, shared[0], round + 5);
      syncWarp();
      continue;
    }
    shared[lane] = round * 100 + lane;
    if (Kind != Exchange::noSyncWarpRaw) syncWarp();
    expectWord(args, shared[(lane + 1) & 31], round * 100 + ((lane + 1) & 31));
    if (Kind != Exchange::noSyncWarpWar) syncWarp();
  }
}
inline constexpr unsigned kWarpLast = __LINE__;

inline constexpr unsigned kBlockFirst = __LINE__;
template <bool Bug>
void blockExchange(const Args& args) {
  uint32_t* shared = &sharedStorage<uint32_t>();
  const uint32_t thread = threadIndex();
  for (uint32_t round = 0; round < 3; ++round) {
    shared[thread] = round * 1000 + thread;
    syncBlock();
    expectWord(args, shared[(thread + 33) % kThreads], round * 1000 + (thread + 33) % kThreads);
    if (!Bug) syncBlock();  // before the next round overwrites it
  }
}
inline constexpr unsigned kBlockLast = __LINE__;

enum class Count { right, plain, split };

inline constexpr unsigned kCountFirst = __LINE__;
template <Count Kind>
void counting(const Args& args) {
  uint32_t* counter = &args.mine->counter;
  if (Kind == Count::plain) *counter += 1;
  if (Kind == Count::split) storeRelaxed(counter, loadRelaxed(counter) + 1);
  if (Kind == Count::right) fetchAddRelaxed(counter, 1);
}
inline constexpr unsigned kCountLast = __LINE__;

// ------------------------------------------------------------------ who takes part

enum class Party {
  right,
  divergentSync,
  earlyExit,
  namedCount,
  namedMismatch,
  absentLane,
  absentSource,
  notInMask,
  different
};

inline constexpr unsigned kPartyFirst = __LINE__;
template <Party Kind>
void parties(const Args&) {
  const unsigned lane = laneId();
  if (Kind == Party::earlyExit && warpId() == 1) return;
  if (Kind == Party::namedCount && warpId() == 0) syncBarrier(1, 64);
  if (Kind == Party::namedMismatch) syncBarrier(1, warpId() == 0 ? 64 : 32);
  if (Kind == Party::absentLane && lane < 16) shuffle(lane, 3);
  if (Kind == Party::absentSource && lane < 16) shuffle(lane, 20, 0xFFFFu);
  if (Kind == Party::notInMask) ballot(true, 0xFFFFu);
  if (Kind == Party::different) {
    if (lane == 0) {
      ballot(true);
    } else {
      shuffle(lane, 1);
    }
  }
  if (Kind != Party::divergentSync || warpId() == 0) syncBlock();
}
inline constexpr unsigned kPartyLast = __LINE__;

// ------------------------------------------------------------------ bulk copies

enum class Ring {
  right,
  noFreeWait,
  noFullWait,
  wrongParity,
  tooFewBytes,
  tooManyBytes,
  stagingReused,
  noProxyFence,
  exitInFlight,
  notInitialised,
  tooManyArrivals,
  unaligned,
  outsideShared
};

inline constexpr uint32_t kStages = 2;
struct RingShared {
  alignas(128) char in[kStages][kRow];
  alignas(128) char out[kRow];
  Mbarrier full[kStages];
  Mbarrier free[kStages];
};

inline constexpr unsigned kRingFirst = __LINE__;
template <Ring Kind>
void ringLoad(const Args& args, RingShared& shared) {
  for (uint32_t row = blockIndex(), turn = 0; row < kRows; row += kBlocks, ++turn) {
    const uint32_t stage = turn % kStages;
    const uint32_t parity = ((turn / kStages) & 1) ^ (Kind == Ring::wrongParity ? 0u : 1u);
    if (Kind != Ring::noFreeWait) waitParity(args.control, &shared.free[stage], parity, {1, -1});
    const uint32_t expected = Kind == Ring::tooFewBytes    ? kRow - 16
                              : Kind == Ring::tooManyBytes ? kRow + 16
                                                           : kRow;
    arriveExpectBytes(&shared.full[stage], expected);
    const uint32_t skew = Kind == Ring::unaligned ? 8 : 0;
    bulkLoad(shared.in[stage], args.mine->rows + row * kRow + skew,
             Kind == Ring::outsideShared ? uint32_t{sizeof(RingShared)} + 16 : kRow,
             &shared.full[stage]);
    if (Kind == Ring::tooManyArrivals) arrive(&shared.full[stage]);
  }
}

template <Ring Kind>
void ringWork(const Args& args, RingShared& shared) {
  const unsigned lane = laneId();
  for (uint32_t row = blockIndex(), turn = 0; row < kRows; row += kBlocks, ++turn) {
    const uint32_t stage = turn % kStages;
    if (Kind != Ring::noFullWait) {
      waitParity(args.control, &shared.full[stage], (turn / kStages) & 1, {2, -1});
    }
    if (Kind != Ring::stagingReused && lane == 0) bulkWaitRead<0>();
    syncWarp();
    for (uint32_t i = lane; i < kRow; i += 32) {
      shared.out[i] = static_cast<char>(shared.in[stage][i] + 1);
    }
    if (Kind != Ring::noProxyFence) fenceProxyAsyncShared();
    syncWarp();
    if (lane == 0) arrive(&shared.free[stage]);
    if (lane == 0) {
      bulkStore(args.mine->out + row * kRow, shared.out, kRow);
      bulkCommit();
    }
  }
  if (lane == 0 && Kind != Ring::exitInFlight) bulkWait<0>();
}

template <Ring Kind>
void ring(const Args& args) {
  auto& shared = sharedStorage<RingShared>();
  if (threadIndex() == 0 && Kind != Ring::notInitialised) {
    for (uint32_t i = 0; i < kStages; ++i) {
      initMbarrier(&shared.full[i], 1);
      initMbarrier(&shared.free[i], 1);
    }
    fenceMbarrierInit();
  }
  syncBlock();
  if (warpId() == 1) {
    ringWork<Kind>(args, shared);
  } else if (laneId() == 0) {
    ringLoad<Kind>(args, shared);
  }
}
inline constexpr unsigned kRingLast = __LINE__;

// The same row twice: the stage holds the right bytes already when the second load is not waited
// for.
inline constexpr unsigned kTwiceFirst = __LINE__;
template <bool Bug>
void loadTwice(const Args& args) {
  auto& shared = sharedStorage<RingShared>();
  if (threadIndex() == 0) initMbarrier(&shared.full[0], 1);
  syncBlock();
  for (unsigned turn = 0; turn < 2; ++turn) {
    if (threadIndex() == 0) {
      arriveExpectBytes(&shared.full[0], kRow);
      bulkLoad(shared.in[0], args.mine->rows, kRow, &shared.full[0]);
    }
    if (turn == 0 || !Bug) waitParity(args.control, &shared.full[0], turn, {3, -1});
    syncBlock();
    const uint32_t at = threadIndex() * 4;
    expectWord(args, *reinterpret_cast<const uint32_t*>(shared.in[0] + at),
               *reinterpret_cast<const uint32_t*>(args.mine->rows + at));
    syncBlock();
  }
  if (Bug) waitParity(args.control, &shared.full[0], 1, {3, -1});
}
inline constexpr unsigned kTwiceLast = __LINE__;

// ------------------------------------------------------------------ memory

enum class Bounds { right, global, shared, padding, bulkGlobal };

inline constexpr unsigned kBoundsFirst = __LINE__;
template <Bounds Kind>
void bounds(const Args& args) {
  auto& shared = sharedStorage<RingShared>();
  char* end = reinterpret_cast<char*>(args.mine) + sizeof(Memory);
  if (threadIndex() != 0 || blockIndex() != 0) return;
  if (Kind == Bounds::global) *reinterpret_cast<volatile uint32_t*>(end) = 1;
  if (Kind == Bounds::shared) {
    *(reinterpret_cast<volatile char*>(&shared) + sizeof(RingShared)) = 1;
  }
  // The test poisons flags[15] as if it were the gap between two parts of a heap.
  if (Kind == Bounds::padding) *const_cast<volatile uint32_t*>(&args.mine->flags[15]) = 1;
  if (Kind == Bounds::bulkGlobal) {
    bulkStore(end - 16, shared.out, 32);
    bulkCommit();
    bulkWait<0>();
  }
}
inline constexpr unsigned kBoundsLast = __LINE__;

template <bool Bug>
[[gnu::noinline]] uint32_t eatStack(int depth) {
  volatile char eaten[1024];
  for (auto& byte : eaten) byte = static_cast<char>(depth);
  return depth == 0 ? eaten[0]
                    : eatStack<Bug>(depth - 1) + static_cast<uint32_t>(eaten[depth % 1024]);
}
template <bool Bug>
void deepStack(const Args& args) {
  // Not the lowest thread of the block: below that one is a page that faults at once.
  if (threadIndex() == 5) args.mine->data[0] = eatStack<Bug>(Bug ? 34 : 4);
}

template <bool Bug>
void volatileSpin(const Args& args) {
  if (blockIndex() == 0 && threadIndex() == 3 && args.rank == 0) {
    volatile uint32_t* flag = &args.mine->flags[0];
    while (Bug && *flag == 0) {
    }
  }
}

inline constexpr unsigned kHandFirst = __LINE__;
template <bool Bug>
void handLoop(const Args& args) {
  if (threadIndex() == 0) {
    if (!Bug) storeRelease(&args.peer->flags[blockIndex()], 1);
    while (loadAcquire(&args.mine->flags[blockIndex()]) == 0) {
    }
  }
  syncBlock();
}
inline constexpr unsigned kHandLast = __LINE__;

}  // namespace mscclpp::test::planted
