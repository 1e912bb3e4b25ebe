// The table of one instruction set: a file that defines WEFT_ISA, WEFT_LANES and WEFT_TABLE and includes this is all it takes.
// WEFT_BELOW: the table of one that this one has all of; what this one does no better is compiled there alone (`below`).
// WEFT_ABSENT: of an instruction set that the compiler does not make, whose code it need not understand.
#ifdef WEFT_ABSENT
#include "kernels.h"

const weft::Kernels* weft::WEFT_TABLE() { return nullptr; }
#else
#include "attend.h"
#include "limit.h"
#include "mlp.h"
#include "round.h"
#include "rows.h"
#include "sample.h"
#include "weigh.h"

namespace weft {

const Kernels* WEFT_TABLE() {
    if (!(WEFT_THERE)) return nullptr;
    namespace isa = WEFT_ISA;
#ifdef WEFT_BELOW
    static const Kernels table = [] {
        Kernels mine = isa::below();
        mine.name = WEFT_NAME, mine.linear = isa::linear, mine.mlp = isa::mlp, mine.attend = isa::attend;
        mine.weigh = isa::weigh, mine.arithmetic = isa::arithmetic;
        return mine;
    }();
#else
    static const Kernels table{
        WEFT_NAME, isa::linear,  isa::mlp,        isa::norm,   isa::rope,  isa::gated, isa::add, isa::softcap,
        isa::blend, isa::embed, isa::store_rows, isa::attend, isa::merge, isa::weigh, isa::pack,
        isa::draw, isa::read, isa::arithmetic, isa::pack_values, isa::spans, isa::pack_rounded,
    };
#endif
    return &table;
}

}  // namespace weft
#endif
