"""Keys left at auto: what the rules of configs/photos.yaml choose, without training; and a run that begins so."""

import re

import pytest

pytest.importorskip("omegaconf")
pytest.importorskip("PIL")

from ijepa_fast.config import AUTO, ConfigError, as_yaml, flatten, load_config, save_config, select
from ijepa_fast.data.sources import open_source
from ijepa_fast.engine.schedules import Schedule
from ijepa_fast.front import main
from ijepa_fast.plan import main as plan
from ijepa_fast.run import auto
from ijepa_fast.run.auto import Facts, filled, said
from ijepa_fast.run.build import Length
from ijepa_fast.run.checkpoint import CheckpointError
from ijepa_fast.run.digests import seal
from ijepa_fast.run.sources import identity
from tests.data_images import write_photos
from tests.launch import ROOT, finish, start

PAGE = (ROOT / "docs" / "photos.md").read_text()


def chosen(facts, *given):
    """{key: value} of AUTO in photos.yaml with `given` overrides."""
    config, _ = filled(load_config("photos", given), facts)
    assert config.auto == []
    return {name: select(config, name) for name in AUTO}


# (images, on a GPU): patch, crop, batch, epochs, warm-up in epochs, learning rate, its start, EMA
SIZES = {
    (300, False): (16, 128, 32, 667, 66.7, 1.25e-4, 2.5e-5, 0.998),
    (300, True): (16, 224, 32, 667, 66.7, 1.25e-4, 2.5e-5, 0.998),
    (300_000, False): (16, 128, 64, 3, 0.3, 1.768e-4, 3.536e-5, 0.998),
    (300_000, True): (16, 224, 512, 300, 30, 5e-4, 1e-4, 0.998),
}


@pytest.mark.parametrize(("images", "gpu"), SIZES)
def test_values_for_300_images_and_for_300_000(images, gpu):
    values = chosen(Facts(images, side=500, gpu=gpu))
    assert tuple(values.values()) == pytest.approx(SIZES[images, gpu], rel=2e-3)


