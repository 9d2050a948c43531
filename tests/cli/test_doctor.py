"""`trainwright doctor`: true to the machine, useful advice, exit code 1 only if nothing trains."""

from __future__ import annotations

import json
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import typer
from typer.testing import CliRunner

from trainwright.cli.doctor import doctor
from trainwright.errors import UserError
from trainwright.training import calibrate, checkup, machine
from trainwright.training.calibrate import AllReduceSpeed, MatmulSpeed, MemoryBandwidth

app = typer.Typer(pretty_exceptions_enable=False)
app.command()(doctor)

REPOSITORY = Path(__file__).resolve().parents[2]


def run_doctor(*arguments: str):
    return CliRunner().invoke(app, list(arguments), env={"COLUMNS": "120"})


def findings_of(*arguments: str) -> dict[str, dict]:
    result = run_doctor("--json", *arguments)
    document = json.loads(result.stdout)
    assert document["can_train"] is (result.exit_code == 0)
    return {finding["name"]: finding for finding in document["findings"]}


@pytest.fixture
def measured(monkeypatch):
    """Stands in for the measurements: bf16 twice as fast as fp32, fp16 ten times slower."""
    rates = {"fp32": 3e11, "bf16": 6e11, "fp16": 3e10}
    monkeypatch.setattr(
        calibrate,
        "measure_matmul",
        lambda device, precision: MatmulSpeed(precision, 512, 3, rates[precision], 1e12),
    )
    monkeypatch.setattr(calibrate, "measure_bandwidth", lambda device: MemoryBandwidth(1, 2e10))
    reduced = [
        AllReduceSpeed("gloo", 2, 1_000, 0.0004, 2.5e6),
        AllReduceSpeed("gloo", 2, 16_000_000, 0.016, 1e9),
    ]
    monkeypatch.setattr(calibrate, "measure_all_reduce", lambda workers, backend: reduced)
    monkeypatch.setattr(checkup, "compile_failure", lambda device: None)


def test_quick_says_what_is_here_and_measures_nothing(monkeypatch):
    for name in ("measure_matmul", "measure_bandwidth", "measure_all_reduce"):
        monkeypatch.setattr(calibrate, name, None)
    monkeypatch.setattr(checkup, "compile_failure", None)
    found = findings_of("--quick")
    assert found["torch"]["value"].startswith(torch.__version__)
    assert found["CPU"]["fact"] == machine.usable_cores()
    assert found["memory"]["fact"] == machine.usable_memory()
    assert "gloo" in found["backends"]["fact"]
    assert not [name for name in found if name.startswith(("matmul", "all-reduce"))]


@pytest.mark.skipif(torch.cuda.is_available(), reason="the figures are those of a CPU machine")
def test_the_table_shows_speeds_with_units_and_warns_of_slow_arithmetic(measured):
    result = run_doctor()
    assert result.exit_code == 0
    assert "300 GFLOP/s" in result.output and "20.0 GB/s" in result.output
    assert "0.400 ms (gloo, 2 workers)" in result.output
    assert "16.0 ms, 1.00 GB/s" in result.output
    assert "10 × slower than fp32" in result.output and "precision: fp16" in result.output
    assert "precision: bf16" not in result.output
    assert "This machine can train" in result.output


def test_missing_extras_name_their_command_and_do_not_fail(monkeypatch):
    monkeypatch.setattr(checkup, "EXTRAS", {"track": ("no-such-tracker", "rich")})
    found = findings_of("--quick")
    assert found["no-such-tracker"]["value"] == "not installed: pip install no-such-tracker"
    assert found["rich"]["state"] == "good"


def test_a_missing_core_package_fails_with_its_command(monkeypatch):
    monkeypatch.setitem(checkup.CORE, "no-such-core", "no_such_core")
    result = run_doctor("--quick")
    assert result.exit_code == 1
    assert "pip install no-such-core" in result.output and "cannot work" in result.output


def test_a_torch_that_does_not_import_or_is_old_fails(monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.4.1+cpu")
    assert findings_of("--quick")["torch"]["advice"] == "pip install 'torch>=2.11'"
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "torch", None)
    (finding,) = checkup.check_torch()
    assert finding.state == "broken" and "does not import" in finding.value


def test_an_old_python_fails(monkeypatch):
    monkeypatch.setattr(checkup, "LEAST_PYTHON", (99, 0))
    assert run_doctor("--quick").exit_code == 1


