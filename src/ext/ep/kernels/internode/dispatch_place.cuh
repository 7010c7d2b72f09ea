#pragma once

#include "../intranode/dispatch_meta.cuh"
#include "row_pipe.cuh"
#include "run_ring.cuh"

/// The receiving side of a dispatch between nodes: rows and what belongs to them go to their final
/// places at the ranks of the own node.
namespace mscclpp::ep::MSCCLPP_PLATFORM_NS {

/// Where a warp's rows go at one rank, a row per lane at most.
struct RowPlacer {
  const DispatchArgs& d;
  const RecvTarget& target;
  int rank;  ///< whose target it is
  RowPipe& pipe;

  /// Lanes with `row` in [0, target.rows) take part: row of the rank's window, `from` its values,
  /// `token` at the source. small(lane) gives scale(i), expert(k) and weight(k) of that lane's row.
  template <class Small>
  __device__ void place(std::int64_t row, const char* from, std::int32_t token, Small&& small) {
    const bool taken = row >= 0 && row < target.rows;
    const unsigned votes = ballot(taken);
    if (votes == 0) return;
    if (taken) {
      const int job = popCount(votes & lanesBelow());
      pipe.jobs[job] = {target.x + static_cast<std::size_t>(row) * d.rowBytes,
                        static_cast<std::int32_t>(row), 0, static_cast<std::uint16_t>(laneId())};
      pipe.jobs.append(job, from);
      target.sourceTokens[row] = token;
    }
    syncWarp();
    const int n = popCount(votes);
    placeScales(n, small);
    placeChoices(n, small);
    pipe.copy(n);
  }

 private:
  template <class Small>
  __device__ void placeScales(int n, Small&& small) const {
    auto* const to = reinterpret_cast<std::uint32_t*>(target.scales);
    moveWords(
        n, d.scaleCount, [&](int j, int at) { return small(pipe.jobs[j].maker).scale(at); },
        [&](int j, int at, std::uint32_t value) {
          to[static_cast<std::size_t>(pipe.jobs[j].tag) * d.scaleCount + at] = value;
        });
  }
  /// Choices of other ranks' experts become -1 and 0.
  template <class Small>
  __device__ void placeChoices(int n, Small&& small) const {
#pragma unroll 2
    for (int i = static_cast<int>(laneId()); i < n * d.topk; i += 32) {
      const int j = i / d.topk, k = i - j * d.topk;
      const RowJob& job = pipe.jobs[j];
      const auto from = small(job.maker);
      const std::int64_t expert = from.expert(k);
      const float weight = from.weight(k);
      const bool here = isExpert(d.experts, expert) && rankOfExpert(d.experts, expert) == rank;
      const std::size_t to = static_cast<std::size_t>(job.tag) * d.topk + k;
      target.topkIdx[to] = here ? indexOfExpert(d.experts, expert) : -1;
      target.topkWeights[to] = here ? weight : 0.0f;
    }
  }
};

/// Own tokens for ranks of the own node. Warps take a few of them when they have nothing else to
/// do: what crosses the network goes first.
struct OwnRows {
  const RailDispatchArgs& a;
  const RecvTarget* targets;  ///< [members]
  RowPipe& pipe;
  bool left = true;

  struct Small {
    const DispatchArgs& d;
    int token;
    __device__ std::uint32_t scale(int i) const {
      return *reinterpret_cast<const std::uint32_t*>(scaleAt(d, token, i));
    }
    __device__ std::size_t at(int k) const {
      return static_cast<std::size_t>(token) * static_cast<std::size_t>(d.topk) +
             static_cast<std::size_t>(k);
    }
    __device__ std::int64_t expert(int k) const { return d.topkIdx[at(k)]; }
    __device__ float weight(int k) const { return d.topkWeights[at(k)]; }
  };
  /// A whole warp. False: all are taken.
  __device__ bool placeSome() {
    const DispatchArgs& d = a.dispatch;
    if (!left) return false;
    std::uint32_t turn = 0;
    if (laneId() == 0) {
      auto* const words = railMemory<RailWords>(d.group, a.rails.plan.words());
      turn = fetchAddLocalRelaxed(&words->ownTurns, 1u);
    }
    const std::int64_t first = std::int64_t{shuffle(turn, 0)} * kTurnTokens;
    left = first < d.tokens;
    if (!left) return false;
    const std::int64_t token =
        static_cast<int>(laneId()) < kTurnTokens ? first + laneId() : d.tokens;
    const std::int32_t* ranks = ranksOfNode(a.rails, a.rails.node);
    for (int m = 0; m < nodeSize(a.rails, a.rails.node); ++m) {
      const std::int32_t position =
          token < d.tokens ? d.position[static_cast<std::size_t>(token) * d.group.ranks + ranks[m]]
                           : -1;
      const std::int64_t row =
          position < 0 ? -1 : targets[m].start + position - targets[m].rowBegin;
      RowPlacer{d, targets[m], ranks[m], pipe}.place(
          row, d.x + static_cast<std::size_t>(token) * d.rowBytes, static_cast<std::int32_t>(token),
          [&](int lane) {
            return Small{d, static_cast<int>(first) + lane};
          });
    }
    return true;
  }
};

}  // namespace mscclpp::ep::MSCCLPP_PLATFORM_NS
