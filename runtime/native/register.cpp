// The library's one entry point, and the table of each operator.
#include <exception>

#include "operators.h"

namespace moiie {
namespace {

using ort::CustomOp;

// A kernel with the interface that it was made with.
template <typename Operator>
struct Kernel {
  const ort::Api* api;
  Operator op;
};

// Runs `body` and turns what it throws into the runtime's error.
template <typename Body>
ort::Status* guarded(const ort::Api* api, const Body& body) noexcept {
  try {
    body();
    return nullptr;
  } catch (const Error& error) {
    return ort::CreateStatus::of(api)(ort::kInvalidArgument, error.what());
  } catch (const std::exception& error) {
    return ort::CreateStatus::of(api)(ort::kFail, error.what());
  } catch (...) {
    return ort::CreateStatus::of(api)(ort::kFail, "unknown failure");
  }
}

template <typename Operator>
CustomOp table() {
  CustomOp op{};
  op.version = ort::kApiVersion;
  op.provider = [](const CustomOp*) -> const char* { return nullptr; };
  op.output_type = [](const CustomOp*, size_t) { return ort::kFloat; };
  op.output_count = [](const CustomOp*) -> size_t { return 1; };
  op.output_presence = [](const CustomOp*, size_t) { return ort::kRequired; };
  op.input_memory = [](const CustomOp*, size_t) { return 0; };
  op.variadic_input_minimum = [](const CustomOp*) { return 2; };
  op.variadic_input_one_type = [](const CustomOp*) { return 1; };
  op.variadic_output_minimum = [](const CustomOp*) { return 1; };
  op.variadic_output_one_type = [](const CustomOp*) { return 1; };
  op.first_version = [](const CustomOp*) { return 1; };
  op.last_version = [](const CustomOp*) { return 1; };
  op.create_kernel = [](const CustomOp*, const ort::Api* api, const ort::KernelInfo* info, void** kernel) {
    return guarded(api, [&] { *kernel = new Kernel<Operator>{api, Operator(Attributes(api, info))}; });
  };
  op.compute = [](void* kernel, ort::KernelContext* context) {
    const auto* k = static_cast<const Kernel<Operator>*>(kernel);
    return guarded(k->api, [&] { k->op.run(Call(k->api, context)); });
  };
  op.destroy_kernel = [](void* kernel) { delete static_cast<Kernel<Operator>*>(kernel); };
  return op;
}

CustomOp linear_table() {
  CustomOp op = table<Linear>();
  op.name = [](const CustomOp*) { return "QLinear"; };
  op.input_count = [](const CustomOp*) -> size_t { return 4; };
  op.input_type = [](const CustomOp*, size_t i) { return i == 1 ? ort::kUint8 : ort::kFloat; };
  op.input_presence = [](const CustomOp*, size_t i) { return i < 2 ? ort::kRequired : ort::kOptional; };
  return op;
}

CustomOp experts_table() {
  CustomOp op = table<Experts>();
  op.name = [](const CustomOp*) { return "QExperts"; };
  op.input_count = [](const CustomOp*) -> size_t { return 4; };
  op.input_type = [](const CustomOp*, size_t i) {
    constexpr ort::Element kTypes[] = {ort::kFloat, ort::kInt32, ort::kFloat, ort::kUint8};
    return kTypes[i];
  };
  op.input_presence = [](const CustomOp*, size_t i) { return i < 3 ? ort::kRequired : ort::kVariadic; };
  return op;
}

CustomOp route_table() {
  CustomOp op = table<Route>();
  op.name = [](const CustomOp*) { return "Route"; };
  op.input_count = [](const CustomOp*) -> size_t { return 4; };
  op.input_type = [](const CustomOp*, size_t i) { return i == 2 ? ort::kInt32 : ort::kFloat; };
  op.input_presence = [](const CustomOp*, size_t i) { return i < 2 ? ort::kRequired : ort::kOptional; };
  op.output_count = [](const CustomOp*) -> size_t { return 3; };
  op.output_type = [](const CustomOp*, size_t i) { return i == 1 ? ort::kInt32 : ort::kFloat; };
  return op;
}

template <typename Operator, ort::Element Stored>
CustomOp attend_table() {
  CustomOp op = table<Operator>();
  op.name = [](const CustomOp*) { return Stored == ort::kFloat ? "Attend" : "AttendHalf"; };
  op.input_count = [](const CustomOp*) -> size_t { return 6; };
  op.input_type = [](const CustomOp*, size_t i) {
    return i == 1 || i == 2 ? Stored : i == 3 ? ort::kInt64 : ort::kFloat;
  };
  op.input_presence = [](const CustomOp*, size_t) { return ort::kRequired; };
  op.output_count = [](const CustomOp*) -> size_t { return 3; };
  op.output_type = [](const CustomOp*, size_t i) { return i == 0 ? ort::kFloat : Stored; };
  return op;
}

// One domain for all sessions; it lives as long as the library.
ort::Domain* domain(const ort::Api* api) {
  static const CustomOp linear = linear_table(), experts = experts_table(), route = route_table();
  static const CustomOp attend = attend_table<AttendFloat, ort::kFloat>(), attend_half = attend_table<AttendHalf, ort::kFloat16>();
  static ort::Domain* const made = [api] {
    ort::Domain* created = nullptr;
    check(api, ort::CreateDomain::of(api)("moiie.cpu", &created));
    check(api, ort::AddToDomain::of(api)(created, &linear));
    check(api, ort::AddToDomain::of(api)(created, &experts));
    check(api, ort::AddToDomain::of(api)(created, &route));
    check(api, ort::AddToDomain::of(api)(created, &attend));
    check(api, ort::AddToDomain::of(api)(created, &attend_half));
    return created;
  }();
  return made;
}

}  // namespace
}  // namespace moiie

extern "C" __attribute__((visibility("default"))) moiie::ort::Status* RegisterCustomOps(
    moiie::ort::SessionOptions* options, const moiie::ort::ApiBase* base) {
  using namespace moiie;
  const ort::Api* api = base->get_api(ort::kApiVersion);
  if (api == nullptr) return nullptr;  // a runtime older than any that the package accepts; it will not find the operators
  return guarded(api, [&] { check(api, ort::AddDomain::of(api)(options, domain(api))); });
}
