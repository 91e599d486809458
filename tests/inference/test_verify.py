"""`brt verify`: passes on the reference's vectors, fails on any number that is off, refuses what is no vectors file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from brt_dist.cli import main
from brt_dist.data.errors import BadInput
from brt_dist.inference.reference_vectors import load_model, model_config, read_vectors, reference_names
from brt_dist.inference.verify import TOLERANCE, verify

REFERENCE = Path(__file__).parents[1] / "reference"
FILES = ["baseline_slide", "baseline_xl", "fixed_skip"]
QUANTITIES = ["logits", "token_losses", "states", "caches", "gradients"]
SOUND = REFERENCE / "fixed_skip.npz"
LARGEST_FLOAT = 1.7976931348623157e308

Arrays = dict[str, np.ndarray]
Tamper = Callable[[Callable[[Arrays], None]], Path]


@pytest.fixture
def tampered(tmp_path: Path) -> Tamper:
    """tampered(change): a copy of fixed_skip.npz whose arrays went through `change`."""

    def copy(change: Callable[[Arrays], None]) -> Path:
        with np.load(SOUND) as file:
            arrays = {name: file[name] for name in file.files}
        change(arrays)
        path = tmp_path / "tampered.npz"
        np.savez(path, **arrays)
        return path

    return copy


def add(name: str, amount: float) -> Callable[[Arrays], None]:
    """Adds `amount` to the largest entry of one array."""

    def change(arrays: Arrays) -> None:
        arrays[name].flat[np.abs(arrays[name]).argmax()] += amount

    return change


def change_config(**changes: Any) -> Callable[[Arrays], None]:
    def change(arrays: Arrays) -> None:
        arrays["config_json"] = np.array(json.dumps(json.loads(str(arrays["config_json"])) | changes))

    return change


@pytest.mark.parametrize("name", FILES)
def test_the_model_reproduces_the_reference_implementation(name: str) -> None:
    path = REFERENCE / f"{name}.npz"
    result = verify(path)
    assert list(result) == ["file", *QUANTITIES, "passed"]
    assert result["file"] == str(path)
    assert result["passed"] is True
    for quantity in QUANTITIES:
        assert 0 <= result[quantity] <= 1e-5
    # Zero everywhere would mean that nothing was compared.
    assert all(result[quantity] > 0 for quantity in QUANTITIES if quantity != "states" or name == "fixed_skip")


@pytest.mark.parametrize(
    ("array", "quantity"),
    [
        ("seg1/logits", "logits"),
        ("seg3/logits", "logits"),
        ("seg1/token_losses", "token_losses"),
        ("seg3/token_losses", "token_losses"),
        ("seg2/state_after_block/1", "states"),
        ("seg3/carry_out/transformer1/recurrent_state", "states"),
        ("seg1/carry_out/transformer0/previous_keys", "caches"),
        ("seg3/carry_out/transformer2/previous_values", "caches"),
        ("seg1/grad/embed/embedding", "gradients"),
        ("seg2/grad/transformer1/recurrent_tbase/post_attn_mlp/gate_bias", "gradients"),
        ("seg2/grad/transformer0/relative_positions/rel_embedding", "gradients"),
    ],
)
def test_one_number_that_is_off_fails_its_quantity_and_no_other(tampered: Tamper, array: str, quantity: str) -> None:
    with np.load(SOUND) as file:
        largest = float(np.abs(file[array]).max())
    amount = 10 * TOLERANCE * (largest if quantity == "gradients" else 1)
    result = verify(tampered(add(array, amount)))
    assert result["passed"] is False
    assert {name for name in QUANTITIES if result[name] > TOLERANCE} == {quantity}
    assert result[quantity] == pytest.approx(10 * TOLERANCE, rel=0.05)


@pytest.mark.parametrize(
    "parameter",
    [
        "embed/embedding",
        "transformer0/tbase/_kvq/values_layer/kernel",
        "transformer0/relative_positions/rel_embedding",
        "transformer1/tbase/attention_scale2",
        "transformer1/recurrent_initial_state",
        "transformer1/recurrent_tbase/_kvq/position_embeddings",
        "transformer1/recurrent_tbase/attention_scale2",
        "transformer1/recurrent_tbase/post_attn_mlp/gate_bias",
    ],
)
def test_one_parameter_that_is_off_fails(tampered: Tamper, parameter: str) -> None:

    def change(arrays: Arrays) -> None:
        arrays[f"param/{parameter}"].flat[3] += 0.1

    result = verify(tampered(change))
    assert result["passed"] is False
    assert result["logits"] > TOLERANCE


def test_every_parameter_of_the_file_is_used() -> None:
    for name in FILES:
        vectors = read_vectors(REFERENCE / f"{name}.npz")
        names = reference_names(model_config(json.loads(str(vectors["config_json"]))))
        used = [theirs for group in names.values() for theirs in group]
        assert sorted(used) == sorted(key.removeprefix("param/") for key in vectors if key.startswith("param/"))
        assert set(names) == {ours for ours, _ in load_model(vectors).named_parameters()}


def test_a_gradient_that_should_be_zero_is_compared_absolutely(tampered: Tamper) -> None:
    name = "seg1/grad/transformer0/relative_positions/rel_embedding"
    with np.load(SOUND) as file:
        largest = float(np.abs(file[name]).max())

    def erase(arrays: Arrays) -> None:
        arrays[name] = np.zeros_like(arrays[name])

    result = verify(tampered(erase))
    assert result["passed"] is False
    assert result["gradients"] == pytest.approx(largest, rel=1e-3)


@pytest.mark.parametrize("strange", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
    ("array", "quantity"), [("seg1/logits", "logits"), ("seg2/grad/final_layernorm/scale", "gradients")]
)
def test_what_is_not_finite_fails_and_is_still_json(
    tampered: Tamper, capsys: pytest.CaptureFixture[str], array: str, quantity: str, strange: float
) -> None:
    def spoil(arrays: Arrays) -> None:
        arrays[array].flat[3] = strange

    assert main(["verify", str(tampered(spoil))]) == 1
    result = json.loads(capsys.readouterr().out, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert result["passed"] is False
    assert result[quantity] == LARGEST_FLOAT


@pytest.mark.parametrize(
    "key",
    [
        "tokens",
        "start_of_sequence",
        "seg2/loss_mask",
        "seg3/logits",
        "seg1/state_after_block/1",
        "seg2/carry_out/transformer0/previous_keys",
        "seg2/grad/embed/embedding",
        "param/transformer1/recurrent_tbase/_kvq/queries2_layer/kernel",
    ],
)
def test_an_array_that_is_missing_is_named(tampered: Tamper, key: str) -> None:
    path = tampered(lambda arrays: arrays.__delitem__(key))
    with pytest.raises(BadInput, match=f"{path.name} is not a complete vectors file: it lacks {key}"):
        verify(path)


@pytest.mark.parametrize(
    ("key", "array"),
    [
        ("seg1/logits", np.zeros((2, 64, 1), np.float32)),  # could be spread over ours
        ("seg2/state_after_block/1", np.zeros((), np.float32)),
        ("seg1/token_losses", np.zeros((2, 63), np.float32)),
        ("seg1/grad/final_layernorm/scale", np.zeros((0,), np.float32)),
        ("param/final_layernorm/scale", np.zeros((31,), np.float32)),
        ("param/embed/embedding", np.array("text")),
        ("tokens", np.full((3, 2, 64), 50, np.int32)),  # beyond the vocabulary
        ("seg1/loss_mask", np.zeros((2, 64), np.float32)),
        ("config_json", np.array("{")),
        ("config_json", np.array("[]")),
        ("config_json", np.array("{}")),
    ],
)
def test_an_array_that_does_not_fit_is_refused_in_one_line(tampered: Tamper, key: str, array: np.ndarray) -> None:
    path = tampered(lambda arrays: arrays.update({key: array}))
    with pytest.raises(BadInput, match=r"tampered\.npz") as refusal:
        verify(path)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"recurrent_gate_type": "lstm"}, "model.gate is 'lstm'; this version has 'fixed' only"),
        ({"recurrent_skip_ffn": False}, "model.cell is 'dual'; this version has 'skip' only"),
        ({"recurrent_single_gate": True}, "model.cell is 'single'; this version has 'skip' only"),
        ({"feedback_recurrence": True}, "model.feedback is True; this version has False only"),
    ],
)
def test_a_model_that_this_version_lacks_is_said_to_be_missing(
    tampered: Tamper, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(BadInput, match=message):
        verify(tampered(change_config(**changes)))


def test_what_is_no_vectors_file_is_refused_in_our_own_words(tmp_path: Path) -> None:
    files = {
        "text.npz": b"once upon a time",
        "empty.npz": b"",
        "cut.npz": SOUND.read_bytes()[:50_000],
        "pickle.npz": b"\x80\x04\x95\x05\x00\x00\x00\x00\x00\x00\x00]\x94.",
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    np.save(tmp_path / "one_array.npz.npy", np.zeros(3))
    np.savez(tmp_path / "objects.npz", config_json=np.array([{}], dtype=object))
    for path in sorted(tmp_path.iterdir()):
        with pytest.raises(BadInput) as refusal:
            verify(path)
        assert str(refusal.value) == f"{path} is not a vectors file, an .npz archive of numbers, or it is damaged"


def test_a_file_that_is_not_there_a_folder_and_another_archive_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="there is no file"):
        verify(tmp_path / "nothing.npz")
    with pytest.raises(BadInput, match="cannot be read: Is a directory"):
        verify(tmp_path)
    np.savez(tmp_path / "other.npz", tokens=np.zeros(3))
    with pytest.raises(BadInput, match="has no config_json"):
        verify(tmp_path / "other.npz")


def test_the_exit_status_is_0_when_all_files_pass_1_when_one_fails_and_2_for_bad_input(
    tampered: Tamper, capsys: pytest.CaptureFixture[str]
) -> None:
    sound = [str(REFERENCE / f"{name}.npz") for name in FILES]
    assert main(["verify", *sound]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [json.loads(line)["file"] for line in lines] == sound
    assert [json.loads(line)["passed"] for line in lines] == [True] * 3

    path = str(tampered(add("seg2/logits", 0.01)))
    assert main(["verify", path, sound[0]]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [json.loads(line)["passed"] for line in lines] == [False, True]

    assert main(["verify", str(REFERENCE / "nothing.npz")]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == f"brt: there is no file {REFERENCE / 'nothing.npz'}\n"


def test_verification_leaves_torch_as_it_was() -> None:
    threads, seed = torch.get_num_threads(), torch.initial_seed()
    verify(REFERENCE / "baseline_slide.npz")
    assert (torch.get_num_threads(), torch.initial_seed()) == (threads, seed)
    assert torch.is_grad_enabled()
