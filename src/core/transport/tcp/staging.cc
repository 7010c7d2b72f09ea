#include "core/transport/tcp/staging.hpp"

#include <mscclpp/errors.hpp>

#include "core/transport/tcp/wire.hpp"

namespace mscclpp::transport::tcp {

namespace {
/// Eight long pieces: the copy engine and the socket work at the same time.
constexpr uint64_t kRingBytes = 8 * kPieceBytes;
constexpr uint64_t kAlignment = 16;
}  // namespace

Staging::Staging(std::shared_ptr<Device> device, std::shared_ptr<Stream> stream)
    : device_(std::move(device)),
      ring_(device_->allocatePinned(kRingBytes)),
      stream_(std::move(stream)) {}

Staging::~Staging() {
  runNoThrow("tcp: waiting for copies of a connection that ends", [this] { finish(); });
}

void Staging::finish() {
  stream_->synchronize();
}

char* Staging::reserve(uint64_t bytes) {
  const uint64_t room = (bytes + kAlignment - 1) / kAlignment * kAlignment;
  uint64_t start = head_;
  if (start % kRingBytes + room > kRingBytes) start += kRingBytes - start % kRingBytes;
  if (start + room - tail_ > kRingBytes) return nullptr;
  head_ = start + room;
  return static_cast<char*>(ring_.get()) + start % kRingBytes;
}

void Staging::copy(void* destination, const void* source, uint64_t bytes) {
  copied_ = true;
  device_->copy(destination, source, bytes, *stream_);
}

Event Staging::record() {
  copied_ = false;
  return stream_->record(false);
}

}  // namespace mscclpp::transport::tcp
