#pragma once

#include <cstdint>

/// What low-latency calls send, worked out from the layouts without running them.
namespace mscclpp::ep {

struct LowLatencyShape {
  int ranks = 2;
  int ranksPerNode = 8;  ///< the last node may have fewer
  int tokens = 128;      ///< of every rank, and most there may be
  int hidden = 7168;
  int topk = 8;
  int experts = 288;
  bool fp8 = true;
  bool logfmt = false;     ///< the combine's sums
  bool source = false;     ///< the combine is reduced at home
  std::uint64_t seed = 1;  ///< of the routing, which is uniform
};

/// Of one direction, per rank and call, the mean over the ranks.
struct LowLatencyTraffic {
  double memoryBytes = 0;  ///< stored to ranks of the own node
  double puts = 0;         ///< to ranks of other nodes, each with its signal
  double signals = 0;      ///< without a put
  double putBytes = 0;
  double adds = 0;  ///< by which the sender of a message learns that it was received
  /// What a library sends that puts every row of a selection by itself (8 bits or bf16 per value,
  /// no lines), to ranks of other nodes.
  double rows = 0;
  double rowBytes = 0;
};

struct LowLatencyRoundTrip {
  LowLatencyTraffic dispatch, combine;
};
/// Local. The figures of the same routing that bench-ll has.
LowLatencyRoundTrip lowLatencyTraffic(const LowLatencyShape& shape);

}  // namespace mscclpp::ep
