#include "core/namespaces.hpp"

#include <sched.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <cstdio>
#include <fstream>
#include <memory>

#include <gtest/gtest.h>

#include <mscclpp/errors.hpp>
#include <mscclpp/format.hpp>

#include "core/cannot_run.hpp"
#include "core/processes.hpp"

namespace mscclpp::test {

namespace {

void writeFile(const std::string& path, const std::string& text) {
  std::ofstream file(path);
  file << text << std::flush;
  if (!file) throw SystemError(errno, "writing " + path);
}

}  // namespace

void enterNetworkNamespace() {
  const uid_t user = ::geteuid();
  const gid_t group = ::getegid();
  if (::unshare(user == 0 ? CLONE_NEWNET : CLONE_NEWNET | CLONE_NEWUSER) != 0) {
    throw SystemError(errno, user == 0 ? "a network namespace of its own"
                                       : "a user and a network namespace of its own, without root");
  }
  if (user == 0) return;
  writeFile("/proc/self/setgroups", "deny");
  writeFile("/proc/self/uid_map", fmt::format("0 {} 1", user));
  writeFile("/proc/self/gid_map", fmt::format("0 {} 1", group));
}

std::string runCommand(const std::string& command) {
  const std::string whole = "PATH=$PATH:/usr/sbin:/sbin; { " + command + "; } 2>&1";
  FILE* const pipe = ::popen(whole.c_str(), "r");
  if (pipe == nullptr) throw SystemError(errno, "starting: " + command);
  std::string output;
  std::array<char, 4096> buffer;
  while (const size_t got = std::fread(buffer.data(), 1, buffer.size(), pipe)) {
    output.append(buffer.data(), got);
  }
  const int status = ::pclose(pipe);
  check(status == 0, ErrorCode::unsupported, "'{}' failed (status {}): {}", command, status,
        output);
  return output;
}

void makeLink(pid_t other) {
  runCommand(fmt::format("ip link add {} type veth peer name {} netns {}", kLinkInterfaces[0],
                         kLinkInterfaces[1], other));
  configureLink(0);
}

void configureLink(int side) {
  runCommand(fmt::format("ip link set lo up && ip address add {}/24 dev {} && ip link set {} up",
                         kLinkAddresses[side], kLinkInterfaces[side], kLinkInterfaces[side]));
}

void setLink(bool up) {
  runCommand(fmt::format("ip link set {} {}", kLinkInterfaces[0], up ? "up" : "down"));
}

void runSide0(const std::string& role, const std::vector<std::string>& arguments,
              const std::string& expected, const std::vector<std::string>& environment) {
  Child side(role, arguments, environment);
  const std::string said = side.hear();
  if (said.starts_with(kCannotRun)) {
    return cannotRunHere(said.substr(std::string(kCannotRun).size()), true);
  }
  EXPECT_EQ(said, expected);
  EXPECT_EQ(side.wait(), 0);
}

}  // namespace mscclpp::test
