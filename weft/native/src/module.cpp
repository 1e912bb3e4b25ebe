// The Python module: programs are built from addresses that the caller keeps alive (see weft/ops/cpu).
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "experts.h"
#include "program.h"

namespace nb = nanobind;
using namespace weft;

namespace {

template <class T>
T* at(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

Inputs inputs_of(int inputs) {
    if (inputs < 0 || inputs > 2) throw std::invalid_argument("no such inputs");
    return static_cast<Inputs>(inputs);
}

int64_t linear(Program& p, const Weight& weight, uintptr_t x, int64_t x_stride, uintptr_t bias, uintptr_t out, int64_t out_stride,
               bool picked, int inputs) {
    const Linear a{at<float>(x), weight, at<float>(bias), at<float>(out), x_stride, out_stride, inputs_of(inputs), {}, true};
    return p.add([&kernels = p.kernels(), a, picked](Step& s, Share share) {
        kernels.linear(a, picked ? s.wanted : s.rows, share);
    });
}

// A weight in panels at an address; group as in `Weight`.
Weight weight_of(uintptr_t panels, int64_t n, int64_t k, int format, int64_t group, bool offsets, bool nested) {
    if (format < 0 || format > 3 || n < 1 || k < 1 || k > MOST_INPUTS) throw std::invalid_argument("no such weight");
    const Weight w{at<void>(panels), n, k, static_cast<Format>(format), group, offsets, nested};
    const bool whole = w.format == Format::I8 || w.format == Format::I4;
    if (k % values_of_line(w.format) || whole != (group > 0)) throw std::invalid_argument("inputs do not fill lines");
    if (whole && (k % group || group % 8 || (w.grouped() && MOST_GROUP % group))) throw std::invalid_argument("groups of inputs do not fill rows");
    if (nested && (w.format != Format::I4 || !w.grouped() || offsets || group % 16))
        throw std::invalid_argument("inputs whose scales do not nest");
    return w;
}

int64_t norm(Program& p, uintptr_t x, int64_t x_stride, uintptr_t weight, uintptr_t out, int64_t out_stride, int heads,
             int width, float eps, bool picked) {
    const Norm a{at<float>(x), at<float>(weight), at<float>(out), x_stride, out_stride, heads, width, eps};
    return p.add([&kernels = p.kernels(), a, picked](Step& s, Share share) {
        kernels.norm(a, picked ? s.wanted : s.rows, share);
    }, !picked);
}

int64_t rope(Program& p, uintptr_t x, int64_t stride, int heads, int dim, int pairs, size_t angles) {
    const Rope a{at<float>(x), stride, heads, dim, pairs};
    return p.add([&kernels = p.kernels(), a, angles](Step& s, Share share) {
        kernels.rope(a, s.angles[angles].cos, s.angles[angles].sin, s.rows, share);
    }, true);
}

int64_t gated(Program& p, uintptr_t x, int64_t x_stride, uintptr_t out, int64_t out_stride, int64_t inner, int activation) {
    const Gated a{at<float>(x), at<float>(out), inner, x_stride, out_stride, static_cast<Activation>(activation)};
    return p.add([&kernels = p.kernels(), a](Step& s, Share share) { kernels.gated(a, s.rows, share); });
}

// A product whose outputs are gates and then what they open; between: memory for them, where tiles cannot keep them.
Linear gates_of(const Weight& weight, uintptr_t x, int64_t x_stride, uintptr_t bias, uintptr_t between, int64_t between_stride,
                uintptr_t out, int64_t out_stride, int activation, int inputs) {
    if (weight.n % 2) throw std::invalid_argument("as many gates as what they open");
    const Gated gate{at<float>(between), at<float>(out), weight.n / 2, between_stride, out_stride, static_cast<Activation>(activation)};
    return {at<float>(x), weight, at<float>(bias), at<float>(between), x_stride, between_stride, inputs_of(inputs), gate, true};
}

int64_t gated_linear(Program& p, const Weight& weight, uintptr_t x, int64_t x_stride, uintptr_t bias, uintptr_t between,
                     int64_t between_stride, uintptr_t out, int64_t out_stride, int activation, int inputs) {
    const Linear a = gates_of(weight, x, x_stride, bias, between, between_stride, out, out_stride, activation, inputs);
    return p.add([&kernels = p.kernels(), a](Step& s, Share share) { kernels.linear(a, s.rows, share); });
}

// The same, and the product that reads `gated`, which may hold anything afterwards.
int64_t mlp(Program& p, const Weight& weight, uintptr_t x, int64_t x_stride, uintptr_t bias, uintptr_t between, int64_t between_stride,
            uintptr_t gated, int64_t gated_stride, int activation, const Weight& next, uintptr_t next_bias, uintptr_t out,
            int64_t out_stride, int inputs) {
    if (weight.n != 2 * next.k) throw std::invalid_argument("what gates open is what the next product reads");
    const Linear up = gates_of(weight, x, x_stride, bias, between, between_stride, gated, gated_stride, activation, inputs);
    const Linear down{at<float>(gated), next, at<float>(next_bias), at<float>(out), gated_stride, out_stride, inputs_of(inputs), {}, true};
    return p.add([&kernels = p.kernels(), up, down](Step& s, Share share) { kernels.mlp(up, down, s.rows, share); });
}

int64_t add(Program& p, uintptr_t into, uintptr_t x, int64_t stride, int64_t width) {
    return p.add([&kernels = p.kernels(), to = at<float>(into), from = at<float>(x), stride, width](Step& s, Share share) {
        kernels.add(to, from, stride, width, s.rows, share);
    }, true);
}

int64_t softcap(Program& p, uintptr_t x, int64_t width, float cap) {
    return p.add([&kernels = p.kernels(), to = at<float>(x), width, cap](Step& s, Share share) {
        kernels.softcap(to, s.wanted * width, cap, share);
    });
}

int64_t embed(Program& p, const Weight& table, float scale, uintptr_t out, int64_t stride) {
    return p.add([&kernels = p.kernels(), table, scale, to = at<float>(out), stride](Step& s, Share share) {
        kernels.embed(table, s.tokens, scale, to, stride, s.rows, share);
    }, true);
}

int64_t pick(Program& p, uintptr_t x, int64_t stride, uintptr_t out, int64_t width) {
    return p.add([from = at<float>(x), stride, to = at<float>(out), width](Step& s, Share share) {
        int64_t first, stop;
        share.range(s.wanted, 1, first, stop);
        for (int64_t i = first; i < stop; i++)
            std::copy_n(from + s.picked[i] * stride, width, to + i * width);
    });
}

// A mixture's experts, once rows know theirs; between [pairs, 2 I] and gated [pairs, I]: memory for what the gates give.
int64_t experts(Program& p, const Experts& a, const std::vector<Weight>& ups, const std::vector<Weight>& downs, uintptr_t between,
                uintptr_t gated, int activation, int inputs) {
    if (ups.size() != static_cast<size_t>(a.num) || downs.size() != ups.size()) throw std::invalid_argument("weights of each expert");
    std::vector<Expert> all;
    for (size_t e = 0; e < ups.size(); e++) {
        if (ups[e].n != 2 * downs[e].k) throw std::invalid_argument("what gates open is what the next product reads");
        Linear up = gates_of(ups[e], 0, a.x_stride, 0, between, ups[e].n, gated, downs[e].k, activation, inputs);
        up.x = a.x, up.taken = false;
        all.push_back({up, Linear{at<float>(gated), downs[e], nullptr, a.results, downs[e].k, a.width, inputs_of(inputs)}});
    }
    p.pool().part();
    return p.add([&p, a, all](Step& s, Share share) {
        if (share.index == 0) arrange(a, s, share.count);
        p.pool().meet();
        compute(all, p.kernels(), p.pool(), s, share);
    });
}

Attend attend_of(uintptr_t q, int64_t q_stride, uintptr_t out, int64_t out_stride, int heads, int kv_heads, int dim,
                 float scale, float softcap, int layer) {
    if (dim > MAX_DIM || heads % kv_heads || heads / kv_heads > QUERY_ROWS)
        throw std::invalid_argument("heads of at most 256 values, and at most 32 of them for each kv head");
    return Attend{at<float>(q), at<float>(out), q_stride, out_stride, heads, kv_heads, dim, scale, softcap, layer};
}

}  // namespace

NB_MODULE(_native, m) {
    m.doc() = "Kernels for CPUs.  Addresses are of memory that the caller keeps; see weft/ops/cpu.";
    nb::class_<Weight>(m, "Weight")
        .def("__init__", [](Weight* self, uintptr_t panels, int64_t n, int64_t k, int format, int64_t group, bool offsets,
                            bool nested) {
            new (self) Weight(weight_of(panels, n, k, format, group, offsets, nested));
        }, nb::arg("panels"), nb::arg("n"), nb::arg("k"), nb::arg("format"), nb::arg("group") = 0, nb::arg("offsets") = false,
           nb::arg("nested") = false)
        .def_prop_ro("panel_bytes", &Weight::panel_bytes);
    nb::class_<Experts>(m, "Experts")
        .def("__init__", [](Experts* self, uintptr_t router, int64_t router_stride, uintptr_t shares, uintptr_t ids, uintptr_t x,
                            int64_t x_stride, uintptr_t out, int64_t out_stride, uintptr_t results, int64_t width,
                            int num, int top_k, bool normalize) {
            if (num < 1 || top_k < 1 || top_k > num) throw std::invalid_argument("no such mixture");
            new (self) Experts{at<float>(router), at<float>(shares), at<int64_t>(ids), at<float>(x), at<float>(out),
                               at<float>(results), router_stride, x_stride, out_stride, width, num, top_k,
                               normalize};
        });
    nb::class_<Step>(m, "Step")
        .def(nb::init<>())
        .def("rows", [](Step& s, int64_t rows, uintptr_t tokens, int64_t wanted, uintptr_t picked, uintptr_t positions,
                        uintptr_t bounds, uintptr_t tree_bits, uintptr_t tree_rows) {
            s.rows = rows, s.wanted = wanted, s.tokens = at<int64_t>(tokens), s.picked = at<int64_t>(picked);
            s.seen = Seen{at<int64_t>(positions), at<int64_t>(bounds), at<uint64_t>(tree_bits), at<int32_t>(tree_rows)};
        })
        .def("angles", [](Step& s, size_t index, uintptr_t cos, uintptr_t sin) {
            if (s.angles.size() <= index) s.angles.resize(index + 1);
            s.angles[index] = Angles{at<float>(cos), at<float>(sin)};
        })
        .def("turn", [](Step& s, size_t index, uintptr_t cos, uintptr_t sin, int64_t pairs, int64_t kept) {
            if (s.turns.size() <= index) s.turns.resize(index + 1);
            if (s.angles.size() <= index) s.angles.resize(index + 1);
            s.turns[index] = Turns{at<float>(cos), at<float>(sin), pairs, kept, {}};
            return s.turn(index);
        })
        .def("write", [](Step& s, uintptr_t positions, int64_t positions_stride, int64_t block_tokens, uintptr_t slots) {
            s.writing.push_back(Writing{at<int32_t>(positions), positions_stride, block_tokens, at<int64_t>(slots)});
            s.write(s.writing.back());
        })
        .def("again", &Step::again)
        .def("place", [](Step& s, size_t group, uintptr_t arena, int64_t block_bytes, uintptr_t positions,
                         int64_t positions_stride, int block_tokens, uintptr_t tables, int64_t table_width, uintptr_t first,
                         uintptr_t lengths, uintptr_t slots, int64_t window, int stored, uintptr_t bias) {
            if (s.places.size() <= group) s.places.resize(group + 1), s.attending.resize(group + 1);
            if (stored < 0 || stored > static_cast<int>(Format::I8)) throw std::invalid_argument("no such rows");
            s.places[group] = Place{at<char>(arena), at<int32_t>(positions), block_bytes, positions_stride, block_tokens,
                                    static_cast<Format>(stored), at<int64_t>(tables), at<int64_t>(first), at<int64_t>(lengths), at<int64_t>(slots),
                                    table_width, window, at<float>(bias)};
        }, nb::arg("group"), nb::arg("arena"), nb::arg("block_bytes"), nb::arg("positions"), nb::arg("positions_stride"),
           nb::arg("block_tokens"), nb::arg("tables"), nb::arg("table_width"), nb::arg("first"), nb::arg("lengths"), nb::arg("slots"),
           nb::arg("window"), nb::arg("stored"), nb::arg("bias") = 0)
        .def("plan", [](Step& s, size_t group, const std::vector<int64_t>& sequences, uintptr_t shared, int64_t chunks, int heads,
                        int kv_heads, int dim, int threads) {
            s.plan(group, sequences, at<int64_t>(shared), chunks, heads, kv_heads, dim, threads);
            if (shared) s.parted = true;
            else s.planned.push_back(Planned{group, sequences, heads, kv_heads, dim, threads});
        })
        .def("plan_units", [](Step& s, size_t group, const std::vector<int64_t>& sequences, uintptr_t units, int heads, int kv_heads) {
            s.parted = true;
            return s.plan_units(group, sequences, at<int64_t>(units), heads, kv_heads);
        });
    nb::class_<Program>(m, "Program")
        .def(nb::init<int, const std::string&>(), nb::arg("threads"), nb::arg("isa") = "auto")
        .def_prop_ro("isa", [](Program& p) { return p.kernels().name; })
        .def_prop_ro("threads", [](Program& p) { return p.pool().count(); })
        .def("__len__", &Program::size)
        .def("run", &Program::run, nb::call_guard<nb::gil_scoped_release>())
        .def("linear", &linear)
        .def("norm", &norm)
        .def("rope", &rope)
        .def("gated", &gated)
        .def("gated_linear", &gated_linear)
        .def("mlp", &mlp)
        .def("add", &add)
        .def("softcap", &softcap)
        .def("embed", &embed)
        .def("pick", &pick)
        .def("store", [](Program& p, size_t group, uintptr_t k, uintptr_t v, int64_t stride, int kv_heads, int dim,
                         int layer) {
            const Attend a = attend_of(0, 0, 0, 0, kv_heads, kv_heads, dim, 1, 0, layer);
            return p.add([&kernels = p.kernels(), a, group, keys = at<float>(k), values = at<float>(v), stride](Step& s, Share share) {
                kernels.store(a, s.places[group], keys, values, stride, s.rows, share);
            }, true);
        })
        .def("attend", [](Program& p, size_t group, uintptr_t q, int64_t q_stride, uintptr_t out, int64_t out_stride, int heads,
                          int kv_heads, int dim, float scale, float softcap, int layer, uintptr_t lse) {
            Attend a = attend_of(q, q_stride, out, out_stride, heads, kv_heads, dim, scale, softcap, layer);
            a.lse = at<float>(lse);
            return p.add([&p, a, group](Step& s, Share share) { p.attend(a, group, s.attending[group], s, share); });
        }, nb::arg("group"), nb::arg("q"), nb::arg("q_stride"), nb::arg("out"), nb::arg("out_stride"), nb::arg("heads"),
           nb::arg("kv_heads"), nb::arg("dim"), nb::arg("scale"), nb::arg("softcap"), nb::arg("layer"), nb::arg("lse") = 0)
        .def("attend_sparse", [](Program& p, Step& s, size_t plan, size_t group, uintptr_t visible, int64_t blocks, int64_t block,
                                 uintptr_t q, int64_t q_stride, uintptr_t out, int64_t out_stride, int heads, int kv_heads, int dim,
                                 float scale, float softcap, int layer) {
            const Attend a = attend_of(q, q_stride, out, out_stride, heads, kv_heads, dim, scale, softcap, layer);
            const Attending& all = s.sparse.at(plan);
            s.seen.visible = at<uint8_t>(visible), s.seen.blocks = blocks, s.seen.block = block;
            p.pool().run([&](Share share) { p.attend(a, group, all, s, share); });
        }, nb::call_guard<nb::gil_scoped_release>())
        .def("weigh", [](Program& p, const Step& s, size_t group, uintptr_t sums, uintptr_t out, int64_t entries, uintptr_t q,
                         int64_t q_stride, int heads, int kv_heads, int dim, float scale, float softcap, int layer) {
            const Attend a = attend_of(q, q_stride, 0, 0, heads, kv_heads, dim, scale, softcap, layer);
            p.weigh(a, group, Weigh{at<int64_t>(sums), at<int64_t>(out), entries}, s);
        }, nb::call_guard<nb::gil_scoped_release>())
        .def("route", [](Program& p, const Experts& a) {
            return p.add([a](Step& s, Share share) { route(a, s.rows, share); });
        })
        .def("experts", &experts)
        .def("combine", [](Program& p, const Experts& a) {
            return p.add([&kernels = p.kernels(), a](Step& s, Share share) { combine(a, kernels, s, share); }, true);
        })
        .def("draw", [](Program& p, const std::vector<uintptr_t>& logits, int64_t vocab, const std::vector<double>& temperature,
                        const std::vector<int64_t>& top_k, const std::vector<double>& top_p, const std::vector<double>& min_p,
                        const std::vector<uint64_t>& keys) {
            const size_t count = logits.size();
            if (vocab < 1 || vocab > INT32_MAX || temperature.size() != count || top_k.size() != count || top_p.size() != count ||
                min_p.size() != count || keys.size() != count)
                throw std::invalid_argument("one of each for each row");
            std::vector<Draw> rows;
            for (size_t i = 0; i < count; i++)
                rows.push_back(Draw{at<float>(logits[i]), vocab, temperature[i], top_p[i], min_p[i], top_k[i], keys[i]});
            std::vector<int64_t> ids(count);
            p.pool().run([&](Share share) { p.kernels().draw(rows.data(), static_cast<int64_t>(count), ids.data(), share); });
            return ids;
        }, nb::call_guard<nb::gil_scoped_release>())
        .def("arithmetic", [](Program& p, int64_t turns, int kind) {
            std::atomic<int64_t> done{0};  // libraries add floats atomically since lately
            p.pool().run([&](Share) { done += static_cast<int64_t>(p.kernels().arithmetic(turns, kind)); });
            return static_cast<double>(done.load());
        }, nb::call_guard<nb::gil_scoped_release>())
        .def("read", [](Program& p, uintptr_t from, int64_t bytes) {
            std::atomic<uint32_t> found{0};
            p.pool().run([&](Share share) { found ^= p.kernels().read(at<char>(from), bytes, share); });
            return found.load();
        }, nb::call_guard<nb::gil_scoped_release>())
        .def("pack", [](Program& p, const Weight& w, uintptr_t source, int kind, int64_t n, int64_t first) {
            p.pool().run([&](Share share) { p.kernels().pack(w, at<void>(source), kind, n, first, share); });
        }, nb::call_guard<nb::gil_scoped_release>())
        .def("pack_values", [](Program& p, const Weight& w, uintptr_t values, uintptr_t scales, uintptr_t offsets, int64_t groups,
                               int shift, int64_t n, int64_t first) {
            const Values v{at<uint8_t>(values), at<float>(scales), at<float>(offsets), groups, shift};
            if (groups < 1 || w.groups() % groups || w.offsets != (offsets != 0)) throw std::invalid_argument("other groups");
            p.pool().run([&](Share share) { p.kernels().pack_values(w, v, n, first, share); });
        }, nb::call_guard<nb::gil_scoped_release>())
        .def("spans", [](Program& p, uintptr_t source, int kind, int64_t n, int64_t k, int64_t group, uintptr_t low, uintptr_t high) {
            if (group < 1 || k % group || kind < 0 || kind > 1) throw std::invalid_argument("no such groups");
            const Source from{at<void>(source), kind};
            p.pool().run([&](Share share) { p.kernels().spans(from, n, k, group, at<float>(low), at<float>(high), share); });
        }, nb::call_guard<nb::gil_scoped_release>())
        .def("pack_rounded", [](Program& p, const Weight& w, uintptr_t source, int kind, uintptr_t scales, uintptr_t offsets, int64_t n,
                                int64_t first) {
            if (w.offsets != (offsets != 0) || kind < 0 || kind > 1 || w.k > SCRATCH) throw std::invalid_argument("no such rows");
            const Source from{at<void>(source), kind};
            p.pool().run([&](Share share) { p.kernels().pack_rounded(w, from, at<float>(scales), at<float>(offsets), n, first, share); });
        }, nb::call_guard<nb::gil_scoped_release>());
    m.attr("CHUNK") = CHUNK;
    m.def("isas", [] {
        std::vector<std::string> found;
        for (const Kernels* table : tables()) found.emplace_back(table->name);
        return found;
    });
}
