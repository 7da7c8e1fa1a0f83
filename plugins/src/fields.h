// A node's attributes, which TensorRT calls plugin fields: read from a node, checked, and written into an engine.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "tensorrt.h"

namespace moiie {

// What an op says of one of its attributes.
struct FieldRule {
    char const* name;
    bool is_list;
    bool is_real;
    bool required;
    double otherwise;  // when the attribute is absent and not required
};

// Not of a node, but written into an engine beside its attributes: bytes of workspace that TensorRT was asked for.
inline constexpr char const* kWorkspaceField = "workspace_bytes";

// The attributes of one node. Copies own their data.
class Fields {
public:
    // Reads what TensorRT passes to a creator.
    // Throws Refusal for an attribute that is unknown, missing, of another type or of no single value.
    Fields(std::vector<FieldRule> const& rules, nvinfer1::PluginFieldCollection const& given);
    Fields(Fields const& other);
    Fields& operator=(Fields const&) = delete;

    int64_t whole(std::string const& name) const;
    double real(std::string const& name) const;
    std::vector<int64_t> const& list(std::string const& name) const;
    // Whether it was given, or set; only kWorkspaceField may be missing.
    bool has(std::string const& name) const { return lists_.count(name) != 0; }
    void set_whole(std::string const& name, int64_t value) { lists_[name] = {value}; }

    // For the engine; lives as long as this object.
    nvinfer1::PluginFieldCollection const* collection();

private:
    std::map<std::string, std::vector<int64_t>> lists_;  // whole numbers are lists of one
    std::map<std::string, double> reals_;
    std::vector<nvinfer1::PluginField> entries_;
    nvinfer1::PluginFieldCollection collection_{};
};

}  // namespace moiie
