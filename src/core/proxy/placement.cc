#include "core/proxy/placement.hpp"

#include <sched.h>

#include <cerrno>
#include <charconv>
#include <fstream>
#include <optional>
#include <string_view>

#include <mscclpp/errors.hpp>
#include <mscclpp/log.hpp>

namespace mscclpp::detail {

namespace {

cpu_set_t allowedSet() {
  cpu_set_t set;
  CPU_ZERO(&set);
  if (::sched_getaffinity(0, sizeof(set), &set) != 0) throw SystemError(errno, "sched_getaffinity");
  return set;
}

std::string toText(const cpu_set_t& set) {
  std::string text;
  for (int core = 0; core < CPU_SETSIZE; ++core) {
    if (!CPU_ISSET(core, &set)) continue;
    int last = core;
    while (last + 1 < CPU_SETSIZE && CPU_ISSET(last + 1, &set)) ++last;
    text += fmt::format("{}{}", text.empty() ? "" : ",", core);
    if (last > core) text += fmt::format("-{}", last);
    core = last;
  }
  return text;
}

/// A list such as "0-15,32-47"; nothing when it is none.
std::optional<cpu_set_t> fromText(std::string_view text) {
  cpu_set_t set;
  CPU_ZERO(&set);
  const char* at = text.data();
  const char* const end = at + text.size();
  while (at != end) {
    int first = 0;
    auto [next, error] = std::from_chars(at, end, first);
    if (error != std::errc()) return std::nullopt;
    int last = first;
    if (next != end && *next == '-') {
      const auto range = std::from_chars(next + 1, end, last);
      if (range.ec != std::errc()) return std::nullopt;
      next = range.ptr;
    }
    for (int core = first; core <= last && core >= 0 && core < CPU_SETSIZE; ++core) {
      CPU_SET(core, &set);
    }
    at = next != end && *next == ',' ? next + 1 : next;
    if (next != end && *next != ',') return std::nullopt;
  }
  return set;
}

}  // namespace

std::string allowedCores() {
  return toText(allowedSet());
}

std::string pinNear(const Device& device) {
  const cpu_set_t allowed = allowedSet();
  const std::string address = device.pciAddress();
  if (address.empty()) return toText(allowed);
  // hwloc reads the same file.
  std::ifstream file("/sys/bus/pci/devices/" + address + "/local_cpulist");
  std::string line;
  std::getline(file, line);
  const auto near = fromText(line);
  cpu_set_t both;
  CPU_ZERO(&both);
  if (near) CPU_AND(&both, &*near, &allowed);
  if (CPU_COUNT(&both) == 0) {
    log::info("proxy: the machine does not tell which of the cores {} are near {}: not pinned",
              toText(allowed), device.describe());
    return toText(allowed);
  }
  if (::sched_setaffinity(0, sizeof(both), &both) != 0) {
    log::warn("proxy: cannot pin a thread to the cores {} (errno {}): not pinned", toText(both),
              errno);
    return toText(allowed);
  }
  return toText(both);
}

}  // namespace mscclpp::detail
