#pragma once

#include <cstddef>
#include <cstdint>

#include <mscclpp/device/vec16.hpp>

namespace mscclpp::device {

inline constexpr std::size_t kLineSize = 128;
inline constexpr int kLineLanes = 8;
/// Units of payload in a line.
inline constexpr int kLineUnits = 7;

/// What the hardware is trusted with.
enum class LineWrites : std::uint32_t {
  /// A warp's store of a whole aligned line becomes visible at once. NVLink and the memory of one
  /// GPU do that, no manual promises it (field: no wrong value in 80,000 round trips). Elsewhere,
  /// and always on the CPU platform, this is the same as flagLast.
  whole,
  /// Only what the memory model promises: the tail is released after the units.
  flagLast,
};

/// The last 16 bytes of a line.
struct alignas(16) LineTail {
  std::uint32_t first;   ///< the sender's own
  std::uint32_t second;  ///< likewise; may also be read alone (loadAcquire), whatever the epoch is
  std::uint64_t epoch;
};
static_assert(sizeof(LineTail) == sizeof(Vec16));

}  // namespace mscclpp::device
