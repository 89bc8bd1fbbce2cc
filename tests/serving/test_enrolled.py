"""The enrolled path: its two models in this process, then behind the real server, with strangers and crowds."""

from __future__ import annotations

import asyncio
import io
import json
import re
import shutil
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("tritonclient", reason="repositories and clients need the extra 'serve'")

from fssdeploy.bank.bank import Bank
from fssdeploy.deployment import Found, open_deployment
from fssdeploy.errors import FssError, InputError, MachineError
from fssdeploy.serving.client import AsyncClient, Client
from fssdeploy.serving.configs import Options
from fssdeploy.serving.environment import Environment
from fssdeploy.serving.models import enroll, segment
from fssdeploy.serving.models.enrolled import PUBLISH_SECONDS
from fssdeploy.serving.repository import write_repository
from fssdeploy.serving.server import Server
from tests.cli.command import fssdeploy
from tests.serving.grey import bright, write_artifact
from tests.serving.inprocess import Host, Response, Tensor, TritonError, python_backend


def encoded(array: np.ndarray, form: str = "PNG") -> bytes:
    stream = io.BytesIO()
    Image.fromarray(array).save(stream, form)
    return stream.getvalue()


def texts(*values: str | bytes) -> np.ndarray:
    array = np.empty(len(values), object)
    array[:] = [value.encode() if isinstance(value, str) else value for value in values]
    return array


def flat(level: int, side: int = 30) -> np.ndarray:
    """A picture of one grey; the system finds what is less than 30 levels away."""
    return np.full((side, side, 3), level, np.uint8)


ALL = np.ones((30, 30), bool)


# ---------------------------------------------------------------- the models in this process


class Series:
    """One time series, as the server keeps it."""

    def __init__(self, labels: Mapping[str, str]) -> None:
        self.labels, self.value = dict(labels), 0.0

    def increment(self, by: float) -> None:
        assert by >= 0
        self.value += by

    def set(self, value: float) -> None:
        self.value = value


@pytest.fixture
def metrics() -> dict[str, list[Series]]:
    return defaultdict(list)


@pytest.fixture
def backend(metrics: dict[str, list[Series]]) -> Iterator[ModuleType]:
    """The stand-in for the server's Python backend, with metrics."""

    class MetricFamily:
        COUNTER, GAUGE = "counter", "gauge"

        def __init__(self, name: str, description: str, kind: str) -> None:
            assert description and kind == ("gauge" if name.endswith("_bytes") else "counter")
            self.name = name

        def Metric(self, labels: Mapping[str, str]) -> Series:  # noqa: N802 - the server's name
            series = Series(labels)
            metrics[self.name].append(series)
            return series

    with python_backend():
        module = sys.modules["triton_python_backend_utils"]
        module.__dict__["MetricFamily"] = MetricFamily
        yield module


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("written")
    write_repository([f"s={write_artifact(folder / 'artifact')}"], folder / "models", Options())
    return folder


