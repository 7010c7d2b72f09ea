// Network namespaces that end with their processes: nothing stays behind, whatever happens.
#pragma once

#include <functional>
#include <string>

namespace mscclpp::test {

/// Moves the calling process (one thread so far) into a network namespace of its own: as root, or
/// else inside a user namespace of its own. @throws SystemError.
void enterNetworkNamespace();

/// Runs a command; returns what it wrote. @throws Error unsupported with that when it fails.
std::string runCommand(const std::string& command);

}  // namespace mscclpp::test
