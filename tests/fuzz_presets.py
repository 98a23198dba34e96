"""Spoil presets without end, load them, and print what became of them.

    .venv/bin/python tests/fuzz_presets.py --seconds 3600             # random changes
    .venv/bin/python tests/fuzz_presets.py --seconds 3600 --atheris   # guided by coverage

The second needs `pip install atheris`. Cases run in forked processes, so that a crash of a library
is one finding among others. The exit status is 1 if there is any.
"""

import argparse
import collections
import gc
import json
import os
import pathlib
import random
import resource
import signal
import sys
import tempfile
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
KINDS = ("equal", "refused", "other weights", "other settings", "other tokenizer", "finding")


def work(options, directory, first, pipe):
    """Run cases in this process, report each before and after as a line of JSON, and end."""
    if options.atheris:
        import atheris

        with atheris.instrument_imports(include=["phi3_ref"]):
            import phi3_ref  # noqa: F401
    import hostile_presets

    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # a hang ends the process: a finding
    judge = hostile_presets.Judge(directory / "preset", directory / "canary", directory / "tmp")
    names = list(judge.presets)
    gc.freeze()  # each case collects garbage: among its own objects, not those of the libraries

    def report(*line):
        os.write(pipe, json.dumps(line).encode() + b"\n")

    def run(source, case):
        choices = hostile_presets.Choices(source)
        name = choices.pick(names)
        judge.write(name)
        source = source if choices.random else choices.rest
        try:
            change = hostile_presets.mutate(judge.directory, source, judge.canary)
        except Exception:  # a change that does not apply to this file
            return
        report(case, name, change)
        signal.alarm(30)
        outcome = judge.outcome(name)
        signal.alarm(0)
        report(case, name, change, outcome.kind,
               outcome.detail[:300] if outcome.kind == "finding" else "")

    if options.atheris:
        left = max(1, int(options.end - time.time()))
        arguments = [sys.argv[0], f"-max_total_time={left}", "-runs=5000", "-timeout=60",
                     f"-seed={first + options.seed + 1}", "-max_len=400", "-len_control=0",
                     str(directory / "corpus")]
        atheris.Setup(arguments, lambda data: run(data, data.hex()))
        atheris.Fuzz()
    else:
        for case in range(first, first + 1000):
            run(random.Random(f"{options.seed} {case}"), case)
            if time.time() > options.end:
                break
    os._exit(0)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--atheris", action="store_true", help="let coverage guide the changes")
    options = parser.parse_args()
    start, first = time.time(), 0
    options.end = start + options.seconds
    counts, most = collections.defaultdict(collections.Counter), 0
    with tempfile.TemporaryDirectory() as directory:
        directory = pathlib.Path(directory)
        for name in ("tmp", "corpus"):
            (directory / name).mkdir()
        os.environ["TMPDIR"] = str(directory / "tmp")  # where leftovers would be
        while time.time() < options.end:
            reader, writer = os.pipe()
            worker = os.fork()
            if worker == 0:
                os.close(reader)
                os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
                os.dup2(2, 1)
                work(options, directory, first, writer)
            os.close(writer)
            pending = None
            with open(reader, encoding="utf-8") as lines:
                for line in map(json.loads, lines):
                    pending = line if len(line) == 3 else None
                    if pending is None:
                        case, name, change, kind, detail = line
                        counts[change.split(" + ")[0]][kind] += 1
                        if kind == "finding":
                            print(f"{name}, {change}, case {case}: {detail}", flush=True)
            _, status = os.waitpid(worker, 0)
            if pending is not None:
                counts[pending[2].split(" + ")[0]]["finding"] += 1
                print(f"{pending[1]}, {pending[2]}, case {pending[0]}: the process ended with "
                      f"{status}", flush=True)
            first += 1000
            most = max(most, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024)
    rows = collections.defaultdict(collections.Counter)
    for change, outcomes in counts.items():
        group = change.split()[0]
        rows[group if group in ("JSON", "safetensors", "HDF5", "index", "vocabulary",
                               "tokenizer")
             else "bytes and files"].update(outcomes)
    rows["all"] = sum(rows.values(), collections.Counter())
    print(f"\n| what was changed | kinds of change | cases | {' | '.join(KINDS)} |")
    print("|---" * (3 + len(KINDS)) + "|")
    for group, outcomes in rows.items():
        kinds = [change for change in counts if group == "all" or change.startswith(group)]
        kinds = kinds or [change for change in counts if change.split()[0] not in rows]
        print(f"| {group} | {len(kinds)} | {outcomes.total():,} | "
              + " | ".join(f"{outcomes[kind]:,}" for kind in KINDS) + " |")
    print(f"\n{time.time() - start:.0f} s, at most {most:.0f} MB, "
          f"{'atheris' if options.atheris else 'random'}, seed {options.seed}")
    sys.exit(1 if rows["all"]["finding"] else 0)


if __name__ == "__main__":
    main()
