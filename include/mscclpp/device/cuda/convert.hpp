#pragma once

#include <cstdint>

#include <mscclpp/device/convert_bits.hpp>
#include <mscclpp/device/vec16.hpp>

/// CUDA half of <mscclpp/device/convert.hpp>: the hardware's conversions, same bits as the CPU's.
namespace mscclpp::device {
inline namespace cuda {

__device__ __forceinline__ float bf16ToFloat(uint16_t value) {
  return ::__uint_as_float(static_cast<uint32_t>(value) << 16);
}
__device__ __forceinline__ uint16_t floatToBf16(float value) {
  uint16_t result;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(result) : "f"(value));
  return result;
}
__device__ __forceinline__ uint8_t floatToE4m3(float value) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
  uint16_t pair;  // the first operand goes to the high byte
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(0.0f), "f"(value));
  return static_cast<uint8_t>(pair);
#else
  return bits::floatToE4m3(::__float_as_uint(value));
#endif
}
/// Four values, the first in the low byte.
__device__ __forceinline__ uint32_t narrowE4m3(const float (&in)[4]) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
  uint16_t low, high;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(low) : "f"(in[1]), "f"(in[0]));
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(high) : "f"(in[3]), "f"(in[2]));
  return low | static_cast<uint32_t>(high) << 16;
#else
  return floatToE4m3(in[0]) | static_cast<uint32_t>(floatToE4m3(in[1])) << 8 |
         static_cast<uint32_t>(floatToE4m3(in[2])) << 16 |
         static_cast<uint32_t>(floatToE4m3(in[3])) << 24;
#endif
}
__device__ __forceinline__ float e4m3ToFloat(uint8_t value) {
  return ::__uint_as_float(bits::e4m3ToFloat(value));
}

__device__ __forceinline__ void widenBf16(float (&out)[8], Vec16 in) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    out[2 * i] = ::__uint_as_float(in.w[i] << 16);
    out[2 * i + 1] = ::__uint_as_float(in.w[i] & 0xFFFF0000u);
  }
}
__device__ __forceinline__ void addBf16(float (&sum)[8], Vec16 in) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    sum[2 * i] = ::__fadd_rn(sum[2 * i], ::__uint_as_float(in.w[i] << 16));
    sum[2 * i + 1] = ::__fadd_rn(sum[2 * i + 1], ::__uint_as_float(in.w[i] & 0xFFFF0000u));
  }
}
__device__ __forceinline__ Vec16 narrowBf16(const float (&in)[8]) {
  Vec16 out;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(out.w[i]) : "f"(in[2 * i + 1]), "f"(in[2 * i]));
  }
  return out;
}

}  // namespace cuda
}  // namespace mscclpp::device
