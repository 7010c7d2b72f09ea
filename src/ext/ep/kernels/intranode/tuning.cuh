#pragma once

#include <cstddef>
#include <cstdint>

#include <mscclpp/device/device.hpp>

/// Shapes of the pipelines. The CUDA values won the measurements in docs/kernels.md; the CPU
/// platform runs the same code with few threads, since there a thread costs time and hides no
/// latency.
namespace mscclpp::ep::MSCCLPP_PLATFORM_NS {

/// What a block may use of a Hopper SM's shared memory.
inline constexpr std::size_t kSharedBytes = 227 * 1024;
#if MSCCLPP_PLATFORM_CUDA
inline constexpr int kNotifyThreads = 1024;
inline constexpr int kLayoutThreads = 256;
inline constexpr int kConsumerWarps = 7;
inline constexpr int kPiecesPerThread = 4;
inline constexpr int kInPlacePipes = 3;
#else
inline constexpr int kNotifyThreads = 64;
inline constexpr int kLayoutThreads = 64;
inline constexpr int kConsumerWarps = 1;
inline constexpr int kPiecesPerThread = 16;
inline constexpr int kInPlacePipes = 2;
#endif
inline constexpr int kStagedPipes = 2;

/// Rows of at least this size keep one issuing thread busy; smaller ones need two.
inline constexpr std::uint32_t kWideRowBytes = 8192 + 1;

/// A dispatch pipeline: Stages rows in shared memory, Ahead of them being loaded.
struct WideRows {
  static constexpr int kStages = 8, kAhead = 4, kPipes = 1;
};
struct NarrowRows {
  static constexpr int kStages = 7, kAhead = 3, kPipes = 2;
};
/// Combine's pipelines: Pipes rings of Stages rows; MoveStages rows for staging.
struct InPlace {
  static constexpr int kPipes = kInPlacePipes, kStages = 5, kMoveStages = 0, kGroupTokens = 1;
};
struct Staged {
  static constexpr int kPipes = kStagedPipes, kStages = 4, kMoveStages = 6, kGroupTokens = 8;
};
/// A pipe's consumers keep this much of a row in registers.
inline constexpr std::uint32_t kReduceBytes = kConsumerWarps * 32 * kPiecesPerThread * 16;

/// The largest part of a row, a multiple of 16 and at most `most`, of which `stages` fit beside
/// `other` bytes.
constexpr std::uint32_t partBytes(std::uint32_t rowBytes, int stages, std::size_t other,
                                  std::size_t most = kSharedBytes) {
  const std::size_t fit = (kSharedBytes - other) / static_cast<std::size_t>(stages) / 128 * 128;
  const std::size_t limit = fit < most ? fit : most;
  const std::size_t parts = (rowBytes + limit - 1) / limit;
  const std::size_t part = parts <= 1 ? rowBytes : (rowBytes + parts - 1) / parts;
  return static_cast<std::uint32_t>((part + 15) / 16 * 16);
}

}  // namespace mscclpp::ep::MSCCLPP_PLATFORM_NS
