// What is special about the CPU platform.
#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cinttypes>
#include <cstdio>
#include <fstream>
#include <thread>

#include <mscclpp/device/cpu/runtime.hpp>
#include <mscclpp/errors.hpp>

#include "core/device_suite.hpp"
#include "core/processes.hpp"
#include "core/ranks.hpp"

namespace mscclpp::test {

INSTANTIATE_TEST_SUITE_P(Platforms, DeviceSuite, testing::Values(Platform::cpu), platformName);

namespace {

TEST(Platform, NamesRoundTrip) {
  EXPECT_EQ(parsePlatform("cpu"), Platform::cpu);
  EXPECT_EQ(parsePlatform("cuda"), Platform::cuda);
  EXPECT_EQ(toString(Platform::cpu), "cpu");
  EXPECT_EQ(toString(Platform::cuda), "cuda");
  expectError(ErrorCode::invalidArgument, {"'gpu'", "cpu, cuda"}, [] { parsePlatform("gpu"); });
}

TEST(Platform, CudaThatIsNotThereIsAClearError) {
  if (Device::count(Platform::cuda) != 0) GTEST_SKIP() << "this machine has a GPU";
  expectError(ErrorCode::unsupported, {"cuda device 0", "cpu"},
              [] { Device::open(Platform::cuda, 0); });
}

class CpuDevice : public testing::Test {
 protected:
  std::shared_ptr<Device> device_ = Device::open(Platform::cpu);
};

TEST_F(CpuDevice, TheHostStreamRunsAtOnce) {
  Stream host = device_->borrowStream(nullptr);
  EXPECT_EQ(host.native(), nullptr);
  int a = 0;
  const int b = 7;
  device_->copy(&a, &b, sizeof(a), host);
  EXPECT_EQ(a, 7);
  device_->fill(&a, 0xFF, sizeof(a), host);
  EXPECT_EQ(a, -1);
  bool ran = false;
  host.runOnHost([&] { ran = true; });
  EXPECT_TRUE(ran);
  EXPECT_TRUE(host.record().query());
  host.synchronize();
  void* const memory = device_->allocate(100, host);
  device_->release(memory, host);
}

TEST_F(CpuDevice, WaitingOnTheHostStreamBlocksTheThread) {
  Stream host = device_->borrowStream(nullptr);
  Stream stream = device_->createStream();
  std::atomic<bool> done = false;
  stream.runOnHost([&] {
    std::this_thread::sleep_for(std::chrono::milliseconds(100));  // lint-ok: work that takes time
    done = true;
  });
  host.wait(stream.record());
  EXPECT_TRUE(done);
}

TEST_F(CpuDevice, AnEventOrdersTwoStreamsAgainstTheScheduler) {
  using device::cpu::Manual;
  Manual manual;
  Stream first = device_->createStream();
  Stream second = device_->createStream();
  std::atomic<int> ticks = 0;
  int firstAt = 0;
  int secondAt = 0;
  // Nothing runs before runAll(); the second stream is the first in the scheduler's list.
  second.runOnHost([&] { ++ticks; });
  first.runOnHost([&] { firstAt = ++ticks; });
  second.wait(first.record());
  second.runOnHost([&] { secondAt = ++ticks; });
  ASSERT_TRUE(manual.runAll()) << manual.lastFailure();
  EXPECT_EQ(firstAt, 2);
  EXPECT_EQ(secondAt, 3);
}

TEST_F(CpuDevice, MoreMemoryThanTheHostHasIsRefused) {
  const auto physical =
      static_cast<size_t>(sysconf(_SC_PHYS_PAGES)) * static_cast<size_t>(sysconf(_SC_PAGESIZE));
  expectError(ErrorCode::outOfMemory, {std::to_string(2 * physical), "of memory in all"},
              [&] { device_->allocateExportable(2 * physical); });
}

TEST_F(CpuDevice, EventsOfTheHostAreTimed) {
  Stream host = device_->borrowStream(nullptr);
  Stream stream = device_->createStream();
  const Event first = host.record();
  stream.wait(first);
  const Event second = stream.record();
  second.synchronize();
  EXPECT_GE(second.elapsedMs(first), 0.0);
  EXPECT_LT(second.elapsedMs(first), 60'000.0);
}

TEST_F(CpuDevice, AFailedStreamIsReportedAndFreesItsMemory) {
  Stream stream = device_->createStream();
  void* const memory = device_->allocate(1000, stream);
  stream.runOnHost([] { fail(ErrorCode::internal, "planted failure"); });
  device_->release(memory,
                   stream);  // dropped with the stream's work; ASan sees a leak or a double free
  expectError(ErrorCode::internal, {"planted failure"}, [&] { stream.synchronize(); });
  expectError(ErrorCode::internal, {"planted failure"}, [&] { device_->checkAsyncErrors(); });
  static_cast<device::cpu::Stream*>(stream.native())->clearFailure();
  device_->checkAsyncErrors();
}

/// The file mapped at `address`, as the system names it.
std::string fileMappedAt(const void* address) {
  std::ifstream maps("/proc/self/maps");
  for (std::string line; std::getline(maps, line);) {
    uintptr_t begin = 0, end = 0;
    if (std::sscanf(line.c_str(), "%" SCNxPTR "-%" SCNxPTR, &begin, &end) != 2) continue;
    const auto at = reinterpret_cast<uintptr_t>(address);
    const size_t name = line.find('/');
    if (begin <= at && at < end) return name == std::string::npos ? "" : line.substr(name);
  }
  return "";
}

TEST_F(CpuDevice, AKilledProcessLeavesNothingBehind) {
  Child child("exporter", {"cpu"});
  const auto handle = fromHex<MemoryHandle>(child.hear());
  const auto memory = device_->importMemory(handle);
  child.kill(SIGKILL);
  EXPECT_EQ(child.wait(), 128 + SIGKILL);
  // The mapping stays good for who has it; no name is left for anybody else.
  std::memset(memory.get(), 1, handle.bytes);
  const std::string file = fileMappedAt(memory.get());
  EXPECT_TRUE(file.ends_with(" (deleted)")) << "'" << file << "' outlives its process";
}

TEST_F(CpuDevice, AReusedDescriptorIsNoticed) {
  // The exporter closed its memory and something else has its number now.
  const auto other = device_->allocateExportable(4096);
  MemoryHandle handle = device_->exportMemory(other.get(), 4096);
  handle.processRandom ^= 1;  // as if of another process, so that the descriptor is looked up
  EXPECT_EQ(*static_cast<char*>(device_->importMemory(handle).get()), 0);
  const int impostor = ::memfd_create("impostor", 0);
  handle.descriptor = impostor;
  expectError(ErrorCode::invalidState, {"is gone"}, [&] { device_->importMemory(handle); });
  ::close(impostor);
}

}  // namespace
}  // namespace mscclpp::test
