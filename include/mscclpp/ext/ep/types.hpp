#pragma once

#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include <mscclpp/platform.hpp>

namespace mscclpp::ep {

/// Element types that cross the API.
enum class DType : std::uint8_t { bf16, e4m3, f32, i32, i64, u8 };

/// Bytes of one element.
constexpr std::size_t sizeOf(DType dtype) {
  switch (dtype) {
    case DType::bf16:
      return 2;
    case DType::f32:
    case DType::i32:
      return 4;
    case DType::i64:
      return 8;
    case DType::e4m3:
    case DType::u8:
      return 1;
  }
  return 0;
}

/// Short name for messages: "bf16", "e4m3", ...
const char* nameOf(DType dtype);

/// Values that share one FP8 scale (the last block of a row may be partial).
inline constexpr int kScaleBlock = 128;

/// Scales of one FP8 row of `hidden` values: ceil(hidden / 128).
constexpr int scalesPerRow(std::int64_t hidden) {
  return static_cast<int>((hidden + kScaleBlock - 1) / kScaleBlock);
}

/// A dense tensor on one device. A default-constructed Tensor means "absent".
/// `owner` keeps the memory alive when the library made it; memory that the caller brings may leave
/// it empty and must then outlive the work enqueued on it.
struct Tensor {
  void* data = nullptr;
  DType dtype = DType::u8;
  std::vector<std::int64_t> shape;
  std::vector<std::int64_t> strides;  ///< in elements; empty = contiguous, row-major
  Platform platform = Platform::cpu;
  int deviceIndex = 0;
  std::shared_ptr<void> owner;

  /// False for an absent tensor. A tensor with zero elements is present and may have no memory.
  explicit operator bool() const { return present; }
  bool present = false;

  std::int64_t elements() const;
  std::size_t bytes() const { return static_cast<std::size_t>(elements()) * sizeOf(dtype); }
  bool contiguous() const;
  /// For messages: "bf16[4096, 7168]".
  std::string describe() const;

  template <class T>
  T* as() const {
    return static_cast<T*>(data);
  }
};

/// Where a call fits among the caller's own work.
struct StreamOrder {
  /// The caller's stream (borrowed cudaStream_t; null = host on the CPU platform, the default
  /// stream on CUDA). Outputs that belong to it must be dropped before it is destroyed.
  void* computeStream = nullptr;
  /// The communication waits for this event; null = for everything enqueued on computeStream.
  Event previousEvent;
  /// true: computeStream does not wait for the communication; wait for the returned event.
  bool asyncFinish = false;
  /// Outputs belong to the communication stream rather than to computeStream.
  bool allocateOnCommStream = false;
};

/// Tuning of one call. The chunk fields are deep_ep's; they size the hints and nothing else here.
struct Config {
  int numSms = 20;  ///< blocks per kernel, 1 or more (deep_ep demands an even number; we do not)
  int numMaxNvlChunkedSendTokens = 6;
  int numMaxNvlChunkedRecvTokens = 256;
  int numMaxRdmaChunkedSendTokens = 6;
  int numMaxRdmaChunkedRecvTokens = 256;

  /// Bytes for BufferOptions::numNvlBytes. Larger keeps more outputs in the peer-mapped pool;
  /// smaller costs staging copies, never correctness.
  std::size_t nvlBufferSizeHint(std::size_t hiddenBytes, int ranks) const;
  /// Bytes for BufferOptions::numRdmaBytes: rings of 8 rows per lane and node, for nodes of 8
  /// ranks; 0 for 8 ranks or fewer. More lets faster ranks run further ahead.
  std::size_t rdmaBufferSizeHint(std::size_t hiddenBytes, int ranks) const;
  /// Refuses values outside their ranges (ErrorCode::invalidArgument).
  void validate() const;
};

}  // namespace mscclpp::ep
