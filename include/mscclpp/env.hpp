// Every environment variable of the library is read here, once. docs/environment.md is the table.
// An argument of the same meaning always wins over a variable.
#pragma once

#include <chrono>
#include <functional>
#include <optional>
#include <string>

#include <mscclpp/log.hpp>

namespace mscclpp {

enum class Platform;
enum class Transport;

/// The values of the environment variables, checked. A bad value is an Error (invalidArgument) that
/// names the variable, the value and the allowed values.
class Env {
 public:
  /// Finds a variable: nullptr when it is not set. An empty value counts as not set.
  using Lookup = std::function<const char*(const char*)>;

  /// Reads all variables through `lookup` (tests pass their own).
  explicit Env(const Lookup& lookup);

  std::optional<int> ranksPerNode;     ///< MSCCLPP_EP_RANKS_PER_NODE: forces the node shape, >= 1
  std::optional<Transport> transport;  ///< MSCCLPP_EP_TRANSPORT: carries port channels
  std::chrono::nanoseconds timeout;    ///< MSCCLPP_EP_TIMEOUT: 0 = no limit; default 100 s
  std::optional<Platform> platform;    ///< MSCCLPP_EP_PLATFORM
  /// CUDA_DEVICE_MAX_CONNECTIONS, CUDA's own: streams of one process that really run side by side
  /// on a GPU, 1 to 32; CUDA's default is 8. Read here, not set.
  int cudaMaxConnections;
  LogLevel logLevel;            ///< MSCCLPP_LOG_LEVEL; default warn
  std::string socketInterface;  ///< MSCCLPP_SOCKET_INTERFACE; empty = chosen by the library
  std::string hostId;           ///< MSCCLPP_HOST_ID; empty = made from the machine
};

/// The process's environment, read at the first call and never again. Throws at every call as long
/// as a value is bad.
const Env& env();

/// The identity of this host: equal exactly for processes that can share memory. Forced by
/// MSCCLPP_HOST_ID, else "hostname/hash" of the host name and the kernel's boot id. At most 63
/// characters.
const std::string& hostId();

}  // namespace mscclpp
