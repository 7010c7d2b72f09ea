#include <mscclpp/device/device.hpp>
#include <mscclpp/device/launch.hpp>

#include "cli_kernels.hpp"

/// Compiled by nvcc for CUDA, and through cli_kernels_cpu.cc by the host compiler for the CPU
/// platform.
namespace mscclpp::ep::cli::MSCCLPP_PLATFORM_NS {
namespace {

using namespace mscclpp::device;

#if MSCCLPP_PLATFORM_CUDA
constexpr int kThreads = 256;
constexpr unsigned kBlocks = 264;
#else
constexpr int kThreads = 32;
constexpr unsigned kBlocks = 2;
#endif
/// Columns that a thread works on at a time: 16 bytes of bf16.
constexpr int kColumns = 8;
constexpr int kColumnsPerScale = 128;

__device__ inline void loadColumns(const ExpertsArgs& a, std::int64_t row, int column,
                                   float (&v)[kColumns]) {
  const auto at = static_cast<std::size_t>(row) * static_cast<std::size_t>(a.hidden) +
                  static_cast<std::size_t>(column);
  if (a.scales == nullptr) {
    widenBf16(v, load16(a.x + at * 2));
    return;
  }
  const float scale = a.scales[row * a.scaleCount + column / kColumnsPerScale];
  for (int i = 0; i < kColumns; ++i) {
    v[i] = e4m3ToFloat(static_cast<std::uint8_t>(a.x[at + static_cast<std::size_t>(i)])) * scale;
  }
}

__device__ inline void expertsKernel(const ExpertsArgs& a) {
  for (std::int64_t row = blockIndex(); row < a.rows; row += gridSize()) {
    for (int column = static_cast<int>(threadIndex()) * kColumns; column < a.hidden;
         column += static_cast<int>(blockSize()) * kColumns) {
      float x[kColumns], sum[kColumns] = {};
      loadColumns(a, row, column, x);
      for (int k = 0; k < a.topk; ++k) {
        const std::int64_t expert = a.topkIdx[row * a.topk + k];
        if (expert < 0) continue;
        const float weight = a.topkWeights[row * a.topk + k];
        for (int i = 0; i < kColumns; i += 2) {
          float even = x[i], odd = x[i + 1];
          applyExpert(a.experts[expert], even, odd);
          sum[i] += weight * even;
          sum[i + 1] += weight * odd;
        }
      }
      if (row == a.plantedRow && column == 0) sum[0] += 1.0f;
      store16(a.y + row * a.hidden + column, narrowBf16(sum));
    }
  }
}

__device__ inline void compareKernel(const CompareArgs& a) {
  const auto* actual = reinterpret_cast<const std::uint32_t*>(a.actual);
  const auto* expected = reinterpret_cast<const std::uint32_t*>(a.expected);
  const std::uint64_t words = a.bytes / 4;
  const std::uint64_t step = std::uint64_t{gridSize()} * blockSize();
  std::uint64_t wrong = 0;
  for (std::uint64_t i = std::uint64_t{blockIndex()} * blockSize() + threadIndex(); i < words;
       i += step) {
    wrong += actual[i] != expected[i] ? 1 : 0;
  }
  if (wrong > 0) fetchAddRelaxed(a.wrong, wrong);
}

__device__ inline void clockKernel(const ClockArgs& a) {
  const WaitControl wait{nullptr, a.limitNs, 0};
  for (std::uint64_t round = 1; round <= a.rounds; ++round) {
    const bool asked = waitUntil(
        wait, [&] { return loadAcquire(&a.words->asked) >= round; }, WaitPoint{}, &a.words->asked);
    if (!asked) return;
    a.words->now = nanoseconds();
    storeRelease(&a.words->answered, round);
  }
}

void launchExperts(const ExpertsArgs& args, void* stream) {
  if (args.rows == 0) return;
  launch<expertsKernel, kThreads>({kBlocks, kThreads, 0}, static_cast<NativeStream>(stream), args);
}

void launchCompare(const CompareArgs& args, void* stream) {
  if (args.bytes == 0) return;
  launch<compareKernel, kThreads>({kBlocks, kThreads, 0}, static_cast<NativeStream>(stream), args);
}

void launchClock(const ClockArgs& args, void* stream) {
  launch<clockKernel, 1>({1, 1, 0}, static_cast<NativeStream>(stream), args);
}

void prepareAll([[maybe_unused]] int index) {
#if MSCCLPP_PLATFORM_CUDA
  if (const cudaError_t result = cudaSetDevice(index); result != cudaSuccess) {
    throw CudaError(static_cast<int>(result),
                    std::string("cudaSetDevice failed: ") + cudaGetErrorString(result));
  }
#endif
  prepare<expertsKernel, kThreads, ExpertsArgs>(0);
  prepare<compareKernel, kThreads, CompareArgs>(0);
  prepare<clockKernel, 1, ClockArgs>(0);
}

}  // namespace

const CliKernels& cliKernels() {
  static const CliKernels kernels{prepareAll, launchExperts, launchCompare, launchClock};
  return kernels;
}

}  // namespace mscclpp::ep::cli::MSCCLPP_PLATFORM_NS
