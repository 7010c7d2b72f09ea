#include <array>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <map>
#include <set>
#include <sstream>
#include <string_view>

#include <gtest/gtest.h>

#include <mscclpp/connection.hpp>
#include <mscclpp/env.hpp>
#include <mscclpp/errors.hpp>
#include <mscclpp/platform.hpp>

#include "core/processes.hpp"
#include "core/ranks.hpp"

namespace mscclpp {
namespace {

using test::expectError;

Env envOf(const std::map<std::string, std::string>& values) {
  return Env([&](const char* name) -> const char* {
    const auto found = values.find(name);
    return found == values.end() ? nullptr : found->second.c_str();
  });
}

TEST(Env, DefaultsWithoutVariables) {
  const Env env = envOf({});
  EXPECT_FALSE(env.ranksPerNode);
  EXPECT_FALSE(env.transport);
  EXPECT_FALSE(env.platform);
  EXPECT_EQ(env.timeout, std::chrono::seconds(100));
  EXPECT_EQ(env.logLevel, LogLevel::warn);
  EXPECT_EQ(env.socketInterface, "");
  EXPECT_EQ(env.hostId, "");
}

TEST(Env, EmptyValuesCountAsNotSet) {
  const Env env = envOf({{"MSCCLPP_EP_RANKS_PER_NODE", ""},
                         {"MSCCLPP_EP_TIMEOUT", ""},
                         {"MSCCLPP_EP_TRANSPORT", ""},
                         {"MSCCLPP_LOG_LEVEL", ""}});
  EXPECT_FALSE(env.ranksPerNode);
  EXPECT_FALSE(env.transport);
  EXPECT_EQ(env.timeout, std::chrono::seconds(100));
}

TEST(Env, ReadsEveryVariable) {
  const Env env = envOf({{"MSCCLPP_EP_RANKS_PER_NODE", "4"},
                         {"MSCCLPP_EP_TRANSPORT", "cuda_ipc"},
                         {"MSCCLPP_EP_TIMEOUT", "2.5"},
                         {"MSCCLPP_EP_PLATFORM", "cuda"},
                         {"MSCCLPP_LOG_LEVEL", "debug"},
                         {"MSCCLPP_SOCKET_INTERFACE", "eth7"},
                         {"MSCCLPP_HOST_ID", "box-1"}});
  EXPECT_EQ(env.ranksPerNode, 4);
  EXPECT_EQ(env.transport, Transport::cudaIpc);
  EXPECT_EQ(env.timeout, std::chrono::milliseconds(2500));
  EXPECT_EQ(env.platform, Platform::cuda);
  EXPECT_EQ(env.logLevel, LogLevel::debug);
  EXPECT_EQ(env.socketInterface, "eth7");
  EXPECT_EQ(env.hostId, "box-1");
}

TEST(Env, TimeoutZeroMeansNoLimit) {
  EXPECT_EQ(envOf({{"MSCCLPP_EP_TIMEOUT", "0"}}).timeout.count(), 0);
}

struct BadValue {
  const char* variable;
  const char* value;
  const char* allowed;  ///< part of the text that says what is allowed
};

class EnvBadValue : public testing::TestWithParam<BadValue> {};

TEST_P(EnvBadValue, IsAnErrorThatNamesVariableValueAndAllowed) {
  const BadValue bad = GetParam();
  expectError(ErrorCode::invalidArgument,
              {bad.variable, std::string("'") + bad.value + "'", bad.allowed}, [&] {
                envOf({{bad.variable, bad.value}});
              });
}

INSTANTIATE_TEST_SUITE_P(
    Values, EnvBadValue,
    testing::Values(BadValue{"MSCCLPP_EP_RANKS_PER_NODE", "0", "from 1 to"},
                    BadValue{"MSCCLPP_EP_RANKS_PER_NODE", "4x", "whole number"},
                    BadValue{"MSCCLPP_EP_RANKS_PER_NODE", "99999999999", "whole number"},
                    BadValue{"MSCCLPP_EP_TRANSPORT", "ipc", "shm, cuda_ipc, tcp, verbs"},
                    BadValue{"MSCCLPP_EP_TIMEOUT", "-1", "0 (no limit)"},
                    BadValue{"MSCCLPP_EP_TIMEOUT", "nan", "0 (no limit)"},
                    BadValue{"MSCCLPP_EP_TIMEOUT", "10s", "0 (no limit)"},
                    BadValue{"MSCCLPP_EP_TIMEOUT", "1e99", "0 (no limit)"},
                    BadValue{"MSCCLPP_EP_PLATFORM", "gpu", "cpu, cuda"},
                    BadValue{"MSCCLPP_LOG_LEVEL", "loud", "trace, debug, info, warn, error, off"},
                    BadValue{"MSCCLPP_HOST_ID",
                             "0123456789012345678901234567890123456789012345678901234567890123",
                             "63 characters"}));

TEST(Env, HostIdIsStableAndFitsAHandle) {
  EXPECT_EQ(hostId(), hostId());
  EXPECT_FALSE(hostId().empty());
  EXPECT_LE(hostId().size(), 63u);
}

const test::RoleRegistration kShowEnv("show-env", [](const auto&) {
  try {
    test::tellParent(hostId());
  } catch (const Error& error) {
    test::tellParent(error.what());
  }
  return 0;
});

TEST(EnvProcess, HostIdIsForcedByTheVariable) {
  test::Child child("show-env", {}, {"MSCCLPP_HOST_ID=other-box"});
  EXPECT_EQ(child.hear(), "other-box");
  EXPECT_EQ(child.wait(), 0);
}

TEST(EnvProcess, HostIdIsTheSameInAnotherProcess) {
  test::Child child("show-env", {}, {"MSCCLPP_HOST_ID="});
  test::Child twin("show-env", {}, {"MSCCLPP_HOST_ID="});
  EXPECT_EQ(child.hear(), twin.hear());
}

TEST(EnvProcess, BadVariableOfTheRealEnvironmentIsReported) {
  test::Child child("show-env", {}, {"MSCCLPP_EP_TIMEOUT=soon"});
  EXPECT_NE(child.hear().find("MSCCLPP_EP_TIMEOUT is 'soon'"), std::string::npos);
}

// --- the table -----------------------------------------------------------------------------------

std::string contentOf(const std::filesystem::path& path) {
  std::ifstream file(path);
  std::stringstream text;
  text << file.rdbuf();
  return text.str();
}

/// Every name MSCCLPP_... in `text` that stands between one of `before` and one of `after`.
std::set<std::string> findNames(const std::string& text, std::string_view before,
                                std::string_view after) {
  constexpr std::string_view kPrefix = "MSCCLPP_";
  constexpr std::string_view kLetters = "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_";
  std::set<std::string> found;
  for (size_t at = text.find(kPrefix); at != std::string::npos; at = text.find(kPrefix, at + 1)) {
    const size_t end = text.find_first_not_of(kLetters, at);
    if (at == 0 || end == std::string::npos || text[end - 1] == '_') continue;
    if (before.find(text[at - 1]) == std::string_view::npos) continue;
    if (after.find(text[end]) == std::string_view::npos) continue;
    found.insert(text.substr(at, end - at));
  }
  return found;
}

/// A variable is a whole string literal "MSCCLPP_..." in the sources.
std::set<std::string> variablesInTheCode() {
  const std::filesystem::path root = MSCCLPP_SOURCE_DIR;
  const std::set<std::string> kinds = {".hpp", ".h", ".cc", ".cu", ".cuh", ".py"};
  std::set<std::string> found;
  for (const char* folder : {"include", "src", "python"}) {
    if (!std::filesystem::exists(root / folder)) continue;
    for (const auto& entry : std::filesystem::recursive_directory_iterator(root / folder)) {
      if (!entry.is_regular_file() || !kinds.contains(entry.path().extension())) continue;
      found.merge(findNames(contentOf(entry.path()), "\"'", "\"'"));
    }
  }
  return found;
}

/// The CPU runtime puts its names together: readVariable("SEED", ...) reads MSCCLPP_SIMT_SEED.
std::set<std::string> variablesOfTheCpuRuntime() {
  const std::string text =
      contentOf(std::filesystem::path(MSCCLPP_SOURCE_DIR) / "src/device_cpu/config.cc");
  const std::string call = "readVariable(\"";
  std::set<std::string> found;
  for (size_t at = text.find(call); at != std::string::npos; at = text.find(call, at + 1)) {
    const size_t begin = at + call.size();
    found.insert("MSCCLPP_SIMT_" + text.substr(begin, text.find('"', begin) - begin));
  }
  return found;
}

std::set<std::string> variablesInTheTable() {
  std::ifstream file(std::filesystem::path(MSCCLPP_SOURCE_DIR) / "docs/environment.md");
  std::set<std::string> found;
  for (std::string line; std::getline(file, line);) {
    if (line.starts_with("| `")) found.merge(findNames(line.substr(0, line.find(" | ")), "`", "`"));
  }
  return found;
}

TEST(EnvTable, NamesEveryVariableInTheCodeAndNoOther) {
  auto code = variablesInTheCode();
  EXPECT_GE(code.size(), 7u) << "the search found too little to be right";
  const auto runtime = variablesOfTheCpuRuntime();
  EXPECT_GE(runtime.size(), 5u) << "the search found too little to be right";
  code.insert(runtime.begin(), runtime.end());
  EXPECT_EQ(code, variablesInTheTable()) << "docs/environment.md and the sources must agree";
}

}  // namespace
}  // namespace mscclpp
