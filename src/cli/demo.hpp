#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include <mscclpp/connection.hpp>
#include <mscclpp/platform.hpp>

#include "demo_model.hpp"
#include "ranks.hpp"

namespace mscclpp::ep::cli {

struct DemoOptions {
  ModelShape shape;
  std::string textPath;  ///< empty = the text that ships with the program
  std::string text;
  Platform platform = Platform::cpu;
  std::optional<Transport> transport;  ///< between nodes; empty = the library chooses
  int sms = 20;
  int iterations = 3;
  int plantErrorRank = -1;  ///< this rank's experts make one error; -1 = none
};

/// Phases of a layer, in order.
enum Phase : int { kLayoutPhase, kDispatchPhase, kExpertsPhase, kCombinePhase, kPhases };

/// What one rank did, over all iterations. Plain: it travels between the ranks as bytes.
struct RankSummary {
  std::int64_t sent = 0;        ///< tokens
  std::int64_t received = 0;    ///< rows, one per token and rank
  std::int64_t remote = 0;      ///< rows that came from another rank
  std::int64_t selections = 0;  ///< (row, expert) pairs computed
  std::int64_t dispatchBytes = 0, dispatchRemoteBytes = 0;
  std::int64_t combineBytes = 0, combineRemoteBytes = 0;
  std::int64_t checked = 0;    ///< values compared
  std::int64_t inexact = 0;    ///< values whose bits differ from the reference
  std::int64_t outside = 0;    ///< values further from the fp32 reference than its bound
  std::int64_t badCounts = 0;  ///< (expert, iteration): received count is not what was sent
  double largestError = 0;     ///< against the fp32 reference
  double largestShare = 0;     ///< the same, as a share of the bound
  // The first wrong value, if any.
  std::int32_t iteration = 0, token = 0, column = 0;
  float got = 0, expected = 0;
  bool inPool = true;  ///< every expert output lay in the peer-mapped pool

  bool failed() const { return inexact > 0 || outside > 0 || badCounts > 0; }
};

/// Everything the report shows; made on every rank.
struct DemoReport {
  std::vector<RankSummary> ranks;
  std::vector<std::int64_t> expertLoad;  ///< [experts] selections, all iterations
  double phaseMs[kPhases] = {};          ///< median over the iterations of the slowest rank
  std::string device;
  std::string transport;  ///< between nodes; empty when there is one
};

/// One rank of the demo; the printing rank prints the report. Returns an exit code.
int runDemoRank(const DemoOptions& options, const RankContext& context, bool processes);

/// The report as text; ends with the verdict.
std::string formatReport(const DemoOptions& options, const DemoReport& report, bool processes);

}  // namespace mscclpp::ep::cli
