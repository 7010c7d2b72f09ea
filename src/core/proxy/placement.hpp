// Which cores a thread runs on.
#pragma once

#include <string>

#include <mscclpp/platform.hpp>

namespace mscclpp::detail {

/// Keeps the calling thread on the cores near `device` (of those that it may use). Returns them,
/// such as "0-15"; with a warning in the log, and no change, when the machine does not tell.
std::string pinNear(const Device& device);
/// The cores that the calling thread may use, such as "0-3,8".
std::string allowedCores();

}  // namespace mscclpp::detail
