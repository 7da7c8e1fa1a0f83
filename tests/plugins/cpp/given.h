// Attributes and tensors of a node as the harness' commands give them.
#pragma once

#include <NvInferRuntime.h>

#include <istream>
#include <string>
#include <vector>

using namespace nvinfer1;

struct Field {
    std::string name;
    PluginFieldType type;
    int32_t count;
    std::vector<char> bytes;
};

struct Given {
    PluginTensorDesc now;
    Dims most;
    size_t offset;
};

template <typename Number>
void read_values(std::istream& in, Field& field) {
    for (int32_t i = 0; i < field.count; ++i) {
        Number value;
        in >> value;
        auto const* const bytes = reinterpret_cast<char const*>(&value);
        field.bytes.insert(field.bytes.end(), bytes, bytes + sizeof value);
    }
}

inline Field read_field(std::istream& in) {
    Field field;
    std::string type;
    in >> field.name >> type >> field.count;
    if (type == "int32") {
        field.type = PluginFieldType::kINT32;
        read_values<int32_t>(in, field);
    } else if (type == "int64") {
        field.type = PluginFieldType::kINT64;
        read_values<int64_t>(in, field);
    } else {
        field.type = type == "float32" ? PluginFieldType::kFLOAT32 : PluginFieldType::kCHAR;
        read_values<float>(in, field);
    }
    return field;
}

inline Given read_tensor(std::istream& in) {
    Given given{};
    int type = 0;
    in >> type >> given.now.dims.nbDims;
    for (int32_t i = 0; i < given.now.dims.nbDims; ++i) {
        in >> given.now.dims.d[i];
    }
    in >> given.offset;
    given.now.type = static_cast<DataType>(type);
    given.now.format = TensorFormat::kLINEAR;
    given.most = given.now.dims;
    if (std::string word; in >> word && word == "max") {
        for (int32_t i = 0; i < given.most.nbDims; ++i) {
            in >> given.most.d[i];
        }
    }
    return given;
}
