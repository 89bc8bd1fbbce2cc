"""config.pbtxt as text: what a server gets is what stands in tests/serving/configs.

`python -m tests.serving.test_configs` writes those files anew; read the difference before keeping it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import text_format

from fssdeploy.errors import InputError
from fssdeploy.protocol import BATCH, StageSpec
from fssdeploy.serving.configs import NEVER_US, Options, configs, protobuf, stage_config, text
from fssdeploy.serving.names import Names
from tests.serving.grey import CANVAS, PATCH, grey_specs

GOLDEN = Path(__file__).parent / "configs"
NAMES = Names("grey")
PREPROCESSING = {"canvas": CANVAS, "patch": PATCH, "geometry": "letterbox"}
VARIANTS: dict[str, tuple[Options, int | str]] = {
    "onnxruntime": (Options(), BATCH),
    "onnxruntime-one-row": (Options(), 1),
    "onnxruntime-gpu": (Options(device="gpu", delay_us=500, instances=2), BATCH),
    "tensorrt-gpu": (Options(backend="tensorrt", device="gpu", delay_us=500, max_batch=4), BATCH),
    "python-one-row": (Options(backend="python", max_batch=5, threads=2, queue=32), 1),
}


def samples(specs: Mapping[str, StageSpec]) -> dict[str, dict[str, tuple[int | str, ...]]]:
    """Shapes of a sample of one row for the stages, and of one file for the model that prepares queries."""
    stages = {
        NAMES.stage(stage): {tensor.name: (1, *tensor.shape[1:]) for tensor in spec.inputs}
        for stage, spec in specs.items()
    }
    return {**stages, NAMES.prepare_query: {"pictures": (1,)}, NAMES.segment: {"picture": (1,), "names": (1,)}}


def made(variant: str) -> dict[str, dict[str, Any]]:
    options, batch = VARIANTS[variant]
    specs = grey_specs(batch)
    return configs(NAMES, specs, PREPROCESSING, options, samples(specs))


def written(variant: str) -> str:
    """All configs of a variant in one text."""
    return "".join(f"# {model}\n{text(config)}\n" for model, config in made(variant).items())


@pytest.mark.parametrize("variant", VARIANTS)
def test_configs_are_those_on_record(variant: str) -> None:
    assert written(variant) == (GOLDEN / f"{variant}.pbtxt").read_text()


@pytest.mark.parametrize("variant", VARIANTS)
def test_configs_are_of_every_model_and_parse(variant: str) -> None:
    found = made(variant)
    assert set(found) == set(NAMES.all)
    for model, config in found.items():
        parsed = text_format.Parse(text(config), protobuf().ModelConfig())
        assert parsed.name == model
        assert not parsed.response_cache.enable
        assert parsed.version_policy.latest.num_versions == 1


def test_requests_are_joined_only_where_it_was_asked_for_and_never_to_enrol() -> None:
    for options, stage, batcher in (
        (Options(), "encoder", None),
        (Options(delay_us=0), "encoder", {"max_queue_delay_microseconds": 0}),
        (Options(delay_us=700), "segment", {"max_queue_delay_microseconds": 700}),
        (Options(delay_us=700), "enroll", None),
        (Options(backend="python", delay_us=700), "enroll", None),
    ):
        assert stage_config(grey_specs()[stage], options).get("dynamic_batching") == batcher


def test_a_queue_limit_joins_nothing() -> None:
    policy = {"default_queue_policy": {"timeout_action": "REJECT", "max_queue_size": 9}}
    for rows, delay_us, batcher in (
        (BATCH, None, {"preferred_batch_size": [1], "max_queue_delay_microseconds": NEVER_US}),
        (BATCH, 700, {"max_queue_delay_microseconds": 700}),
        (1, None, {}),  # the server refuses a preferred batch where there is no batch
    ):
        config = stage_config(grey_specs(rows)["encoder"], Options(queue=9, delay_us=delay_us))
        assert config["dynamic_batching"] == {**policy, **batcher}


def test_a_fixed_row_is_in_the_dims_for_nvidias_backends_only() -> None:
    spec = grey_specs(1)["encoder"]
    fixed, free = (stage_config(spec, Options(backend=backend)) for backend in ("onnxruntime", "python"))
    assert (fixed["max_batch_size"], fixed["input"][0]["dims"]) == (0, [1, 3, CANVAS, CANVAS])
    assert (free["max_batch_size"], free["input"][0]["dims"]) == (8, [3, CANVAS, CANVAS])
    ensemble = {each["name"]: each for each in made("onnxruntime-one-row")["grey"]["input"]}
    assert ensemble["pictures"]["dims"] == ensemble["support_pictures"]["dims"] == [1]


def test_the_warm_up_fills_a_batch_where_requests_are_joined() -> None:
    sizes = {
        variant: [each["batch_size"] for each in made(variant)[NAMES.stage("encoder")]["model_warmup"]]
        for variant in VARIANTS
    }
    assert sizes["onnxruntime"] == sizes["onnxruntime-one-row"] == [1]
    assert sizes["onnxruntime-gpu"] == [1, 8] and sizes["tensorrt-gpu"] == [1, 4]


@pytest.mark.parametrize(
    ("code", "given"),
    [
        ("backend_unknown", {"backend": "pytorch"}),
        ("device_unknown", {"device": "tpu"}),
        ("backend_device", {"backend": "tensorrt"}),
        ("backend_device", {"backend": "python", "device": "gpu"}),
        ("option_range", {"max_batch": 0}),
        ("option_range", {"instances": 65}),
        ("option_range", {"threads": 0}),
        ("option_range", {"queue": 0}),
        ("option_range", {"delay_us": -1}),
    ],
)
def test_options_that_cannot_be(code: str, given: dict[str, Any]) -> None:
    with pytest.raises(InputError) as caught:
        Options(**given)
    assert caught.value.code == code


@pytest.mark.parametrize("name", ["", "../x", "a/b", ".hidden", "a b", "ä", "x" * 65])
def test_names_that_are_no_folders(name: str) -> None:
    with pytest.raises(InputError) as caught:
        Names(name)
    assert caught.value.code == "system_name"


def test_stages_that_do_not_chain() -> None:
    for change in (
        lambda specs: specs.pop("enroll"),
        lambda specs: specs.update(segment=StageSpec("segment", specs["segment"].inputs, specs["encoder"].outputs)),
        lambda specs: specs.update(segment=StageSpec("segment", specs["enroll"].inputs, specs["segment"].outputs)),
    ):
        specs = grey_specs()
        change(specs)
        with pytest.raises(InputError) as caught:
            configs(NAMES, specs, PREPROCESSING, Options(), {})
        assert caught.value.code == "system_not_staged"


if __name__ == "__main__":
    for name in VARIANTS:
        (GOLDEN / f"{name}.pbtxt").write_text(written(name))
