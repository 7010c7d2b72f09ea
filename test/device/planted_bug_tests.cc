// Every bug of the table in docs/device.md, planted in a small kernel: FIFO and chaos schedules
// must report it (or see wrong data), and the same kernel without the bug must pass everywhere.

#include <string>
#include <vector>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "device/planted_bugs.hpp"
#include "device/seeds.hpp"

namespace mscclpp::test::planted {
namespace {

using ::testing::HasSubstr;

class PlantedBugs : public ::testing::TestWithParam<Planted> {};

TEST_P(PlantedBugs, RightVersionPasses) {
  EXPECT_EQ(runOnce(GetParam(), false, 1, false), "");
  const uint64_t seeds = seedCount(10);
  for (uint64_t seed = 1; seed <= seeds && !HasFailure(); ++seed) {
    EXPECT_EQ(runOnce(GetParam(), false, seed, true), "") << "seed " << seed;
  }
}

INSTANTIATE_TEST_SUITE_P(Device, PlantedBugs, ::testing::ValuesIn(plantedBugs()), bugName);

// Reports without addresses: the heap need not place two runs alike.
std::string withoutAddresses(const std::string& report) {
  std::string text;
  for (size_t i = 0; i < report.size(); ++i) {
    text += report[i];
    if (report.compare(i, 3, "0x7") != 0 && report.compare(i, 3, "0x5") != 0 &&
        report.compare(i, 3, "0x6") != 0) {
      continue;
    }
    const size_t end = report.find_first_not_of("0123456789abcdef", i + 2);
    if (end != std::string::npos && end - i > 10) i = end - 1;
  }
  return text;
}

std::vector<Planted> foundBy(const char* Planted::*detector) {
  std::vector<Planted> found;
  for (const Planted& bug : plantedBugs()) {
    // A race would end a ThreadSanitizer build: planted_sanitizer_tests.cc looks at those.
    if (bug.*detector != kNotFound && !(MSCCLPP_TEST_TSAN && bug.race)) found.push_back(bug);
  }
  return found;
}

class FifoFinds : public ::testing::TestWithParam<Planted> {};
TEST_P(FifoFinds, Bug) {
  const std::string report = runOnce(GetParam(), true, 1, false);
  EXPECT_NE(report, "");
  EXPECT_THAT(report, HasSubstr(GetParam().fifo));
  EXPECT_EQ(withoutAddresses(runOnce(GetParam(), true, 1, false)), withoutAddresses(report))
      << "the same run gives the same report";
}
INSTANTIATE_TEST_SUITE_P(Device, FifoFinds, ::testing::ValuesIn(foundBy(&Planted::fifo)), bugName);

class ChaosFinds : public ::testing::TestWithParam<Planted> {};
TEST_P(ChaosFinds, Bug) {
  for (uint64_t seed = 1; seed <= 40; ++seed) {
    const std::string report = runOnce(GetParam(), true, seed, true);
    if (report.empty() || report.find(GetParam().chaos) == std::string::npos) continue;
    RecordProperty("seed", std::to_string(seed));
    EXPECT_EQ(withoutAddresses(runOnce(GetParam(), true, seed, true)), withoutAddresses(report))
        << "seed " << seed;
    return;
  }
  FAIL() << "40 seeds did not find it";
}
INSTANTIATE_TEST_SUITE_P(Device, ChaosFinds, ::testing::ValuesIn(foundBy(&Planted::chaos)),
                         bugName);

}  // namespace
}  // namespace mscclpp::test::planted
