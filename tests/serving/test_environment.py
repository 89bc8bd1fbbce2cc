"""The server's private environment: found, complete, renewed in one step, and clear words for what is wrong with it."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import pytest

from fssdeploy.errors import FssError, InputError, MachineError
from fssdeploy.serving import environment as env
from fssdeploy.serving.environment import SETTING, Environment, default_path, locate, ready, refresh, set_up
from tests.cli.command import fssdeploy

CODE = {
    "fssdeploy/__init__.py": b"WORD = 1\n",
    "fssdeploy/serving/backends/onnxruntime/model.py": b"stand_in = 1\n",
}


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Environment:
    """What a complete environment looks like, without its contents; importing there always succeeds."""
    environment = Environment(tmp_path / "serving")
    packages = environment.path / "venv" / "lib" / "python3.11" / "site-packages"
    (packages / "numpy-1.26.4.dist-info").mkdir(parents=True)
    environment.python.parent.mkdir()
    environment.python.symlink_to(sys.executable)
    environment.backends.mkdir(parents=True)
    write_stamp(environment, env.requirements())
    monkeypatch.setattr(env, "_verify", lambda *_: None)
    monkeypatch.setattr(env, "_package_files", lambda: dict(CODE))
    return environment


def write_stamp(environment: Environment, requirements: dict[str, str], form: int = env.FORMAT) -> None:
    stamp = {"format": form, "requirements": requirements, "libraries": ""}
    (environment.path / "stamp.json").write_text(json.dumps(stamp))


def copies(environment: Environment) -> list[str]:
    return sorted(path.name for path in (environment.path / "code").iterdir())


def word(environment: Environment) -> str:
    """What the package in use says, read as Python's site module would."""
    code = f"import site; site.addsitedir({str(environment._packages)!r}); import fssdeploy; print(fssdeploy.WORD)"
    run = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, check=True)
    return run.stdout.strip()


