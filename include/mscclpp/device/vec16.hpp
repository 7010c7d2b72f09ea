#pragma once

#include <cstdint>

namespace mscclpp::device {

/// 16 bytes that move in one access. Little endian: a bf16 pair is one word, element 0 in the low
/// half.
struct alignas(16) Vec16 {
  uint32_t w[4];
};

}  // namespace mscclpp::device
