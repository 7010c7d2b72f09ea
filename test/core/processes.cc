#include "core/processes.hpp"

#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <spawn.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstring>
#include <iostream>
#include <map>
#include <utility>

#include <mscclpp/errors.hpp>

extern char** environ;

namespace mscclpp::test {

namespace {

constexpr int kPatienceMs = 60'000;
constexpr const char* kRolePrefix = "--role=";

std::map<std::string, Role>& roles() {
  static std::map<std::string, Role> instance;
  return instance;
}

std::vector<char*> pointers(std::vector<std::string>& strings) {
  std::vector<char*> result;
  for (std::string& text : strings) result.push_back(text.data());
  result.push_back(nullptr);
  return result;
}

std::vector<std::string> mergedEnvironment(const std::vector<std::string>& extra) {
  std::map<std::string, std::string> merged;
  const auto add = [&](const std::string& entry) {
    merged[entry.substr(0, entry.find('='))] = entry;
  };
  for (char** entry = environ; *entry != nullptr; ++entry) add(*entry);
  for (const std::string& entry : extra) add(entry);
  std::vector<std::string> result;
  for (const auto& [name, entry] : merged) result.push_back(entry);
  return result;
}

}  // namespace

RoleRegistration::RoleRegistration(const std::string& name, Role role) {
  roles()[name] = std::move(role);
}

bool runRole(int argc, char** argv, int& exitCode) {
  if (argc < 2 || std::strncmp(argv[1], kRolePrefix, std::strlen(kRolePrefix)) != 0) return false;
  const auto role = roles().find(argv[1] + std::strlen(kRolePrefix));
  if (role == roles().end()) {
    std::cerr << "no such role: " << argv[1] << "\n";
    exitCode = 2;
    return true;
  }
  try {
    exitCode = role->second(std::vector<std::string>(argv + 2, argv + argc));
  } catch (const std::exception& error) {
    tellParent(std::string("error ") + error.what());
    exitCode = 1;
  }
  return true;
}

void tellParent(const std::string& line) {
  std::cout << line << std::endl;
}

std::string askParent() {
  std::string line;
  std::getline(std::cin, line);
  return line;
}

Child::Child(const std::string& role, const std::vector<std::string>& arguments,
             const std::vector<std::string>& environment) {
  int in[2];
  int out[2];
  if (::pipe2(in, O_CLOEXEC) != 0 || ::pipe2(out, O_CLOEXEC) != 0)
    throw SystemError(errno, "pipe2");
  posix_spawn_file_actions_t actions;
  posix_spawn_file_actions_init(&actions);
  posix_spawn_file_actions_adddup2(&actions, in[0], 0);
  posix_spawn_file_actions_adddup2(&actions, out[1], 1);
  std::vector<std::string> words = {"/proc/self/exe", kRolePrefix + role};
  words.insert(words.end(), arguments.begin(), arguments.end());
  std::vector<std::string> variables = mergedEnvironment(environment);
  const int result = ::posix_spawn(&pid_, "/proc/self/exe", &actions, nullptr,
                                   pointers(words).data(), pointers(variables).data());
  posix_spawn_file_actions_destroy(&actions);
  ::close(in[0]);
  ::close(out[1]);
  toChild_ = in[1];
  fromChild_ = out[0];
  if (result != 0) throw SystemError(result, "posix_spawn");
}

Child::Child(Child&& other) noexcept
    : pid_(std::exchange(other.pid_, -1)),
      toChild_(std::exchange(other.toChild_, -1)),
      fromChild_(std::exchange(other.fromChild_, -1)),
      unread_(std::move(other.unread_)) {}

Child::~Child() {
  if (pid_ > 0) {
    ::kill(pid_, SIGKILL);
    ::waitpid(pid_, nullptr, 0);
  }
  if (toChild_ >= 0) ::close(toChild_);
  if (fromChild_ >= 0) ::close(fromChild_);
}

std::string Child::hear() {
  for (;;) {
    const size_t end = unread_.find('\n');
    if (end != std::string::npos) {
      std::string line = unread_.substr(0, end);
      unread_.erase(0, end + 1);
      return line;
    }
    pollfd ready{fromChild_, POLLIN, 0};
    if (::poll(&ready, 1, kPatienceMs) <= 0) {
      fail(ErrorCode::timeout, "child {} has said nothing for {} ms", pid_, kPatienceMs);
    }
    char buffer[4096];
    const ssize_t got = ::read(fromChild_, buffer, sizeof(buffer));
    if (got <= 0) return std::exchange(unread_, {});
    unread_.append(buffer, static_cast<size_t>(got));
  }
}

void Child::tell(const std::string& line) {
  const std::string text = line + "\n";
  if (::write(toChild_, text.data(), text.size()) != static_cast<ssize_t>(text.size())) {
    throw SystemError(errno, "writing to a child");
  }
}

void Child::kill(int signal) {
  ::kill(pid_, signal);
}

int Child::wait() {
  // A pidfd becomes readable when the process ends: a wait with a limit, without polling.
  const int handle = static_cast<int>(::syscall(SYS_pidfd_open, pid_, 0));
  if (handle >= 0) {
    pollfd ended{handle, POLLIN, 0};
    const int result = ::poll(&ended, 1, kPatienceMs);
    ::close(handle);
    check(result > 0, ErrorCode::timeout, "child {} has not ended within {} ms", pid_, kPatienceMs);
  }
  int status = 0;
  if (::waitpid(pid_, &status, 0) != pid_) throw SystemError(errno, "waitpid");
  pid_ = -1;
  return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}

}  // namespace mscclpp::test
