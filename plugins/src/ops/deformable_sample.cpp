// DeformableSample: weighted bilinear samples of a map at free points, head by head.

#include "ops.h"

namespace moiie {

Op const kDeformableSample = [] {
    Op op;
    op.name = "DeformableSample";
    op.inputs = {
        {"value", parse_shape("n, S, h, D"), {DataType::kFLOAT, DataType::kHALF}},
        {"points", parse_shape("n, Q, h, P, 2"), {DataType::kFLOAT}},
        {"weights", parse_shape("n, Q, h, P"), {DataType::kFLOAT}},
        {"grid_size", parse_shape("n, 2"), {DataType::kFLOAT}},
    };
    op.outputs = {{"out", parse_shape("n, Q, h*D"), {}}};
    return op;
}();

}  // namespace moiie
