"""Write requirements.lock: the versions that a clean install of ibxai[dev] takes today, torch pinned by hand.

torchvision imports only with the torch it was built for, so the pair is fixed here and tried with and without a GPU
before it is changed.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

PAIR = ("torch==2.12.1", "torchvision==0.27.1")
HEADER = "# Versions that are known to work together, with and without a GPU. Renewed by `make lock`.\n"
ROOT = Path(__file__).parent.parent


def main() -> None:
    with tempfile.TemporaryDirectory() as place:
        subprocess.run([sys.executable, "-m", "venv", place], check=True)
        pip = f"{place}/bin/pip"
        subprocess.run([pip, "install", "--quiet", *PAIR, "--editable", f"{ROOT}[dev]"], check=True)
        frozen = subprocess.run([pip, "freeze", "--exclude-editable"], check=True, capture_output=True, text=True)
    (ROOT / "requirements.lock").write_text(HEADER + frozen.stdout)


if __name__ == "__main__":
    main()
