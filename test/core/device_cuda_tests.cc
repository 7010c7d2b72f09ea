// What is special about CUDA.
#include <cuda_runtime_api.h>
#include <unistd.h>

#include <cstdlib>
#include <sstream>

#include <gmock/gmock.h>

#include <mscclpp/errors.hpp>

#include "core/channel_kernels.hpp"
#include "core/device_suite.hpp"
#include "core/processes.hpp"
#include "core/ranks.hpp"

namespace mscclpp::test {

INSTANTIATE_TEST_SUITE_P(Platforms, DeviceSuite, testing::Values(Platform::cuda), platformName);

namespace {

class CudaDevice : public testing::Test {
 protected:
  void SetUp() override {
    if (Device::count(Platform::cuda) == 0) GTEST_SKIP() << "no GPU is visible on this machine";
    device_ = Device::open(Platform::cuda);
  }
  /// The first byte.
  int read(const void* memory, Stream& stream) {
    const auto host = device_->allocatePinned(1);
    device_->copy(host.get(), memory, 1, stream);
    stream.synchronize();
    return *static_cast<const unsigned char*>(host.get());
  }
  std::shared_ptr<Device> device_;
};

TEST_F(CudaDevice, TheCallersCurrentDeviceStays) {
  if (Device::count(Platform::cuda) < 2) GTEST_SKIP() << "needs two GPUs";
  const auto other = Device::open(Platform::cuda, 1);
  ASSERT_EQ(cudaSetDevice(0), cudaSuccess);
  Stream stream = other->createStream();
  const auto memory = other->allocateExportable(64);
  void* const scratch = other->allocate(64, stream);
  other->fill(scratch, 1, 64, stream);
  stream.record().synchronize();
  other->release(scratch, stream);
  other->exportMemory(memory.get(), 64);
  other->allocatePinned(64);
  other->checkAsyncErrors();
  stream.synchronize();
  int current = -1;
  ASSERT_EQ(cudaGetDevice(&current), cudaSuccess);
  EXPECT_EQ(current, 0);
  EXPECT_NE(other->id(), device_->id());
}

TEST_F(CudaDevice, TellsItsPlaceOnTheBusAndExportsDmaBufs) {
  EXPECT_THAT(device_->pciAddress(),
              testing::MatchesRegex("[0-9a-f]+:[0-9a-f]+:[0-9a-f]+\\.[0-7]"));
  if (!device_->canExportDmaBuf()) GTEST_SKIP() << "this driver or kernel exports no dma-bufs";
  const auto memory = device_->allocateExportable(size_t{4} << 20);
  constexpr size_t kInside = 5000;
  const DmaBuf buffer = device_->exportDmaBuf(static_cast<char*>(memory.get()) + kInside, 100);
  ASSERT_GE(buffer.descriptor, 0);
  EXPECT_EQ(::close(buffer.descriptor), 0);
  EXPECT_EQ(buffer.offset, kInside % static_cast<size_t>(::sysconf(_SC_PAGESIZE)));
}

TEST_F(CudaDevice, ThreadsOnTwoGpusAddressEachOther) {
  if (Device::count(Platform::cuda) < 2) GTEST_SKIP() << "needs two GPUs";
  const auto other = Device::open(Platform::cuda, 1);
  const auto memory = other->allocateExportable(4096);
  const auto imported = device_->importMemory(other->exportMemory(memory.get(), 4096));
  EXPECT_EQ(imported.get(), memory.get());
  int possible = 0;
  ASSERT_EQ(cudaDeviceCanAccessPeer(&possible, 0, 1), cudaSuccess);
  EXPECT_EQ(possible, 1);
  // Enabled already: asking again must say so.
  ASSERT_EQ(cudaSetDevice(0), cudaSuccess);
  EXPECT_EQ(cudaDeviceEnablePeerAccess(1, 0), cudaErrorPeerAccessAlreadyEnabled);
  cudaGetLastError();
}

TEST_F(CudaDevice, TheDefaultStreamMayBeBorrowed) {
  Stream borrowed = device_->borrowStream(nullptr);
  EXPECT_EQ(borrowed.native(), nullptr);
  Stream stream = device_->createStream();
  const auto memory = device_->allocatePinned(16);
  device_->fill(memory.get(), 5, 16, borrowed);
  stream.wait(borrowed.record());
  stream.synchronize();
  EXPECT_EQ(*static_cast<char*>(memory.get()), 5);
}

TEST_F(CudaDevice, OurStreamsDoNotWaitForTheDefaultStream) {
  Stream standard = device_->borrowStream(nullptr);
  Stream stream = device_->createStream();
  const auto memory = device_->allocatePinned(16);
  Gate gate(standard);
  device_->fill(memory.get(), 5, 16, stream);
  stream.synchronize();  // would hang
  EXPECT_EQ(*static_cast<char*>(memory.get()), 5);
}

TEST_F(CudaDevice, NothingOfTheHotPathWaitsForAHeldStream) {
  Stream held = device_->createStream();
  Stream stream = device_->createStream();
  Gate gate(held);
  for (int i = 0; i < 10; ++i) {
    void* const memory = device_->allocate(1 << 20, stream);
    device_->fill(memory, 1, 1 << 20, stream);
    const Event event = stream.record(i % 2 == 0);
    event.synchronize();
    device_->release(memory, stream);
    device_->checkAsyncErrors();
  }
  const Event last = held.record();
  EXPECT_FALSE(last.query());
}

TEST_F(CudaDevice, RecordingAndWaitingCanBeCaptured) {
  Stream stream = device_->createStream();
  Stream side = device_->createStream();
  const auto memory = device_->allocatePinned(16);
  ASSERT_EQ(cudaStreamBeginCapture(static_cast<cudaStream_t>(stream.native()),
                                   cudaStreamCaptureModeGlobal),
            cudaSuccess);
  side.wait(stream.record(false));
  device_->fill(memory.get(), 7, 16, side);
  device_->checkAsyncErrors();
  stream.wait(side.record(false));
  cudaGraph_t graph = nullptr;
  ASSERT_EQ(cudaStreamEndCapture(static_cast<cudaStream_t>(stream.native()), &graph), cudaSuccess);
  cudaGraphExec_t executable = nullptr;
  ASSERT_EQ(cudaGraphInstantiate(&executable, graph, 0), cudaSuccess);
  EXPECT_EQ(*static_cast<char*>(memory.get()), 0);
  ASSERT_EQ(cudaGraphLaunch(executable, static_cast<cudaStream_t>(stream.native())), cudaSuccess);
  stream.synchronize();
  EXPECT_EQ(*static_cast<char*>(memory.get()), 7);
  cudaGraphExecDestroy(executable);
  cudaGraphDestroy(graph);
}

const RoleRegistration kVisible("visible", [](const std::vector<std::string>&) {
  tellParent(std::to_string(Device::count(Platform::cuda)));
  try {
    tellParent(Device::open(Platform::cuda)->id());
  } catch (const Error& error) {
    tellParent(error.what());
  }
  return 0;
});

TEST_F(CudaDevice, InvisibleGpusAreAClearError) {
  Child child("visible", {}, {"CUDA_VISIBLE_DEVICES="});
  EXPECT_EQ(child.hear(), "0");
  EXPECT_NE(child.hear().find("CUDA_VISIBLE_DEVICES"), std::string::npos);
}

/// The variable with which a child sees the device of this process's `index`, and no other.
std::string onlyVisible(int index) {
  const char* const own = std::getenv("CUDA_VISIBLE_DEVICES");
  if (own == nullptr) return fmt::format("CUDA_VISIBLE_DEVICES={}", index);
  std::stringstream list(own);
  std::string entry;
  for (int i = 0; i <= index; ++i) std::getline(list, entry, ',');
  return "CUDA_VISIBLE_DEVICES=" + entry;
}

TEST_F(CudaDevice, TheIdDoesNotDependOnTheIndex) {
  const int last = Device::count(Platform::cuda) - 1;
  Child child("visible", {}, {onlyVisible(last)});
  EXPECT_EQ(child.hear(), "1");
  EXPECT_EQ(child.hear(), Device::open(Platform::cuda, last)->id());
}

/// Imports with only the last GPU visible, which may not be the exporter's.
TEST_F(CudaDevice, ImportWorksWhenTheExportersGpuIsNotVisible) {
  const int last = Device::count(Platform::cuda) - 1;
  Stream stream = device_->createStream();
  const auto memory = device_->allocateExportable(4096);
  device_->fill(memory.get(), 0x21, 4096, stream);
  stream.synchronize();
  Child child("importer", {"cuda", toHex(device_->exportMemory(memory.get(), 4096))},
              {onlyVisible(last)});
  EXPECT_EQ(child.hear(), "right");
  EXPECT_EQ(read(memory.get(), stream), 0x43);
  child.tell("end");
  EXPECT_EQ(child.wait(), 0);
}

const RoleRegistration kBadKernel("bad-kernel", [](const std::vector<std::string>&) {
  const auto device = Device::open(Platform::cuda);
  Stream stream = device->createStream();
  device->checkAsyncErrors();
  launchIllegalAccess(*device, stream);
  const auto said = [](const std::function<void()>& action) {
    try {
      action();
      return std::string("nothing");
    } catch (const CudaError& error) {
      return fmt::format("{} {}", error.cudaCode(), error.what());
    }
  };
  tellParent(said([&] { stream.synchronize(); }));
  tellParent(said([&] { device->checkAsyncErrors(); }));
  return 0;
});

TEST_F(CudaDevice, AKernelThatFailsIsReported) {
  Child child("bad-kernel", {});  // the failure ends the process's use of the GPU
  for (int i = 0; i < 2; ++i) {
    const std::string said = child.hear();
    EXPECT_TRUE(said.starts_with(std::to_string(cudaErrorIllegalAddress) + " ")) << said;
    EXPECT_NE(said.find("illegal memory access"), std::string::npos) << said;
  }
}

}  // namespace
}  // namespace mscclpp::test
