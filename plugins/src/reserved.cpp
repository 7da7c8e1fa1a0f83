#include "reserved.h"

#include "refusal.h"

namespace moiie {

void Reserved::ask(int64_t bytes) const noexcept {
    int64_t before = *bytes_;
    while (before < bytes && !bytes_->compare_exchange_weak(before, bytes)) {
    }
}

void Reserved::check(int64_t needed) const {
    if (known() && needed > bytes()) {
        throw Refusal(text("these shapes need a workspace of ", needed, " bytes, and the engine was built with ", bytes(),
                           ": build it again with a profile that bounds them"));
    }
}

}  // namespace moiie
