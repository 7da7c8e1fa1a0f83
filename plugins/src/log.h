// TensorRT's logger, found through what TensorRT hands to `setLoggerFinder`.
#pragma once

#include <cstddef>

namespace nvinfer1 {
class ILoggerFinder;
}

namespace moiie {

void set_logger_finder(nvinfer1::ILoggerFinder* finder) noexcept;

// Writes "WHO: MESSAGE" as an error: to TensorRT's log, or to stderr where TensorRT gives none (TensorRT for RTX 1.7 does
// not). It is kept for `take_errors`, too.
void log_error(char const* who, char const* message) noexcept;

// Copies the errors since the last call into `buffer`, a line each, and forgets them; always ends with a zero byte.
// Returns the bytes that all of them take, which may be more than were copied.
size_t take_errors(char* buffer, size_t size) noexcept;

}  // namespace moiie
