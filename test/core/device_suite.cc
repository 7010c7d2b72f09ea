#include "core/device_suite.hpp"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <thread>

#include <mscclpp/errors.hpp>

#include "core/ranks.hpp"

namespace mscclpp::test {

using namespace std::chrono_literals;
using Bytes = std::vector<unsigned char>;

namespace {

bool isAligned(const void* memory, size_t alignment) {
  return reinterpret_cast<uintptr_t>(memory) % alignment == 0;
}

TEST_P(DeviceSuite, OpeningAgainGivesTheSameDevice) {
  EXPECT_EQ(Device::open(GetParam()), device_);
  EXPECT_EQ(device_->platform(), GetParam());
  EXPECT_EQ(device_->index(), 0);
}

TEST_P(DeviceSuite, DescribesItself) {
  EXPECT_TRUE(device_->describe().starts_with(std::string(toString(GetParam())) + " 0: "))
      << device_->describe();
  EXPECT_TRUE(device_->id().starts_with(std::string(toString(GetParam())) + "@"));
  EXPECT_GE(device_->multiprocessors(), 1);
  EXPECT_GE(device_->maxSharedBytesPerBlock(), size_t{48} * 1024);
  EXPECT_LE(device_->maxSharedBytesPerBlock(), size_t{1} << 20);
}

TEST_P(DeviceSuite, BadIndicesAreRefused) {
  expectError(ErrorCode::invalidArgument, {"device 1000"}, [&] { Device::open(GetParam(), 1000); });
  expectError(ErrorCode::invalidArgument, {"device -1"}, [&] { Device::open(GetParam(), -1); });
}

TEST_P(DeviceSuite, ExportableMemoryIsZeroedAlsoWhenReused) {
  Stream stream = device_->createStream();
  for (const size_t bytes : {size_t{1}, size_t{1000}, size_t{3} << 20}) {
    for (int round = 0; round < 3; ++round) {
      const auto memory = device_->allocateExportable(bytes);
      EXPECT_TRUE(isAligned(memory.get(), 256));
      EXPECT_EQ(read(memory.get(), bytes, stream), Bytes(bytes, 0));
      device_->fill(memory.get(), 0xEE, bytes, stream);
      stream.synchronize();
    }
  }
}

TEST_P(DeviceSuite, PinnedMemoryIsZeroedAndOneAddressServesHostAndDevice) {
  Stream stream = device_->createStream();
  const auto pinned = device_->allocatePinned(4096);
  auto* bytes = static_cast<unsigned char*>(pinned.get());
  EXPECT_TRUE(std::all_of(bytes, bytes + 4096, [](unsigned char b) { return b == 0; }));
  device_->fill(pinned.get(), 0x5A, 4096, stream);  // by the device
  stream.synchronize();
  EXPECT_EQ(bytes[4095], 0x5A);  // seen by the host
}

TEST_P(DeviceSuite, CopyNowIsDoneWhenItReturns) {
  constexpr size_t kBytes = 70000;
  const auto memory = device_->allocateExportable(kBytes);
  Bytes values(kBytes);
  for (size_t i = 0; i < kBytes; ++i) values[i] = static_cast<unsigned char>(i * 7);
  device_->copyNow(memory.get(), values.data(), kBytes);
  std::fill(values.begin(), values.end(), static_cast<unsigned char>(0));
  device_->copyNow(values.data(), memory.get(), kBytes);
  for (size_t i = 0; i < kBytes; ++i) ASSERT_EQ(values[i], static_cast<unsigned char>(i * 7)) << i;
  device_->copyNow(memory.get(), values.data(), 0);
}

TEST_P(DeviceSuite, ImpossibleAllocationsNameTheBytes) {
  const size_t bytes = size_t{1} << 50;
  expectError(ErrorCode::outOfMemory, {std::to_string(bytes)},
              [&] { device_->allocateExportable(bytes); });
}

TEST_P(DeviceSuite, NoBytesAreNoMemory) {
  Stream stream = device_->createStream();
  EXPECT_EQ(device_->allocate(0, stream), nullptr);
  device_->release(nullptr, stream);
  device_->copy(nullptr, nullptr, 0, stream);
  device_->fill(nullptr, 1, 0, stream);
  stream.synchronize();
}

TEST_P(DeviceSuite, CopyAndFill) {
  Stream stream = device_->createStream();
  constexpr size_t kBytes = 100'003;
  auto* memory = static_cast<unsigned char*>(device_->allocate(kBytes, stream));
  EXPECT_TRUE(isAligned(memory, 256));
  const auto host = device_->allocatePinned(kBytes);
  Bytes expected(kBytes);
  for (size_t i = 0; i < kBytes; ++i) expected[i] = static_cast<unsigned char>(i * 7 % 251);
  std::memcpy(host.get(), expected.data(), kBytes);
  device_->copy(memory, host.get(), kBytes, stream);
  device_->fill(memory + 100, 0xAB, 50, stream);
  std::fill_n(expected.begin() + 100, 50, 0xAB);
  EXPECT_EQ(read(memory, kBytes, stream), expected);
  device_->release(memory, stream);
  stream.synchronize();
}

TEST_P(DeviceSuite, AStreamRunsInOrderAndDoesNotBlockTheHost) {
  Stream stream = device_->createStream(true);
  const auto source = device_->allocatePinned(4);
  const auto result = device_->allocatePinned(4);
  auto* in = static_cast<int*>(source.get());
  auto* out = static_cast<int*>(result.get());
  void* memory = device_->allocate(4, stream);
  {
    Gate gate(stream);
    stream.runOnHost([in] { *in = 17; });
    device_->copy(memory, in, 4, stream);
    device_->copy(out, memory, 4, stream);
    const Event done = stream.record();
    EXPECT_FALSE(done.query()) << "the stream is held, nothing after the gate can be done";
    EXPECT_EQ(*out, 0);
    gate.open();
    done.synchronize();
    EXPECT_TRUE(done.query());
    EXPECT_EQ(*out, 17);
  }
  device_->release(memory, stream);
  stream.synchronize();
}

TEST_P(DeviceSuite, AnEventOrdersTwoStreams) {
  Stream first = device_->createStream();
  Stream second = device_->createStream();
  const auto source = device_->allocatePinned(4);
  const auto result = device_->allocatePinned(4);
  auto* in = static_cast<int*>(source.get());
  auto* out = static_cast<int*>(result.get());
  Gate gate(first);
  first.runOnHost([in] { *in = 23; });
  second.wait(first.record(false));
  device_->copy(out, in, 4, second);
  const Event done = second.record();
  EXPECT_FALSE(done.query()) << "the second stream did not wait for the first";
  gate.open();
  second.synchronize();
  EXPECT_EQ(*out, 23);
}

TEST_P(DeviceSuite, ANullEventIsComplete) {
  const Event none;
  EXPECT_FALSE(none);
  EXPECT_TRUE(none.query());
  none.synchronize();
  EXPECT_EQ(none.native(), nullptr);
  Stream stream = device_->createStream();
  stream.wait(none);
  expectError(ErrorCode::invalidArgument, {"null"}, [&] { stream.record().elapsedMs(none); });
}

TEST_P(DeviceSuite, ElapsedTime) {
  Stream stream = device_->createStream();
  const Event before = stream.record();
  stream.runOnHost([] { std::this_thread::sleep_for(30ms); });  // lint-ok: timed work
  const Event after = stream.record();
  after.synchronize();
  EXPECT_GE(after.elapsedMs(before), 29.0);
  EXPECT_LE(after.elapsedMs(before), 10'000.0);
}

TEST_P(DeviceSuite, ElapsedTimeNeedsCompleteTimedEvents) {
  Stream stream = device_->createStream();
  const Event before = stream.record();
  const Event untimed = stream.record(false);
  stream.synchronize();
  expectError(ErrorCode::invalidArgument, {"timed = false"}, [&] { untimed.elapsedMs(before); });
  Gate gate(stream);
  const Event after = stream.record();
  expectError(ErrorCode::invalidState, {"not complete"}, [&] { after.elapsedMs(before); });
}

TEST_P(DeviceSuite, AnEventOutlivesItsStream) {
  Event event;
  {
    Stream stream = device_->createStream();
    event = stream.record();
    stream.synchronize();
  }
  EXPECT_TRUE(event.query());
  Event copy = event;
  event = Event();
  EXPECT_TRUE(copy.query());
}

TEST_P(DeviceSuite, ManyEventsAreIndependent) {
  Stream held = device_->createStream();
  Stream free = device_->createStream();
  for (int i = 0; i < 50; ++i) {  // events that are given back are used again
    const Event event = free.record();
    event.synchronize();
  }
  Gate gate(held);
  const Event waiting = held.record();
  const Event reused = waiting;
  gate.open();
  held.synchronize();
  EXPECT_TRUE(reused.query());
}

TEST_P(DeviceSuite, StreamsMove) {
  Stream stream = device_->createStream();
  void* const native = stream.native();
  EXPECT_NE(native, nullptr);
  Stream moved = std::move(stream);
  EXPECT_EQ(moved.native(), native);
  Stream assigned;
  EXPECT_FALSE(assigned);
  assigned = std::move(moved);
  EXPECT_EQ(assigned.native(), native);
  EXPECT_EQ(&assigned.device(), device_.get());
  assigned.synchronize();
}

TEST_P(DeviceSuite, ABorrowedStreamStaysAliveAndKeepsTheOrder) {
  Stream owner = device_->createStream();
  const auto memory = device_->allocatePinned(1);
  {
    Gate gate(owner);
    {
      Stream borrowed = device_->borrowStream(owner.native());
      EXPECT_EQ(borrowed.native(), owner.native());
      device_->fill(memory.get(), 9, 1, borrowed);
    }
    EXPECT_EQ(*static_cast<char*>(memory.get()), 0);
  }
  owner.synchronize();
  EXPECT_EQ(*static_cast<char*>(memory.get()), 9);
}

TEST_P(DeviceSuite, ReleasedMemoryStaysUsableForWorkEnqueuedBefore) {
  // So large that the CPU's allocator gives it back to the system at once: a use after it crashes.
  constexpr size_t kBytes = size_t{40} << 20;
  constexpr size_t kRead = 1 << 16;
  Stream stream = device_->createStream();
  Stream other = device_->createStream();
  void* const memory = device_->allocate(kBytes, stream);
  stream.synchronize();
  const auto result = device_->allocatePinned(kRead);
  {
    Gate gate(stream);
    device_->fill(memory, 0x11, kBytes, stream);
    device_->copy(result.get(), memory, kRead, stream);
    device_->release(memory, stream);
    // Memory given out meanwhile must be other memory.
    for (int i = 0; i < 4; ++i) {
      void* const later = device_->allocate(kBytes, other);
      EXPECT_NE(later, memory);
      device_->release(later, other);
    }
    gate.open();
    stream.synchronize();
    other.synchronize();
  }
  const auto* bytes = static_cast<const unsigned char*>(result.get());
  EXPECT_TRUE(std::all_of(bytes, bytes + kRead, [](unsigned char b) { return b == 0x11; }));
}

TEST_P(DeviceSuite, WorksFromSeveralThreads) {
  runRanks(4, [&](int rank) {
    Stream stream = device_->createStream();
    for (int round = 0; round < 20; ++round) {
      const size_t bytes = 1000u * static_cast<size_t>(rank + 1);
      const auto value = static_cast<unsigned char>(rank * 20 + round);
      void* const memory = device_->allocate(bytes, stream);
      device_->fill(memory, value, bytes, stream);
      EXPECT_EQ(read(memory, bytes, stream), Bytes(bytes, value));
      device_->release(memory, stream);
      const auto exported = device_->allocateExportable(64);
      EXPECT_EQ(device_->importMemory(device_->exportMemory(exported.get(), 64)), exported);
    }
    stream.synchronize();
  });
}

TEST_P(DeviceSuite, ASoundDeviceHasNoAsyncErrors) {
  Stream stream = device_->createStream();
  device_->checkAsyncErrors();
  stream.synchronize();
  device_->checkAsyncErrors();
}

}  // namespace
}  // namespace mscclpp::test
