#pragma once

#include <cstddef>
#include <cstdint>

#include <mscclpp/device/line_types.hpp>

/// Rows of a combine with use_logfmt: a value is its sign and 9 bits on a logarithmic scale, 5/8 of
/// the bytes of bf16. Integers only, so that every platform computes the same bits.
///
/// The bits of a positive float, read as a whole number, grow with its logarithm (linear inside a
/// power of two): a step of 2^23 is one octave. A group of 56 values, a line of bf16, has its own
/// scale from its smallest to its largest magnitude. Code 0 is zero, codes 1 .. 511 are 510 equal
/// steps of the scale, so a value is off by at most step / 2 = range / 1020 (range in octaves, at
/// most 16: 1.6 %; typically 8 octaves: 0.8 %), and rounded to the nearest of what there is.
/// - Magnitudes below 2^-16 of a group's largest (rounded up to 8 bits) become zero.
/// - Below 2^-126 steps are equal differences: there the error is at most 2^-126 / 1020.
/// - A group that has an infinity or a NaN comes out as NaN.
namespace mscclpp::ep::logfmt {

/// A unit is the 8 values of 16 bytes of bf16; a group is what a line of bf16 holds.
inline constexpr int kUnitValues = 8;
inline constexpr int kGroupUnits = device::kLineUnits;
inline constexpr int kGroupValues = kGroupUnits * kUnitValues;

/// A group's scale is a word that travels in a line's tail: its lower end as the upper half of a
/// float, and above that its length in 2^16, so that 128 are an octave.
inline constexpr std::uint32_t kMostSpan = 16 * 128;
inline constexpr std::uint32_t kNotFinite = 0x7FFF;  ///< the scale of a group that comes out as NaN
inline constexpr std::uint32_t kSteps = 510;

constexpr std::uint32_t mulHigh(std::uint32_t a, std::uint32_t b) {
  return static_cast<std::uint32_t>(static_cast<std::uint64_t>(a) * b >> 32);
}

/// The extremes of magnitudes, as bits of floats; zeros count for the largest only.
struct Extremes {
  std::uint32_t least = 0xFFFFFFFFu;
  std::uint32_t most = 0;

  constexpr void include(std::uint32_t valueBits) {
    const std::uint32_t magnitude = valueBits & 0x7FFFFFFFu;
    include({magnitude != 0 ? magnitude : 0xFFFFFFFFu, magnitude});
  }
  constexpr void include(const Extremes& other) {
    if (other.least < least) least = other.least;
    if (other.most > most) most = other.most;
  }
};
constexpr std::uint32_t scaleOf(const Extremes& group) {
  if (group.most >= 0x7F800000u) return kNotFinite;
  if (group.most == 0) return 0;
  const std::uint32_t high = (group.most + 0xFFFFu) >> 16;
  std::uint32_t low = group.least >> 16;
  if (high - low > kMostSpan) low = high - kMostSpan;
  return low | (high - low) << 16;
}

/// Values of a group -> codes of 10 bits.
struct Encoder {
  std::uint32_t low;    ///< the scale's lower end
  std::uint32_t least;  ///< magnitudes below it have code 0
  std::uint32_t steps;  ///< per 2^16 of the scale, 2^22

  static constexpr Encoder make(std::uint32_t scale) {
    if (scale == kNotFinite) return {0, 0, 0};  // nothing may become zero
    const std::uint32_t low = scale << 16, span = scale >> 16;
    return {low, low != 0 ? low : 1, span != 0 ? (kSteps << 22) / span : 0};
  }
  constexpr std::uint32_t code(std::uint32_t valueBits) const {
    const std::uint32_t sign = valueBits >> 31 << 9, magnitude = valueBits & 0x7FFFFFFFu;
    if (magnitude < least) return sign;
    // Steps from the lower end in 2^-10, rounded to nearest.
    return sign | (1 + ((mulHigh((magnitude - low) << 4, steps) + 512) >> 10));
  }
};

/// Codes -> bits of floats.
struct Decoder {
  std::uint32_t low;
  std::uint32_t span;  ///< shifted so that mulHigh() with kPerStep divides it by the steps

  static constexpr std::uint32_t kPerStep = 134744073;  ///< 2^36 / 510, rounded up
  static constexpr Decoder make(std::uint32_t scale) { return {scale << 16, scale >> 16 << 12}; }
  constexpr std::uint32_t valueBits(std::uint32_t code) const {
    const std::uint32_t sign = code >> 9 << 31, step = code & 0x1FFu;
    return step == 0 ? sign : sign | (low + mulHigh((step - 1) * span, kPerStep));
  }
};

/// The codes of a unit as they travel: the low bytes of all, and their upper two bits.
struct CodeUnit {
  std::uint32_t low[2] = {};
  std::uint32_t high = 0;  ///< 16 bits

  constexpr void set(int i, std::uint32_t code) {
    low[i / 4] |= (code & 0xFFu) << (i % 4 * 8);
    high |= (code >> 8) << (i * 2);
  }
  constexpr std::uint32_t at(int i) const {
    return (low[i / 4] >> (i % 4 * 8) & 0xFFu) | (high >> (i * 2) & 3u) << 8;
  }
};

/// A block: 8 lines of bf16, which become 5. The last block of a row may be shorter. Its payload is
/// the low bytes of all units, then their upper bits; the scale of group g is in word g % 2 of the
/// tail of line g / 2.
inline constexpr int kBlockUnits = 8 * kGroupUnits;
inline constexpr int kBlockLines = 5;
inline constexpr int kUnitBytes = 10;
inline constexpr int kLinePayload = device::kLineUnits * static_cast<int>(sizeof(device::Vec16));

/// Bytes of the payload in front of a unit's low bytes and of its upper bits.
constexpr int lowAt(int unit) {
  return 8 * unit;
}
constexpr int highAt(int units, int unit) {
  return 8 * units + 2 * unit;
}
constexpr int blockLines(int units) {
  return (units * kUnitBytes + kLinePayload - 1) / kLinePayload;
}
/// Lines of a row of `units` units of bf16.
constexpr int rowLines(int units) {
  return units / kBlockUnits * kBlockLines + blockLines(units % kBlockUnits);
}
/// Units of block `block` of a row.
constexpr int unitsOfBlock(int rowUnits, int block) {
  const int left = rowUnits - block * kBlockUnits;
  return left < kBlockUnits ? left : kBlockUnits;
}

/// Whatever the length: no more lines than bf16 takes, and room for the scales in their tails.
constexpr bool everyBlockFits() {
  for (int units = 1; units <= kBlockUnits; ++units) {
    const int groups = (units + kGroupUnits - 1) / kGroupUnits;
    if (blockLines(units) > groups || 2 * blockLines(units) < groups) return false;
  }
  return blockLines(kBlockUnits) == kBlockLines;
}
static_assert(everyBlockFits());

}  // namespace mscclpp::ep::logfmt
