#include <unistd.h>

#include <array>
#include <charconv>
#include <cmath>
#include <cstdlib>
#include <fstream>
#include <utility>

#include <mscclpp/connection.hpp>
#include <mscclpp/env.hpp>
#include <mscclpp/errors.hpp>
#include <mscclpp/platform.hpp>

namespace mscclpp {

namespace {

constexpr double kDefaultTimeoutSeconds = 100;
constexpr double kMaxTimeoutSeconds = 1e6;
constexpr int kMaxRanksPerNode = 65536;
constexpr size_t kMaxHostId = 63;

std::string text(const Env::Lookup& lookup, const char* name) {
  const char* value = lookup(name);
  return value == nullptr ? std::string() : std::string(value);
}

[[noreturn]] void refuse(const char* name, const std::string& value, const std::string& allowed) {
  fail(ErrorCode::invalidArgument, "environment variable {} is '{}': allowed is {}", name, value,
       allowed);
}

/// The whole of `value` as a number, or nothing.
template <class T>
std::optional<T> number(const std::string& value) {
  T result{};
  const char* const end = value.data() + value.size();
  const auto [last, error] = std::from_chars(value.data(), end, result);
  if (error != std::errc() || last != end) return std::nullopt;
  return result;
}

/// One of `names`, or an error that lists them.
template <class T, size_t N>
std::optional<T> choice(const Env::Lookup& lookup, const char* name,
                        const std::array<std::pair<const char*, T>, N>& names) {
  const std::string value = text(lookup, name);
  if (value.empty()) return std::nullopt;
  std::string allowed;
  for (const auto& [word, meaning] : names) {
    if (value == word) return meaning;
    allowed += (allowed.empty() ? "" : ", ") + std::string(word);
  }
  refuse(name, value, "one of " + allowed);
}

std::optional<int> ranksPerNodeFrom(const Env::Lookup& lookup) {
  constexpr const char* kName = "MSCCLPP_EP_RANKS_PER_NODE";
  const std::string value = text(lookup, kName);
  if (value.empty()) return std::nullopt;
  const auto ranks = number<int>(value);
  if (!ranks || *ranks < 1 || *ranks > kMaxRanksPerNode) {
    refuse(kName, value, fmt::format("a whole number from 1 to {}", kMaxRanksPerNode));
  }
  return ranks;
}

int cudaMaxConnectionsFrom(const Env::Lookup& lookup) {
  constexpr int kCudaDefault = 8;
  const auto value = number<int>(text(lookup, "CUDA_DEVICE_MAX_CONNECTIONS"));
  return value && *value >= 1 && *value <= 32 ? *value : kCudaDefault;  // as CUDA takes it
}

std::chrono::nanoseconds timeoutFrom(const Env::Lookup& lookup) {
  constexpr const char* kName = "MSCCLPP_EP_TIMEOUT";
  const std::string value = text(lookup, kName);
  const auto seconds =
      value.empty() ? std::optional(kDefaultTimeoutSeconds) : number<double>(value);
  if (!seconds || !std::isfinite(*seconds) || *seconds < 0 || *seconds > kMaxTimeoutSeconds) {
    refuse(kName, value,
           fmt::format("seconds from 0 (no limit) to {}, such as 2.5", kMaxTimeoutSeconds));
  }
  return std::chrono::nanoseconds(std::llround(*seconds * 1e9));
}

std::string hostIdFrom(const Env::Lookup& lookup) {
  constexpr const char* kName = "MSCCLPP_HOST_ID";
  const std::string value = text(lookup, kName);
  if (value.size() > kMaxHostId) {
    refuse(kName, value, fmt::format("a name of at most {} characters", kMaxHostId));
  }
  return value;
}

std::string firstLine(const char* path) {
  std::ifstream file(path);
  std::string line;
  std::getline(file, line);
  return line;
}

/// FNV-1a: stable between builds, which std::hash is not.
uint64_t hashOf(const std::string& value) {
  uint64_t hash = 14695981039346656037ull;
  for (const char c : value) {
    hash = (hash ^ static_cast<unsigned char>(c)) * 1099511628211ull;
  }
  return hash;
}

std::string machineId() {
  std::array<char, 256> name{};
  if (gethostname(name.data(), name.size() - 1) != 0) name[0] = '\0';
  const std::string host = name[0] == '\0' ? "host" : name.data();
  std::string boot = firstLine("/proc/sys/kernel/random/boot_id");
  if (boot.empty()) boot = firstLine("/etc/machine-id");
  return fmt::format("{}/{:016x}", host.substr(0, kMaxHostId - 17), hashOf(host + "\n" + boot));
}

}  // namespace

Env::Env(const Lookup& lookup)
    : ranksPerNode(ranksPerNodeFrom(lookup)),
      transport(choice<Transport, 4>(lookup, "MSCCLPP_EP_TRANSPORT",
                                     {{{"shm", Transport::shm},
                                       {"cuda_ipc", Transport::cudaIpc},
                                       {"tcp", Transport::tcp},
                                       {"verbs", Transport::verbs}}})),
      timeout(timeoutFrom(lookup)),
      platform(choice<Platform, 2>(lookup, "MSCCLPP_EP_PLATFORM",
                                   {{{"cpu", Platform::cpu}, {"cuda", Platform::cuda}}})),
      cudaMaxConnections(cudaMaxConnectionsFrom(lookup)),
      logLevel(choice<LogLevel, 6>(lookup, "MSCCLPP_LOG_LEVEL",
                                   {{{"trace", LogLevel::trace},
                                     {"debug", LogLevel::debug},
                                     {"info", LogLevel::info},
                                     {"warn", LogLevel::warn},
                                     {"error", LogLevel::error},
                                     {"off", LogLevel::off}}})
                   .value_or(LogLevel::warn)),
      socketInterface(text(lookup, "MSCCLPP_SOCKET_INTERFACE")),
      hostId(hostIdFrom(lookup)) {}

const Env& env() {
  static const Env instance([](const char* name) -> const char* { return std::getenv(name); });
  return instance;
}

const std::string& hostId() {
  static const std::string id = env().hostId.empty() ? machineId() : env().hostId;
  return id;
}

}  // namespace mscclpp
