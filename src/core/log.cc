#include <atomic>
#include <memory>
#include <mutex>

#include <spdlog/logger.h>
#include <spdlog/sinks/stdout_sinks.h>

#include <mscclpp/env.hpp>
#include <mscclpp/errors.hpp>
#include <mscclpp/log.hpp>

namespace mscclpp {

namespace {

spdlog::level::level_enum toSpdlog(LogLevel level) noexcept {
  switch (level) {
    case LogLevel::trace:
      return spdlog::level::trace;
    case LogLevel::debug:
      return spdlog::level::debug;
    case LogLevel::info:
      return spdlog::level::info;
    case LogLevel::warn:
      return spdlog::level::warn;
    case LogLevel::error:
      return spdlog::level::err;
    case LogLevel::off:
      return spdlog::level::off;
  }
  return spdlog::level::warn;
}

/// A bad variable is reported by whoever calls env() next; logging itself goes on with the default.
LogLevel initialLevel() noexcept {
  try {
    return env().logLevel;
  } catch (const std::exception&) {
    return LogLevel::warn;
  }
}

struct State {
  State() : logger("mscclpp", std::make_shared<spdlog::sinks::stderr_sink_mt>()) {
    logger.set_level(toSpdlog(initialLevel()));
    logger.set_pattern("[%H:%M:%S.%e] mscclpp %l: %v");
  }
  spdlog::logger logger;
  std::mutex mutex;
  std::string prefix;
};

/// Never destroyed: destructors of static objects may log.
State& state() {
  static State* const instance = new State;
  return *instance;
}

}  // namespace

namespace log {

bool enabled(LogLevel level) noexcept {
  try {
    return level != LogLevel::off && state().logger.should_log(toSpdlog(level));
  } catch (...) {
    return false;
  }
}

void setLevel(LogLevel level) {
  state().logger.set_level(toSpdlog(level));
}

void setPrefix(const std::string& prefix) {
  const std::lock_guard lock(state().mutex);
  state().prefix = prefix.empty() ? prefix : prefix + ": ";
}

void write(LogLevel level, std::string_view message) noexcept {
  try {
    std::string prefix;
    {
      const std::lock_guard lock(state().mutex);
      prefix = state().prefix;
    }
    state().logger.log(toSpdlog(level), "{}{}", prefix, message);
    state().logger.flush();
  } catch (...) {  // a log that cannot be written must not end the program
  }
}

}  // namespace log

void reportError(std::string_view message) noexcept {
  log::write(LogLevel::error, message);
}

}  // namespace mscclpp
