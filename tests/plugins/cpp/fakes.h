// What TensorRT hands to a plugin library: a logger, and expressions of dimensions.
#pragma once

#include <NvInferRuntime.h>

#include <deque>
#include <iostream>

using namespace nvinfer1;

class Logger final : public ILogger {
    void log(Severity, AsciiChar const* message) noexcept override { std::cout << "log " << message << std::endl; }
};

class Finder final : public ILoggerFinder {
public:
    ILogger* findLogger() override { return &logger_; }

private:
    Logger logger_;
};

// Expressions of dimensions: numbers that TensorRT would fold.
class Length final : public IDimensionExpr, public apiv::VDimensionExpr {
public:
    explicit Length(int64_t value, bool known) : value_(value), known_(known) { mImpl = this; }
    ~Length() noexcept override = default;
    bool isConstant() const noexcept override { return known_; }
    int64_t getConstantValue() const noexcept override { return value_; }
    bool isSizeTensor() const noexcept override { return false; }
    int64_t value() const { return value_; }

private:
    int64_t value_;
    bool known_;
};

class Lengths final : public IExprBuilder, public apiv::VExprBuilder {
public:
    Lengths() { mImpl = this; }
    ~Lengths() noexcept override = default;
    IDimensionExpr const* constant(int64_t value) noexcept override { return make(value, true); }
    IDimensionExpr const* operation(DimensionOperation what, IDimensionExpr const& first,
                                    IDimensionExpr const& second) noexcept override {
        if (what != DimensionOperation::kPROD) {
            return nullptr;
        }
        return make(static_cast<Length const&>(first).value() * static_cast<Length const&>(second).value(), false);
    }
    IDimensionExpr const* declareSizeTensor(int32_t, IDimensionExpr const&, IDimensionExpr const&) override {
        return nullptr;
    }
    Length const* make(int64_t value, bool known) {
        owned_.emplace_back(value, known);
        return &owned_.back();
    }

private:
    std::deque<Length> owned_;
};
