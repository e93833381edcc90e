"""The file of measured times: what comes back, and what is refused."""

import json

import pytest

from megatron_keye.errors import SettingsError
from megatron_keye.plan.timing import PARTS
from megatron_keye.train.calibration import (
    Calibration,
    Machine,
    PartCoefficients,
    Parts,
    PartTimes,
    load_calibration,
    open_calibration,
    require_same_device,
    save_calibration,
    timed_settings,
)


def calibration(config, decoder_token_ps=900, item_ps=40) -> Calibration:
    def part(token_ps):
        coefficients = PartCoefficients(token_ps=token_ps, pair_ps=3, item_ps=item_ps, sequence_ps=5000)
        return PartTimes(coefficients=coefficients, error_p95=0.05, error_max=0.09, measurements=((8, 36, 1, 1, 0.25),))

    tokens = {"vision_forward": 100, "vision_backward": 200, "decoder": decoder_token_ps, "decoder_forward": 300}
    return Calibration(
        version="0.1.0", date="2026-11-20T12:00:00+00:00", machine=Machine(host="h", device="cpu", processes=1),
        settings=timed_settings(config), parts=Parts(**{name: part(tokens[name]) for name in PARTS}),
    )  # fmt: skip


@pytest.fixture
def written(tiny, tmp_path):
    """Path of a file written for the tiny model."""
    path = tmp_path / "costs" / "tiny.json"
    save_calibration(calibration(tiny.config()), path)
    return path


def changed(path, change) -> str:
    """The message about a file in which `change` was applied to the content."""
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(SettingsError) as caught:
        load_calibration(path)
    return str(caught.value)


def test_a_file_comes_back_as_it_was(tiny, written):
    loaded = open_calibration(tiny.config(f"data.cost_file={written}"))
    assert loaded == calibration(tiny.config())
    assert loaded.time_model.decoder.token_ps == 900
    assert loaded.time_model.vision_backward.sequence_ps == 5000
    assert open_calibration(tiny.config()) is None


def test_the_digest_is_of_the_content(tiny):
    config = tiny.config()
    assert calibration(config).digest == calibration(config).digest
    assert calibration(config).digest != calibration(config, decoder_token_ps=901).digest


def test_unknown_names_get_the_nearest_one(written):
    assert "unknown name machine.devise: did you mean device?" in changed(written, lambda c: c["machine"].update(devise="cpu"))


def test_every_problem_is_named(written):
    def change(content):
        del content["date"]
        content["parts"]["decoder_forward"]["coefficients"]["tokens_ps"] = 1
        content["parts"]["vision_forward"]["coefficients"]["token_ps"] = -1

    message = changed(written, change)
    assert "date is missing" in message
    assert "unknown name parts.decoder_forward.coefficients.tokens_ps: did you mean token_ps?" in message
    assert "parts.vision_forward.coefficients.token_ps is -1: input should be greater than or equal to 0" in message


@pytest.mark.parametrize("value", [300.5, "300", None, True])
def test_coefficients_are_whole_numbers(written, value):
    assert "decoder_forward.coefficients.token_ps is" in changed(
        written, lambda c: c["parts"]["decoder_forward"]["coefficients"].update(token_ps=value)
    )


def test_a_changed_number_is_noticed(written):
    message = changed(written, lambda c: c["parts"]["decoder_forward"]["coefficients"].update(token_ps=301))
    assert "does not have the digest it was written with" in message


def test_another_format_is_refused(written):
    assert "format is 2" in changed(written, lambda c: c.update(format=2))


@pytest.mark.parametrize("text", ["", "{", "[1]", '"x"', "\x00\xff"])
def test_what_is_no_such_file_is_refused(tmp_path, text):
    path = tmp_path / "costs.json"
    path.write_text(text)
    with pytest.raises(SettingsError, match=r"is not JSON|expected an object"):
        load_calibration(path)


def test_a_missing_file_says_how_to_make_it(tiny, tmp_path):
    with pytest.raises(SettingsError, match=r"cannot read .*none\.json: No such file .* make it with `keye calibrate`"):
        open_calibration(tiny.config(f"data.cost_file={tmp_path / 'none.json'}"))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("parallel.tp=2", r"parallel\.tp is 2 here, 1 in the file"),
        ("model.decoder.recompute=full", r"model\.decoder\.recompute is 'full' here, 'none' in the file"),
        ("model.freeze=[vision]", r"model\.freeze is \['vision'\] here, \[\] in the file"),
        ("train.precision=bf16", r"train\.precision is 'bf16' here, 'fp32' in the file"),
        ("encode.activations=recompute", r"encode\.activations is 'recompute' here"),
    ],
)
def test_another_model_or_layout_is_refused_by_name(tiny, written, override, message):
    with pytest.raises(SettingsError, match=message):
        open_calibration(tiny.config(f"data.cost_file={written}", override))


@pytest.mark.parametrize("override", ["train.steps=9", "data.global_batch_samples=8", "optimizer.lr=1e-5", "model.init_std=0.5"])
def test_settings_that_cost_no_time_may_change(tiny, written, override):
    assert open_calibration(tiny.config(f"data.cost_file={written}", override)) is not None


def test_a_folder_that_cannot_be_written_is_a_settings_error(tiny, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SettingsError, match="name another file with --output"):
        save_calibration(calibration(tiny.config()), tmp_path / "file" / "costs.json")


@pytest.mark.parametrize(("device", "fits"), [("cpu", True), ("cuda", False)])
def test_times_of_a_cpu_are_not_for_gpus(tiny, device, fits):
    require_same_device(None, device)
    if fits:
        require_same_device(calibration(tiny.config()), device)
        return
    with pytest.raises(SettingsError, match="measured on cpu, and this run is on cuda"):
        require_same_device(calibration(tiny.config()), device)
