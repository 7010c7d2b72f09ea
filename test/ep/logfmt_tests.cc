// The format of use_logfmt by itself: what comes out is as near as plan/logfmt.hpp says.
#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <random>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "ext/ep/plan/logfmt.hpp"
#include "ext/ep/plan/low_latency_plan.hpp"
#include "ext/ep/reference_low_latency.hpp"

namespace mscclpp::ep::reference {
namespace {

using ::testing::Each;
using ::testing::ElementsAre;
using ::testing::Truly;

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kLargest = std::numeric_limits<float>::max();
constexpr float kDenormal = std::numeric_limits<float>::denorm_min();

std::uint32_t bitsOf(float value) {
  return std::bit_cast<std::uint32_t>(value);
}
float largestOf(const std::vector<float>& row) {
  float largest = 0;
  for (const float value : row) largest = std::max(largest, std::fabs(value));
  return largest;
}
std::uint32_t scaleOf(const std::vector<float>& group) {
  logfmt::Extremes extremes;
  for (const float value : group) extremes.include(bitsOf(value));
  return logfmt::scaleOf(extremes);
}

/// Groups of any length, spread over 2^-30 .. 2^30 octaves and at any height.
std::vector<float> randomGroup(std::mt19937_64& random) {
  const auto uniform = [&] { return static_cast<double>(random() % 65536) / 65536; };
  const double spread = uniform() * 24, top = uniform() * 200 - 100;
  std::vector<float> group(1 + random() % logfmt::kGroupValues);
  for (float& value : group) {
    value = static_cast<float>(std::exp2(top - spread * uniform()));
    if (random() % 2 != 0) value = -value;
    if (random() % 16 == 0) value = 0;
  }
  return group;
}

/// A value is off by at most half a step, and tiny ones may vanish.
TEST(EpLogfmt, ErrorsStayWithinHalfAStep) {
  std::mt19937_64 random(1);
  for (int i = 0; i < 20000; ++i) {
    const std::vector<float> group = randomGroup(random), back = asLogfmt(group);
    const std::uint32_t scale = scaleOf(group);
    const double octaves = (scale >> 16) / 128.0, half = octaves / (2 * logfmt::kSteps);
    ASSERT_LE(octaves, 16);
    for (std::size_t v = 0; v < group.size(); ++v) {
      const double value = group[v], error = std::fabs(back[v] - value);
      if (std::fabs(group[v]) < std::bit_cast<float>(scale << 16)) {
        ASSERT_EQ(back[v], 0.0f);
        ASSERT_LT(std::fabs(value), std::ldexp(largestOf(group), -16) * (1 + 1.0 / 128));
      } else {
        ASSERT_LE(error, std::fabs(value) * (half + 1e-5)) << value << " became " << back[v];
      }
      ASSERT_EQ(std::signbit(back[v]), std::signbit(group[v]));
    }
  }
}

TEST(EpLogfmt, EveryCodeKeepsItsValueAndTheScalesEndsAreExact) {
  for (std::uint32_t span = 0; span <= logfmt::kMostSpan; ++span) {
    const std::uint32_t low = 0x3F21, scale = low | span << 16;
    const auto encoder = logfmt::Encoder::make(scale);
    const auto decoder = logfmt::Decoder::make(scale);
    ASSERT_EQ(decoder.valueBits(1), low << 16);
    ASSERT_EQ(decoder.valueBits(511), (low + span) << 16);
    for (std::uint32_t code = 0; code < 1024; ++code) {
      if (span == 0 && (code & 0x1FFu) > 1) continue;
      ASSERT_EQ(encoder.code(decoder.valueBits(code)), code) << "span " << span;
    }
  }
}

TEST(EpLogfmt, ZerosKeepTheirSigns) {
  const std::vector<float> back = asLogfmt({0.0f, -0.0f, 3.0f, -5.0f});
  EXPECT_EQ(bitsOf(back[0]), bitsOf(0.0f));
  EXPECT_EQ(bitsOf(back[1]), bitsOf(-0.0f));
  EXPECT_EQ(back[2], 3.0f);
  EXPECT_EQ(back[3], -5.0f);
  const std::vector<float> none = asLogfmt({0.0f, -0.0f});
  EXPECT_EQ(bitsOf(none[0]), bitsOf(0.0f));
  EXPECT_EQ(bitsOf(none[1]), bitsOf(-0.0f));
}

/// One magnitude: exact when 8 bits hold it, else as near as the narrowest scale is.
TEST(EpLogfmt, EqualValues) {
  EXPECT_THAT(asLogfmt(std::vector<float>(56, -1.5f)), Each(-1.5f));
  EXPECT_THAT(asLogfmt({kLargest}), ElementsAre(kInfinity)) << "as bf16 rounds it";
  const float value = 1.2345678f;
  for (const float back : asLogfmt(std::vector<float>(56, value))) {
    EXPECT_NEAR(back, value, std::ldexp(1.0f, -17) * value);
  }
}

TEST(EpLogfmt, DenormalsComeNear) {
  EXPECT_THAT(asLogfmt({kDenormal, -kDenormal, 0.0f}),
              Each(Truly([](float value) { return std::fabs(value) <= std::ldexp(1.0f, -133); })));
  const float small = std::ldexp(1.0f, -128);
  const std::vector<float> back = asLogfmt({small, 0.75f * small, kDenormal});
  EXPECT_EQ(back[0], small);
  EXPECT_NEAR(back[1], 0.75f * small, std::ldexp(1.0f, -126) / 1020);
}

/// Whatever else a group holds, zeros too; its neighbours do not notice.
TEST(EpLogfmt, AGroupThatIsNotFiniteBecomesNan) {
  for (const float bad : {kInfinity, -kInfinity, std::nanf("")}) {
    std::vector<float> row(3 * logfmt::kGroupValues - 1, 2.0f);
    row[logfmt::kGroupValues] = bad;
    row[logfmt::kGroupValues + 7] = 0.0f;
    const std::vector<float> back = asLogfmt(row);
    for (std::size_t i = 0; i < row.size(); ++i) {
      EXPECT_EQ(std::isnan(back[i]), i / logfmt::kGroupValues == 1) << i;
    }
  }
}

TEST(EpLogfmt, TinyValuesDoNotSpoilTheSteps) {
  const std::vector<float> back = asLogfmt({1000.0f, 777.0f, 1e-30f, -0.02f});
  EXPECT_EQ(back[0], 1000.0f);
  EXPECT_NEAR(back[1], 777.0f, 777.0f * 16 / 1020);
  EXPECT_EQ(back[2], 0.0f);
  EXPECT_NEAR(back[3], -0.02f, 0.02f * 16.1f / 1020);
}

/// Half the steps round up and half down: sums of many rows do not drift.
TEST(EpLogfmt, RoundingIsToTheNearest) {
  std::mt19937_64 random(2);
  double sum = 0, back = 0;
  for (int i = 0; i < 2000; ++i) {
    std::vector<float> group(logfmt::kGroupValues);
    for (float& value : group) value = static_cast<float>(1 + random() % 100000);
    for (const float value : group) sum += value;
    for (const float value : asLogfmt(group)) back += value;
  }
  EXPECT_NEAR(back / sum, 1, 1e-4);
}

TEST(EpLogfmt, CodesOfAUnitAreKeptApart) {
  logfmt::CodeUnit unit;
  const std::uint32_t codes[8] = {0, 1023, 0x155, 0x2AA, 511, 512, 1, 1022};
  for (int i = 0; i < 8; ++i) unit.set(i, codes[i]);
  for (int i = 0; i < 8; ++i) EXPECT_EQ(unit.at(i), codes[i]);
  EXPECT_LT(unit.high, 1u << 16);
}

/// Calls with and without use_logfmt share a region: its size does not depend on it.
TEST(EpLogfmt, RowsTakeNoMoreLinesThanBf16) {
  EXPECT_EQ(logfmt::rowLines(bf16Units(7168)), 80);
  EXPECT_EQ(linesFor(static_cast<std::size_t>(bf16Units(7168))), 128u);
  for (int hidden = 8; hidden <= 16384; hidden += 8) {
    const int units = bf16Units(hidden);
    const auto lines = static_cast<std::size_t>(logfmt::rowLines(units));
    ASSERT_LE(lines, linesFor(static_cast<std::size_t>(units))) << hidden;
    ASSERT_LE(CombineArea::make(3, 5, 8, units, true).total(),
              CombineArea::make(3, 5, 8, units).total());
  }
}

}  // namespace
}  // namespace mscclpp::ep::reference
