"""Settings: what is refused when a config is built, and what its fingerprint covers."""

import dataclasses
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rotatekv_fx import RotateKVConfig
from rotatekv_fx.config import MAX_GROUP_SIZE, SUPPORTED_BITS, resolve_group_size
from rotatekv_fx.errors import ConfigError, RotateKVError

# and the least of each
WHOLE_NUMBERS = {"group_size": 1, "head_group": 1, "mean_channels": 0, "window": 0, "slack": 0, "sinks": 0}
CLIPS = ("key_clip", "value_clip")
BITS = ("key_bits", "value_bits")


def test_defaults_are_two_bits():
    config = RotateKVConfig()
    assert (config.key_bits, config.value_bits) == (2, 2)
    assert config.keep_originals
    assert not config.allow_partial


def test_a_config_is_frozen_and_takes_names_only():
    with pytest.raises(dataclasses.FrozenInstanceError):
        RotateKVConfig().key_bits = 4
    with pytest.raises(TypeError):
        RotateKVConfig("paper")
    with pytest.raises(TypeError):
        RotateKVConfig(bits=2)


@pytest.mark.parametrize("name", BITS)
@pytest.mark.parametrize("bits", [0, 1, 5, 16, -2, None, "2", 2.5])
def test_bits(name, bits):
    with pytest.raises(ConfigError, match=rf"{name} is {bits!r}; use one of \(2, 3, 4, 8\)"):
        RotateKVConfig(**{name: bits})


@pytest.mark.parametrize("name", BITS)
@pytest.mark.parametrize("bits", SUPPORTED_BITS)
def test_supported_bits(name, bits):
    assert getattr(RotateKVConfig(**{name: bits}), name) == bits


@pytest.mark.parametrize("name", CLIPS)
@pytest.mark.parametrize("clip", [0, 0.0, -0.5, 1.0001, 2, math.nan, math.inf])
def test_clips(name, clip):
    with pytest.raises(ConfigError, match=rf"{name} is {clip!r}; use a number above 0 and at most 1"):
        RotateKVConfig(**{name: clip})


@pytest.mark.parametrize("name", CLIPS)
@pytest.mark.parametrize("clip", [1, 1.0, 0.8, 1e-9, None])
def test_allowed_clips(name, clip):
    assert getattr(RotateKVConfig(**{name: clip}), name) == clip


@pytest.mark.parametrize("name", WHOLE_NUMBERS)
@pytest.mark.parametrize("off", [-1, -100, 0.5, "4"])
def test_whole_numbers(name, off):
    value = WHOLE_NUMBERS[name] + off if isinstance(off, int) else off
    with pytest.raises(
        ConfigError, match=f"{name} is {value!r}; use a whole number of at least {WHOLE_NUMBERS[name]}"
    ):
        RotateKVConfig(**{name: value})


@pytest.mark.parametrize("name", WHOLE_NUMBERS)
def test_allowed_whole_numbers(name):
    for value in (1, 2, 64, WHOLE_NUMBERS[name]):
        assert getattr(RotateKVConfig(**{name: value}), name) == value


@pytest.mark.parametrize("value", [3, 6, 12])
def test_head_group_is_a_power_of_two(value):
    with pytest.raises(ConfigError, match=f"head_group is {value}; use a power of two"):
        RotateKVConfig(head_group=value)


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"key_clip": "0.8"}, id="clip that is text"),
        pytest.param({"key_bits": 2.0}, id="bits that are a float"),
        pytest.param({"seed": "0"}, id="seed that is text"),
        pytest.param({"sinks": None}, id="no number of sinks"),
        pytest.param({"slack": None}, id="no slack"),
        pytest.param({"sinks": True}, id="a truth value for a number"),
        pytest.param({"layers": 4}, id="layers that are a number"),
        pytest.param({"layers": {0: 4}}, id="a layer's settings that are a number"),
        pytest.param({"layers": {"0": {"key_bits": 4}}}, id="a layer's number that is text"),
        pytest.param({"recipe": 3}, id="a recipe that is a number"),
        pytest.param({"dump_dir": 5}, id="a folder that is a number"),
        pytest.param({"debug": "no"}, id="text for a truth value"),
        pytest.param({"keep_originals": 1}, id="a number for a truth value"),
    ],
)
def test_types(settings):
    with pytest.raises(ConfigError):
        RotateKVConfig(**settings)


