#include "dispatch/dispatch.h"

#include <algorithm>
#include <atomic>
#include <stdexcept>

#include "levels.h"

namespace ramgguf {

// The symbols that each level's objects define.
#define X(level)                  \
    namespace level {             \
    extern const Codec codec;     \
    extern const Logits logits;   \
    extern const Gptq gptq;       \
    extern const Descent descent; \
    extern const Points points;   \
    }
RAMGGUF_LEVELS(X)
#undef X

namespace {

bool cpu_runs([[maybe_unused]] const std::string& level) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (level == "v3") {
        return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
               __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2") &&
               __builtin_cpu_supports("f16c") && __builtin_cpu_supports("lzcnt") &&
               __builtin_cpu_supports("movbe");
    }
    if (level == "v4") {
        return cpu_runs("v3") && __builtin_cpu_supports("avx512f") &&
               __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512cd") &&
               __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    }
#endif
    return true;  // the lowest level of every architecture
}

std::vector<Level> find_levels() {
    std::vector<Level> all;
#define X(level)   \
    all.push_back( \
        {#level, &level::codec, &level::logits, &level::gptq, &level::descent, &level::points});
    RAMGGUF_LEVELS(X)
#undef X
    std::vector<Level> found;
    for (auto level = all.rbegin(); level != all.rend(); ++level) {
        if (cpu_runs(level->name)) found.push_back(*level);
    }
    return found;
}

std::atomic<const Level*> active{nullptr};

}  // namespace

const std::vector<Level>& supported_levels() {
    static const std::vector<Level> levels = find_levels();
    return levels;
}

const Level& active_level() {
    const Level* level = active.load();
    return level ? *level : supported_levels().front();
}

void set_level(const std::string& name) {
    const auto& levels = supported_levels();
    if (name.empty()) {
        active = &levels.front();
        return;
    }
    if (name == "baseline") {
        active = &levels.back();
        return;
    }
    const auto found =
        std::find_if(levels.begin(), levels.end(), [&](const Level& l) { return name == l.name; });
    if (found == levels.end()) {
        std::string message =
            "RAMGGUF_ISA=" + name + " is unknown or not supported by this CPU; it runs baseline";
        for (const auto& level : levels) message += std::string(", ") + level.name;
        throw std::invalid_argument(message);
    }
    active = &*found;
}

}  // namespace ramgguf
