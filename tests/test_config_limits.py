"""Every key is walked: beside its limits, and with what is no value of its kind, it is refused by name."""

import dataclasses

import pytest

pytest.importorskip("omegaconf")

from ijepa_fast import spelling
from ijepa_fast.config import STRATEGIES, Config, ConfigError, keys, load_config
from ijepa_fast.masks import samplers
from ijepa_fast.methods.method import METHODS, method_class
from tests.test_config import QUICKSTART

NUMERIC = {name: f for name, f in keys(Config) if {"int", "float", "list[float]"} & set(f.type.split(" | "))}
# Where more than the least must be refused: shares and momenta.
SHARES = ["optim.betas", "optim.ema", "optim.final_ema", "data.scale", "data.max_bad_share"]
SHARES += ["mask.target_scale", "mask.context_scale", "data.hw_decoder_load"]

ANY_LENGTH = ["optim.drop_epochs"]
# Where more than ever occurs means "never" or "all", or is held to something else when that is known.
ENDLESS = {
    "mask.budget",
    "mask.group",
    "mask.min_keep",
    "optim.drop_epochs",
    "optim.clip",
    "probe.images",
    "probe.every",
}
ENDLESS |= {"data.max_pixels", "data.bands", *(name for name in NUMERIC if name.startswith("log."))}


def refusal(override: str) -> str:
    with pytest.raises(ConfigError) as error:
        load_config(QUICKSTART, [override])
    return str(error.value)


def beyond(f: dataclasses.Field):
    """Values just outside of the limits of a key."""
    limits, whole = f.metadata, "int" in f.type
    if limits["least"] is not None:
        yield 1.1 * limits["least"] if limits["least"] < -1e9 else limits["least"] - (1 if whole else 1e-3)
    if limits["above"] is not None:
        yield limits["above"]
    if limits["most"] is not None:
        yield 1.1 * limits["most"] if limits["most"] > 1e9 else limits["most"] + (1 if whole else 1e-3)
    if limits["choices"] is not None:
        yield max(limits["choices"]) + 1


def length(f: dataclasses.Field) -> int:
    """Of a list: that of its key, or one number for each of three channels."""
    return f.metadata["length"] or 3


@pytest.mark.parametrize("name", NUMERIC)
def test_a_number_has_limits_and_they_hold(name):
    f = NUMERIC[name]
    wrong = list(beyond(f))
    assert wrong, f"{name} has no limits"
    assert name not in SHARES or f.metadata["most"] is not None
    for value in wrong:
        text = f"[{', '.join([str(value)] * length(f))}]" if "list" in f.type else str(value)
        assert refusal(f"{name}={text}").startswith(f"{name}: expected ")


@pytest.mark.parametrize("name", [name for name in NUMERIC if name not in ENDLESS])
def test_a_number_that_makes_no_sense_is_refused(name):
    f = NUMERIC[name]
    huge = "1" + "0" * 20 if "int" in f.type else "3.3e38"
    text = f"[{', '.join([huge] * length(f))}]" if "list" in f.type else huge
    assert refusal(f"{name}={text}").startswith(f"{name}: expected ")


@pytest.mark.parametrize("name", NUMERIC)
def test_a_number_is_a_number(name):
    f = NUMERIC[name]
    lists = "list" in f.type
    wrong = ["fast", "{a: 1}", "true", "${oc.env:HOME}"]
    if lists:
        wrong += ["0.5", "[x, y]", f"[{', '.join(['.nan'] * length(f))}]"]
        if name not in ANY_LENGTH:
            wrong += ["[]", f"[{', '.join(['0.5'] * (length(f) + 1))}]"]
    else:
        wrong += ["[1]", ".nan", ".inf"] + (["1.5"] if "int" in f.type else [])
    if "None" not in f.type:
        wrong.append("null")
    for value in wrong:
        message = refusal(f"{name}={value}")
        assert message.startswith(f"{name}: expected "), value
        assert f"(override {name}={value})" in message
        for word in ("OmegaConf", "ListConfig", "AnyNode", "could not be converted", "interpolation", "Integer"):
            assert word not in message.replace(value, "")


@pytest.mark.parametrize("method", METHODS)
def test_options_of_a_method_have_limits(method):
    options = method_class(method).Options
    for name, f in keys(options):
        if {"int", "float"} & set(f.type.split(" | ")):
            assert list(beyond(f)), name
            assert f.metadata["most"] is not None or name in ("masked", "smallest", "largest", "layers", "square"), name


