"""A call that threads of OpenMP's share: the team that torch computes with.

Between two calls its threads wait by spinning, so that a call begins on all of them within a microsecond or two.
"""

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from gpu_bn.kernels.cpu.calls import END, FINISH, START, SUM, WRITE
from gpu_bn.kernels.cpu.compiler import cold
from gpu_bn.kernels.cpu.scalars import call_kernel, kernel_call
from gpu_bn.kernels.cpu.vector import BYTE, INT32, INT64

POINTER = BYTE.as_pointer()


@intrinsic
def in_team(typing, parallel, number, most, kernel, arguments):
    """Call a kernel on the first ``most`` threads of the caller's team, and wait for them.

    ``parallel`` and ``number`` are the addresses of ``GOMP_parallel`` and ``omp_get_thread_num``.
    """

    def generate(context, builder, sig, args):
        values = [builder.extract_value(args[4], i) for i in range(len(arguments))]
        record = cgutils.alloca_once_value(builder, cgutils.pack_struct(builder, [*args[1:4], *values]))
        member = _member(context, builder.module, record.type, arguments)
        kind = ir.FunctionType(ir.VoidType(), [member.type, POINTER, INT32, INT32])
        start = builder.inttoptr(args[0], kind.as_pointer())
        builder.call(start, [member, builder.bitcast(record, POINTER), INT32(0), INT32(0)])  # a team of the usual size
        return context.get_dummy_value()

    return types.void(parallel, number, most, kernel, arguments), generate


def _member(context, module, record, kinds):
    """The function that each thread of a team is to run, of the address of a ``record``."""
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [POINTER]), module.get_unique_name("member"))
    function.linkage = "internal"
    builder = ir.IRBuilder(function.append_basic_block("entry"))
    known = builder.load(builder.bitcast(function.args[0], record))
    number, most, kernel, *values = cgutils.unpack_tuple(builder, known, 3 + len(kinds))
    own = builder.call(builder.inttoptr(number, ir.FunctionType(INT32, []).as_pointer()), [])
    with builder.if_then(builder.icmp_signed("<", builder.sext(own, INT64), most)):
        kernel_call(context, builder, kernel, values, kinds)
    builder.ret_void()
    return function


@cold
def share(parallel, number, most, kernel, phases, arguments):
    """Run a kernel's phases; all threads run those that they can share."""
    call_kernel(kernel, (START,) + arguments)
    in_team(parallel, number, most, kernel, (SUM,) + arguments)
    if phases & FINISH:
        call_kernel(kernel, (FINISH,) + arguments)
        in_team(parallel, number, most, kernel, (WRITE,) + arguments)
    call_kernel(kernel, (END,) + arguments)
