#include "log.h"

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstring>
#include <mutex>

#include "tensorrt.h"

namespace moiie {
namespace {

// Fixed buffers: an error may be that there is no memory.
constexpr size_t kLongestLine = 2048;
constexpr size_t kKept = 16 * 1024;

std::atomic<nvinfer1::ILoggerFinder*> logger_finder{nullptr};
std::mutex kept_guard;
char kept[kKept];
size_t kept_size = 0;

void keep(char const* line) noexcept {
    std::lock_guard<std::mutex> const lock(kept_guard);
    size_t const length = std::strlen(line);
    // The first errors say the most: what does not fit any more follows from them.
    if (kept_size + length + 1 <= kKept) {
        std::memcpy(kept + kept_size, line, length);
        kept[kept_size + length] = '\n';
        kept_size += length + 1;
    }
}

}  // namespace

void set_logger_finder(nvinfer1::ILoggerFinder* finder) noexcept { logger_finder = finder; }

void log_error(char const* who, char const* message) noexcept {
    char line[kLongestLine];
    std::snprintf(line, sizeof line, "%s: %s", who, message);
    keep(line);
    nvinfer1::ILoggerFinder* const finder = logger_finder.load();
    nvinfer1::ILogger* const logger = finder == nullptr ? nullptr : finder->findLogger();
    if (logger != nullptr) {
        logger->log(nvinfer1::ILogger::Severity::kERROR, line);
    } else {
        std::fprintf(stderr, "%s\n", line);
    }
}

size_t take_errors(char* buffer, size_t size) noexcept {
    std::lock_guard<std::mutex> const lock(kept_guard);
    size_t const all = kept_size;
    if (size > 0) {
        size_t const copied = std::min(all, size - 1);
        std::memcpy(buffer, kept, copied);
        buffer[copied] = '\0';
    }
    kept_size = 0;
    return all;
}

}  // namespace moiie
