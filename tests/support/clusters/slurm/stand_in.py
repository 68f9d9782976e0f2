#!/usr/bin/env python3
"""Stands in for Slurm's commands: each is a link to this file, which runs scripts as processes of this machine.

``$STAND_IN`` is the folder of its state: a JSON file for each job, written by the process that looks after it, and
beside it a file ``.wants`` with what others ask for. Knows dependencies, arrays, signals, requeueing and cancelling; no
nodes, no limits. ``partitions`` in that folder names the partitions, ``hosts`` the nodes, ``refuses`` what sbatch says
instead of taking a job.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(os.environ["STAND_IN"])
OVER = ("COMPLETED", "FAILED", "CANCELLED")


def read(number: str) -> dict:
    while True:
        try:
            return json.loads((ROOT / f"{number}.json").read_text())
        except ValueError:
            time.sleep(0.01)


def write(number: str, **changes: object) -> None:
    path = ROOT / f"{number}.json"
    values = {**(read(number) if path.exists() else {}), **changes}
    draft = ROOT / f".{number}.{os.getpid()}"
    draft.write_text(json.dumps(values))
    draft.replace(path)


def wants(number: str) -> str:
    path = ROOT / f"{number}.wants"
    return path.read_text() if path.exists() else ""


def ask(number: str, label: str) -> None:
    draft = ROOT / f".{number}.{os.getpid()}"
    draft.write_text(label)
    draft.replace(ROOT / f"{number}.wants")


def numbers() -> list[str]:
    return sorted((path.stem for path in ROOT.glob("*.json")), key=lambda text: [int(n) for n in text.split("_")])


def sbatch(words: list[str]) -> int:
    options = dict(word[2:].partition("=")[::2] for word in words[:-1])
    refuses = ROOT / "refuses"
    if refuses.exists() and re.search(refuses.read_text().strip(), " ".join(words)):
        print("sbatch: error: Batch job submission failed: not like this", file=sys.stderr)
        return 1
    if "test-only" in options:
        return 0
    with (ROOT / "calls").open("a") as file:
        file.write(json.dumps(words) + "\n")
    number = 1 + max((int(name.partition("_")[0]) for name in numbers()), default=100)
    indices = range(int(options["array"].partition("-")[2].partition("%")[0]) + 1) if "array" in options else [None]
    for index in indices:
        name = str(number) if index is None else f"{number}_{index}"
        write(name, state="PENDING", why="Priority", options=options, script=words[-1], turn=0, started=0)
        subprocess.Popen(
            [sys.executable, __file__, name], start_new_session=True, stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={**os.environ, "STAND_IN_LOOKS_AFTER": name},
        )  # fmt: skip
    print(number)
    return 0


def look_after(name: str) -> None:
    """Run a job from its queueing to its end."""
    about = read(name)
    options = about["options"]
    after = [entry for entry in options.get("dependency", "").removeprefix("afterok:").split(":") if entry]
    while True:
        if wants(name) == "cancel":
            write(name, state="CANCELLED")
            return
        states = [read(entry)["state"] for entry in after]
        if any(state in ("FAILED", "CANCELLED") for state in states):
            write(name, state="CANCELLED", why="DependencyNeverSatisfied")
            return
        if all(state == "COMPLETED" for state in states) and not (ROOT / "held").exists():
            break
        write(name, why="Dependency" if after else "Resources")
        time.sleep(0.05)
    while run(name, options):
        write(name, state="PENDING", why="BeginTime", turn=read(name)["turn"] + 1)
        time.sleep(0.3)


def run(name: str, options: dict) -> bool:
    """One turn; whether another is wanted."""
    number, _, index = name.partition("_")
    values = {
        **os.environ, "SLURM_JOB_ID": name, "SLURM_CPUS_ON_NODE": options.get("cpus-per-task", "1"),
        "SLURM_RESTART_COUNT": str(read(name)["turn"]), "SLURM_ARRAY_JOB_ID": number, "SLURM_ARRAY_TASK_ID": index,
    }  # fmt: skip
    values.pop("STAND_IN_LOOKS_AFTER")
    log = options["output"].replace("%%", "%").replace("%a", index)
    with open(log, "ab") as output:
        process = subprocess.Popen(
            ["/bin/bash", read(name)["script"]], env=values, stdout=output, stderr=output, cwd=options["chdir"],
            stdin=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
    write(name, state="RUNNING", why="None", pid=process.pid)
    while process.poll() is None:
        if wants(name):
            write(name, state="COMPLETING")
            end(process)
        time.sleep(0.05)
    request = wants(name)
    if request == "requeue":
        (ROOT / f"{name}.wants").unlink()
        return True
    state = "CANCELLED" if request == "cancel" else "COMPLETED" if process.returncode == 0 else "FAILED"
    write(name, state=state, why="None")
    return False


def end(process: subprocess.Popen) -> None:
    for sent in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, sent)
            process.wait(10)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue
        else:
            return


def squeue(words: list[str]) -> int:
    options = dict(word[2:].partition("=")[::2] for word in words)
    if (ROOT / "silent").exists():
        print("slurm_load_jobs error: Unable to contact slurm controller (connect failure)", file=sys.stderr)
        return 1
    wanted = [number for number in numbers() if "jobs" not in options or number in options["jobs"].split(",")]
    for name in wanted:
        job = read(name)
        if "states" in options or job["state"] not in OVER:
            nodes = "here" if job["state"] == "RUNNING" else ""
            fields = {"%F": name.partition("_")[0], "%T": job["state"], "%r": job["why"], "%N": nodes}
            text = options["format"]
            for mark, value in fields.items():
                text = text.replace(mark, value)
            print(text)
    return 0


def scancel(words: list[str]) -> int:
    sent = next((word.partition("=")[2] for word in words if word.startswith("--signal=")), None)
    for number in (word for word in words if word[0].isdigit()):
        for name in numbers():
            job = read(name)
            if number in (name, name.partition("_")[0]) and job["state"] not in OVER:
                if sent is None:
                    ask(name, "cancel")
                elif job["state"] == "RUNNING":
                    os.kill(job["pid"], getattr(signal, f"SIG{sent}"))
    return 0


def scontrol(words: list[str]) -> int:
    if words[0] == "requeue" and not wants(words[1]):
        ask(words[1], "requeue")
    return 0


def sinfo(words: list[str]) -> int:
    print((ROOT / ("hosts" if "--format=%n" in words else "partitions")).read_text().strip())
    return 0


if __name__ == "__main__":
    if "STAND_IN_LOOKS_AFTER" in os.environ:
        look_after(os.environ["STAND_IN_LOOKS_AFTER"])
    else:
        sys.exit(globals()[Path(sys.argv[0]).name](sys.argv[1:]))
