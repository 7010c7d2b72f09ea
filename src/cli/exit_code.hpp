#pragma once

namespace mscclpp::ep::cli {

/// What the program's exit code says. The worst of all ranks wins.
enum ExitCode : int {
  kSuccess = 0,
  kCheckFailed = 1,   ///< it ran, and a result is wrong
  kBadUsage = 2,      ///< an option or its value is not allowed; nothing ran
  kRuntimeError = 3,  ///< it could not run to the end: no GPU, no memory, a rank died, a time limit
};

}  // namespace mscclpp::ep::cli
