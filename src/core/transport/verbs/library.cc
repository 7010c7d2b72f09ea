#include "core/transport/verbs/library.hpp"

#include <dlfcn.h>

#include <mscclpp/errors.hpp>

namespace mscclpp::transport::verbs {

Library loadLibrary(const char* name) {
  void* const handle = ::dlopen(name, RTLD_NOW | RTLD_LOCAL);
  if (handle == nullptr) {
    const char* const reason = ::dlerror();
    fail(ErrorCode::unsupported,
         "transport verbs: {} cannot be loaded ({}): install rdma-core (Debian: libibverbs1 and "
         "ibverbs-providers), or use another transport",
         name, reason == nullptr ? "no reason given" : reason);
  }
  Library result{};
  const auto find = [&](auto& function, const char* symbol, bool needed = true) {
    function = reinterpret_cast<std::decay_t<decltype(function)>>(::dlsym(handle, symbol));
    check(function != nullptr || !needed, ErrorCode::unsupported,
          "transport verbs: {} has no {}: install rdma-core 33 or newer", name, symbol);
  };
  find(result.getDeviceList, "ibv_get_device_list");
  find(result.freeDeviceList, "ibv_free_device_list");
  find(result.getDeviceName, "ibv_get_device_name");
  find(result.openDevice, "ibv_open_device");
  find(result.closeDevice, "ibv_close_device");
  find(result.queryDevice, "ibv_query_device");
  find(result.queryPort, "ibv_query_port");
  find(result.queryGidTable, "_ibv_query_gid_table");
  find(result.getAsyncEvent, "ibv_get_async_event");
  find(result.ackAsyncEvent, "ibv_ack_async_event");
  find(result.eventName, "ibv_event_type_str");
  find(result.allocPd, "ibv_alloc_pd");
  find(result.deallocPd, "ibv_dealloc_pd");
  find(result.regMr, "ibv_reg_mr");
  find(result.regDmaBufMr, "ibv_reg_dmabuf_mr", false);
  find(result.deregMr, "ibv_dereg_mr");
  find(result.createCq, "ibv_create_cq");
  find(result.destroyCq, "ibv_destroy_cq");
  find(result.createQp, "ibv_create_qp");
  find(result.modifyQp, "ibv_modify_qp");
  find(result.destroyQp, "ibv_destroy_qp");
  find(result.statusName, "ibv_wc_status_str");
  return result;
}

const Library& library() {
  static const Library instance = loadLibrary("libibverbs.so.1");
  return instance;
}

}  // namespace mscclpp::transport::verbs
