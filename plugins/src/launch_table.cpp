#include "launch_table.h"

#include <algorithm>
#include <cctype>
#include <set>
#include <sstream>

#include "refusal.h"

// Table and images lie between two symbols each, in read-only data; the macros are the files' paths.
#define MOIIE_EMBED(name, path)                                     \
    __asm__(".pushsection .rodata\n.balign 64\n.hidden " #name      \
            "\n.global " #name "\n" #name ":\n.incbin \"" path      \
            "\"\n.byte 0\n.popsection\n");                          \
    extern "C" char const name[]

MOIIE_EMBED(moiie_table, MOIIE_TABLE);
MOIIE_EMBED(moiie_images, MOIIE_IMAGES);

namespace moiie {
namespace {

// Cubins from here on use features of exactly one SM.
constexpr int32_t kFirstExactSm = 90;

// The words of one line; an empty word is written "-".
class Words {
public:
    explicit Words(std::string const& line) : line_(line), in_(line) {}

    std::string text() {
        std::string word;
        if (!(in_ >> word)) {
            throw Refusal(moiie::text("launch table: the line '", line_, "' is too short"));
        }
        return word == "-" ? "" : word;
    }

    int64_t number() {
        std::string const word = text();
        try {
            return std::stoll(word);
        } catch (std::exception const&) {
            throw Refusal(moiie::text("launch table: '", word, "' in the line '", line_, "' is no number"));
        }
    }

    bool more() { return (in_ >> std::ws).peek() != std::istringstream::traits_type::eof(); }

