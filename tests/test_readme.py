"""What the README shows is run: its Python example, its commands, its links."""

import re
import shlex
from pathlib import Path

import pytest
import torch

from ibxai.cli import main

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = sorted(
    {
        line.split("#")[0].strip()
        for block in re.findall(r"```\n(.*?)```", README, re.DOTALL)
        for line in block.splitlines()
        if line.startswith("ibxai ")
    }
)


def test_the_python_example(capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        exec(compile(code, "README.md", "exec"), {})
    shown = capsys.readouterr().out
    assert "torch.Size([4, 224, 224]) bits" in shown
    assert re.search(r"tensor\(\[0\.\d", shown)


def test_there_are_commands() -> None:
    assert len(COMMANDS) >= 8


@pytest.mark.parametrize("command", COMMANDS)
def test_commands(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A run is composed and not started; a sweep has its values taken one by one; the rest is run as it is."""
    monkeypatch.chdir(tmp_path)
    _, word, *rest = shlex.split(command)
    if word != "run" or "--help" in rest:
        wants_files = word in ("report", "reader-study", "train") or rest[:1] == ["clean"]  # there are none here
        assert main([word, *rest]) == (2 if wants_files else 0)
        if wants_files:
            assert re.search("no folder|no run|does not exist", capsys.readouterr().err)
        return
    if "--config-dir" in rest:
        (tmp_path / "my_conf/dataset").mkdir(parents=True)
        sample = (ROOT / "conf/dataset/sample.yaml").read_text()
        (tmp_path / "my_conf/dataset/mine.yaml").write_text(sample)
    sweep = "-m" in rest
    single = [re.sub(r"=([^\[,]+),.*", r"=\1", part) if sweep else part for part in rest if part != "-m"]
    single = [part for part in single if not part.startswith("hydra/launcher=")]  # of sweeps alone
    assert main(["run", "--cfg", "job", *single]) == 0
    assert "_target_: ibxai.methods" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "docs/architecture.md"])
def test_links_and_files_exist(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!http)([^)#]+)", text):
        assert ((ROOT / name).parent / target).exists(), target
    for path in re.findall(r"`((?:ibxai|conf|tests|scripts|docs)/[\w/]+\.(?:py|yaml|md))`", text):
        if "mymethod" not in path and "mine" not in path:
            assert (ROOT / path).exists(), path
