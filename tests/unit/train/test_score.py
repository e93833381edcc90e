"""`keye score` against the same model put together from transformers' modules, and what it refuses."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from transformers import PaddleOCRVLConfig, PreTrainedTokenizerFast
from transformers.models.paddleocr_vl.modeling_paddleocr_vl import PaddleOCRProjector
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLRotaryEmbedding, Qwen2_5_VLTextConfig
from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLVisionConfig
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionPatchMerger

from megatron_keye.config.schema import ImageConfig, VideoConfig
from megatron_keye.contract.media import SampleShape
from megatron_keye.data.describe import describe
from megatron_keye.data.items import load_patches, media_rules, resolve
from megatron_keye.data.media.decoder import PYAV
from megatron_keye.errors import DataError, NumericError
from megatron_keye.train import cli
from megatron_keye.train.inference import SampleScore
from megatron_keye.train.scoring import write_scores
from tests.unit.checkpoint.hf_folder import (
    PREPROCESSOR,
    paddleocr_vision,
    qwen3,
    save_hf_weights,
    small_model,
    tensors_of,
    write_hf_folder,
)
from tests.unit.data.corpus import mp4, png
from tests.unit.train.forked import keye
from tests.unit.train.saved_run import save_run

TOLERANCE = 1e-4
ASSISTANT = re.compile(r"<\|im_start\|>assistant\n(.*?<\|im_end\|>)", re.DOTALL)
PLACEHOLDER = re.compile(r"<\|(image|video)_pad\|>")


def user(*parts):
    return {"role": "user", "content": [{"type": "text", "text": p} if isinstance(p, str) else p for p in parts]}


def image(name):
    return {"type": "image", "image": name}


def assistant(text):
    return {"role": "assistant", "content": text}


TEXT = {
    "id": "text",
    "messages": [
        {"role": "user", "content": "How many red squares?\n\n"}, assistant("Three: 1, 2, 3."), user("Done?"), assistant("é 7.5"),
    ],
}  # fmt: skip
SYSTEM = {"id": "system", "messages": [{"role": "system", "content": "red"}, user("one"), assistant("")]}
PICTURES = {
    "id": "pictures",
    "messages": [user(image("wide.png"), "and ", image("media/tall.png")), assistant("Three"), user(image("wide.png")), assistant("2")],
}
LONG = {"id": "long", "messages": [user("red blue " * 400), assistant("Three")]}
"""Longer than the rows that samples share."""
CLIP = {"id": "clip", "messages": [user("first ", {"type": "video", "video": "clip.mp4"}, "then?"), assistant("blue, red.")]}


def write_samples(folder: Path, *records) -> Path:
    """The records and their media; pictures have sizes that no rule changes."""
    (folder / "media").mkdir(parents=True)
    (folder / "wide.png").write_bytes(png(56, 140, 1))
    (folder / "media" / "tall.png").write_bytes(png(168, 84, 2))
    (folder / "clip.mp4").write_bytes(mp4(36, 168, 140, 8, cut=20))
    path = folder / "input.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


class ChunkedRotary(nn.Module):
    """Qwen2.5-VL's cos and sin at positions [3, T] that were set before the call."""

    def __init__(self, decoder):
        super().__init__()
        rope = {"rope_type": "default", "rope_theta": decoder.rope_base, "mrope_section": list(decoder.mrope_section)}
        config = Qwen2_5_VLTextConfig(
            hidden_size=decoder.num_heads * decoder.head_dim, num_attention_heads=decoder.num_heads, rope_parameters=rope
        )
        self.rotary = Qwen2_5_VLRotaryEmbedding(config)
        self.positions = None

    def forward(self, x, position_ids):
        return self.rotary(x, self.positions[:, None])


