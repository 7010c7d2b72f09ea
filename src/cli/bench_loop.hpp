#pragma once

#include <cstdint>
#include <functional>
#include <utility>
#include <vector>

#include <mscclpp/ext/ep/types.hpp>

#include "bench.hpp"
#include "device_memory.hpp"

namespace mscclpp::ep::cli {

/// What one call left behind: the event after it, and tensors with what they must contain. Dropping
/// it releases the call's outputs.
struct Outputs {
  Event done;
  std::vector<std::pair<Tensor, Tensor>> checks;  ///< (actual, expected)
};

/// Calls back to back, an event before and after each on the communication stream, no host
/// synchronisation in between.
class TimedLoop {
 public:
  /// `comm` is the stream that carries the calls. Before every call, if asked for, a cache flush:
  /// `align` then enqueues something that all ranks leave together.
  TimedLoop(const BenchOptions& options, const RankContext& context, const RankDevice& device,
            void* comm);

  void alignWith(std::function<void()> align) { align_ = std::move(align); }
  Stream& comm() { return comm_; }

  /// Collective. Times `call`; the outputs of the last one are checked.
  Timing run(const std::function<Outputs()>& call);
  /// Waits for the stream; true when every tensor is what it must be, here.
  bool correct(const Outputs& outputs);
  /// Collective: true when `mine` is true on every rank.
  bool onAllRanks(bool mine) const;

 private:
  void flush();
  Timing gather(const std::vector<double>& device, std::vector<double> host, double loop) const;
  std::vector<double> slowest(const std::vector<double>& mine) const;

  const BenchOptions& options_;
  const RankContext& context_;
  const RankDevice& device_;
  Stream comm_;
  std::function<void()> align_;
  Tensor wrong_;    ///< u64 counter of the comparison
  Tensor scratch_;  ///< overwritten to flush the caches
};

}  // namespace mscclpp::ep::cli
