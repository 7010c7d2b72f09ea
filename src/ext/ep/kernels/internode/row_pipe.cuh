#pragma once

#include "../intranode/tuning.cuh"
#include "rails.cuh"

/// How the kernels between nodes move rows. A warp makes a list of jobs, a lane each, and then runs
/// them all through a ring of stages in shared memory: bulk loads are under way several parts
/// before their use, so that the few warps that serve a flow keep enough bytes in flight.
namespace mscclpp::ep::MSCCLPP_PLATFORM_NS {

inline constexpr int kPipeStages = 7;
inline constexpr int kPipeAhead = 4;  ///< of copies; their stores need the other stages
/// Of a warp, for jobs; with many terms there are fewer than 32 of them at a time.
inline constexpr std::size_t kJobBytes = 3072;

/// A row to write: the sum of its terms in their order in fp32, rounded once, or a copy when there
/// is one, or +0 when there is none.
struct RowJob {
  char* to;
  std::int32_t tag;     ///< for its maker
  std::uint16_t terms;  ///< addresses that follow
  std::uint16_t maker;  ///< for its maker, too
};

/// The jobs in a warp's hand.
struct RowJobs {
  char* memory;
  int terms;  ///< most of a job

  static constexpr std::size_t bytes(int terms) {
    return sizeof(RowJob) + static_cast<std::size_t>(terms) * sizeof(const char*);
  }
  __device__ RowJob& operator[](int i) const {
    return *reinterpret_cast<RowJob*>(memory + static_cast<std::size_t>(i) * bytes(terms));
  }
  __device__ const char*& term(int i, int at) const {
    return reinterpret_cast<const char**>(&(*this)[i] + 1)[at];
  }
  /// One more term of job `i`.
  __device__ void append(int i, const char* row) const { term(i, (*this)[i].terms++) = row; }
};

/// Where the warps of a block have their jobs, barriers and stages: behind `before` bytes of other
/// shared memory.
struct PipeLayout {
  std::size_t before;
  int warps;
  int terms;  ///< most of a job

  /// Jobs that fit.
  constexpr int jobs() const {
    const auto fit = static_cast<int>(kJobBytes / RowJobs::bytes(terms));
    return fit < 1 ? 1 : fit < 32 ? fit : 32;
  }
  constexpr std::size_t jobsBytes() const {
    return static_cast<std::size_t>(jobs()) * RowJobs::bytes(terms);
  }
  constexpr std::size_t jobsAt(int warp) const {
    return alignUp(before, 128) + static_cast<std::size_t>(warp) * jobsBytes();
  }
  constexpr std::size_t barriersAt(int warp) const {
    return jobsAt(warps) + static_cast<std::size_t>(warp) * kPipeStages * sizeof(Mbarrier);
  }
  constexpr std::size_t stagesAt() const { return alignUp(barriersAt(warps), 128); }
  /// Whether there is room for stages of a usable size.
  constexpr bool fits() const {
    constexpr std::size_t kLeastPart = 512;
    return stagesAt() + static_cast<std::size_t>(warps) * ringBytes(kLeastPart) <= kSharedBytes;
  }
  /// A lane holds kRailUnroll pieces of 16 bytes of a part.
  constexpr std::uint32_t part(std::uint32_t rowBytes) const {
    return partBytes(rowBytes, kPipeStages * warps, stagesAt(), kRailUnroll * 512);
  }
  constexpr std::size_t ringBytes(std::uint32_t part) const {
    return kPipeStages * std::size_t{part};
  }
  constexpr std::size_t total(std::uint32_t part) const {
    return stagesAt() + static_cast<std::size_t>(warps) * ringBytes(part);
  }
};

/// A lane's share of a part, in fp32.
struct PartSum {
  float value[kRailUnroll][8];

