"""`make wheel-test`: build the distributions, install the wheel alone, use it outside the checkout.

The wheel is built from the sdist, so both are checked. Its virtual environment gets the wheel and
what that asks for: no torch. Then, in an empty folder: `whalefall --help`, the bundled model
served, one question answered, `whalefall bench serve --url` against it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
import urllib.request
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
START_S = 300.0  # a cold cache: the kernels are compiled


def run(*command: str | Path, cwd: Path, env: dict[str, str] | None = None) -> str:
    """Run a command that must succeed; returns what it printed."""
    done = subprocess.run(list(map(str, command)), cwd=cwd, env=env, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))}: exit code {done.returncode}\n{done.stderr}")
    return done.stdout


def install(folder: Path) -> Path:
    """Build both distributions into `folder`, and a virtual environment; returns its bin."""
    run(sys.executable, "-m", "build", "--outdir", folder / "dist", ROOT, cwd=folder)
    names = sorted(path.name for path in (folder / "dist").iterdir())
    print("built", ", ".join(names))
    wheel = next((folder / "dist").glob("*.whl"))
    venv.create(folder / "venv", with_pip=True)
    bin = folder / "venv" / "bin"
    pip = (bin / "python", "-m", "pip", "install", "-q", "--disable-pip-version-check")
    run(*pip, "-c", ROOT / "constraints.txt", wheel, cwd=folder)
    listed = json.loads(run(bin / "python", "-m", "pip", "list", "--format", "json", cwd=folder))
    heavy = {"torch", "duckdb", "pandas", "pytest"} & {package["name"] for package in listed}
    assert not heavy, f"the core's requirements bring {heavy}"
    print(f"installed {wheel.name} and {len(listed) - 1} packages, no torch")
    return bin


def ask(url: str) -> str:
    """What the server answers to the bundled model's question."""
    question = {"role": "user", "content": "What does tar do?"}
    body = {"model": "whalefall-manpages", "messages": [question], "temperature": 0}
    request = urllib.request.Request(
        f"{url}/v1/chat/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=120) as reply:
        return str(json.load(reply)["choices"][0]["message"]["content"])


def serve(bin: Path, folder: Path, env: dict[str, str]) -> None:
    """Serve from the wheel, ask, drive."""
    command = [str(bin / "whalefall"), "serve", "--port", "0"]
    start = time.monotonic()
    log = (folder / "server.log").open("w+")
    server = subprocess.Popen(command, cwd=folder, env=env, stdout=log, stderr=subprocess.STDOUT)
    try:
        url = ""
        while not url and server.poll() is None and time.monotonic() - start < START_S:
            words = (folder / "server.log").read_text("utf-8").split()
            url = next((word for word in words if word.startswith("http://")), "")
            time.sleep(0.1)
        assert url, (folder / "server.log").read_text("utf-8") or "the server said nothing"
        answer = ask(url)
        assert "archiv" in answer, answer
        print(f"served and answered {time.monotonic() - start:.1f} s after its start: {answer!r}")
        options = ("--concurrency", "1,4", "--max-tokens", "16")
        print(run(bin / "whalefall", "bench", "serve", "--url", url, *options, cwd=folder, env=env))
    finally:
        server.terminate()
        assert server.wait(60) is not None
        log.close()


def main() -> None:
    """All of it, in a folder that is removed."""
    with tempfile.TemporaryDirectory(prefix="whalefall-wheel-") as name:
        folder = Path(name)
        bin = install(folder)
        env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        env |= {"WHALEFALL_CACHE": str(folder / "cache"), "HOME": name}
        help = run(bin / "whalefall", "--help", cwd=folder, env=env)
        assert "serve" in help and "bench" in help, help
        where = run(
            bin / "python", "-c", "import whalefall; print(whalefall.__file__)", cwd=folder, env=env
        )
        assert where.startswith(name), f"whalefall came from {where}"
        serve(bin, folder, env)
    print("the wheel works")


if __name__ == "__main__":
    main()
