"""Stands in for SLURM: `python fake_slurm.py sbatch|srun|sacct|scontrol …`, enough of each for one machine.

Jobs run at once, in the background; `$FAKE_SLURM` is a folder with a file per job that holds its state.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

STATE = Path(os.environ["FAKE_SLURM"])


def sbatch(*arguments: str) -> None:
    """Runs a script in the background, once per index of its array, with its #SBATCH lines as environment."""
    at = next(i for i, argument in enumerate(arguments) if not argument.startswith("--"))
    text = Path(arguments[at]).read_text()
    lines = [*re.findall(r"^#SBATCH (--.*)$", text, re.MULTILINE), *arguments[:at]]
    options = dict(line[2:].strip("'\"").partition("=")[::2] for line in lines)
    job = str(100 + len([*STATE.glob("*.sbatch")]))
    (STATE / f"{job}.sbatch").write_text(text)
    tasks, nodes = options.get("ntasks-per-node", "1"), options.get("nodes", "1")
    env = {
        **os.environ,
        "SLURM_NNODES": nodes,
        "SLURM_JOB_NUM_NODES": nodes,
        "SLURM_JOB_NODELIST": "localhost",
        "SLURM_NODELIST": "localhost",
        "SLURM_NTASKS_PER_NODE": tasks,
        "SLURM_NTASKS": str(int(tasks) * int(nodes)),
        "SLURM_JOB_NAME": options.get("job-name", "job"),
    }
    first, last = map(int, options["array"].partition("%")[0].split("-")) if "array" in options else (0, 0)
    for index in range(first, last + 1):
        number, name = str(int(job) + index), job
        if "array" in options:
            env |= {"SLURM_ARRAY_JOB_ID": job, "SLURM_ARRAY_TASK_ID": str(index)}
            name = f"{job}_{index}"
        (STATE / f"{name}.state").write_text("RUNNING")
        command = [sys.executable, __file__, "_job", name, *arguments[at:]]
        log = os.open(STATE / f"{name}.log", os.O_WRONLY | os.O_CREAT)
        subprocess.Popen(command, env=env | {"SLURM_JOB_ID": number}, stdout=log, stderr=log, start_new_session=True)
    print(f"Submitted batch job {job}")


def _job(name: str, script: str, *arguments: str) -> None:
    """Runs again if it was requeued meanwhile."""
    requeued = STATE / f"{name}.requeued"
    code = subprocess.run(["bash", script, *arguments]).returncode
    if requeued.exists():
        requeued.rename(STATE / f"{name}.ran_again")
        code = subprocess.run(["bash", script, *arguments]).returncode
    (STATE / f"{name}.state").write_text("FAILED" if code else "COMPLETED")


def srun(*arguments: str) -> None:
    """Runs a command once per task, and ends with the first code that is not 0."""
    output, rest = "", list(arguments)
    while rest[0].startswith("--"):
        output = rest.pop(1) if rest[0] == "--output" else output
        rest.pop(0)
    step = {"SLURM_NODEID": "0", "SLURM_STEP_ID": "0"}
    ranks = map(str, range(int(os.environ["SLURM_NTASKS"])))
    environments = [os.environ | step | {"SLURM_PROCID": rank, "SLURM_LOCALID": rank} for rank in ranks]
    if rest[1].endswith(".py"):
        from forking import Program  # imports once for all tasks

        programs = [Program(*rest[1:], cwd=Path.cwd(), environment=env) for env in environments]
        done = [program.wait() for program in programs]
        print(*(text for program in done for text in (program.stdout, program.stderr)))
        sys.exit(max(abs(program.returncode) for program in done))
    tasks = []
    for env in environments:
        names = {"%A": "SLURM_ARRAY_JOB_ID", "%a": "SLURM_ARRAY_TASK_ID", "%t": "SLURM_PROCID", "%j": "SLURM_JOB_ID"}
        path = output
        for code, name in names.items():
            path = path.replace(code, env.get(name, "0"))
        log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND) if path else None
        tasks.append(subprocess.Popen(rest, env=env, stdout=log, stderr=log))
    sys.exit(max(abs(task.wait()) for task in tasks))


def sacct(*arguments: str) -> None:
    print("JobID|State|NodeList")
    for path in STATE.glob("*.state"):
        print(f"{path.stem}|{path.read_text()}|localhost")


def scontrol(action: str, *arguments: str) -> None:
    """`show hostnames`, and `requeue`, which is noted for `_job`."""
    if action == "show":
        print("localhost")
    else:
        (STATE / f"{arguments[0]}.requeued").touch()


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
