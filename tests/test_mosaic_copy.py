"""What L2 is told: copies that jax makes in one way or another get a policy, and others are left as they are."""

import warnings

import jax
import pytest
from jax._src.interpreters import mlir
from jax._src.lib.mlir import ir
from jax._src.lib.mlir.dialects import func, llvm

from jax_vattention.attention import mosaic_copy

TEXT = "@$0 cp.async.bulk.tensor.2d.shared::cta.global.mbarrier::complete_tx::bytes [$1], [$2, {$4,$5}], [$3];"


@pytest.fixture
def never_said():
    mosaic_copy._say_that_nothing_was_given.cache_clear()
    yield
    mosaic_copy._say_that_nothing_was_given.cache_clear()


def given(text):
    """The instructions of a kernel with this one, which `_give` was asked to give a policy."""
    with mlir.make_ir_context(), ir.Location.unknown():
        module = ir.Module.create()
        types = [ir.Type.parse(each) for each in ("i1", "!llvm.ptr<3>", "!llvm.ptr", "!llvm.ptr<3>", "i32", "i32")]
        with ir.InsertionPoint(module.body):
            kernel = func.FuncOp("kernel", (types, []))
            block = kernel.add_entry_block()
        with ir.InsertionPoint(block):
            arguments = list(block.arguments)
            llvm.inline_asm(ir.Type.parse("!llvm.void"), arguments, text, "b,r,l,r,r,r", has_side_effects=True)
            func.ReturnOp([])
        mosaic_copy._give(mosaic_copy._last(block, *mosaic_copy._GIVE), mosaic_copy.READ_ONCE)
        module.operation.verify()
        return [
            (ir.StringAttr(op.attributes["asm_string"]).value, ir.StringAttr(op.attributes["constraints"]).value)
            for op in block.operations
            if op.operation.name == "llvm.inline_asm"
        ]


def test_the_text_of_a_copy_gets_a_policy_as_its_last_operand(never_said):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        [(text, constraints)] = given(TEXT)
    start, end = TEXT.split(" [$1]")
    assert text == f"{start}.L2::cache_hint [$1]{end[:-1]}, $6;"
    assert constraints == "b,r,l,r,r,r,l"


def test_what_is_not_known_is_left_as_it_is_and_said_once(never_said):
    with pytest.warns(UserWarning, match=f"jax {jax.__version__} copies in a way that is not known"):
        assert given("bar.sync 0;") == [("bar.sync 0;", "b,r,l,r,r,r")]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert given("bar.sync 1;") == [("bar.sync 1;", "b,r,l,r,r,r")]


def test_nothing_that_copies_is_said_too(never_said):
    with pytest.warns(UserWarning, match="L2 is not told"):
        mosaic_copy._give(None, mosaic_copy.READ_AGAIN)
