#include <cerrno>
#include <fstream>
#include <sstream>

#include <gtest/gtest.h>

#include <mscclpp/errors.hpp>
#include <mscclpp/log.hpp>

#include "core/ranks.hpp"

namespace mscclpp {
namespace {

using test::expectError;

constexpr ErrorCode kAllCodes[] = {
    ErrorCode::invalidArgument, ErrorCode::invalidState, ErrorCode::timeout,
    ErrorCode::peerFailure,     ErrorCode::outOfMemory,  ErrorCode::unsupported,
    ErrorCode::system,          ErrorCode::cuda,         ErrorCode::internal};

TEST(Errors, FailCarriesCodeAndFormattedValues) {
  expectError(ErrorCode::outOfMemory, {"asked for 12 of 8"},
              [] { fail(ErrorCode::outOfMemory, "asked for {} of {}", 12, 8); });
}

TEST(Errors, TimeoutHasItsOwnClass) {
  expectError<TimeoutError>(ErrorCode::timeout, {"rank 3"},
                            [] { fail(ErrorCode::timeout, "rank {}", 3); });
}

TEST(Errors, CheckThrowsOnlyWhenTheConditionFails) {
  EXPECT_NO_THROW(check(true, ErrorCode::internal, "unused {}", 1));
  expectError(ErrorCode::invalidState, {"value 7"},
              [] { check(false, ErrorCode::invalidState, "value {}", 7); });
}

/// Formatting it is an event that a test can see.
struct Counted {
  int* formatted;
};

}  // namespace
}  // namespace mscclpp

template <>
struct fmt::formatter<mscclpp::Counted> : fmt::formatter<int> {
  auto format(const mscclpp::Counted& value, format_context& context) const {
    ++*value.formatted;
    return fmt::format_to(context.out(), "counted");
  }
};

namespace mscclpp {
namespace {

TEST(Errors, CheckFormatsOnlyOnFailure) {
  int formatted = 0;
  check(true, ErrorCode::internal, "{}", Counted{&formatted});
  EXPECT_EQ(formatted, 0);
  EXPECT_THROW(check(false, ErrorCode::internal, "{}", Counted{&formatted}), Error);
  EXPECT_EQ(formatted, 1);
}

TEST(Errors, DerivedClassesCarryTheirValues) {
  const SystemError system(ENOENT, "open /x");
  EXPECT_EQ(system.code(), ErrorCode::system);
  EXPECT_EQ(system.errnoValue(), ENOENT);
  EXPECT_STREQ(system.what(), "open /x: No such file or directory (errno 2)");
  const CudaError cuda(700, "illegal address");
  EXPECT_EQ(cuda.code(), ErrorCode::cuda);
  EXPECT_EQ(cuda.cudaCode(), 700);
  const PeerError peer(5, "rank 5 died");
  EXPECT_EQ(peer.code(), ErrorCode::peerFailure);
  EXPECT_EQ(peer.rank(), 5);
}

TEST(Errors, RunNoThrowLogsAndReports) {
  EXPECT_TRUE(runNoThrow("closing", [] {}));
  testing::internal::CaptureStderr();
  EXPECT_FALSE(runNoThrow("closing", [] { fail(ErrorCode::internal, "code {}", 42); }));
  const std::string log = testing::internal::GetCapturedStderr();
  EXPECT_NE(log.find("closing: code 42"), std::string::npos) << log;
}

TEST(Errors, RunNoThrowSurvivesForeignExceptions) {
  testing::internal::CaptureStderr();
  EXPECT_FALSE(runNoThrow("foreign", [] { throw 3; }));
  EXPECT_NE(testing::internal::GetCapturedStderr().find("foreign"), std::string::npos);
}

TEST(Errors, CheckNoThrowLogsAndReturnsTheCondition) {
  EXPECT_TRUE(checkNoThrow(true, "unused {}", 1));
  testing::internal::CaptureStderr();
  EXPECT_FALSE(checkNoThrow(false, "left over: {}", 9));
  EXPECT_NE(testing::internal::GetCapturedStderr().find("left over: 9"), std::string::npos);
}

TEST(Log, LevelAndPrefixApply) {
  log::setLevel(LogLevel::warn);
  EXPECT_FALSE(log::enabled(LogLevel::info));
  EXPECT_TRUE(log::enabled(LogLevel::error));
  testing::internal::CaptureStderr();
  log::setPrefix("rank 3");
  log::info("not to be seen");
  log::warn("seen {}", 1);
  log::setPrefix("");
  const std::string text = testing::internal::GetCapturedStderr();
  EXPECT_NE(text.find("rank 3: seen 1"), std::string::npos) << text;
  EXPECT_EQ(text.find("not to be seen"), std::string::npos) << text;
}

TEST(Errors, EveryCodeIsDocumented) {
  std::ifstream file(std::string(MSCCLPP_SOURCE_DIR) + "/docs/errors.md");
  std::stringstream text;
  text << file.rdbuf();
  for (const ErrorCode code : kAllCodes) {
    EXPECT_NE(text.str().find("| `" + std::string(toString(code)) + "` |"), std::string::npos)
        << toString(code) << " has no row in docs/errors.md";
  }
}

}  // namespace
}  // namespace mscclpp
