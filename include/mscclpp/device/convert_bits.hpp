#pragma once

#include <cstdint>

#include <mscclpp/device/platform.hpp>

/// Conversions in integer arithmetic: the definition of the bits. The CPU platform uses them as
/// they are; the CUDA platform uses the hardware's where it has them, and these below sm_89.
namespace mscclpp::device {
inline namespace MSCCLPP_PLATFORM_NS {
namespace bits {

/// float -> bf16, round to nearest even; every NaN becomes 0x7FFF (as the hardware does).
__host__ __device__ constexpr uint16_t floatToBf16(uint32_t f) {
  if ((f & 0x7FFFFFFFu) > 0x7F800000u) return 0x7FFF;
  return static_cast<uint16_t>((f + 0x7FFFu + ((f >> 16) & 1u)) >> 16);
}

/// float -> e4m3 (finite-only variant "e4m3fn"): round to nearest even, saturating: anything above
/// 448, infinity too, becomes 448; every NaN becomes 0x7F.
__host__ __device__ constexpr uint8_t floatToE4m3(uint32_t f) {
  const uint32_t sign = (f >> 24) & 0x80u;
  const uint32_t magnitude = f & 0x7FFFFFFFu;
  if (magnitude > 0x7F800000u) return 0x7F;
  if (magnitude >= 0x43E00000u) return static_cast<uint8_t>(sign | 0x7Eu);  // >= 448
  if (magnitude >= 0x3C800000u) {                                           // >= 2^-6: normal
    // Keep 3 of 23 fraction bits; the carry of the rounding may move to the next exponent.
    const uint32_t rounded = magnitude + 0x7FFFFu + ((magnitude >> 20) & 1u);
    return static_cast<uint8_t>(sign | ((rounded >> 20) - ((127u - 7u) << 3)));
  }
  // Denormal results are multiples of 2^-9: count them with round to nearest even.
  const uint32_t exponent = magnitude >> 23;
  if (exponent < 127u - 10u) return static_cast<uint8_t>(sign);  // < 2^-10: below half of 2^-9
  const uint32_t mantissa = (magnitude & 0x7FFFFFu) | 0x800000u;
  const uint32_t shift = 127u - 9u + 23u - exponent;  // mantissa * 2^(exponent-150) = n * 2^-9
  const uint32_t kept = mantissa >> shift;
  const uint32_t rest = mantissa & ((1u << shift) - 1u);
  const uint32_t half = 1u << (shift - 1u);
  const uint32_t up = (rest > half || (rest == half && (kept & 1u))) ? 1u : 0u;
  return static_cast<uint8_t>(sign | (kept + up));
}

/// e4m3 -> float bits, exact; NaN (0x7F, 0xFF) becomes 0x7FFFFFFF.
__host__ __device__ constexpr uint32_t e4m3ToFloat(uint8_t value) {
  const uint32_t sign = (value & 0x80u) << 24;
  const uint32_t magnitude = value & 0x7Fu;
  if (magnitude == 0x7Fu) return 0x7FFFFFFFu;
  if (magnitude >= 8u) return sign | ((magnitude << 20) + ((127u - 7u) << 23));
  if (magnitude == 0u) return sign;
  // n * 2^-9 with n in 1..7: normalise.
  const uint32_t top = magnitude >= 4u ? 2u : (magnitude >= 2u ? 1u : 0u);
  return sign | ((127u - 9u + top) << 23) | ((magnitude << (23u - top)) & 0x7FFFFFu);
}

}  // namespace bits
}  // namespace MSCCLPP_PLATFORM_NS
}  // namespace mscclpp::device
