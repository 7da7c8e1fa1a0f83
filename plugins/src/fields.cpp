#include "fields.h"

#include <cmath>
#include <cstring>
#include <set>

#include "refusal.h"

namespace moiie {
namespace {

using nvinfer1::PluginField;
using nvinfer1::PluginFieldType;

template <typename Number>
std::vector<double> numbers(PluginField const& field) {
    std::vector<double> result;
    for (int32_t i = 0; i < field.length; ++i) {
        Number value;  // TensorRT promises no alignment
        std::memcpy(&value, static_cast<char const*>(field.data) + i * sizeof value, sizeof value);
        result.push_back(static_cast<double>(value));
    }
    return result;
}

// Every attribute of ours is small: a double holds it exactly.
std::vector<double> read(PluginField const& field) {
    if (field.length < 0 || (field.length > 0 && field.data == nullptr)) {
        throw Refusal(text("attribute '", field.name, "' has no data"));
    }
    switch (field.type) {
        case PluginFieldType::kINT32: return numbers<int32_t>(field);
        case PluginFieldType::kINT64: return numbers<int64_t>(field);
        case PluginFieldType::kFLOAT32: return numbers<float>(field);
        case PluginFieldType::kFLOAT64: return numbers<double>(field);
        default:
            throw Refusal(text("attribute '", field.name, "' is of plugin field type ",
                               static_cast<int32_t>(field.type), "; expected a number or a list of numbers"));
    }
}

FieldRule const& rule_of(std::vector<FieldRule> const& rules, PluginField const& field) {
    static FieldRule const workspace{kWorkspaceField, false, false, false, 0};
    if (field.name != nullptr && std::strcmp(workspace.name, field.name) == 0) {
        return workspace;
    }
    for (FieldRule const& rule : rules) {
        if (field.name != nullptr && std::strcmp(rule.name, field.name) == 0) {
            return rule;
        }
    }
    std::string known;
    for (FieldRule const& rule : rules) {
        known += text(known.empty() ? "" : ", ", rule.name);
    }
    throw Refusal(text("there is no attribute '", field.name == nullptr ? "" : field.name, "'; the attributes are ",
                       known.empty() ? "none" : known));
}

std::vector<int64_t> whole_numbers(FieldRule const& rule, std::vector<double> const& given) {
    std::vector<int64_t> result;
    for (double const each : given) {
        if (each != std::floor(each)) {
            throw Refusal(text("attribute '", rule.name, "' is ", each, "; expected a whole number"));
        }
        result.push_back(static_cast<int64_t>(each));
    }
    return result;
}

}  // namespace

Fields::Fields(std::vector<FieldRule> const& rules, nvinfer1::PluginFieldCollection const& given) {
    std::set<std::string> seen;
    for (int32_t i = 0; i < given.nbFields; ++i) {
        FieldRule const& rule = rule_of(rules, given.fields[i]);
        std::vector<double> const values = read(given.fields[i]);
        if (!rule.is_list && values.size() != 1) {
            throw Refusal(text("attribute '", rule.name, "' has ", values.size(), " values; expected 1"));
        }
        if (rule.is_real) {
            reals_[rule.name] = values.front();
        } else {
            lists_[rule.name] = whole_numbers(rule, values);
        }
        seen.insert(rule.name);
    }
    for (FieldRule const& rule : rules) {
        if (seen.count(rule.name) != 0) {
            continue;
        }
        if (rule.required) {
            throw Refusal(text("attribute '", rule.name, "' is missing"));
        }
        if (rule.is_real) {
            reals_[rule.name] = rule.otherwise;
        } else {
            lists_[rule.name] = {static_cast<int64_t>(rule.otherwise)};
        }
    }
}

Fields::Fields(Fields const& other) : lists_(other.lists_), reals_(other.reals_) {}

int64_t Fields::whole(std::string const& name) const { return lists_.at(name).at(0); }

double Fields::real(std::string const& name) const { return reals_.at(name); }

std::vector<int64_t> const& Fields::list(std::string const& name) const { return lists_.at(name); }

nvinfer1::PluginFieldCollection const* Fields::collection() {
    entries_.clear();
    for (auto const& [name, values] : lists_) {
        entries_.emplace_back(name.c_str(), values.data(), PluginFieldType::kINT64, static_cast<int32_t>(values.size()));
    }
    for (auto const& [name, value] : reals_) {
        entries_.emplace_back(name.c_str(), &value, PluginFieldType::kFLOAT64, 1);
    }
    collection_.nbFields = static_cast<int32_t>(entries_.size());
    collection_.fields = entries_.data();
    return &collection_;
}

}  // namespace moiie
