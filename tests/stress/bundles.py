"""Commands side by side, killed, on a full disk and on a read-only one: nothing of a bundle is lost.

    python tests/stress/bundles.py --rounds 20 --kills 20        # everything; some minutes on two cores
    python tests/stress/bundles.py together --rounds 20

`full` and `readonly` mount a small tmpfs, for which they need root. Prints one JSON object with what was counted; exit
1 where anything was lost. Works on the bundle and the images of tests/fixtures.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["LT_ACCELERATOR"] = "cpu"
ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
FIXTURES = ROOT / "tests" / "fixtures"
SCENES = FIXTURES / "scenes-0.1"
from edgedetr import cli  # noqa: E402
from edgedetr.bundle import Bundle, DataRecord  # noqa: E402
from edgedetr.errors import BundleError  # noqa: E402

# What the commands import, once: each of them then runs in a fork of this process.
IMPORTED = (
    "edgedetr.training.train",
    "edgedetr.exporting.export",
    "edgedetr.exporting.settings",
    "edgedetr.evaluation.verify",
    "edgedetr.reporting.figures",
)
INT8 = ["--int8", "--set", "quant.images=8"]
MADE = {"model.onnx", "reference.npz", "ranges.json", "model.int8.onnx", "model.int8-cpu.onnx", "model.fp16.onnx"}
VERIFIED = {"results/verify.json", "results/detections-onnx-onnxruntime.npz"}


def start(words: list[str], log: Path) -> int:
    """A command in its own process; its number."""
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    with open(log, "ab", buffering=0) as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
    code = 70
    try:
        code = cli.run(words)
    except Exception:  # noqa: BLE001  # a traceback is what is looked for
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def wait(pid: int) -> int:
    """Its exit code, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def run(words: list[str], log: Path) -> int:
    return wait(start(words, log))


def fresh(path: Path, keep: set[str]) -> Path:
    """A copy of the fixture that lists these files alone, with its data where the fixture's are."""
    shutil.copytree(FIXTURES / "bundle-0.1", path)
    bundle = Bundle.open(path)
    files = {name: entry for name, entry in bundle.manifest.files.items() if name in keep}
    bundle.update(files=files, data=DataRecord(str(SCENES), "test", "train"))
    for name in set(Bundle.open(FIXTURES / "bundle-0.1").manifest.files) - keep:
        (path / name).unlink()
    return path


def problems(path: Path) -> dict[str, str]:
    """Listed files that are not as listed; stale ones are only that."""
    bundle, found = Bundle.open(path), {}
    for name in bundle.manifest.files:
        try:
            bundle.require(name)
        except BundleError as error:
            found[name] = "stale" if "was made from" in str(error) else str(error)
    return found


def together(work: Path, rounds: int) -> Counter[str]:
    """export --int8, verify and export --trt at the same time."""
    seen: Counter[str] = Counter()
    for number in range(rounds):
        path, log = work / f"together{number}.bundle", work / f"together{number}.log"
        fresh(path, {"recipe.toml", "weights.safetensors", "model.onnx", "reference.npz"})
        words = [["export", str(path), *INT8], ["verify", str(path), "--threads", "1"], ["export", str(path), "--trt"]]
        random.shuffle(words)
        codes = [wait(pid) for pid in [start(one, log) for one in words]]
        seen["rounds"] += 1
        seen["failed"] += sum(code not in (0, 3, 4) for code in codes)
        listed = set(Bundle.open(path).manifest.files)
        seen["lost"] += len((MADE | VERIFIED) - listed)
        left = problems(path)
        seen["stale"] += sum(why == "stale" for why in left.values())
        seen["damaged"] += sum(why != "stale" for why in left.values())
        seen["temporary files"] += len(list(path.rglob(".*.tmp"))) + (path / ".lock").exists()
        report(seen, log, path)
    return seen


def kill(work: Path, kills: int, only: tuple[str, ...] = ()) -> Counter[str]:
    """kill -9 at random moments in train, export, verify and report; then the same command again."""
    seen: Counter[str] = Counter()
    base = fresh(work / "base.bundle", {"recipe.toml", "weights.safetensors"})
    # Of the fixture's own recipe, but for five epochs, which take some seconds.
    recipe = work / "recipe.toml"
    recipe.write_text((base / "recipe.toml").read_text().replace("epochs = 400", "epochs = 5"))
    ready = work / "ready.bundle"
    shutil.copytree(base, ready)
    assert run(["export", str(ready), *INT8], work / "ready.log") == 0, (work / "ready.log").read_text()
    done = work / "done.bundle"
    shutil.copytree(ready, done)
    assert run(["verify", str(done), "--threads", "1"], work / "done.log") in (0, 3), (work / "done.log").read_text()
    kinds = {
        "train": (None, ["train", "--data", str(SCENES), "--recipe", str(recipe), "--resume", "--out"], (0,)),
        "export": (base, ["export", *INT8], (0,)),
        "verify": (ready, ["verify", "--threads", "1"], (0, 3)),
        "report": (done, ["report"], (0,)),
    }
    for name, (source, words, fine) in kinds.items():
        if only and name not in only:
            continue
        path, log = work / f"{name}.bundle", work / f"{name}.log"
        took = 0.0
        for number in range(kills + 1):
            shutil.rmtree(path, ignore_errors=True)
            if source is not None:
                shutil.copytree(source, path)
            command = [*words, str(path)] if name == "train" else [words[0], str(path), *words[1:]]
            begun = time.monotonic()
            pid = start(command, log)
            if number == 0:  # how long it takes
                assert wait(pid) in fine, log.read_text()
                took = time.monotonic() - begun
                continue
            time.sleep(random.uniform(0, took))
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            seen[f"{name} killed"] += wait(pid) == -signal.SIGKILL
            seen["half-written left by kills"] += len(list(path.rglob(".*.tmp")))
            if (path / "bundle.json").exists():
                seen["damaged after a kill"] += sum(why != "stale" for why in problems(path).values())
            seen["failed afterwards"] += run(command, log) not in fine
            seen["damaged afterwards"] += len(problems(path))
            seen["temporary files"] += len(list(path.rglob(".*.tmp")))
            report(seen, log, path)
    return seen