def test_errors_are_of_this_package_and_value_errors():
    with pytest.raises(RotateKVError):
        RotateKVConfig(key_bits=7)
    with pytest.raises(ValueError, match="key_bits is 7"):
        RotateKVConfig(key_bits=7)


# Settings of single layers


def test_settings_of_a_layer_come_before_those_of_all():
    config = RotateKVConfig(key_bits=3, value_bits=4, layers={1: {"key_bits": 8, "key_clip": 0.5}})
    one, other = config.for_layer(1), config.for_layer(0)
    assert (one.key_bits, one.value_bits, one.key_clip) == (8, 4, 0.5)
    assert (other.key_bits, other.value_bits, other.key_clip) == (3, 4, None)
    assert one.layers == other.layers == {}


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ({0: {"sinks": 3}}, r"layers\[0\] is {'sinks': 3}"),
        ({0: {"bits": 3}}, r"layers\[0\] is {'bits': 3}"),
        ({-1: {"key_bits": 4}}, "layers has the key -1; use layer numbers from 0"),
        ({"0": {"key_bits": 4}}, "layers has the key '0'; use layer numbers from 0"),
        ({2: {"key_bits": 5}}, r"layers\[2\]: key_bits is 5; use one of"),
        ({2: {"value_clip": 1.5}}, r"layers\[2\]: value_clip is 1.5"),
    ],
)
def test_refused_settings_of_a_layer(layers, message):
    with pytest.raises(ConfigError, match=message):
        RotateKVConfig(layers=layers)


# Fingerprint

NUMERIC = {
    "recipe": "none",
    "key_bits": 4,
    "value_bits": 8,
    "group_size": 32,
    "key_clip": 0.5,
    "value_clip": 0.5,
    "head_group": 2,
    "sinks": 3,
    "window": 5,
    "slack": 7,
    "mean_channels": 5,
    "layers": {1: {"key_bits": 4}},
    "seed": 1,
}
REST = {"allow_partial": True, "keep_originals": False, "dump_dir": "folder", "debug": True}


def test_every_setting_is_on_one_of_the_two_lists():
    assert set(NUMERIC) | set(REST) == {field.name for field in dataclasses.fields(RotateKVConfig)}


@pytest.mark.parametrize("name", NUMERIC)
def test_fingerprint_changes_with_numeric_settings(name):
    assert RotateKVConfig(**{name: NUMERIC[name]}).fingerprint() != RotateKVConfig().fingerprint()


@pytest.mark.parametrize("name", REST)
def test_fingerprint_ignores_the_rest(name):
    assert RotateKVConfig(**{name: REST[name]}).fingerprint() == RotateKVConfig().fingerprint()


def test_fingerprints_tell_settings_apart():
    found = {RotateKVConfig(**{name: value}).fingerprint() for name, value in NUMERIC.items()}
    assert len(found) == len(NUMERIC)
    assert RotateKVConfig(key_bits=4).fingerprint() == RotateKVConfig(key_bits=4).fingerprint()
    assert RotateKVConfig(key_clip=0.5).fingerprint() != RotateKVConfig(value_clip=0.5).fingerprint()


# Groups


@given(channels=st.integers(1, 4096))
def test_default_group_is_the_largest_divisor_up_to_128(channels):
    group = resolve_group_size(None, channels)
    assert channels % group == 0
    assert 1 <= group <= MAX_GROUP_SIZE
    assert not any(channels % larger == 0 for larger in range(group + 1, min(MAX_GROUP_SIZE, channels) + 1))


@pytest.mark.parametrize(
    ("channels", "group"), [(64, 64), (128, 128), (192, 96), (256, 128), (320, 80), (127, 127)]
)
def test_default_groups(channels, group):
    assert resolve_group_size(None, channels) == group


@given(channels=st.integers(1, 1024), requested=st.integers(1, 1024))
def test_an_explicit_group_divides_or_is_refused(channels, requested):
    if channels % requested == 0:
        assert resolve_group_size(requested, channels) == requested
    else:
        with pytest.raises(
            ConfigError, match=f"group_size {requested} does not divide the {channels} channels"
        ):
            resolve_group_size(requested, channels)


def test_the_refusal_lists_what_would_do():
    with pytest.raises(ConfigError, match=r"use one of \[1, 2, 3, 4, 6, 12\], or None"):
        resolve_group_size(5, 12)
