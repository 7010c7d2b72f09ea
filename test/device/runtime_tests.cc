// Streams, events, host functions, failures and configuration of the CPU runtime.

#include <atomic>
#include <cstdlib>
#include <memory>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <mscclpp/device/cpu/runtime.hpp>
#include <mscclpp/device/device.hpp>
#include <mscclpp/device/launch.hpp>

namespace mscclpp::test {
namespace {

using namespace mscclpp::device;  // NOLINT
using ::testing::HasSubstr;

struct StreamDeleter {
  void operator()(Stream* stream) const { destroyStream(stream); }
};
using StreamHandle = std::unique_ptr<Stream, StreamDeleter>;
StreamHandle makeStream(int rank = 0) {
  return StreamHandle(createStream(rank));
}

struct StepArgs {
  uint32_t* order;  // order[0] counts, then one entry per step
  uint32_t step;
  const uint32_t* gate;  // waits for it to reach 1, when not null
  WaitControl control;
};
void step(const StepArgs& args) {
  if (threadIndex() == 0 && blockIndex() == 0) {
    if (args.gate != nullptr) waitReached(args.control, args.gate, 1, {1, 0});
    args.order[1 + fetchAddRelaxed(&args.order[0], 1)] = args.step;
  }
  syncBlock();
}
void launchStep(Stream* stream, const StepArgs& args) {
  launch<step, 64>({.blocks = 2, .threads = 64}, stream, args);
}

struct BadArgs {
  uint32_t* flag;
  uint64_t limitNs;
};
void neverEnds(const BadArgs& args) {
  if (threadIndex() == 0 && args.flag != nullptr) waitReached({}, args.flag, 1, {1, 0});
  if (threadIndex() < 32) syncBlock();
  // The other warp ends: the block can never meet.
}
void failsCheck(const BadArgs&) {
  check(threadIndex() != 7, "thread 7 is unlucky");
}
void waitsParity(const BadArgs& args) {
  auto& barrier = sharedStorage<Mbarrier>();
  if (threadIndex() == 0) initMbarrier(&barrier, 2);
  syncBlock();
  FailureRecord record;
  if (threadIndex() == 0) {
    waitParity({&record, args.limitNs, 0}, &barrier, 0, {5, 1});
  } else if (threadIndex() == 1) {
    waitReached({}, args.flag, 1, {6, 1});  // keeps the block alive: no deadlock yet
  }
}

class Background : public ::testing::Test {
 protected:
  void SetUp() override { configure(RuntimeConfig::fromEnvironment()); }
  uint32_t order_[64] = {};
};

TEST_F(Background, KernelsAndHostFunctionsRunInStreamOrder) {
  const StreamHandle stream = makeStream();
  std::vector<uint32_t> seen;
  for (uint32_t i = 0; i < 10; ++i) {
    launchStep(stream.get(), {order_, i, nullptr, {}});
    stream->enqueueHost([&, i] { seen.push_back(order_[0] * 100 + i); });
  }
  stream->synchronize();
  EXPECT_TRUE(stream->idle());
  ASSERT_EQ(order_[0], 10u);
  for (uint32_t i = 0; i < 10; ++i) {
    EXPECT_EQ(order_[1 + i], i);
    EXPECT_EQ(seen[i], (i + 1) * 100 + i);
  }
}

TEST_F(Background, StreamsRunSideBySide) {
  // Each rank waits for the other: neither ends unless both run.
  uint32_t flags[2] = {};
  uint32_t other[8] = {};
  const StreamHandle first = makeStream(0);
  const StreamHandle second = makeStream(1);
  launchStep(first.get(), {order_, 1, &flags[0], {}});
  second->enqueueHost([&] { __atomic_store_n(&flags[0], 1u, __ATOMIC_RELEASE); });
  launchStep(second.get(), {other, 2, nullptr, {}});
  first->synchronize();
  second->synchronize();
  EXPECT_EQ(order_[1], 1u);
  EXPECT_EQ(other[1], 2u);
}

TEST_F(Background, EventsOrderStreamsAndTellTheTime) {
  uint32_t gate = 0;
  const StreamHandle first = makeStream(0);
  const StreamHandle second = makeStream(1);
  Event before;
  Event after;
  EXPECT_TRUE(before.query()) << "nothing captured yet";
  before.streamWait(*second);  // does nothing
  before.record(*first);
  launchStep(first.get(), {order_, 1, &gate, {}});
  after.record(*first);
  after.streamWait(*second);
  launchStep(second.get(), {order_, 2, nullptr, {}});
  before.synchronize();
  EXPECT_FALSE(after.query());
  EXPECT_EQ(after.timestampNs(), 0u);
  EXPECT_FALSE(second->idle());
  storeRelease(&gate, 1);
  second->synchronize();
  EXPECT_TRUE(after.query());
  EXPECT_GT(after.timestampNs(), before.timestampNs());
  EXPECT_EQ(order_[1], 1u);
  EXPECT_EQ(order_[2], 2u);
}

TEST_F(Background, AnEventMayBeRecordedAgainAndDestroyed) {
  uint32_t gate = 0;
  const StreamHandle first = makeStream(0);
  const StreamHandle second = makeStream(1);
  {
    Event event;
    event.record(*first);
    launchStep(first.get(), {order_, 1, &gate, {}});
    event.record(*first);  // replaces
    event.streamWait(*second);
  }
  launchStep(second.get(), {order_, 2, nullptr, {}});
  storeRelease(&gate, 1);
  second->synchronize();
  EXPECT_EQ(order_[1], 1u);
  EXPECT_EQ(order_[2], 2u);
}

TEST_F(Background, ManyThreadsLaunch) {
  std::vector<std::thread> threads;
  std::atomic<int> wrong{0};
  for (int rank = 0; rank < 4; ++rank) {
    threads.emplace_back([&, rank] {
      uint32_t order[64] = {};
      const StreamHandle stream = makeStream(rank);
      for (uint32_t i = 0; i < 20; ++i) {
        launchStep(stream.get(), {order, i, nullptr, {}});
        if (i % 5 == 4) stream->synchronize();
      }
      stream->synchronize();
      for (uint32_t i = 0; i < 20; ++i) {
        if (order[1 + i] != i) ++wrong;
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(wrong.load(), 0);
}

TEST_F(Background, AWaitForAHostThreadBacksOffAndWakes) {
  uint32_t gate = 0;
  const StreamHandle stream = makeStream();
  launchStep(stream.get(), {order_, 1, &gate, {}});
  const uint64_t before = runtimeStats().polls;
  while (runtimeStats().polls == before) std::this_thread::yield();  // until it polls
  const uint64_t polls = runtimeStats().polls, start = nanoseconds();
  uint64_t waited = 0;
  while (waited < 100'000'000) {  // let it poll for a while
    std::this_thread::yield();
    waited = nanoseconds() - start;
  }
  // Naps of 50 us are 20 polls per millisecond; without them there would be thousands.
  const uint64_t polled = runtimeStats().polls - polls;
  EXPECT_LT(polled, 1000 + waited / 1'000'000 * 40) << "polling did not back off";
  storeRelease(&gate, 1);
  stream->synchronize();
  EXPECT_EQ(order_[1], 1u);
}

template <auto Body>
std::string failureOf(Stream* stream, const BadArgs& args) {
  launch<Body, 64>({.blocks = 2, .threads = 64, .sharedBytes = 64}, stream, args);
  try {
    stream->synchronize();
  } catch (const DeviceError& error) {
    return error.what();
  }
  return "";
}

TEST_F(Background, AFailedKernelReachesTheHostAndTheRuntimeGoesOn) {
  for (int round = 0; round < 3; ++round) {
    const StreamHandle stream = makeStream(3);
    const std::string report = failureOf<failsCheck>(stream.get(), {});
    EXPECT_THAT(report, HasSubstr("thread 7 is unlucky: rank 3 block"));
    EXPECT_THAT(report, HasSubstr("runtime_tests.cc:"));
    EXPECT_EQ(stream->failure(), report);
    EXPECT_THROW(stream->synchronize(), DeviceError) << "stays failed";
    EXPECT_THROW(launchStep(stream.get(), {order_, 1, nullptr, {}}), DeviceError);
    EXPECT_THROW(stream->enqueueHost([] {}), DeviceError);
    stream->clearFailure();
    order_[0] = 0;
    launchStep(stream.get(), {order_, 5, nullptr, {}});
    stream->synchronize();
    EXPECT_EQ(order_[1], 5u);
  }
}

TEST_F(Background, ADeadlockIsFoundWithoutBeingClosed) {
  const StreamHandle stream = makeStream(1);
  const std::string report = failureOf<neverEnds>(stream.get(), {});
  EXPECT_THAT(report, HasSubstr("deadlock: every thread of rank 1 block 0"));
  EXPECT_THAT(report, HasSubstr("32 threads, rank 1 block 0: syncBlock at runtime_tests.cc:"));
  EXPECT_THAT(report, HasSubstr("32 of 64 arrived, 32 threads of the block have exited"));
  EXPECT_THAT(report, HasSubstr("neverEnds"));
}

TEST_F(Background, AFailureFailsAllUnfinishedStreamsAndTheirEvents) {
  uint32_t gate = 0;
  const StreamHandle innocent = makeStream(0);
  const StreamHandle guilty = makeStream(1);
  const StreamHandle finished = makeStream(2);
  launchStep(finished.get(), {order_, 1, nullptr, {}});
  finished->synchronize();
  launchStep(innocent.get(), {order_, 2, &gate, {}});
  Event event;
  event.record(*innocent);
  EXPECT_NE(failureOf<failsCheck>(guilty.get(), {}), "");
  EXPECT_THROW(innocent->synchronize(), DeviceError);
  EXPECT_THROW(event.synchronize(), DeviceError);
  EXPECT_THROW(event.query(), DeviceError);
  EXPECT_NO_THROW(finished->synchronize());
}

TEST_F(Background, WaitParityHasALimit) {
  uint32_t flag = 0;
  const StreamHandle stream = makeStream();
  const uint64_t start = nanoseconds();
  const std::string report = failureOf<waitsParity>(stream.get(), {&flag, 5'000'000});
  EXPECT_THAT(report, HasSubstr("waitParity: the limit passed: rank 0 block"));
  EXPECT_GE(nanoseconds() - start, 20'000'000u) << "four times the limit";
}

TEST_F(Background, AThrowingHostFunctionFailsTheStream) {
  const StreamHandle stream = makeStream(2);
  stream->enqueueHost([] { throw std::runtime_error("no such luck"); });
  try {
    stream->synchronize();
    FAIL() << "did not throw";
  } catch (const DeviceError& error) {
    EXPECT_THAT(error.what(), HasSubstr("a host function of rank 2 threw: no such luck"));
  }
}

TEST_F(Background, LaunchesAreReusedQuickly) {
  const StreamHandle stream = makeStream();
  for (int i = 0; i < 3; ++i)
    launch<step, 1024>({.blocks = 4, .threads = 768}, stream.get(),
                       StepArgs{order_, 0, nullptr, {}});
  stream->synchronize();
  const uint64_t start = nanoseconds();
  for (uint32_t i = 0; i < 20; ++i) {
    order_[0] = 0;
    launch<step, 1024>({.blocks = 4, .threads = 768}, stream.get(),
                       StepArgs{order_, i, nullptr, {}});
    stream->synchronize();
  }
  RecordProperty("microseconds", std::to_string((nanoseconds() - start) / 20'000));
}

TEST(ManualMode, RunsOnlyInsideRunAll) {
  Manual manual;
  uint32_t order[8] = {};
  const StreamHandle stream = makeStream();
  launchStep(stream.get(), {order, 1, nullptr, {}});
  EXPECT_FALSE(stream->idle());
  EXPECT_EQ(order[0], 0u);
  EXPECT_THROW(stream->synchronize(), Error);
  Event event;
  event.record(*stream);
  EXPECT_FALSE(event.query());
  EXPECT_THROW(event.synchronize(), Error);
  ASSERT_TRUE(manual.runAll()) << manual.lastFailure();
  EXPECT_EQ(order[1], 1u);
  EXPECT_NO_THROW(stream->synchronize());
  EXPECT_NO_THROW(event.synchronize());
  EXPECT_TRUE(manual.runAll()) << "nothing to do";
}

TEST(ManualMode, RecoversFromFailures) {
  Manual manual;
  const StreamHandle stream = makeStream();
  const StreamHandle other = makeStream(1);
  uint32_t order[64] = {};
  uint32_t never = 0;
  for (int round = 0; round < 5; ++round) {
    launch<failsCheck, 64>({.blocks = 3, .threads = 64}, stream.get(), BadArgs{});
    launchStep(other.get(), {order, 1, &never, {}});
    EXPECT_FALSE(manual.runAll());
    EXPECT_THAT(manual.lastFailure(), HasSubstr("thread 7 is unlucky"));
    order[0] = 0;
    launchStep(other.get(), {order, 9, nullptr, {}});
    EXPECT_TRUE(manual.runAll()) << manual.lastFailure();
    EXPECT_EQ(order[1], 9u);
  }
}

TEST(ManualMode, DropsWhatIsLeftAndBackgroundGoesOn) {
  uint32_t order[8] = {};
  const StreamHandle stream = makeStream();
  {
    Manual manual;
    launchStep(stream.get(), {order, 1, nullptr, {}});
    EXPECT_THROW(configure(RuntimeConfig{}), Error);
    EXPECT_THROW(Manual second, Error);
  }
  EXPECT_EQ(order[0], 0u);
  launchStep(stream.get(), {order, 2, nullptr, {}});
  stream->synchronize();
  EXPECT_EQ(order[1], 2u);
}

TEST(Configuration, IsReadFromTheEnvironmentAndChecked) {
  setenv("MSCCLPP_SIMT_WORKERS", "3", 1);
  setenv("MSCCLPP_SIMT_SEED", "77", 1);
  RuntimeConfig config = RuntimeConfig::fromEnvironment();
  EXPECT_EQ(config.workers, 3);
  EXPECT_EQ(config.seed, 77u);
  setenv("MSCCLPP_SIMT_WORKERS", "many", 1);
  try {
    RuntimeConfig::fromEnvironment();
    FAIL() << "accepted 'many'";
  } catch (const Error& error) {
    EXPECT_THAT(error.what(), HasSubstr("MSCCLPP_SIMT_WORKERS is 'many'"));
  }
  unsetenv("MSCCLPP_SIMT_WORKERS");
  unsetenv("MSCCLPP_SIMT_SEED");
  config.workers = 0;
  EXPECT_THROW(configure(config), Error);
  config.workers = 1;
  config.stackBytes = 100;
  EXPECT_THROW(configure(config), Error);
}

}  // namespace
}  // namespace mscclpp::test
