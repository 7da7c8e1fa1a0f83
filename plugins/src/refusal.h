// Refusals: wrong input ends in a sentence that names it. They are thrown inside the library and never leave it: at the
// border to TensorRT, whose interfaces are noexcept, a refusal becomes a line in TensorRT's log and an error code.
#pragma once

#include <exception>
#include <sstream>
#include <stdexcept>
#include <string>

#include "log.h"

namespace moiie {

class Refusal : public std::runtime_error {
public:
    using std::runtime_error::runtime_error;
};

// Its arguments, written one after another.
template <typename... Parts>
std::string text(Parts const&... parts) {
    std::ostringstream out;
    (out << ... << parts);
    return out.str();
}

// Runs `work` at the border: its result, or `otherwise` once the reason is logged with the op's name before it.
template <typename Result, typename Work>
Result guarded(std::string const& who, Result otherwise, Work&& work) noexcept {
    try {
        return work();
    } catch (std::exception const& error) {
        log_error(who.c_str(), error.what());
    } catch (...) {
        log_error(who.c_str(), "an unknown exception");
    }
    return otherwise;
}

}  // namespace moiie
