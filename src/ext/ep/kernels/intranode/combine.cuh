#pragma once

#include "combine_load.cuh"

/// combine: every token's rows are pulled from the ranks that hold them and added in fp32, ranks in
/// ascending order. A block has Pipes independent pipelines (loader warp, ring, consumer warps), a
/// warp that sums weights, and, when y is staged, planner, mover and releaser warps
/// (combine_move.cuh).
namespace mscclpp::ep::MSCCLPP_PLATFORM_NS {

template <class Shape>
struct CombineHead {
  Mbarrier full[Shape::kPipes][Shape::kStages], empty[Shape::kPipes][Shape::kStages];
  StageInfo info[Shape::kPipes][Shape::kStages];
  Mbarrier moveFull[Shape::kMoveStages + 1];
  MoveQueue move;
  std::uint32_t lastBlock;
};

/// A block's shared memory: head, sources [ranks], ranges [ranks], the pipes' rings, the mover's
/// ring.
template <class Shape>
struct CombineView {
  int ranks;
  std::uint32_t partBytes;

  constexpr std::size_t sourcesAt() const { return alignUp(sizeof(CombineHead<Shape>), 128); }
  constexpr std::size_t rangesAt() const {
    return sourcesAt() + static_cast<std::size_t>(ranks) * sizeof(RowSource);
  }
  constexpr std::size_t ringsAt() const {
    return alignUp(rangesAt() + static_cast<std::size_t>(ranks) * sizeof(RowRange), 128);
  }
  constexpr std::size_t ringBytes() const { return Shape::kStages * std::size_t{partBytes}; }
  constexpr std::size_t moveAt() const { return ringsAt() + Shape::kPipes * ringBytes(); }
  constexpr std::size_t total() const {
    return moveAt() + Shape::kMoveStages * std::size_t{partBytes};
  }
  static constexpr int stages() { return Shape::kPipes * Shape::kStages + Shape::kMoveStages; }
  static constexpr int moveWarps() { return Shape::kMoveStages > 0 ? 3 : 0; }
  static constexpr int warps() { return Shape::kPipes * (kConsumerWarps + 1) + 1 + moveWarps(); }

  __device__ CombineHead<Shape>& head() const { return sharedStorage<CombineHead<Shape>>(); }
  __device__ RowSource* sources() const {
    return reinterpret_cast<RowSource*>(
        sharedBytes(sourcesAt(), static_cast<std::size_t>(ranks) * sizeof(RowSource)));
  }
  __device__ RowRange* ranges() const {
    return reinterpret_cast<RowRange*>(
        sharedBytes(rangesAt(), static_cast<std::size_t>(ranks) * sizeof(RowRange)));
  }
  __device__ RowRing ring(int pipe) const {
    CombineHead<Shape>& h = head();
    return {h.full[pipe], h.empty[pipe], h.info[pipe],
            sharedBytes(ringsAt() + static_cast<std::size_t>(pipe) * ringBytes(), ringBytes())};
  }
};

/// One thread's share of a unit: up to kPiecesPerThread pieces of 8 values, in fp32.
struct Accumulator {
  float value[kPiecesPerThread][8];

  template <class F>
  __device__ __forceinline__ static void forEach(int thread, std::uint32_t bytes, F&& f) {
    const int pieces = static_cast<int>(bytes / 16);
#pragma unroll
    for (int u = 0; u < kPiecesPerThread; ++u) {
      const int piece = thread + u * kConsumerWarps * 32;
      if (piece < pieces) f(u, static_cast<std::size_t>(piece) * 16);
    }
  }
};

/// A pipe's consumer warps: add a unit's rows as they arrive, give each stage back at once, store.
template <class Shape>
struct RowReducer {
  const CombineArgs& a;
  RowRing ring;
  int thread;  ///< within the pipe's consumers
  int stage = 0;
  unsigned phase = 0;

