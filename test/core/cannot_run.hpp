#pragma once

#include <cstdlib>
#include <string>

#include <gtest/gtest.h>

namespace mscclpp::test {

/// Ends a test that cannot run here: skipped, or a failure under CI=true when `required` says that
/// CI machines must be able to. Use as: return cannotRunHere(...).
inline void cannotRunHere(const std::string& why, bool required) {
  const char* const ci = std::getenv("CI");
  if (required && ci != nullptr && std::string(ci) == "true") {
    FAIL() << "CI=true, and this cannot run here: " << why;
  }
  GTEST_SKIP() << why;
}

}  // namespace mscclpp::test
