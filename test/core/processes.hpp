// Ranks as processes: the test binary starts itself again with a role.
#pragma once

#include <sys/types.h>

#include <functional>
#include <string>
#include <vector>

namespace mscclpp::test {

/// What a child does: gets its arguments, returns its exit code. Talks to the parent by lines on
/// standard input and output.
using Role = std::function<int(const std::vector<std::string>&)>;

/// Registers a role at static-initialisation time.
class RoleRegistration {
 public:
  RoleRegistration(const std::string& name, Role role);
};

/// In main(): runs the role named by "--role=NAME" and returns true with its exit code.
bool runRole(int argc, char** argv, int& exitCode);

/// In a role: one line to the parent.
void tellParent(const std::string& line);
/// In a role: the next line from the parent; "" at the end of its input.
std::string askParent();

/// A child process; killed if it still runs when the object goes.
class Child {
 public:
  /// `environment`: "NAME=value" entries added to (or replacing) the own environment.
  Child(const std::string& role, const std::vector<std::string>& arguments,
        const std::vector<std::string>& environment = {});
  ~Child();
  Child(Child&&) noexcept;
  Child(const Child&) = delete;
  Child& operator=(const Child&) = delete;
  Child& operator=(Child&&) = delete;

  pid_t pid() const { return pid_; }
  /// The next line that the child says; throws after a minute of silence, "" when it says no more.
  std::string hear();
  void tell(const std::string& line);
  void kill(int signal);
  /// The exit code, or 128 + the signal that ended it; throws after a minute.
  int wait();

 private:
  pid_t pid_ = -1;
  int toChild_ = -1;
  int fromChild_ = -1;
  std::string unread_;
};

}  // namespace mscclpp::test
