#include "pool.hpp"

#include <algorithm>

#include <mscclpp/errors.hpp>

#include "plan/memory_plan.hpp"

namespace mscclpp::ep {

Pool::Pool(std::size_t begin, std::size_t bytes) : begin_(begin), bytes_(bytes) {
  if (bytes > 0) free_.emplace(begin, FreePiece{bytes, {}});
}

std::optional<std::size_t> Pool::take(std::size_t bytes, Stream& stream) {
  const std::size_t wanted = alignUp(std::max<std::size_t>(bytes, 1), kTensorAlign);
  std::vector<Event> users;
  std::size_t offset = 0;
  {
    const std::lock_guard lock(mutex_);
    const auto fits = [&](const auto& entry) { return entry.second.bytes >= wanted; };
    const auto it = std::find_if(free_.begin(), free_.end(), fits);
    if (it == free_.end()) return std::nullopt;
    offset = it->first;
    FreePiece piece = std::move(it->second);
    free_.erase(it);
    users = piece.users;
    if (piece.bytes > wanted) {
      free_.emplace(offset + wanted, FreePiece{piece.bytes - wanted, std::move(piece.users)});
    }
    taken_.emplace(offset, wanted);
  }
  for (const Event& event : users) stream.wait(event);
  return offset;
}

void Pool::release(std::size_t offset, std::vector<Event> users) {
  const std::lock_guard lock(mutex_);
  const auto it = taken_.find(offset);
  check(it != taken_.end(), ErrorCode::internal, "pool offset {} is not taken", offset);
  const std::size_t bytes = it->second;
  taken_.erase(it);
  insertMerged(offset, {bytes, std::move(users)});
}

void Pool::insertMerged(std::size_t offset, FreePiece piece) {
  std::erase_if(piece.users, [](const Event& event) { return event.query(); });
  const auto absorb = [&](std::map<std::size_t, FreePiece>::iterator it) {
    piece.bytes += it->second.bytes;
    for (Event& event : it->second.users) {
      if (!event.query()) piece.users.push_back(std::move(event));
    }
    free_.erase(it);
  };
  const auto after = free_.find(offset + piece.bytes);
  if (after != free_.end()) absorb(after);
  const auto next = free_.lower_bound(offset);
  if (next != free_.begin()) {
    const auto before = std::prev(next);
    if (before->first + before->second.bytes == offset) {
      offset = before->first;
      absorb(before);
    }
  }
  free_.emplace(offset, std::move(piece));
}

void Pool::drain() {
  std::vector<Event> users;
  {
    const std::lock_guard lock(mutex_);
    for (auto& [offset, piece] : free_) {
      users.insert(users.end(), piece.users.begin(), piece.users.end());
      piece.users.clear();
    }
  }
  for (const Event& event : users) event.synchronize();
}

std::size_t Pool::bytesFree() const {
  const std::lock_guard lock(mutex_);
  std::size_t sum = 0;
  for (const auto& [offset, piece] : free_) sum += piece.bytes;
  return sum;
}

}  // namespace mscclpp::ep
