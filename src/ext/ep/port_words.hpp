#pragma once

#include <cstdint>

#include <mscclpp/port_channel_handle.hpp>

namespace mscclpp::ep {

/// Each family of kernels has its own channels: their signals are counted apart.
enum class PortUse : std::uint32_t { lowLatencyDispatch, lowLatencyCombine, highThroughput };
inline constexpr int kPortUses = 3;
/// 64-bit words per source rank and use that peers may add to.
inline constexpr int kPortWords = 256;

/// Where the words of PortPeers lie in its counter memory; for host and kernels.
struct PortWords {
  int ranks = 1;
  /// Of the word that `source` adds to: a byte offset, for atomicAdd.
  constexpr std::uint64_t offset(PortUse use, int source, int word) const {
    return ((static_cast<std::uint64_t>(use) * static_cast<std::uint64_t>(ranks) +
             static_cast<std::uint64_t>(source)) *
                kPortWords +
            static_cast<std::uint64_t>(word)) *
           sizeof(std::uint64_t);
  }
  constexpr std::uint64_t bytes() const { return offset(static_cast<PortUse>(kPortUses), 0, 0); }
};

}  // namespace mscclpp::ep