  __device__ void next() {
    if (++stage == Shape::kStages) {
      stage = 0;
      phase ^= 1u;
    }
  }
  __device__ void await() {
    waitParity(a.group.wait, &ring.full[stage], phase, pipelineWait(a.group));
  }
  __device__ void giveBack() {
    syncWarp();
    if (laneId() == 0) arrive(&ring.empty[stage]);
    next();
  }
  /// The sum's first term: biases where there are any. True if there was one.
  __device__ bool addBiases(Accumulator& sum, const StageInfo& info) {
    const std::size_t at = static_cast<std::size_t>(info.token) * a.rowBytes + info.offset;
    if (a.bias0 == nullptr) return false;
    Accumulator::forEach(thread, info.bytes, [&](int u, std::size_t piece) {
      widenBf16(sum.value[u], loadStreaming16(a.bias0 + at + piece));
      if (a.bias1) addBf16(sum.value[u], loadStreaming16(a.bias1 + at + piece));
    });
    return true;
  }
  __device__ void reduceUnit(const StageInfo& info) {
    Accumulator sum{};
    bool started = addBiases(sum, info);
    if (info.rows == 0) giveBack();
    for (int j = 0; j < info.rows; ++j) {
      if (j > 0) await();
      const char* row = ring.stages + static_cast<std::size_t>(stage) * a.partBytes;
      if (started) {
        Accumulator::forEach(thread, info.bytes, [&](int u, std::size_t piece) {
          addBf16(sum.value[u], load16(row + piece));
        });
      } else {
        Accumulator::forEach(thread, info.bytes, [&](int u, std::size_t piece) {
          widenBf16(sum.value[u], load16(row + piece));
        });
      }
      started = true;
      giveBack();
    }
    char* out = a.out + static_cast<std::size_t>(info.token) * a.rowBytes + info.offset;
    Accumulator::forEach(thread, info.bytes, [&](int u, std::size_t piece) {
      store16(out + piece, narrowBf16(sum.value[u]));
    });
  }
  __device__ void run() {
    while (true) {
      await();
      const StageInfo info = ring.info[stage];
      if (info.token < 0) return;
      reduceUnit(info);
    }
  }
};

/// Sums the weights of every (token, choice) over the ranks that got the token.
__device__ inline void sumWeights(const CombineArgs& a, const RowSource* sources) {
  const std::int64_t end =
      static_cast<std::int64_t>(a.tokens < a.tokenEnd ? a.tokens : a.tokenEnd) * a.topk;
  const std::int64_t begin = static_cast<std::int64_t>(a.tokenBegin) * a.topk;
  const std::int64_t stride = static_cast<std::int64_t>(gridSize()) * 32;
  for (std::int64_t i = begin + blockIndex() * 32 + laneId(); i < end; i += stride) {
    const int token = static_cast<int>(i / a.topk), k = static_cast<int>(i % a.topk);
    float sum = 0.0f;
    for (int r = 0; r < a.group.ranks; ++r) {
      const std::int32_t position = a.position[static_cast<std::size_t>(token) * a.group.ranks + r];
      const RowSource& source = sources[r];
      if (position < 0 || source.rows == nullptr) continue;
      sum += source.weights[(source.start + position - source.weightsBegin) * a.topk + k];
    }
    a.outWeights[i] = sum;
  }
}

template <class Shape>
__device__ void initRings(CombineHead<Shape>& head) {
  for (int p = 0; p < Shape::kPipes; ++p) {
    for (int s = 0; s < Shape::kStages; ++s) {
      initMbarrier(&head.full[p][s], 1);
      initMbarrier(&head.empty[p][s], kConsumerWarps);
    }
  }
  for (int s = 0; s < Shape::kMoveStages; ++s) initMbarrier(&head.moveFull[s], 1);
  for (int s = 0; s < kMoveQueue; ++s) {
    initMbarrier(&head.move.ready[s], 1);
    initMbarrier(&head.move.moved[s], 1);
    initMbarrier(&head.move.freed[s], 1);
  }
  fenceMbarrierInit();
}

/// Planner, mover or releaser, one thread each.
template <class Shape>
__device__ void moveRows(const CombineArgs& a, const CombineView<Shape>& v, int role,
                         std::uint32_t epoch) {
  CombineHead<Shape>& head = v.head();
  if (laneId() != 0 || a.group.ranks == 1) return;
  if (role == 0) {
    planMoves(a, head.move, v.ranges());
  } else if (role == 1) {
    char* ring = sharedBytes(v.moveAt(), Shape::kMoveStages * std::size_t{v.partBytes});
    moveChunks<Shape>(a, head.move, head.moveFull, ring);
  } else {
    releaseChunks(a, head.move, epoch);
  }
}

template <class Shape>
__device__ void combineKernel(const CombineArgs& a) {
  const CombineView<Shape> v{a.group.ranks, a.partBytes};
  CombineHead<Shape>& head = v.head();
  const Turn turn = currentTurn(a.group);
  const int thread = static_cast<int>(threadIndex()), threads = static_cast<int>(blockSize());
  if (thread == 0) initRings<Shape>(head);
  for (int d = thread; d < a.group.ranks - 1; d += threads) {
    v.ranges()[d] = rowsOfWave(a, stagedRank(a.group, d));
  }
  syncBlock();
  if (blockIndex() == 0 && !turn.broken) {
    for (int r = thread; r < a.group.ranks; r += threads) publishRows(a, r, v.ranges(), turn.epoch);
  }
  for (int r = thread; r < a.group.ranks; r += threads) v.sources()[r] = awaitRows(a, r, turn);
  syncBlock();

  constexpr int kConsumers = Shape::kPipes * kConsumerWarps;
  const int warp = static_cast<int>(warpId());
  if (warp < kConsumers) {
    const int pipe = warp / kConsumerWarps;
    RowReducer<Shape>{a, v.ring(pipe), thread - pipe * kConsumerWarps * 32}.run();
  } else if (warp < kConsumers + Shape::kPipes) {
    const int pipe = warp - kConsumers;
    RowLoader<Shape>{a, v.sources(), v.ring(pipe), turn.epoch}.run(pipe);
  } else if (warp == kConsumers + Shape::kPipes) {
    if (a.outWeights) sumWeights(a, v.sources());
  } else if constexpr (Shape::kMoveStages > 0) {
    if (!turn.broken) moveRows(a, v, warp - kConsumers - Shape::kPipes - 1, turn.epoch);
  }
  leaveGroup(a.group, turn, WaitWhat::combineDone, head.lastBlock);
}

}  // namespace mscclpp::ep::MSCCLPP_PLATFORM_NS