def test_scarce_means_get_advice(monkeypatch):
    monkeypatch.setattr(machine, "usable_cores", lambda: 1)
    monkeypatch.setattr(machine, "usable_memory", lambda: 2_000_000_000)
    usage = SimpleNamespace(free=3_000_000_000, total=4_000_000_000)
    monkeypatch.setattr(checkup.shutil, "disk_usage", lambda path: usage)
    monkeypatch.setattr(machine, "compile_obstacle", lambda device: "no compiler on the PATH: g++")
    found = findings_of("--quick")
    assert {name for name in ("CPU", "memory", "disk") if found[name]["state"] == "note"} == {
        "CPU",
        "memory",
        "disk",
    }
    assert all(found[name]["advice"] for name in ("CPU", "memory", "disk"))
    assert found["torch.compile"]["state"] == "missing"
    assert "apt install" in found["torch.compile"]["advice"]


def test_settings_that_surprise_are_told(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(machine, "usable_cores", lambda: 8)
    found = {finding.name: finding for finding in checkup.check_settings()}
    assert found["Hugging Face hub"].fact is True
    assert "unset it" in found["OMP_NUM_THREADS"].advice
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("OMP_NUM_THREADS", "8")
    found = {finding.name: finding for finding in checkup.check_settings()}
    assert found["Hugging Face hub"].fact is False and "OMP_NUM_THREADS" not in found


def test_workers_that_cannot_talk_are_no_obstacle_to_one_worker(measured, monkeypatch):
    def broken(workers, backend):
        raise RuntimeError("[gloo] no route to host")

    monkeypatch.setattr(calibrate, "measure_all_reduce", broken)
    if torch.cuda.is_available():
        pytest.skip("on GPUs the advice is another")
    result = run_doctor()
    assert result.exit_code == 0
    assert "[gloo] no route to host" in result.output and "GLOO_SOCKET_IFNAME=lo" in result.output


def test_a_compiler_that_fails_is_reported_in_one_line(monkeypatch):
    def broken(function):
        raise RuntimeError("CppCompileError: fatal\nmany more lines")

    monkeypatch.setattr(torch, "compile", broken)
    assert checkup.compile_failure("cpu") == "CppCompileError: fatal"
    monkeypatch.setattr(torch, "compile", lambda function: lambda values: values)
    assert checkup.compile_failure("cpu") == "the compiled result is wrong"
    monkeypatch.setattr(torch, "compile", lambda function: function)
    assert checkup.compile_failure("cpu") is None


@pytest.mark.slow
def test_a_tiny_function_is_really_compiled():
    if machine.compile_obstacle() is not None:
        pytest.skip(f"torch.compile cannot work here: {machine.compile_obstacle()}")
    assert checkup.compile_failure("cpu") is None


def test_the_lists_of_packages_are_those_of_the_project():
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]

    def names(requirements: list[str]) -> set[str]:
        return {requirement.split(">")[0].split("=")[0].strip() for requirement in requirements}

    assert set(checkup.CORE) == names(project["dependencies"])
    for extra, packages in checkup.EXTRAS.items():
        assert set(packages) == names(project["optional-dependencies"][extra])
    assert project["requires-python"] == f">={'.'.join(map(str, checkup.LEAST_PYTHON))}"
    torch_requirement = next(
        requirement for requirement in project["dependencies"] if requirement.startswith("torch>")
    )
    assert torch_requirement == f"torch>={'.'.join(map(str, checkup.LEAST_TORCH))}"


def test_help_has_an_example():
    assert "trainwright doctor --quick" in run_doctor("--help").output


def test_calibrating_measures_and_says_where_it_is_kept(monkeypatch, tmp_path):
    from trainwright.planner.cluster.calibration import Calibration, Crowd, Sample, machine_facts
    from trainwright.training import calibration

    def calibrate(machine, job, precision, *, say):
        say("at it")
        samples = (
            Sample("product", "bf16", (1000, 1000, 1000), 0.01),
            Sample("elements", "", (10**6,), 1e-4),
        )
        return Calibration(machine_facts(machine), "2026-01-01", (Crowd(2, 1, samples),))

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(calibration, "calibrate", calibrate)
    result = run_doctor("--calibrate")
    assert result.exit_code == 0, result.output
    assert "bf16 200 GFLOP/s" in result.stdout and "memory 10.0 GB/s" in result.stdout
    assert str(tmp_path / "trainwright" / "calibration") in result.stdout
    document = json.loads(run_doctor("--calibrate", "--json").stdout)
    assert document["crowds"][0]["samples"][0]["seconds"] == 0.01


def test_an_interrupted_calibration_says_that_it_goes_on(monkeypatch):
    from trainwright.training import calibration

    def calibrate(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(calibration, "calibrate", calibrate)
    result = run_doctor("--calibrate")
    assert result.exit_code == 130 and "goes on" in result.output


def test_a_recipe_without_calibrating_is_a_mistake():
    result = run_doctor("recipe.yaml")
    assert isinstance(result.exception, UserError)
    assert "--calibrate" in str(result.exception)
