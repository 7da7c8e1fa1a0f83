// Symbolic shapes: "experts, 2*intermediate, hidden_size/pack". An axis is a product of names and numbers, divided by one
// more name.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "tensorrt.h"
#include "values.h"

namespace moiie {

struct Axis {
    int64_t factor = 1;
    std::vector<std::string> names;
    std::string divisor;  // empty: 1
    std::string text;

    // Length of the axis in tensor `what`.
    // Throws Refusal when the division leaves a remainder.
    int64_t length(std::string const& what, Values const& values) const;
};

using Shape = std::vector<Axis>;

// Reads "tokens, 2*intermediate, hidden_size/group_size"; an empty text is a scalar.
Shape parse_shape(std::string const& text);

// Compares the axes of tensor `what` with `shape`. The first tensor that has an axis with a single unknown name defines
// the name's value; an axis of length -1 (known only at run time) is skipped.
// Throws Refusal with the tensor, the axis, what was expected and what was found.
void match_shape(std::string const& what, Shape const& shape, Dims const& dims, Values& values);

// "[4, 16, ?]"
std::string dims_text(Dims const& dims);

}  // namespace moiie
