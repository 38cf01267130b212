"""InstructBLIP as the other rooms see it."""

from __future__ import annotations

from vltrain.models.instructblip.build import blip_weight_files, build_blip, check_blip_sources
from vltrain.models.instructblip.sizes import INSTRUCTBLIP
from vltrain.models.interface import Architecture

ARCHITECTURE = Architecture(
    build=build_blip,
    check_sources=check_blip_sources,
    weight_files=blip_weight_files,
    sizes=(INSTRUCTBLIP,),
)
