#include "core/bootstrap/connection.hpp"

#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/socket.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <cstring>
#include <utility>

#include <asio/buffer.hpp>
#include <asio/read.hpp>
#include <asio/write.hpp>

#include <mscclpp/errors.hpp>

namespace mscclpp::detail {

Frame Frame::make(FrameType type, int rank, int tag, uint64_t sequence) {
  Frame frame;
  frame.header = {.type = type, .rank = rank, .tag = tag, .sequence = sequence};
  return frame;
}

Frame Frame::text(FrameType type, int rank, int tag, const std::string& text) {
  Frame frame = make(type, rank, tag);
  frame.payload.resize(text.size());
  std::memcpy(frame.payload.data(), text.data(), text.size());
  return frame;
}

std::string Frame::payloadText() const {
  return {reinterpret_cast<const char*>(payload.data()), payload.size()};
}

Connection::Connection(Socket socket) : socket_(std::move(socket)) {}

void Connection::start(FrameHandler onFrame, ClosedHandler onClosed) {
  onFrame_ = std::move(onFrame);
  onClosed_ = std::move(onClosed);
  readHeader();
}

void Connection::readHeader() {
  asio::async_read(socket_, asio::buffer(&inbound_.header, sizeof(FrameHeader)),
                   [self = shared_from_this()](const asio::error_code& error, size_t) {
                     if (error) return self->fail(error.message());
                     if (self->inbound_.header.bytes > kMaxPayload) {
                       return self->fail("a frame of impossible length");
                     }
                     self->readPayload();
                   });
}

void Connection::readPayload() {
  inbound_.payload.resize(inbound_.header.bytes);
  asio::async_read(socket_, asio::buffer(inbound_.payload),
                   [self = shared_from_this()](const asio::error_code& error, size_t) {
                     if (error) return self->fail(error.message());
                     Frame frame = std::exchange(self->inbound_, Frame{});
                     // A copy: the handler may close the connection, which drops the original.
                     if (const FrameHandler handler = self->onFrame_) handler(frame);
                     if (self->open()) self->readHeader();
                   });
}

void Connection::send(Frame frame) {
  send(frame.header, std::make_shared<const Bytes>(std::move(frame.payload)));
}

void Connection::send(const FrameHeader& header, std::shared_ptr<const Bytes> payload) {
  if (!open() || closing_) return;
  Outbound next{header, std::move(payload)};
  next.header.bytes = next.payload->size();
  outbound_.push_back(std::move(next));
  if (outbound_.size() == 1) writeNext();
}

void Connection::writeNext() {
  const Outbound& next = outbound_.front();
  const std::array<asio::const_buffer, 2> buffers = {
      asio::buffer(&next.header, sizeof(FrameHeader)), asio::buffer(*next.payload)};
  asio::async_write(socket_, buffers,
                    [self = shared_from_this()](const asio::error_code& error, size_t) {
                      if (error) return self->fail(error.message());
                      if (!self->outbound_.empty()) self->outbound_.pop_front();
                      if (!self->outbound_.empty()) return self->writeNext();
                      if (self->closing_) self->close();
                    });
}

void Connection::closeAfterFlush() {
  closing_ = true;
  if (outbound_.empty()) close();
}

void Connection::close() {
  if (!open()) return;
  onFrame_ = nullptr;
  onClosed_ = nullptr;
  asio::error_code ignored;
  socket_.close(ignored);
}

void Connection::fail(const std::string& why) {
  if (!open()) return;
  const ClosedHandler handler = std::exchange(onClosed_, nullptr);
  close();
  if (handler) handler(why);
}

void openUninherited(Socket& socket, int family) {
  const int fd = ::socket(family, SOCK_STREAM | SOCK_CLOEXEC, IPPROTO_TCP);
  if (fd < 0) throw SystemError(errno, fmt::format("a socket of family {}", family));
  asio::error_code error;
  socket.assign(asio::generic::stream_protocol(family, IPPROTO_TCP), fd, error);
  if (!error) return;
  ::close(fd);
  throw SystemError(error.value(), fmt::format("a socket of family {}", family));
}

void tuneSocket(Socket& socket) {
  const auto set = [&](int level, int name, int value) {
    ::setsockopt(socket.native_handle(), level, name, &value, sizeof(value));
  };
  set(IPPROTO_TCP, TCP_NODELAY, 1);
  set(SOL_SOCKET, SO_KEEPALIVE, 1);
  set(IPPROTO_TCP, TCP_KEEPIDLE, 5);
  set(IPPROTO_TCP, TCP_KEEPINTVL, 2);
  set(IPPROTO_TCP, TCP_KEEPCNT, 5);
}

}  // namespace mscclpp::detail
