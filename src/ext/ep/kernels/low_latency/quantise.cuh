#pragma once

#include "group.cuh"

/// Rows as e4m3 with one scale per 128 values.
namespace mscclpp::ep::MSCCLPP_PLATFORM_NS {

/// What a block's values are divided by: their largest magnitude over 448, rounded up to a power of
/// two if so wanted. Blocks of tiny values keep a scale that can be inverted.
struct Scale {
  float forward;  ///< value * forward fits e4m3
  float scale;    ///< the receiver multiplies by it
};
__device__ __forceinline__ Scale scaleFor(float largest, bool round) {
  constexpr float kMost = 448.0f, kLeast = 1e-4f;
  const float amax = largest > kLeast ? largest : kLeast;
  const float scale = amax * (1.0f / kMost);
  if (!round) return {kMost / amax, scale};
  const std::uint32_t bits = floatToBits(scale);
  const std::uint32_t exponent = (bits >> 23) + ((bits & 0x7FFFFFu) != 0 ? 1u : 0u);
  return {bitsToFloat((254u - exponent) << 23), bitsToFloat(exponent << 23)};
}

/// Writes a row's units to shared memory: values, then scales. Sixteen values a thread, eight
/// neighbouring threads a scale. All threads; a barrier must follow.
__device__ __forceinline__ void quantiseRow(const char* source, int hidden, bool round,
                                            Vec16* row) {
  const int units = e4m3ValueUnits(hidden), pieces = bf16Units(hidden);
  auto* const scales = reinterpret_cast<float*>(row + units);
  const int whole = (units + 7) / 8 * 8;  // all eight threads of a scale take part
  for (int base = static_cast<int>(warpId()) * 32; base < whole; base += kLowLatencyThreads) {
    const int unit = base + static_cast<int>(laneId());
    float value[16];
    float largest = 0.0f;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int piece = 2 * unit + half;
      const Vec16 v =
          piece < pieces ? loadStreaming16(source + static_cast<std::size_t>(piece) * 16) : Vec16{};
      float part[8];
      widenBf16(part, v);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        value[8 * half + i] = part[i];
        const float magnitude = part[i] < 0.0f ? -part[i] : part[i];
        largest = magnitude > largest ? magnitude : largest;
      }
    }
#pragma unroll
    for (int distance = 1; distance < 8; distance *= 2) {
      const float other = shuffleXor(largest, distance);
      largest = other > largest ? other : largest;
    }
    const Scale scale = scaleFor(largest, round);
    if (unit >= units) continue;
    Vec16 out;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float scaled[4] = {value[4 * i] * scale.forward, value[4 * i + 1] * scale.forward,
                               value[4 * i + 2] * scale.forward, value[4 * i + 3] * scale.forward};
      out.w[i] = narrowE4m3(scaled);
    }
    row[unit] = out;
    if (unit % 8 == 0) scales[unit / 8] = scale.scale;
  }
}

/// Sixteen values of a row. Rows of an odd number of eights are only 8-byte aligned, and end in
/// half a unit.
__device__ __forceinline__ void storeValues(char* row, int unit, int hidden, Vec16 v) {
  char* const to = row + static_cast<std::size_t>(unit) * 16;
  if (hidden % 16 == 0) {
    store16(to, v);
    return;
  }
  auto* const halves = reinterpret_cast<std::uint64_t*>(to);
  halves[0] = v.w[0] | static_cast<std::uint64_t>(v.w[1]) << 32;
  if (unit * 16 + 16 <= hidden) halves[1] = v.w[2] | static_cast<std::uint64_t>(v.w[3]) << 32;
}

/// Four scales of a row: a column each, or as one word of UE8M0 exponents.
__device__ __forceinline__ void storeScales(const LowLatencyDispatchArgs& a, int slot, int local,
                                            int unit, Vec16 v) {
  const int blocks = scaleBlocks(a.hidden);
  const std::int64_t rows = rowsPerExpert(a);
  const std::int64_t row = slot - local * rows;
  if (a.packedScales) {
    std::uint32_t packed = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (unit * 4 + i < blocks) packed |= (v.w[i] >> 23) << (8 * i);
    }
    const std::int64_t column = static_cast<std::int64_t>(local) * ((blocks + 3) / 4) + unit;
    static_cast<std::uint32_t*>(a.recvScales)[column * rows + row] = packed;
    return;
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int block = unit * 4 + i;
    const std::int64_t column = static_cast<std::int64_t>(local) * blocks + block;
    if (block < blocks) static_cast<std::uint32_t*>(a.recvScales)[column * rows + row] = v.w[i];
  }
}

}  // namespace mscclpp::ep::MSCCLPP_PLATFORM_NS
