#pragma once

#include "device/primitive_kernels.cuh"

/// Kernels that test mbarriers and bulk copies.
namespace mscclpp::test::MSCCLPP_PLATFORM_NS {

// ---- mbarriers and bulk copies: a ring of three stages; warp 0 loads, the others add one to every
// byte, one of them stores.
inline constexpr int kStages = 3;
inline constexpr uint32_t kMaxRow = 512;
struct RingShared {
  alignas(128) char in[kStages][kMaxRow];
  alignas(128) char out[2][kMaxRow];
  Mbarrier full[kStages];
  Mbarrier free[kStages];
};
__device__ inline void ringLoader(const CopyArgs& args, RingShared& shared) {
  for (uint32_t row = blockIndex(), turn = 0; row < args.rows; row += gridSize(), ++turn) {
    const uint32_t stage = turn % kStages;
    const uint32_t lap = turn / kStages;
    waitParity(args.control, &shared.free[stage], (lap & 1) ^ 1, {1, -1});
    arriveExpectBytes(&shared.full[stage], args.rowBytes);
    bulkLoad(shared.in[stage], args.in + size_t{row} * args.rowBytes, args.rowBytes,
             &shared.full[stage]);
  }
}
__device__ inline void ringWorkers(const CopyArgs& args, RingShared& shared) {
  const unsigned thread = threadIndex() - 32;
  const unsigned workers = blockSize() - 32;
  for (uint32_t row = blockIndex(), turn = 0; row < args.rows; row += gridSize(), ++turn) {
    const uint32_t stage = turn % kStages;
    const uint32_t half = turn & 1;
    waitParity(args.control, &shared.full[stage], (turn / kStages) & 1, {2, -1});
    if (thread == 0) bulkWaitRead<1>();  // the other half may still be read
    syncBarrier(1, static_cast<int>(workers));
    for (uint32_t i = thread; i < args.rowBytes; i += workers) {
      shared.out[half][i] = static_cast<char>(shared.in[stage][i] + 1);
    }
    fenceProxyAsyncShared();
    syncWarp();
    if (laneId() == 0) arrive(&shared.free[stage]);
    syncBarrier(1, static_cast<int>(workers));
    if (thread == 0) {
      bulkStore(args.out + size_t{row} * args.rowBytes, shared.out[half], args.rowBytes);
      bulkCommit();
    }
  }
  if (thread == 0) bulkWait<0>();
}
__device__ inline void bulkRing(const CopyArgs& args) {
  auto& shared = sharedStorage<RingShared>();
  if (threadIndex() == 0) {
    for (int i = 0; i < kStages; ++i) {
      initMbarrier(&shared.full[i], 1);
      initMbarrier(&shared.free[i], blockSize() / 32 - 1);
    }
    fenceMbarrierInit();
  }
  syncBlock();
  if (warpId() == 0) {
    if (laneId() == 0) ringLoader(args, shared);
  } else {
    ringWorkers(args, shared);
  }
}

// testParity, phases, and arrivals by every thread.
__device__ inline void mbarrierPhases(const OutArgs& args) {
  auto& barrier = sharedStorage<Mbarrier>();
  if (threadIndex() == 0) {
    initMbarrier(&barrier, blockSize());
    fenceMbarrierInit();
    args.out[0] = testParity(&barrier, 1) ? 1 : 0;  // the phase before the first counts as complete
    args.out[1] = testParity(&barrier, 0) ? 1 : 0;
  }
  syncBlock();
  for (unsigned phase = 0; phase < 5; ++phase) {
    arrive(&barrier);
    waitParity(args.control, &barrier, phase & 1, {4, -1});
    if (threadIndex() == 0) args.out[2 + phase] = testParity(&barrier, phase & 1) ? 1 : 0;
    syncBlock();
  }
}

// Block 0 writes rows with plain stores and raises a flag; block 1 fetches them by bulk loads.
struct ProxyArgs {
  char* rows;
  char* out;
  uint32_t* flag;
  WaitControl control;
};
__device__ inline void bulkLoadOfFreshRows(const ProxyArgs& args) {
  auto& shared = sharedStorage<RingShared>();
  const unsigned thread = threadIndex();
  if (thread == 0) initMbarrier(&shared.full[0], 1);
  fenceMbarrierInit();
  syncBlock();
  for (uint32_t round = 0; round < 8; ++round) {
    char* row = args.rows + round * kMaxRow;
    if (blockIndex() == 0) {
      for (uint32_t i = thread; i < kMaxRow; i += blockSize()) {
        row[i] = static_cast<char>(i * 3 + round);
      }
      syncBlock();
      if (thread == 0) storeRelease(args.flag, round + 1);
      continue;
    }
    if (thread == 0) {
      waitReached(args.control, args.flag, round + 1, {5, 0});
      fenceProxyAsyncGlobal();
      arriveExpectBytes(&shared.full[0], kMaxRow);
      bulkLoad(shared.in[0], row, kMaxRow / 2, &shared.full[0]);
      bulkLoad(shared.in[0] + kMaxRow / 2, row + kMaxRow / 2, kMaxRow / 2, &shared.full[0]);
    }
    waitParity(args.control, &shared.full[0], round & 1, {6, -1});
    for (uint32_t i = thread; i < kMaxRow; i += blockSize()) {
      args.out[round * kMaxRow + i] = shared.in[0][i];
    }
    syncBlock();
  }
}

}  // namespace mscclpp::test::MSCCLPP_PLATFORM_NS
