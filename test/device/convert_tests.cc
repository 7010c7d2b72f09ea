// Conversions against slow references that work with exact values.

#include <array>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include <gtest/gtest.h>

#include <mscclpp/device/device.hpp>

#include "device/float_samples.hpp"

namespace mscclpp::test {
namespace {

using namespace mscclpp::device;  // NOLINT

// The value of an e4m3 pattern from its definition: 4 exponent bits (bias 7), 3 fraction bits, no
// infinities, NaN = all ones.
double e4m3Value(int pattern) {
  const int exponent = pattern >> 3 & 15;
  const int fraction = pattern & 7;
  const double magnitude =
      exponent == 0 ? std::ldexp(fraction, -9) : std::ldexp(8 + fraction, exponent - 7 - 3);
  return (pattern & 0x80) != 0 ? -magnitude : magnitude;
}

// Nearest by comparing with every finite pattern; of two equally near ones the even pattern.
int slowE4m3(float value) {
  if (std::isnan(value)) return 0x7F;
  const int sign = std::signbit(value) ? 0x80 : 0;
  const double magnitude = std::fabs(static_cast<double>(value));
  int best = 0;
  double bestDistance = std::numeric_limits<double>::infinity();
  for (int pattern = 0; pattern < 0x7F; ++pattern) {
    const double distance = std::fabs(magnitude - e4m3Value(pattern));
    if (distance < bestDistance || (distance == bestDistance && pattern % 2 == 0)) {
      best = pattern;
      bestDistance = distance;
    }
  }
  if (std::isinf(value)) best = 0x7E;
  return sign | best;
}

uint16_t slowBf16(float value) {
  if (std::isnan(value)) return 0x7FFF;
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const auto low = static_cast<uint16_t>(bits >> 16);  // towards zero
  if ((bits & 0xFFFFu) == 0) return low;
  const auto high = static_cast<uint16_t>(low + 1);  // away from zero; may be infinity
  // Beyond the largest bf16, rounding treats infinity as the next value of an endless exponent
  // range.
  const auto exact = [](uint16_t pattern) {
    if ((pattern & 0x7FFFu) == 0x7F80u) return std::ldexp((pattern & 0x8000u) ? -1.0 : 1.0, 128);
    return static_cast<double>(std::bit_cast<float>(uint32_t{pattern} << 16));
  };
  const double below = std::fabs(static_cast<double>(value) - exact(low));
  const double above = std::fabs(exact(high) - static_cast<double>(value));
  if (below != above) return below < above ? low : high;
  return low % 2 == 0 ? low : high;
}

TEST(Convert, EveryBf16RoundTrips) {
  for (uint32_t pattern = 0; pattern < 65536; ++pattern) {
    const float value = bf16ToFloat(static_cast<uint16_t>(pattern));
    ASSERT_EQ(std::bit_cast<uint32_t>(value), pattern << 16);
    const bool nan = (pattern & 0x7FFFu) > 0x7F80u;
    ASSERT_EQ(floatToBf16(value), nan ? 0x7FFFu : pattern) << std::hex << pattern;
  }
}

TEST(Convert, EveryE4m3RoundTrips) {
  for (int pattern = 0; pattern < 256; ++pattern) {
    const float value = e4m3ToFloat(static_cast<uint8_t>(pattern));
    if ((pattern & 0x7F) == 0x7F) {
      ASSERT_TRUE(std::isnan(value));
      ASSERT_EQ(floatToE4m3(value), 0x7F);
      continue;
    }
    ASSERT_EQ(static_cast<double>(value), e4m3Value(pattern)) << pattern;
    ASSERT_EQ(std::signbit(value), pattern >= 0x80);
    ASSERT_EQ(floatToE4m3(value), pattern);
  }
}

TEST(Convert, FloatToBf16IsTheNearest) {
  for (const uint32_t bits : floatSamples()) {
    const float value = std::bit_cast<float>(bits);
    ASSERT_EQ(floatToBf16(value), slowBf16(value)) << std::hex << bits;
  }
}

TEST(Convert, FloatToE4m3IsTheNearestAndSaturates) {
  size_t count = 0;
  for (const uint32_t bits : floatSamples()) {
    if (count++ > 60000 && count % 8 != 0) continue;  // the slow reference tries 127 patterns
    const float value = std::bit_cast<float>(bits);
    ASSERT_EQ(floatToE4m3(value), slowE4m3(value)) << std::hex << bits;
  }
  EXPECT_EQ(floatToE4m3(448.0f), 0x7E);
  EXPECT_EQ(floatToE4m3(464.0f), 0x7E) << "the tie between 448 and 480 saturates";
  EXPECT_EQ(floatToE4m3(1e30f), 0x7E);
  EXPECT_EQ(floatToE4m3(-std::numeric_limits<float>::infinity()), 0xFE);
  EXPECT_EQ(floatToE4m3(-0.0f), 0x80);
}

TEST(Convert, VectorsAreTheScalars) {
  Vec16 a{};
  Vec16 b{};
  for (uint32_t i = 0; i < 4; ++i) {
    a.w[i] = 0x3F803F00u + i * 0x00310017u;
    b.w[i] = 0xBE803E01u + i * 0x00070003u;
  }
  std::array<uint16_t, 8> partsA;
  std::array<uint16_t, 8> partsB;
  std::memcpy(partsA.data(), &a, sizeof a);
  std::memcpy(partsB.data(), &b, sizeof b);
  float sum[8];
  widenBf16(sum, a);
  for (size_t i = 0; i < 8; ++i) ASSERT_EQ(sum[i], bf16ToFloat(partsA[i]));
  addBf16(sum, b);
  for (size_t i = 0; i < 8; ++i) {
    ASSERT_EQ(sum[i], bf16ToFloat(partsA[i]) + bf16ToFloat(partsB[i]));
  }
  const Vec16 narrow = narrowBf16(sum);
  std::array<uint16_t, 8> parts;
  std::memcpy(parts.data(), &narrow, sizeof narrow);
  for (size_t i = 0; i < 8; ++i) ASSERT_EQ(parts[i], floatToBf16(sum[i]));
}

}  // namespace
}  // namespace mscclpp::test
