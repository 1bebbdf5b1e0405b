"""The two protocols: who implements them, and that nobody needs more."""

import inspect

import pytest

from moe_engine import Engine, Layer, LayerBuilder, MoE
from moe_engine.analysis.counted_layer import CountedLayer, NotRecorded


def members(protocol):
    """Names that a protocol declares: attributes, properties and methods."""
    declared = {name for name in vars(protocol) if not name.startswith("_")}
    return declared | set(protocol.__annotations__)


def stand_in():
    engine = Engine(experts=4)
    return CountedLayer(engine.plugins, "moe", engine.moe(4, 4).spec)


@pytest.mark.parametrize("name", sorted(members(Layer)))
def test_a_layer_and_its_stand_in_have_what_hooks_may_read(name):
    """The stand-in refuses what was not recorded by its own exception, never by AttributeError."""
    layer = Engine(experts=4).moe(4, 4)
    assert hasattr(layer, name)
    try:
        getattr(stand_in(), name)
    except NotRecorded:
        assert name in ("router", "experts")
    assert not issubclass(NotRecorded, AttributeError)


@pytest.mark.parametrize(
    ("protocol", "cls", "name"),
    [(Layer, cls, name) for cls in (MoE, CountedLayer) for name in ("parts", "state_of", "step_load")]
    + [(LayerBuilder, Engine, name) for name in ("implementing", "moe")],
)
def test_methods_take_the_arguments_that_the_protocol_declares(protocol, cls, name):
    declared, implemented = (inspect.signature(getattr(owner, name)).parameters for owner in (protocol, cls))
    assert list(declared) == list(implemented)
    assert [parameter.kind for parameter in declared.values()] == [parameter.kind for parameter in implemented.values()]


def test_an_engine_is_a_layer_builder():
    assert all(hasattr(Engine(), name) for name in members(LayerBuilder))
