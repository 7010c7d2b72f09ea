#include "core/transport/tcp/receiver.hpp"

#include <algorithm>
#include <cstring>
#include <utility>

#include <asio/buffer.hpp>

#include <mscclpp/errors.hpp>

namespace mscclpp::transport::tcp {

namespace {

/// What one call may read, so that other connections of the thread get their turn.
constexpr size_t kMaxReadBytes = 4 * kPieceBytes;
constexpr int kMaxReads = 16;

void applyAdd(const Memory& memory, uint64_t offset, int64_t value) {
  // Release: whoever sees the sum also sees what was written before. Acquire: as any counter here.
  __atomic_fetch_add(reinterpret_cast<int64_t*>(memory.at(offset)), value, __ATOMIC_ACQ_REL);
}

}  // namespace

size_t Receiver::advance(detail::Socket& socket, asio::error_code& error) {
  size_t total = 0;
  for (int reads = 0; reads < kMaxReads && total < kMaxReadBytes; ++reads) {
    if (!digest() || goodbye_) break;
    // The rest of the payload into its place, and what follows it into the buffer.
    const std::array<asio::mutable_buffer, 2> parts = {
        asio::buffer(into_, rest_), asio::buffer(buffer_.data() + end_, buffer_.size() - end_)};
    const size_t got = socket.read_some(parts, error);
    if (got == 0) break;
    total += got;
    const uint64_t ofPayload = std::min<uint64_t>(got, rest_);
    into_ += ofPayload;
    rest_ -= ofPayload;
    end_ += got - ofPayload;
    if (ofPayload > 0 && rest_ == 0) endPayload();
  }
  closeBatch();
  return total;
}

/// Uses up the buffer. False when a frame in it has to wait for room in the staging ring.
bool Receiver::digest() {
  while (!goodbye_) {
    if (rest_ > 0) {
      const uint64_t here = std::min<uint64_t>(rest_, end_ - begin_);
      std::memcpy(into_, buffer_.data() + begin_, here);
      into_ += here;
      rest_ -= here;
      begin_ += here;
      if (rest_ > 0) break;
      endPayload();
    }
    if (end_ - begin_ < sizeof(FrameHeader)) break;
    FrameHeader header;
    std::memcpy(&header, buffer_.data() + begin_, sizeof(header));
    if (!begin(header)) return false;
    begin_ += sizeof(header);
  }
  std::memmove(buffer_.data(), buffer_.data() + begin_, end_ - begin_);
  end_ -= begin_;
  begin_ = 0;
  return true;
}

bool Receiver::begin(const FrameHeader& header) {
  switch (header.type) {
    case FrameType::write:
      return beginWrite(header);
    case FrameType::add:
      beginAdd(header);
      return true;
    case FrameType::ack:
      check(header.value >= acknowledged_, ErrorCode::peerFailure,
            "sent a bad frame: an ack of {} operations after one of {}", header.value,
            acknowledged_);
      acknowledged_ = header.value;
      return true;
    case FrameType::heartbeat:
      return true;
    case FrameType::goodbye:
      goodbye_ = true;
      return true;
  }
  fail(ErrorCode::peerFailure, "sent a bad frame: type {}", static_cast<uint32_t>(header.type));
}

std::shared_ptr<Memory> Receiver::memoryFor(const FrameHeader& header, const char* what,
                                            uint64_t bytes) {
  std::shared_ptr<Memory> memory = memories_->find(header.memory);
  check(memory != nullptr, ErrorCode::peerFailure,
        "sent a bad frame: {} of {} bytes to memory {}, which is not registered (any more)", what,
        bytes, header.memory);
  check(header.offset <= memory->size() && bytes <= memory->size() - header.offset,
        ErrorCode::peerFailure,
        "sent a bad frame: {} of {} bytes at offset {} of memory {}, which has {} bytes", what,
        bytes, header.offset, header.memory, memory->size());
  return memory;
}

bool Receiver::beginWrite(const FrameHeader& header) {
  check(header.value <= kPieceBytes, ErrorCode::peerFailure,
        "sent a bad frame: a write of {} bytes in one piece, the limit is {}", header.value,
        kPieceBytes);
  std::shared_ptr<Memory> memory = memoryFor(header, "a write", header.value);
  char* into = memory->at(header.offset);
  staged_ = nullptr;
  if (memory->staged() && header.value > 0) {
    staged_ = staging_->reserve(header.value);
    if (staged_ == nullptr) return false;
    into = staged_;
  }
  frame_ = header;
  target_ = std::move(memory);
  into_ = into;
  rest_ = header.value;
  if (rest_ == 0) endPayload();
  return true;
}

void Receiver::endPayload() {
  if (staged_ != nullptr) {
    staging_->copy(target_->at(frame_.offset), staged_, frame_.value);
    open_.targets.push_back(target_);
    open_.stagingEnd = staging_->end();
    staged_ = nullptr;
  }
  target_.reset();
  if (frame_.last != 0) operationEnds();
}

void Receiver::beginAdd(const FrameHeader& header) {
  std::shared_ptr<Memory> memory = memoryFor(header, "an add", sizeof(int64_t));
  check(header.offset % sizeof(int64_t) == 0, ErrorCode::peerFailure,
        "sent a bad frame: an add at offset {}, which is no multiple of 8", header.offset);
  check(!memory->onDevice(), ErrorCode::peerFailure,
        "sent a bad frame: an add to memory {}, which is GPU memory", header.memory);
  const auto value = static_cast<int64_t>(header.value);
  if (behindCopies()) {
    open_.adds.push_back({std::move(memory), header.offset, value});
  } else {
    applyAdd(*memory, header.offset, value);
  }
  operationEnds();
}

void Receiver::operationEnds() {
  if (behindCopies()) {
    ++open_.operations;
  } else {
    ++complete_;
  }
}

void Receiver::closeBatch() {
  if (staging_ == nullptr) return;
  if (staging_->copied()) open_.copied = staging_->record();
  if (open_.copied || open_.operations > 0) batches_.push_back(std::exchange(open_, Batch{}));
}

bool Receiver::settle() {
  bool any = false;
  while (!batches_.empty()) {
    Batch& first = batches_.front();
    if (first.copied && !first.copied.query()) break;
    if (first.copied) staging_->release(first.stagingEnd);
    for (const Add& add : first.adds) applyAdd(*add.memory, add.offset, add.value);
    complete_ += first.operations;
    batches_.pop_front();
    any = true;
  }
  return any;
}

}  // namespace mscclpp::transport::tcp
