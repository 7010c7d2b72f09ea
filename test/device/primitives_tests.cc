// Every primitive on the CPU platform: FIFO and chaos schedules with late bulk copies, and
// background mode.

#include <cstdlib>
#include <memory>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include <mscclpp/device/cpu/runtime.hpp>

#include "device/primitive_cases.hpp"
#include "device/seeds.hpp"

namespace mscclpp::test::cpu {
namespace {

enum class Mode { fifo, chaos, background, twoWorkers };

class CpuHarness {
 public:
  CpuHarness(Mode mode, uint64_t seed) : mode_(mode), seed_(seed) { start(false); }
  ~CpuHarness() { stop(); }
  CpuHarness(const CpuHarness&) = delete;
  CpuHarness& operator=(const CpuHarness&) = delete;

  template <class T>
  T* allocate(size_t count) {
    const size_t bytes = (count * sizeof(T) + 127) / 128 * 128;
    void* memory = std::aligned_alloc(128, bytes);
    std::memset(memory, 0, bytes);
    memory_.emplace_back(memory, &std::free);
    return static_cast<T*>(memory);
  }
  WaitControl control() { return {allocate<FailureRecord>(1), 0, 0}; }
  NativeStream stream() { return stream_; }
  /// Waits may run into their limits: "no progress" is then no error.
  void openEnded() {
    stop();
    start(true);
  }
  void run() {
    if (manual_ != nullptr) {
      ASSERT_TRUE(manual_->runAll()) << manual_->lastFailure();
    } else {
      stream_->synchronize();
    }
  }

 private:
  void start(bool openEnded) {
    if (mode_ == Mode::fifo || mode_ == Mode::chaos) {
      RuntimeConfig config = RuntimeConfig::testing(seed_, mode_ == Mode::chaos);
      config.closed = !openEnded;
      manual_ = std::make_unique<Manual>(config);
    } else {
      RuntimeConfig config = RuntimeConfig::fromEnvironment();
      config.workers = mode_ == Mode::twoWorkers ? 2 : 1;
      configure(config);
    }
    stream_ = createStream(0);
  }
  void stop() {
    destroyStream(stream_);
    manual_.reset();
  }

  Mode mode_;
  uint64_t seed_;
  std::unique_ptr<Manual> manual_;
  Stream* stream_ = nullptr;
  std::vector<std::unique_ptr<void, void (*)(void*)>> memory_;
};

struct Parameter {
  Mode mode;
  Case<CpuHarness> test;
};

class Primitives : public ::testing::TestWithParam<Parameter> {};

TEST_P(Primitives, Work) {
  const Parameter& parameter = GetParam();
  const uint64_t seeds = parameter.mode == Mode::chaos && !parameter.test.timed ? seedCount(5) : 1;
  for (uint64_t seed = 1; seed <= seeds && !HasFailure(); ++seed) {
    SCOPED_TRACE("seed " + std::to_string(seed));
    CpuHarness harness(parameter.mode, seed);
    parameter.test.check(harness);
  }
}

std::vector<Parameter> parameters() {
  std::vector<Parameter> all;
  for (const Mode mode : {Mode::fifo, Mode::chaos, Mode::background, Mode::twoWorkers}) {
    for (const auto& test : allCases<CpuHarness>()) all.push_back({mode, test});
  }
  return all;
}

std::string nameOf(const ::testing::TestParamInfo<Parameter>& info) {
  constexpr const char* kModes[] = {"Fifo", "Chaos", "Background", "TwoWorkers"};
  return std::string(kModes[static_cast<int>(info.param.mode)]) + info.param.test.name;
}

INSTANTIATE_TEST_SUITE_P(Cpu, Primitives, ::testing::ValuesIn(parameters()), nameOf);

}  // namespace
}  // namespace mscclpp::test::cpu
