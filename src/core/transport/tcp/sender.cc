#include "core/transport/tcp/sender.hpp"

#include <algorithm>
#include <utility>

namespace mscclpp::transport::tcp {

namespace {
/// What one call may hand to the socket, so that other connections of the thread get their turn.
constexpr uint64_t kMaxFramedBytes = 4 * kPieceBytes;
constexpr size_t kMaxFrames = 32;  // two buffers each: as many as asio gathers in one call
}  // namespace

void Sender::write(std::shared_ptr<const Memory> source, uint64_t sourceOffset,
                   const PeerMemory& target, uint64_t targetOffset, uint64_t bytes) {
  operations_.push_back({.header = {.type = FrameType::write,
                                    .memory = target.id(),
                                    .offset = targetOffset,
                                    .value = bytes},
                         .source = std::move(source),
                         .sourceOffset = sourceOffset});
}

void Sender::add(const PeerMemory& target, uint64_t offset, int64_t value) {
  operations_.push_back({.header = {.type = FrameType::add,
                                    .memory = target.id(),
                                    .offset = offset,
                                    .value = static_cast<uint64_t>(value)},
                         .source = nullptr});
}

void Sender::heartbeat() {
  if (idle()) push({.header = {.type = FrameType::heartbeat}});
}

void Sender::goodbye() {
  if (staging_ != nullptr) staging_->finish();  // what is dropped now may be the source of a copy
  operations_.clear();
  while (frames_.size() > (sent_ > 0 ? 1U : 0U)) {
    if (frames_.back().header.type == FrameType::ack) {
      --acksInFrames_;
      ackFramed_ = 0;
    }
    framedBytes_ -= sizeof(FrameHeader) + frames_.back().bytes;
    frames_.pop_back();
  }
  push({.header = {.type = FrameType::ack, .value = ackValue_}});
  push({.header = {.type = FrameType::goodbye}});
}

size_t Sender::advance(detail::Socket& socket, asio::error_code& error) {
  compose();
  gather();
  if (buffers_.empty()) return 0;
  const size_t taken = socket.write_some(buffers_, error);
  consume(taken);
  return taken;
}

void Sender::compose() {
  const auto room = [this] {
    return frames_.size() < kMaxFrames && framedBytes_ < kMaxFramedBytes;
  };
  // One ack at a time: it says all there is to say when its turn comes.
  if (ackValue_ != ackFramed_ && acksInFrames_ == 0 && room()) {
    push({.header = {.type = FrameType::ack, .value = ackValue_}});
  }
  const size_t before = frames_.size();
  while (!operations_.empty() && room() && composePiece()) {
  }
  if (staging_ == nullptr || !staging_->copied()) return;
  const Event copied = staging_->record();
  for (size_t i = before; i < frames_.size(); ++i) {
    if (frames_[i].copied) frames_[i].copied = copied;
  }
}

bool Sender::composePiece() {
  Operation& operation = operations_.front();
  Frame frame{.header = operation.header};
  frame.header.last = 1;
  if (operation.header.type == FrameType::write) {
    frame.bytes = std::min(operation.header.value, kPieceBytes);
    frame.header.value = frame.bytes;
    frame.source = operation.source;
    frame.payload = operation.source->at(operation.sourceOffset);
    if (operation.source->staged() && frame.bytes > 0) {
      char* const room = staging_->reserve(frame.bytes);
      if (room == nullptr) return false;
      staging_->copy(room, frame.payload, frame.bytes);
      frame.payload = room;
      frame.copied.emplace();
      frame.stagingEnd = staging_->end();
    }
    operation.sourceOffset += frame.bytes;
    operation.header.offset += frame.bytes;
    operation.header.value -= frame.bytes;
    if (operation.header.value > 0) {
      frame.header.last = 0;
      push(std::move(frame));
      return true;
    }
  }
  operations_.pop_front();
  push(std::move(frame));
  return true;
}

void Sender::push(Frame frame) {
  if (frame.header.type == FrameType::ack) {
    ackFramed_ = frame.header.value;
    ++acksInFrames_;
  }
  framedBytes_ += sizeof(FrameHeader) + frame.bytes;
  frames_.push_back(std::move(frame));
}

void Sender::gather() {
  buffers_.clear();
  size_t skip = sent_;
  const auto append = [&](const void* data, size_t bytes) {
    const size_t skipped = std::min(skip, bytes);
    skip -= skipped;
    if (bytes > skipped) {
      buffers_.emplace_back(static_cast<const char*>(data) + skipped, bytes - skipped);
    }
  };
  for (Frame& frame : frames_) {
    if (frame.copied && !frame.copied->query()) break;
    append(&frame.header, sizeof(FrameHeader));
    append(frame.payload, frame.bytes);
  }
}

void Sender::consume(size_t bytes) {
  sent_ += bytes;
  while (!frames_.empty() && sent_ >= sizeof(FrameHeader) + frames_.front().bytes) {
    const Frame& first = frames_.front();
    const size_t whole = sizeof(FrameHeader) + first.bytes;
    sent_ -= whole;
    framedBytes_ -= whole;
    if (first.header.type == FrameType::ack) --acksInFrames_;
    if (first.copied) staging_->release(first.stagingEnd);
    frames_.pop_front();
  }
}

}  // namespace mscclpp::transport::tcp
