"""Exported folders read by transformers alone give the log-probabilities that `keye score` gives for what they were exported from."""

import json

import numpy as np
import pytest

from data_tools import convert
from tests.unit.checkpoint.hf_folder import write_hf_folder
from tests.unit.train.forked import keye
from tests.unit.train.saved_run import save_run
from tests.unit.train.test_score import CLIP, PICTURES, SYSTEM, TEXT, TOLERANCE, Composition, lines_of, write_samples


@pytest.mark.parametrize(("variant", "records"), [("keye_vl_1_5", [TEXT, CLIP, PICTURES, SYSTEM]), ("keye_vl_preview", [PICTURES, TEXT])])
def test_an_exported_run_is_the_same_model_in_transformers(variant, records, tmp_path):
    """No template folder: the checkpoint, its tokenizer's folder and what is released are all that the export has."""
    tokenizer = write_hf_folder(tmp_path / "tokenizer", variant)
    for name in ("config.json", "preprocessor_config.json"):
        (tokenizer / name).unlink()
    run, exported = tmp_path / "run", tmp_path / "hf"
    save_run(run, tokenizer, variant)
    assert convert.main(["megatron-to-hf", "--input", str(run), "--output", str(exported), "--max-shard-size", "1MB"]) == 0
    samples = write_samples(tmp_path / "data", *records)
    composition, lines = Composition(exported, variant), scores(run, samples)
    assert [line["id"] for line in lines] == [record["id"] for record in records]
    for record, line in zip(records, lines, strict=True):
        num_tokens, expected = composition.score(record, samples.parent)
        assert line["num_tokens"] == num_tokens
        difference = np.abs(np.array(line["logprobs"]) - expected).max()
        print(f"export {variant} {record['id']} max_abs={difference:.1e}")
        assert difference < TOLERANCE
    assert np.std([logprob for line in lines for logprob in line["logprobs"]]) > 0.1, "weights that tell tokens apart"


def test_a_converted_checkpoint_scores_as_the_folder_it_came_from(tmp_path):
    folder, checkpoint = write_hf_folder(tmp_path / "hf", "keye_vl_1_5"), tmp_path / "checkpoint"
    config = json.loads((folder / "preprocessor_config.json").read_text()) | {"max_pixels": 8 * 784}
    (folder / "preprocessor_config.json").write_text(json.dumps(config))
    assert convert.main(["hf-to-megatron", "--input", str(folder), "--output", str(checkpoint)]) == 0
    samples = write_samples(tmp_path / "data", PICTURES, CLIP, SYSTEM)
    assert scores(checkpoint, samples) == scores(folder, samples)


def scores(model, samples):
    output = samples.with_name(f"{model.name}.scores.jsonl")
    code, text = keye("score", "--model", model, "--input", samples, "--output", output)
    assert code == 0, text
    return lines_of(output)
