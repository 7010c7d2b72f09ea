// The bare transport that port channels over tcp are compared with.
#pragma once

#include <cstdint>

namespace mscclpp::bench {

/// Seconds that `count` messages of `bytes` take over a plain TCP connection on the loopback
/// interface: one thread writes them, one reads each into the same place, both block. From the
/// first byte until the writer knows that the last one has been read.
double bareSockets(uint64_t bytes, uint64_t count);

}  // namespace mscclpp::bench
