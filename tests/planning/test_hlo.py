"""Traffic of a program from its text: loops, fusions, slices, and the ring's share of each collective."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxalign.planning.hlo import largest_product, parse, size, traffic

TEXT = """\
HloModule tiny, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%fused (p0: f32[6,100], p1: s32[]) -> f32[1,100] {
  %p0 = f32[6,100]{1,0} parameter(0)
  %p1 = s32[] parameter(1)
  ROOT %cut = f32[1,100]{1,0} dynamic-slice(%p0, %p1, %p1), dynamic_slice_sizes={1,100}
}

%body (s: (s32[], f32[6,100])) -> (s32[], f32[6,100]) {
  %s = (s32[], f32[6,100]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %x = f32[6,100]{1,0} get-tuple-element(%s), index=1
  %row = f32[1,100]{1,0} fusion(%x, %i), kind=kLoop, calls=%fused
  %all = f32[4,100]{1,0} all-gather(%row), channel_id=1, replica_groups=[2,4]<=[8], dimensions={0}
  %one = f32[100]{0} all-reduce(%row), channel_id=2, replica_groups={{0,1},{2,3},{4,5},{6,7}}, to_apply=%add
  ROOT %t = (s32[], f32[6,100]{1,0}) tuple(%i, %x)
}

%condition (s: (s32[], f32[6,100])) -> pred[] {
  %s = (s32[], f32[6,100]{1,0}) parameter(0)
  ROOT %yes = pred[] constant(true)
}

ENTRY %main (x: f32[6,100]) -> f32[6,100] {
  %x = f32[6,100]{1,0} parameter(0)
  %fast = f32[6,100]{1,0:T(8,128)S(1)} copy(%x)
  %zero = s32[] constant(0)
  %start = (s32[], f32[6,100]{1,0}) tuple(%zero, %x)
  %known = (s32[], f32[6,100]{1,0}) while(%start), condition=%condition, body=%body, LOOPS
  ROOT %out = f32[6,100]{1,0} get-tuple-element(%known), index=1
}
"""


@pytest.mark.parametrize(("loops", "times"), [('backend_config={"known_trip_count":{"n":"5"}}', 5), ("metadata={}", 7)])
def test_a_loop_counts_as_often_as_it_runs(loops, times):
    found = traffic(TEXT.replace("LOOPS", loops), trips=(7,), devices=8)
    # Per turn: all-gather of 1,600 bytes among 4, all-reduce of 400 bytes between 2.
    assert found.collectives == {"all-gather": (times, times * 1600.0), "all-reduce": (times, times * 400.0)}
    assert found.wire == times * (1600 * 3 / 4 + 2 * 400 * 1 / 2)
    # The fusion reads one row of the six (and the number); the copy's target is not in memory.
    turn = (400 + 4 + 400) + (1600 + 400) + (400 + 400)
    assert found.moved == 2400 + times * turn


def test_as_the_tpu_compiler_writes_it():
    """No trip count, but a counter that is compared; groups by the axes of a mesh, or a part of one."""
    counter = "  %n = s32[]{:T(128)} constant(9)\n  %i = s32[] get-tuple-element(%s), index=0\n"
    end = "  ROOT %yes = pred[]{:T(512)} compare(%i, %n), direction=LT, metadata={}"
    text = TEXT.replace("  ROOT %yes = pred[] constant(true)", counter + end).replace("LOOPS", "metadata={}")
    text = text.replace("[2,4]<=[8]", "mesh['a'=2,'b'=4] {'b'}")
    text = text.replace("{{0,1},{2,3},{4,5},{6,7}}", "mesh['a'=8,'b'=1] {'a':(4)2}")
    found = traffic(text, trips=(7,), devices=8)
    assert found.collectives == {"all-gather": (9, 9 * 1600.0), "all-reduce": (9, 9 * 400.0)}
    assert found.wire == 9 * (1600 * 3 / 4 + 2 * 400 * 1 / 2)


def test_what_crosses_slices():
    """Groups of four over two slices: each pair gathers its half, and a device sends half of that across."""
    found = traffic(TEXT.replace("LOOPS", "metadata={}"), trips=(7,), devices=8, slices=(0, 0, 1, 1, 0, 0, 1, 1))
    assert found.network == 7 * 1600 / 2 / 2
    assert found.wire == 7 * (1600 / 2 + 2 * 400 / 2)
    # The same groups as a mesh and as a list, and groups across the other axis.
    text = TEXT.replace("LOOPS", "metadata={}").replace("[2,4]<=[8]", "mesh['a'=2,'b'=4] {'b'}")
    assert traffic(text, (7,), 8, (0, 0, 1, 1, 0, 0, 1, 1)) == found
    assert traffic(text, (7,), 8, (0, 0, 0, 0, 1, 1, 1, 1)).network == 0
    across = text.replace("{'b'}", "{'a'}")
    assert traffic(across, (7,), 8, (0, 0, 0, 0, 1, 1, 1, 1)).network == 7 * 1600 / 2
    turned = across.replace("mesh['a'=2,'b'=4] {'a'}", "[4,2]<=[2,4]T(1,0)")
    assert traffic(turned, (7,), 8, (0, 0, 0, 0, 1, 1, 1, 1)) == traffic(across, (7,), 8, (0, 0, 0, 0, 1, 1, 1, 1))


def test_sizes():
    assert size("(bf16[2,3]{1,0:T(8,128)(2,1)}, pred[5]{0}, f8e4m3fn[4]{0}, s4[8], f32[])") == 12 + 5 + 4 + 4 + 4
    assert size("(bf16[2,3]{1,0:T(8,128)(2,1)S(1)}, pred[5]{0})", memory=True) == 5


def test_the_largest_matrix_product():
    text = jax.jit(lambda x, y, z: jnp.tanh(x @ y) @ z).lower(
        *(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((7, 300), (300, 200), (200, 40)))
    )
    compiled = text.compile().as_text()
    assert compiled is not None and largest_product(compiled) == 4 * (7 * 300 + 300 * 200)
    assert largest_product(TEXT) == 0
    call = """\
ENTRY %main (x: f32[6,100], y: f32[100,9]) -> f32[6,9] {
  %x = f32[6,100]{1,0} parameter(0)
  %y = f32[100,9]{1,0} parameter(1)
  ROOT %z = f32[6,9]{1,0} custom-call(%x, %y), custom_call_target="__onednn$matmul", metadata={}
}
"""
    assert largest_product(call) == 4 * (600 + 900)
    assert largest_product(call.replace("__onednn$matmul", "__topk")) == 0


def test_collectives_of_a_compiled_scan():
    """Six layers whose weights are split over four devices: each is gathered once per layer, forward alone."""
    mesh = Mesh(jax.devices()[:4], ("fsdp",), axis_types=(AxisType.Auto,))
    whole, split = NamedSharding(mesh, P()), NamedSharding(mesh, P(None, "fsdp"))
    rows = NamedSharding(mesh, P("fsdp"))

    def run(x, weights):
        def layer(x, w):
            return jnp.tanh(x @ jax.lax.with_sharding_constraint(w, whole)), None

        return jax.lax.scan(layer, jax.lax.with_sharding_constraint(x, rows), weights)[0].sum()

    x = jax.ShapeDtypeStruct((8, 32), jnp.float32, sharding=rows)
    weights = jax.ShapeDtypeStruct((6, 32, 32), jnp.float32, sharding=split)
    text = jax.jit(run).lower(x, weights).compile().as_text()
    assert text is not None
    found = traffic(text, devices=4)
    assert found.collectives["all-gather"] == (6, 6 * 32 * 32 * 4.0)
    assert found.collectives["all-reduce"] == (1, 4.0)
    assert found.wire == 6 * 4096 * 3 / 4 + 2 * 4 * 3 / 4
    assert parse(text)[1]


BESIDE = """\
HloModule tiny, is_scheduled=true

%start (p: f32[100]) -> (f32[100], f32[400], u32[]) {
  %p = f32[100]{0} parameter(0)
  %all.0 = f32[400]{0} all-gather(%p), channel_id=7, replica_groups={{0,1,2,3}}, dimensions={0}
  ROOT %call = (f32[100]{0}, f32[400]{0}, u32[]{:S(2)}) custom-call(%all.0), custom_call_target="AsyncCollectiveStart"
}

%beside (q0: f32[100], q1: f32[400], q2: u32[], q3: f32[50]) -> (f32[50], f32[100], f32[400], u32[]) {
  %q0 = f32[100]{0} parameter(0)
  %q1 = f32[400]{0} parameter(1)
  %q2 = u32[]{:S(2)} parameter(2)
  %q3 = f32[50]{0} parameter(3)
  %twice = f32[50]{0} add(%q3, %q3)
  %all.1 = f32[400]{0} all-gather(%q0), channel_id=7, replica_groups={{0,1,2,3}}, dimensions={0}
  ROOT %both = (f32[50]{0}, f32[100]{0}, f32[400]{0}, u32[]{:S(2)}) tuple(%twice, %q0, %q1, %q2)
}

%done (r0: f32[100], r1: f32[400], r2: u32[]) -> f32[400] {
  %r0 = f32[100]{0} parameter(0)
  %r1 = f32[400]{0} parameter(1)
  %r2 = u32[]{:S(2)} parameter(2)
  %all.2 = f32[400]{0} all-gather(%r0), channel_id=7, replica_groups={{0,1,2,3}}, dimensions={0}
  ROOT %call.1 = f32[400]{0} custom-call(%all.2), custom_call_target="AsyncCollectiveDone"
}

ENTRY %main (x: f32[100], y: f32[50]) -> f32[400] {
  %x = f32[100]{0} parameter(0)
  %y = f32[50]{0} parameter(1)
  %s = (f32[100]{0}, f32[400]{0}, u32[]{:S(2)}) fusion(%x), kind=kCustom, output_to_operand_aliasing={{0}: (0, {})}, calls=%start
  %s0 = f32[100]{0} get-tuple-element(%s), index=0
  %s1 = f32[400]{0} get-tuple-element(%s), index=1
  %s2 = u32[]{:S(2)} get-tuple-element(%s), index=2
  %b = (f32[50]{0}, f32[100]{0}, f32[400]{0}, u32[]{:S(2)}) fusion(%s0, %s1, %s2, %y), kind=kOutput, ALIASES, calls=%beside
  %b1 = f32[100]{0} get-tuple-element(%b), index=1
  %b2 = f32[400]{0} get-tuple-element(%b), index=2
  %b3 = u32[]{:S(2)} get-tuple-element(%b), index=3
  ROOT %d = f32[400]{0} fusion(%b1, %b2, %b3), kind=kCustom, output_to_operand_aliasing={{}: (1, {})}, calls=%done
}
"""  # noqa: E501 -- an instruction is one line


def test_a_collective_beside_other_work_counts_once():
    """The TPU's compiler names it in every fusion that it runs beside, and passes its arrays through them in place."""
    aliases = "output_to_operand_aliasing={{1}: (0, {}), {2}: (1, {}), {3}: (2, {})}"
    found = traffic(BESIDE.replace("ALIASES", aliases), devices=4)
    assert found.collectives == {"all-gather": (1, 1600.0)}
    # What is gathered is written once; the fusion beside it reads and writes its 50 numbers; the end reads the shard.
    assert found.moved == 1600 + (200 + 200) + 400


IN_PLACE = """\
HloModule tiny, is_scheduled=true

%last (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  ROOT %b = f32[] parameter(1)
}

%put (p0: f32[60,100], p1: s32[3,1], p2: f32[3,100]) -> f32[60,100] {
  %p0 = f32[60,100]{1,0} parameter(0)
  %p1 = s32[3,1]{1,0} parameter(1)
  %p2 = f32[3,100]{1,0} parameter(2)
  ROOT %in = f32[60,100]{1,0} scatter(%p0, %p1, %p2), update_window_dims={1}, to_apply=%last
}

ENTRY %main (x: f32[60,100], i: s32[3,1], y: f32[3,100]) -> f32[60,100] {
  %x = f32[60,100]{1,0} parameter(0)
  %i = s32[3,1]{1,0} parameter(1)
  %y = f32[3,100]{1,0} parameter(2)
  %new = f32[60,100]{1,0} fusion(%x, %i, %y), kind=kCustom, calls=%put
  %ahead = ((f32[60,100]{1,0}), f32[5,100]{1,0:S(1)}, s32[]{:S(2)}) slice-start(%new), slice={[0:5], [0:100]}
  %here = f32[5,100]{1,0:S(1)} slice-done(%ahead)
  ROOT %out = f32[60,100]{1,0} bitcast(%new)
}
"""


def test_what_is_scattered_and_what_is_sliced_ahead_counts_alone():
    """As for a cache: three rows of sixty are written, from their indices and values; five are read into a core."""
    assert traffic(IN_PLACE).moved == (3 * 400 + 3 * 4 + 3 * 400) + 5 * 400
