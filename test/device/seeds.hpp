#pragma once

#include <cstdint>
#include <cstdlib>

namespace mscclpp::test {

/// How many chaos seeds to run: MSCCLPP_TEST_SEEDS, or `usual`.
inline uint64_t seedCount(uint64_t usual) {
  const char* text = std::getenv("MSCCLPP_TEST_SEEDS");
  const uint64_t wanted = text == nullptr ? 0 : std::strtoull(text, nullptr, 10);
  return wanted == 0 ? usual : wanted;
}

/// The one seed to run, MSCCLPP_TEST_SEED, or 0.
inline uint64_t seedAlone() {
  const char* text = std::getenv("MSCCLPP_TEST_SEED");
  return text == nullptr ? 0 : std::strtoull(text, nullptr, 10);
}

}  // namespace mscclpp::test
