// libibverbs, loaded when it is first needed: this library runs on machines that do not have it.
#pragma once

#include <memory>

#include <infiniband/verbs.h>

namespace mscclpp::transport::verbs {

/// The functions that are exported by the library. The inline ones of its header (ibv_post_send,
/// ibv_post_recv, ibv_poll_cq) go through the context and can be called as they are.
struct Library {
  decltype(&::ibv_get_device_list) getDeviceList;
  decltype(&::ibv_free_device_list) freeDeviceList;
  decltype(&::ibv_get_device_name) getDeviceName;
  decltype(&::ibv_open_device) openDevice;
  decltype(&::ibv_close_device) closeDevice;
  decltype(&::ibv_query_device) queryDevice;
  decltype(&::ibv_query_port) queryPort;
  decltype(&::_ibv_query_gid_table) queryGidTable;
  decltype(&::ibv_get_async_event) getAsyncEvent;
  decltype(&::ibv_ack_async_event) ackAsyncEvent;
  decltype(&::ibv_event_type_str) eventName;
  decltype(&::ibv_alloc_pd) allocPd;
  decltype(&::ibv_dealloc_pd) deallocPd;
  decltype(&::ibv_reg_mr) regMr;
  decltype(&::ibv_reg_dmabuf_mr) regDmaBufMr;  ///< null where the library is older than it
  decltype(&::ibv_dereg_mr) deregMr;
  decltype(&::ibv_create_cq) createCq;
  decltype(&::ibv_destroy_cq) destroyCq;
  decltype(&::ibv_create_qp) createQp;
  decltype(&::ibv_modify_qp) modifyQp;
  decltype(&::ibv_destroy_qp) destroyQp;
  decltype(&::ibv_wc_status_str) statusName;
};

/// @throws Error unsupported: `name` cannot be loaded, or lacks a function.
Library loadLibrary(const char* name);
/// "libibverbs.so.1", loaded once and never unloaded. @throws as above, at every call.
const Library& library();

/// An object of the library, given back by the function that it was made with.
template <class T>
using Handle = std::unique_ptr<T, int (*)(T*)>;

}  // namespace mscclpp::transport::verbs
