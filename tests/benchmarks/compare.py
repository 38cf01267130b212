"""How fast two commits are beside each other, in one run.

    python -m tests.benchmarks.compare COMMIT COMMIT [--runs 5] [--what train] [--cpu] [--log [FILE]] [--quick]

git puts both in worktrees of a temporary folder; each trains there in a process of its own, and they take turns: a step
of the one, the same step of the other. A ratio is the second's useful tokens a second over the first's in one round;
least and most say how sure it is. The same commit twice shows what the machine's noise is. Both run the same steps
(tests.benchmarks.compare_steps, of this checkout) on what each commit's own tests.benchmarks.ours and .samples set up:
`train` is SmolLM2-135M with adapters and the tiny ViT, packs of 1,280 tokens of ScienceQA's lengths, `train_text` the
same without images; --quick the tests' tiny model. What this gives up: a commit without those modules cannot be
compared, and packages are those of this environment for both. Wants: bash launch/setup_env.sh --smollm2.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from tests.benchmarks import history
from tests.benchmarks.compare_steps import WHAT
from tests.benchmarks.measure import alternate, command, machine, refuse, report, tell

LEAST_RUNS = 3
STEPS = Path(__file__).with_name("compare_steps.py")


class Steps:
    """A process that trains a commit's worktree, a step when it is asked for one."""

    def __init__(self, name: str, tree: Path, folder: Path, what: str, precision: str, quick: bool) -> None:
        folder.mkdir()
        self.name, self._said = name, folder / "stderr"
        # -P: what is imported is the worktree's, not what lies beside the program.
        words = [sys.executable, "-P", str(STEPS), str(folder), what, precision, str(int(quick))]
        with self._said.open("w") as said:
            self._process = subprocess.Popen(
                words,
                cwd=tree,
                env={**os.environ, "PYTHONPATH": str(tree)},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=said,
                text=True,
            )
        assert self._process.stdin and self._process.stdout
        self._ask, self._answers = self._process.stdin, self._process.stdout
        self.facts = self._answer()

    def step(self) -> dict[str, Any]:
        """{"tokens": useful ones, "seconds", "cpu": seconds of the processor} of one step."""
        self._ask.write("step\n")
        self._ask.flush()
        return self._answer()

    def close(self) -> None:
        """Ends the process."""
        self._process.stdin.close()  # type: ignore[union-attr]
        self._answers.close()
        self._process.wait()

    def _answer(self) -> dict[str, Any]:
        answer = self._answers.readline()
        if answer:
            return json.loads(answer)
        self._process.wait()
        said = self._said.read_text().strip().splitlines() or [f"it ended with {self._process.returncode}"]
        refuse(f"commit {self.name} does not train here: {said[-1]}")


@contextmanager
def worktree(commit: str, place: Path, root: Path) -> Iterator[Path]:
    """The commit's files in a worktree at `place`, which is taken away again."""
    if history.git("worktree", "add", "--detach", "--force", str(place), commit, root=root) is None:
        refuse(f"git made no worktree of {commit} at {place}; see: git worktree add --detach {place} {commit}")
    try:
        yield place
    finally:
        history.git("worktree", "remove", "--force", str(place), root=root)


def resolved(commits: Sequence[str], root: Path) -> list[str]:
    """The commits' ids. Tells what is changed in the checkout, since that is of no commit."""
    if history.git("rev-parse", "--git-dir", root=root) is None:
        refuse(f"{root} is not a git checkout (or git is missing), so it has no commits to compare")
    found = []
    for name in commits:
        commit = history.git("rev-parse", "--verify", "--quiet", f"{name}^{{commit}}", root=root)
        if commit is None:
            refuse(f"found {name!r}, expected a commit, branch or tag of {root}; git log --oneline lists them")
        found.append(commit[:12])
    if changed := history.changed_files(root):
        tell(f"warning: not measured, for it is of no commit: changes in {len(changed)} files ({changed[0]}, ...)")
    return found


def compare(
    commits: Sequence[str], given: argparse.Namespace, root: Path = history.ROOT
) -> tuple[list[list[float]], dict[str, Any]]:
    """Useful tokens a second of both, run by run, and facts of the processes that trained."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        trees = [
            stack.enter_context(worktree(commit, folder / side, root))
            for side, commit in zip("ab", commits, strict=True)
        ]
        steps: list[Steps] = []
        for side, commit, tree in zip("ab", commits, trees, strict=True):  # one after another: no one takes cores
            steps.append(Steps(commit, tree, folder / f"run_{side}", given.what, given.precision, given.quick))
            stack.callback(steps[-1].close)
        if given.cpu and steps[0].facts["threads"] > 1:
            refuse("--cpu: threads that wait for others count, too; set OMP_NUM_THREADS=1")
        names = [f"{side}, {commit}" for side, commit in zip("ab", commits, strict=True)]
        found = alternate({name: one.step for name, one in zip(names, steps, strict=True)}, given.runs)
        tokens = [[one["tokens"] for one in found[name]] for name in names]
        if tokens[0] != tokens[1]:
            tell(f"the commits order or pack samples differently: useful tokens of the steps {tokens[0]}, {tokens[1]}")
        speeds = [[one["tokens"] / one["cpu" if given.cpu else "seconds"] for one in found[name]] for name in names]
        return speeds, steps[0].facts


def main(arguments: Sequence[str] | None = None, root: Path = history.ROOT) -> None:
    parser = command(__doc__, logs=True)
    parser.add_argument("commits", nargs=2, metavar="COMMIT", help="a commit, branch or tag")
    parser.add_argument("--what", choices=list(WHAT), default="train", help="(default: train)")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32", help="(default: fp32)")
    parser.add_argument("--cpu", action="store_true", help="seconds of the processor, on a machine that others use")
    given = parser.parse_args(arguments)
    if given.runs < LEAST_RUNS:
        refuse(f"--runs: found {given.runs}, expected at least {LEAST_RUNS}: least and most of fewer say nothing")
    given.runs = 2 if given.quick else given.runs
    commits = resolved(given.commits, root)
    if given.log:
        history.check_log(given.log, given.quick)
    speeds, facts = compare(commits, given, root)
    here = {**machine(), "threads": facts["threads"]}
    lines = [
        history.line(
            commit=commits[one],
            machine=here,
            precision=given.precision,
            what=given.what,
            unit=f"useful tokens/{'CPU s' if given.cpu else 's'}",
            values=speeds[one],
            reference=commits[1 - one],
            beside=speeds[1 - one],
            quick=given.quick,
        )
        for one in (0, 1)
    ]
    if given.log:
        history.append(lines, given.log)
    rows = [
        {"commit": one.commit, "useful tokens/s": one.median, "least": one.least, "most": one.most} for one in lines
    ]
    ratio = {"second over first": lines[1].ratio, "least": lines[1].ratio_least, "most": lines[1].ratio_most}
    report(
        {
            "what": given.what,
            "clock": "processor" if given.cpu else "wall",
            "precision": given.precision,
            "speed": rows,
            "ratio": [ratio],
        },
        given,
    )


if __name__ == "__main__":
    main()
