// How an error leaves the library.
//
// torch turns a C++ exception into a Python RuntimeError, unless it is one that knows its Python type. Such an exception needs Python,
// which this library does without; so the Python module (bindings.cpp) installs a function that throws it.
#pragma once

#include <string>

namespace packops {

// Throws the Python exception `type` with `message`; both last as long as the process or are copied.
using ErrorHook = void (*)(const char* type, const char* message);

[[noreturn]] void throw_error(const char* python_type, const std::string& message);

}  // namespace packops

// For libraries that are loaded beside the Python module (packops.jit). Loaded alone, nobody calls it.
extern "C" __attribute__((visibility("default"))) void packops_set_error_hook(packops::ErrorHook hook);
