"""The table of export formats: architecture -> name -> `Format`. A new one is a file and a line here; an architecture's
first is its default."""

from __future__ import annotations

from vltrain.errors import InputError
from vltrain.export.format import Format
from vltrain.export.formats.adapters import ADAPTERS
from vltrain.export.formats.instructblip import PEFT, WHOLE
from vltrain.export.formats.llava import LLAVA
from vltrain.export.formats.lora import LORA
from vltrain.export.formats.merged import MERGED
from vltrain.export.formats.mmt import MMT
from vltrain.export.formats.stock.formats import LORA as STOCK_LORA
from vltrain.export.formats.stock.formats import MERGED as STOCK_MERGED

FORMATS: dict[str, dict[str, Format]] = {
    "mmt": {"mmt": MMT, "lora": LORA, "merged": MERGED, "llava": LLAVA, "adapters": ADAPTERS},
    "instructblip": {"peft": PEFT, "whole": WHOLE, "adapters": ADAPTERS},
    "stock": {"merged": STOCK_MERGED, "lora": STOCK_LORA, "adapters": ADAPTERS},
}
OF_ALL = {"adapters": ADAPTERS}  # what an architecture has that has nothing of its own here
# What is called otherwise elsewhere.
CALLED = {"instructblip": {"lora": "peft", "merged": "whole", "mmt": "whole"}, "mmt": {"peft": "lora", "whole": "mmt"}}


def find_format(architecture: str, name: str | None, where: str) -> tuple[str, Format]:
    """(name, format) of that name, or the architecture's default.

    Args:
        where: what asks for it, for the error.

    Raises: InputError for a format that the architecture lacks, naming those it has.
    """
    has = FORMATS.get(architecture, OF_ALL)
    name = name or next(iter(has), None)
    if name in has:
        return name, has[name]
    known = sorted({other for formats in FORMATS.values() for other in formats})
    told = f"a run of the architecture {architecture} has no format {name!r}" if name in known else f"found {name!r}"
    called = CALLED.get(architecture, {})
    here = f": what it holds, {called[name]} holds here" if name in called else ""
    raise InputError(f"{where}: {told}{here}, expected one of {', '.join(has)}")


def describe_formats() -> str:
    """The table as lines of a help."""
    lines = []
    for architecture, formats in FORMATS.items():
        lines.append(f"  {architecture}:")
        for number, (name, one) in enumerate(formats.items()):
            lines.append(f"    {name:10}{one.summary}{' (default)' if number == 0 else ''}; loads: {one.loads}")
    return "\n".join(lines)
