"""Vectors files: what is none, or not of one of our models, is refused in one line that names it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from brt_dist.cli import main
from brt_dist.data.errors import BadInput
from brt_dist.inference.verify import verify

REFERENCE = Path(__file__).parents[1] / "reference"
SOUND = REFERENCE / "fixed_skip.npz"
LSTM = {"recurrent_gate_type": "lstm"}

Arrays = dict[str, np.ndarray]
Tamper = Callable[..., Path]


def change_config(*without: str, **changes: Any) -> Callable[[Arrays], None]:
    def change(arrays: Arrays) -> None:
        config = json.loads(str(arrays["config_json"])) | changes
        kept = {key: value for key, value in config.items() if key not in without}
        arrays["config_json"] = np.array(json.dumps(kept))

    return change


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
        ("config_json", np.array("{}")),
    ],
)
def test_an_array_that_does_not_fit_is_refused_in_one_line(tampered: Tamper, key: str, array: np.ndarray) -> None:
    path = tampered(lambda arrays: arrays.update({key: array}))
    with pytest.raises(BadInput, match=r"tampered\.npz") as refusal:
        verify(path)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("key", "array", "message"),
    [
        ("tokens", np.ones((2, 2, 64), np.int32), r"tokens has the shape \(2, 2, 64\); it must be \(3, lanes, "),
        ("tokens", np.ones((3, 64), np.int32), r"tokens has the shape \(3, 64\)"),
        ("tokens", np.ones((3, 0, 64), np.int32), r"tokens has the shape \(3, 0, 64\); .* lanes at least 1$"),
        ("tokens", np.ones((3, 2, 0), np.int32), "a segment of 0 tokens is not a positive multiple of the window, 16"),
        ("tokens", np.ones((3, 2, 64)), "tokens holds float64 of shape .*; it must be whole numbers of shape"),
        (
            "start_of_sequence",
            np.ones((3, 1), bool),
            r"start_of_sequence .* it must be true or false of shape \(3, 2\)",
        ),
        ("start_of_sequence", np.ones((3, 2), np.int32), "start_of_sequence holds int32"),
        ("seg2/targets", np.ones((2, 64)), "seg2/targets holds float64"),
        ("seg3/loss_mask", np.ones((1, 64), bool), r"seg3/loss_mask holds bool of shape \(1, 64\)"),
        ("config_json", np.array("{"), "config_json is not JSON"),
        ("config_json", np.array("[]"), "config_json holds no JSON object"),
        ("param/final_layernorm/scale", np.zeros((31,), np.float32), r"has the shape \(31,\), .* it has \(32,\)$"),
        (
            "param/transformer0/tbase/ffn/hidden0/kernel",
            np.zeros((64, 32), np.float32),
            r"param/transformer0/tbase/ffn/hidden0/kernel has the shape \(64, 32\), .* it has \(32, 64\)$",
        ),
    ],
)
def test_an_array_of_another_kind_or_shape_is_named_with_what_it_must_be(
    tampered: Tamper, key: str, array: np.ndarray, message: str
) -> None:
    path = tampered(lambda arrays: arrays.update({key: array}))
    with pytest.raises(BadInput, match=message):
        verify(path)


@pytest.mark.parametrize(
    "key",
    [
        "seg1/logits",
        "seg2/token_losses",
        "seg3/state_after_block/1",
        "seg2/carry_out/transformer1/recurrent_state",
        "seg1/carry_out/transformer0/previous_keys",
        "seg3/carry_out/transformer2/previous_values",
        "seg1/grad/final_layernorm/scale",
        "param/embed/embedding",
        "param/transformer1/recurrent_tbase/_kvq/keys_layer/kernel",
    ],
)
@pytest.mark.parametrize("kind", ["complex64", "int32", "bool", "<U8"])
def test_compared_arrays_and_parameters_must_be_floating_point_numbers(tampered: Tamper, key: str, kind: str) -> None:
    """A complex number whose real part is right would else pass."""
    path = tampered(lambda arrays: arrays.update({key: arrays[key].astype(kind)}))
    with pytest.raises(BadInput, match=f"cannot be compared: {key} holds {kind}; expected floating-point numbers$"):
        verify(path)


@pytest.mark.parametrize(("floats", "integers"), [(">f4", ">i4"), (">f8", ">i2"), ("float64", "uint64")])
def test_byte_order_and_width_of_numbers_make_no_difference(tampered: Tamper, floats: str, integers: str) -> None:
    def change(arrays: Arrays) -> None:
        for key, array in arrays.items():
            if array.dtype.kind in "fi":
                arrays[key] = array.astype(floats if array.dtype.kind == "f" else integers)

    path = tampered(change)
    assert verify(path) == verify(SOUND) | {"file": str(path)}


@pytest.mark.parametrize(
    ("key", "place", "value", "message"),
    [
        ("tokens", (2, 1, 5), 50, "tokens of segment 3 hold 50 in lane 1 at position 5; .* ids 0 to 49$"),
        ("tokens", (1, 0, 63), -1, "tokens of segment 2 hold -1 in lane 0 at position 63; .* ids 0 to 49$"),
        ("seg2/targets", (1, 7), 50, "targets of segment 2 hold 50 in lane 1 at position 7; .* ids 0 to 49$"),
        # Would else count as not predicted.
        ("seg1/targets", (0, 0), -100, "targets of segment 1 hold -100 in lane 0 at position 0; .* ids 0 to 49$"),
    ],
)
def test_a_token_that_is_none_is_named_with_segment_lane_and_position(
    tampered: Tamper, key: str, place: tuple[int, ...], value: int, message: str
) -> None:
    with pytest.raises(BadInput, match=message):
        verify(tampered(lambda arrays: arrays[key].__setitem__(place, value)))


def test_a_target_that_is_not_predicted_may_be_anything(tampered: Tamper) -> None:
    def change(arrays: Arrays) -> None:
        arrays["seg2/targets"][~arrays["seg2/loss_mask"]] = -7
        assert not arrays["seg2/loss_mask"].all()

    path = tampered(change)
    assert verify(path) == verify(SOUND) | {"file": str(path)}


NOTHING_SO_LARGE = "{} in config_json is {}, but no parameter in the file has more than 64 rows or columns$"


@pytest.mark.parametrize("size", [2**20, 2**40, 10**30])
@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("vocab_size", NOTHING_SO_LARGE),
        ("embedding_size", NOTHING_SO_LARGE),
        ("mlp_dim", NOTHING_SO_LARGE),
        ("num_heads", NOTHING_SO_LARGE),
        ("head_size", NOTHING_SO_LARGE),
        ("recurrent_num_states", NOTHING_SO_LARGE),
        ("num_layers", "{} in config_json is {}, but the file has 45 parameters$"),
        ("window_length", "cannot be compared: a segment of 64 tokens is not a positive multiple of the window, {1}$"),
    ],
)
def test_a_size_beyond_everything_in_the_file_is_refused_before_memory_is_asked_for(
    tampered: Tamper, key: str, message: str, size: int
) -> None:
    with pytest.raises(BadInput, match=message.format(key, size)):
        verify(tampered(change_config(**{key: size})))


def test_heads_that_are_too_wide_together_are_refused(tampered: Tamper) -> None:
    with pytest.raises(BadInput, match="num_heads x head_size in config_json is 4096, but no parameter"):
        verify(tampered(change_config(num_heads=64, head_size=64)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"recurrent_gate_type": "residual"}, "recurrent_gate_type in config_json is 'residual'; it must be 'bias' "),
        ({"recurrent_gate_type": None}, "recurrent_gate_type in config_json is None; it must be a string"),
        ({"recurrent_single_gate": True}, "recurrent_single_gate and recurrent_skip_ffn .* are both true"),
        ({"recurrent_skip_ffn": "false"}, "recurrent_skip_ffn in config_json is 'false'; it must be true or false"),
        (
            {"feedback_recurrence": True, "dstack_window_length": 32},
            "dstack_window_length in config_json is 32 and window_length 16",
        ),
        ({"num_layers": "3"}, "num_layers in config_json is '3'; it must be a whole number"),
        ({"num_heads": True}, "num_heads in config_json is True; it must be a whole number"),
        ({"embedding_size": 32.0}, "embedding_size in config_json is 32.0; it must be a whole number"),
        ({"recurrent_num_states": 0}, "model.num_states is 0; it must be at least 1"),
        ({"recurrent_layer_indices": 1}, "recurrent_layer_indices in config_json is 1; it must be a list"),
        ({"recurrent_layer_indices": ["1"]}, r"recurrent_layer_indices in config_json is \['1'\]"),
        ({"recurrent_layer_indices": [3]}, "model.recurrent_layers holds 3, but there are 3 layers"),
        ({"recurrent_layer_indices": [-2]}, "model.recurrent_layers holds -2, but there are 3 layers"),
        ({"window_length": 48}, "a segment of 64 tokens is not a positive multiple of the window, 48"),
    ],
)
def test_a_configuration_that_is_not_one_of_ours_is_refused_by_name(
    tampered: Tamper, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(BadInput, match=message):
        verify(tampered(change_config(**changes)))


@pytest.mark.parametrize(
    "key", ["vocab_size", "head_size", "recurrent_layer_indices", "recurrent_num_states", "recurrent_gate_type"]
)
def test_a_configuration_that_lacks_a_key_is_refused_with_its_name(tampered: Tamper, key: str) -> None:
    with pytest.raises(BadInput, match=f"cannot be compared: config_json lacks {key}"):
        verify(tampered(change_config(key)))


@pytest.mark.parametrize(
    ("changes", "missing"),
    [
        (LSTM, "param/transformer1/recurrent_tbase/post_attn_mlp/input_gate/kernel"),
        ({"recurrent_skip_ffn": False}, "param/transformer1/recurrent_tbase/pre_ffn_layernorm/scale"),
        (
            {"feedback_recurrence": True, "dstack_window_length": 16},
            "param/transformer0/tbase/_kvq/queries2_layer/kernel",
        ),
        ({"recurrent_layer_indices": [1, 2]}, "param/transformer2/tbase/_kvq/queries2_layer/kernel"),
    ],
)
def test_the_parameters_of_another_variant_than_the_configuration_says_are_missing(
    tampered: Tamper, changes: dict[str, Any], missing: str
) -> None:
    with pytest.raises(BadInput, match=f"is not a complete vectors file: it lacks {missing}"):
        verify(tampered(change_config(**changes)))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("fixed_skip", change_config(made_by="hand", seed=None)),
        ("fixed_skip", change_config("batch_size", "segment_length", "variant", "dstack_window_length")),
        ("fixed_skip", change_config(feedback_recurrence=True)),  # no block-wise stack, no feedback
        ("fixed_skip", change_config(dstack_window_length=16)),
        ("fixed_skip", lambda arrays: arrays.update({"seg1/more": np.zeros(3), "param/more": np.zeros(3)})),
        ("baseline_xl", change_config("recurrent_num_states", "recurrent_gate_type", "recurrent_single_gate")),
        ("baseline_xl", change_config(recurrent_gate_type="residual", recurrent_skip_ffn=True)),
        ("baseline_xl", change_config(feedback_recurrence=True, dstack_window_length=64)),  # no state to feed back
    ],
)
def test_what_does_not_concern_the_model_makes_no_difference(
    tampered: Tamper, name: str, change: Callable[[Arrays], None]
) -> None:
    path = REFERENCE / f"{name}.npz"
    assert verify(tampered(change, path)) == verify(path) | {"file": str(tampered(change, path))}


@pytest.mark.parametrize("keys", [["step0/big", "step1/lr", "lr_rsqrt/steps"], ["doc_lengths", "rewind_tokens"]])
def test_recordings_of_something_else_than_a_model_are_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], keys: list[str]
) -> None:
    path = tmp_path / "recorded.npz"
    np.savez(path, **{key: np.arange(3) for key in keys})
    assert main(["verify", str(path)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == f"brt: {path} is not a vectors file of a model: it has no config_json\n"


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
