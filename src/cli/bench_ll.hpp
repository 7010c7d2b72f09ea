#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include <mscclpp/platform.hpp>
#include <mscclpp/topology.hpp>

#include "bench_ll_phases.hpp"
#include "ranks.hpp"

namespace mscclpp::ep::cli {

struct LowLatencyBenchOptions {
  Platform platform = Platform::cpu;
  int ranks = 2;
  /// Unset: the environment's, else one node.
  TopologyOptions topology = {};
  std::vector<int> tokens;  ///< per rank, one line each
  int hidden = 7168;
  int topk = 8;
  int experts = 288;
  int calls = 20;       ///< per graph (cuda), or per timing (cpu)
  int iterations = 40;  ///< timings
  int numSms = 0;
  bool logfmt = false;                 ///< the combine's sums travel as 10-bit logarithmic values
  std::string combineReduce = "rank";  ///< or "source"
  bool processes = false;
  bool phases = false;      ///< between nodes: also measures where the time goes
  bool plantError = false;  ///< expects something else than is sent
  std::uint64_t seed = 1;
  std::string jsonPath;
};

/// Microseconds per call: median over the timings of the slowest rank's, and their spread.
struct LowLatencyTime {
  double median = 0, least = 0, most = 0;
};

struct LowLatencyLine {
  int tokens = 0;
  bool fp8 = false;
  bool correct = true;
  LowLatencyTime dispatch, combine, pair, halves;
  double dispatchBytes = 0, combineBytes = 0;  ///< deep_ep's: one row per selection, rank 0's
  double dispatchWire = 0, combineWire = 0;    ///< what really goes to other ranks
  std::vector<LowLatencyPhase> phases;         ///< only if asked for
};

/// What the ranks ran on.
struct LowLatencyPlace {
  std::string device;
  int nodes = 1;
  std::string transport;  ///< between nodes
};

int runLowLatencyBench(const LowLatencyBenchOptions& options, const RankContext& context);
std::string formatLowLatency(const LowLatencyBenchOptions& options,
                             const std::vector<LowLatencyLine>& lines,
                             const LowLatencyPlace& place);
std::string lowLatencyJson(const LowLatencyBenchOptions& options,
                           const std::vector<LowLatencyLine>& lines, const LowLatencyPlace& place);

}  // namespace mscclpp::ep::cli
