# Helpers that give every target of this project the same settings.

# mscclpp_configure_target(<target> [NO_SANITIZER]): include folders, warnings, sanitizer.
function(mscclpp_configure_target target)
  cmake_parse_arguments(arg "NO_SANITIZER" "" "" ${ARGN})
  target_include_directories(${target} PRIVATE "${PROJECT_SOURCE_DIR}/src")
  target_link_libraries(${target} PRIVATE $<BUILD_INTERFACE:mscclpp_build_settings>)
  if(NOT arg_NO_SANITIZER)
    target_link_libraries(${target} PRIVATE $<BUILD_INTERFACE:mscclpp_sanitizer>)
  endif()
endfunction()

# mscclpp_add_library(NAME <name> SOURCES ... [CUDA_SOURCES ...] [LIBS ...] [PRIVATE_LIBS ...]
#                     [NO_SANITIZER])
# A static, position-independent library. CUDA_SOURCES are used only when the CUDA half is built.
# LIBS are public. NO_SANITIZER: this library switches fibers under the sanitizer's feet and talks
# to the sanitizer itself.
function(mscclpp_add_library)
  cmake_parse_arguments(arg "NO_SANITIZER" "NAME" "SOURCES;CUDA_SOURCES;LIBS;PRIVATE_LIBS" ${ARGN})
  if(arg_UNPARSED_ARGUMENTS)
    message(FATAL_ERROR "mscclpp_add_library(${arg_NAME}): unknown ${arg_UNPARSED_ARGUMENTS}")
  endif()
  set(sources ${arg_SOURCES})
  if(MSCCLPP_HAVE_CUDA)
    list(APPEND sources ${arg_CUDA_SOURCES})
  endif()
  add_library(${arg_NAME} STATIC ${sources})
  add_library(mscclpp::${arg_NAME} ALIAS ${arg_NAME})
  target_include_directories(${arg_NAME} PUBLIC "${PROJECT_SOURCE_DIR}/include")
  target_link_libraries(${arg_NAME} PUBLIC ${arg_LIBS} PRIVATE ${arg_PRIVATE_LIBS})
  if(arg_NO_SANITIZER)
    mscclpp_configure_target(${arg_NAME} NO_SANITIZER)
  else()
    mscclpp_configure_target(${arg_NAME})
  endif()
endfunction()
