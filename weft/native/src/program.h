// A model's operations over fixed buffers, in order, and the facts of one step that they need.
#pragma once

#include <atomic>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernels.h"
#include "pool.h"

namespace weft {

// What this processor has, best first.
const std::vector<const Kernels*>& tables();

// null where it has no such; auto: the best.
inline const Kernels* kernels_named(const std::string& name) {
    for (const Kernels* found : tables())
        if (name == "auto" || found->name == name) return found;
    return nullptr;
}

// Cosines and sines of one rotary embedding, [T, F].
struct Angles {
    const float *cos = nullptr, *sin = nullptr;
};

// The same of the first `kept` positions, [kept, F], and where those of a step's rows go.
struct Turns {
    const float *cos = nullptr, *sin = nullptr;
    int64_t pairs = 0, kept = 0;
    std::vector<float> own;
};

// Where a group has the logical positions of its entries, and those that the step's rows get.
struct Writing {
    int32_t* positions = nullptr;
    int64_t positions_stride = 0, block_tokens = 1;
    const int64_t* slots = nullptr;
};

// What `Step::plan` was asked for, where no chunks are shared.
struct Planned {
    size_t group;
    std::vector<int64_t> sequences;
    int heads, kv_heads, dim, threads;
};

// Who computes what of the attention of one KV group.
struct Attending {
    std::vector<Item> items;
    std::vector<int32_t> rows;
    std::vector<Joined> joined;
    std::vector<int64_t> places;
};

struct Step {
    int64_t rows = 0, wanted = 0;      // rows of the batch, and those whose logits are wanted
    const int64_t* tokens = nullptr;   // [T]
    const int64_t* picked = nullptr;   // [wanted]
    Seen seen{};
    std::vector<Place> places;         // by KV group of the model
    std::vector<Attending> attending;  // likewise
    std::vector<Attending> sparse;     // by number, of rows in units (`plan_units`)
    std::vector<Angles> angles;        // by rotary embedding
    std::vector<Turns> turns;          // likewise, where they are looked up
    std::vector<Writing> writing;
    std::vector<Planned> planned;
    bool parted = false;               // whether something is planned that `again` does not know how to plan anew
    std::vector<float> partials;
    std::vector<int64_t> first_pair, pair_row, pair_of;  // of the layer's experts (experts.h): [E + 1], [T * k], [T, k]
    std::vector<size_t> busy;          // experts that have rows, those with most first
    bool whole = false;                // whether a thread takes whole ones, of which so many are taken
    std::atomic<size_t> taken = 0;

    // Looks up the angles of an embedding for the rows' positions; false where one is not among those kept.
    bool turn(size_t index);
    // Writes the rows' positions into a group.
    void write(const Writing& to) const;
    // What is to be done anew where the same tensors hold the numbers of the next step; false where it cannot be.
    bool again();

    // Rows of the sequences in tiles, with each kv head; where that is too little for all threads, chunk by chunk.  shared: for each of
    // them and each chunk, equal numbers in one chunk where tables hold the same blocks (-1: nobody else's do), [sequences, chunks];
    // those chunks are read once for all, and every chunk is a result of its own.
    void plan(size_t group, const std::vector<int64_t>& sequences, const int64_t* shared, int64_t chunks, int heads, int kv_heads,
              int dim, int threads);

    // Rows that each see the blocks of a unit; rows of one unit and sequence that follow each other go together.  Returns the
    // plan's number.
    int64_t plan_units(size_t group, const std::vector<int64_t>& sequences, const int64_t* units, int heads, int kv_heads);
};

class Program {
  public:
    Program(int threads, const std::string& isa);
    using Operation = std::function<void(Step&, Share)>;

    // by_rows: whether each thread reads and writes nothing but its own of the step's rows, as `Share::range` parts them one by one.
    int64_t add(Operation operation, bool by_rows = false) {
        operations_.push_back({std::move(operation), by_rows});
        return static_cast<int64_t>(operations_.size()) - 1;
    }
    // Operations [first, stop), each by all threads, none before the one before it has ended; but those by rows that follow each other
    // are one to a thread, whose rows are still in its caches: sum and norm, norms of heads, rope and the writing of keys and values.
    void run(int64_t first, int64_t stop, Step& step);
    // What each entry of a group's tables gets of the attention of rows that count.
    void weigh(const Attend& a, size_t group, const Weigh& to, const Step& step);
    // Attention of a plan's items, by all threads.
    void attend(const Attend& a, size_t group, const Attending& all, Step& step, Share share);

    const Kernels& kernels() const { return *kernels_; }
    Pool& pool() { return pool_; }
    int64_t size() const { return static_cast<int64_t>(operations_.size()); }
    int64_t next = 0;  // item that the next free thread takes

  private:
    const Kernels* kernels_;
    Pool pool_;
    struct Listed {
        Operation run;
        bool by_rows;
    };
    std::vector<Listed> operations_;
};

}  // namespace weft
