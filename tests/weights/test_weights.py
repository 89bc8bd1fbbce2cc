"""Checkpoints of every family: strict loading, provenance, and every way a file can be wrong."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fssdeploy.errors import InputError
from fssdeploy.modules.dinov2 import ViTConfig
from fssdeploy.systems.fsdino import STATE_PARAMETERS, FSDino, build, initialise_untrained
from fssdeploy.weights import provenance
from fssdeploy.weights.checkpoint import read_checkpoint
from fssdeploy.weights.dinov2 import to_official
from fssdeploy.weights.fsdino import fill, save_checkpoint
from tests.networks import SMALL
from tests.third_party import import_segment_anything

# SAM's own decoder sizes, so that an official file fits.
CONFIG = dataclasses.replace(SMALL, decoder_dim=256, decoder_heads=8, decoder_mlp=2048)


def fingerprint(model: FSDino) -> str:
    return provenance.fingerprint(model, model.config.to_dict(), STATE_PARAMETERS)


@pytest.fixture
def model() -> FSDino:
    return build(CONFIG)


@pytest.fixture
def encoder_file(tmp_path: Path) -> Path:
    """A file in the layout of dinov2_vit*14_pretrain.pth."""
    source = build(CONFIG)
    initialise_untrained(source, 5)
    path = tmp_path / "dinov2_pretrain.pth"
    torch.save(source.encoder.state_dict(), path)
    return path


@pytest.fixture
def sam_file(tmp_path: Path) -> Path:
    """A file in the layout of sam_vit_*.pth, made by the segment-anything package; only its image encoder is small."""
    modeling = import_segment_anything()
    torch.manual_seed(11)
    sam = modeling.Sam(
        image_encoder=modeling.ImageEncoderViT(img_size=64, depth=1, embed_dim=32, num_heads=2, out_chans=256),
        prompt_encoder=modeling.PromptEncoder(
            embed_dim=256, image_embedding_size=(4, 4), input_image_size=(64, 64), mask_in_chans=16
        ),
        mask_decoder=modeling.MaskDecoder(
            num_multimask_outputs=3,
            transformer=modeling.TwoWayTransformer(depth=2, embedding_dim=256, mlp_dim=2048, num_heads=8),
            transformer_dim=256,
            iou_head_depth=3,
            iou_head_hidden_dim=256,
        ),
    )
    path = tmp_path / "sam_vit.pth"
    torch.save(sam.state_dict(), path)
    return path


def test_files_add_up_and_the_rest_is_said_to_be_untrained(model: FSDino, encoder_file: Path, sam_file: Path) -> None:
    provenance = fill(model, [encoder_file, sam_file], untrained_seed=3)
    assert provenance.status == "partial"
    assert provenance.untrained_groups == ["adapter", "svp", "correlation"]
    assert [source["file"] for source in provenance.sources] == ["dinov2_pretrain.pth", "sam_vit.pth"]
    assert provenance.sources[0]["sha256"] == hashlib.sha256(encoder_file.read_bytes()).hexdigest()
    encoder = torch.load(encoder_file, weights_only=True)
    assert all(torch.equal(tensor, encoder[name]) for name, tensor in model.encoder.state_dict().items())
    sam = torch.load(sam_file, weights_only=True)
    for name, tensor in model.decoder.state_dict().items():
        assert torch.equal(tensor, sam[f"mask_decoder.{name}"])
    matrix = sam["prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"]
    assert torch.equal(model.position.positional_encoding_gaussian_matrix, matrix)
    assert torch.equal(model.dense_prompt[6].weight, sam["prompt_encoder.mask_downscaling.6.weight"])


def test_without_a_prompt_of_its_own_sams_initial_embedding_is_taken(sam_file: Path) -> None:
    model = build(dataclasses.replace(CONFIG, svp="none"))
    provenance = fill(model, [sam_file], untrained_seed=0)
    assert "svp" not in provenance.untrained_groups
    sam = torch.load(sam_file, weights_only=True)
    assert torch.equal(model.svp.initial.flatten(), sam["prompt_encoder.not_a_point_embed.weight"].flatten())


def test_own_checkpoint_round_trip(model: FSDino, tmp_path: Path) -> None:
    initialise_untrained(model, 1)
    path = tmp_path / "fsdino.safetensors"
    save_checkpoint(model, path, {"note": "test"})
    other = build(CONFIG)
    provenance = fill(other, [path], untrained_seed=None)
    assert provenance.status == "trained"
    assert provenance.untrained_groups == []
    assert fingerprint(other) == fingerprint(model)
    wrong = build(dataclasses.replace(CONFIG, correlation="cosine"))
    with pytest.raises(InputError, match="correlation is dot there, cosine here"):
        fill(wrong, [path], untrained_seed=None)


def test_fingerprint_follows_weights_and_configuration(model: FSDino) -> None:
    initialise_untrained(model, 1)
    before = fingerprint(model)
    with torch.no_grad():
        model.decoder.iou_token.weight.add_(1)
    assert fingerprint(model) == before  # class states do not depend on the decoder
    with torch.no_grad():
        model.correlation.project.weight[0, 0] += 1
    assert fingerprint(model) != before
    other = build(dataclasses.replace(CONFIG, geometry="letterbox"))
    initialise_untrained(other, 1)
    assert fingerprint(other) != before


def test_missing_weights_say_where_they_come_from(model: FSDino, encoder_file: Path) -> None:
    with pytest.raises(InputError, match=r"no file was given.*dinov2_vit\[s\|b\|l\]14_pretrain.pth"):
        fill(model, [], untrained_seed=None)
    with pytest.raises(InputError, match="lack adapter, svp, correlation, dense_prompt, position, decoder"):
        fill(model, [encoder_file], untrained_seed=None)


def test_chunked_training_files_lose_their_chunk_numbers() -> None:
    tensor = torch.zeros(1)
    names = to_official({"cls_token": tensor, "blocks.0.0.norm1.weight": tensor, "blocks.1.2.norm1.weight": tensor})
    assert set(names) == {"cls_token", "blocks.0.norm1.weight", "blocks.2.norm1.weight"}


def test_same_seed_same_network() -> None:
    first, second, third = build(CONFIG), build(CONFIG), build(CONFIG)
    fill(first, [], untrained_seed=4)
    fill(second, [], untrained_seed=4)
    fill(third, [], untrained_seed=5)
    assert fingerprint(first) == fingerprint(second) != fingerprint(third)


class _Trap:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.target),)

    def __init__(self, target: Path) -> None:
        self.target = target


@pytest.mark.parametrize("container", ["zip", "plain"])
def test_code_in_a_checkpoint_is_never_run(model: FSDino, tmp_path: Path, container: str) -> None:
    path, target = tmp_path / "evil.pth", tmp_path / "made_by_code"
    if container == "zip":
        torch.save({"cls_token": _Trap(target)}, path)
    else:
        path.write_bytes(pickle.dumps({"cls_token": _Trap(target)}, protocol=2))
    with pytest.raises(InputError) as caught:
        fill(model, [path], untrained_seed=0)
    assert caught.value.code == "checkpoint_unsafe"
    assert not target.exists()


@pytest.mark.parametrize("keep", [0.3, 0.9, 0.999])
@pytest.mark.parametrize("kind", ["pth", "safetensors"])
def test_truncated_checkpoints(model: FSDino, encoder_file: Path, tmp_path: Path, keep: float, kind: str) -> None:
    path = tmp_path / f"cut.{kind}"
    if kind == "safetensors":
        save_file(torch.load(encoder_file, weights_only=True), path)
    else:
        path.write_bytes(encoder_file.read_bytes())
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])
    with pytest.raises(InputError) as caught:
        fill(model, [path], untrained_seed=0)
    assert caught.value.code == "checkpoint_damaged"


@pytest.mark.parametrize(
    ("content", "code"),
    [(b"", "file_empty"), (b"hello", "checkpoint_format"), (b"PK\x03\x04rest", "checkpoint_damaged")],
)
def test_files_that_are_no_checkpoint(model: FSDino, tmp_path: Path, content: bytes, code: str) -> None:
    path = tmp_path / "file.pth"
    path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        fill(model, [path], untrained_seed=0)
    assert caught.value.code == code


def test_missing_file_and_folder(model: FSDino, tmp_path: Path) -> None:
    for path, code in ((tmp_path / "none.pth", "file_missing"), (tmp_path, "file_is_folder")):
        with pytest.raises(InputError) as caught:
            fill(model, [path], untrained_seed=0)
        assert caught.value.code == code


def test_wrong_architecture_is_named(model: FSDino, tmp_path: Path) -> None:
    released = ViTConfig(384, 1, 6)
    other = build(dataclasses.replace(CONFIG, encoder=released, tap_block=0))
    path = tmp_path / "other.pth"
    torch.save(other.encoder.state_dict(), path)
    with pytest.raises(InputError, match="its width is 384 .vits14., the preset needs 48"):
        fill(model, [path], untrained_seed=0)


def test_missing_surplus_and_misshapen_names(model: FSDino, encoder_file: Path) -> None:
    tensors = torch.load(encoder_file, weights_only=True)
    del tensors["blocks.0.attn.qkv.bias"]
    tensors["head.weight"] = torch.zeros(2)
    tensors["norm.bias"] = torch.zeros(7)
    torch.save(tensors, encoder_file)
    with pytest.raises(InputError) as caught:
        fill(model, [encoder_file], untrained_seed=0)
    text = str(caught.value)
    assert all(part in text for part in ("blocks.0.attn.qkv.bias", "head.weight", "norm.bias is (7,) instead of (48,)"))


def test_a_file_of_no_known_family(model: FSDino, tmp_path: Path) -> None:
    path = tmp_path / "resnet.safetensors"
    save_file({"conv1.weight": torch.zeros(3)}, path)
    with pytest.raises(InputError, match="no known family"):
        fill(model, [path], untrained_seed=0)


def test_a_sam_file_with_foreign_or_absent_parts(model: FSDino, sam_file: Path) -> None:
    tensors = torch.load(sam_file, weights_only=True)
    torch.save({**tensors, "extra.weight": torch.zeros(1)}, sam_file)
    with pytest.raises(InputError, match="it has extra.weight"):
        fill(model, [sam_file], untrained_seed=0)
    torch.save({name: t for name, t in tensors.items() if not name.startswith("image_encoder")}, sam_file)
    with pytest.raises(InputError, match="nothing under image_encoder"):
        fill(model, [sam_file], untrained_seed=0)


def test_metadata_and_envelopes(tmp_path: Path) -> None:
    path = tmp_path / "wrapped.pth"
    torch.save({"model": {"cls_token": torch.ones(1)}, "epoch": 3}, path)
    assert list(read_checkpoint(path).tensors) == ["cls_token"]
    file = tmp_path / "a.safetensors"
    save_file({"x": torch.ones(1)}, file, metadata={"key": "value"})
    assert read_checkpoint(file).metadata == {"key": "value"}
