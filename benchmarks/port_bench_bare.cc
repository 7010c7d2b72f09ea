#include "port_bench_bare.hpp"

#include <sys/socket.h>

#include <cerrno>
#include <chrono>
#include <exception>
#include <thread>
#include <vector>

#include <asio/io_context.hpp>
#include <asio/ip/tcp.hpp>

#include <mscclpp/errors.hpp>

namespace mscclpp::bench {

namespace {

using asio::ip::tcp;

// asio's own write() and read() hand over 64 KiB at most at a time.

void sendAll(tcp::socket& socket, const char* data, size_t bytes) {
  while (bytes > 0) {
    const ssize_t sent = ::send(socket.native_handle(), data, bytes, MSG_NOSIGNAL);
    if (sent < 0) throw SystemError(errno, "send over a plain socket");
    data += sent;
    bytes -= static_cast<size_t>(sent);
  }
}

void receiveAll(tcp::socket& socket, char* data, size_t bytes) {
  const ssize_t got = ::recv(socket.native_handle(), data, bytes, MSG_WAITALL);
  if (got != static_cast<ssize_t>(bytes)) {
    throw SystemError(got < 0 ? errno : ECONNRESET, "recv from a plain socket");
  }
}

}  // namespace

double bareSockets(uint64_t bytes, uint64_t count) {
  std::vector<char> source(bytes, 1);
  std::vector<char> destination(bytes, 2);
  asio::io_context io;
  tcp::acceptor acceptor(io, {asio::ip::address_v4::loopback(), 0});
  tcp::socket writer(io);
  writer.connect(acceptor.local_endpoint());
  tcp::socket reader = acceptor.accept();
  writer.set_option(tcp::no_delay(true));
  reader.set_option(tcp::no_delay(true));
  std::exception_ptr failure;
  std::thread other([&] {
    try {
      for (uint64_t i = 0; i < count; ++i) receiveAll(reader, destination.data(), bytes);
      sendAll(reader, destination.data(), 1);
    } catch (...) {
      failure = std::current_exception();
      reader.close();  // the writer gets an error instead of waiting
    }
  });
  const auto start = std::chrono::steady_clock::now();
  std::exception_ptr ownFailure;
  try {
    char answer = 0;
    for (uint64_t i = 0; i < count; ++i) sendAll(writer, source.data(), bytes);
    receiveAll(writer, &answer, 1);
  } catch (...) {
    ownFailure = std::current_exception();
    writer.close();
  }
  const auto end = std::chrono::steady_clock::now();
  other.join();
  if (ownFailure) std::rethrow_exception(ownFailure);
  if (failure) std::rethrow_exception(failure);
  return std::chrono::duration<double>(end - start).count();
}

}  // namespace mscclpp::bench
