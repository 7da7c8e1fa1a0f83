// How much workspace TensorRT was asked for while it built, which `enqueue` compares with what the shapes then need.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>

namespace moiie {

// Shared by a plugin and its clones: TensorRT may ask one, write another into the engine, and do so for each profile.
class Reserved {
public:
    // `bytes` as an engine says it; kUnknown at build time, and in engines of before this was kept.
    explicit Reserved(int64_t bytes = kUnknown) : bytes_(std::make_shared<std::atomic<int64_t>>(bytes)) {}

    // The largest of all that was asked for counts, as the profiles of an engine share its memory.
    void ask(int64_t bytes) const noexcept;

    bool known() const noexcept { return *bytes_ >= 0; }
    int64_t bytes() const noexcept { return *bytes_; }

    // Throws Refusal with both numbers when more is needed than was asked for.
    void check(int64_t needed) const;

private:
    static constexpr int64_t kUnknown = -1;
    std::shared_ptr<std::atomic<int64_t>> bytes_;
};

}  // namespace moiie
