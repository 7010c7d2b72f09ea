// A port of an RDMA device, opened.
#pragma once

#include <array>
#include <chrono>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>

#include <mscclpp/platform.hpp>

#include "core/transport/verbs/choice.hpp"
#include "core/transport/verbs/event_log.hpp"
#include "core/transport/verbs/library.hpp"

namespace mscclpp::transport::verbs {

/// How packets find a port: plain bytes, told to peers.
struct PortAddress {
  std::array<uint8_t, 16> gid;
  uint16_t lid;       ///< InfiniBand only
  uint8_t linkLayer;  ///< IBV_LINK_LAYER_INFINIBAND or _ETHERNET
  uint8_t mtu;        ///< as ibv_mtu numbers them
};

/// How a NIC reaches GPU memory.
enum class GpuDirect {
  none,
  dmaBuf,  ///< the driver exports the memory; needs nothing else
  peerMem  ///< the kernel module nvidia_peermem
};
std::string_view toString(GpuDirect kind) noexcept;
GpuDirect gpuDirectOf(const Device& device);

/// Thread safe.
class Nic {
 public:
  /// The port that `wanted` names (see Wanted); when it names none, the one nearest to `device` on
  /// the PCI bus. Of several equally good ones rank r takes the (r modulo count)th, so that the
  /// ranks of a host share them. @throws Error unsupported with what is missing, invalidArgument.
  static std::shared_ptr<Nic> open(const std::string& wanted, const Device& device, int rank);
  Nic(ibv_device* device, int port, const Wanted& wanted);

  ibv_context* context() const noexcept { return context_.get(); }
  ibv_pd* pd() const noexcept { return pd_.get(); }
  const ibv_device_attr& limits() const noexcept { return limits_; }
  const ibv_port_attr& port() const noexcept { return port_; }
  uint8_t portNumber() const noexcept { return portNumber_; }
  uint8_t gidIndex() const noexcept { return static_cast<uint8_t>(gid_.gid_index); }
  bool ethernet() const noexcept { return port_.link_layer == IBV_LINK_LAYER_ETHERNET; }
  bool atomics() const noexcept { return limits_.atomic_cap != IBV_ATOMIC_NONE; }
  PortAddress address() const;
  /// "mlx5_0:1".
  std::string name() const;
  /// One line for people.
  std::string describe() const;
  /// "NUMA distance 10 to the device", "NUMA distance unknown", or nothing for the CPU.
  std::string distanceTo(const Device& device) const;

  /// Puts what the hardware tells unasked into events(); unless `now`, looks at most every few
  /// milliseconds.
  void pollEvents(bool now = false) noexcept;
  EventLog& events() noexcept { return events_; }

 private:
  /// How well this port suits `device`: compare with <.
  std::array<int, 3> merit(const Device& device) const;
  std::string attribute(const std::string& file) const;

  std::string deviceName_;
  uint8_t portNumber_;
  Handle<ibv_context> context_;
  Handle<ibv_pd> pd_;
  ibv_device_attr limits_{};
  ibv_port_attr port_{};
  ibv_gid_entry gid_{};

  EventLog events_;
  std::mutex mutex_;  ///< of the looking, and of nextLook_
  std::chrono::steady_clock::time_point nextLook_;
};

}  // namespace mscclpp::transport::verbs
