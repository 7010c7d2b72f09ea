# mscclpp_header_check: every public header compiles alone, as the first line of a source file.
# Headers are found, not listed: one that is forgotten here would never be checked.
# Headers below a folder named cuda/ are for nvcc; those below cpu/ are not.

file(
  GLOB_RECURSE headers
  CONFIGURE_DEPENDS
  RELATIVE "${PROJECT_SOURCE_DIR}/include"
  "${PROJECT_SOURCE_DIR}/include/*.hpp")
set(sources "")
foreach(header IN LISTS headers)
  string(MAKE_C_IDENTIFIER "${header}" name)
  set(languages cc)
  if(header MATCHES "(^|/|_)cuda(/|\\.hpp|_)")
    set(languages cu)
  elseif(header MATCHES "device/" AND NOT header MATCHES "/cpu/")
    set(languages cc cu)
  endif()
  foreach(language IN LISTS languages)
    if(language STREQUAL "cu" AND NOT MSCCLPP_HAVE_CUDA)
      continue()
    endif()
    set(source "${CMAKE_BINARY_DIR}/header_check/${name}.${language}")
    # Twice: a header without #pragma once does not pass.
    file(CONFIGURE OUTPUT "${source}" CONTENT "#include <${header}>\n#include <${header}>\n")
    list(APPEND sources "${source}")
  endforeach()
endforeach()
if(sources)
  add_library(mscclpp_header_check OBJECT EXCLUDE_FROM_ALL ${sources})
  target_link_libraries(mscclpp_header_check PRIVATE mscclpp_core)
  mscclpp_configure_target(mscclpp_header_check)
endif()
