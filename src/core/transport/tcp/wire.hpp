// What tcp endpoints send each other, in the machine's byte order (all ranks are little endian).
#pragma once

#include <cstdint>

#include "core/bootstrap/rendezvous.hpp"

namespace mscclpp::transport::tcp {

/// Changes with every change of the structures below.
inline constexpr uint32_t kVersion = 0x7C50'0001;
/// Longest payload of a frame. A long write goes in pieces, so that acks and heartbeats of the same
/// direction never wait long.
inline constexpr uint64_t kPieceBytes = uint64_t{128} << 10;

/// Connection::address(): plain bytes.
struct Address {
  uint32_t version;
  int32_t rank;
  uint64_t endpoint;  ///< random: whose memories the connection can reach
  UniqueId listener;  ///< a detail::Rendezvous: addresses, port and secret of this connection
};

/// The first bytes on a socket, from the dialler and then back: each side shows the secret that
/// only the other one told it.
struct Greeting {
  uint32_t version;
  int32_t from;
  int32_t to;
  uint32_t reserved;
  detail::Secret secret;
};
static_assert(sizeof(Greeting) == 32);

/// LocalMemory::describe(): plain bytes.
struct MemoryDescription {
  uint32_t version;
  uint32_t onDevice;
  uint64_t endpoint;
  uint64_t id;
  uint64_t bytes;
};
static_assert(sizeof(MemoryDescription) == 32);

enum class FrameType : uint32_t {
  write = 1,  ///< `value` bytes follow, for `offset` in `memory`
  add,        ///< adds `value` to the counter at `offset` in `memory`
  ack,        ///< `value` operations of the receiver of this frame are complete
  heartbeat,  ///< nothing: the sender lives
  goodbye     ///< nothing follows, and the end of the stream is no failure
};

struct FrameHeader {
  FrameType type;
  uint32_t last = 0;  ///< write: whether the operation ends with this piece
  uint64_t memory = 0;
  uint64_t offset = 0;
  uint64_t value = 0;
};
static_assert(sizeof(FrameHeader) == 32);

}  // namespace mscclpp::transport::tcp
