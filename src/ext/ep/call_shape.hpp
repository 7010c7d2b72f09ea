#pragma once

#include <cstdint>
#include <string>

#include <mscclpp/ext/ep/types.hpp>

namespace mscclpp::ep {

/// What all ranks must pass alike to one call, packed into the 64 bits that travel with it. Equal
/// calls have equal signatures; an unequal one can be read back for the error message.
struct CallShape {
  enum class Operation : std::uint8_t { dispatch = 1, cachedDispatch = 2, combine = 3 };
  Operation operation = Operation::dispatch;
  std::int64_t hidden = 0;
  DType dtype = DType::bf16;
  int scales = 0;  ///< 0 = none, 1 = f32, 2 = i32
  int topk = 0;
  int experts = 0;
  std::uint64_t other = 0;  ///< numWorstTokens and the expert map; compared by a 12-bit hash

  static constexpr std::int64_t kMaxHidden = (std::int64_t{1} << 22) - 1;
  static constexpr int kMaxTopk = 32;
  static constexpr int kMaxExperts = (1 << 17) - 1;

  std::uint64_t pack() const;
  /// Words for a signature that came from another rank.
  static std::string describe(std::uint64_t signature);
};

}  // namespace mscclpp::ep
