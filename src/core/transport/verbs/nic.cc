#include "core/transport/verbs/nic.hpp"

#include <fcntl.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <sstream>
#include <vector>

#include <mscclpp/errors.hpp>
#include <mscclpp/log.hpp>

namespace mscclpp::transport::verbs {

namespace {

constexpr std::chrono::milliseconds kLookEvery(10);

struct DeviceList {
  DeviceList() : devices(library().getDeviceList(&count)) {}
  ~DeviceList() {
    if (devices != nullptr) library().freeDeviceList(devices);
  }
  DeviceList(const DeviceList&) = delete;
  DeviceList& operator=(const DeviceList&) = delete;

  int count = 0;
  ibv_device** devices;
};

template <class T>
T* made(T* object, const char* what, const std::string& name) {
  if (object == nullptr) throw SystemError(errno, fmt::format("verbs: {} of {}", what, name));
  return object;
}

int portCount(ibv_device* device) {
  const std::string name = library().getDeviceName(device);
  const Handle<ibv_context> context(made(library().openDevice(device), "ibv_open_device", name),
                                    library().closeDevice);
  ibv_device_attr limits{};
  const int error = library().queryDevice(context.get(), &limits);
  if (error != 0) throw SystemError(error, "verbs: ibv_query_device of " + name);
  return limits.phys_port_cnt;
}

ibv_port_attr queryPort(ibv_context* context, uint8_t number, const std::string& name) {
  ibv_port_attr port{};
  // The exported function fills in the fields that it knows; ours is the larger structure.
  const int error =
      library().queryPort(context, number, reinterpret_cast<_compat_ibv_port_attr*>(&port));
  if (error != 0) throw SystemError(error, fmt::format("verbs: ibv_query_port of {}", name));
  return port;
}

std::string canonical(const std::string& path) {
  std::error_code error;
  const std::string result = std::filesystem::canonical(path, error).string();
  return error ? std::string() : result;
}

std::string firstLine(const std::string& path) {
  std::ifstream file(path);
  std::string line;
  std::getline(file, line);
  return line;
}

std::string join(const std::vector<std::string>& parts) {
  std::string result;
  for (const std::string& part : parts) result += (result.empty() ? "" : "; ") + part;
  return result;
}

}  // namespace

std::string_view toString(GpuDirect kind) noexcept {
  switch (kind) {
    case GpuDirect::dmaBuf:
      return "dma-buf";
    case GpuDirect::peerMem:
      return "nvidia_peermem";
    case GpuDirect::none:
      break;
  }
  return "none";
}

GpuDirect gpuDirectOf(const Device& device) {
  if (device.platform() != Platform::cuda) return GpuDirect::none;
  if (library().regDmaBufMr != nullptr && device.canExportDmaBuf()) return GpuDirect::dmaBuf;
  const bool module = std::filesystem::exists("/sys/module/nvidia_peermem") ||
                      std::filesystem::exists("/sys/kernel/mm/memory_peers/nv_mem");
  return module ? GpuDirect::peerMem : GpuDirect::none;
}

Nic::Nic(ibv_device* device, int port, const Wanted& wanted)
    : deviceName_(library().getDeviceName(device)),
      portNumber_(static_cast<uint8_t>(port)),
      context_(made(library().openDevice(device), "ibv_open_device", deviceName_),
               library().closeDevice),
      pd_(made(library().allocPd(context_.get()), "ibv_alloc_pd", deviceName_),
          library().deallocPd) {
  const int error = library().queryDevice(context_.get(), &limits_);
  if (error != 0) throw SystemError(error, "verbs: ibv_query_device of " + deviceName_);
  check(port <= limits_.phys_port_cnt, ErrorCode::invalidArgument,
        "verbs: {} has {} ports, port {} does not exist", deviceName_, limits_.phys_port_cnt, port);
  port_ = queryPort(context_.get(), portNumber_, name());
  check(port_.state == IBV_PORT_ACTIVE, ErrorCode::unsupported,
        "{} is not active (state {}): is the link up?", name(), static_cast<int>(port_.state));
  std::vector<ibv_gid_entry> table;
  for (int number = 1; number <= limits_.phys_port_cnt; ++number) {
    const auto attributes = queryPort(context_.get(), static_cast<uint8_t>(number), deviceName_);
    table.resize(table.size() + static_cast<size_t>(attributes.gid_tbl_len));
  }
  const ssize_t entries =
      library().queryGidTable(context_.get(), table.data(), table.size(), 0, sizeof(ibv_gid_entry));
  if (entries < 0) {
    throw SystemError(static_cast<int>(-entries), "verbs: ibv_query_gid_table of " + deviceName_);
  }
  table.resize(static_cast<size_t>(entries));
  const ibv_gid_entry* const gid = chooseGid(table, port, ethernet(), wanted.address);
  check(gid != nullptr, ErrorCode::unsupported, "{} has no {} among its {} GIDs: {}", name(),
        wanted.address ? "RoCE v2 address " + gidText(*wanted.address)
        : ethernet()   ? "RoCE v2 address"
                       : "address",
        entries, ethernet() ? "give its interface an IP address" : "is a subnet manager running?");
  gid_ = *gid;
  const int flags = ::fcntl(context_->async_fd, F_GETFL);
  if (::fcntl(context_->async_fd, F_SETFL, flags | O_NONBLOCK) != 0) {
    throw SystemError(errno, "verbs: O_NONBLOCK for the events of " + deviceName_);
  }
}

std::shared_ptr<Nic> Nic::open(const std::string& text, const Device& device, int rank) {
  const Wanted wanted = parseWanted(text);
  const DeviceList list;
  check(list.count > 0, ErrorCode::unsupported,
        "transport verbs: this machine has no RDMA device (ibv_devices lists none): load the NIC's "
        "driver, in a container pass /dev/infiniband through, or use the transport tcp");
  std::vector<std::shared_ptr<Nic>> usable;
  std::vector<std::string> names;
  std::vector<std::string> reasons;
  for (int i = 0; i < list.count; ++i) {
    const std::string name = library().getDeviceName(list.devices[i]);
    names.push_back(name);
    if (!wanted.name.empty() && wanted.name != name) continue;
    try {
      const int first = wanted.port == 0 ? 1 : wanted.port;
      const int last = wanted.port == 0 ? portCount(list.devices[i]) : wanted.port;
      for (int port = first; port <= last; ++port) {
        try {
          usable.push_back(std::make_shared<Nic>(list.devices[i], port, wanted));
        } catch (const Error& error) {
          reasons.emplace_back(error.what());
        }
      }
    } catch (const Error& error) {
      reasons.emplace_back(error.what());
    }
  }
  if (usable.empty()) {
    const std::string all = fmt::format("{}", fmt::join(names, ", "));
    check(!reasons.empty(), ErrorCode::invalidArgument,
          "transport verbs: there is no RDMA device '{}': this machine has {}", text, all);
    fail(ErrorCode::unsupported, "transport verbs: none of the RDMA devices ({}) can be used: {}",
         all, join(reasons));
  }
  std::stable_sort(usable.begin(), usable.end(), [&](const auto& one, const auto& other) {
    return other->merit(device) < one->merit(device);
  });
  size_t equal = 1;
  while (equal < usable.size() && usable[equal]->merit(device) == usable[0]->merit(device)) ++equal;
  return usable[static_cast<size_t>(rank) % equal];
}

std::array<int, 3> Nic::merit(const Device& device) const {
  const std::string place = device.pciAddress();
  int near = 0;
  bool sameNode = false;
  if (!place.empty()) {
    const std::string theirs = "/sys/bus/pci/devices/" + place;
    near = commonFolders(canonical(attribute("device")), canonical(theirs));
    const std::string node = firstLine(attribute("device/numa_node"));
    sameNode = !node.empty() && node == firstLine(theirs + "/numa_node");
  }
  // A fast port of InfiniBand beside a slow one for management is common.
  return {near * 2 + (sameNode ? 1 : 0), ethernet() ? 0 : 1,
          static_cast<int>(port_.active_speed) * port_.active_width};
}

std::string Nic::attribute(const std::string& file) const {
  return "/sys/class/infiniband/" + deviceName_ + "/" + file;
}

PortAddress Nic::address() const {
  PortAddress result{};
  std::copy(std::begin(gid_.gid.raw), std::end(gid_.gid.raw), result.gid.begin());
  result.lid = port_.lid;
  result.linkLayer = port_.link_layer;
  result.mtu = static_cast<uint8_t>(port_.active_mtu);
  return result;
}

std::string Nic::name() const {
  return fmt::format("{}:{}", deviceName_, portNumber_);
}

std::string Nic::describe() const {
  const std::string rate = firstLine(attribute(fmt::format("ports/{}/rate", portNumber_)));
  const std::string node = firstLine(attribute("device/numa_node"));
  return fmt::format("{} ({}, {}, GID {} = {}, MTU {}, NUMA node {}, atomics {})", name(),
                     ethernet() ? "RoCE v2" : fmt::format("InfiniBand, LID {}", port_.lid),
                     rate.empty() ? "rate unknown" : rate, gid_.gid_index, gidText(gid_.gid),
                     128 << port_.active_mtu, node.empty() || node == "-1" ? "unknown" : node,
                     atomics() ? "yes" : "no");
}

std::string Nic::distanceTo(const Device& device) const {
  const std::string place = device.pciAddress();
  if (place.empty()) return {};
  const auto number = [](const std::string& file) {
    int value = -1;
    std::istringstream(firstLine(file)) >> value;
    return value;
  };
  const int theirs = number("/sys/bus/pci/devices/" + place + "/numa_node");
  const auto distance =
      numaDistanceIn(firstLine(fmt::format("/sys/devices/system/node/node{}/distance", theirs)),
                     number(attribute("device/numa_node")));
  return distance ? fmt::format("NUMA distance {} to the device", *distance)
                  : std::string("NUMA distance unknown");
}

void Nic::pollEvents(bool now) noexcept {
  std::unique_lock lock(mutex_, std::defer_lock);
  if (now) {
    lock.lock();
  } else if (!lock.try_lock()) {
    return;  // another connection looks
  }
  const auto time = std::chrono::steady_clock::now();
  if (!now && time < nextLook_) return;
  nextLook_ = time + kLookEvery;
  ibv_async_event event{};
  while (library().getAsyncEvent(context_.get(), &event) == 0) {
    runNoThrow("events of an RDMA device", [&] {
      const std::string text = library().eventName(event.event_type);
      events_.note(event, portNumber_, text);
      log::info("verbs: {}: {}", name(), text);
    });
    library().ackAsyncEvent(&event);
  }
}

}  // namespace mscclpp::transport::verbs
