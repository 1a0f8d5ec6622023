"""What runs in an environment that has the wheel with its extras `test` and `demo`: a row of results.csv.

    ENVIRONMENT/bin/python -m experiments.versions.steps NAME FOLDER

in a checkout, whose tests run too. The commands run in the folder, which is empty, with the wheel alone. A step that
ran says so, another has the last line that it wrote.
"""

import argparse
import os
import re
import socket
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

from experiments.study import EXPERIMENTS, read_run, replace_rows

PACKAGES = (
    "hydra-core",
    "omegaconf",
    "torch",
    "torchvision",
    "lightning",
    "timm",
    "torchmetrics",
    "numpy",
    "tokenizers",
)
COMMANDS = Path(sys.executable).parent
CHECKOUT = EXPERIMENTS.parent
PHOTOS = CHECKOUT / "coca_lit/assets/photos"
SMOKE = ("coca-train", "trainer=smoke")
STEPS = {
    "demo": ("coca-train", "name=demo", "seed=0"),
    "caption": ("coca-caption", str(PHOTOS / "cat.jpg"), str(PHOTOS / "coffee.jpg"), "checkpoint=photos"),
    "search": ("coca-search", "photos", "a cat", "checkpoint=photos"),
    "workers": (*SMOKE, "name=workers", "data.num_workers=2"),
    "torchrun": ("torchrun", "--nproc-per-node=2", "--no-python", *SMOKE, "name=torchrun", "trainer.devices=2"),
    "ddp": (*SMOKE, "name=ddp", "trainer.strategy=ddp", "trainer.devices=2"),
}
TESTS = ("tests/models/test_coca.py", "tests/cli/test_config.py", "tests/data", "tests/weights/test_computation.py")
ASK = """
import sys
from gradio_client import Client, handle_file
print(Client(sys.argv[1], verbose=False).predict(handle_file(sys.argv[2]), api_name="/caption"))
"""


def ran(folder: Path, step: str, *words: str) -> str:
    """ "ran", or the last line of a command that failed; its output is in the folder."""
    environment = os.environ | {"PATH": f"{COMMANDS}:{os.environ['PATH']}", "PYTHONWARNINGS": "always"}
    output = folder / f"{step}.txt"
    with output.open("w") as file:
        code = subprocess.run(words, cwd=folder, env=environment, stdout=file, stderr=subprocess.STDOUT).returncode
    return "ran" if code == 0 else output.read_text().strip().rpartition("\n")[2]


def page(folder: Path) -> str:
    """Whether the page opens and its interface captions a photo, and what its process says at the end."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [str(COMMANDS / "coca-demo"), "checkpoint=photos", f"port={port}"]
    with (folder / "page.txt").open("w") as output:
        server = subprocess.Popen(words, cwd=folder, stdout=output, stderr=subprocess.STDOUT)
        while server.poll() is None and socket.socket().connect_ex(("127.0.0.1", port)):
            time.sleep(0.2)
        address = f"http://127.0.0.1:{port}"
        opened = ran(folder, "page_opens", "curl", "--silent", "--fail", address)
        answered = ran(folder, "page_answers", sys.executable, "-c", ASK, address, str(PHOTOS / "cat.jpg"))
        server.terminate()
        ended = server.wait(60)
    if (opened, answered, ended) != ("ran", "ran", 143):
        return f"opened: {opened}, answered: {answered}, ended with {ended}"
    return "ran" if 'class="best"' in (folder / "page_answers.txt").read_text() else "no caption"


def tests(folder: Path) -> str:
    """The last line of pytest."""
    words = [sys.executable, "-m", "pytest", "-n", "1", "-p", "no:cacheprovider", *TESTS]
    output = subprocess.run(words, cwd=CHECKOUT, capture_output=True, text=True).stdout
    (folder / "tests.txt").write_text(output)
    return re.sub(r" in .*", "", output.strip().rpartition("\n")[2].strip("= "))


def warnings(folder: Path) -> int:
    """How many lines the steps wrote that warn of this package's code or of objects left at the end of a process."""
    said = "".join(path.read_text() for path in folder.glob("*.txt") if path.name != "tests.txt")
    return len(re.findall(r"/coca_lit/\S+:\d+: \w*Warning|^nanobind: .*leak", said, flags=re.MULTILINE))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name")
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    folder = options.folder.resolve()
    folder.mkdir(parents=True)
    (folder / "photos").symlink_to(PHOTOS)
    steps: dict[str, str | int] = {step: ran(folder, step, *words) for step, words in STEPS.items()}
    steps |= {"page": page(folder), "warnings": warnings(folder), "tests": tests(folder)}
    row = read_run(folder / "outputs/demo")
    commit = ["git", "rev-parse", "--short", "HEAD"]
    row |= {"run": options.name, "commit": subprocess.check_output(commit, cwd=CHECKOUT, text=True).strip()}
    versions = {"python": sys.version.split()[0]} | {package: version(package) for package in PACKAGES}
    row = {"run": row.pop("run")} | versions | {step: str(said) for step, said in steps.items()} | row
    replace_rows(EXPERIMENTS / "versions/results.csv", [row], by=["run"])


if __name__ == "__main__":
    main()
