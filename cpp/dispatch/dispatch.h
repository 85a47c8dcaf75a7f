// Which ISA level runs: the best that the CPU has, or the one that RAMGGUF_ISA names.
#pragma once
#include <string>
#include <vector>

#include "kernels/codec.h"
#include "kernels/descent.h"
#include "kernels/gptq.h"
#include "kernels/points.h"
#include "logits/logits.h"

namespace ramgguf {

struct Level {
    const char* name;
    const Codec* codec;
    const Logits* logits;
    const Gptq* gptq;
    const Descent* descent;
    const Points* points;
};

// Levels that were compiled and that this CPU runs, best first; never empty.
const std::vector<Level>& supported_levels();

const Level& active_level();

// Makes `name` (a level's name, "baseline" for the lowest, "" for the best) the active level;
// throws std::invalid_argument.
void set_level(const std::string& name);

}  // namespace ramgguf
