#include "program.h"

#include <algorithm>
#include <chrono>
#include <utility>

namespace weft {

namespace {

const Kernels* required(const std::string& isa) {
    const Kernels* found = kernels_named(isa);
    if (!found) throw std::invalid_argument("this processor has no " + isa + "; say auto or one of isas()");
    return found;
}

// Some processors have products of bfloat16 that take longer than those of the same numbers as floats (a Xeon of 2023: twice as
// long; a Zen 5: half): there inputs stay floats, whose results are nearer too.  Both in turns, and the best of each: what holds one
// up for a moment must not decide, since processes that go on with each other's work have to find the same.
bool halves_pay(const Kernels& kernels) {
    constexpr int64_t TURNS = 1000;  // some 10 us
    double best[2] = {1e9, 1e9};
    for (int i = 0; i < 32; i++) {
        const auto began = std::chrono::steady_clock::now();
        const bool odd = kernels.arithmetic(i % 2 ? TURNS : 2 * TURNS, i % 2 ? 2 : 0) < 0;  // a turn multiplies twice as many
        const std::chrono::duration<double> took = std::chrono::steady_clock::now() - began;
        best[i % 2] = std::min(best[i % 2], took.count() + odd);
    }
    return best[1] < best[0];
}

}  // namespace

const std::vector<const Kernels*>& tables() {
    static const std::vector<const Kernels*> found = [] {
        std::vector<const Kernels*> there;
        for (auto* find : {kernels_amx, kernels_avx512_bf16, kernels_avx512_vnni, kernels_avx512, kernels_avx2, kernels_portable})
            if (const Kernels* table = find()) there.push_back(table);
        const auto halves = std::find(there.begin(), there.end(), kernels_avx512_bf16());
        if (halves != there.end() && !halves_pay(**halves)) std::swap(halves[0], halves[1]);
        return there;
    }();
    return found;
}

Program::Program(int threads, const std::string& isa) : kernels_(required(isa)), pool_(threads) {}

void Program::run(int64_t first, int64_t stop, Step& step) {
    if (first < 0 || stop > size() || first > stop) throw std::out_of_range("no such operations");
    pool_.run([&](Share share) {
        for (int64_t at = first; at < stop; at++) {
            const Listed& mine = operations_[static_cast<size_t>(at)];
            if (at > first && !(mine.by_rows && operations_[static_cast<size_t>(at) - 1].by_rows)) pool_.meet();
            mine.run(step, share);
        }
    });
}

void Program::attend(const Attend& a, size_t group, const Attending& all, Step& step, Share share) {
    const auto count = static_cast<size_t>(share.count);
    for (size_t i = static_cast<size_t>(share.index); i < all.items.size(); i += count) {
        const Item* after = i + count < all.items.size() ? &all.items[i + count] : nullptr;
        kernels_->attend(a, step.places[group], step.seen, all.items[i], after, all.rows.data(), step.partials.data());
    }
    if (all.joined.empty()) return;  // the same for every thread
    pool_.meet();
    kernels_->merge(a, all.joined.data(), static_cast<int64_t>(all.joined.size()), all.places.data(), step.partials.data(), share);
}

void Program::weigh(const Attend& a, size_t group, const Weigh& to, const Step& step) {
    const Place& place = step.places.at(group);
    const int tall = QUERY_ROWS / (a.heads / a.kv_heads);
    std::vector<int32_t> rows;
    std::vector<std::pair<int64_t, int64_t>> bounds;  // of each sequence with rows that count, in `rows`
    std::vector<int32_t> sequences;
    for (int64_t row = 0, s = 0; row < step.rows; row++) {
        while (row >= step.seen.bounds[s + 1]) s++;
        if (to.sums[row] < 0) continue;
        const auto at = static_cast<int64_t>(rows.size());
        if (sequences.empty() || sequences.back() != s) sequences.push_back(static_cast<int32_t>(s)), bounds.emplace_back(at, at);
        rows.push_back(static_cast<int32_t>(row));
        bounds.back().second = at + 1;
    }
    const auto count = static_cast<int64_t>(sequences.size()) * a.kv_heads;
    pool_.run([&](Share share) {  // a sequence and a kv head are one thread's, so that no two add to one sum
        for (int64_t i = share.index; i < count; i += share.count) {
            const auto [low, high] = bounds[static_cast<size_t>(i / a.kv_heads)];
            for (int64_t at = low; at < high; at += tall) {
                Item item{};
                item.sequence = sequences[static_cast<size_t>(i / a.kv_heads)], item.kv_head = static_cast<int32_t>(i % a.kv_heads);
                item.first = static_cast<int32_t>(at), item.rows = static_cast<int32_t>(high - at < tall ? high - at : tall);
                kernels_->weigh(a, place, step.seen, to, item, rows.data());
            }
        }
    });
}

namespace {

// Chunks of a sequence that have entries.
void extent(const Place& place, int64_t s, int64_t& begin, int64_t& end) {
    begin = place.first[s] / CHUNK, end = (place.first[s] + place.lengths[s] + CHUNK - 1) / CHUNK;
}

}  // namespace

bool Step::turn(size_t index) {
    Turns& from = turns[index];
    const int64_t pairs = from.pairs;
    from.own.resize(static_cast<size_t>(2 * rows * pairs));
    float *cos = from.own.data(), *sin = cos + rows * pairs;
    for (int64_t row = 0; row < rows; row++) {
        const int64_t at = seen.row_positions[row];
        if (at < 0 || at >= from.kept) return false;
        std::copy_n(from.cos + at * pairs, pairs, cos + row * pairs);
        std::copy_n(from.sin + at * pairs, pairs, sin + row * pairs);
    }
    angles[index] = {cos, sin};
    return true;
}

void Step::write(const Writing& to) const {
    for (int64_t row = 0; row < rows; row++)
        to.positions[to.slots[row] / to.block_tokens * to.positions_stride + to.slots[row] % to.block_tokens] =
            static_cast<int32_t>(seen.row_positions[row]);
}

bool Step::again() {
    if (parted) return false;
    for (size_t i = 0; i < turns.size(); i++)
        if (turns[i].cos && !turn(i)) return false;
    for (const Writing& to : writing) write(to);
    for (const Planned& p : planned) plan(p.group, p.sequences, nullptr, 0, p.heads, p.kv_heads, p.dim, p.threads);
    return true;
}

void Step::plan(size_t group, const std::vector<int64_t>& sequences, const int64_t* shared, int64_t chunks, int heads,
                int kv_heads, int dim, int threads) {
    const Place& place = places.at(group);
    const int tall = QUERY_ROWS / (heads / kv_heads);
    Attending& found = attending.at(group);
    found.items.clear(), found.rows.clear(), found.joined.clear(), found.places.clear();
    int64_t tiles = 0;
    for (const int64_t s : sequences) tiles += (seen.bounds[s + 1] - seen.bounds[s] + tall - 1) / tall;
    const bool apart = threads > 1 && tiles * kv_heads < 4 * threads;
    const int64_t each = partial_floats(heads, kv_heads, dim);
    int64_t floats = 0;
    std::vector<std::vector<int64_t>> parts;  // of each (row, kv head) that is put together, by its place in `joined`

    // Rows [first, first + count) of the list with all kv heads over chunks of a sequence.
    const auto add = [&](int64_t s, int64_t first, int64_t count, int64_t from, int64_t to, bool whole, int64_t joined) {
        for (int64_t at = first; at < first + count; at += tall) {
            Item item{};
            item.sequence = static_cast<int32_t>(s), item.first = static_cast<int32_t>(at);
            item.rows = static_cast<int32_t>(first + count - at < tall ? first + count - at : tall);
            // Entries are read in the order in which they lie where an item has all kv heads.
            const int fitting = whole && apart ? 1 : QUERY_ROWS / (heads / kv_heads * item.rows);
            item.kv_heads = std::clamp(fitting, 1, kv_heads);
            for (; item.kv_head < kv_heads; item.kv_head += item.kv_heads) {
                item.kv_heads = std::min(item.kv_heads, kv_heads - item.kv_head);
                if (whole) {
                    item.chunk = from, item.chunk_stop = to, item.partial = -1;
                    found.items.push_back(item);
                    continue;
                }
                const int64_t run = (to - from + 4 * threads - 1) / (4 * threads);
                for (int64_t c = from; c < to; c = item.chunk_stop) {
                    item.chunk = c, item.chunk_stop = std::min(c + run, to), item.partial = floats;
                    found.items.push_back(item);
                    for (int64_t chunk = c; chunk < item.chunk_stop; chunk++)
                        for (int32_t head = item.kv_head; head < item.kv_head + item.kv_heads; head++)
                            for (int64_t r = 0; r < item.rows; r++, floats += each)
                                parts[static_cast<size_t>((joined + at - first + r) * kv_heads + head)].push_back(floats);
                }
            }
        }
    };
    const auto list = [&](int64_t s) {  // a sequence's rows, and where they begin in the list
        const auto first = static_cast<int64_t>(found.rows.size());
        for (int64_t row = seen.bounds[s]; row < seen.bounds[s + 1]; row++) found.rows.push_back(static_cast<int32_t>(row));
        return first;
    };
    const auto announce = [&](int64_t s) {  // that a sequence's rows are put together; returns the first one's place
        const auto first = static_cast<int64_t>(parts.size()) / kv_heads;
        for (int64_t row = seen.bounds[s]; row < seen.bounds[s + 1]; row++)
            for (int32_t head = 0; head < kv_heads; head++) {
                found.joined.push_back(Joined{static_cast<int32_t>(row), head, 0, 0});
                parts.emplace_back();
            }
        return first;
    };

    std::vector<int64_t> places_of(sequences.size(), -1);
    for (size_t i = 0; i < sequences.size(); i++) {
        const int64_t s = sequences[i];
        bool alone = true;
        for (int64_t c = 0; shared && c < chunks; c++) alone = alone && shared[static_cast<int64_t>(i) * chunks + c] < 0;
        if (!alone) {
            places_of[i] = announce(s);
            continue;
        }
        int64_t begin, end;
        extent(place, s, begin, end);
        const int64_t count = seen.bounds[s + 1] - seen.bounds[s], first = list(s);
        const bool whole = !apart || end - begin < 2;
        add(s, first, count, begin, end, whole, whole ? 0 : announce(s));
    }
    // Chunks that several read, in ascending order, so that each row's parts are.
    int64_t most = 0;
    for (size_t i = 0; i < sequences.size(); i++) {
        int64_t begin, end;
        extent(place, sequences[i], begin, end);
        if (places_of[i] >= 0 && end > most) most = end;
    }
    for (int64_t c = 0; c < most; c++) {
        std::vector<bool> done(sequences.size(), false);
        for (size_t i = 0; i < sequences.size(); i++) {
            int64_t begin, end;
            extent(place, sequences[i], begin, end);
            if (places_of[i] < 0 || done[i] || c < begin || c >= end) continue;
            const auto number = [&](size_t j) { return c < chunks ? shared[static_cast<int64_t>(j) * chunks + c] : -1; };
            std::vector<size_t> members{i};
            for (size_t j = i + 1; number(i) >= 0 && j < sequences.size(); j++)
                if (places_of[j] >= 0 && number(j) == number(i)) members.push_back(j);
            // Rows of all members side by side; each goes on where its own parts are.
            std::vector<int64_t> targets;
            const auto first = static_cast<int64_t>(found.rows.size());
            for (const size_t j : members) {
                done[j] = true;
                const int64_t s = sequences[j];
                list(s);
                for (int64_t r = 0; r < seen.bounds[s + 1] - seen.bounds[s]; r++) targets.push_back(places_of[j] + r);
            }
            const auto count = static_cast<int64_t>(targets.size());
            for (int64_t at = 0; at < count; at += tall)
                for (int32_t head = 0; head < kv_heads; head++) {
                    Item item{};
                    item.sequence = static_cast<int32_t>(sequences[i]), item.kv_head = head;
                    item.first = static_cast<int32_t>(first + at);
                    item.rows = static_cast<int32_t>(count - at < tall ? count - at : tall);
                    item.chunk = c, item.chunk_stop = c + 1, item.partial = floats;
                    found.items.push_back(item);
                    for (int64_t r = 0; r < item.rows; r++, floats += each)
                        parts[static_cast<size_t>(targets[static_cast<size_t>(at + r)] * kv_heads + head)].push_back(floats);
                }
        }
    }
    for (size_t i = 0; i < parts.size(); i++) {
        found.joined[i].first = static_cast<int64_t>(found.places.size());
        found.joined[i].parts = static_cast<int64_t>(parts[i].size());
        found.places.insert(found.places.end(), parts[i].begin(), parts[i].end());
    }
    if (static_cast<int64_t>(partials.size()) < floats) partials.resize(static_cast<size_t>(floats));
}

int64_t Step::plan_units(size_t group, const std::vector<int64_t>& sequences, const int64_t* units, int heads, int kv_heads) {
    const int tall = QUERY_ROWS / (heads / kv_heads);
    Attending found;
    for (const int64_t s : sequences) {
        int64_t begin, end;
        extent(places.at(group), s, begin, end);
        for (int64_t row = seen.bounds[s]; row < seen.bounds[s + 1];) {
            Item item{};
            item.sequence = static_cast<int32_t>(s), item.first = static_cast<int32_t>(found.rows.size());
            item.chunk = begin, item.chunk_stop = end, item.partial = -1, item.unit = static_cast<int32_t>(units[row]);
            for (; row < seen.bounds[s + 1] && units[row] == item.unit && item.rows < tall; row++, item.rows++)
                found.rows.push_back(static_cast<int32_t>(row));
            for (item.kv_head = 0; item.kv_head < kv_heads; item.kv_head++) found.items.push_back(item);
        }
    }
    sparse.push_back(std::move(found));
    return static_cast<int64_t>(sparse.size()) - 1;
}

}  // namespace weft