@pytest.fixture
def host(backend: ModuleType, written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Host:
    """The models of a repository, with an empty bank."""
    monkeypatch.setenv("FSSDEPLOY_BANK", str(tmp_path / "bank"))
    return Host(written / "models")


def refused(host: Host, model: str, inputs: Mapping[str, np.ndarray]) -> tuple[str, str]:
    """The code and the server's code of the error that a request gets."""
    with pytest.raises(TritonError) as caught:
        host.infer(model, inputs)
    text = str(caught.value)
    assert "\n" not in text and "Traceback" not in text
    match = re.match(r"error\[(\w+)\]: .", text)
    assert match, text
    return match[1], caught.value.code


def test_the_models_answer_as_the_local_api(host: Host, written: Path, tmp_path: Path) -> None:
    local = open_deployment(written / "artifact", tmp_path / "local", threads=1)
    picture, mask = bright(40, 60)
    other, other_mask = bright(40, 60, 90)
    query = bright(50, 30, 190)[0]
    local.enroll("cup", [picture, other], [mask, other_mask])
    ways = [
        {"pixels": np.stack([picture, other]), "mask_pixels": np.stack([mask, other_mask]).view(np.uint8)},
        {
            "pictures": texts(encoded(picture), encoded(other)),
            "masks": texts(*[encoded(m) for m in (mask, other_mask)]),
        },
        {"pixels": np.stack([picture, other]), "masks": texts("box:0,0,30,20", "box:0,0,30,20")},
    ]
    expected = local.segment(query)["cup"]
    for version, way in enumerate(ways, 1):
        answer = host.infer("s_enroll", {"name": texts("cup"), **way})
        assert (answer["version"].tolist(), answer["shots"].tolist()) == ([version], [2])
        for source in ({"pixels": query}, {"picture": texts(encoded(query))}):
            for names in ({}, {"names": texts("cup")}):
                found = host.infer("s_segment", {**source, **names})
                assert found["names_found"].tolist() == [b"cup"] and found["versions"].tolist() == [version]
                np.testing.assert_array_equal(found["masks"][0], expected.mask)
                assert found["scores"].tolist() == [expected.score]
    added = host.infer("s_enroll", {"name": texts("cup"), **ways[0], "add": np.array([True])})
    assert added["shots"].tolist() == [4]


def test_outputs_are_as_declared(host: Host) -> None:
    kinds = {"TYPE_STRING": object, "TYPE_UINT8": np.uint8, "TYPE_FP32": np.float32, "TYPE_INT64": np.int64}
    picture, mask = bright(30, 30)
    shot = {"pixels": picture[None], "mask_pixels": mask[None].view(np.uint8)}
    for model, module, inputs in (
        ("s_enroll", enroll, {"name": texts("a"), **shot}),
        ("s_segment", segment, {"pixels": picture}),
    ):
        answer = host.infer(model, inputs)
        assert list(answer) == [name for name, *_ in module.OUTPUTS]
        for name, kind, dims, _ in module.OUTPUTS:
            assert answer[name].dtype == kinds[kind] and answer[name].ndim == len(dims)


def test_what_is_wrong_with_a_request(host: Host) -> None:
    picture, mask = bright(30, 30)
    file, marked = texts(encoded(picture)), texts(encoded(mask))
    pixels, mask_pixels = picture[None], mask[None].view(np.uint8)
    name = {"name": texts("a")}
    assert refused(host, "s_segment", {"picture": file}) == ("bank_missing", "NOT_FOUND")
    host.infer("s_enroll", {**name, "pictures": file, "masks": marked})
    bad = "INVALID_ARG"
    for inputs, code in (
        ({**name, "masks": marked}, "input_choice"),
        ({**name, "pictures": file}, "input_choice"),
        ({**name, "pictures": file, "pixels": pixels, "masks": marked}, "input_choice"),
        ({**name, "pictures": file, "masks": marked, "mask_pixels": mask_pixels}, "input_choice"),
        ({**name, "pictures": texts(), "masks": texts()}, "no_pictures"),
        ({**name, "pictures": file, "masks": texts()}, "masks_count"),
        ({**name, "pictures": file, "masks": texts("box:0,0")}, "mask_text"),
        ({**name, "pictures": file, "masks": texts("/etc/passwd")}, "picture_unreadable"),
        ({**name, "pictures": texts("/etc/passwd"), "masks": marked}, "picture_unreadable"),
        ({**name, "pictures": texts(b""), "masks": marked}, "file_empty"),
        ({**name, "pixels": pixels[:, :0], "mask_pixels": mask_pixels}, "not_a_picture"),
        ({**name, "pixels": pixels, "mask_pixels": mask_pixels[:, :9]}, "mask_size"),
        ({**name, "pixels": pixels, "mask_pixels": mask_pixels * 0}, "mask_empty"),
        ({**name, "pixels": pixels, "mask_pixels": mask_pixels * 7}, "mask_labels"),
        ({"name": texts(b"\xff"), "pixels": pixels, "mask_pixels": mask_pixels}, "class_name"),
        ({"name": texts("a\0b"), "pixels": pixels, "mask_pixels": mask_pixels}, "class_name"),
        ({"name": texts("a", "b"), "pixels": pixels, "mask_pixels": mask_pixels}, "class_name"),
        ({"pixels": pixels, "mask_pixels": mask_pixels}, "input_missing"),
    ):
        assert refused(host, "s_enroll", inputs) == (code, bad)
    for inputs, code, kind in (
        ({}, "input_choice", bad),
        ({"picture": file, "pixels": picture}, "input_choice", bad),
        ({"picture": texts(encoded(picture), b"x")}, "picture_count", bad),
        ({"picture": file, "names": texts()}, "no_classes", bad),
        ({"picture": file, "names": texts("b")}, "class_unknown", "NOT_FOUND"),
        ({"picture": file, "names": texts(b"\xff\xfe")}, "class_name", bad),
        ({"picture": texts(encoded(picture, "JPEG")[:300])}, "picture_damaged", bad),
        ({"picture": texts(bytes(2**25 + 1))}, "request_too_large", bad),
        ({"pixels": np.broadcast_to(np.uint8(0), (40_000, 1001, 3))}, "picture_too_large", bad),
    ):
        assert refused(host, "s_segment", inputs) == (code, kind)
    assert host.infer("s_segment", {"picture": file})["versions"].tolist() == [1]


def test_a_failing_request_leaves_its_neighbours_alone(host: Host) -> None:
    picture, mask = bright(30, 30)
    shot = {"pixels": picture[None], "mask_pixels": mask[None].view(np.uint8)}
    answers = host.execute("s_enroll", {"name": texts("a"), **shot}, {"name": texts("")}, {"name": texts("b"), **shot})
    assert [answer.error is None for answer in answers] == [True, False, True]


def test_metrics(host: Host, metrics: dict[str, list[Series]]) -> None:
    def value(family: str, stage: str | None = None) -> float:
        return sum(series.value for series in metrics[family] if stage in (None, series.labels.get("stage")))

    picture, mask = bright(30, 30)
    host.load("s_enroll"), host.load("s_segment")
    assert value("fssdeploy_stage_count_total") == 0  # the warm-up does not count
    for name, shown in (("a", picture), ("b", bright(30, 30, 90)[0])):
        host.infer("s_enroll", {"name": texts(name), "pixels": shown[None], "mask_pixels": mask[None].view(np.uint8)})
    for names in ("a", "ab", "ab"):
        host.infer("s_segment", {"pixels": picture, "names": texts(*names)})
    refused(host, "s_segment", {"pixels": picture, "names": texts("c")})
    time.sleep(2 * PUBLISH_SECONDS)
    assert (value("fssdeploy_bank_cache_hits_total"), value("fssdeploy_bank_cache_misses_total")) == (3, 2)
    assert value("fssdeploy_bank_cache_bytes") == 8
    counts = {stage: value("fssdeploy_stage_count_total", stage) for stage in ("encoder", "enroll", "segment")}
    assert counts == {"encoder": 5, "enroll": 2, "segment": 5}
    assert all(value("fssdeploy_stage_seconds_total", stage) > 0 for stage in counts)
    for family in metrics.values():
        labels = [json.dumps(series.labels, sort_keys=True) for series in family]
        assert len(set(labels)) == len(labels)
        assert all(series.labels["system"] == "s" and series.labels["process"].isdecimal() for series in family)


def test_the_bank_lies_beside_the_repository(
    backend: ModuleType, written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(written / "models", tmp_path / "place" / "models")
    monkeypatch.delenv("FSSDEPLOY_BANK", raising=False)
    picture, mask = bright(30, 30)
    host = Host(tmp_path / "place" / "models")
    before = sorted(path for path in host.repository.rglob("*") if "__pycache__" not in path.parts)
    shot = {"pixels": picture[None], "mask_pixels": mask[None].view(np.uint8)}
    host.infer("s_enroll", {"name": texts("../../x"), **shot})
    assert (tmp_path / "place" / "bank" / "s" / "index.sqlite").exists()
    assert sorted(path for path in host.repository.rglob("*") if "__pycache__" not in path.parts) == before


def test_stage_models_in_place_of_a_session(
    backend: ModuleType, host: Host, written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a GPU server does: the same numbers, from the models of the stages, in batches that they take."""
    calls: Counter[str] = Counter()

    class InferenceRequest:
        def __init__(
            self, model_name: str, requested_output_names: list[str], inputs: list[Tensor], preferred_memory: object
        ) -> None:
            assert preferred_memory == ("cpu", 0)
            self.call = model_name, {tensor.name: tensor.array for tensor in inputs}
            self.names = requested_output_names

        def exec(self) -> Any:
            model, inputs = self.call
            calls[model] += 1
            assert all(len(array) <= 2 for array in inputs.values())
            outputs = host.infer(model, inputs)
            return Answer([Tensor(name, outputs[name]) for name in self.names])

    class Answer(Response):
        def has_error(self) -> bool:
            return False

    backend.__dict__.update(
        InferenceRequest=InferenceRequest,
        PreferredMemory=lambda kind, device: (kind, device),
        TRITONSERVER_MEMORY_CPU="cpu",
        get_output_tensor_by_name=lambda answer, name: next(t for t in answer.outputs if t.name == name),
    )
    shutil.copytree(written / "models", tmp_path / "models")
    for model in ("s_enroll", "s_segment"):
        config = tmp_path / "models" / model / "config.pbtxt"
        text = config.read_text().replace('"session"', '"models"')
        config.write_text(text + 'parameters { key: "max_batch" value { string_value: "2" } }\n')
    monkeypatch.setenv("FSSDEPLOY_BANK", str(tmp_path / "banks"))
    served = Host(tmp_path / "models")
    shots = [bright(40, 60, level) for level in (90, 150, 210)]
    pictures, masks = [picture for picture, _ in shots], [mask for _, mask in shots]
    inputs = {"pixels": np.stack(pictures), "mask_pixels": np.stack(masks).view(np.uint8)}
    served.infer("s_enroll", {"name": texts("a"), **inputs})
    found = served.infer("s_segment", {"pixels": bright(50, 30, 160)[0]})
    assert calls == {"s_stage_encoder": 3, "s_stage_enroll": 2, "s_stage_segment": 1}
    local = open_deployment(written / "artifact", tmp_path / "local", threads=1)
    local.enroll("a", pictures, masks)
    expected = local.segment(bright(50, 30, 160)[0])["a"]
    np.testing.assert_array_equal(found["masks"][0], expected.mask)
    assert found["scores"][0] == expected.score


# ---------------------------------------------------------------- behind the real server


def only_enrolled(repository: Path) -> None:
    """Leave the models of the enrolled path alone: every other costs seconds to load."""
    for folder in repository.iterdir():
        if folder.is_dir() and not re.fullmatch("[a-z]+_(enroll|segment)", folder.name):
            shutil.rmtree(folder)


@pytest.fixture(scope="module")
def served(
    server_environment: Environment, tiny_artifact: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """A server of two systems: `grey`, whose answers can be worked out, in two instances, and `tiny`, a real one."""
    folder = tmp_path_factory.mktemp("served")
    grey = write_artifact(folder / "grey")
    write_repository([f"grey={grey}", f"tiny={tiny_artifact}"], folder / "models", Options(instances=2))
    only_enrolled(folder / "models")
    assert len(list((folder / "models").glob("*/config.pbtxt"))) == 4
    with Server(folder / "models", server_environment, log=folder / "log", exit_timeout=2) as server:
        yield server
        assert server.process and server.process.poll() is None  # it outlived everything


def bank_of(server: Server, system: str) -> Path:
    return server.repository.parent / "bank" / system


def url_of(server: Server, protocol: str) -> str:
    return server.http_url if protocol == "http" else server.grpc_url


def assert_equal(one: Mapping[str, Found], other: Mapping[str, Found]) -> None:
    """Masks bit by bit; of the scores, the last digit hangs on NumPy's release, which is another one in the server."""
    assert list(one) == list(other)
    for name in one:
        np.testing.assert_array_equal(one[name].mask, other[name].mask)
        assert one[name].score == pytest.approx(other[name].score, rel=1e-6)


@pytest.mark.parametrize("shared_memory", [False, True], ids=["in messages", "shared memory"])
@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_masks_are_those_of_the_local_api(
    served: Server, tiny_artifact: Path, tmp_path: Path, picture: np.ndarray, protocol: str, shared_memory: bool
) -> None:
    local = open_deployment(tiny_artifact, tmp_path / "bank", threads=1)
    turned = np.ascontiguousarray(picture[:70, ::-1])
    (tmp_path / "p.jpg").write_bytes(encoded(turned, "JPEG"))
    name, corner = f"disc {protocol} {shared_memory}", f"corner {protocol} {shared_memory}"
    with Client(url_of(served, protocol), "tiny", protocol, shared_memory, timeout=120) as client:
        for api in (local, client):
            api.enroll(name, [encoded(picture), encoded(turned)], ["box:45,15,95,65", "box:25,15,75,66"])
            assert api.enroll(corner, [picture], [np.pad(np.ones((40, 30), bool), ((0, 50), (0, 90)))]).version == 1
        for source in (picture, turned, encoded(picture), tmp_path / "p.jpg"):
            expected = local.segment(source, [name, corner])
            assert_equal(client.segment(source, [name, corner]), expected)
        assert set(client.segment(picture)) >= {name, corner}


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_many_calls_of_one_asynchronous_client(served: Server, protocol: str) -> None:
    async def work() -> list[dict[str, Found]]:
        async with AsyncClient(url_of(served, protocol), "grey", protocol, timeout=120) as client:
            await client.enroll("async", [flat(100)], [ALL])
            status = await client.status()
            assert status["ready"] and {"grey", "tiny"} <= set(status["systems"])
            return await asyncio.gather(*[client.segment(flat(level), ["async"]) for level in range(60, 150, 10)])

    for level, found in zip(range(60, 150, 10), asyncio.run(work()), strict=True):
        assert found["async"].mask.all() == (abs(level - 100) < 30)


def test_another_process_enrols_anew(served: Server, written: Path) -> None:
    with Client(served.http_url, "grey", timeout=120) as client:
        client.enroll("shared", [flat(100)], [ALL])
        for _ in range(4):  # until both instances know it
            assert client.segment(flat(100), ["shared"])["shared"].mask.all()
        code = (
            "import sys; from tests.serving.test_enrolled import *;"
            "print(open_deployment(sys.argv[1], sys.argv[2], threads=1).enroll('shared', [flat(200)], [ALL]).version)"
        )
        command = [sys.executable, "-c", code, str(written / "artifact"), str(bank_of(served, "grey"))]
        assert subprocess.run(command, check=True, capture_output=True, text=True).stdout == "2\n"
        for _ in range(4):
            found = client.segment(flat(100), ["shared"])["shared"]
            assert found.version == 2 and not found.mask.any()


def test_a_crowd_loses_nothing_and_sees_no_mixture(served: Server) -> None:
    """64 clients at once: 16 enrol one class as greys of their own, 48 look for it."""
    levels: dict[int, int] = {}
    seen: list[tuple[int, int, bool]] = []
    problems: list[Exception] = []
    start = threading.Barrier(64)

    def work(number: int) -> None:
        protocol = ("http", "grpc")[number % 2]
        level = 4 * number
        try:
            with Client(url_of(served, protocol), "grey", protocol, timeout=300) as client:
                start.wait()
                for turn in range(4):
                    if number < 16:
                        version = client.enroll("crowd", [flat(4 * level + turn)], [ALL]).version
                        assert version not in levels
                        levels[version] = 4 * level + turn
                    else:
                        found = client.segment(flat(level), ["crowd"])["crowd"]
                        assert found.mask.all() == found.mask.any()
                        seen.append((found.version, level, bool(found.mask.all())))
        except Exception as error:
            problems.append(error)

    with Client(served.http_url, "grey", timeout=120) as client:
        levels[client.enroll("crowd", [flat(0)], [ALL]).version] = 0
    threads = [threading.Thread(target=work, args=(number,)) for number in range(64)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert problems == []
    assert sorted(levels) == list(range(1, 66)) and len(seen) == 192
    for version, level, found in seen:
        assert found == (abs(levels[version] - level) < 30), (version, levels[version], level)
    with Bank.open(bank_of(served, "grey")) as bank:
        assert bank.verify() == []
        for info in bank.versions("crowd"):
            assert float(bank.get("crowd", info.version).tensors["level"].item()) == levels[info.version]


def bomb() -> bytes:
    """A PNG of a few hundred kilobytes with 400 million pixels."""
    stream = io.BytesIO()
    with Image.new("1", (20_000, 20_000)) as image:
        image.save(stream, "PNG")
    return stream.getvalue()


HOSTILE: dict[str, tuple[str, Callable[[Client], Any]]] = {
    "truncated JPEG": ("picture_damaged", lambda c: c.segment(encoded(flat(9), "JPEG")[:-200], ["known"])),
    "bomb": ("picture_too_large", lambda c: c.segment(bomb(), ["known"])),
    "bomb as mask": ("picture_too_large", lambda c: c.enroll("x", [flat(9)], [bomb()])),
    "nothing": ("file_empty", lambda c: c.segment(b"", ["known"])),
    "text": ("picture_unreadable", lambda c: c.segment(b"/etc/passwd", ["known"])),
    "no object": ("mask_empty", lambda c: c.enroll("x", [flat(9)], [~ALL])),
    "pickle": ("array_unreadable", lambda c: c.segment(pickled(), ["known"])),
    "huge header": ("array_unreadable", lambda c: c.segment(promising(), ["known"])),
    "unknown class": ("class_unknown", lambda c: c.segment(flat(9), ["known", "unknown"])),
    "unknown class to add to": ("class_unknown", lambda c: c.enroll("unknown", [flat(9)], [ALL], add=True)),
    "newline": ("class_name", lambda c: c.enroll("a\nb", [flat(9)], [ALL])),
    "long name": ("class_name", lambda c: c.enroll("x" * 201, [flat(9)], [ALL])),
    "unknown system": ("model_missing", lambda c: Client(c._core.url, "other").segment(flat(9))),
}


def pickled() -> bytes:
    stream = io.BytesIO()
    np.save(stream, np.array([{}], object), allow_pickle=True)
    return stream.getvalue()


def promising() -> bytes:
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": "|u1", "fortran_order": False, "shape": (2**40, 2**20, 3)})
    return stream.getvalue()


def test_strangers_get_one_clear_error_and_the_models_live_on(served: Server) -> None:
    pid = served.pid
    with Client(served.http_url, "grey", timeout=120) as client:
        version = client.enroll("known", [flat(100)], [ALL]).version
        for what, (code, ask) in HOSTILE.items():
            with pytest.raises(InputError) as caught:
                ask(client)
            assert caught.value.code == code, what
            line = caught.value.line()
            assert "\n" not in line and "Traceback" not in line and 'File "' not in line, what
            assert client.segment(flat(100), ["known"])["known"].version == version
    assert served.pid == pid and served.process and served.process.poll() is None


@pytest.mark.parametrize(
    "name", ["../../../tmp/x", "/etc/passwd", "..", "C:\\x", "ключ 鍵 🔑", "e\u0301", "a%2fb", "'; --"]
)
def test_names_are_text_and_never_paths(served: Server, name: str) -> None:
    with Client(served.http_url, "grey", timeout=120) as client:
        client.enroll("names", [flat(77)], [ALL])
        folder = served.repository.parent
        before = {path for path in folder.rglob("*") if "-" not in path.suffix}
        stored = client.enroll(name, [flat(77)], [ALL])
        assert list(client.segment(flat(77), [name])) == [stored.name]
        assert {path for path in folder.rglob("*") if "-" not in path.suffix} == before


def raw(server: Server, model: str, **inputs: tuple[list[int], str, Any]) -> str:
    """The server's own words for a request in JSON."""
    body = {
        "inputs": [
            {"name": name, "shape": shape, "datatype": kind, "data": data}
            for name, (shape, kind, data) in inputs.items()
        ]
    }
    request = urllib.request.Request(
        f"http://{server.http_url}/v2/models/{model}/infer", json.dumps(body).encode(), method="POST"
    )
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:
            return answer.read().decode()
    except urllib.error.HTTPError as error:
        with closing(error):
            return f"{error.code} {json.loads(error.read())['error']}"


def test_wrong_shapes_and_types_and_choices(served: Server) -> None:
    with Client(served.http_url, "grey", timeout=120) as client:
        client.enroll("raw", [flat(100)], [ALL])
    good = ([1, 1, 3], "UINT8", [100] * 3)
    assert '"versions"' in raw(served, "grey_segment", pixels=good, names=([1], "BYTES", ["raw"]))
    for words, inputs in {
        "unexpected shape": {"pixels": ([1, 1, 4], "UINT8", [1] * 4)},
        "expects 'UINT8'": {"pixels": ([1, 1, 3], "FP32", [1.0] * 3)},
        "expects 'BYTES'": {"pixels": good, "names": ([1], "INT32", [1])},
        "unexpected inference input": {"pixels": good, "path": ([1], "BYTES", ["x"])},
        "error[input_choice]": {"names": ([1], "BYTES", ["raw"])},
        "error[no_classes]": {"pixels": good, "names": ([0], "BYTES", [])},
        "error[not_a_picture]": {"pixels": ([0, 1, 3], "UINT8", [])},
    }.items():
        answer = raw(served, "grey_segment", **inputs)
        assert answer.startswith("400 ") and words in answer, answer
    both = raw(served, "grey_segment", pixels=good, picture=([1], "BYTES", ["x"]))
    assert both.startswith("400 error[input_choice]: both")
    assert '"versions"' in raw(served, "grey_segment", pixels=good, names=([1], "BYTES", ["raw"]))


def metrics_of(server: Server) -> dict[str, dict[str, float]]:
    """Our values by family and labels, as Prometheus reads them."""
    with urllib.request.urlopen(server.metrics_url, timeout=60) as answer:
        text = answer.read().decode()
    found: dict[str, dict[str, float]] = defaultdict(dict)
    for family, labels, value in re.findall(r"^(fssdeploy_\w+)\{(.*)\} (\S+)$", text, re.MULTILINE):
        found[family][labels] = float(value)
    return found


def test_metrics_of_several_instances(served: Server) -> None:
    def total(found: Mapping[str, Mapping[str, float]], family: str, *parts: str) -> float:
        return sum(value for labels, value in found[family].items() if all(part in labels for part in parts))

    with Client(served.http_url, "grey", timeout=120) as client:
        client.enroll("measured", [flat(123)], [ALL])  # a state that no other test has made
        time.sleep(2 * PUBLISH_SECONDS)
        before = metrics_of(served)
        threads = [threading.Thread(target=client.segment, args=(flat(123), ["measured"])) for _ in range(12)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    time.sleep(2 * PUBLISH_SECONDS)
    after = metrics_of(served)
    instances = {labels for labels in after["fssdeploy_bank_cache_bytes"] if "grey_segment" in labels}
    assert len(instances) == 2
    families = ("fssdeploy_bank_cache_hits_total", "fssdeploy_bank_cache_misses_total")
    hits, misses = (total(after, name, "grey_segment") - total(before, name, "grey_segment") for name in families)
    assert hits + misses == 12 and 1 <= misses <= 2
    for stage in ("encoder", "segment"):
        labels = ("grey_segment", f'stage="{stage}"')
        assert total(after, "fssdeploy_stage_count_total", *labels) == 12 + total(
            before, "fssdeploy_stage_count_total", *labels
        )
        assert total(after, "fssdeploy_stage_seconds_total", *labels) > total(
            before, "fssdeploy_stage_seconds_total", *labels
        )


def test_a_model_that_is_loaded_anew_leaves_no_series_behind(served: Server) -> None:
    def series() -> set[str]:
        return {labels for labels in metrics_of(served)["fssdeploy_bank_cache_bytes"] if "tiny_segment" in labels}

    before, others = series(), len(metrics_of(served)["fssdeploy_bank_cache_bytes"])
    assert len(before) == 2
    for step in ("unload", "load"):
        url = f"http://{served.http_url}/v2/repository/models/tiny_segment/{step}"
        urllib.request.urlopen(urllib.request.Request(url, b"{}", method="POST"), timeout=120).close()
        until = time.monotonic() + 60
        while step == "unload" and series() and time.monotonic() < until:
            time.sleep(0.1)
    after = series()
    assert len(after) == 2 and not before & after
    assert len(metrics_of(served)["fssdeploy_bank_cache_bytes"]) == others


def test_the_command_line(served: Server, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(encoded(flat(100)))
    (tmp_path / "b.png").write_bytes(encoded(flat(200)))
    status = fssdeploy("client", "status", served.http_url, "--json")
    assert status.code == 0 and status.json["ready"] and status.json["systems"] == ["grey", "tiny"]
    fssdeploy("client", "segment", served.http_url, tmp_path / "a.png").check_refused("system_needed", 3)
    options = ("--system", "grey", "--timeout", "120", "--json")
    shot = ("--image", tmp_path / "a.png", "--mask", "box:0,0,30,30")
    answer = fssdeploy("client", "enroll", served.http_url, "on the line", *shot, *options)
    assert (answer.code, answer.json["version"], answer.json["shots"]) == (0, 1, 1)
    out = tmp_path / "out"
    where = ("--class", "on the line", "--out", out, "--protocol", "grpc")
    answer = fssdeploy("client", "segment", served.grpc_url, tmp_path, *where, *options)
    assert answer.code == 0, answer.err
    first, second = answer.json["pictures"]
    assert first["classes"]["on the line"]["area"] == 900 and second["classes"]["on the line"]["area"] == 0
    mask = np.asarray(Image.open(out / first["classes"]["on the line"]["mask"]))
    assert mask.shape == (30, 30) and (mask == 255).all()
    assert (out / first["overlay"]).exists()
    (tmp_path / "c.png").write_bytes(b"nothing")
    answer = fssdeploy("client", "segment", served.http_url, tmp_path, *where[:4], *options)
    assert answer.code == 3 and len(answer.json["pictures"]) == 2 and len(answer.json["errors"]) == 1
    missing = fssdeploy("client", "segment", served.http_url, tmp_path / "a.png", "--class", "none", *options)
    missing.check_refused("class_unknown", 3)


def test_a_server_killed_while_classes_are_enrolled(
    server_environment: Environment, written: Path, tmp_path: Path
) -> None:
    shutil.copytree(written / "models", tmp_path / "models")
    only_enrolled(tmp_path / "models")
    told: list[int] = []
    with Server(tmp_path / "models", server_environment, log=tmp_path / "log", exit_timeout=1) as server:
        client = Client(server.http_url, "s", timeout=120, retries=0)

        def keep_enrolling() -> None:
            with pytest.raises(MachineError):
                while True:
                    told.append(client.enroll("a", [flat(len(told) % 200)], [ALL]).version)

        thread = threading.Thread(target=keep_enrolling)
        thread.start()
        while len(told) < 8:
            thread.join(0.02)
            assert thread.is_alive()
        server.kill()
        thread.join()
        client.close()
        with Bank.open(tmp_path / "bank" / "s") as bank:
            assert bank.verify() == []
            versions = [info.version for info in bank.versions("a")]
            assert versions == list(range(1, len(versions) + 1))
            assert told == versions[: len(told)] and len(versions) - len(told) in (0, 1)
            for version in told:
                assert bank.get("a", version).tensors["level"].item() == (version - 1) % 200
        server.start()
        with Client(server.http_url, timeout=120) as again:
            assert again.segment(flat(0), ["a"])["a"].version == versions[-1]
            assert again.enroll("a", [flat(0)], [ALL]).version == versions[-1] + 1


def test_a_bank_of_another_artifact(served: Server, tmp_path: Path) -> None:
    """Errors of the bank keep their kind over the wire."""
    bank = bank_of(served, "grey")
    with Client(served.http_url, "grey", timeout=120) as client:
        client.enroll("kept", [flat(1)], [ALL])
        bank.rename(tmp_path / "aside")
        try:
            Bank.open(bank, "0" * 64, create=True).close()
            for ask in (lambda: client.segment(flat(1)), lambda: client.enroll("kept", [flat(1)], [ALL])):
                with pytest.raises(FssError) as caught:
                    ask()
                assert (caught.value.code, caught.value.exit_code) == ("bank_of_other_artifact", 5)
        finally:
            shutil.rmtree(bank)
            (tmp_path / "aside").rename(bank)
        assert client.segment(flat(1), ["kept"])["kept"].mask.all()


def test_local_and_served_banks_are_the_same(served: Server, written: Path) -> None:
    with Client(served.http_url, "grey", timeout=120) as client:
        client.enroll("both", [flat(120)], [ALL])
    local = open_deployment(written / "artifact", bank_of(served, "grey"), threads=1)
    assert local.segment(flat(120), ["both"])["both"].mask.all()
