#pragma once

#include "../intranode/tuning.cuh"
#include "rails.cuh"

/// How the kernels between nodes move rows. A warp makes a list of jobs, a lane each, and then runs
/// them all through a ring of stages in shared memory: bulk loads are under way kPipeAhead parts
/// before their use, so that the few warps that serve a flow keep enough bytes in flight.
namespace mscclpp::ep::MSCCLPP_PLATFORM_NS {

inline constexpr int kPipeStages = 7, kPipeAhead = 5;
/// Of a warp, for jobs; with many terms there are fewer than 32 of them at a time.
inline constexpr std::size_t kJobBytes = 3072;

/// A row to write: the sum of its terms in their order in fp32, rounded once, or a copy when there
/// is one, or +0 when there is none.
struct RowJob {
  char* to;
  std::int32_t tag;       ///< for its maker
  std::uint16_t terms;    ///< addresses that follow
  std::uint16_t remotes;  ///< for its maker
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
    if (isFirst) {
      forEach(bytes, [&](int u, std::uint32_t at) { widenBf16(value[u], load16(row + at)); });
    } else {
      forEach(bytes, [&](int u, std::uint32_t at) { addBf16(value[u], load16(row + at)); });
    }
  }
  __device__ void store(char* row, std::uint32_t bytes) const {
    forEach(bytes, [&](int u, std::uint32_t at) { store16(row + at, narrowBf16(value[u])); });
  }
};

/// A warp's ring. Its members are the same on all lanes; lane 0 drives the copy engine.
struct RowPipe {
  const GroupArgs& g;
  RowJobs jobs;
  int jobsAtOnce;
  Mbarrier* full;  ///< [kPipeStages]
  char* stages;
  std::uint32_t rowBytes, partBytes;
  bool bulk;  ///< sizes and addresses are multiples of 16; else every job is a copy
  unsigned loads = 0, uses = 0;  ///< parts, ever

  __device__ static RowPipe of(const GroupArgs& group, const PipeLayout& layout, int warp,
                               std::uint32_t rowBytes, std::uint32_t partBytes, bool bulk) {
    return {.g = group,
            .jobs = {sharedBytes(layout.jobsAt(warp), layout.jobsBytes()), layout.terms},
            .jobsAtOnce = layout.jobs(),
            .full = reinterpret_cast<Mbarrier*>(
                sharedBytes(layout.barriersAt(warp), kPipeStages * sizeof(Mbarrier))),
            .stages = sharedBytes(
                layout.stagesAt() + static_cast<std::size_t>(warp) * layout.ringBytes(partBytes),
                layout.ringBytes(partBytes)),
            .rowBytes = rowBytes,
            .partBytes = partBytes,
            .bulk = bulk};
  }
  /// Every warp, before a syncBlock().
  __device__ void init() const {
    if (laneId() != 0) return;
    for (int s = 0; s < kPipeStages; ++s) initMbarrier(&full[s], 1);
    fenceMbarrierInit();
  }

  /// Runs the first `n` jobs, which the lanes have just made. When it returns their terms have been
  /// read; `to` may still be written until drain().
  __device__ void run(int n) {
    syncWarp();  // the jobs are complete
    if (bulk) {
      fenceProxyAsyncGlobal();  // what was waited for was seen by the generic proxy
      runParts(n);
    } else {
      for (int j = 0; j < n; ++j) copyWords(jobs[j].to, jobs.term(j, 0));
    }
    syncWarp();  // the jobs may be written again
  }
  /// Lane 0's part of what run() left: all rows are written, as far as lane 0 is concerned.
  __device__ static void drain() { bulkWait<0>(); }

 private:
  /// A part of a term of a job.
  struct Cursor {
    int job = 0;
    int term = 0;
    std::uint32_t offset = 0;
  };
  __device__ void advance(Cursor& at, int terms) const {
    if (++at.term < terms) return;
    at.term = 0;
    at.offset += partBytes;
    if (at.offset < rowBytes) return;
    at.offset = 0;
    ++at.job;
  }
  __device__ std::uint32_t bytesAt(const Cursor& at) const {
    const std::uint32_t left = rowBytes - at.offset;
    return left < partBytes ? left : partBytes;
  }
  __device__ char* stage(unsigned part) const {
    return stages + part % kPipeStages * std::size_t{partBytes};
  }
  __device__ void loadAhead(Cursor& at, int n) {
    while (loads - uses < kPipeAhead && at.job < n) {
      const int terms = jobs[at.job].terms;
      if (terms == 0) {
        ++at.job;
        continue;
      }
      if (laneId() == 0) {
        Mbarrier* const barrier = &full[loads % kPipeStages];
        const std::uint32_t bytes = bytesAt(at);
        bulkWaitRead<kPipeStages - kPipeAhead>();  // the stage's last store has left it
        arriveExpectBytes(barrier, bytes);
        bulkLoad(stage(loads), jobs.term(at.job, at.term) + at.offset, bytes, barrier);
      }
      ++loads;
      advance(at, terms);
    }
  }
  __device__ void awaitPart() const {
    waitParity(g.wait, &full[uses % kPipeStages], uses / kPipeStages & 1u, pipelineWait(g));
  }
  /// A group per part, so that groups count parts.
  __device__ void used() {
    if (laneId() == 0) bulkCommit();
    ++uses;
  }
  __device__ void runParts(int n) {
    Cursor load, use;
    while (use.job < n) {
      loadAhead(load, n);
      const int terms = jobs[use.job].terms;
      char* const to = jobs[use.job].to + use.offset;
      const std::uint32_t bytes = bytesAt(use);
      if (terms == 1) {
        if (laneId() == 0) {
          awaitPart();
          bulkStore(to, stage(uses), bytes);
        }
        used();
        advance(use, terms);
        continue;
      }
      syncWarp();  // lanes that had no part in copies are ahead of lane 0
      PartSum sum{};
      for (int t = 0; t < terms; ++t) {
        if (t > 0) loadAhead(load, n);
        awaitPart();
        sum.add(stage(uses), bytes, t == 0);
        syncWarp();  // all lanes have read the stage
        used();
        advance(use, terms);
      }
      sum.store(to, bytes);
      if (terms == 0) advance(use, terms);
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