  template <class F>
  __device__ __forceinline__ static void forEach(std::uint32_t bytes, F&& f) {
    const auto first = static_cast<std::uint32_t>(laneId()) * 16;
#pragma unroll
    for (int u = 0; u < kRailUnroll; ++u) {
      const std::uint32_t at = first + static_cast<std::uint32_t>(u) * 512;
      if (at < bytes) f(u, at);
    }
  }
  __device__ void add(const char* row, std::uint32_t bytes, bool isFirst) {
    Vec16 piece[kRailUnroll];  // loads first: they are under way together
    forEach(bytes, [&](int u, std::uint32_t at) { piece[u] = load16(row + at); });
    if (isFirst) {
      forEach(bytes, [&](int u, std::uint32_t) { widenBf16(value[u], piece[u]); });
    } else {
      forEach(bytes, [&](int u, std::uint32_t) { addBf16(value[u], piece[u]); });
    }
  }
  __device__ void store(char* row, std::uint32_t bytes) const {
    forEach(bytes, [&](int u, std::uint32_t at) { store16(row + at, narrowBf16(value[u])); });
  }
};

/// Moves `words` 32-bit words of each of `n` jobs, by a whole warp; loads of several jobs are under
/// way together. load(job, word), store(job, word, value).
template <class Load, class Store>
__device__ __forceinline__ void moveWords(int n, int words, Load&& load, Store&& store) {
  constexpr int kAtOnce = 8;
  for (int word = static_cast<int>(laneId()); word < words; word += 32) {
    for (int first = 0; first < n; first += kAtOnce) {
      std::uint32_t value[kAtOnce];
#pragma unroll
      for (int u = 0; u < kAtOnce; ++u) {
        if (first + u < n) value[u] = load(first + u, word);
      }
#pragma unroll
      for (int u = 0; u < kAtOnce; ++u) {
        if (first + u < n) store(first + u, word, value[u]);
      }
    }
  }
}

/// A warp's ring. Its members are the same on all lanes; lane 0 drives the copy engine. Its
/// instructions per part are the first limit of a warp: addresses are only added to.
struct RowPipe {
  const GroupArgs& g;
  RowJobs jobs;
  int jobsAtOnce;
  Mbarrier* full;  ///< [kPipeStages]
  char* stages;
  std::uint32_t rowBytes, partBytes;
  bool bulk;      ///< sizes and addresses are multiples of 16; run() needs it
  int stage = 0;  ///< of the next part
  unsigned phase = 0;

  /// All lanes of one of the layout's warps.
  __device__ static RowPipe of(const GroupArgs& group, const PipeLayout& layout, int warp,
                               std::uint32_t rowBytes, std::uint32_t partBytes, bool bulk) {
    auto* const full = reinterpret_cast<Mbarrier*>(
        sharedBytes(layout.barriersAt(warp), kPipeStages * sizeof(Mbarrier)));
    if (laneId() == 0) {
      for (int s = 0; s < kPipeStages; ++s) initMbarrier(&full[s], 1);
      fenceMbarrierInit();
    }
    syncWarp();
    return {.g = group,
            .jobs = {sharedBytes(layout.jobsAt(warp), layout.jobsBytes()), layout.terms},
            .jobsAtOnce = layout.jobs(),
            .full = full,
            .stages = sharedBytes(
                layout.stagesAt() + static_cast<std::size_t>(warp) * layout.ringBytes(partBytes),
                layout.ringBytes(partBytes)),
            .rowBytes = rowBytes,
            .partBytes = partBytes,
            .bulk = bulk};
  }

  /// Runs the first `n` jobs, which the lanes have just made. When it returns their terms have been
  /// read; `to` may still be written until drain().
  __device__ void run(int n) {
    syncWarp();  // the jobs are complete
    const bool isCopy = static_cast<int>(laneId()) >= n || jobs[laneId()].terms == 1;
    goOn(all(isCopy) ? copyAll(*this, n) : addAll(*this, n));
  }
  /// The same where every job is a copy; rows of any size, at any address.
  __device__ void copy(int n) {
    syncWarp();  // the jobs are complete
    if (bulk) return goOn(copyAll(*this, n));
    for (int j = 0; j < n; ++j) copyWords(jobs[j].to, jobs.term(j, 0));
    syncWarp();  // the jobs may be written again
  }
  /// Lane 0's part of what run() left: all rows are written, as far as lane 0 is concerned.
  __device__ static void drain() { bulkWait<0>(); }

