"""Splits that share no image: drawn where a data set has none of its own, and looked at where it has.

Samples that show the same image, under one path or as equal bytes under several, belong to one group, and so do those
of groups that a sample with several images joins (connected components). A group goes to one split as a whole, drawn by
a hash of its smallest id: a group keeps its split when others come or go. A group of more than half of all samples is
trained on, since nothing could be learned without it. Where chance leaves a split empty whose fraction is of a group or
more, as among forty photos it may, the split gets the group that came closest.

Official splits stay as they are; how many images and questions they share is told.

Trade-off: images that look the same but differ in their bytes (another size, another encoder) count as different ones.
"""

from data_prep.sources.splits.drawn import FRACTIONS as FRACTIONS
from data_prep.sources.splits.drawn import check_fractions as check_fractions
from data_prep.sources.splits.drawn import drawn as drawn
from data_prep.sources.splits.overlap import SplitOverlap as SplitOverlap
from data_prep.sources.splits.overlap import overlap_of as overlap_of
