# mlx_deform_embed_sources(<output.cpp> <namespace> <symbol> <root> <source>...)
#
# Writes a C++ file that defines `const char* const <namespace>::<symbol>`: the
# sources one after the other, with every `#include "path"` replaced by the file
# <root>/path, each file once. `#include <...>` lines stay. The file is written
# when CMake configures, which a change of any of the sources triggers, and only if
# its text changes.

# Sets ${out} to the text of <root>/<path> with its own includes resolved; grows
# the caller's list mlx_deform_embedded_files.
function(_mlx_deform_resolve out root path)
  if(path IN_LIST mlx_deform_embedded_files)
    set(${out} "" PARENT_SCOPE)
    return()
  endif()
  list(APPEND mlx_deform_embedded_files "${path}")
  set_property(
    DIRECTORY
    APPEND
    PROPERTY CMAKE_CONFIGURE_DEPENDS "${root}/${path}")
  file(READ "${root}/${path}" rest)
  string(REPLACE "#pragma once\n" "" rest "${rest}")

  # Taken apart by position: a list would break at the sources' semicolons.
  set(text "")
  string(FIND "${rest}" "#include \"" begin)
  while(NOT begin EQUAL -1)
    string(SUBSTRING "${rest}" 0 ${begin} before)
    string(APPEND text "${before}")
    math(EXPR begin "${begin} + 10")
    string(SUBSTRING "${rest}" ${begin} -1 rest)
    string(FIND "${rest}" "\"" end)
    string(SUBSTRING "${rest}" 0 ${end} included)
    math(EXPR end "${end} + 1")
    string(SUBSTRING "${rest}" ${end} -1 rest)
    _mlx_deform_resolve(resolved "${root}" "${included}")
    string(APPEND text "${resolved}")
    string(FIND "${rest}" "#include \"" begin)
  endwhile()
  string(APPEND text "${rest}")

  set(${out} "${text}" PARENT_SCOPE)
  set(mlx_deform_embedded_files "${mlx_deform_embedded_files}" PARENT_SCOPE)
endfunction()

function(mlx_deform_embed_sources output namespace symbol root)
  set(mlx_deform_embedded_files "")
  set(text "")
  foreach(path IN LISTS ARGN)
    _mlx_deform_resolve(resolved "${root}" "${path}")
    string(APPEND text "// ---- ${path}\n${resolved}")
  endforeach()
  set(cpp
      "// Generated from the files named below.
namespace ${namespace} {
extern const char* const ${symbol};
const char* const ${symbol} = R\"embedded_source(${text})embedded_source\";
} // namespace ${namespace}
")
  if(EXISTS "${output}")
    file(READ "${output}" old)
    if(old STREQUAL cpp)
      return()
    endif()
  endif()
  file(WRITE "${output}" "${cpp}")
endfunction()
