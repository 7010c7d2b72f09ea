#pragma once

#include <bit>
#include <cstdint>

#include <mscclpp/device/convert_bits.hpp>
#include <mscclpp/device/vec16.hpp>

/// CPU half of <mscclpp/device/convert.hpp>. Also for host code.
namespace mscclpp::device {
inline namespace cpu {

inline float bf16ToFloat(uint16_t value) {
  return std::bit_cast<float>(static_cast<uint32_t>(value) << 16);
}
inline uint16_t floatToBf16(float value) {
  return bits::floatToBf16(std::bit_cast<uint32_t>(value));
}
inline uint8_t floatToE4m3(float value) {
  return bits::floatToE4m3(std::bit_cast<uint32_t>(value));
}
/// Four values, the first in the low byte.
inline uint32_t narrowE4m3(const float (&in)[4]) {
  return floatToE4m3(in[0]) | static_cast<uint32_t>(floatToE4m3(in[1])) << 8 |
         static_cast<uint32_t>(floatToE4m3(in[2])) << 16 |
         static_cast<uint32_t>(floatToE4m3(in[3])) << 24;
}
inline float e4m3ToFloat(uint8_t value) {
  return std::bit_cast<float>(bits::e4m3ToFloat(value));
}

inline void widenBf16(float (&out)[8], Vec16 in) {
  for (int i = 0; i < 4; ++i) {
    out[2 * i] = std::bit_cast<float>(in.w[i] << 16);
    out[2 * i + 1] = std::bit_cast<float>(in.w[i] & 0xFFFF0000u);
  }
}
inline void addBf16(float (&sum)[8], Vec16 in) {
  for (int i = 0; i < 4; ++i) {
    sum[2 * i] += std::bit_cast<float>(in.w[i] << 16);
    sum[2 * i + 1] += std::bit_cast<float>(in.w[i] & 0xFFFF0000u);
  }
}
inline Vec16 narrowBf16(const float (&in)[8]) {
  Vec16 out;
  for (int i = 0; i < 4; ++i) {
    out.w[i] = static_cast<uint32_t>(floatToBf16(in[2 * i])) |
               static_cast<uint32_t>(floatToBf16(in[2 * i + 1])) << 16;
  }
  return out;
}

}  // namespace cpu
}  // namespace mscclpp::device
