#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include <mscclpp/platform.hpp>
#include <mscclpp/topology.hpp>

#include "ranks.hpp"

namespace mscclpp::ep::cli {

/// What is timed. `layout` has no bytes and no roofline.
enum class BenchCase : int {
  dispatchBf16,
  dispatchFp8,
  dispatchUncached,
  combinePool,
  combinePlain,
  layout
};
inline constexpr int kBenchCases = 6;
const char* nameOf(BenchCase which);

struct BenchOptions {
  Platform platform = Platform::cpu;
  int ranks = 2;
  TopologyOptions topology;
  int tokens = 4096;  ///< per rank
  int hidden = 7168;
  int topk = 8;
  int experts = 256;
  std::vector<int> blocks;
  std::vector<BenchCase> cases;
  int warmup = 5;
  int iterations = 30;
  bool flush = false;
  bool processes = false;
  bool plantError =
      false;  ///< expects something else than is sent: every line must be marked wrong
  std::uint64_t seed = 1;
  std::string jsonPath;
};

/// Times of one loop, in microseconds, over its measured calls.
struct Timing {
  double median = 0;  ///< of the slowest rank's time in each call
  double least = 0, most = 0;
  double host = 0;  ///< median time a call keeps the host, slowest rank
  double loop = 0;  ///< whole loop until all is done, per call, slowest rank
  bool correct = true;
  bool measured = false;
};

struct BenchLine {
  BenchCase which = BenchCase::dispatchBf16;
  int blocks = 0;
  double bytes = 0;   ///< received per rank and call, mean over the ranks
  double remote = 0;  ///< share of them that comes from other ranks
  Timing call;
  /// The roofline: plain copies, not measured when rows are too large for its ring. Between nodes
  /// the bare transport, for networkBytes.
  Timing copy;
  double networkBytes = 0;  ///< sent to other nodes by this rank
};

struct BenchReport {
  std::string device;
  int nodes = 1;
  std::string transport;  ///< between them
  double meanRows = 0;
  std::vector<BenchLine> lines;
};

/// One rank of the benchmark. The printing rank prints, and writes the JSON file. Returns an exit
/// code.
int runBenchRank(const BenchOptions& options, const RankContext& context);

std::string formatBench(const BenchOptions& options, const BenchReport& report);
/// The report as JSON text; docs/benchmark.md describes the fields.
std::string benchJson(const BenchOptions& options, const BenchReport& report);

}  // namespace mscclpp::ep::cli
