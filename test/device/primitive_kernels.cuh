#pragma once

#include <mscclpp/device/device.hpp>
#include <mscclpp/device/launch.hpp>

/// One small kernel per primitive, for both platforms. primitive_cases.hpp launches them and
/// checks.
namespace mscclpp::test::MSCCLPP_PLATFORM_NS {

using namespace mscclpp::device;  // NOLINT: as kernels do

inline constexpr int kMaxThreads = 256;

struct OutArgs {
  uint32_t* out;
  WaitControl control;
};

__device__ inline unsigned globalThread() {
  return blockIndex() * blockSize() + threadIndex();
}

// ---- indices
struct IndexRow {
  uint32_t thread, block, blockThreads, gridBlocks, lane, warp;
};
__device__ inline void indices(const OutArgs& args) {
  auto* row = reinterpret_cast<IndexRow*>(args.out) + globalThread();
  *row = {threadIndex(), blockIndex(), blockSize(), gridSize(), laneId(), warpId()};
}

// ---- warp collectives: row of 8 words per thread
__device__ inline void shuffles(const OutArgs& args) {
  uint32_t* out = args.out + globalThread() * 8;
  const unsigned lane = laneId();
  out[0] = shuffle(lane * 3, 5);
  out[1] = shuffleXor(lane, 4);
  out[2] = shuffleUp(lane, 3);
  out[3] = static_cast<uint32_t>(shuffle(uint64_t{lane} << 33, 31) >> 33);
  out[4] = floatToBits(shuffle(static_cast<float>(lane), 9));
  const uint32_t* pointer = shuffle(static_cast<const uint32_t*>(args.out + lane), 7);
  out[5] = static_cast<uint32_t>(pointer - args.out);
  // Two halves that diverge, each with its own mask; odd lanes first in program order.
  if ((lane & 1) != 0) {
    out[6] = shuffle(lane, 1, 0xAAAAAAAAu);
    out[7] = shuffleXor(lane, 2, 0xAAAAAAAAu);
  } else {
    out[6] = shuffle(lane, 30, 0x55555555u);
    out[7] = shuffleXor(lane, 2, 0x55555555u);
  }
}

__device__ inline void votes(const OutArgs& args) {
  uint32_t* out = args.out + globalThread() * 8;
  const unsigned lane = laneId();
  out[0] = ballot(lane % 3 == 0);
  out[1] = any(lane == 17) ? 1 : 0;
  out[2] = any(lane == 99) ? 1 : 0;
  out[3] = all(lane < 32) ? 1 : 0;
  out[4] = all(lane != 4) ? 1 : 0;
  if (lane < 8) {
    out[5] = ballot(lane != 2, 0xFFu);
    out[6] = all(lane < 8, 0xFFu) ? 1 : 0;
  } else {
    out[5] = ballot(lane == 9, 0xFFFFFF00u);
    out[6] = any(lane < 8, 0xFFFFFF00u) ? 1 : 0;
  }
  syncWarp();
  out[7] = ballot(true);
}

// Each lane reads what its neighbour wrote; then the other way round.
__device__ inline void syncWarps(const OutArgs& args) {
  uint32_t* shared = &sharedStorage<uint32_t>() + warpId() * 32;
  const unsigned lane = laneId();
  uint32_t sum = 0;
  for (uint32_t round = 0; round < 8; ++round) {
    shared[lane] = round * 100 + lane;
    syncWarp();
    sum += shared[(lane + 1) & 31];
    syncWarp();
  }
  args.out[globalThread()] = sum;
}

// The upper half of each warp returns; collectives of the full mask then need only the lower half.
__device__ inline void exitedLanes(const OutArgs& args) {
  const unsigned lane = laneId();
  if (lane >= 16) return;
  uint32_t* out = args.out + globalThread() * 4;
  out[0] = ballot(true);
  out[1] = shuffle(lane, 15);
  syncWarp();
  out[2] = all(lane < 16) ? 1 : 0;
}

// ---- barriers
__device__ inline void syncBlocks(const OutArgs& args) {
  uint32_t* shared = &sharedStorage<uint32_t>();
  const unsigned thread = threadIndex();
  uint32_t sum = 0;
  for (uint32_t round = 0; round < 8; ++round) {
    shared[thread] = round * 1000 + thread;
    syncBlock();
    sum += shared[(thread + 33) % blockSize()];
    syncBlock();
  }
  args.out[globalThread()] = sum;
}

// The upper half of the block produces, the lower half consumes; barrier 1 = full, 2 = free.
__device__ inline void namedBarriers(const OutArgs& args) {
  uint32_t* shared = &sharedStorage<uint32_t>();
  const auto half = blockSize() / 2;
  const auto everybody = static_cast<int>(blockSize());
  const unsigned thread = threadIndex();
  uint32_t sum = 0;
  for (uint32_t round = 0; round < 6; ++round) {
    if (thread >= half) {
      if (round != 0) syncBarrier(2, everybody);
      shared[thread - half] = round * 1000 + thread;
      arriveBarrier(1, everybody);
    } else {
      syncBarrier(1, everybody);
      sum += shared[(thread + 1) % half];
      if (round != 5) arriveBarrier(2, everybody);
    }
  }
  if (thread < half) syncBarrier(3, static_cast<int>(half));  // a subset of the block
  args.out[globalThread()] = sum;
}

// ---- bits and arithmetic
__device__ inline void bitFunctions(const OutArgs& args) {
  const uint32_t value = args.out[threadIndex() * 8];
  uint32_t* out = args.out + threadIndex() * 8;
  out[1] = static_cast<uint32_t>(popCount(value));
  out[2] = static_cast<uint32_t>(findFirstSet(value));
  out[3] = floatToBits(bitsToFloat(value));
  out[4] = floatToBits(fma(bitsToFloat(0x3F800800u), bitsToFloat(0x3F800800u), -1.0f));
}

// ---- shared memory
struct SharedParts {
  uint32_t first[16];
  alignas(128) uint32_t second[16];
};
__device__ inline void sharedMemory(const OutArgs& args) {
  auto& parts = sharedStorage<SharedParts>();
  char* bytes = sharedBytes(sizeof(SharedParts), 64);
  auto& same = sharedStorage<uint32_t>(sizeof(SharedParts));
  if (threadIndex() == 0) {
    parts.first[3] = 30;
    parts.second[4] = 40;
    same = 50;
    args.out[0] = static_cast<uint32_t>(reinterpret_cast<uintptr_t>(&parts) % 1024);
    args.out[1] = static_cast<uint32_t>(reinterpret_cast<char*>(&same) - bytes);
  }
  syncBlock();
  if (threadIndex() == 33) {
    args.out[2] = parts.first[3] + parts.second[4] + *reinterpret_cast<uint32_t*>(bytes);
  }
}

// ---- atomics
struct AtomicArgs {
  uint32_t* u32;
  int32_t* i32;
  uint64_t* u64;
  int64_t* i64;
  uint32_t* seen;  // one per thread: each value of u32[0] exactly once
};
__device__ inline void atomicAdds(const AtomicArgs& args) {
  args.seen[globalThread()] = fetchAddRelaxed(&args.u32[0], 1);
  fetchAddRelaxed(&args.i32[0], -2);
  fetchAddRelaxed(&args.u64[0], 1ull << 33);
  fetchAddRelaxed(&args.i64[0], -(1ll << 33));
  fetchAddAcqRel(&args.u32[1], 3);
  fetchAddAcqRel(&args.u64[1], 5);
  fetchAddLocalRelaxed(&args.u32[2], 7);
  fetchAddLocalRelaxed(&args.u64[2], 9);
  fetchAddLocalAcqRel(&args.u32[3], 11);
  fetchAddLocalAcqRel(&args.i64[3], -13);
  uint32_t expected = loadRelaxed(&args.u32[4]);
  while (!compareExchangeAcqRel(&args.u32[4], expected, expected + 2)) {
  }
  uint64_t wide = loadRelaxed(&args.u64[4]);
  while (!compareExchangeAcqRel(&args.u64[4], wide, wide + (1ull << 40))) {
  }
}

// Block 0 hands a row to block 1 and gets it back, many times: data by plain stores, flags by
// atomics.
struct MessageArgs {
  uint32_t* data;   // 64 words
  uint32_t* flags;  // [0] to block 1, [1] back
  uint64_t* wide;   // the same with 8-byte flags and device scope
  uint32_t* errors;
  WaitControl control;
};
__device__ inline void messages(const MessageArgs& args) {
  const unsigned thread = threadIndex();
  const uint32_t me = blockIndex();
  for (uint32_t round = 1; round <= 40; ++round) {
    if (me == 0) {
      args.data[thread] = round * 1000 + thread;
      syncBlock();
      if (thread == 0) {
        storeRelease(&args.flags[0], round);
        waitReached(args.control, &args.flags[1], round, {1, 1});
      }
      syncBlock();
    } else {
      if (thread == 0) waitReached(args.control, &args.flags[0], round, {2, 0});
      syncBlock();
      if (args.data[thread] != round * 1000 + thread) fetchAddRelaxed(args.errors, 1);
      syncBlock();
      if (thread == 0) storeRelease(&args.flags[1], round);
    }
  }
  // Device scope, 8 bytes, waitUntil.
  if (me == 0) {
    args.data[thread] = 7 + thread;
    syncBlock();
    if (thread == 0) storeLocalRelease(&args.wide[0], uint64_t{1} << 40);
  } else {
    if (thread == 0) {
      waitUntil(
          args.control, [&] { return loadLocalAcquire(&args.wide[0]) == uint64_t{1} << 40; },
          {3, 0}, &args.wide[0]);
    }
    syncBlock();
    if (args.data[thread] != 7 + thread) fetchAddRelaxed(args.errors, 1);
    if (thread == 0) {
      storeRelaxed(&args.wide[1], loadRelaxed(&args.wide[0]) + loadAcquire(&args.flags[0]));
    }
  }
}

// ---- 16-byte accesses
struct CopyArgs {
  char* out;
  const char* in;
  uint32_t rows;
  uint32_t rowBytes;
  WaitControl control;
};
__device__ inline void vectors(const CopyArgs& args) {
  const unsigned thread = threadIndex();
  const Vec16 plain = load16(args.in + thread * 32);
  const Vec16 streamed = loadStreaming16(args.in + thread * 32 + 16);
  store16(args.out + thread * 32, streamed);
  store16(args.out + thread * 32 + 16, plain);
}

// ---- conversions
struct ConvertArgs {
  const uint32_t* floats;  // bit patterns
  uint32_t count;
  uint16_t* bf16;
  uint8_t* e4m3;
  uint32_t* fromE4m3;  // 256
  uint32_t* fromBf16;  // 65536
};
__device__ inline void conversions(const ConvertArgs& args) {
  const unsigned threads = gridSize() * blockSize();
  for (uint32_t i = globalThread(); i < args.count; i += threads) {
    args.bf16[i] = floatToBf16(bitsToFloat(args.floats[i]));
    args.e4m3[i] = floatToE4m3(bitsToFloat(args.floats[i]));
  }
  for (uint32_t i = globalThread(); i < 256; i += threads) {
    args.fromE4m3[i] = floatToBits(e4m3ToFloat(static_cast<uint8_t>(i)));
  }
  for (uint32_t i = globalThread(); i < 65536; i += threads) {
    args.fromBf16[i] = floatToBits(bf16ToFloat(static_cast<uint16_t>(i)));
  }
}
struct VectorConvertArgs {
  const uint16_t* a;  // 8 per thread
  const uint16_t* b;
  uint32_t* sums;    // float bits, 8 per thread
  uint16_t* narrow;  // of the sums
};
__device__ inline void vectorConversions(const VectorConvertArgs& args) {
  const size_t at = size_t{globalThread()} * 8;
  float sum[8];
  widenBf16(sum, load16(args.a + at));
  addBf16(sum, load16(args.b + at));
  for (int i = 0; i < 8; ++i) args.sums[at + static_cast<size_t>(i)] = floatToBits(sum[i]);
  store16(args.narrow + at, narrowBf16(sum));
}

// ---- waits
struct WaitArgs {
  uint32_t* flag;
  uint32_t epoch;
  uint32_t* results;  // 8
  uint64_t* times;    // 2: nanoseconds of the first and of the second wait
  WaitControl control;
};
/// One thread waits for a flag that nobody raises, then once more.
__device__ inline void waitTwice(const WaitArgs& args) {
  const uint64_t start = nanoseconds();
  args.results[0] = waitReached(args.control, args.flag, args.epoch, {77, 3}) ? 1 : 0;
  const uint64_t middle = nanoseconds();
  args.results[1] = failed(args.control) ? 1 : 0;
  args.results[2] = waitUntil(
                        args.control, [] { return false; }, {78, 4}, args.flag)
                        ? 1
                        : 0;
  args.times[0] = middle - start;
  args.times[1] = nanoseconds() - middle;
  args.results[3] = waitReached(args.control, args.flag, *args.flag, {79, 5}) ? 1 : 0;
}
/// A flag that is ahead of, at, and behind the epoch, also around the wrap.
__device__ inline void waitWraps(const WaitArgs& args) {
  storeRelaxed(args.flag, 5);
  args.results[0] = waitReached(args.control, args.flag, 5, {1, 0}) ? 1 : 0;
  args.results[1] = waitReached(args.control, args.flag, 4, {1, 0}) ? 1 : 0;
  args.results[2] = waitReached(args.control, args.flag, 0xFFFFFFF0u, {1, 0}) ? 1 : 0;
  storeRelaxed(args.flag, 0xFFFFFFFFu);
  args.results[3] = waitReached(args.control, args.flag, 0xFFFFFFFEu, {1, 0}) ? 1 : 0;
  args.results[4] = waitReached(args.control, args.flag, 2, {1, 0}) ? 1 : 0;  // behind: times out
}

}  // namespace mscclpp::test::MSCCLPP_PLATFORM_NS
