#include "bench_copy.hpp"

namespace mscclpp::ep::cli {
namespace {

constexpr std::uint8_t kPoison = 0xA5;
/// Of the copy kernel: rows in flight, and the barriers before them.
constexpr std::size_t kRingRows = 8, kRingHead = 128;

}  // namespace

CopyRoofline::CopyRoofline(const BenchOptions& options, const RankContext& context,
                           const RankDevice& device, const BenchRouting& routing,
                           std::size_t rowBytes)
    : options_(options), context_(context), device_(device), rowBytes_(rowBytes) {
  const auto maxRows = static_cast<std::size_t>(routing.maxRows());
  BufferOptions heap;
  heap.platform = options.platform;
  heap.deviceIndex = device.device().index();
  heap.stagingBytes = 4096;
  heap.numNvlBytes = heap.stagingBytes + maxRows * rowBytes + 4096;
  heap.maxExpertsPerRank = 1;
  group_ = std::make_shared<Group>(context.bootstrap, heap);

  const BenchData data(options, routing, context.rank);
  const auto columns = static_cast<std::int64_t>(rowBytes);
  const std::int64_t rows = routing.rowCount(context.rank);
  near_ = device.upload(DType::u8, {options.tokens, columns},
                        data.sent(RowKind::copy, rowBytes).data());
  pulled_ = device.make(DType::u8, near_.shape);
  expectedFar_ =
      device.upload(DType::u8, {rows, columns}, data.received(RowKind::copy, rowBytes).data());
  far_ = expectedFar_;
  far_.owner = nullptr;
  far_.data = group_->heap() + group_->plan().pool();
}

bool CopyRoofline::possible() const {
  return rowBytes_ * kRingRows + kRingHead <= device_.device().maxSharedBytesPerBlock();
}

CopyRowsArgs CopyRoofline::args(const DispatchHandle& handle, bool pull) const {
  CopyRowsArgs args;
  args.group = group_->args();
  args.x = (pull ? pulled_ : near_).as<const char>();
  args.rowBytes = static_cast<std::uint32_t>(rowBytes_);
  args.tokens = options_.tokens;
  args.position = handle->position.as<const std::int32_t>();
  args.sendStart = handle->sendStart.as<const std::int32_t>();
  args.heapOffset = group_->plan().pool();
  args.pull = pull;
  return args;
}

Outputs CopyRoofline::copy(const CopyRowsArgs& args, int blocks, TimedLoop& loop) const {
  group_->kernels().copyRows(args, blocks, loop.comm().native());
  Outputs outputs;
  outputs.done = loop.comm().record();
  outputs.checks.emplace_back(args.pull ? pulled_ : far_, args.pull ? near_ : expectedFar_);
  return outputs;
}

Timing CopyRoofline::measure(const DispatchHandle& handle, bool pull, int blocks, TimedLoop& loop) {
  Device& device = device_.device();
  // Peers write into far_: everybody poisons before anybody copies.
  for (const Tensor* tensor : {&far_, &pulled_}) {
    device.fill(tensor->data, kPoison, tensor->bytes(), loop.comm());
  }
  loop.comm().synchronize();
  context_.bootstrap->barrier();
  if (pull) {
    copy(args(handle, false), blocks, loop);
    loop.comm().synchronize();
    context_.bootstrap->barrier();
  }
  const CopyRowsArgs copyArgs = args(handle, pull);
  Timing timing = loop.run([&] { return copy(copyArgs, blocks, loop); });
  group_->raiseIfFailed();
  return timing;
}

void CopyRoofline::align(void* stream) const {
  CopyRowsArgs args;
  args.group = group_->args();
  args.rowBytes = 16;
  group_->kernels().copyRows(args, 1, stream);
}

}  // namespace mscclpp::ep::cli
