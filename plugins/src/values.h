// Named whole numbers: a node's attributes, the lengths of its axes, and what follows from them.
#pragma once

#include <cstdint>
#include <map>
#include <string>

namespace moiie {

using Values = std::map<std::string, int64_t, std::less<>>;

// The value of that name.
// Throws Refusal when there is none: a table names something that its op does not define.
int64_t value_of(Values const& values, std::string const& name);

}  // namespace moiie
