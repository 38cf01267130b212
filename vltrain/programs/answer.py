"""`vltrain answer RUN --questions DATASET.tsv --output FOLDER`: answers VLMEvalKit's questions and writes its result
file.

    --questions FILE     a data set as VLMEvalKit has it: index, image or image_path, question, hint, A, B, C, ...
    --output FOLDER      gets MODEL_DATASET.tsv: put it into VLMEvalKit's outputs/MODEL, and score it there with
                         PRED_FORMAT=tsv python run.py --data DATASET --model MODEL --mode eval
    --format FORM        tsv (default), json, or xlsx (needs xlsxwriter)
    --name NAME          what the model is called; left out: the run's folder
    --images FOLDER      of the files that image_path names
    --prompt TEXT        how it is asked, with {question}, {hint} and {options}; left out: as VLMEvalKit asks. A tuned
                         model knows its own prompt best
    --checkpoint         a checkpoint's folder, best, or none; left out: the run's newest
    --max-new-tokens N   left out: the recipe's
    --batch-size N       questions at once (8)

Exit code: 0, or 2 for a mistake in the input.
"""

from __future__ import annotations

from itertools import tee
from pathlib import Path

from vltrain.config.command_line import COMMAND_LINE, Arguments
from vltrain.console import watched
from vltrain.errors import InputError, exits_cleanly
from vltrain.harness.vlmevalkit import open_questions, require_prompt, result_file, write_results
from vltrain.inference import load
from vltrain.launching.run_folder import read_command

OPTIONS = ("questions", "format", "name", "images", "prompt", "checkpoint", "max-new-tokens", "batch-size")


@exits_cleanly
def main(argv: list[str], *, program: str = "vltrain answer") -> int:
    """Answers what the command line names. Returns the exit code."""
    told = read_command(argv, program=program, help_text=__doc__, options=OPTIONS)
    if told is None:
        return 0
    run, output, arguments = told
    questions = arguments.last("questions")
    if questions is None:
        raise InputError(f"{COMMAND_LINE}: --questions is missing, expected a TSV of VLMEvalKit's")
    answer(run, Path(questions), output, arguments)
    return 0


def answer(run: Path, questions: Path, output: Path, arguments: Arguments) -> Path:
    """Answers a file of questions with the run in the folder `run`. Returns the result file in `output`.

    Raises: InputError for a run that is none, a file that is no table of questions, a result that is there already.
    """
    result = result_file(
        output, arguments.last("name") or run.resolve().name, questions.stem, arguments.last("format") or "tsv"
    )
    if result.exists():
        raise InputError(f"{result}: is there already; remove it, or name another --output or --name")
    prompt, images = arguments.last("prompt"), arguments.last("images")
    require_prompt(prompt)
    batch_size, new_tokens = arguments.whole("batch-size", 1) or 8, arguments.whole("max-new-tokens", 1)
    folder = None if images is None else Path(images)
    if folder is not None and not folder.is_dir():
        raise InputError(f"{COMMAND_LINE}: --images: found {images}, expected a folder")
    found = open_questions(questions, folder)
    model = load(run, checkpoint=arguments.last("checkpoint"))
    asked, kept = tee(found)
    answers = model.answer_all((row.asked(prompt) for row in asked), batch_size, max_new_tokens=new_tokens)
    rows, said = [], []
    for row, text in watched(zip(kept, answers, strict=True), title=questions.stem, unit="question", total=len(found)):
        rows.append(row.without_images())
        said.append(text)
    write_results(result, rows, said)
    print(f"{result}: {len(said)} answers")
    return result
