#pragma once

#include <cstdint>

/// Deterministic pseudo-random values by position: the same on every platform and in any order.
namespace mscclpp::ep::cli {

/// 64 well mixed bits of `x` (splitmix64).
constexpr std::uint64_t mixBits(std::uint64_t x) {
  x += 0x9e3779b97f4a7c15ull;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
  return x ^ (x >> 31);
}
constexpr std::uint64_t mixBits(std::uint64_t a, std::uint64_t b) {
  return mixBits(mixBits(a) ^ b);
}
constexpr std::uint64_t mixBits(std::uint64_t a, std::uint64_t b, std::uint64_t c) {
  return mixBits(mixBits(a, b) ^ c);
}

/// The top 24 bits as a float in [-1, 1).
constexpr float signedUnit(std::uint64_t bits) {
  return static_cast<float>(static_cast<std::int32_t>(bits >> 40) - (1 << 23)) * 0x1p-23f;
}

}  // namespace mscclpp::ep::cli
