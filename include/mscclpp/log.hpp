// A thin layer over spdlog: one logger to standard error, its level from MSCCLPP_LOG_LEVEL.
// spdlog itself stays out of this header.
#pragma once

#include <string>
#include <string_view>
#include <utility>

#include <mscclpp/format.hpp>

namespace mscclpp {

enum class LogLevel { trace, debug, info, warn, error, off };

namespace log {

/// Whether a message of `level` would be written now.
bool enabled(LogLevel level) noexcept;

/// Changes the level for this process; wins over MSCCLPP_LOG_LEVEL.
void setLevel(LogLevel level);

/// Text put in front of every message from now on, for example "rank 3"; empty for none. Process
/// wide.
void setPrefix(const std::string& prefix);

/// Writes one line. Thread safe, never throws.
void write(LogLevel level, std::string_view message) noexcept;

template <class... A>
void message(LogLevel level, fmt::format_string<A...> format, A&&... args) {
  if (enabled(level)) write(level, fmt::format(format, std::forward<A>(args)...));
}
template <class... A>
void debug(fmt::format_string<A...> format, A&&... args) {
  message(LogLevel::debug, format, std::forward<A>(args)...);
}
template <class... A>
void info(fmt::format_string<A...> format, A&&... args) {
  message(LogLevel::info, format, std::forward<A>(args)...);
}
template <class... A>
void warn(fmt::format_string<A...> format, A&&... args) {
  message(LogLevel::warn, format, std::forward<A>(args)...);
}
template <class... A>
void error(fmt::format_string<A...> format, A&&... args) {
  message(LogLevel::error, format, std::forward<A>(args)...);
}

}  // namespace log
}  // namespace mscclpp
