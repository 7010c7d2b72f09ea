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
  /// CPU platform. Waits have no limit: the runtime reports "no progress" at once. With a limit of
  /// kShortestLimit every wait ends at its first look at the clock, after 16 polls: what is late is
  /// the schedule's choice alone.
  ManualGroup(int ranks, BufferOptions options, double limitSeconds = 0);
  static constexpr double kShortestLimit = 1.5e-9;
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
  bool limited_;
  std::vector<std::unique_ptr<RankContext>> contexts_;
  std::string failure_;
};

/// Occupies the rank's compute stream for that many turns of the schedule.
void keepBusy(RankContext& rank, int rounds);

/// In order with fair turns, or as the seed says.
device::RuntimeConfig fifoSchedule();
device::RuntimeConfig chaosSchedule(std::uint64_t seed);

/// Runs `body` with fresh groups: once in order, then with every chaos seed. The first failure ends
/// it and says how to run that seed again.
void underAllSchedules(
    const std::function<void(std::uint64_t seed, const device::RuntimeConfig&)>& body);

}  // namespace mscclpp::ep::testing