@pytest.mark.parametrize("images", [1, 20, 31, 32, 300, 2_999, 3_200, 50_000, 300_000, 14_000_000])
@pytest.mark.parametrize("gpu", [False, True])
@pytest.mark.parametrize("parts", [1, 3, 8])
def test_whatever_their_number_the_run_can_begin(images, gpu, parts):
    if images < parts:
        with pytest.raises(ConfigError, match=rf"{images} images? cannot be shared by {parts} parts"):
            chosen(Facts(images, 500, gpu, parts))
        return
    values = chosen(Facts(images, 500, gpu, parts))
    assert 1 <= values["batch_size"] <= images
    assert values["batch_size"] % parts == 0
    steps = values["optim.epochs"] * (images // values["batch_size"])
    assert steps >= min(auto.LEAST_STEPS, auto.CPU_IMAGES // values["batch_size"] if not gpu else auto.LEAST_STEPS)
    assert gpu or values["optim.epochs"] == 1 or values["optim.epochs"] * images <= auto.CPU_IMAGES
    assert 0 < values["optim.warmup_epochs"] <= 0.4 * values["optim.epochs"]
    assert 0.9 <= values["optim.ema"] <= 0.998


@pytest.mark.parametrize(
    ("side", "gpu", "crop", "patch"),
    [
        (500, True, 224, 16),
        (200, True, 192, 16),
        (500, False, 128, 16),
        (100, False, 96, 8),
        (64, True, 64, 8),
        (32, False, 32, 4),
        (28, True, 28, 2),
        (9, True, 9, 1),
        (5, True, 5, 1),
    ],
)
def test_crops_are_no_larger_than_the_images_and_have_patches_enough(side, gpu, crop, patch):
    values = chosen(Facts(1000, side, gpu))
    assert (values["data.crop"], values["model.patch"]) == (crop, patch)


def test_what_is_given_is_kept_and_the_others_follow_from_it():
    facts = Facts(3000, 500, gpu=True)
    assert chosen(facts, "optim.lr=3e-4")["optim.start_lr"] == pytest.approx(6e-5)
    assert chosen(facts, "batch_size=128")["optim.lr"] == pytest.approx(2.5e-4)
    assert chosen(facts, "data.crop=96")["model.patch"] == 8
    assert chosen(facts, "data.crop=[64,128]")["model.patch"] == 8
    assert chosen(facts, "model.patch=14")["data.crop"] == 224
    short = chosen(facts, "optim.epochs=2")
    assert (short["optim.epochs"], short["optim.warmup_epochs"]) == (2, 0.8)
    assert short["optim.ema"] == pytest.approx(1 - 5 / 186)


@pytest.mark.parametrize(
    ("given", "values"),  # epochs, warm-up in steps, EMA
    [
        (["optim.steps=500"], (56, 200, 0.99)),
        (["optim.steps=500", "optim.epochs=667"], (667, 200, 0.99)),
        (["optim.steps=500", "optim.epochs=10"], (10, 36, 1 - 5 / 90)),
        (["optim.steps=20000"], (2223, 2000, 0.998)),
        (["optim.steps=3"], (1, 1.2, 0.9)),
    ],
)
def test_the_length_is_that_of_the_steps_that_are_given(given, values):
    config, reasons = filled(load_config("photos", given), Facts(300, 500, gpu=False))
    length = Length.of(config, 300)
    found = config.optim.epochs, config.optim.warmup_epochs * length.steps_per_epoch, config.optim.ema
    assert found == pytest.approx(values)
    assert f" of {length.steps} steps" in reasons["optim.warmup_epochs"]
    assert f" / {length.steps} steps" in reasons["optim.ema"]
    rates = [Schedule(config.optim, length.steps_per_epoch).learning_rate(step) for step in range(length.steps)]
    assert max(rates) == pytest.approx(config.optim.lr, rel=1e-3)


def test_a_run_that_goes_on_to_other_steps_chooses_its_length_anew():
    facts = Facts(300, 500, gpu=False)
    first, _ = filled(load_config("photos", ["optim.steps=9"]), facts)
    before = flatten(first)
    same, reasons = filled(load_config("photos", ["optim.steps=9"]), facts, before)
    assert (same, set(reasons.values())) == (first, {"as the run began"})
    longer, reasons = filled(load_config("photos", ["optim.steps=500"]), facts, before)
    assert (longer.optim.epochs, longer.optim.ema) == (56, 0.99)
    assert reasons["batch_size"] == reasons["optim.lr"] == "as the run began"
    whole, _ = filled(load_config("photos"), facts, before)
    assert whole.optim.epochs == 667


@pytest.mark.parametrize(("images", "parts"), [(5, 8), (1, 2), (300, 512)])
@pytest.mark.parametrize("before", [None, {"batch_size": 1}])
def test_more_parts_than_images_are_refused(images, parts, before):
    words = (
        rf"^{images} images? cannot be shared by {parts} parts \(ranks x engine\.accumulation\); use at most {images}$"
    )
    with pytest.raises(ConfigError, match=words):
        filled(load_config("photos"), Facts(images, parts=parts), before)


@pytest.mark.parametrize(
    ("facts", "batch", "reason"),
    [
        (Facts(5), 5, "5 images: all of them"),
        (Facts(300), 32, "300 images: the least, as a hundredth of them is fewer"),
        (Facts(10_000), 64, "10000 images: the largest power of two in a hundredth of them"),
        (Facts(300_000), 512, "300000 images: the most on a GPU"),
        (
            Facts(300, parts=3),
            30,
            "300 images: 32, the least, as a hundredth of them is fewer, down to a multiple of 3",
        ),
        (Facts(300, parts=100), 100, "300 images: one for each of 100 parts"),
    ],
)
def test_the_batch_has_the_reason_of_its_branch(facts, batch, reason):
    config, reasons = filled(load_config("photos"), facts)
    assert config.batch_size == batch
    assert reasons["batch_size"].startswith(reason)


@pytest.mark.parametrize(
    ("facts", "given", "name", "line"),
    [
        (Facts(300, 7), [], "model.patch", "1: the smallest of 16, 8, 4, 2, 1: 7 pixels have no 8 of any"),
        (
            Facts(300),
            ["data.crop=100"],
            "model.patch",
            "4: the largest of 16, 8, 4, 2, 1 that divides data.crop=100 and has 8 a side: 625 patches; "
            "144 of 8 pixels with data.crop=96",
        ),
        (
            Facts(300),
            ["data.crop=[64,128]"],
            "model.patch",
            "8: the largest of 16, 8, 4, 2, 1 that divides data.crop=[64,128] and has 8 a side: 128 patches",
        ),
        (Facts(300, 7), ["model.patch=16"], "data.crop", "16: one patch of 16, though the images' shorter side is 7"),
        (Facts(300, 100), [], "data.crop", "96: the images' shorter side is 100, down to whole patches of 8"),
        (Facts(300, 500), [], "data.crop", "224: at most 224 on a GPU"),
        (
            Facts(2_000_000, gpu=False),
            [],
            "optim.epochs",
            "1: the least: on a CPU no more than 1000000 images are to be seen, and 2000000 are here",
        ),
        (
            Facts(300_000, gpu=False),
            [],
            "optim.epochs",
            "3: on a CPU no more than 1000000 images are to be seen",
        ),
        (Facts(300), ["optim.steps=500"], "optim.warmup_epochs", "22.22: 40% of 500 steps, the most: 600 are more"),
        (Facts(300), ["optim.epochs=400"], "optim.warmup_epochs", "66.67: 17% of 3600 steps, which are 600, the least"),
        (Facts(300), [], "optim.warmup_epochs", "66.7: 10% of 6003 steps"),
        (
            Facts(300),
            ["optim.final_ema=.99"],
            "optim.ema",
            "0.998: the most: 1 - 5 / 6003 steps are more; it falls to 0.99",
        ),
        (Facts(300), ["optim.epochs=100"], "optim.ema", "0.9944: 1 - 5 / 900 steps; it rises to 1"),
        (Facts(300), ["optim.epochs=1"], "optim.ema", "0.9: the least: 1 - 5 / 9 steps are less; it rises to 1"),
        (Facts(300), ["optim.final_ema=.998"], "optim.ema", "0.998: the most: 1 - 5 / 6003 steps are more; it stays"),
        (
            Facts(300),
            ["optim.epochs=667", "optim.steps=500"],
            "optim.ema",
            "0.99: 1 - 5 / 500 steps; it rises towards 1",
        ),
    ],
)
def test_reasons_are_those_of_the_branch(facts, given, name, line):
    config, reasons = filled(load_config("photos", given), facts)
    assert said(config, {name: reasons[name]}) == f"{name}={line}"


def test_an_average_that_a_method_lacks_has_no_line(capsys):
    given = ["--ranks", "1", "--config", "photos", "--images", "300", "data.source=/nowhere"]
    assert plan([*given, "objective.method=mae"]) == 0
    out = capsys.readouterr().out
    assert "optim.lr=" in out
    assert "optim.ema=" not in out
    assert plan(given) == 0
    assert "optim.ema=" in capsys.readouterr().out


def test_the_line_of_the_average_is_left_to_the_trainer(capsys):
    config, line = auto.begin(load_config("photos", ["data.source=synthetic"]), None, False, 0, 1)
    assert (config.auto, line[:16]) == ([], "optim.ema=0.998:")
    assert "optim.ema" not in capsys.readouterr().err
    assert auto.begin(config, None, False, 0, 1) == (config, "")


def test_a_warm_up_that_descends_is_refused(capsys):
    words = "optim.start_lr=0.001 is more than optim.lr=0.000125"
    with pytest.raises(ConfigError, match=words):
        filled(load_config("photos", ["optim.start_lr=1e-3"]), Facts(300))
    flat = ["optim.warmup_epochs=0", "optim.start_lr=1e-3"]
    assert filled(load_config("photos", flat), Facts(300))[0].optim.start_lr == 1e-3
    assert main(["--config", "quickstart", "optim.start_lr=2e-3"]) == 1
    assert "optim.start_lr=0.002 is more than optim.lr=0.001" in capsys.readouterr().err


def test_each_key_has_its_reason_in_a_line():
    config, reasons = filled(load_config("photos", ["optim.lr=3e-4"]), Facts(300, 100, gpu=False))
    lines = said(config, reasons).splitlines()
    assert [line.partition("=")[0] for line in lines] == [name for name in AUTO if name != "optim.lr"]
    assert lines[0] == "model.patch=8: the largest of 16, 8, 4, 2, 1 with 8 in 100 pixels"
    assert lines[2].startswith("batch_size=32: 300 images: ")
    assert not any("as the run began" in line for line in lines)


def test_a_run_that_goes_on_keeps_its_choices():
    before = {"batch_size": 48, "optim.lr": 1e-3}
    config, reasons = filled(load_config("photos", ["optim.lr=3e-4"]), Facts(300), before)
    assert (config.batch_size, reasons["batch_size"]) == (48, "as the run began")
    assert config.optim.lr == 3e-4  # given


def begun(tmp_path, before, *given):
    """What `begin` chooses for 40 images where the folder holds a run whose checkpoint says `before`."""
    write_photos(tmp_path / "photos", 40, size=60)
    source = open_source(tmp_path / "photos")
    config = load_config("photos", [f"data.source={tmp_path / 'photos'}", f"runs={tmp_path}", *given])
    for step, state in before(identity(source)).items():
        folder = config.folder / "checkpoints" / f"step-{step:08d}"
        folder.mkdir(parents=True)
        whole = {"format": 4, "step": step, "images": 512 * step, "shapes": {}, "files": {}} | state
        (folder / "state.json").write_text(seal(whole))
    return auto.begin(config, source, True, 0, 1)[0]


def on(data, batch, **settings):
    return {"data": data, "config": {"batch_size": batch, **settings}}


def test_a_run_on_other_images_is_said_before_its_choices_are_used(tmp_path):
    with pytest.raises(CheckpointError, match=r"not what the run began with \(300,000 images -> 40\).* another name"):
        begun(tmp_path, lambda data: {3: on({"images": 300_000, "sha256": ""}, 512)})


def test_choices_are_those_of_the_checkpoint_that_the_run_goes_on_from(tmp_path):
    def before(data):
        return {3: on(data, 20), 4: on({"images": 300_000, "sha256": ""}, 512)}

    assert begun(tmp_path / "a", before, "resume=step-3").batch_size == 20
    assert begun(tmp_path / "b", before, "data.changed=accept").batch_size == 512
    assert begun(tmp_path / "c", before, "resume=false").batch_size == 32  # and recover.choose refuses the folder


def test_choices_for_random_images_are_not_those_of_a_folder(tmp_path):
    def before(data):
        return {3: on(None, 512, **{"data.source": "synthetic"})}

    assert begun(tmp_path, before).batch_size == 32


def test_the_median_of_sizes_is_read_and_bad_files_are_left_out(tmp_path):
    write_photos(tmp_path, 30, size=60)
    (tmp_path / "class0" / "broken.jpg").write_bytes(b"no image")
    assert 40 <= auto.shorter_side(open_source(tmp_path)) <= 62


def test_auto_is_printed_and_read_again(tmp_path, capsys):
    assert main(["--config", "photos", "--print-config", "data.source=x", "data.crop=64"]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"^batch_size: auto ", printed, re.MULTILINE)
    (tmp_path / "again.yaml").write_text(printed)
    assert as_yaml(load_config(tmp_path / "again.yaml")) == printed
    config, _ = filled(load_config("photos"), Facts(300))
    save_config(config, tmp_path / "saved.yaml")
    assert load_config(tmp_path / "saved.yaml") == config


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("optim.final_lr=auto", "optim.final_lr: expected a number, got 'auto'"),
        ("auto=[optim.final_lr]", "auto: expected of model.patch, .*, got optim.final_lr"),
    ],
)
def test_other_keys_have_no_rule(given, words):
    with pytest.raises(ConfigError, match=words):
        load_config("photos", [given])


