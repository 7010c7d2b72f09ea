// One way to one peer over a TCP socket.
#pragma once

#include <chrono>
#include <memory>
#include <mutex>
#include <optional>
#include <string>

#include <asio/io_context.hpp>

#include "core/bootstrap/rendezvous.hpp"
#include "core/transport/tcp/receiver.hpp"
#include "core/transport/tcp/sender.hpp"
#include "core/transport/tcp/tcp_endpoint.hpp"

namespace mscclpp::transport::tcp {

class TcpConnection final : public Connection {
 public:
  /// Listens from now on, so that the peer may come before this side calls connect().
  TcpConnection(std::shared_ptr<TcpEndpoint> endpoint, int peer);
  ~TcpConnection() override;

  ConnectionCapabilities capabilities() const noexcept override;
  std::string describe() const override;
  std::vector<std::byte> address() const override;
  void connect(std::span<const std::byte> theirs) override;
  std::shared_ptr<RemoteMemory> importMemory(std::span<const std::byte> description) override;
  bool canPost() const override;
  bool progress() override;
  uint64_t completed() const noexcept override { return completed_; }
  void close() noexcept override;

 private:
  using Clock = std::chrono::steady_clock;

  void doWrite(const Write& write) override;
  void doAdd(const Add& add) override;

  bool step();
  bool receive();
  bool send(Clock::time_point now);
  void watchSilence(Clock::time_point now, bool heard);
  void failAfterClose();
  /// Breaks the connection; `why` continues "rank 3 at 10.0.0.1:4567: ".
  void breakOff(const std::string& why);
  void dropSocket() noexcept;
  void prepareSocket();

  std::shared_ptr<TcpEndpoint> endpoint_;
  detail::Rendezvous own_;
  int listener_ = -1;
  std::optional<uint64_t> theirEndpoint_;
  asio::io_context io_;  ///< used by connect() only; the socket needs it to exist
  std::optional<detail::Socket> socket_;
  std::unique_ptr<Sender> sender_;
  std::unique_ptr<Receiver> receiver_;
  uint64_t completed_ = 0;
  bool closed_ = false;  ///< this side has said good-bye
  asio::error_code sendError_;

  Clock::time_point lastLook_;
  Clock::time_point lastHeard_;
  Clock::time_point lastSent_;

  mutable std::mutex textMutex_;  ///< describe() comes from any thread
  std::string path_ = "not connected";
  std::string peerText_;
};

}  // namespace mscclpp::transport::tcp
