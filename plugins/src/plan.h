// From shapes to launches: which plan of the launch table an op takes, how much workspace it needs, and its launches.
#pragma once

#include <map>
#include <string>

#include "launch_table.h"
#include "op.h"
#include "reserved.h"

namespace moiie {

// What decides on a plan beside the shapes.
struct Variant {
    std::string op;
    std::string dtype;
    std::string weights;
};

// The op's variant for input 0 of type `first`.
Variant variant_of(Op const& op, Values const& symbols, DataType first);

// The first plan that fits.
// Throws Refusal naming the op, its types and its number of routes when the table has none.
Plan const& choose_plan(Variant const& variant, Values const& symbols);

// Bytes that suffice for every plan which shapes up to `largest` can take.
size_t workspace_bytes(Variant const& variant, Values const& largest);

struct Launching {
    Values symbols;
    std::map<std::string, void*> pointers;  // inputs and outputs by name
    std::map<std::string, float> reals;
};

// Launches a plan's kernels one after another.
// Throws Refusal naming the kernel and argument when one is missing, misaligned or too large, and before the first launch
// when the workspace is smaller than what the plan lays out.
void run(Plan const& plan, Launching what, void* workspace, Reserved const& reserved, cudaStream_t stream);

// Loads a plan's kernels, so that nothing is loaded later while a CUDA graph is captured.
void load(Plan const& plan);

}  // namespace moiie