def test_the_plan_is_of_what_would_be_chosen(capsys):
    assert plan(["--config", "photos", "data.source=/nowhere", "--images", "300", "--ranks", "1"]) == 0
    out = capsys.readouterr().out
    assert "300 images per epoch, 6003 steps" in out
    assert "batch_size=32: 300 images" in out


def test_the_page_has_the_values_of_the_rules():
    """The table of docs/photos.md: a row for each key, and columns for the four cases of SIZES."""
    rows = dict(re.findall(r"^\| `([a-z._]+)` \|.*?\|((?: [^|]+\|){4})$", PAGE, re.MULTILINE))
    assert list(rows) == list(AUTO)
    for column, (images, gpu) in enumerate(SIZES):
        config, reasons = filled(load_config("photos"), Facts(images, 500, gpu))
        shown = dict(line.split(":")[0].split("=") for line in said(config, reasons).splitlines())
        assert {name: row.split("|")[column].strip() for name, row in rows.items()} == shown


@pytest.mark.slow
def test_three_hundred_small_images_are_trained_on(tmp_path):
    pytest.importorskip("deepspeed")
    pytest.importorskip("nvidia.dali")
    write_photos(tmp_path / "photos", 300, size=40)
    small = ["model.arch=null", "mask.min_keep=null", f"data.source={tmp_path / 'photos'}"]
    left = [f"{name}=auto" for name in AUTO]
    statuses, errors = finish(start(tmp_path / "runs", *small, *left, "optim.steps=3", config="photos"))
    assert statuses == [0], errors[-3000:]
    for name in AUTO:
        assert re.search(rf"^{re.escape(name)}=\S+: ", errors, re.MULTILINE), name
    config = load_config(tmp_path / "runs" / "photos" / "config.yaml")
    assert (config.auto, config.batch_size, config.data.crop % config.model.patch) == ([], 32, 0)
    statuses, errors = finish(start(tmp_path / "runs", *small, *left, "optim.steps=5", config="photos"))
    assert statuses == [0], errors[-3000:]
    assert "batch_size=32: as the run began" in errors
    assert "continuing" in errors
