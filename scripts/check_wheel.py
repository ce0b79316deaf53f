"""Build the wheel, install it in a clean environment, and ask the installed command what it knows, from elsewhere.

The environment sees this one's packages, so that gigabytes need not be installed again; ibxai itself comes from the
wheel alone, which is checked.
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
        build = [sys.executable, "-m", "build", "--wheel", "--outdir", str(folder), str(ROOT)]
        subprocess.run(build, check=True, stdout=subprocess.DEVNULL)
        (wheel,) = folder.glob("ibxai-*.whl")
        venv.create(folder / "env", with_pip=True)
        python = folder / "env/bin/python"
        subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", str(wheel)], check=True)
        own = subprocess.run(
            [python, "-c", "import site; print(site.getsitepackages()[0])"], check=True, capture_output=True, text=True
        ).stdout.strip()
        borrowed = next(p for p in sys.path if p.endswith("site-packages"))
        # only the packages themselves: a line of sys.path, without this environment's editable install
        Path(own, "borrowed.pth").write_text(f"{borrowed}\n")
        where = subprocess.run(
            [python, "-c", "import ibxai; print(ibxai.__file__)"], check=True, capture_output=True, text=True, cwd=place
        ).stdout.strip()
        if not where.startswith(own):
            sys.exit(f"ibxai was imported from {where}, not from the wheel")
        subprocess.run([folder / "env/bin/ibxai", "list"], check=True, cwd=place)
        subprocess.run([folder / "env/bin/ibxai", "run", "method=random", "limit=2"], check=True, cwd=place)
    print("the wheel works")


if __name__ == "__main__":
    main()
