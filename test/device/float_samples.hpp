#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <vector>

namespace mscclpp::test {

/// Bit patterns that conversions get wrong: every e4m3 value and bf16 value as a float, its
/// neighbours, the midpoints between neighbours and theirs, denormals, infinities, NaNs, and
/// pseudo-random ones.
inline std::vector<uint32_t> floatSamples() {
  std::vector<uint32_t> samples;
  const auto around = [&](uint32_t bits) {
    for (uint32_t sign : {0u, 0x80000000u}) {
      for (int32_t step = -2; step <= 2; ++step) {
        samples.push_back((bits + static_cast<uint32_t>(step)) ^ sign);
      }
    }
  };
  // e4m3: all magnitudes below 512 in steps of half a unit in the last place.
  for (int exponent = -6; exponent <= 8; ++exponent) {
    for (int sixteenth = 16; sixteenth < 32; ++sixteenth) {
      around(std::bit_cast<uint32_t>(std::ldexp(static_cast<float>(sixteenth), exponent - 4)));
    }
  }
  for (int half = 0; half <= 16; ++half) {  // denormal results: multiples of 2^-10
    around(std::bit_cast<uint32_t>(std::ldexp(static_cast<float>(half), -10)));
  }
  for (uint32_t bf16 = 0; bf16 < 0x8000; bf16 += 7) {
    around(bf16 << 16);
    around(bf16 << 16 | 0x8000u);  // the midpoint to the next
  }
  for (uint32_t special : {0u, 1u, 0x007FFFFFu, 0x00800000u, 0x7F7FFFFFu, 0x7F800000u, 0x7F800001u,
                           0x7FC00000u, 0x7FFFFFFFu, 0x43E00000u, 0x43E80000u, 0x44000000u}) {
    around(special);
  }
  uint32_t random = 12345;
  for (int i = 0; i < 100000; ++i) {
    random = random * 1664525u + 1013904223u;
    samples.push_back(random);
    // And in e4m3's range.
    samples.push_back((random & 0x80FFFFFFu) | (0x3B000000u + (random >> 7 & 0x0F000000u)));
  }
  return samples;
}

}  // namespace mscclpp::test
