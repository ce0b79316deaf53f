"""`ibxai doctor` on a machine that is fine, and on some that are not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torchvision

from ibxai import doctor
from ibxai.cli import main


def findings(text: str) -> dict[str, tuple[str, str]]:
    """about -> (status, text)"""
    lines = [line for line in text.splitlines() if line]
    return {line[5:34].strip(): (line[:5].strip(), line[34:]) for line in lines}


def test_a_machine_that_is_fine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["doctor", str(tmp_path / "not" / "there")])
    found = findings(capsys.readouterr().out)
    assert code == 0
    assert {status for status, _ in found.values()} <= {"ok", "warn", "--"}
    assert torch.__version__ in found["torchvision"][1]
    assert found["dataset sample"] == ("ok", "7 samples")
    assert found["dataset imagenet"] == ("--", "not set up here: give dataset.root")
    assert found["backbone efficientnet_lite0"] == ("ok", "weights are here")
    assert "extra dev" in found
    assert not (tmp_path / "not").exists()


def test_torchvision_of_another_torch(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def broken(*arguments: object) -> None:
        raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setattr(torchvision.ops, "nms", broken)
    monkeypatch.setattr(torch, "__version__", "2.6.0+cpu")
    assert main(["doctor"]) == 1
    status, text = findings(capsys.readouterr().out)["torchvision"]
    assert status == "FAIL"
    assert "whose partner is torchvision 0.21: pip install 'torchvision==0.21.*'" in text
    assert "torchvision::nms does not exist" in text


def test_wrong_and_missing_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    needed = ["hydra-core<1.0", "nosuchpackage>=2", "torch>=2.6", 'other; extra == "dev"', 'old; python_version < "3"']
    monkeypatch.setattr(doctor, "requires", lambda name: needed)
    found = list(doctor._packages())
    assert [f.status for f in found] == ["FAIL", "FAIL"]
    assert "hydra-core is 1." in found[0].text
    assert "<1.0 is needed" in found[0].text
    assert "nosuchpackage is not installed, >=2 is needed" in found[1].text
    assert [f.about for f in doctor._extras()] == ["extra dev"]


def test_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"GPU {index}")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (doctor.GIB, 2 * doctor.GIB))
    ones = torch.ones

    def on_first_only(*size: int, device: str) -> torch.Tensor:
        if device == "cuda:1":
            raise RuntimeError("no kernel image is available for execution on the device")
        return ones(*size)

    monkeypatch.setattr(torch, "ones", on_first_only)
    _, first, second = doctor._devices()
    assert first == ("ok", "cuda:0", "GPU 0, 1 of 2 GiB free")
    assert second.status == "FAIL"
    assert "no kernel image" in second.text


def test_outputs_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    (found,) = doctor._disk(tmp_path / "file" / "outputs")
    assert found.status == "FAIL"
    monkeypatch.setattr(doctor, "_LITTLE_DISK", 2**80)
    (found,) = doctor._disk(tmp_path / "outputs")
    assert found.status == "warn"


def test_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    for available, status in [(doctor.GIB, "warn"), (64 * doctor.GIB, "ok"), (None, "--")]:
        monkeypatch.setattr(doctor, "_available_memory", lambda available=available: available)
        (found,) = doctor._memory()
        assert found.status == status


def test_a_check_that_breaks_is_a_finding_and_the_others_go_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken() -> None:
        raise OSError("libgomp.so.1: cannot open shared object file")

    monkeypatch.setattr(doctor, "_torchvision", broken)
    assert main(["doctor"]) == 1
    found = findings(capsys.readouterr().out)
    assert found["broken"] == ("FAIL", "OSError: libgomp.so.1: cannot open shared object file")
    assert "dataset sample" in found
