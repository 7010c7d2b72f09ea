#include "ep/manual.hpp"

#include <cstdlib>
#include <thread>

#include <mscclpp/device/device.hpp>
#include <mscclpp/device/launch.hpp>

namespace mscclpp::ep::testing {
namespace {

std::uint64_t numberFrom(const char* variable, std::uint64_t otherwise) {
  const char* text = std::getenv(variable);
  return text != nullptr && *text != '\0' ? std::strtoull(text, nullptr, 10) : otherwise;
}

}  // namespace

std::vector<std::uint64_t> chaosSeeds() {
  if (const std::uint64_t one = numberFrom("MSCCLPP_TEST_SEED", 0); one != 0) return {one};
  std::vector<std::uint64_t> seeds;
  const std::uint64_t count = numberFrom("MSCCLPP_TEST_SEEDS", underSanitizer() ? 3 : 20);
  for (std::uint64_t seed = 1; seed <= count; ++seed) seeds.push_back(seed);
  return seeds;
}

ManualGroup::ManualGroup(int ranks, BufferOptions options, double limitSeconds)
    : meeting_(ranks), limited_(limitSeconds > 0), contexts_(static_cast<std::size_t>(ranks)) {
  options.platform = Platform::cpu;
  options.timeoutSeconds = limitSeconds;
  std::vector<std::thread> threads;
  std::vector<std::string> errors(static_cast<std::size_t>(ranks));
  for (std::size_t r = 0; r < contexts_.size(); ++r) {
    threads.emplace_back([&, r] {
      errors[r] = errorOf([&] {
        contexts_[r] =
            std::make_unique<RankContext>(meeting_.bootstrap(static_cast<int>(r)), options);
      });
      if (!errors[r].empty()) meeting_.abort(errors[r]);
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (const std::string& error : errors) {
    if (!error.empty()) throw std::runtime_error("cannot make the group: " + error);
  }
}

void ManualGroup::inThreads(const RankFunction& function) {
  std::vector<std::thread> threads;
  for (int r = 0; r < ranks(); ++r) {
    threads.emplace_back([&, r] {
      const std::string error = errorOf([&] { function((*this)[r]); });
      if (!error.empty()) ADD_FAILURE() << "rank " << r << ": " << error;
    });
  }
  for (std::thread& thread : threads) thread.join();
}

bool ManualGroup::run(const device::RuntimeConfig& config, const RankFunction& enqueue) {
  device::RuntimeConfig own = config;
  // Proxies are outside the run time, which must not take a wait for them for a deadlock.
  if (contexts_.front()->buffer().topology().nodes() > 1) own.closed = false;
  if (limited_) own.closed = false;  // limits that are still to pass are progress
  device::Manual manual(own);
  for (const auto& context : contexts_) enqueue(*context);
  if (manual.runAll()) return true;
  failure_ = manual.lastFailure();
  return false;
}

void ManualGroup::forEach(const RankFunction& check) {
  for (const auto& context : contexts_) {
    SCOPED_TRACE("rank " + std::to_string(context->rank()));
    check(*context);
  }
}

namespace {

struct Rounds {
  int count;
};
void passRounds(const Rounds& rounds) {
  for (int i = 0; i < rounds.count; ++i) device::cpu::syncBlock();
}

}  // namespace

void keepBusy(RankContext& rank, int rounds) {
  if (rounds == 0) return;
  device::launch<passRounds, 64>({.blocks = 1, .threads = 64},
                                 static_cast<device::NativeStream>(rank.compute().native()),
                                 Rounds{rounds});
}

device::RuntimeConfig fifoSchedule() {
  return device::RuntimeConfig::testing(1, false);
}
device::RuntimeConfig chaosSchedule(std::uint64_t seed) {
  device::RuntimeConfig config = device::RuntimeConfig::testing(seed, true);
  // Some seeds with copies that are later than everything else, some with far more switches.
  if (seed % 3 == 0) config.bulkMaxDelay = 2000;
  if (seed % 4 == 0) config.preemptPercent = 40;
  return config;
}

void underAllSchedules(
    const std::function<void(std::uint64_t, const device::RuntimeConfig&)>& body) {
  const auto attempt = [&](std::uint64_t seed, const device::RuntimeConfig& config) {
    SCOPED_TRACE(config.chaos ? "chaos; again with MSCCLPP_TEST_SEED=" + std::to_string(seed)
                              : std::string("in order (no chaos)"));
    body(seed, config);
    return !::testing::Test::HasFailure();
  };
  if (!attempt(1, fifoSchedule())) return;
  for (const std::uint64_t seed : chaosSeeds()) {
    if (!attempt(seed, chaosSchedule(seed))) return;
  }
}

}  // namespace mscclpp::ep::testing
