"""The stateless path: what the models compute is what the local path computes, bit for bit.

First inside this process, which shows what the models compute; then in the real server, which shows that it takes the
configs, joins no requests it should not, names errors, and changes versions under load without losing a request.
"""

from __future__ import annotations

import io
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fssdeploy.artifact import load
from fssdeploy.protocol import BATCH
from fssdeploy.serving.check import check
from fssdeploy.serving.configs import Options
from fssdeploy.serving.environment import Environment
from fssdeploy.serving.names import Names
from fssdeploy.serving.repository import object_array, png, write_repository
from fssdeploy.serving.server import Server
from fssdeploy.serving.versions import promote, rollback
from tests.serving.grey import bright, write_artifact
from tests.serving.inprocess import Host, TritonError, python_backend

SIZES = ((60, 80), (33, 20), (300, 500), (28, 28))
NAMES = Names("grey")
Infer = Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]
Shot = tuple[np.ndarray, np.ndarray]


def npy(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def jpeg(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(array).save(stream, "JPEG", quality=95)
    return stream.getvalue()


def files(
    queries: Sequence[np.ndarray], shots: Sequence[Shot], encode: Callable[[np.ndarray], bytes] = png
) -> dict[str, np.ndarray]:
    """The inputs of the ensemble."""
    return {
        "pictures": object_array([encode(query) for query in queries]),
        "support_pictures": object_array([encode(picture) for picture, _ in shots]),
        "support_masks": object_array([png(mask) for _, mask in shots]),
    }


def shots_of(count: int) -> list[Shot]:
    return [bright(40 + 7 * number, 50 + 3 * number, 170 + 5 * number) for number in range(count)]


def check_parity(infer: Infer, artifact: Path, shots: int, queries: int) -> None:
    """The masks and scores of the local path, for several sizes of pictures."""
    local = load(artifact)
    pairs = shots_of(shots)
    state = local.enroll(local.encode([picture for picture, _ in pairs]), [mask for _, mask in pairs])
    for height, width in SIZES:
        pictures = [bright(height, width, 150 + 9 * number)[0] for number in range(queries)]
        expected = local.segment(local.encode(pictures), {"x": state})
        found = infer(files(pictures, pairs))
        assert found["masks"].shape == (queries, height, width) and found["masks"].dtype == np.uint8
        for number in range(queries):
            np.testing.assert_array_equal(found["masks"][number], expected.binary(number, "x").astype(np.uint8))
            # The server's NumPy is another, whose exponential may round otherwise.
            assert found["scores"][number] == pytest.approx(expected.score(number, "x"), rel=1e-6)
        assert 0 < found["masks"].mean() < 1


def written(folder: Path, batch: int | str, **options: Any) -> tuple[Path, Path]:
    """An artifact and a repository that serves it."""
    artifact = write_artifact(folder / "artifact", batch)
    write_repository([str(artifact)], folder / "repository", Options(**options))
    return artifact, folder / "repository"


@pytest.mark.parametrize(("batch", "backend"), [(BATCH, "onnxruntime"), (BATCH, "python"), (1, "python")])
def test_masks_are_the_local_ones(batch: int | str, backend: str, tmp_path: Path) -> None:
    artifact, repository = written(tmp_path, batch, backend=backend)
    with python_backend():
        host = Host(repository)
        for shots, queries in ((1, 1), (5, 1), (2, 3)):
            check_parity(lambda inputs: host.infer("grey", inputs), artifact, shots, queries)


def test_a_graph_of_one_row_takes_one_picture_and_one_shot(tmp_path: Path) -> None:
    artifact, repository = written(tmp_path, 1)
    with python_backend():
        check_parity(lambda inputs: Host(repository).infer("grey", inputs), artifact, 1, 1)


def test_masks_of_a_real_system_are_the_local_ones(tiny_artifact: Path, tmp_path: Path) -> None:
    write_repository([str(tiny_artifact)], tmp_path / "r", Options(backend="python"))
    with python_backend():
        host = Host(tmp_path / "r")
        local = load(tiny_artifact)
        for count in (1, 5):
            shots = shots_of(count)
            state = local.enroll(local.encode([picture for picture, _ in shots]), [mask for _, mask in shots])
            query = bright(90, 70)[0]
            expected = local.segment(local.encode([query]), {"x": state})
            found = host.infer("fsdino", files([query], shots))
            np.testing.assert_array_equal(found["masks"][0], expected.binary(0, "x").astype(np.uint8))
            assert found["scores"][0] == np.float32(expected.score(0, "x"))


def test_every_kind_of_picture_and_mask(tmp_path: Path) -> None:
    _, repository = written(tmp_path, BATCH)
    ((picture, mask),) = shots_of(1)
    query = bright(60, 80)[0]
    with python_backend():
        host = Host(repository)
        plain = host.infer("grey", files([query], [(picture, mask)]))
        as_arrays = files([query], [(picture, mask)], npy)
        for masks in (npy(mask), npy(mask.astype(np.uint8)), b"box:0,0,25,20", b"polygon:0,0,25,0,25,20,0,20"):
            found = host.infer("grey", {**as_arrays, "support_masks": object_array([masks])})
            np.testing.assert_array_equal(found["masks"], plain["masks"])
        lossy = host.infer("grey", files([query], [(picture, mask)], jpeg))
        assert np.mean(lossy["masks"] != plain["masks"]) < 0.1


def bad_requests() -> dict[str, tuple[dict[str, np.ndarray], str]]:
    """Inputs of the ensemble that it must refuse, with the code of the error."""
    ((picture, mask),) = shots_of(1)
    query = bright(60, 80)[0]
    good = files([query], [(picture, mask)])
    return {
        "no picture": ({**good, "pictures": object_array([b"hello"])}, "picture_unreadable"),
        "nothing": ({**good, "pictures": object_array([b""])}, "file_empty"),
        "truncated": ({**good, "pictures": object_array([jpeg(query)[:600]])}, "picture_damaged"),
        "a path": ({**good, "pictures": object_array([b"/etc/passwd"])}, "picture_unreadable"),
        "other sizes": (files([query, query[:50]], [(picture, mask)]), "picture_sizes"),
        "two masks": ({**good, "support_masks": object_array([png(mask)] * 2)}, "masks_count"),
        "an empty mask": ({**good, "support_masks": object_array([png(mask & False)])}, "mask_empty"),
        "a mask of another size": ({**good, "support_masks": object_array([png(mask[:-1])])}, "mask_size"),
        "a point": ({**good, "support_masks": object_array([b"box:0,0,1,1"])}, "object_vanishes"),
        "an array of floats": ({**good, "pictures": object_array([npy(query / 2)])}, "not_a_picture"),
        "a bomb": ({**good, "pictures": object_array([bomb()])}, "picture_too_large"),
    }


def bomb() -> bytes:
    """A PNG of 9000 x 9000 pixels in a few kB."""
    stream = io.BytesIO()
    Image.new("1", (9000, 9000)).save(stream, "PNG")
    return stream.getvalue()


def test_bad_requests_are_named_and_leave_their_neighbours_alone(tmp_path: Path) -> None:
    _, repository = written(tmp_path, BATCH)
    with python_backend():
        host = Host(repository)
        for inputs, code in bad_requests().values():
            with pytest.raises(TritonError, match=rf"^error\[{code}\]: ") as caught:
                host.infer("grey", inputs)
            assert caught.value.code == TritonError.INVALID_ARG
        good = {"pictures": object_array([png(bright(60, 80)[0])])}
        bad = {"pictures": object_array([b"hello"])}
        answers = host.execute(NAMES.prepare_query, good, bad, good)
        assert [answer.error is None for answer in answers] == [True, False, True]


def test_requests_of_a_batch_run_together_and_fail_apart(tmp_path: Path) -> None:
    _, repository = written(tmp_path, BATCH)
    rows = np.random.default_rng(0).integers(0, 256, (6, 3, 28, 28), np.uint8)
    with python_backend():
        host = Host(repository)
        model = host.load(NAMES.stage("encoder"))
        batches: list[int] = []
        run = model._engine.run
        model._engine.run = lambda stage, inputs: batches.append(len(inputs["picture"])) or run(stage, inputs)
        whole = host.infer(NAMES.stage("encoder"), {"picture": rows})["grey"]
        parts = ({"picture": rows[:1]}, {"picture": rows[1:4]}, {"picture": rows[4:]})
        answers = host.execute(NAMES.stage("encoder"), *parts)
        assert batches == [6, 6]
        np.testing.assert_array_equal(np.concatenate([each.outputs[0].array for each in answers]), whole)
        answers = host.execute(NAMES.stage("encoder"), parts[0], {"picture": rows[:, :1]}, {}, parts[2])
        assert [each.error is None for each in answers] == [True, False, False, True]
        assert "wrong_shape" in str(answers[1].error) and "input_missing" in str(answers[2].error)
        np.testing.assert_array_equal(answers[3].outputs[0].array, whole[4:])


def started(repository: Path, environment: Environment, log: Path) -> Server:
    """A server on ports that no other test's server looks at: those search from 8000 on."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(3)]
        http, grpc, metrics = (each.getsockname()[1] for each in sockets)
    return Server(repository, environment, http_port=http, grpc_port=grpc, metrics_port=metrics, log=log)


@dataclass(frozen=True)
class Served:
    """A real server, what it serves and from what."""

    server: Server
    repository: Path
    artifact: Path

    def infer(self, inputs: dict[str, np.ndarray], model: str = "grey") -> dict[str, np.ndarray]:
        """One request on a connection of its own. Raises tritonclient's InferenceServerException."""
        from tritonclient import http

        with http.InferenceServerClient(self.server.http_url, network_timeout=120, connection_timeout=120) as client:
            given = []
            for name, array in inputs.items():
                kind = {"object": "BYTES", "uint8": "UINT8", "float32": "FP32", "int32": "INT32"}[array.dtype.name]
                given.append(http.InferInput(name, list(array.shape), kind).set_data_from_numpy(array))
            answer = client.infer(model, given)
            return {each["name"]: answer.as_numpy(each["name"]) for each in answer.get_response()["outputs"]}

    def executed(self, model: str) -> dict[int, int]:
        """How often the model ran, by the rows of the batch."""
        from tritonclient import http

        with http.InferenceServerClient(self.server.http_url) as client:
            (stats,) = client.get_inference_statistics(model)["model_stats"]
        return {int(each["batch_size"]): int(each["compute_infer"]["count"]) for each in stats["batch_stats"]}


@pytest.fixture(scope="module")
def served(server_environment: Environment, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Backend onnxruntime, requests not joined; `grey` with a free batch and `one` with graphs of one row."""
    folder = tmp_path_factory.mktemp("served")
    artifact, single = write_artifact(folder / "artifact"), write_artifact(folder / "single", 1)
    write_repository([str(artifact), f"one={single}"], folder / "repository", Options(queue=64))
    with started(folder / "repository", server_environment, folder / "log") as server:
        yield Served(server, folder / "repository", artifact)
    assert check(folder / "repository") == [], "a server changes nothing"


@pytest.fixture(scope="module")
def served_rows(server_environment: Environment, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Backend python, a graph of one row, requests joined, two instances."""
    folder = tmp_path_factory.mktemp("rows")
    options = Options(backend="python", delay_us=300_000, instances=2)
    artifact = write_artifact(folder / "artifact", 1)
    write_repository([str(artifact)], folder / "repository", options)
    with started(folder / "repository", server_environment, folder / "log") as server:
        yield Served(server, folder / "repository", artifact)


def at_once(count: int, call: Callable[[int], Any]) -> list[Any]:
    """The results, or exceptions, of calls that begin together."""
    results: list[Any] = [None] * count
    start = threading.Barrier(count)

    def run(number: int) -> None:
        start.wait()
        try:
            results[number] = call(number)
        except Exception as error:
            results[number] = error

    threads = [threading.Thread(target=run, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


@pytest.mark.parametrize(("shots", "queries"), [(1, 1), (5, 1), (2, 3)])
def test_the_real_servers_masks_are_the_local_ones(served: Served, shots: int, queries: int) -> None:
    check_parity(served.infer, served.artifact, shots, queries)


@pytest.mark.parametrize(("shots", "queries"), [(1, 1), (5, 2)])
def test_the_real_servers_masks_row_by_row(served_rows: Served, shots: int, queries: int) -> None:
    check_parity(served_rows.infer, served_rows.artifact, shots, queries)


def test_the_real_server_runs_graphs_of_one_row(served: Served) -> None:
    from tritonclient.utils import InferenceServerException

    check_parity(lambda inputs: served.infer(inputs, "one"), served.artifact.with_name("single"), 1, 1)
    for inputs in (files([bright(30, 40)[0]] * 2, shots_of(1)), files([bright(30, 40)[0]], shots_of(2))):
        with pytest.raises(InferenceServerException, match=r"Expected \[1\], got \[2\]"):
            served.infer(inputs, "one")


def test_the_real_server_joins_only_what_it_should(served: Served, served_rows: Served) -> None:
    rows = np.random.default_rng(0).integers(0, 256, (12, 1, 3, 28, 28), np.uint8)
    model = NAMES.stage("encoder")
    single, joined = (
        at_once(12, lambda number, place=place: place.infer({"picture": rows[number]}, model)["grey"])
        for place in (served, served_rows)
    )
    for one, other in zip(single, joined, strict=True):
        np.testing.assert_array_equal(one, other)
    assert max(served_rows.executed(model)) > 1
    before = served.executed(model)
    served.infer({"picture": rows[:5, 0]}, model)
    assert {size for size, count in served.executed(model).items() if count > before.get(size, 0)} == {5}
    # Parity ran with batches of 1, 2, 3 and 5 rows; twelve single ones that come together stay single.
    assert served.executed(model)[1] >= 12 and set(served.executed(model)) <= {1, 2, 3, 5}


def test_the_real_server_names_errors_and_goes_on(served: Served) -> None:
    from tritonclient.utils import InferenceServerException

    for inputs, code in bad_requests().values():
        with pytest.raises(InferenceServerException, match=rf"error\[{code}\]: ") as caught:
            served.infer(inputs)
        assert caught.value.status() == "400"
    good = files([bright(60, 80)[0]], shots_of(1))
    bad = bad_requests()["truncated"][0]
    answers = at_once(8, lambda number: served.infer(bad if number % 2 else good))
    assert [isinstance(answer, Exception) for answer in answers] == [False, True] * 4


def test_the_real_server_refuses_what_must_not_wait(served: Served) -> None:
    """More requests than the queue holds: each is answered or refused at once, and the server goes on."""
    query = bright(600, 800)[0]
    alone = {"pictures": object_array([png(query)])}
    for inputs, model in ((alone, NAMES.prepare_query), (files([query], shots_of(1)), NAMES.stateless)):
        answers = at_once(160, lambda number, inputs=inputs, model=model: served.infer(inputs, model))
        refused = [answer for answer in answers if isinstance(answer, Exception)]
        assert all("Exceeds maximum queue size" in str(each) for each in refused), set(map(str, refused))
        assert 0 < len(refused) < 160
        served.infer(inputs, model)


def test_promotion_and_rollback_under_load(served: Served, tmp_path: Path) -> None:
    """On both paths every answer is that of one of the two versions, and none is an error."""
    new = write_artifact(tmp_path / "new", width=60)
    query, shots = bright(90, 70, 160)[0], shots_of(2)
    inputs = files([query], shots)
    expected = []
    for artifact in (served.artifact, new):
        local = load(artifact)
        state = local.enroll(local.encode([picture for picture, _ in shots]), [mask for _, mask in shots])
        expected.append(local.segment(local.encode([query]), {"x": state}).binary(0, "x"))
    assert (expected[0] != expected[1]).any()
    name = object_array([b"thing"])
    enrolment = {"name": name, "pictures": inputs["support_pictures"], "masks": inputs["support_masks"]}
    served.infer(enrolment, NAMES.enroll)
    query_alone = {"picture": inputs["pictures"], "names": name}
    stop = threading.Event()
    answers: list[list[int | str]] = [[], [], []]

    def hammer(own: list[int | str]) -> None:
        enrolled = own is answers[0]
        while not stop.is_set():
            try:
                answer = served.infer(query_alone, NAMES.segment) if enrolled else served.infer(inputs)
                mask = answer["masks"][0].astype(bool)
                own.append(next((i for i, each in enumerate(expected) if np.array_equal(mask, each)), "neither"))
            except Exception as error:
                own.append(str(error))

    threads = [threading.Thread(target=hammer, args=(own,)) for own in answers]
    for thread in threads:
        thread.start()
    try:
        promote(served.repository, "grey", new, served.server.http_url)
        promoted = served.infer(inputs)["masks"][0].astype(bool)
        rollback(served.repository, "grey", served.server.http_url)
        back = served.infer(inputs)["masks"][0].astype(bool)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    np.testing.assert_array_equal(promoted, expected[1])
    np.testing.assert_array_equal(back, expected[0])
    for own in answers:
        assert set(own) == {0, 1}, set(own)


def test_the_stand_in_refuses_what_the_real_backend_refuses(served: Served) -> None:
    model = NAMES.stage("encoder")
    config = served.server.control.config(model)
    config["output"][0]["dims"] = [28, 27]
    answer = served.server.control.load(model, config)
    assert not answer.ok and "output 'grey' is [-1, 28, 27]" in answer.error, answer.error
    assert served.server.control.load(model).ok
    check_parity(served.infer, served.artifact, 1, 1)
