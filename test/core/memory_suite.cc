// The part of the conformance suite about memory that other ranks map.
#include <algorithm>
#include <cstdint>

#include <mscclpp/errors.hpp>
#include <mscclpp/registered_memory.hpp>

#include "core/device_suite.hpp"
#include "core/processes.hpp"
#include "core/ranks.hpp"

namespace mscclpp::test {
namespace {

using Bytes = std::vector<unsigned char>;

// --- export and import ---------------------------------------------------------------------------

TEST_P(DeviceSuite, TheOwnProcessGetsThePlainPointer) {
  const auto memory = device_->allocateExportable(4096);
  char* const base = static_cast<char*>(memory.get());
  const auto whole = device_->importMemory(device_->exportMemory(base, 4096));
  EXPECT_EQ(whole.get(), base);
  const auto part = device_->importMemory(device_->exportMemory(base + 100, 200));
  EXPECT_EQ(part.get(), base + 100);
}

TEST_P(DeviceSuite, AnImportKeepsTheMemoryOfTheOwnProcessAlive) {
  Stream stream = device_->createStream();
  auto memory = device_->allocateExportable(4096);
  const auto imported = device_->importMemory(device_->exportMemory(memory.get(), 4096));
  memory.reset();
  device_->fill(imported.get(), 3, 4096, stream);
  EXPECT_EQ(read(imported.get(), 4096, stream), Bytes(4096, 3));
}

TEST_P(DeviceSuite, OnlyExportableMemoryCanBeExported) {
  Stream stream = device_->createStream();
  const auto memory = device_->allocateExportable(4096);
  char* const base = static_cast<char*>(memory.get());
  void* const other = device_->allocate(4096, stream);
  for (const auto& [pointer, bytes] : std::vector<std::pair<void*, size_t>>{
           {other, 4096}, {base, 4097}, {base + 1, 4096}, {base + 4096, 1}, {nullptr, 1}}) {
    expectError(ErrorCode::invalidArgument, {std::to_string(bytes), "allocateExportable"},
                [&] { device_->exportMemory(pointer, bytes); });
  }
  device_->release(other, stream);
  stream.synchronize();
}

TEST_P(DeviceSuite, MemoryThatWasFreedCannotBeImported) {
  auto memory = device_->allocateExportable(4096);
  const MemoryHandle handle = device_->exportMemory(memory.get(), 4096);
  memory.reset();
  expectError(ErrorCode::invalidState, {"freed"}, [&] { device_->importMemory(handle); });
}

TEST_P(DeviceSuite, MemoryOfAnotherHostIsRefusedAndBothHostsAreNamed) {
  const auto memory = device_->allocateExportable(64);
  MemoryHandle handle = device_->exportMemory(memory.get(), 64);
  const std::string own = handle.hostId;
  std::strcpy(handle.hostId, "far-away");
  expectError(ErrorCode::unsupported, {"'far-away'", "'" + own + "'"},
              [&] { device_->importMemory(handle); });
}

TEST_P(DeviceSuite, ForeignBytesAreNoHandle) {
  const auto memory = device_->allocateExportable(64);
  const MemoryHandle good = device_->exportMemory(memory.get(), 64);
  MemoryHandle handle{};
  expectError(ErrorCode::invalidArgument, {"no memory handle"},
              [&] { device_->importMemory(handle); });
  handle = good;
  handle.bytes = 65;  // more than the allocation has
  expectError(ErrorCode::invalidArgument, {"no memory handle"},
              [&] { device_->importMemory(handle); });
  handle = good;
  handle.platform = 1 - handle.platform;
  expectError(ErrorCode::unsupported, {"platform"}, [&] { device_->importMemory(handle); });
}

/// Maps the parent's memory, checks its content, writes its own.
const RoleRegistration kImporter("importer", [](const std::vector<std::string>& arguments) {
  const auto device = Device::open(parsePlatform(arguments.at(0)));
  const auto handle = fromHex<MemoryHandle>(arguments.at(1));
  auto memory = device->importMemory(handle);
  Stream stream = device->createStream();
  const auto host = device->allocatePinned(handle.bytes);
  device->copy(host.get(), memory.get(), handle.bytes, stream);
  stream.synchronize();
  const auto* bytes = static_cast<const unsigned char*>(host.get());
  const bool right =
      std::all_of(bytes, bytes + handle.bytes, [](unsigned char b) { return b == 0x21; });
  device->fill(memory.get(), 0x43, handle.bytes, stream);
  stream.synchronize();
  tellParent(right ? "right" : "wrong");
  askParent();
  memory.reset();
  return 0;
});

TEST_P(DeviceSuite, AnotherProcessMapsAPieceAtAnOffset) {
  constexpr size_t kBytes = (size_t{5} << 20) + 123;
  constexpr size_t kOffset = 4097;
  constexpr size_t kPiece = (size_t{3} << 20) + 1;
  Stream stream = device_->createStream();
  const auto memory = device_->allocateExportable(kBytes);
  char* const base = static_cast<char*>(memory.get());
  device_->fill(base + kOffset, 0x21, kPiece, stream);
  stream.synchronize();
  // Two children at once, on the same piece.
  const std::string handle = toHex(device_->exportMemory(base + kOffset, kPiece));
  Child child("importer", {std::string(toString(GetParam())), handle});
  EXPECT_EQ(child.hear(), "right");
  Bytes expected(kBytes, 0);
  std::fill_n(expected.begin() + kOffset, kPiece, 0x43);
  EXPECT_TRUE(read(base, kBytes, stream) == expected) << "the child wrote elsewhere";
  child.tell("end");
  EXPECT_EQ(child.wait(), 0);
}

const RoleRegistration kExporter("exporter", [](const std::vector<std::string>& arguments) {
  const auto device = Device::open(parsePlatform(arguments.at(0)));
  const auto memory = device->allocateExportable(1 << 20);
  tellParent(toHex(device->exportMemory(memory.get(), 1 << 20)));
  askParent();
  return 0;
});

TEST_P(DeviceSuite, MemoryOfAProcessThatEndedCannotBeImported) {
  Child child("exporter", {std::string(toString(GetParam()))});
  const auto handle = fromHex<MemoryHandle>(child.hear());
  child.tell("end");
  EXPECT_EQ(child.wait(), 0);
  EXPECT_THROW(device_->importMemory(handle), Error);
}

TEST_P(DeviceSuite, ProcessesOfAnotherHostIdAreRefused) {
  Child child("exporter", {std::string(toString(GetParam()))}, {"MSCCLPP_HOST_ID=next-door"});
  const auto handle = fromHex<MemoryHandle>(child.hear());
  expectError(ErrorCode::unsupported, {"next-door"}, [&] { device_->importMemory(handle); });
}

const RoleRegistration kDeviceId("device-id", [](const std::vector<std::string>& arguments) {
  tellParent(Device::open(parsePlatform(arguments.at(0)))->id());
  return 0;
});

TEST_P(DeviceSuite, TheIdIsTheSameInAnotherProcess) {
  Child child("device-id", {std::string(toString(GetParam()))});
  EXPECT_EQ(child.hear(), device_->id());
}

// --- registered memory ---------------------------------------------------------------------------

TEST_P(DeviceSuite, RegisteredMemorySerializes) {
  const auto memory = device_->allocateExportable(1000);
  const RegisteredMemory local(device_, memory, 1000);
  EXPECT_EQ(local.data(), memory.get());
  EXPECT_EQ(local.size(), 1000u);
  auto bytes = local.serialize();
  const auto remote = RegisteredMemory::deserialize(device_, bytes);
  EXPECT_EQ(remote.data(), memory.get());
  EXPECT_EQ(remote.size(), 1000u);
  bytes.pop_back();
  expectError(ErrorCode::invalidArgument, {"239 bytes", "240"},
              [&] { RegisteredMemory::deserialize(device_, bytes); });
  expectError(ErrorCode::invalidState, {"empty"}, [] { RegisteredMemory().serialize(); });
}

TEST_P(DeviceSuite, ExchangeGivesEveryRankAllMemories) {
  const UniqueId id = TcpBootstrap::createUniqueId();
  constexpr int kRanks = 3;
  runRanks(kRanks, [&](int rank) {
    TcpBootstrap group(rank, kRanks, id, kLongTimeout);
    Stream stream = device_->createStream();
    const size_t bytes = 100u * static_cast<size_t>(rank + 1);
    const RegisteredMemory local(device_, device_->allocateExportable(bytes), bytes);
    device_->fill(local.data(), static_cast<uint8_t>(rank + 1), bytes, stream);
    stream.synchronize();
    const auto all = exchangeMemories(group, local);
    ASSERT_EQ(all.size(), static_cast<size_t>(kRanks));
    EXPECT_EQ(all[static_cast<size_t>(rank)].data(), local.data());
    group.barrier();
    for (int peer = 0; peer < kRanks; ++peer) {
      const auto& memory = all[static_cast<size_t>(peer)];
      EXPECT_EQ(memory.size(), 100u * static_cast<size_t>(peer + 1));
      EXPECT_EQ(read(memory.data(), memory.size(), stream),
                Bytes(memory.size(), static_cast<unsigned char>(peer + 1)));
    }
    group.barrier();
  });
}

TEST_P(DeviceSuite, AFailedExchangeFailsOnEveryRankAndNamesBoth) {
  const UniqueId id = TcpBootstrap::createUniqueId();
  const auto failures = failuresOfRanks(3, [&](int rank) {
    TcpBootstrap group(rank, 3, id, kLongTimeout);
    RegisteredMemory local;
    if (rank != 1) local = RegisteredMemory(device_, device_->allocateExportable(64), 64);
    exchangeMemories(group, local);  // rank 1 has none
  });
  for (const auto& text : failures) {
    EXPECT_NE(text.find("cannot map the memory of rank"), std::string::npos) << text;
  }
  EXPECT_NE(failures[0].find("rank 1"), std::string::npos) << failures[0];
  EXPECT_EQ(failures[0], failures[2]);
}

}  // namespace
}  // namespace mscclpp::test
