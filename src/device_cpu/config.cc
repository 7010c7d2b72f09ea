#include <cerrno>
#include <cstdlib>
#include <limits>
#include <string>

#include "mscclpp/device/cpu/runtime.hpp"

/// Configuration from MSCCLPP_SIMT_... variables.
namespace mscclpp::device {
inline namespace cpu {
namespace {

template <class T>
void readVariable(const char* suffix, T& value) {
  const std::string name = std::string("MSCCLPP_SIMT_") + suffix;
  const char* text = std::getenv(name.c_str());
  if (text == nullptr || *text == 0) return;
  char* end = nullptr;
  errno = 0;
  const unsigned long long number = std::strtoull(text, &end, 10);
  if (errno != 0 || *end != 0 || *text == '-' ||
      number > static_cast<unsigned long long>(std::numeric_limits<T>::max())) {
    fail(ErrorCode::invalidArgument, "{} is '{}': a number from 0 to {} is needed", name, text,
         static_cast<unsigned long long>(std::numeric_limits<T>::max()));
  }
  value = static_cast<T>(number);
}

}  // namespace

RuntimeConfig RuntimeConfig::fromEnvironment() {
  RuntimeConfig config;
  readVariable("WORKERS", config.workers);
  readVariable("SEED", config.seed);
  readVariable("CHAOS", config.chaos);
  readVariable("PREEMPT", config.preemptPercent);
  readVariable("STACK", config.stackBytes);
  readVariable("BULK_DELAY", config.bulkMaxDelay);
  readVariable("CHECK_PROXY", config.checkProxy);
  readVariable("CLOSED", config.closed);
  readVariable("FREEZE", config.freezeSteps);
  readVariable("WATCHDOG", config.watchdogSeconds);
  readVariable("CONTEXTS", config.raceContexts);
  return config;
}

RuntimeConfig RuntimeConfig::testing(uint64_t seed, bool chaos) {
  RuntimeConfig config = fromEnvironment();
  config.workers = 1;
  config.seed = seed;
  config.chaos = chaos;
  config.preemptPercent = chaos ? 10 : 0;
  config.bulkMaxDelay = 64;
  config.checkProxy = true;
  config.closed = true;
  return config;
}

}  // namespace cpu
}  // namespace mscclpp::device
