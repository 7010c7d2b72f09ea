#pragma once

#include <cstdint>

#include <mscclpp/platform.hpp>

#include "expert_function.hpp"

/// The program's own kernels, one source for both platforms. Pointers are device pointers.
namespace mscclpp::ep::cli {

/// All experts of a rank at once: y = sum over a row's local choices, in their order, of
/// weight * expert(x). The weights are applied here and nowhere else.
struct ExpertsArgs {
  const char* x = nullptr;        ///< bf16 [rows, hidden], or e4m3 when there are scales
  const float* scales = nullptr;  ///< [rows, scaleCount], one per 128 columns
  int scaleCount = 0;
  const std::int64_t* topkIdx = nullptr;  ///< [rows, topk], index among this rank's experts, or -1
  const float* topkWeights = nullptr;     ///< [rows, topk]
  const ExpertParameters* experts = nullptr;  ///< [local experts]
  std::uint16_t* y = nullptr;                 ///< bf16 [rows, hidden]
  std::int64_t rows = 0;
  int hidden = 0;  ///< a multiple of 8
  int topk = 0;
  /// Column 0 of this row's output is made wrong (the planted error of the demo's own test); -1 =
  /// none.
  std::int64_t plantedRow = -1;
};

/// Counts the differences between two pieces of memory.
struct CompareArgs {
  const char* actual = nullptr;
  const char* expected = nullptr;
  std::uint64_t bytes = 0;         ///< a multiple of 4
  std::uint64_t* wrong = nullptr;  ///< + number of 4-byte words that differ
};

/// Host memory in which a kernel is asked for the device's clock.
struct ClockWords {
  std::uint64_t asked = 0;     ///< by the host: rounds
  std::uint64_t answered = 0;  ///< by the kernel
  std::uint64_t now = 0;       ///< nanoseconds, of the last answer
};
struct ClockArgs {
  ClockWords* words = nullptr;
  std::uint64_t rounds = 0;
  std::uint64_t limitNs = 0;  ///< of one round; the kernel ends when it is over
};

struct CliKernels {
  /// Makes device `index` the calling thread's current one and loads the kernels there.
  void (*prepare)(int index);
  void (*experts)(const ExpertsArgs&, void* stream);
  void (*compare)(const CompareArgs&, void* stream);
  void (*clock)(const ClockArgs&, void* stream);
};

namespace cpu {
const CliKernels& cliKernels();
}
namespace cuda {
const CliKernels& cliKernels();
}

/// @throws Error unsupported for CUDA in a build without it.
const CliKernels& kernelsOf(Platform platform);

}  // namespace mscclpp::ep::cli