    Refusal unknown(std::string const& word) const {
        return Refusal(moiie::text("launch table: unknown word '", word, "' in the line '", line_, "'"));
    }

private:
    std::string const& line_;
    std::istringstream in_;
};

Aligned read_aligned(Words& words) {
    std::string const word = words.text();
    if (word != "yes" && word != "no" && word != "either") {
        throw words.unknown(word);
    }
    return word == "yes" ? Aligned::kYes : word == "no" ? Aligned::kNo : Aligned::kEither;
}

Kind read_kind(Words& words) {
    static std::map<std::string, Kind> const kinds = {{"pointer", Kind::kPointer}, {"int32", Kind::kInt32},
                                                      {"int64", Kind::kInt64},     {"float32", Kind::kFloat32},
                                                      {"null", Kind::kNull}};
    std::string const word = words.text();
    auto const found = kinds.find(word);
    if (found == kinds.end()) {
        throw words.unknown(word);
    }
    return found->second;
}

GridAxis read_axis(Words& words) {
    GridAxis axis{words.text(), words.text(), 1};
    if (!axis.block.empty() && std::isdigit(static_cast<unsigned char>(axis.block.front()))) {
        axis.length = std::stoll(axis.block);
        axis.block.clear();
    }
    return axis;
}

void read_plan_line(std::string const& verb, Words& words, LaunchTable& table) {
    if (verb == "plan") {
        table.plans.push_back({words.text(), words.text(), words.text(), read_aligned(words), words.number(),
                               words.number(), {}, {}, {}});
        return;
    }
    Plan& plan = table.plans.at(table.plans.size() - 1);
    if (verb == "symbol") {
        DerivedSymbol symbol{words.text(), words.number(), {}, {}};
        while (words.more()) {
            symbol.terms.push_back(words.text());
            symbol.factors.push_back(words.number());
        }
        plan.symbols.push_back(symbol);
    } else if (verb == "buffer") {
        WorkspaceBuffer buffer{words.text(), words.number(), {}};
        while (words.more()) {
            buffer.dims.push_back(words.text());
        }
        plan.workspace.push_back(buffer);
    } else {
        plan.launches.push_back({words.text(), {read_axis(words), read_axis(words), read_axis(words)}});
    }
}

void read_kernel_line(std::string const& verb, Words& words, LaunchTable& table) {
    if (verb == "kernel") {
        table.kernels.push_back({words.text(), words.text(), static_cast<int32_t>(words.number()), {}, {}});
        return;
    }
    Kernel& kernel = table.kernels.at(table.kernels.size() - 1);
    if (verb == "parameter") {
        kernel.parameters.push_back({words.text(), read_kind(words)});
        return;
    }
    auto const sm = static_cast<int32_t>(words.number());
    std::string const kind = words.text();
    if (kind != "cubin" && kind != "ptx") {
        throw words.unknown(kind);
    }
    Image image{sm, kind == "ptx", static_cast<uint64_t>(words.number()), static_cast<uint64_t>(words.number()),
                static_cast<uint32_t>(words.number()), static_cast<uint32_t>(words.number()), {}};
    while (words.more()) {
        std::string const name = words.text();
        image.blocks[name] = words.number();
    }
    kernel.images.push_back(image);
}

LaunchTable read_table() {
    static std::set<std::string> const of_plans = {"plan", "symbol", "buffer", "launch"};
    static std::set<std::string> const of_kernels = {"kernel", "parameter", "image"};
    LaunchTable table;
    std::istringstream lines{std::string(moiie_table)};
    for (std::string line; std::getline(lines, line);) {
        Words words(line);
        std::string const verb = words.text();
        if (of_plans.count(verb) != 0) {
            read_plan_line(verb, words, table);
        } else if (of_kernels.count(verb) != 0) {
            read_kernel_line(verb, words, table);
        } else if (verb == "source") {
            table.source = words.text();
        } else {
            throw words.unknown(verb);
        }
    }
    return table;
}

// Systems on a chip: a cubin for a discrete GPU of the same generation is not promised to run there, nor the reverse.
bool is_embedded(int32_t sm) { return sm == 72 || sm == 87 || sm == 101 || sm == 110; }

bool runs_cubin(Image const& image, int32_t sm) {
    if (image.sm == sm) {
        return true;
    }
    bool const same_generation = image.sm / 10 == sm / 10 && image.sm < sm;
    return same_generation && sm < kFirstExactSm && !is_embedded(image.sm) && !is_embedded(sm);
}

std::string sm_list(Kernel const& kernel) {
    std::set<int32_t> cubins;
    std::set<int32_t> ptx;
    for (Image const& image : kernel.images) {
        (image.is_ptx ? ptx : cubins).insert(image.sm);
    }
    std::string list;
    for (int32_t const sm : cubins) {
        list += text(list.empty() ? "" : ", ", "SM", sm);
    }
    for (int32_t const sm : ptx) {
        list += text(list.empty() ? "" : ", ", "PTX from SM", sm);
    }
    return list;
}

}  // namespace

LaunchTable const& launch_table() {
    static LaunchTable const table = read_table();
    return table;
}

char const* image_bytes(Image const& image) { return moiie_images + image.offset; }

Kernel const& find_kernel(std::string const& name) {
    for (Kernel const& kernel : launch_table().kernels) {
        if (kernel.name == name) {
            return kernel;
        }
    }
    throw Refusal(text("the library holds no kernel '", name, "'"));
}

Image const& choose_image(Kernel const& kernel, int32_t sm, bool ptx_only) {
    if (sm < kernel.oldest_sm) {
        throw Refusal(text("kernel '", kernel.name, "' needs SM", kernel.oldest_sm, " or above; this GPU is SM", sm,
                           ": export the bundle with int8 or int4 instead of fp8 for it"));
    }
    Image const* best = nullptr;
    for (Image const& image : kernel.images) {
        bool const fits = image.is_ptx ? image.sm <= sm : !ptx_only && runs_cubin(image, sm);
        // A cubin before PTX, then the newest.
        bool const better = best == nullptr || (best->is_ptx && !image.is_ptx) ||
                            (best->is_ptx == image.is_ptx && image.sm > best->sm);
        if (fits && better) {
            best = &image;
        }
    }
    if (best == nullptr) {
        throw Refusal(text("kernel '", kernel.name, "' has no ", ptx_only ? "PTX" : "code", " for SM", sm, " (there is ",
                           sm_list(kernel), "); build the library for it: moiie plugins build --sm ", sm));
    }
    return *best;
}

}  // namespace moiie