def test_strategies_are_those_of_the_samplers():
    assert set(STRATEGIES) == set(samplers.STRATEGIES)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("data.crop=fast", "data.crop: expected a whole number of pixels, or [height, width], got 'fast'"),
        ("data.std=[1e-300,1,1]", "data.std: expected at least 1e-35, which float32 can divide by"),
        ("data.crop=1000000", "data.crop: expected sides of at most 16384 pixels, got 1000000"),
        ("data.crop=[64,0]", "data.crop: expected a whole number of pixels"),
        ("data.crop=[64,20]", "data.crop=[64, 20] is not divisible by model.patch=8; set data.crop to [64, 16]"),
        ("data.page=some", "data.page: expected a number"),
        ("data.axes=NCHX", "data.axes: expected letters of NHWC"),
        ("data.depth=uint64", "data.depth: expected one of auto, uint8, uint16, float32"),
        ("data.flip=maybe", "data.flip: expected true or false, got 'maybe'"),
        ("data.source=null", "data.source: expected a word, got null"),
        ("name=", "name: expected a word, got null"),
        ("kernels=fast", "kernels: expected one of auto, triton, reference, or a mapping"),
        ("mask.strategy=multi", "mask.strategy: expected one of multiblock-reference"),
        ("optim.lr=null", "optim.lr: expected a number, got null"),
        ("batch_size=3.5", "batch_size: expected a whole number, got 3.5"),
        ("data.scale=[0.9,0.3]", "data.scale: expected two numbers, first <= second"),
        ("data.mean=[0.5", "override 'data.mean=[0.5': '[0.5' is no value"),
        ("optim.lr.x=3", "optim.lr: expected a number, got {'x': 3} (override optim.lr.x=3)"),
        ("objective.options=3", "objective.options: expected names with values, got 3"),
        ("kernels=[1]", "kernels: expected one of auto, triton, reference"),
        ("runs=/tmp/\udcff", r"override 'runs=/tmp/\udcff': expected UTF-8; give a path whose name is"),
        ("data.source=a\x00b", "override 'data.source=a\\x00b': 'a\\x00b' is no value"),
        ("=5", "override '=5': expected key=value"),
        ("a..b=5", "override 'a..b=5': expected key=value"),
    ],
)
def test_other_values(override, words):
    message = refusal(override)
    assert words in message
    assert str(QUICKSTART) not in message


def test_channels_want_a_mean_of_each():
    words = "data.mean: expected 2 numbers, one for each of data.channels, got 3; python -m ijepa_fast stats"
    assert refusal("data.channels=2").startswith(words)


def test_errors_of_the_file_name_the_file(tmp_path):
    (tmp_path / "a.yaml").write_text("name: a\nbatch_size: many\n")
    with pytest.raises(ConfigError, match=r"batch_size: expected a whole number, got 'many' \(.*a\.yaml\)"):
        load_config(tmp_path / "a.yaml", ["data.source=x"])
    for text, words in (("name: [a\n", "line 2"), ("- a\n", "expected keys with values"), ("", "data.source")):
        (tmp_path / "a.yaml").write_text(text)
        with pytest.raises(ConfigError, match=words):
            load_config(tmp_path / "a.yaml", ["name=x"] if not text else [])


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("lr=1", "optim.lr"),
        ("epochs=1", "optim.epochs"),
        ("img_size=64", "data.crop"),
        ("patch_size=8", "model.patch"),
        ("warmup=1", "optim.warmup_epochs"),
        ("warmup_epoch=1", "optim.warmup_epochs"),
        ("optim.warmup=1", "optim.warmup_epochs"),
        ("weight_decay=1", "optim.weight_decay"),
        ("batchsize=1", "batch_size"),
        ("optim.learning_rate=1", "optim.lr"),
        ("model.crop=1", "data.crop"),
        ("optim.epoch=1", "optim.epochs"),
        ("momentum=0.9", "optim.ema"),
        ("source=x", "data.source"),
        ("data=/x", "data.source=/x"),
        ("model=vit_small", "model.arch=vit_small"),
    ],
)
def test_the_key_that_was_meant(wrong, right):
    assert f"did you mean {right}?" in refusal(wrong)


def test_a_key_like_no_other_lists_those_there_are():
    assert "the keys are name, runs, seed, batch_size" in refusal("xyzzy=1")
    assert "the keys are epochs, steps" in refusal("optim.xyzzy=1")


def test_every_alias_is_of_a_key():
    known = {name for name, _ in keys(Config)}
    assert set(spelling.ALIASES.values()) | set(spelling.SECTIONS.values()) <= known
    assert not set(spelling.ALIASES) & known


@pytest.mark.parametrize("strategy", ["random", "block", "multiblock"])
def test_a_range_of_target_scales_is_a_range_for_every_strategy(strategy):
    sampler = samplers.make_sampler(strategy, (12, 12), target_scale=[0.2, 0.4])
    shares = [sampler(2, seed=0, step=step).target.shape[2] / 144 for step in range(32)]
    assert 0.15 < min(shares) < 0.28
    assert 0.32 < max(shares) < 0.45


@pytest.mark.parametrize("scale", [[0.75, 0.5], [0.0, 0.5], [0.001, 0.5], [0.5, 1.0]])
def test_shares_that_leave_no_target_or_no_context_are_named(scale):
    with pytest.raises(ValueError, match=r"mask\.target_scale: expected"):
        samplers.make_sampler("random", (8, 8), target_scale=scale)
