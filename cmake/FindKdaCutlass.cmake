# Finds the CUTLASS / CuTe headers and sets KDA_CUTLASS_INCLUDE_DIRS.
#
# They come from -DKDA_CUTLASS_INCLUDE=<folder that holds cutlass/ and cute/>, from the environment variable of that name,
# or from the PyPI package nvidia-cutlass of the Python interpreter (choose one with -DPython3_EXECUTABLE=...).
set(KDA_CUTLASS_INCLUDE "$ENV{KDA_CUTLASS_INCLUDE}" CACHE PATH "Folder that holds cutlass/ and cute/")

if(NOT KDA_CUTLASS_INCLUDE)
  find_package(Python3 QUIET COMPONENTS Interpreter)
  if(Python3_Interpreter_FOUND)
    execute_process(
      COMMAND ${Python3_EXECUTABLE} -c
              "import importlib.util as u; print(u.find_spec('cutlass_library').submodule_search_locations[0])"
      OUTPUT_VARIABLE KDA_CUTLASS_PACKAGE
      OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
    if(KDA_CUTLASS_PACKAGE)
      set_property(CACHE KDA_CUTLASS_INCLUDE PROPERTY VALUE "${KDA_CUTLASS_PACKAGE}/source/include")
    endif()
  endif()
endif()

set(KDA_CUTLASS_VERSION_HEADER "${KDA_CUTLASS_INCLUDE}/cutlass/version.h")
if(NOT EXISTS "${KDA_CUTLASS_VERSION_HEADER}")
  set(KDA_CUTLASS_VERSION_HEADER "KDA_CUTLASS_VERSION_HEADER-NOTFOUND")
endif()

include(FindPackageHandleStandardArgs)
find_package_handle_standard_args(
  KdaCutlass
  REQUIRED_VARS KDA_CUTLASS_VERSION_HEADER
  REASON_FAILURE_MESSAGE
    "no cutlass/version.h in '${KDA_CUTLASS_INCLUDE}': pip install nvidia-cutlass, or pass -DKDA_CUTLASS_INCLUDE=<folder>")
set(KDA_CUTLASS_INCLUDE_DIRS "${KDA_CUTLASS_INCLUDE}")
