// Which NIC serves a device, and by which address: decisions on plain values.
#pragma once

#include <optional>
#include <span>
#include <string>

#include <infiniband/verbs.h>

namespace mscclpp::transport::verbs {

/// EndpointOptions::interface taken apart: a device ("mlx5_0"), a device and a port ("mlx5_0:2"),
/// or an IP address of the NIC ("10.1.0.3"). All empty: any.
struct Wanted {
  std::string name;
  int port = 0;  ///< 0: any
  std::optional<ibv_gid> address;
};
/// @throws Error invalidArgument for a port that is no number from 1 to 255.
Wanted parseWanted(const std::string& text);

/// The entry of a GID table that stands for `port`. InfiniBand: the first one. Ethernet: RoCE v2
/// only, found by its type and not by its place in the table, which differs from host to host; IPv4
/// before IPv6, addresses that are valid beyond the link before those that are not. `address`:
/// exactly that one. Null when there is none.
const ibv_gid_entry* chooseGid(std::span<const ibv_gid_entry> table, int port, bool ethernet,
                               const std::optional<ibv_gid>& address);

/// "10.1.0.3" or "fe80::1".
std::string gidText(const ibv_gid& gid);

/// How many folders two devices' places in /sys/devices have in common: the more, the fewer bridges
/// of the PCI bus lie between them.
int commonFolders(const std::string& one, const std::string& other);

/// The entry for NUMA node `node` of a line of distances, such as "10 21"; nothing when there is
/// none. 10 is the node itself.
std::optional<int> numaDistanceIn(const std::string& line, int node);

}  // namespace mscclpp::transport::verbs
