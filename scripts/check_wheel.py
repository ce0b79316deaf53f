"""Build the wheel, install it with its dependencies in a clean environment, and use it from another folder.

The environment holds what a user's would, at the locked versions, so a dependency that pyproject.toml does not name, or
a config that does not travel in the wheel, shows here.
"""

import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).parent.parent


def main() -> None:
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        build = [sys.executable, "-m", "build", "--wheel", "--outdir", place, str(ROOT)]
        subprocess.run(build, check=True, stdout=subprocess.DEVNULL)
        (wheel,) = folder.glob("ibxai-*.whl")
        venv.create(folder / "env", with_pip=True)
        command = folder / "env/bin/ibxai"
        pip = [folder / "env/bin/pip", "--disable-pip-version-check", "install", "--quiet"]
        subprocess.run([*pip, "--constraint", ROOT / "requirements.lock", wheel], check=True)
        subprocess.run([command, "list"], check=True, cwd=place)
        subprocess.run([command, "run", "method=random", "limit=2"], check=True, cwd=place)
    print("the wheel works")


if __name__ == "__main__":
    main()
