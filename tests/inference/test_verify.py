"""`brt verify`: passes on the reference's vectors and on those of other variants, fails on any number that is off."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from reference_parameters import parameter_shapes
from written_vectors import write_vectors

from brt_dist.cli import main
from brt_dist.inference.reference_vectors import load_model, model_config, read_config, read_vectors, reference_names
from brt_dist.inference.verify import TOLERANCE, verify

REFERENCE = Path(__file__).parents[1] / "reference"
FILES = ["baseline_slide", "baseline_xl", "fixed_skip", "lstm_dual", "feedback_fixed_skip"]
QUANTITIES = ["logits", "token_losses", "states", "caches", "gradients"]
SOUND = REFERENCE / "fixed_skip.npz"
LARGEST_FLOAT = 1.7976931348623157e308

Arrays = dict[str, np.ndarray]
Tamper = Callable[..., Path]

SMALL: dict[str, Any] = {
    "num_layers": 3,
    "embedding_size": 24,
    "num_heads": 3,
    "head_size": 4,
    "mlp_dim": 20,
    "window_length": 8,
    "segment_length": 16,
    "vocab_size": 31,
    "batch_size": 2,
    "recurrent_layer_indices": [1],
    "recurrent_num_states": 5,
    "recurrent_gate_type": "bias",
    "recurrent_single_gate": False,
    "recurrent_skip_ffn": False,
    "feedback_recurrence": False,
    "dstack_window_length": 0,
    "seed": 0,
}
LSTM = {"recurrent_gate_type": "lstm"}
SKIP, SINGLE = {"recurrent_skip_ffn": True}, {"recurrent_single_gate": True}
TWO_LAYERS = {"recurrent_layer_indices": [0, 2]}
FEEDBACK = {"feedback_recurrence": True, "dstack_window_length": 8}
UNSEEN: dict[str, dict[str, Any]] = {
    "fixed_dual": SMALL,
    "fixed_single_feedback": SMALL | SINGLE | FEEDBACK | {"batch_size": 1},
    "lstm_skip_more_states": SMALL | LSTM | SKIP | {"recurrent_num_states": 11, "batch_size": 3},
    "lstm_single_two_layers": SMALL | LSTM | SINGLE | TWO_LAYERS,
    "lstm_dual_feedback": SMALL | LSTM | FEEDBACK,
    "lstm_dual_feedback_two_layers": SMALL | LSTM | FEEDBACK | TWO_LAYERS | {"segment_length": 24},
    "logarithmic_buckets": SMALL | SKIP | {"window_length": 40, "segment_length": 80, "batch_size": 1},
    "one_block": SMALL | LSTM | SINGLE | {"segment_length": 8, "batch_size": 1},
}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Vectors files of variants that were not recorded, computed from the formulas written out."""
    paths = {name: tmp_path_factory.mktemp("vectors") / f"{name}.npz" for name in UNSEEN}
    for name, config in UNSEEN.items():
        write_vectors(paths[name], config | {"variant": name})
    return paths


def add(name: str, amount: float) -> Callable[[Arrays], None]:
    """Adds `amount` to the largest entry of one array."""

    def change(arrays: Arrays) -> None:
        arrays[name].flat[np.abs(arrays[name]).argmax()] += amount

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
    assert all(result[quantity] > 0 for quantity in QUANTITIES if quantity != "states" or "baseline" not in name)


@pytest.mark.parametrize("name", UNSEEN)
def test_the_model_reproduces_variants_that_were_not_recorded(written: dict[str, Path], name: str) -> None:
    result = verify(written[name])
    assert result["passed"] is True
    for quantity in QUANTITIES:
        assert 0 < result[quantity] <= 1e-5


def test_a_lane_that_begins_no_document_with_the_first_segment_begins_with_zeros(
    tmp_path: Path, tampered: Tamper
) -> None:
    path = tmp_path / "vectors.npz"
    write_vectors(path, SMALL, np.array([[True, False], [False, False], [False, True]]))
    assert verify(path)["passed"] is True
    assert verify(tampered(lambda arrays: arrays["start_of_sequence"][0].fill(True), path))["passed"] is False


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


