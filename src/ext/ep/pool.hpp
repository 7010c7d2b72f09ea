#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <mutex>
#include <optional>
#include <vector>

#include <mscclpp/platform.hpp>

namespace mscclpp::ep {

/// Hands out pieces of the heap's pool in stream order: a piece given back while kernels still use
/// it carries their events, and whoever gets it next waits for them on its stream, not on the host.
/// Thread safe (tensors are dropped from any thread).
class Pool {
 public:
  Pool(std::size_t begin, std::size_t bytes);

  /// Offset of a free piece of at least `bytes`, first fit; `stream` will wait for its last users.
  /// Empty when no piece is large enough.
  std::optional<std::size_t> take(std::size_t bytes, Stream& stream);
  /// Gives back what take() returned; `users` are complete when nobody touches it any more.
  void release(std::size_t offset, std::vector<Event> users);

  /// Blocks the host until nobody touches any free piece any more.
  void drain();

  std::size_t bytesFree() const;
  bool contains(std::size_t offset) const { return offset >= begin_ && offset < begin_ + bytes_; }

 private:
  struct FreePiece {
    std::size_t bytes;
    std::vector<Event> users;
  };
  void insertMerged(std::size_t offset, FreePiece piece);

  const std::size_t begin_, bytes_;
  mutable std::mutex mutex_;
  std::map<std::size_t, FreePiece> free_;     // by offset, never two adjacent
  std::map<std::size_t, std::size_t> taken_;  // offset -> bytes
};

}  // namespace mscclpp::ep