@contextlib.contextmanager
def small_disk(folder: Path, kilobytes: int) -> Iterator[Path]:
    folder.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def full(work: Path, _: int) -> Counter[str]:
    """export, verify and report with less room than they need, in steps of 64 kB."""
    seen: Counter[str] = Counter()
    base = fresh(work / "full.bundle", {"recipe.toml", "weights.safetensors"})
    shutil.rmtree(base / "train")
    ready = work / "full-ready.bundle"
    shutil.copytree(base, ready)
    assert run(["export", str(ready), *INT8], work / "full.log") == 0
    assert run(["verify", str(ready), "--threads", "1"], work / "full.log") in (0, 3)
    for source, words in (
        (base, ["export", *INT8]),
        (ready, ["export", "--trt"]),
        (ready, ["verify", "--threads", "1"]),
        (ready, ["report"]),
    ):
        size = sum(-(-file.stat().st_size // 4096) * 4 for file in source.rglob("*") if file.is_file()) + 40
        for room in (0, 64, 128, 256, 512, 768):
            with small_disk(work / "disk", size + room) as disk:
                path, log = disk / "b.bundle", work / f"full-{words[0]}-{room}.log"
                shutil.copytree(source, path)
                before = problems(path)
                code = run([words[0], str(path), *words[1:]], log)
                output = log.read_text()
                seen["runs"] += 1
                seen["done"] += code in (0, 3, 4)
                seen["refused with bytes"] += code == 1 and "the disk is full" in output and "bytes are free" in output
                seen["verdict not recorded"] += "could not be stored" in output
                seen["tracebacks"] += "Traceback" in output
                seen["other ends"] += code not in (0, 1, 3, 4)
                seen["damaged afterwards"] += problems(path) != before and any(
                    why != "stale" for why in problems(path).values()
                )
                seen["temporary files"] += len(list(path.rglob(".*.tmp")))
                if code == 1 and "the disk is full" not in output:
                    seen["other messages"] += 1
                report(seen, log, path)
    return seen


def readonly(work: Path, _: int) -> Counter[str]:
    """Every command on a bundle that cannot be written to."""
    seen: Counter[str] = Counter()
    source = fresh(work / "ro.bundle", {"recipe.toml", "weights.safetensors", "model.onnx", "reference.npz"})
    image = str(next((SCENES / "images" / "test").iterdir()))
    with small_disk(work / "disk", 8192) as disk:
        path, log = disk / "b.bundle", work / "readonly.log"
        shutil.copytree(source, path)
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        for words, fine in (
            (["predict", str(path), image], 0),
            (["inspect", str(path)], 0),
            (["verify", str(path)], 3),
            (["bench", str(path), "--rounds", "1"], 0),
            (["export", str(path)], 0),
            (["export", str(path), *INT8], 1),
            (["report", str(path)], 1),
            (["train", "--data", str(SCENES), "--out", str(path), "--resume"], 1),
        ):
            log.write_text("")
            code = run(words, log)
            seen["commands"] += 1
            seen["other ends"] += code != fine
            seen["tracebacks"] += "Traceback" in log.read_text()
            report(seen, log, path)
    return seen


def report(seen: Counter[str], log: Path, path: Path) -> None:
    """What is new in bad news, at once."""
    if any(count for name, count in seen.items() if name in BAD):
        print(f"{path.name}: { ({name: count for name, count in seen.items() if count}) }; {log}", file=sys.stderr)


BAD = (
    "failed",
    "lost",
    "damaged",
    "damaged after a kill",
    "failed afterwards",
    "damaged afterwards",
    "tracebacks",
    "other ends",
    "other messages",
    "temporary files",
)
PARTS = {"together": together, "kill": kill, "full": full, "readonly": readonly}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help="default: all")
    parser.add_argument("--rounds", type=int, default=20, help="of commands side by side")
    parser.add_argument("--kills", type=int, default=20, help="of each command")
    parser.add_argument("--commands", nargs="*", default=[], help="to kill; default: train export verify report")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="work in this folder, and leave everything there")
    chosen = parser.parse_args()
    for name in IMPORTED:
        importlib.import_module(name)
    random.seed(chosen.seed)
    work = Path(tempfile.mkdtemp()) if chosen.keep is None else chosen.keep
    work.mkdir(exist_ok=True)
    try:
        found = {
            name: dict(
                kill(work, chosen.kills, tuple(chosen.commands)) if name == "kill" else PARTS[name](work, chosen.rounds)
            )
            for name in chosen.parts or PARTS
        }
    finally:
        if chosen.keep is None:
            shutil.rmtree(work, ignore_errors=True)
    print(json.dumps(found, indent=1))
    return int(any(counts.get(name) for counts in found.values() for name in BAD))


if __name__ == "__main__":
    sys.exit(main())
