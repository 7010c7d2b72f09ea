#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include <mscclpp/ext/ep/buffer.hpp>

#include "device_memory.hpp"
#include "ranks.hpp"

/// Where the time of a low-latency call between nodes goes: moments that kernels and proxies note,
/// brought to one clock.
namespace mscclpp::ep::cli {

/// One message of a call, from its slowest sender to a receiver; microseconds, medians over calls
/// and ranks.
struct LowLatencyPhase {
  const char* call;
  const char* message;
  double kernel = 0;  ///< until everything is written: from the call's start or the message before
  double fifo = 0;    ///< until the proxy has found the trigger
  double proxy = 0;   ///< until the transport has got it
  double wire = 0;    ///< until the receiver's kernel has seen all messages
  double rest = 0;    ///< until the receiver's kernel is done; of a call's last message
  double total() const { return kernel + fifo + proxy + wire + rest; }
};

/// What one call is measured with: a tensor i64 [8] for its request's `times`.
using TimedCall = std::function<void(const Tensor& times)>;

/// Collective. Makes the two calls in turn, `rounds` times, eagerly.
std::vector<LowLatencyPhase> measurePhases(const RankContext& context, const RankDevice& device,
                                           Buffer& buffer, int rounds, const TimedCall& dispatch,
                                           const TimedCall& combine);
/// A table; empty without phases.
std::string formatPhases(const std::vector<LowLatencyPhase>& phases);

}  // namespace mscclpp::ep::cli
