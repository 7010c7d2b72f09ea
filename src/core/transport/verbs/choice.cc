#include "core/transport/verbs/choice.hpp"

#include <arpa/inet.h>

#include <algorithm>
#include <charconv>
#include <cstring>
#include <filesystem>
#include <sstream>

#include <mscclpp/errors.hpp>

namespace mscclpp::transport::verbs {

namespace {

constexpr std::array<uint8_t, 12> kIpv4Prefix{0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff};

bool isIpv4(const ibv_gid& gid) {
  return std::equal(kIpv4Prefix.begin(), kIpv4Prefix.end(), gid.raw);
}

bool isLinkLocal(const ibv_gid& gid) {
  if (isIpv4(gid)) return gid.raw[12] == 169 && gid.raw[13] == 254;
  return gid.raw[0] == 0xfe && (gid.raw[1] & 0xc0) == 0x80;
}

std::optional<ibv_gid> parseAddress(const std::string& text) {
  ibv_gid gid{};
  if (::inet_pton(AF_INET6, text.c_str(), gid.raw) == 1) return gid;
  std::copy(kIpv4Prefix.begin(), kIpv4Prefix.end(), gid.raw);
  if (::inet_pton(AF_INET, text.c_str(), gid.raw + kIpv4Prefix.size()) == 1) return gid;
  return std::nullopt;
}

}  // namespace

Wanted parseWanted(const std::string& text) {
  Wanted wanted;
  wanted.address = parseAddress(text);
  if (wanted.address) return wanted;
  const size_t colon = text.find(':');
  wanted.name = text.substr(0, colon);
  if (colon == std::string::npos) return wanted;
  const std::string number = text.substr(colon + 1);
  const auto [end, error] =
      std::from_chars(number.data(), number.data() + number.size(), wanted.port);
  check(error == std::errc() && end == number.data() + number.size() && wanted.port >= 1 &&
            wanted.port <= 255,
        ErrorCode::invalidArgument,
        "verbs: interface '{}': '{}' is no port: write a device (mlx5_0), a device and a port from "
        "1 to 255 (mlx5_0:1), or an IP address of the NIC",
        text, number);
  return wanted;
}

const ibv_gid_entry* chooseGid(std::span<const ibv_gid_entry> table, int port, bool ethernet,
                               const std::optional<ibv_gid>& address) {
  const uint32_t type = ethernet ? IBV_GID_TYPE_ROCE_V2 : IBV_GID_TYPE_IB;
  const auto rank = [&](const ibv_gid_entry& entry) {
    if (!ethernet) return 0;
    return (isLinkLocal(entry.gid) ? 2 : 0) + (isIpv4(entry.gid) ? 0 : 1);
  };
  const ibv_gid_entry* best = nullptr;
  for (const ibv_gid_entry& entry : table) {
    if (entry.port_num != static_cast<uint32_t>(port) || entry.gid_type != type) continue;
    if (entry.gid_index > UINT8_MAX) continue;  // a path has 8 bits for it
    if (address && std::memcmp(address->raw, entry.gid.raw, sizeof(entry.gid.raw)) != 0) continue;
    if (best == nullptr || rank(entry) < rank(*best)) best = &entry;
  }
  return best;
}

std::string gidText(const ibv_gid& gid) {
  char text[INET6_ADDRSTRLEN] = {};
  if (isIpv4(gid)) {
    ::inet_ntop(AF_INET, gid.raw + kIpv4Prefix.size(), text, sizeof(text));
  } else {
    ::inet_ntop(AF_INET6, gid.raw, text, sizeof(text));
  }
  return text;
}

std::optional<int> numaDistanceIn(const std::string& line, int node) {
  std::istringstream distances(line);
  int distance = 0;
  for (int i = 0; i <= node; ++i) {
    if (!(distances >> distance)) return std::nullopt;
  }
  return node < 0 ? std::nullopt : std::optional(distance);
}

int commonFolders(const std::string& one, const std::string& other) {
  const std::filesystem::path a(one);
  const std::filesystem::path b(other);
  const auto [end, unused] = std::mismatch(a.begin(), a.end(), b.begin(), b.end());
  return static_cast<int>(std::distance(a.begin(), end));
}

}  // namespace mscclpp::transport::verbs
