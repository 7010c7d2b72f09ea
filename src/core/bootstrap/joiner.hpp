// How a rank finds the root of its group.
#pragma once

#include <chrono>

#include <asio/io_context.hpp>

#include "core/bootstrap/connection.hpp"
#include "core/bootstrap/rendezvous.hpp"

namespace mscclpp::detail {

using Deadline = std::chrono::steady_clock::time_point;

struct JoinRequest {
  int rank;
  int size;
  const Rendezvous& rendezvous;
  Deadline deadline;
};

/// Tries the addresses of the root until it says welcome; runs `io` on the calling thread.
/// @throws TimeoutError, or Error invalidArgument when the root refuses.
Socket joinRoot(asio::io_context& io, const JoinRequest& request);

}  // namespace mscclpp::detail
