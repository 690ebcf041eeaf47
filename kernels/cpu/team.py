"""Run a kernel on the OpenMP threads that torch computes with.

These threads spin for a while between two calls, so that a call starts on all of them within one or two microseconds.
"""

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from gpu_bn.kernels.cpu.calls import END, FINISH, START, SUM, WRITE
from gpu_bn.kernels.cpu.compiler import cold
from gpu_bn.kernels.cpu.scalars import call_kernel, emit_kernel_call
from gpu_bn.kernels.cpu.vector import BYTE, INT32, INT64

POINTER = BYTE.as_pointer()


@intrinsic
def call_in_team(typing, gomp_parallel, thread_number, threads, kernel, arguments):
    """Call a kernel on the first ``threads`` threads of the caller's team, and wait until all have returned.

    ``gomp_parallel`` and ``thread_number`` are the addresses of ``GOMP_parallel`` and ``omp_get_thread_num``.
    """

    def generate(context, builder, sig, args):
        values = [builder.extract_value(args[4], i) for i in range(len(arguments))]
        record = cgutils.alloca_once_value(builder, cgutils.pack_struct(builder, [*args[1:4], *values]))
        member = _team_member(context, builder.module, record.type, arguments)
        signature = ir.FunctionType(ir.VoidType(), [member.type, POINTER, INT32, INT32])
        start = builder.inttoptr(args[0], signature.as_pointer())
        builder.call(start, [member, builder.bitcast(record, POINTER), INT32(0), INT32(0)])  # 0: all threads
        return context.get_dummy_value()

    return types.void(gomp_parallel, thread_number, threads, kernel, arguments), generate


def _team_member(context, module, record, argument_types):
    """Return the function that each thread of a team runs: it calls the kernel, if the thread is one of the first.

    It takes a pointer of type ``record`` to the arguments of :func:`call_in_team` from ``thread_number`` on.
    """
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [POINTER]), module.get_unique_name("member"))
    function.linkage = "internal"
    builder = ir.IRBuilder(function.append_basic_block("entry"))
    fields = builder.load(builder.bitcast(function.args[0], record))
    thread_number, threads, kernel, *values = cgutils.unpack_tuple(builder, fields, 3 + len(argument_types))
    this_thread = builder.call(builder.inttoptr(thread_number, ir.FunctionType(INT32, []).as_pointer()), [])
    with builder.if_then(builder.icmp_signed("<", builder.sext(this_thread, INT64), threads)):
        emit_kernel_call(context, builder, kernel, values, argument_types)
    builder.ret_void()
    return function


@cold
def run_phases(gomp_parallel, thread_number, threads, kernel, phases, arguments):
    """Run the phases of a kernel: ``SUM`` and ``WRITE`` on all threads, the others on the caller's thread only."""
    call_kernel(kernel, (START,) + arguments)
    call_in_team(gomp_parallel, thread_number, threads, kernel, (SUM,) + arguments)
    if phases & FINISH:
        call_kernel(kernel, (FINISH,) + arguments)
        call_in_team(gomp_parallel, thread_number, threads, kernel, (WRITE,) + arguments)
    call_kernel(kernel, (END,) + arguments)
