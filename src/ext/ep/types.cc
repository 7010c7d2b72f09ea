#include <algorithm>

#include <mscclpp/errors.hpp>
#include <mscclpp/ext/ep/types.hpp>

namespace mscclpp::ep {

const char* nameOf(DType dtype) {
  switch (dtype) {
    case DType::bf16:
      return "bf16";
    case DType::e4m3:
      return "e4m3";
    case DType::f32:
      return "f32";
    case DType::i32:
      return "i32";
    case DType::i64:
      return "i64";
    case DType::u8:
      return "u8";
  }
  return "unknown";
}

std::int64_t Tensor::elements() const {
  std::int64_t n = present ? 1 : 0;
  for (const std::int64_t extent : shape) n *= extent;
  return n;
}

bool Tensor::contiguous() const {
  if (strides.empty() || elements() == 0) return true;
  std::int64_t expected = 1;
  for (std::size_t i = shape.size(); i-- > 0;) {
    if (shape[i] != 1 && strides[i] != expected) return false;
    expected *= shape[i];
  }
  return true;
}

std::string Tensor::describe() const {
  if (!present) return "none";
  std::string text = nameOf(dtype);
  text += '[';
  for (std::size_t i = 0; i < shape.size(); ++i) {
    if (i > 0) text += ", ";
    text += std::to_string(shape[i]);
  }
  return text + ']';
}

std::size_t Config::nvlBufferSizeHint(std::size_t hiddenBytes, int ranks) const {
  validate();
  check(ranks >= 1, ErrorCode::invalidArgument, "ranks = {} must be at least 1", ranks);
  // Rows of every rank for all channels (deep_ep: one channel per two blocks), each with up to 32
  // choices (12 bytes) and one scale per 128 bytes; a quarter of it again for staging.
  const std::size_t channels = static_cast<std::size_t>(std::max(numSms / 2, 1));
  const std::size_t rows = channels * static_cast<std::size_t>(ranks) *
                           static_cast<std::size_t>(numMaxNvlChunkedRecvTokens);
  const std::size_t rowBytes = hiddenBytes + 32 * 12 + (hiddenBytes + 127) / 128 * 4 + 4;
  return (rows * rowBytes * 4 / 3 + 127) / 128 * 128;
}

std::size_t Config::rdmaBufferSizeHint(std::size_t hiddenBytes, int ranks) const {
  validate();
  check(ranks >= 1, ErrorCode::invalidArgument, "ranks = {} must be at least 1", ranks);
  // As in deep_ep, 8 ranks or fewer are taken for one node, where no rank needs the network.
  constexpr std::size_t kRanksPerNode = 8, kAreas = 4, kLanes = 32, kSlots = 8;
  const std::size_t nodes = (static_cast<std::size_t>(ranks) + kRanksPerNode - 1) / kRanksPerNode;
  const std::size_t slotBytes = (hiddenBytes + 1024 + 127) / 128 * 128;
  return kAreas * kLanes * kSlots * slotBytes * (nodes - 1);
}

void Config::validate() const {
  const auto atLeast = [](const char* name, int value, int least) {
    check(value >= least, ErrorCode::invalidArgument, "Config.{} = {} must be at least {}", name,
          value, least);
  };
  atLeast("num_sms", numSms, 1);
  atLeast("num_max_nvl_chunked_send_tokens", numMaxNvlChunkedSendTokens, 1);
  atLeast("num_max_nvl_chunked_recv_tokens", numMaxNvlChunkedRecvTokens, 1);
  atLeast("num_max_rdma_chunked_send_tokens", numMaxRdmaChunkedSendTokens, 1);
  atLeast("num_max_rdma_chunked_recv_tokens", numMaxRdmaChunkedRecvTokens, 1);
}

}  // namespace mscclpp::ep
