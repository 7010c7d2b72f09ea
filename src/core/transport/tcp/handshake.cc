#include "core/transport/tcp/handshake.hpp"

#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>

#include <list>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include <asio/buffer.hpp>
#include <asio/posix/stream_descriptor.hpp>
#include <asio/read.hpp>
#include <asio/steady_timer.hpp>
#include <asio/write.hpp>

#include <mscclpp/errors.hpp>
#include <mscclpp/log.hpp>

#include "core/transport/tcp/wire.hpp"

namespace mscclpp::transport::tcp {

namespace {

using Clock = std::chrono::steady_clock;
using detail::Socket;
/// The addresses come in order of preference: the next one is tried when the one before is slow.
constexpr std::chrono::milliseconds kStagger(250);
constexpr std::chrono::milliseconds kRetryPause(100);
/// Guests that may be about to greet; one more, and the oldest has to go.
constexpr size_t kMaxGuests = 64;

Greeting greetingOf(const Handshake& handshake) {
  return {.version = kVersion,
          .from = handshake.rank,
          .to = handshake.peer,
          .reserved = 0,
          .secret = handshake.theirs.secret};
}

/// What is wrong with a greeting; empty when it is the peer's.
std::string objection(const Greeting& greeting, const Handshake& handshake) {
  if (greeting.version != kVersion) return "no greeting of this version";
  if (!detail::sameSecret(greeting.secret, handshake.ownSecret)) return "a wrong secret";
  if (greeting.from != handshake.peer || greeting.to != handshake.rank) {
    return fmt::format("a greeting from rank {} to rank {}", greeting.from, greeting.to);
  }
  return {};
}

/// Runs handlers until `done` or the limit; then everything that `stop` makes ready to end.
template <class Done, class Stop>
bool runUntil(asio::io_context& io, std::chrono::nanoseconds limit, Done done, Stop stop) {
  const auto deadline = limit.count() == 0 ? Clock::time_point::max() : Clock::now() + limit;
  io.restart();
  while (!done() && io.run_one_until(deadline) != 0) {
  }
  const bool result = done();
  stop();
  io.restart();
  io.run();
  return result;
}

double seconds(std::chrono::nanoseconds time) {
  return std::chrono::duration<double>(time).count();
}

class Dialler {
 public:
  Dialler(asio::io_context& io, const Handshake& handshake)
      : io_(io), handshake_(handshake), hello_(greetingOf(handshake)) {}

  Socket run() {
    std::chrono::milliseconds delay(0);
    for (const detail::SocketAddress& address : handshake_.theirs.addresses) {
      attempts_.emplace_back(io_, address);
      startAfter(attempts_.back(), delay);
      delay += kStagger;
    }
    runUntil(
        io_, handshake_.limit, [this] { return winner_ || hopeless(); },
        [this] {
          for (Attempt& attempt : attempts_) attempt.close();
        });
    if (winner_) return std::move(*winner_);
    if (hopeless()) {
      throw PeerError(handshake_.peer,
                      fmt::format("tcp: rank {} cannot connect to rank {} ({}): it has ended or "
                                  "given up, or the address was made for another connection",
                                  handshake_.rank, handshake_.peer, tried()));
    }
    fail(ErrorCode::timeout,
         "tcp: rank {} could not connect to rank {} within {:.1f} s (tried {}). Does rank {} call "
         "connect(), and can this host reach it? EndpointOptions::interface chooses another "
         "address on rank {}'s host",
         handshake_.rank, handshake_.peer, seconds(handshake_.limit), tried(), handshake_.peer,
         handshake_.peer);
  }

 private:
  struct Attempt {
    Attempt(asio::io_context& io, const detail::SocketAddress& where)
        : address(where), socket(io), timer(io) {}
    void close() {
      asio::error_code ignored;
      socket.close(ignored);
      timer.cancel();
    }
    detail::SocketAddress address;
    Socket socket;
    asio::steady_timer timer;
    Greeting answer{};
    std::string outcome = "not tried yet";
    bool over = false;  ///< nobody listens there, or he turned us away
  };

  void startAfter(Attempt& attempt, std::chrono::milliseconds delay) {
    attempt.timer.expires_after(delay);
    attempt.timer.async_wait([this, &attempt](const asio::error_code& error) {
      if (!error && !winner_) start(attempt);
    });
  }

  void start(Attempt& attempt) {
    const asio::generic::stream_protocol::endpoint endpoint(attempt.address.get(),
                                                            attempt.address.length, IPPROTO_TCP);
    attempt.outcome = "no answer";
    detail::openUninherited(attempt.socket, attempt.address.storage.ss_family);
    attempt.socket.async_connect(endpoint, [this, &attempt](const asio::error_code& error) {
      if (error) return failed(attempt, error, error == asio::error::connection_refused);
      attempt.outcome = "reached, but it has not accepted yet";
      asio::async_write(attempt.socket, asio::buffer(&hello_, sizeof(hello_)),
                        [this, &attempt](const asio::error_code& writeError, size_t) {
                          if (writeError) return failed(attempt, writeError, true);
                          readAnswer(attempt);
                        });
    });
  }

