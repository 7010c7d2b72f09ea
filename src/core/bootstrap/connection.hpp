// Frames over a stream socket, without blocking.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include <asio/generic/stream_protocol.hpp>
#include <asio/io_context.hpp>

namespace mscclpp::detail {

using Socket = asio::generic::stream_protocol::socket;
using Bytes = std::vector<std::byte>;

/// Largest payload of a frame: an absurd length is a broken peer, not a reason to allocate.
inline constexpr uint64_t kMaxPayload = uint64_t{1} << 31;

enum class FrameType : uint32_t {
  // To the root.
  confirm = 1,  ///< the rank has seen `welcome`: it counts as there
  contribute,   ///< its part of collective `sequence`
  giveUp,       ///< waited too long for `sequence` (kJoinSequence: for `ready`); payload: text
  leave,        ///< the rank says good-bye; nothing follows
  // From the root.
  welcome,  ///< the hello was accepted
  refuse,   ///< it was not; payload: text
  ready,    ///< all ranks are there
  result,   ///< of collective `sequence`: all parts
  failed,   ///< the group is broken: `rank` is to blame, tag: ErrorCode, payload: text
  left,     ///< `rank` has said good-bye
  // Both: to `rank` on the way to the root, from `rank` on the way out.
  message
};

inline constexpr uint64_t kJoinSequence = ~uint64_t{0};

/// In front of every frame, in the machine's byte order (all ranks are little endian).
struct FrameHeader {
  FrameType type;
  int32_t rank = 0;
  int32_t tag = 0;
  uint32_t reserved = 0;
  uint64_t sequence = 0;
  uint64_t bytes = 0;
};
static_assert(sizeof(FrameHeader) == 32);

struct Frame {
  FrameHeader header;
  Bytes payload;

  static Frame make(FrameType type, int rank = 0, int tag = 0, uint64_t sequence = 0);
  static Frame text(FrameType type, int rank, int tag, const std::string& text);
  std::string payloadText() const;
};

/// One socket. All methods and callbacks run on the thread of its io_context.
class Connection : public std::enable_shared_from_this<Connection> {
 public:
  using FrameHandler = std::function<void(Frame&)>;
  /// Called once, when the peer has closed or the socket failed; the text says why. Not after
  /// close().
  using ClosedHandler = std::function<void(const std::string&)>;

  explicit Connection(Socket socket);

  /// Starts to read. The handlers keep what they capture alive until close.
  void start(FrameHandler onFrame, ClosedHandler onClosed);
  /// Queues a frame; order is kept.
  void send(Frame frame);
  /// As send; the payload is shared by several connections.
  void send(const FrameHeader& header, std::shared_ptr<const Bytes> payload);
  /// Closes once everything queued has been handed to the kernel.
  void closeAfterFlush();
  void close();
  bool flushed() const { return !open() || outbound_.empty(); }
  bool open() const { return socket_.is_open(); }

 private:
  struct Outbound {
    FrameHeader header;
    std::shared_ptr<const Bytes> payload;
  };
  void readHeader();
  void readPayload();
  void writeNext();
  void fail(const std::string& why);

  Socket socket_;
  Frame inbound_;
  std::deque<Outbound> outbound_;
  bool closing_ = false;
  FrameHandler onFrame_;
  ClosedHandler onClosed_;
};

/// Opens a socket that is not open yet. Children of this process do not inherit it, as they would
/// one that asio opens: they would keep it alive when this process has died.
/// @throws SystemError when there is no socket to be had.
void openUninherited(Socket& socket, int family);

/// Small messages leave at once, and a dead host is noticed.
void tuneSocket(Socket& socket);

}  // namespace mscclpp::detail
