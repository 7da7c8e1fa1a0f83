// Every op is a row, defined in a file of its own; here they are listed. A new op is one such file and one line here.
#pragma once

#include "../op.h"

namespace moiie {

extern Op const kExpertDispatch;
extern Op const kQuantizedExpertDispatch;
extern Op const kFp8ExpertDispatch;
extern Op const kKVCacheUpdate;
extern Op const kDecodeAttention;
extern Op const kDeformableSample;

inline std::vector<Op const*> all_ops() {
    return {&kExpertDispatch,  &kQuantizedExpertDispatch, &kFp8ExpertDispatch,
            &kKVCacheUpdate,   &kDecodeAttention,         &kDeformableSample};
}

}  // namespace moiie
