#pragma once

#include <cstdint>
#include <cstdlib>

namespace mscclpp::test {

/// How many chaos seeds to run: MSCCLPP_TEST_SEEDS (0: none, what runs in order only), or `usual`.
inline uint64_t seedCount(uint64_t usual) {
  const char* text = std::getenv("MSCCLPP_TEST_SEEDS");
  return text == nullptr || *text == '\0' ? usual : std::strtoull(text, nullptr, 10);
}

/// The one seed to run, MSCCLPP_TEST_SEED, or 0.
inline uint64_t seedAlone() {
  const char* text = std::getenv("MSCCLPP_TEST_SEED");
  return text == nullptr ? 0 : std::strtoull(text, nullptr, 10);
}

}  // namespace mscclpp::test
