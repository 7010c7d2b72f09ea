// Network namespaces that end with their processes: nothing stays behind, whatever happens.
#pragma once

#include <sys/types.h>

#include <string>
#include <vector>

namespace mscclpp::test {

/// Moves the calling process (one thread so far) into a network namespace of its own: as root, or
/// else inside a user namespace of its own. @throws SystemError.
void enterNetworkNamespace();

// Two namespaces with a link between them. Side 0 is a child of the test, side 1 a child of side 0.
inline constexpr const char* kLinkInterfaces[] = {"left", "right"};
inline constexpr const char* kLinkAddresses[] = {"10.77.0.1", "10.77.0.2"};

/// Side 0: makes the link to the namespace of side 1's process, and configures its own end.
void makeLink(pid_t other);
/// Gives this side's end of the link its address and brings it up.
void configureLink(int side);
/// Side 0: cuts the link, or mends it.
void setLink(bool up);

/// What side 0 says first where namespaces cannot be had, before the reason.
inline constexpr const char* kCannotRun = "cannot: ";
/// A test's body: runs a role as side 0, which must say `expected` and end well. Where it cannot
/// run the test is skipped, see cannotRunHere().
void runSide0(const std::string& role, const std::vector<std::string>& arguments,
              const std::string& expected, const std::vector<std::string>& environment = {});

/// Runs a command; returns what it wrote. @throws Error unsupported with that when it fails.
std::string runCommand(const std::string& command);

}  // namespace mscclpp::test