 private:
  struct Place {
    int stage;
    unsigned phase;
  };
  __device__ void goOn(const Place& end) {
    stage = shuffle(end.stage, 0);
    phase = shuffle(end.phase, 0);
    syncWarp();  // the jobs may be written again
  }
  // On a copy of the ring, whose members then stay in registers.
  __device__ MSCCLPP_NOINLINE static Place copyAll(RowPipe pipe, int n) {
    if (laneId() == 0) pipe.copyRows(n);
    return {pipe.stage, pipe.phase};
  }
  __device__ __forceinline__ static Place addAll(RowPipe pipe, int n) {
    pipe.addRows(n);
    return {pipe.stage, pipe.phase};
  }
  __device__ std::uint32_t partOf(std::uint32_t left) const {
    return left < partBytes ? left : partBytes;
  }
  __device__ char* stageAt(int i) const {
    return stages + static_cast<std::uint32_t>(i) * partBytes;
  }
  __device__ static int after(int i) { return i + 1 == kPipeStages ? 0 : i + 1; }
  __device__ void load(int to, const char* from, std::uint32_t bytes) const {
    arriveExpectBytes(&full[to], bytes);
    bulkLoad(stageAt(to), from, bytes, &full[to]);
  }
  __device__ void await() const { waitParity(g.wait, &full[stage], phase, pipelineWait(g)); }
  __device__ void next() {
    stage = after(stage);
    if (stage == 0) phase ^= 1u;
  }

  /// Lane 0: rows go from the stages as they came.
  __device__ __forceinline__ void copyRows(int n) {
    fenceProxyAsyncGlobal();  // what was waited for was seen by the generic proxy
    const char* from = nullptr;
    char* to = nullptr;
    std::uint32_t fromLeft = 0, toLeft = 0;
    int loadJob = 0, storeJob = 0, loadStage = stage, ahead = 0;
    while (true) {
      while (ahead < kPipeAhead && (fromLeft != 0 || loadJob < n)) {
        if (fromLeft == 0) {
          from = jobs.term(loadJob++, 0);
          fromLeft = rowBytes;
        }
        const std::uint32_t bytes = partOf(fromLeft);
        bulkWaitRead<kPipeStages - kPipeAhead>();  // the stage's last store has left it
        load(loadStage, from, bytes);
        from += bytes;
        fromLeft -= bytes;
        loadStage = after(loadStage);
        ++ahead;
      }
      if (ahead == 0) return;
      if (toLeft == 0) {
        to = jobs[storeJob++].to;
        toLeft = rowBytes;
      }
      const std::uint32_t bytes = partOf(toLeft);
      await();
      bulkStore(to, stageAt(stage), bytes);
      bulkCommit();
      to += bytes;
      toLeft -= bytes;
      next();
      --ahead;
    }
  }

  /// The next part of a term to load, in lane 0: of a job's part all terms, then its next part.
  struct LoadCursor {
    int job = 0, term = 0, stage = 0, ahead = 0;
    std::uint32_t offset = 0;
  };
  __device__ void loadTerms(LoadCursor& at, int n) const {
    while (at.ahead < kPipeStages && at.job < n) {
      const int terms = jobs[at.job].terms;
      if (terms > 0) {
        const std::uint32_t bytes = partOf(rowBytes - at.offset);
        load(at.stage, jobs.term(at.job, at.term) + at.offset, bytes);
        at.stage = after(at.stage);
        ++at.ahead;
        if (++at.term < terms) continue;
        at.term = 0;
        at.offset += bytes;
        if (at.offset < rowBytes) continue;
      }
      at.offset = 0;
      ++at.job;
    }
  }
  /// All lanes: adds up each job's terms, part by part.
  __device__ __forceinline__ void addRows(int n) {
    LoadCursor cursor{.stage = stage};
    if (laneId() == 0) {
      fenceProxyAsyncGlobal();  // as above
      bulkWaitRead<0>();        // copies have left the stages
    }
    for (int j = 0; j < n; ++j) {
      const int terms = jobs[j].terms;
      for (std::uint32_t offset = 0; offset < rowBytes; offset += partBytes) {
        const std::uint32_t bytes = partOf(rowBytes - offset);
        PartSum sum{};
        for (int t = 0; t < terms; ++t) {
          if (laneId() == 0) loadTerms(cursor, n);
          await();
          sum.add(stageAt(stage), bytes, t == 0);
          syncWarp();  // all lanes have read the stage
          next();
          --cursor.ahead;
        }
        sum.store(jobs[j].to + offset, bytes);
      }
    }
  }
  /// Rows that the copy engine cannot take: 8 bytes per lane.
  __device__ void copyWords(char* to, const char* from) const {
    for (std::uint32_t at = laneId() * 8; at < rowBytes; at += 32 * 8) {
      *reinterpret_cast<std::uint64_t*>(to + at) =
          *reinterpret_cast<const std::uint64_t*>(from + at);
    }
  }
};

}  // namespace mscclpp::ep::MSCCLPP_PLATFORM_NS