def test_its_place_can_be_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(SETTING, raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_path() == tmp_path / ".cache" / "fssdeploy" / "serving"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert default_path() == tmp_path / "cache" / "fssdeploy" / "serving"
    monkeypatch.setenv(SETTING, str(tmp_path / "here"))
    assert default_path() == tmp_path / "here"


def test_only_a_complete_one_is_found(fake: Environment, tmp_path: Path) -> None:
    assert locate(fake.path) == fake
    assert locate(tmp_path / "nothing") is None
    write_stamp(fake, {}, form=env.FORMAT + 1)
    assert locate(fake.path) is None
    (fake.path / "stamp.json").write_text("{half")
    assert locate(fake.path) is None


def test_what_is_missing_or_old_is_said_with_the_command_that_mends_it(fake: Environment, tmp_path: Path) -> None:
    with pytest.raises(MachineError) as caught:
        ready(tmp_path / "nothing")
    assert (caught.value.code, caught.value.fix) == ("server_missing", "Run: fssdeploy serve --setup")
    write_stamp(fake, {**env.requirements(), "onnxruntime": "1.0"})
    with pytest.raises(MachineError) as caught:
        ready(fake.path)
    assert (caught.value.code, caught.value.fix) == ("serving_environment_old", "Run: fssdeploy serve --setup")


def test_another_numpy_is_found_before_the_server_answers_garbage(fake: Environment) -> None:
    fake.check()
    (fake._packages / "numpy-1.26.4.dist-info").rename(fake._packages / "numpy-2.4.6.dist-info")
    with pytest.raises(MachineError, match="numpy-2.4.6") as caught:
        ready(fake.path)
    assert caught.value.code == "serving_numpy"


def test_a_changed_package_is_copied_and_the_one_before_stays_for_running_servers(
    fake: Environment, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert refresh(fake)
    first = fake.code
    assert word(fake) == "1"
    assert not refresh(fake)
    digests = [first]
    for number in (2, 3):
        changed = {**CODE, "fssdeploy/__init__.py": f"WORD = {number}\n".encode()}
        monkeypatch.setattr(env, "_package_files", lambda changed=changed: changed)
        assert refresh(fake)
        assert word(fake) == str(number)
        digests.append(fake.code)
    assert copies(fake) == sorted(digests[1:])
    assert (fake.backends / "onnxruntime" / "model.py").read_bytes() == b"stand_in = 1\n"
    assert list((fake.path / "code" / digests[2]).rglob("*.pyc"))  # compiled: servers have nothing to write


def test_a_package_that_does_not_import_there_is_not_put_to_use(
    fake: Environment, monkeypatch: pytest.MonkeyPatch
) -> None:
    refresh(fake)
    first = fake.code
    monkeypatch.undo()
    monkeypatch.setattr(env, "IMPORTS", ("fssdeploy",))
    monkeypatch.setattr(env, "_package_files", lambda: {**CODE, "fssdeploy/__init__.py": b"raise OSError('no way')"})
    with pytest.raises(MachineError, match="in the serving environment failed: OSError: no way") as caught:
        refresh(fake)
    assert caught.value.code == "serving_setup"
    assert fake.code == first
    assert copies(fake) == [first]


def test_many_at_once_renew_it_without_harm(fake: Environment) -> None:
    code = (
        "import sys; from pathlib import Path; from fssdeploy.serving import environment as env;"
        "env._verify = lambda *_: None; env._package_files = lambda: {"
        "'fssdeploy/__init__.py': b'WORD = 7', 'fssdeploy/serving/backends/onnxruntime/model.py': b''};"
        "env.refresh(env.Environment(Path(sys.argv[1])))"
    )
    runs = [subprocess.Popen([sys.executable, "-c", code, str(fake.path)], stderr=subprocess.PIPE) for _ in range(4)]
    assert [(run.wait(), run.communicate()[1]) for run in runs] == [(0, b"")] * 4
    assert word(fake) == "7"
    assert copies(fake) == [fake.code]


def test_the_package_is_copied_with_its_parts_in_their_places() -> None:
    files = env._package_files()
    assert {
        "fssdeploy/__init__.py",
        "fssdeploy/pipeline.py",
        "fssdeploy/serving/__init__.py",
        "fssdeploy/serving/models/answers.py",
        "fssdeploy/serving/backends/onnxruntime/model.py",
    } <= files.keys()
    assert all(name.endswith(".py") for name in files)


@pytest.fixture
def no_commands(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Commands of a set-up are noted instead of run, and each call of pip fails."""
    ran: list[list[str]] = []

    def run(command: Sequence[str | Path], what: str, fix: str = "") -> None:
        ran.append([str(part) for part in command])
        if "pip" in ran[-1]:
            raise MachineError("serving_setup", f"{what} failed", "no network", fix)

    monkeypatch.setattr(env, "_run", run)
    return ran


def test_a_set_up_that_fails_leaves_nothing(tmp_path: Path, no_commands: list[list[str]]) -> None:
    target = tmp_path / "new" / "serving"
    with pytest.raises(MachineError, match="no network"):
        set_up(target)
    assert list(tmp_path.iterdir()) == []
    assert no_commands[0][1:3] == ["-m", "venv"]
    assert {"numpy==1.26.4", f"onnxruntime=={version('onnxruntime')}"} <= set(no_commands[1])


def test_a_set_up_that_fails_leaves_an_old_environment_as_it_is(
    fake: Environment, no_commands: list[list[str]]
) -> None:
    write_stamp(fake, {**env.requirements(), "numpy": "1.25.0"})
    with pytest.raises(MachineError, match="no network"):
        set_up(fake.path)
    assert locate(fake.path)
    assert [path.name for path in fake.path.parent.iterdir()] == ["serving"]


def test_what_is_there_and_fits_is_kept(fake: Environment, no_commands: list[list[str]]) -> None:
    assert set_up(fake.path) == fake
    assert not [command for command in no_commands if "pip" in command]


def test_a_folder_of_something_else_is_never_replaced(tmp_path: Path, no_commands: list[list[str]]) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(InputError) as caught:
        set_up(tmp_path)
    assert caught.value.code == "not_a_serving_environment"
    assert (tmp_path / "thesis.tex").exists()
    assert no_commands == []


@pytest.mark.parametrize(
    ("function", "answer", "code"),
    [("system", "Darwin", "server_platform"), ("machine", "aarch64", "server_platform")],
)
def test_machines_without_a_server_are_told_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str, answer: str, code: str
) -> None:
    monkeypatch.setattr(platform, function, lambda: answer)
    with pytest.raises(MachineError) as caught:
        set_up(tmp_path / "serving")
    assert caught.value.code == code
    assert list(tmp_path.iterdir()) == []


def test_a_python_without_a_stub_is_told_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(env, "requirements", lambda: {"python": "3.14"})
    with pytest.raises(MachineError, match=r"3\.11 or 3\.12") as caught:
        set_up(tmp_path / "serving")
    assert caught.value.code == "server_python"


def test_a_missing_libpython_is_named_with_its_package(tmp_path: Path) -> None:
    stub = tmp_path / "stub"
    line = "stub: error while loading shared libraries: libpython3.11.so.1.0: cannot open shared object file"
    stub.write_text(f"#!/bin/sh\necho '{line}' >&2; exit 127\n")
    stub.chmod(0o755)
    with pytest.raises(MachineError, match=r"libpython3\.11\.so\.1\.0: cannot open.*apt-get install libpython3\.11"):
        env._library_folder(stub, "3.11")


def test_a_libpython_beside_the_interpreter_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stub = tmp_path / "stub"
    found = f'[ "$LD_LIBRARY_PATH" = "{tmp_path}" ]'
    stub.write_text(f"#!/bin/sh\n{found} || echo 'stub: error while loading shared libraries: libpython' >&2\n")
    stub.chmod(0o755)
    monkeypatch.setattr(env.sysconfig, "get_config_var", lambda _: str(tmp_path))
    assert env._library_folder(stub, "3.11") == str(tmp_path)


def test_an_old_linux_is_named_as_the_reason(tmp_path: Path) -> None:
    binary = tmp_path / "tritonserver"
    line = "tritonserver: /lib/libc.so.6: version `GLIBC_2.34' not found (required by tritonserver)"
    binary.write_text(f'#!/bin/sh\necho "{line.replace("`", chr(92) + "`")}" >&2; exit 1\n')
    binary.chmod(0o755)
    with pytest.raises(MachineError, match="GLIBC_2.34") as caught:
        env._starts(binary, {}, "the server")
    assert caught.value.code == "server_libraries"


def test_the_command_needs_a_repository_or_setup() -> None:
    fssdeploy("serve").check_refused("usage", 3)


def test_the_command_says_how_to_get_a_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    line = fssdeploy("serve", tmp_path, "--env", tmp_path / "none").check_refused("server_missing", 4)
    assert "fssdeploy serve --setup" in line
    fssdeploy("serve", tmp_path, "--server", tmp_path / "none").check_refused("server_missing", 3)


def test_the_command_sets_up(fake: Environment) -> None:
    told = fssdeploy("serve", "--setup", "--env", fake.path, "--json").json
    assert told["environment"] == str(fake.path)
    assert told["requirements"]["numpy"] == "1.26.4"


def test_the_real_one_runs_what_runs_here_on_the_old_numpy(server_environment: Environment) -> None:
    names = ["numpy", *env.SAME_AS_HERE]
    code = f"import importlib.metadata as m; print([m.version(name) for name in {names}])"
    environment = {**os.environ, "PYTHONPATH": "/nowhere", **server_environment.variables()}
    run = subprocess.run(["python3", "-I", "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert run.stdout.strip() == str(["1.26.4", *map(version, env.SAME_AS_HERE)])
    assert server_environment.code == env._digest(env._package_files())
    env._verify(server_environment, server_environment.path / "code" / server_environment.code)


def test_the_real_load_generator_starts(server_environment: Environment) -> None:
    run = subprocess.run(
        [server_environment.perf_analyzer, "--version"], capture_output=True, text=True, env={}, check=True
    )
    assert "Perf Analyzer Version 2.51.0" in run.stdout + run.stderr


@pytest.mark.slow
def test_a_set_up_from_nothing_works(tmp_path: Path) -> None:
    """Needs a package index."""
    try:
        environment = set_up(tmp_path / "serving")
    except FssError as error:
        pytest.skip(f"THE SET-UP WAS NOT TESTED: {error.line()}")
    assert ready(environment.path) == environment
    assert sorted(path.name for path in environment.path.iterdir()) == [
        "code",
        "perf_analyzer",
        "server",
        "stamp.json",
        "venv",
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["serving"]
