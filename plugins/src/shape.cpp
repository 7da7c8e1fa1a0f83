#include "shape.h"

#include <algorithm>
#include <cctype>
#include <sstream>

#include "refusal.h"

namespace moiie {
namespace {

std::string without_spaces(std::string text) {
    text.erase(std::remove_if(text.begin(), text.end(), [](unsigned char each) { return std::isspace(each); }),
               text.end());
    return text;
}

Axis parse_axis(std::string const& word) {
    Axis axis;
    axis.text = word;
    std::string product = word;
    if (auto const slash = word.find('/'); slash != std::string::npos) {
        product = word.substr(0, slash);
        axis.divisor = word.substr(slash + 1);
    }
    std::istringstream factors(product);
    for (std::string factor; std::getline(factors, factor, '*');) {
        if (std::isdigit(static_cast<unsigned char>(factor.front()))) {
            axis.factor *= std::stoll(factor);
        } else {
            axis.names.push_back(factor);
        }
    }
    return axis;
}

int64_t divisor_of(Axis const& axis, Values const& values) {
    return axis.divisor.empty() ? 1 : value_of(values, axis.divisor);
}

// Defines the only unknown name of an axis from the axis' length; false when there is no such name.
bool define(std::string const& what, Axis const& axis, int64_t length, Values& values) {
    std::string const* unknown = nullptr;
    int64_t known = axis.factor;
    for (std::string const& name : axis.names) {
        if (values.count(name) != 0) {
            known *= value_of(values, name);
        } else if (unknown == nullptr) {
            unknown = &name;
        } else {
            return false;
        }
    }
    if (unknown == nullptr) {
        return false;
    }
    int64_t const total = length * divisor_of(axis, values);
    if (known == 0 || total % known != 0) {
        throw Refusal(text(what, ": ", length, " is no length for an axis '", axis.text, "'"));
    }
    values[*unknown] = total / known;
    return true;
}

}  // namespace

int64_t Axis::length(std::string const& what, Values const& values) const {
    int64_t product = factor;
    for (std::string const& name : names) {
        product *= value_of(values, name);
    }
    int64_t const by = divisor_of(*this, values);
    if (by == 0 || product % by != 0) {
        throw Refusal(moiie::text(what, ": '", text, "' is no whole number: ", product, " / ", by));
    }
    return product / by;
}

Shape parse_shape(std::string const& text) {
    Shape shape;
    std::istringstream words(without_spaces(text));
    for (std::string word; std::getline(words, word, ',');) {
        shape.push_back(parse_axis(word));
    }
    return shape;
}

void match_shape(std::string const& what, Shape const& shape, Dims const& dims, Values& values) {
    if (dims.nbDims != static_cast<int32_t>(shape.size())) {
        throw Refusal(text(what, " has ", dims.nbDims, " axes ", dims_text(dims), "; expected ", shape.size()));
    }
    for (size_t i = 0; i < shape.size(); ++i) {
        int64_t const length = dims.d[i];
        auto const unknown = [&](std::string const& name) { return values.count(name) == 0; };
        bool const open = std::any_of(shape[i].names.begin(), shape[i].names.end(), unknown);
        if (length == -1 || (open && define(what, shape[i], length, values)) || open) {
            continue;
        }
        if (int64_t const expected = shape[i].length(what, values); expected != length) {
            throw Refusal(text(what, " has the shape ", dims_text(dims), "; axis ", i, " ('", shape[i].text,
                               "') must be ", expected, ", not ", length));
        }
    }
}

std::string dims_text(Dims const& dims) {
    std::ostringstream out;
    out << '[';
    for (int32_t i = 0; i < dims.nbDims; ++i) {
        out << (i == 0 ? "" : ", ");
        if (dims.d[i] == -1) {
            out << '?';
        } else {
            out << dims.d[i];
        }
    }
    out << ']';
    return out.str();
}

}  // namespace moiie
