#pragma once

#include <cstdint>
#include <set>

#include <mscclpp/errors.hpp>

namespace mscclpp::ep {

/// Low-latency calls of one kind as the host has issued them. The kernels keep the epochs; the host
/// only knows which of the calls that are under way a receive half belongs to.
class LowLatencyCalls {
 public:
  /// A call is about to be issued. Returns its number. Two calls use the areas in turn, so the one
  /// before the last must have been received.
  std::uint64_t next(bool halves, const char* call) {
    check(underWay_.empty() || *underWay_.begin() >= issued_, ErrorCode::invalidState,
          "{}: the hook of the call before the last one has not been called; at most two calls may "
          "be under way",
          call);
    ++issued_;
    if (halves) underWay_.insert(issued_);
    return issued_;
  }
  /// The receive half of call `number` is about to be issued. Returns how many were sent since.
  std::uint64_t received(std::uint64_t number) {
    underWay_.erase(number);
    return issued_ - number;
  }

 private:
  std::uint64_t issued_ = 0;
  std::set<std::uint64_t> underWay_;
};

}  // namespace mscclpp::ep
