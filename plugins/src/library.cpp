// The functions that TensorRT looks up in a plugin library, one creator for each op, and a way to ask for the reasons of a
// failed build where TensorRT has no logger for plugins.

#include <memory>
#include <vector>

#include "creator.h"
#include "log.h"
#include "ops/ops.h"

#define MOIIE_EXPORT extern "C" __attribute__((visibility("default")))

MOIIE_EXPORT void setLoggerFinder(nvinfer1::ILoggerFinder* finder) { moiie::set_logger_finder(finder); }

MOIIE_EXPORT nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& count) {
    static std::vector<std::unique_ptr<moiie::Creator>> const owned = [] {
        std::vector<std::unique_ptr<moiie::Creator>> made;
        for (moiie::Op const* op : moiie::all_ops()) {
            made.push_back(std::make_unique<moiie::Creator>(*op));
        }
        return made;
    }();
    static std::vector<nvinfer1::IPluginCreatorInterface*> const creators = [] {
        std::vector<nvinfer1::IPluginCreatorInterface*> all;
        for (auto const& each : owned) {
            all.push_back(each.get());
        }
        return all;
    }();
    count = static_cast<int32_t>(creators.size());
    return creators.data();
}

MOIIE_EXPORT size_t moiieTakeErrors(char* buffer, size_t size) { return moiie::take_errors(buffer, size); }
