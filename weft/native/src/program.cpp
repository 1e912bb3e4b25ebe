#include "program.h"

namespace weft {

namespace {

const Kernels* required(const std::string& isa) {
    const Kernels* found = kernels_named(isa);
    if (!found) throw std::invalid_argument("this processor has no " + isa + "; say auto or one of isas()");
    return found;
}

}  // namespace

Program::Program(int threads, const std::string& isa) : kernels_(required(isa)), pool_(threads) {}

void Program::run(int64_t first, int64_t stop, Step& step) {
    if (first < 0 || stop > size() || first > stop) throw std::out_of_range("no such operations");
    pool_.run([&](Share share) {
        for (int64_t at = first; at < stop; at++) {
            if (at > first) pool_.meet();
            operations_[static_cast<size_t>(at)](step, share);
        }
    });
}

// Rows of each sequence in tiles, with each kv head; where that is too little for all threads, chunk by chunk of the entries.
void Step::plan(size_t group, const std::vector<int64_t>& sequences, int heads, int kv_heads, int dim, int threads) {
    const Place& place = places.at(group);
    const int each = heads / kv_heads, tall = QUERY_ROWS / each;
    const int64_t chunk = static_cast<int64_t>(KEY_TILE) * CHUNK_TILES;
    auto& found = items.at(group);
    found.clear();
    int64_t tiles = 0;
    for (const int64_t s : sequences) tiles += (seen.bounds[s + 1] - seen.bounds[s] + tall - 1) / tall;
    const bool apart = threads > 1 && tiles * kv_heads < 4 * threads;
    int64_t floats = 0;
    for (const int64_t s : sequences) {
        const int64_t begin = place.first[s] / chunk, end = (place.first[s] + place.lengths[s] + chunk - 1) / chunk;
        for (int64_t row = seen.bounds[s]; row < seen.bounds[s + 1]; row += tall) {
            const int64_t left = seen.bounds[s + 1] - row;
            Item item{};
            item.sequence = static_cast<int32_t>(s), item.row = static_cast<int32_t>(row);
            item.rows = static_cast<int32_t>(left < tall ? left : tall);
            for (int32_t head = 0; head < kv_heads; head++) {
                item.kv_head = head;
                if (!apart || end - begin < 2) {
                    item.chunk = begin, item.chunk_stop = end, item.partial = -1;
                    found.push_back(item);
                    continue;
                }
                for (int64_t c = begin; c < end; c++) {
                    item.chunk = c, item.chunk_stop = c + 1, item.partial = floats;
                    floats += static_cast<int64_t>(item.rows) * each * (2 + dim);
                    found.push_back(item);
                }
            }
        }
    }
    if (static_cast<int64_t>(partials.size()) < floats) partials.resize(static_cast<size_t>(floats));
}

}  // namespace weft