class Composition:
    """Keye-VL from PaddleOCR-VL's ViT and projector or Qwen3-VL's merger, Qwen3, and the folder's weights, tokenizer and template."""

    def __init__(self, folder: Path, variant: str):
        self.variant, model = variant, small_model(variant)
        weights = {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}
        self.decoder = qwen3(model)
        self.decoder.load_state_dict({n: t for n, t in weights.items() if n.startswith(("model.", "lm_head."))}, strict=True)
        self.stock_rotary, self.rotary = self.decoder.model.rotary_emb, ChunkedRotary(model.decoder)
        self.vision = paddleocr_vision(model)
        tower = {n.removeprefix("visual.vision_model."): t for n, t in weights.items() if n.startswith("visual.")}
        unfit = self.vision.load_state_dict(tower, strict=False)
        assert not unfit.missing_keys and all(name.startswith(("head.", "embeddings.packing_")) for name in unfit.unexpected_keys)
        self.projector = self._projector(model, {n.removeprefix("mlp_AR."): t for n, t in weights.items() if n.startswith("mlp_AR.")})
        template = json.loads((folder / "chat_template.json").read_text())["chat_template"]
        self.tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True, chat_template=template)

    def _projector(self, model, weights):
        width, out = model.vision.hidden_size, model.decoder.hidden_size
        if self.variant == "keye_vl_preview":
            projector = PaddleOCRProjector(PaddleOCRVLConfig(vision_config=dict(hidden_size=width), text_config=dict(hidden_size=out)))
            projector.load_state_dict(weights)
            return projector
        projector = Qwen3VLVisionPatchMerger(Qwen3VLVisionConfig(hidden_size=width, out_hidden_size=out), use_postshuffle_norm=True)
        projector.norm.eps = 1e-5
        names = {"pre_norm": "norm", "linear_1": "linear_fc1", "linear_2": "linear_fc2"}
        projector.load_state_dict({f"{names[name.split('.')[0]]}.{name.split('.')[1]}": tensor for name, tensor in weights.items()})
        return projector

    @torch.no_grad()
    def score(self, record, folder: Path) -> tuple[int, np.ndarray]:
        """Tokens, and log-probabilities of what the assistant says."""
        parts = [part for message in record["messages"] if isinstance(message["content"], list) for part in message["content"]]
        media = [self._medium(part, folder) for part in parts if part["type"] != "text"]
        written = iter([text for text, _, _ in media])
        rendered = self.tokenizer.apply_chat_template(record["messages"], tokenize=False)
        text = PLACEHOLDER.sub(lambda match: next(written), rendered)
        encoded = self.tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)
        ids = encoded["input_ids"]
        grids, pixels = ([thing for medium in media for thing in medium[k]] for k in (1, 2))
        logprobs = self._logits(torch.tensor(ids), grids, pixels).log_softmax(-1)
        spans = [match.span(1) for match in ASSISTANT.finditer(text)]
        wanted = [t for t, (start, _) in enumerate(encoded["offset_mapping"]) if any(a <= start < b for a, b in spans)]
        return len(ids), np.array([logprobs[t - 1, ids[t]].item() for t in wanted], dtype=np.float32)

    def _medium(self, part, folder):
        """What the released processor writes for it, the (h, w) of its segments in patches, and their pixels [n, 588]."""
        if part["type"] == "image":
            pixels = np.array(Image.open(folder / part["image"]).convert("RGB"))
            h, w = pixels.shape[0] // 14, pixels.shape[1] // 14
            patches = pixels.reshape(h, 14, w, 14, 3).transpose(0, 2, 4, 1, 3).reshape(-1, 588)
            return "<|image_pad|>" * (h * w // 4), [(h, w)], [patches]
        rules = media_rules(ImageConfig(), VideoConfig(), self.variant)
        blob = (folder / part["video"]).read_bytes()
        item = describe("video", blob, {}, rules)
        resolved = resolve(item, rules)
        layout = resolved.layout
        assert any(layout.fast) and not all(layout.fast), "the clip must have slow and fast frames"
        frames = [
            f"<|frame|>{stamp:.1f}{'<|fast_start|>' * fast}{'<|video_pad|>' * (grid.h * grid.w // 4)}{'<|fast_end|>' * fast}"
            for stamp, fast, grid in zip(layout.timestamps_s, layout.fast, layout.grids, strict=True)
        ]
        return "".join(frames), [(g.h, g.w) for g in layout.grids], load_patches(item, resolved, blob, self.variant, PYAV)

    def _logits(self, ids, grids, pixels):
        embeddings = self.decoder.model.embed_tokens(ids)
        if not grids:
            self.decoder.model.rotary_emb = self.stock_rotary
            return self.decoder(input_ids=ids[None]).logits[0]
        pads = self.tokenizer.convert_tokens_to_ids(["<|image_pad|>", "<|video_pad|>"])
        places = torch.isin(ids, torch.tensor(pads)).nonzero().flatten()
        visual = torch.cat([self._encode(h, w, patches) for (h, w), patches in zip(grids, pixels, strict=True)])
        self.rotary.positions = positions_of(len(ids), places.tolist(), grids)
        self.decoder.model.rotary_emb = self.rotary
        return self.decoder(inputs_embeds=embeddings.index_copy(0, places, visual)[None]).logits[0]

    def _encode(self, h, w, patches):
        values = (torch.from_numpy(patches.copy()).float() / 255 - 0.5) / 0.5
        bounds = torch.tensor([0, h * w], dtype=torch.int32)
        sizes = torch.tensor([[1, h, w]])
        features = self.vision(values.view(1, -1, 3, 14, 14), grid_thw=sizes, cu_seqlens=bounds).last_hidden_state
        features = features.reshape(h * w, -1)
        if self.variant == "keye_vl_preview":
            return self.projector(features, sizes)
        squares = features.view(h // 2, 2, w // 2, 2, -1).transpose(1, 2)
        return self.projector(squares.reshape(h * w, -1))


def positions_of(num_tokens: int, places: list[int], grids) -> torch.Tensor:
    """[3, T] by the published rule for segments of one frame: text advances by one, a segment by its longer merged side."""
    positions, following, at, remaining = torch.zeros(3, num_tokens, dtype=torch.int64), 0, 0, iter(grids)
    visual = set(places)
    while at < num_tokens:
        if at not in visual:
            positions[:, at] = following
            at, following = at + 1, following + 1
            continue
        h, w = (side // 2 for side in next(remaining))
        for row in range(h):
            for column in range(w):
                positions[:, at] = torch.tensor([following, following + row, following + column])
                at += 1
        following += max(h, w)
    return positions


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize(
    ("variant", "records"),
    [("keye_vl_1_5", [TEXT, CLIP, PICTURES, SYSTEM]), ("keye_vl_preview", [PICTURES, LONG, TEXT])],
)  # fmt: skip
def test_scores_equal_transformers(variant, records, tmp_path, record_property):
    folder = write_hf_folder(tmp_path / "hf", variant)
    samples, output = write_samples(tmp_path / "data", *records), tmp_path / "scores.jsonl"
    code, text = keye("score", "--model", folder, "--input", samples, "--output", output)
    assert code == 0, text
    composition, lines = Composition(folder, variant), lines_of(output)
    assert [line["id"] for line in lines] == [record["id"] for record in records]
    for record, line in zip(records, lines, strict=True):
        num_tokens, expected = composition.score(record, samples.parent)
        assert (line["num_tokens"], line["num_supervised"]) == (num_tokens, len(expected))
        found = np.array(line["logprobs"])
        assert np.array_equal(found, found.astype(np.float32)), "log-probabilities are float32"
        difference = np.abs(found - expected).max()
        record_property(f"{variant} {record['id']}", float(difference))
        print(f"score {variant} {record['id']} max_abs={difference:.1e}")
        assert difference < TOLERANCE
        assert line["logprob_sum"] == pytest.approx(found.sum(), abs=1e-9)
    assert np.std([logprob for line in lines for logprob in line["logprobs"]]) > 0.1, "weights that tell tokens apart"
    assert not list(tmp_path.glob(".*partial"))


def test_settings_of_folder_and_command_are_honoured(tmp_path):
    folder = write_hf_folder(tmp_path / "hf", "keye_vl_1_5")
    samples, output = write_samples(tmp_path / "data", PICTURES), tmp_path / "scores.jsonl"

    def score(*options):
        code, text = keye("score", "--model", folder, "--input", samples, "--output", output, *options)
        assert code == 0, text
        return lines_of(output)[0]

    exact, rounded = np.array(score()["logprobs"]), np.array(score("--precision", "bf16")["logprobs"])
    assert 1e-4 < np.abs(exact - rounded).max() < 0.3
    num_tokens = score()["num_tokens"]
    (folder / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR | {"max_pixels": 4 * 784}))
    # Pictures of 10, 18 and 10 tokens, none above 4 now.
    assert score()["num_tokens"] == num_tokens - (10 - 3) - (18 - 2) - (10 - 3)
    (folder / "chat_template.json").unlink()
    (folder / "tokenizer_config.json").write_text("{}")
    assert score()["num_tokens"] == num_tokens - 30
    code, text = keye("score", "--model", folder, "--input", samples, "--output", output, "--vision-attention", "flash")
    assert code == 65 and "flash" in text


def test_runs_and_checkpoints_score_as_the_same_hf_folder(tmp_path):
    folder = write_hf_folder(tmp_path / "hf", "keye_vl_1_5")
    samples = write_samples(tmp_path / "data", PICTURES, CLIP, SYSTEM)
    run = tmp_path / "run"
    checkpoint = save_run(run, folder, "keye_vl_1_5")
    scores = {}
    for name, model in {"hf": folder, "run": run, "checkpoint": checkpoint}.items():
        output = tmp_path / f"{name}.jsonl"
        code, text = keye("score", "--model", model, "--input", samples, "--output", output)
        assert code == 0, text
        scores[name] = lines_of(output)
    assert scores["run"] == scores["checkpoint"]
    for ours, theirs in zip(scores["run"], scores["hf"], strict=True):
        assert ours["id"] == theirs["id"] and ours["num_tokens"] == theirs["num_tokens"]
        assert np.abs(np.array(ours["logprobs"]) - theirs["logprobs"]).max() < TOLERANCE


@pytest.fixture(scope="module")
def hf_folder(tmp_path_factory):
    return write_hf_folder(tmp_path_factory.mktemp("hf") / "model", "keye_vl_1_5", max_shard_bytes=1 << 30)


def refused(capsys, **arguments) -> str:
    """The message of a command that ends with exit code 65 and writes nothing."""
    code = cli.main(["score", *(word for name, value in arguments.items() for word in (f"--{name}".replace("_", "-"), str(value)))])
    assert code == 65
    assert not Path(arguments["output"]).is_file()
    return capsys.readouterr().err


def test_inputs_that_cannot_be_scored(hf_folder, tmp_path, capsys):
    absent = {"id": "absent", "messages": [user(image("none.png")), assistant("x")]}
    path = write_samples(tmp_path / "data", TEXT, CLIP, absent)
    path.write_text(path.read_text() + "{\n" + json.dumps({"id": "odd"}) + "\n")
    output = tmp_path / "scores.jsonl"
    message = refused(capsys, model=hf_folder, input=path, output=output, max_tokens=300)
    assert "4 of 5 samples cannot be used" in message
    for part in ("input.jsonl:2, record clip: found", ":3, record absent: cannot read", "input.jsonl:4: found text", ":5, record odd"):
        assert part in message
    assert "no-such.jsonl" in refused(capsys, model=hf_folder, input="no-such.jsonl", output=output)
    assert "folder that does not exist" in refused(capsys, model=hf_folder, input=path, output=tmp_path / "none" / "scores.jsonl")


def test_folders_that_hold_no_usable_model(hf_folder, tmp_path, capsys):
    path, output = write_samples(tmp_path / "data", TEXT), tmp_path / "scores.jsonl"
    assert "holds no model" in refused(capsys, model=tmp_path, input=path, output=output)
    preview = tmp_path / "preview"
    shutil.copytree(hf_folder, preview)
    raw = json.loads((preview / "config.json").read_text()) | {"architectures": ["KeyeForConditionalGeneration"], "model_type": "Keye"}
    (preview / "config.json").write_text(json.dumps(raw))
    assert "whose mlp_AR.pre_norm.weight is [144]" in refused(capsys, model=preview, input=path, output=output)
    (preview / "config.json").write_text(json.dumps(raw | {"vocab_size": 300, "architectures": ["KeyeVL1_5ForConditionalGeneration"]}))
    assert "ids, and the model 300" in refused(capsys, model=preview, input=path, output=output)


def test_missing_and_misshapen_tensors_are_listed_before_anything_is_written(hf_folder, tmp_path):
    folder = tmp_path / "hf"
    shutil.copytree(hf_folder, folder)
    tensors = tensors_of(small_model("keye_vl_1_5"))
    del tensors["model.norm.weight"], tensors["visual.vision_model.head.probe"]
    tensors["lm_head.weight"] = tensors["lm_head.weight"][:-1]
    tensors["model.extra"] = torch.zeros(2)
    save_hf_weights(folder, tensors, 1 << 30)
    path, output = write_samples(tmp_path / "data", TEXT), tmp_path / "scores.jsonl"
    code, text = keye("score", "--model", folder, "--input", path, "--output", output)
    assert code == 65 and not output.exists()
    for part in (
        "model.norm.weight [64] is missing",
        "head.probe [1, 1, 144] is missing",
        "lm_head.weight is [415, 64], expected [416, 64]",
    ):
        assert part in text
    assert "model.extra [2] is not of this model" in text


class Broken:
    """A scorer that fails after one sample, or gives a score that is no number."""

    def __init__(self, logprob):
        self.logprob = logprob

    def scores(self, samples):
        yield 0, SampleScore(np.array([self.logprob], dtype=np.float32), np.array([True]))
        raise DataError("the second sample is gone")


class TwoSamples:
    def sample_id(self, sample):
        return f"s{sample}"

    def shape(self, sample):
        return SampleShape(4)


@pytest.mark.parametrize(("logprob", "error"), [(-1.5, DataError), (np.nan, NumericError), (-np.inf, NumericError)])
def test_an_output_is_whole_or_not_touched(tmp_path, logprob, error):
    output, done = tmp_path / "scores.jsonl", []
    output.write_text("older")
    with pytest.raises(error):
        write_scores(Broken(logprob), TwoSamples(), output, lambda: done.append(1))
    assert [path.name for path in tmp_path.iterdir()] == ["scores.jsonl"] and output.read_text() == "older"
    assert len(done) == (error is DataError)
