#include "core/bootstrap/joiner.hpp"

#include <algorithm>
#include <functional>
#include <optional>

#include <asio/buffer.hpp>
#include <asio/read.hpp>
#include <asio/steady_timer.hpp>
#include <asio/write.hpp>

#include <mscclpp/errors.hpp>

#include "core/bootstrap/root_server.hpp"

namespace mscclpp::detail {

namespace {

using Clock = std::chrono::steady_clock;
constexpr std::chrono::seconds kConnectLimit(5);
/// With several addresses, a silent one must not use up the whole time.
constexpr std::chrono::seconds kWelcomeLimit(15);
constexpr std::chrono::milliseconds kRetryPause(50);

enum class Outcome { welcome, unreachable, silent, closed };

/// One try of one address.
class Attempt {
 public:
  Attempt(asio::io_context& io, const JoinRequest& request)
      : io_(io), request_(request), socket_(io) {}

  Outcome run(const SocketAddress& address, bool onlyAddress) {
    const asio::generic::stream_protocol::endpoint endpoint(address.get(), address.length,
                                                            IPPROTO_TCP);
    openUninherited(socket_, address.storage.ss_family);
    if (!finish(Clock::now() + kConnectLimit,
                [&](auto done) { socket_.async_connect(endpoint, done); })) {
      return Outcome::unreachable;
    }
    tuneSocket(socket_);
    const Hello hello{request_.rendezvous.secret, kProtocolVersion, request_.rank, request_.size,
                      0};
    const Deadline limit = onlyAddress ? request_.deadline : Clock::now() + kWelcomeLimit;
    Frame frame;
    const bool answered =
        finish(limit,
               [&](auto done) {
                 asio::async_write(socket_, asio::buffer(&hello, sizeof(hello)),
                                   [done](const asio::error_code& error, size_t) { done(error); });
               }) &&
        finish(limit, [&](auto done) {
          asio::async_read(socket_, asio::buffer(&frame.header, sizeof(FrameHeader)),
                           [done](const asio::error_code& error, size_t) { done(error); });
        });
    if (!answered) return timedOut_ ? Outcome::silent : Outcome::closed;
    if (frame.header.type == FrameType::welcome) return Outcome::welcome;
    if (frame.header.type != FrameType::refuse || frame.header.bytes > kMaxRefusal) {
      return Outcome::closed;
    }
    frame.payload.resize(frame.header.bytes);
    finish(limit, [&](auto done) {
      asio::async_read(socket_, asio::buffer(frame.payload),
                       [done](const asio::error_code& error, size_t) { done(error); });
    });
    fail(ErrorCode::invalidArgument, "rank 0 refused this rank: {}", frame.payloadText());
  }

  Socket takeSocket() { return std::move(socket_); }
  const std::string& why() const { return why_; }

 private:
  static constexpr uint64_t kMaxRefusal = 4096;

  /// Starts an operation and runs it to its end or to the limit; whether it succeeded.
  template <class Start>
  bool finish(Deadline limit, Start start) {
    std::optional<asio::error_code> result;
    start(std::function<void(const asio::error_code&)>(
        [&result](const asio::error_code& error) { result = error; }));
    limit = std::min(limit, request_.deadline);
    io_.restart();
    while (!result && io_.run_one_until(limit) != 0) {
    }
    timedOut_ = !result;
    if (timedOut_) {
      asio::error_code ignored;
      socket_.close(ignored);
      io_.restart();
      while (!result && io_.run_one() != 0) {  // the operation refers to this frame: let it end
      }
    }
    why_ = timedOut_ ? "no answer" : result->message();
    return !timedOut_ && !*result;
  }

  asio::io_context& io_;
  const JoinRequest& request_;
  Socket socket_;
  bool timedOut_ = false;
  std::string why_;
};

void pauseFor(asio::io_context& io, std::chrono::milliseconds time) {
  asio::steady_timer timer(io, time);
  timer.async_wait([](const asio::error_code&) {});
  io.restart();
  io.run();
}

}  // namespace

Socket joinRoot(asio::io_context& io, const JoinRequest& request) {
  const auto& addresses = request.rendezvous.addresses;
  const auto started = Clock::now();
  std::string tried;
  for (;;) {
    size_t closed = 0;
    tried.clear();
    for (const SocketAddress& address : addresses) {
      Attempt attempt(io, request);
      const Outcome outcome = attempt.run(address, addresses.size() == 1);
      if (outcome == Outcome::welcome) return attempt.takeSocket();
      if (outcome == Outcome::closed) ++closed;
      tried +=
          fmt::format("{}{}: {}", tried.empty() ? "" : ", ", address.toString(), attempt.why());
      if (Clock::now() >= request.deadline) {
        throw TimeoutError(fmt::format(
            "joining the group as rank {} of {}: rank 0 is missing: it gave no welcome within "
            "{:.1f} s "
            "({}). Is rank 0 running, and can this host reach it? MSCCLPP_SOCKET_INTERFACE chooses "
            "another interface on rank 0's host",
            request.rank, request.size,
            std::chrono::duration<double>(Clock::now() - started).count(), tried));
      }
    }
    if (closed == addresses.size()) {
      fail(
          ErrorCode::invalidArgument,
          "joining the group as rank {} of {}: rank 0 closed the connection on the hello ({}): the "
          "UniqueId is of another group, or rank 0's process ended",
          request.rank, request.size, tried);
    }
    pauseFor(io, kRetryPause);
  }
}

}  // namespace mscclpp::detail
