#include "values.h"

#include "refusal.h"

namespace moiie {

int64_t value_of(Values const& values, std::string const& name) {
    auto const found = values.find(name);
    if (found == values.end()) {
        throw Refusal(text("nothing is called '", name, "' (a fault in the op's table)"));
    }
    return found->second;
}

}  // namespace moiie