@pytest.mark.parametrize(
    ("name", "parameter"),
    [
        ("lstm_skip_more_states", "transformer1/recurrent_tbase/post_attn_mlp/input_gate/kernel"),
        ("lstm_skip_more_states", "transformer1/recurrent_tbase/post_attn_mlp/forget_gate/bias"),
        ("lstm_dual_feedback", "transformer1/recurrent_tbase/post_attn_mlp/input_gate/bias"),
        ("lstm_dual_feedback", "transformer1/recurrent_tbase/pre_ffn_layernorm/scale"),
        ("lstm_dual_feedback", "transformer1/recurrent_tbase/ffn/hidden0/kernel"),
        ("lstm_dual_feedback", "transformer1/recurrent_tbase/ffn/forget_gate/kernel"),
        ("lstm_dual_feedback", "transformer1/recurrent_tbase/ffn/input_gate/bias"),
        ("lstm_dual_feedback", "transformer0/tbase/_kvq/queries2_layer/kernel"),
        ("lstm_dual_feedback", "transformer2/tbase/attention_scale2"),
        ("lstm_dual_feedback_two_layers", "transformer1/tbase/_kvq/queries2_layer/kernel"),
        ("lstm_single_two_layers", "transformer0/recurrent_tbase/ffn/output_layer/kernel"),
        ("lstm_single_two_layers", "transformer2/recurrent_tbase/ffn/forget_gate/kernel"),
        ("fixed_single_feedback", "transformer1/recurrent_tbase/ffn/gate_bias"),
        ("fixed_dual", "transformer1/recurrent_tbase/ffn/gate_bias"),
        ("fixed_dual", "transformer1/recurrent_tbase/post_attn_mlp/gate_bias"),
    ],
)
def test_one_parameter_of_any_gate_cell_or_feedback_that_is_off_fails(
    written: dict[str, Path], tampered: Tamper, name: str, parameter: str
) -> None:

    def change(arrays: Arrays) -> None:
        arrays[f"param/{parameter}"].flat[1] += 0.1

    result = verify(tampered(change, written[name]))
    assert result["passed"] is False
    assert result["logits"] > TOLERANCE


@pytest.mark.parametrize(
    ("name", "array", "quantity"),
    [
        ("lstm_single_two_layers", "seg1/state_after_block/0", "states"),
        ("lstm_dual_feedback_two_layers", "seg3/state_after_block/2", "states"),
        ("fixed_single_feedback", "seg2/carry_out/transformer2/previous_keys", "caches"),
        ("lstm_dual_feedback", "seg2/grad/transformer1/recurrent_tbase/ffn/input_gate/bias", "gradients"),
        ("lstm_dual_feedback", "seg1/grad/transformer2/tbase/_kvq/queries2_layer/kernel", "gradients"),
    ],
)
def test_one_number_that_is_off_fails_in_any_variant(
    written: dict[str, Path], tampered: Tamper, name: str, array: str, quantity: str
) -> None:
    with np.load(written[name]) as file:
        largest = float(np.abs(file[array]).max())
    result = verify(tampered(add(array, 10 * TOLERANCE * (largest if quantity == "gradients" else 1)), written[name]))
    assert {each for each in QUANTITIES if result[each] > TOLERANCE} == {quantity}


def test_every_parameter_of_the_file_is_used(written: dict[str, Path]) -> None:
    for path in [*(REFERENCE / f"{name}.npz" for name in FILES), *written.values()]:
        vectors = read_vectors(path)
        config = read_config(vectors)
        names = reference_names(model_config(config))
        assert {key.removeprefix("param/") for key in vectors if key.startswith("param/")} == set(
            parameter_shapes(config)
        )
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


def test_the_exit_status_is_0_when_all_files_pass_1_when_one_fails_and_2_for_bad_input(
    tampered: Tamper, capsys: pytest.CaptureFixture[str]
) -> None:
    sound = [str(REFERENCE / f"{name}.npz") for name in FILES]
    assert main(["verify", *sound]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [json.loads(line)["file"] for line in lines] == sound
    assert [json.loads(line)["passed"] for line in lines] == [True] * len(sound)

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
