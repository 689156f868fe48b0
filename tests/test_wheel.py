"""What is installed is whole: a built wheel imports without the repository beside it."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_a_wheel_carries_every_package_and_imports_alone(tmp_path):
    build = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(tmp_path),
        str(ROOT),
    ]
    subprocess.run(build, check=True, capture_output=True, cwd=tmp_path)
    (wheel,) = tmp_path.glob("minillm-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        carried = set(archive.namelist())
        archive.extractall(tmp_path / "site")
    for path in [*ROOT.glob("minillm/**/*.py"), *ROOT.glob("kernels/*.py"), *ROOT.glob("benchmarks/*.py")]:
        name = path.relative_to(ROOT).as_posix()
        name = name if name.startswith("minillm/") else f"minillm/{name}"
        assert name in carried, f"{name} is not in the wheel: name its package in setup.py"
    code = (
        "import minillm.losses, minillm.kernels.reference, minillm.cli.main; "
        f"assert minillm.losses.__file__.startswith({str(tmp_path)!r})"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert result.returncode == 0, result.stderr
