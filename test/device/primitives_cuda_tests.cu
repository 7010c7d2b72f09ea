// Every primitive on the CUDA platform. Skips, with the reason, when no GPU is visible.

#include <cuda_fp8.h>
#include <cuda_runtime.h>

#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "device/primitive_cases.hpp"

namespace mscclpp::test::cuda {
namespace {

#define MSCCLPP_TEST_CUDA(call) \
  ASSERT_EQ(cudaSuccess, (call)) << cudaGetErrorString(cudaGetLastError())

std::string whyNoGpu() {
  int count = 0;
  const cudaError_t result = cudaGetDeviceCount(&count);
  if (result != cudaSuccess) return std::string("no GPU: ") + cudaGetErrorString(result);
  return count == 0 ? "no GPU is visible" : "";
}

class CudaHarness {
 public:
  CudaHarness() { cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking); }
  ~CudaHarness() {
    cudaStreamSynchronize(stream_);
    for (void* memory : managed_) cudaFree(memory);
    for (void* memory : pinned_) cudaFreeHost(memory);
    cudaStreamDestroy(stream_);
  }
  CudaHarness(const CudaHarness&) = delete;
  CudaHarness& operator=(const CudaHarness&) = delete;

  template <class T>
  T* allocate(size_t count) {
    void* memory = nullptr;
    EXPECT_EQ(cudaSuccess, cudaMallocManaged(&memory, count * sizeof(T)));
    std::memset(memory, 0, count * sizeof(T));
    managed_.push_back(memory);
    return static_cast<T*>(memory);
  }
  WaitControl control() {
    void* memory = nullptr;
    EXPECT_EQ(cudaSuccess, cudaMallocHost(&memory, sizeof(FailureRecord)));
    pinned_.push_back(memory);
    // A test must end even when a primitive is broken.
    return {new (memory) FailureRecord, 10 * kSecond, 0};
  }
  NativeStream stream() { return stream_; }
  void openEnded() {}
  void run() { MSCCLPP_TEST_CUDA(cudaStreamSynchronize(stream_)); }

 private:
  cudaStream_t stream_ = nullptr;
  std::vector<void*> managed_;
  std::vector<void*> pinned_;
};

class CudaPrimitives : public ::testing::TestWithParam<Case<CudaHarness>> {
 protected:
  void SetUp() override {
    const std::string reason = whyNoGpu();
    if (!reason.empty()) GTEST_SKIP() << reason;
  }
};

TEST_P(CudaPrimitives, Work) {
  for (int repetition = 0; repetition < 3 && !HasFailure(); ++repetition) {
    CudaHarness harness;
    GetParam().check(harness);
  }
}

INSTANTIATE_TEST_SUITE_P(Cuda, CudaPrimitives, ::testing::ValuesIn(allCases<CudaHarness>()),
                         [](const auto& info) { return std::string(info.param.name); });

struct Fp8Args {
  const uint32_t* floats;
  uint32_t count;
  uint8_t* ours;
  uint8_t* cudas;
};
__device__ void bothConversions(const Fp8Args& args) {
  for (uint32_t i = globalThread(); i < args.count; i += gridSize() * blockSize()) {
    const float value = bitsToFloat(args.floats[i]);
    args.ours[i] = floatToE4m3(value);
    args.cudas[i] = __nv_cvt_float_to_fp8(value, __NV_SATFINITE, __NV_E4M3);
  }
}

TEST_F(CudaPrimitives, E4m3IsTheToolkits) {
  CudaHarness harness;
  const std::vector<uint32_t> samples = floatSamples();
  auto* floats = harness.allocate<uint32_t>(samples.size());
  std::copy(samples.begin(), samples.end(), floats);
  const Fp8Args args{floats, static_cast<uint32_t>(samples.size()),
                     harness.allocate<uint8_t>(samples.size()),
                     harness.allocate<uint8_t>(samples.size())};
  launch<bothConversions, kMaxThreads>({.blocks = 8, .threads = 256}, harness.stream(), args);
  harness.run();
  for (size_t i = 0; i < samples.size(); ++i) {
    ASSERT_EQ(args.ours[i], args.cudas[i]) << std::hex << samples[i];
  }
}

// prepare() loads the kernel and allows more than 48 KB of shared memory.
struct BigShared {
  char bytes[100 * 1024];
};
__device__ void fillShared(const OutArgs& args) {
  auto& big = sharedStorage<BigShared>();
  for (uint32_t i = threadIndex(); i < sizeof big.bytes; i += blockSize()) {
    big.bytes[i] = static_cast<char>(i);
  }
  syncBlock();
  if (threadIndex() == 0) args.out[0] = static_cast<unsigned char>(big.bytes[sizeof big.bytes - 1]);
}
TEST_F(CudaPrimitives, PrepareAllowsBigSharedMemory) {
  CudaHarness harness;
  const OutArgs args{harness.allocate<uint32_t>(1), harness.control()};
  prepare<fillShared, kMaxThreads, OutArgs>(sizeof(BigShared));
  launch<fillShared, kMaxThreads>({.blocks = 1, .threads = 256, .sharedBytes = sizeof(BigShared)},
                                  harness.stream(), args);
  harness.run();
  EXPECT_EQ(args.out[0], (sizeof(BigShared) - 1) & 0xFFu);
}

// waitParity gives up after four times the limit: the record names the wait, the launch ends with
// an error. Last, because the error stays with the process: it runs in a child.
__device__ void waitForNobody(const OutArgs& args) {
  auto& barrier = sharedStorage<Mbarrier>();
  initMbarrier(&barrier, 2);
  fenceMbarrierInit();
  waitParity(args.control, &barrier, 0, {66, 2});
}
int waitForNobodyInChild() {
  CudaHarness harness;
  OutArgs args{harness.allocate<uint32_t>(1), harness.control()};
  args.control.limitNs = kSecond / 100;
  launch<waitForNobody, kMaxThreads>({.blocks = 1, .threads = 1, .sharedBytes = 64},
                                     harness.stream(), args);
  const bool refused = cudaStreamSynchronize(harness.stream()) != cudaSuccess;
  const FailureRecord& record = *args.control.record;
  const bool named = failurePublished(record) && record.what == 66 && record.peer == 2 &&
                     record.waitedNs >= 4 * kSecond / 100;
  return refused && named ? 17 : 1;
}
TEST_F(CudaPrimitives, WaitParityExpiryEndsTheLaunch) {
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  EXPECT_EXIT(std::_Exit(waitForNobodyInChild()), ::testing::ExitedWithCode(17), "");
}

}  // namespace
}  // namespace mscclpp::test::cuda
