#pragma once

#include <mscclpp/device/cpu/runtime.hpp>

#include "ep/harness.hpp"

/// Groups whose kernels all run on the test's own thread, in an order that a seed decides.
namespace mscclpp::ep::testing {

/// Seeds per chaos test: MSCCLPP_TEST_SEEDS, by default 20 (3 under a sanitizer).
/// MSCCLPP_TEST_SEED=n runs that one only.
std::vector<std::uint64_t> chaosSeeds();

class ManualGroup {
 public:
  /// CPU platform. Waits have no limit: the runtime reports "no progress" at once.
  ManualGroup(int ranks, BufferOptions options);
  ManualGroup(const ManualGroup&) = delete;
  ManualGroup& operator=(const ManualGroup&) = delete;

  int ranks() const { return static_cast<int>(contexts_.size()); }
  RankContext& operator[](int rank) { return *contexts_.at(static_cast<std::size_t>(rank)); }

  /// Runs `function` for every rank in a thread, kernels in the background: for calls that block.
  void inThreads(const RankFunction& function);
  /// Calls `enqueue` for one rank after the other, then runs everything. False: `failure` has the
  /// report.
  bool run(const device::RuntimeConfig& config, const RankFunction& enqueue);
  /// `check` for one rank after the other; failures name the rank.
  void forEach(const RankFunction& check);
  const std::string& failure() const { return failure_; }

 private:
  Meeting meeting_;
  std::vector<std::unique_ptr<RankContext>> contexts_;
  std::string failure_;
};

/// In order with fair turns, or as the seed says.
device::RuntimeConfig fifoSchedule();
device::RuntimeConfig chaosSchedule(std::uint64_t seed);

/// Runs `body` with fresh groups: once in order, then with every chaos seed. The first failure ends
/// it and says how to run that seed again.
void underAllSchedules(
    const std::function<void(std::uint64_t seed, const device::RuntimeConfig&)>& body);

}  // namespace mscclpp::ep::testing