  void readAnswer(Attempt& attempt) {
    asio::async_read(attempt.socket, asio::buffer(&attempt.answer, sizeof(attempt.answer)),
                     [this, &attempt](const asio::error_code& error, size_t) {
                       if (error) return failed(attempt, error, true);
                       const std::string wrong = objection(attempt.answer, handshake_);
                       if (!wrong.empty()) return giveUp(attempt, "answered with " + wrong);
                       if (!winner_) winner_ = std::move(attempt.socket);
                     });
  }

  void failed(Attempt& attempt, const asio::error_code& error, bool over) {
    if (error == asio::error::operation_aborted) return;
    const std::string why = error == asio::error::eof ? "closed on our greeting" : error.message();
    giveUp(attempt, why);
    if (over) return;
    attempt.over = false;
    startAfter(attempt, kRetryPause);
  }

  void giveUp(Attempt& attempt, const std::string& why) {
    attempt.outcome = why;
    attempt.over = true;
    asio::error_code ignored;
    attempt.socket.close(ignored);
  }

  bool hopeless() const {
    for (const Attempt& attempt : attempts_) {
      if (!attempt.over) return false;
    }
    return true;
  }

  std::string tried() const {
    std::string text;
    for (const Attempt& attempt : attempts_) {
      text += fmt::format("{}{}: {}", text.empty() ? "" : ", ", attempt.address.toString(),
                          attempt.outcome);
    }
    return text;
  }

  asio::io_context& io_;
  const Handshake& handshake_;
  const Greeting hello_;
  std::list<Attempt> attempts_;
  std::optional<Socket> winner_;
};

class Host {
 public:
  Host(asio::io_context& io, int listener, const Handshake& handshake)
      : io_(io), handshake_(handshake), listener_(io, listener), pause_(io) {}

  Socket run(const std::string& listening) {
    acceptNext();
    runUntil(
        io_, handshake_.limit, [this] { return winner_.has_value(); },
        [this] {
          asio::error_code ignored;
          listener_.close(ignored);
          pause_.cancel();
          for (Guest& guest : guests_) guest.socket.close(ignored);
        });
    if (winner_) return std::move(*winner_);
    fail(ErrorCode::timeout,
         "tcp: rank {} did not connect to rank {} within {:.1f} s (listening at {}; {} others were "
         "turned away{}{}). Does rank {} call connect(), and can its host reach this one? "
         "EndpointOptions::interface chooses another address here",
         handshake_.peer, handshake_.rank, seconds(handshake_.limit), listening, strangers_,
         strangers_ == 0 ? "" : ", the last one for ", lastObjection_, handshake_.peer);
  }

 private:
  struct Guest {
    explicit Guest(Socket s) : socket(std::move(s)) {}
    Socket socket;
    Greeting greeting{};
  };
  using Place = std::list<Guest>::iterator;

  void acceptNext() {
    listener_.async_wait(asio::posix::stream_descriptor::wait_read,
                         [this](const asio::error_code& error) {
                           if (!error && !winner_) receive();
                         });
  }

  void receive() {
    const int fd =
        ::accept4(listener_.native_handle(), nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK);
    if (fd >= 0) {
      welcome(fd);
      return acceptNext();
    }
    // Out of descriptors, say: the socket stays readable, so ask again a little later.
    pause_.expires_after(kRetryPause);
    pause_.async_wait([this](const asio::error_code& error) {
      if (!error) acceptNext();
    });
  }

  void welcome(int fd) {
    Socket socket(io_);
    asio::error_code error;
    // The family matters to nobody once there is a connection.
    socket.assign(asio::generic::stream_protocol(AF_INET, IPPROTO_TCP), fd, error);
    if (error) {
      ::close(fd);
      return;
    }
    if (guests_.size() >= kMaxGuests) guests_.front().socket.close(error);
    guests_.emplace_back(std::move(socket));
    const Place place = std::prev(guests_.end());
    asio::async_read(place->socket, asio::buffer(&place->greeting, sizeof(Greeting)),
                     [this, place](const asio::error_code& readError, size_t) {
                       if (!readError && !winner_) examine(*place);
                       guests_.erase(place);
                     });
  }

  void examine(Guest& guest) {
    lastObjection_ = objection(guest.greeting, handshake_);
    if (!lastObjection_.empty()) {
      ++strangers_;
      log::warn("tcp: rank {} turned a connection away that showed {}", handshake_.rank,
                lastObjection_);
      return;
    }
    // 32 bytes always fit into the buffer of a new socket.
    const Greeting answer = greetingOf(handshake_);
    asio::error_code error;
    asio::write(guest.socket, asio::buffer(&answer, sizeof(answer)), error);
    if (!error) winner_ = std::move(guest.socket);
  }

  asio::io_context& io_;
  const Handshake& handshake_;
  asio::posix::stream_descriptor listener_;
  asio::steady_timer pause_;
  std::list<Guest> guests_;
  std::optional<Socket> winner_;
  int strangers_ = 0;
  std::string lastObjection_;
};

}  // namespace

Socket dial(asio::io_context& io, const Handshake& handshake) {
  return Dialler(io, handshake).run();
}

Socket accept(asio::io_context& io, int listener, const Handshake& handshake,
              const std::string& listening) {
  return Host(io, listener, handshake).run(listening);
}

}  // namespace mscclpp::transport::tcp
